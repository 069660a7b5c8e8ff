"""How a process of ours sets JAX up: its share of the device's memory, and its compilation cache.

For programs of our own, such as the command line. A library leaves these to whoever imports it.
"""

import os
import sys
from pathlib import Path

import jax

MEMORY_FRACTION = "0.92"  # JAX takes 0.75 of a card; the rest would be nobody's


def use_whole_device() -> None:
    """Let JAX take nearly all of a GPU's memory, unless the environment says how much.

    It must be called before JAX starts its backend.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # its older name; never both
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", MEMORY_FRACTION)


def cache_folder() -> Path:
    """`$JAX_COMPILATION_CACHE_DIR`, else `cosmos3_jax/xla` in `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cosmos3_jax" / "xla"


def use_compilation_cache(enabled: bool = True) -> None:
    """Keep compiled programs on disk, for processes to come; or keep none.

    A folder that cannot be written is said on stderr, and costs no more than the cache. A program
    that calls back to the host, as the loop with a progress bar does, is never kept: JAX's rule.
    """
    jax.config.update("jax_enable_compilation_cache", enabled)
    if not enabled:
        return
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is not writable")
    except OSError as error:
        # JAX itself would go on too, with a warning for every program.
        jax.config.update("jax_enable_compilation_cache", False)
        print(
            f"cosmos3-jax: no compilation cache in {folder} ({error}); set XDG_CACHE_HOME to a "
            "folder that can be written, or pass --no-compilation-cache",
            file=sys.stderr,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
