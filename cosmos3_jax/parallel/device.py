"""The device that computations run on, and how a program of ours sets JAX up for it.

A library leaves the settings of `use_whole_device` and `use_compilation_cache` to whoever imports
it; the command line makes them.
"""

import contextlib
import dataclasses
import os
import sys
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from cosmos3_jax import guard

MEMORY_FRACTION = "0.92"  # of a GPU; JAX takes 0.75 unless told otherwise
# Of a container, as it sees them: of the second and of the first version of control groups.
GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclasses.dataclass(frozen=True)
class PlannedGPU:
    """What a device says of itself that decides how we compute: here a Hopper GPU, to plan for."""

    platform: str = "gpu"
    compute_capability: str = "9.0"


AnyDevice = jax.Device | PlannedGPU


def hopper_obstacle(dtype: DTypeLike, device: AnyDevice) -> str | None:
    """Why a kernel for Hopper cannot run on a device with arrays of a dtype, or None if it can."""
    if device.platform != "gpu" or getattr(device, "compute_capability", None) != "9.0":
        return "it is written for Hopper GPUs (compute capability 9.0)"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {dtype}, not bfloat16 or float16"
    return None


def default_device() -> jax.Device:
    """What `jax.default_device` sets, else this process's first device."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen


def backend_obstacle() -> str | None:
    """What keeps JAX from its devices, in a line for whoever set it up; None if nothing does.

    JAX's own error may be empty, as where `JAX_PLATFORMS` names a platform that has no plugin.
    """
    try:
        jax.local_devices()
        return None
    except Exception as error:
        installed = ["cpu", *(each.name for each in metadata.entry_points(group="jax_plugins"))]
        chosen = jax.config.jax_platforms
        asked = f" with JAX_PLATFORMS={chosen}" if chosen else ""
        way_out = "unset it, or choose one of these" if chosen else "see JAX's installation guide"
        return (
            f"JAX cannot start{asked}: {guard.reason(error, guard.LONG_REASON)}. Installed are "
            f"{', '.join(installed)}: {way_out}"
        )


def memory_limit() -> int | None:
    """Bytes that JAX may use of the default device; None where it does not say, as on a CPU."""
    return (default_device().memory_stats() or {}).get("bytes_limit")


def memory_peak() -> int | None:
    """The most bytes that this process has had in use on the default device, if it says."""
    return (default_device().memory_stats() or {}).get("peak_bytes_in_use")


def host_memory() -> int | None:
    """Bytes of the host's memory, or what this process's control group may have of it; None where
    the system does not say.
    """
    sizes = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in GROUP_LIMITS:
        with contextlib.suppress(ValueError, OSError):  # no such file, or `max`
            sizes.append(int(Path(path).read_text()))
    return min(sizes, default=None)


def use_whole_device() -> None:
    """Let JAX take nearly all of a GPU's memory, unless the environment says how much.

    It must be called before JAX starts its backend.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; never both
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", MEMORY_FRACTION)


def compiler_options() -> dict[str, bool]:
    """For `jax.jit` of a program for the default device.

    On a GPU, products are cuBLAS's alone: it adds a layer's input to the sums of a product while it
    has them at hand. Where XLA may choose Triton's products, this sum is a kernel of its own, which
    reads and writes all tokens. What `XLA_FLAGS` says of it comes first.
    """
    name = "xla_gpu_enable_triton_gemm"
    if default_device().platform != "gpu" or name in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {name: False}


def cache_folder() -> str:
    """`$JAX_COMPILATION_CACHE_DIR`, else `cosmos3_jax/xla` in `user_cache()`.

    Raises OSError if nothing says where that is.
    """
    return jax.config.jax_compilation_cache_dir or str(user_cache() / "xla")


def user_cache() -> Path:
    """`cosmos3_jax` in `$XDG_CACHE_HOME` or `~/.cache`, which need not be there.

    Raises OSError where a user has neither a HOME nor a home folder, as in some containers.
    """
    chosen = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache") / "cosmos3_jax"
    except RuntimeError as error:
        raise OSError("there is no home folder: set HOME or XDG_CACHE_HOME") from error


def use_compilation_cache(enabled: bool = True) -> None:
    """Keep compiled programs on disk, for processes to come; or keep none.

    JAX's own environment variables come first. Without a folder that can be written there is a
    line on stderr, and no cache. JAX 0.10 keeps no program that calls back to the host; none of the
    command line's does.
    """
    if not enabled or not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = ""
    try:
        folder = cache_folder()
        if "://" not in folder:  # or it is a bucket, which JAX knows how to reach
            Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError("it is not writable")
    except OSError as error:
        # JAX itself would go on too, with a warning for every program.
        jax.config.update("jax_enable_compilation_cache", False)
        where = f" in {folder}" if folder else ""
        print(
            f"cosmos3-jax: no compilation cache{where} ({error}); set "
            "JAX_COMPILATION_CACHE_DIR to one that can be written, or pass --no-compilation-cache",
            file=sys.stderr,
        )
        return
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def default_dtype() -> str:
    """Of weights and computation unless one is chosen: float32 on a CPU, where bfloat16 is slow."""
    return "float32" if default_device().platform == "cpu" else "bfloat16"
