"""XLA's flags for tests, whose programs run for milliseconds and are compiled for seconds."""

import os

import jax

# Machine code is made in a hurry, and by the emitters of single operations, which are three times
# as fast as those of fusions. What is computed in which order XLA has settled before either.
OPTIONS = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):  # later ones do not know it
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
else:  # on two cores a step of the sound autoencoder waits for ever for threads of its own pool
    OPTIONS["xla_cpu_multi_thread_eigen"] = False
FLAGS = " ".join(f"--{name}={value}".lower() for name, value in OPTIONS.items())


def simulated(devices: int) -> str:
    """The flags of a process with so many simulated devices, and those of the environment."""
    others = [x for x in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in x]
    return " ".join([FLAGS, *others, f"--xla_force_host_platform_device_count={devices}"])
