"""The device that computations run on when nothing says otherwise."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class PlannedGPU:
    """What a device says of itself that decides how we compute: here a Hopper GPU, to plan for."""

    platform: str = "gpu"
    compute_capability: str = "9.0"


AnyDevice = jax.Device | PlannedGPU


def default_device() -> jax.Device:
    """What `jax.default_device` sets, else this process's first device."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen


def memory_limit() -> int | None:
    """Bytes that JAX may use of the default device; None where it does not say, as on a CPU."""
    return (default_device().memory_stats() or {}).get("bytes_limit")


def memory_peak() -> int | None:
    """The most bytes that this process has had in use on the default device, if it says."""
    return (default_device().memory_stats() or {}).get("peak_bytes_in_use")
