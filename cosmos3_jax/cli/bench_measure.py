"""How the benchmark compiles, times and reports: cold and from the cache, warm, as a table."""

import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import cosmos3_jax
from cosmos3_jax.parallel.device import default_device, memory_peak

LONG_SECONDS = 30  # a run that is not repeated
GIB = 2**30
CACHE_HIT = "/jax/compilation_cache/cache_hits"
# What changes a measurement from outside of the program; XLA_FLAGS is noted even if it is not set.
SETTINGS = (
    "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR", "TF_GPU_ALLOCATOR",
    "TF_FORCE_GPU_ALLOW_GROWTH", "NVIDIA_TF32_OVERRIDE", "JAX_DEFAULT_MATMUL_PRECISION",
)  # fmt: skip


@contextmanager
def _fresh_cache() -> Iterator[list[str]]:
    """An empty persistent compilation cache that keeps every program. Yields its hits as they come.

    The caller's cache, if there is one, is back in place afterwards.
    """
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == CACHE_HIT:
            hits.append(event)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        settings = {
            "jax_enable_compilation_cache": True,
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in settings}
        jax.monitoring.register_event_listener(listen)
        try:
            _configure(settings)
            yield hits
        finally:
            _configure(before)
            jax.monitoring.unregister_event_listener(listen)


def _configure(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()  # or the folder of the first compilation stays in use


def compile_cold_and_cached(function: Callable, *arguments) -> tuple[jax.stages.Compiled, dict]:
    """Compile twice: as the first process that runs a program, and as the second.

    Returns:
        The program, and the seconds of both, tracing and lowering included: `compile_seconds`, and
        `compile_seconds_cached`, which is None where JAX did not read the program from its cache.
    """

    def compiled() -> tuple[jax.stages.Compiled, float]:
        jax.clear_caches()
        start = time.perf_counter()
        # Without options, even none of them, JAX would return what it just compiled.
        program = lowered.compile(compiler_options={})
        return program, time.perf_counter() - start

    with _fresh_cache() as hits:
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*arguments)
        lowering = time.perf_counter() - start
        program, cold = compiled()
        before = len(hits)
        _, cached = compiled()
        was_read = len(hits) > before
    return program, {
        "compile_seconds": lowering + cold,
        "compile_seconds_cached": lowering + cached if was_read else None,
    }


def measure(program: jax.stages.Compiled, *arguments, repeats: int) -> tuple[Any, dict]:
    """Run a program once to warm up and then `repeats` times: its last result, seconds, memory.

    The run that would be the warm-up counts, alone, if it takes more than `LONG_SECONDS`: what a
    first run starts and loads is nothing beside that.
    """

    def run() -> tuple[Any, float]:
        start = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        return result, time.perf_counter() - start

    result, first = run()
    samples = [first]
    if first <= LONG_SECONDS:
        samples = []
        for _ in range(repeats):
            del result  # two results at once would be memory that no generation needs
            result, seconds = run()
            samples.append(seconds)
    analysis = program.memory_analysis()
    return result, {
        "seconds": statistics.median(samples),
        "samples": samples,
        "temporary_gib": analysis.temp_size_in_bytes / GIB,
        "output_gib": analysis.output_size_in_bytes / GIB,
    }


def device_peak_gib() -> float | None:
    """See `device.memory_peak`."""
    peak = memory_peak()
    return None if peak is None else peak / GIB


def environment() -> dict:
    """What a measurement depends on besides this package: chip, driver, versions and settings."""
    device = default_device()
    kept = ("jax", "nvidia-", "numpy", "flax")
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "device": device.device_kind,
        "backend": device.platform,
        "platform_version": device.client.platform_version,
        **_nvidia(),
        "versions": {
            "cosmos3_jax": cosmos3_jax.__version__,
            "python": platform.python_version(),
            **{name: version for name, version in sorted(found.items()) if name.startswith(kept)},
        },
        "settings": {
            name: os.environ.get(name)
            for name in SETTINGS
            if name in os.environ or name == "XLA_FLAGS"
        },
    }


def _nvidia() -> dict[str, str | None]:
    """Driver version and power limit, as nvidia-smi tells them of the first GPU."""
    names = ("driver_version", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        driver, power = done.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        driver = power = None
    return {"driver": driver, "power_limit": power}


COLUMNS = ("seconds", "min..max", "TFLOP/s", "temporary GiB", "compile s", "cached s")


def table(name: str, result: dict) -> str:
    """What `bench.run_bench` returns, for people."""
    job = result["job"]
    lines = [
        f"{name}: {job['num_frames']} frames of {job['height']}x{job['width']} at {job['fps']:g} "
        f"fps, {job['steps']} steps, {job['text_tokens']} + {job['negative_tokens']} text tokens"
    ]
    lines.append(
        f"{'':24}{COLUMNS[0]:>9}{COLUMNS[1]:>20}" + "".join(f"{c:>15}" for c in COLUMNS[2:])
    )
    for stage, found in result["stages"].items():
        samples = found.get("samples")
        spread = f"{min(samples):.3f}..{max(samples):.3f}" if samples else "-"
        rate = result["denoise_tflops_per_second"] if stage == "denoise" else None
        cells = (
            rate,
            found.get("temporary_gib"),
            found.get("compile_seconds"),
            found.get("compile_seconds_cached"),
        )
        shown = "".join(f"{'-' if cell is None else format(cell, '.3f'):>15}" for cell in cells)
        lines.append(f"  {stage:22}{found['seconds']:9.3f}{spread:>20}{shown}")
    peak = result["peak_gib"]
    peak = "the device does not say" if peak is None else f"{peak:.3f} GiB"
    lines.append(
        f"  whole job {result['seconds']:.3f} s; peak memory {peak} "
        f"(estimated {result['estimated_gib']:.3f} GiB)"
    )
    return "\n".join(lines)
