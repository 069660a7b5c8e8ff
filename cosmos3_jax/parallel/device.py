"""The device that computations run on, and how a program of ours sets JAX up for it.

A library leaves the settings of `use_whole_device` and `use_compilation_cache` to whoever imports
it; the command line makes them.
"""

import contextlib
import dataclasses
import os
import sys
from pathlib import Path

import jax

MEMORY_FRACTION = "0.92"  # of a GPU; JAX takes 0.75 unless told otherwise
# Of a container, as it sees them: of the second and of the first version of control groups.
GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


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


def cache_folder() -> str:
    """`$JAX_COMPILATION_CACHE_DIR`, else `cosmos3_jax/xla` in `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = jax.config.jax_compilation_cache_dir
    if chosen:
        return chosen
    return str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosmos3_jax/xla")


def use_compilation_cache(enabled: bool = True) -> None:
    """Keep compiled programs on disk, for processes to come; or keep none.

    JAX's own environment variables come first. Without a folder that can be written there is a
    line on stderr, and no cache. JAX 0.10 keeps no program that calls back to the host; none of the
    command line's does.
    """
    if not enabled or not jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = cache_folder()
    try:
        if "://" not in folder:  # or it is a bucket, which JAX knows how to reach
            Path(folder).mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError("it is not writable")
    except OSError as error:
        # JAX itself would go on too, with a warning for every program.
        jax.config.update("jax_enable_compilation_cache", False)
        print(
            f"cosmos3-jax: no compilation cache in {folder} ({error}); set "
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
