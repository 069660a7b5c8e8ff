"""How the benchmark compiles, times and reports: cold and from the cache, warm, as a table."""

import functools
import hashlib
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import cosmos3_jax
from cosmos3_jax.config import Config
from cosmos3_jax.parallel.device import compiler_options, default_device, memory_peak
from cosmos3_jax.runtime import energy
from cosmos3_jax.runtime.programs import calls, distinct_calls, shapes_of
from cosmos3_jax.sampling.stages import Stage, Values

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
def _fresh_cache() -> Generator[list[str], None, None]:
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


def compile_cold_and_cached(
    function: Callable, *arguments, donate: tuple[int, ...] = ()
) -> tuple[jax.stages.Compiled, dict]:
    """Compile twice: as the first process that runs a program, and as the second.

    Returns:
        The program, and the seconds of both, tracing and lowering included: `compile_seconds`, and
        `compile_seconds_cached`, which is None where JAX did not read the program from its cache.
    """

    def compiled() -> tuple[jax.stages.Compiled, float]:
        jax.clear_caches()
        start = time.perf_counter()
        # Without options, even none of them, JAX would return what it just compiled.
        program = lowered.compile(compiler_options=compiler_options())
        return program, time.perf_counter() - start

    with _fresh_cache() as hits:
        jax.clear_caches()
        start = time.perf_counter()
        lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
        lowering = time.perf_counter() - start
        program, cold = compiled()
        before = len(hits)
        _, cached = compiled()
        was_read = len(hits) > before
    return program, {
        "compile_seconds": lowering + cold,
        "compile_seconds_cached": lowering + cached if was_read else None,
    }


def median_of(run: Callable[[], tuple[Any, float]], repeats: int) -> tuple[Any, dict]:
    """Run once to warm up and then `repeats` times: the last result, median and samples in seconds.

    The run that would be the warm-up counts, alone, if it takes more than `LONG_SECONDS`: what a
    first run starts and loads is nothing beside that.

    Args:
        run: returns its result and the seconds that it took.
    """
    result, first = run()
    samples = [first]
    if first <= LONG_SECONDS:
        samples = []
        for _ in range(repeats):
            del result  # two results at once would be memory that no generation needs
            result, seconds = run()
            samples.append(seconds)
    return result, {"seconds": statistics.median(samples), "samples": samples}


class Measure:
    """Executes a stage like `programs.Run`, and measures it: compiled anew, warm, several times.

    Attributes:
        stages: of each stage, by name: `seconds` (the median), `samples`, `joules` (the median,
            see `energy`; None where nobody counts them), `temporary_gib`, `output_gib`,
            `compile_seconds` and `compile_seconds_cached`, and what `inspect` notes.
    """

    def __init__(
        self,
        params: dict,
        config: Config,
        *,
        repeats: int = 3,
        block_steps: int | None = None,
        report: Callable[[str, dict], None] | None = None,
        inspect: Callable[[Stage, list[jax.stages.Compiled]], dict] | None = None,
    ):
        """
        Args:
            params: all parts.
            repeats, block_steps: see `median_of` and `programs.Run`.
            report: called with a stage's name and what was measured, when it has ended.
            inspect: what else to note of a stage's compiled programs.
        """
        self.params, self.config = params, config
        self.repeats, self.block_steps = repeats, block_steps
        self.report, self.inspect = report, inspect
        self.stages: dict[str, dict] = {}

    def __call__(self, stage: Stage, values: Values) -> Values:
        params, static = self.params[stage.part], stage.static(values)
        function = functools.partial(stage.function, config=self.config, **static)
        donate = () if stage.donated is None else (stage.donated + 1,)
        compiled, compiling = {}, []
        for change in distinct_calls(stage, values, self.block_steps):
            inputs = stage.inputs(values | change)
            program, seconds = compile_cold_and_cached(function, params, *inputs, donate=donate)
            compiled[shapes_of(change)] = program
            compiling.append(seconds)
        devices = jax.tree.leaves(params)[0].sharding.addressable_devices
        drawn: list[float | None] = []

        def run() -> tuple[Values, float]:
            now = values
            if stage.donated is not None:  # the state of the loop: each run takes one of its own
                now = values | {"state": jax.tree.map(jnp.copy, values["state"])}
                jax.block_until_ready(now["state"])
            before = energy.joules(devices)
            start = time.perf_counter()
            result: Values = {}
            for change in calls(stage, values, self.block_steps):
                now = now | change
                result = compiled[shapes_of(change)](params, *stage.inputs(now))
                now = now | result
            jax.block_until_ready(result)
            seconds = time.perf_counter() - start
            after = energy.joules(devices)
            drawn.append(None if before is None or after is None else after - before)
            return result, seconds

        result, ran = median_of(run, self.repeats)
        counted = drawn[-len(ran["samples"]) :]
        analyses = [program.memory_analysis() for program in compiled.values()]
        found = ran | {
            "joules": None if None in counted else statistics.median(counted),
            "temporary_gib": max(x.temp_size_in_bytes for x in analyses) / GIB,
            "output_gib": max(x.output_size_in_bytes for x in analyses) / GIB,
            **_sums(compiling),
        }
        if self.inspect is not None:
            found |= self.inspect(stage, list(compiled.values()))
        self.stages[stage.name] = found
        if self.report is not None:
            self.report(stage.name, found)
        return result


def _sums(parts: list[dict]) -> dict:
    """Of each value over the parts; None where one has none."""
    return {
        name: None if None in (found := [part[name] for part in parts]) else sum(found)
        for name in parts[0]
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
    """As nvidia-smi tells it: driver version and power limit of the first GPU, and which machine it
    is: a digest of the GPUs' identities, to know figures of the same chips by.
    """
    names = ("driver_version", "power.limit", "uuid")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        driver, power, _ = done.stdout.splitlines()[0].split(", ")
        gpus = sorted(line.split(", ")[-1] for line in done.stdout.splitlines())
        machine = hashlib.sha256(",".join(gpus).encode()).hexdigest()[:8]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        driver = power = machine = None
    return {"driver": driver, "power_limit": power, "machine": machine}
