"""Fixtures that several test files share."""

import functools
import gc
import os
import signal

import jax
import mesh_cases
import pytest
import quick
import torch
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from oracle import load_pipeline, save_pipeline
from several_processes import Command

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.tiny_tokenizer import write_tokenizer
from cosmos3_jax.models.tokenizer import Tokenizer
from cosmos3_jax.parallel import device

# Most of the time of most tests goes into machine code that runs for milliseconds. These flags hold
# here and in the processes that tests start; JAX reads them when it first needs a device.
os.environ["XLA_FLAGS"] = f"{quick.FLAGS} {os.environ.get('XLA_FLAGS', '')}"

# Where there is a GPU, torch and other processes need a share of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# A shell that runs `make test &` has it ignore Ctrl-C, and so the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# At these sizes torch's second thread only waits for the first, and takes the core from others.
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that are started
torch.set_num_threads(1)


def pytest_collection_finish():
    """What is imported by now stays: the collector need not look at it each time."""
    gc.collect()
    gc.freeze()


# Two processes share the files out, one after the other: the longest first, so that neither is left
# alone with one at the end.
LONGEST = (
    "test_gpu_dry", "test_sharding", "test_verify_mutations", "test_training_mesh",
    "test_benchmarks", "test_tiny_autoencoders", "test_pipeline", "test_pipeline_run",
    "test_verify", "test_notebook", "test_video_vae", "test_distributed", "test_main",
    "test_tiny_training", "test_tiny_trained", "test_training", "test_generate",
    "test_conditioning", "test_tiny_checkpoint", "test_lora", "test_readme", "test_steps",
    "test_export", "test_video_vae_mistakes", "test_architecture", "test_bench", "test_measure",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    names = [*LONGEST, None]
    items.sort(key=lambda item: names.index(item.path.stem if item.path.stem in names else None))


def pytest_addoption(parser):
    parser.addoption("--sensitivities", action="store_true", help="print what tolerances stand on")
    parser.addoption("--need-gpu", action="store_true", help="fail if no test passed")
    parser.addoption(
        "--dry", action="store_true", help="run GPU tests on the CPU: the same code, tiny sizes"
    )


def pytest_sessionfinish(session, exitstatus):
    """With --need-gpu a run in which no test passed has failed: no GPU was seen."""
    if session.config.getoption("--need-gpu") and not hasattr(session.config, "workerinput"):
        reports = session.config.pluginmanager.get_plugin("terminalreporter")
        if exitstatus == 0 and not reports.stats.get("passed"):
            reports.write_line("no GPU test ran: JAX sees no GPU")
            session.exitstatus = 1


@pytest.fixture(scope="session")
def dry(pytestconfig) -> bool:
    """Whether a GPU test runs on the CPU, to see that it still runs."""
    return pytestconfig.getoption("--dry")


def pytest_runtest_setup(item):
    """A test marked `gpu(count)` runs on machines with as many GPUs, and is named on others.

    With two GPUs or more, tests of one are left out: the machine with one GPU runs them.
    """
    marker = item.get_closest_marker("gpu")
    if marker is None or item.config.getoption("--dry"):
        return
    needed = marker.kwargs.get("count", 1)
    found = len(jax.devices()) if jax.default_backend() == "gpu" else 0
    if found < needed:
        pytest.skip(f"not run: needs {needed} GPU{'s' * (needed > 1)}, and there are {found}")
    if needed == 1 < found:
        pytest.skip("not run: needs one GPU, and is run on machines with one")


def pytest_terminal_summary(terminalreporter, config):
    """The table of `rounding.check`: what was measured, and the tolerance that stands on it."""
    if not config.getoption("--sensitivities"):
        return
    terminalreporter.write_line("| test | one unit moves it by | tolerance | times |")
    terminalreporter.write_line("|---|---|---|---|")
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for key, value in report.user_properties:
            if key == "sensitivity":
                name, found, tolerance = value
                test = " ".join(filter(None, (report.nodeid.removeprefix("tests/"), name)))
                times = tolerance / found
                terminalreporter.write_line(
                    f"| {test} | {found:.1e} | {tolerance:.1e} | {times:.0f} |"
                )


@pytest.fixture(scope="session")
def public_checkpoint(tmp_path_factory):
    """A small checkpoint with sound, saved by the oracle in the public layout."""
    folder = tmp_path_factory.mktemp("public") / "checkpoint"
    save_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def silent_checkpoint(tmp_path_factory):
    """The same without sound."""
    folder = tmp_path_factory.mktemp("silent") / "checkpoint"
    save_pipeline(folder, sound_gen=False)
    return folder


@pytest.fixture(scope="module")
def oracle(public_checkpoint):
    """(schedule, dtype) -> the oracle's pipeline on that checkpoint, loaded once."""
    return functools.cache(functools.partial(load_pipeline, public_checkpoint))


@pytest.fixture(scope="module")
def model(public_checkpoint):
    """That checkpoint in float32."""
    return Cosmos3.from_pretrained(public_checkpoint, dtype="float32")


@pytest.fixture
def compiled():
    """The names of the programs that XLA compiles from here on."""
    log = []

    def listen(event, duration, *, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            log.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield log
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory):
    """A tokenizer with a token for each byte, as the random checkpoint has it."""
    return write_tokenizer(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="session")
def byte_tokenizer(byte_folder):
    return Tokenizer.from_folder(byte_folder)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """The random checkpoint is written anew, not found in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def divisible_checkpoint(tmp_path_factory):
    """A checkpoint whose heads and widths several devices can share."""
    folder = tmp_path_factory.mktemp("four") / "heads"
    mesh_cases.write_checkpoint(folder)
    return folder


@pytest.fixture
def run_command(tmp_path, divisible_checkpoint):
    """Start commands; whatever happens, they end with the test."""
    started = []

    def run(name: str, devices: int | str, *options: str, **settings) -> Command:
        command = Command(tmp_path / name, divisible_checkpoint, devices, *options, **settings)
        started.append(command)
        return command

    yield run
    for command in started:
        command.process.kill()
        command.process.wait()


@pytest.fixture
def compilation_cache(tmp_path):
    """A folder in which JAX keeps every program that it can."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture
def no_compilation_cache(monkeypatch):
    """Commands run in this process leave its settings alone; what they do is seen in others."""
    monkeypatch.setattr(device, "use_compilation_cache", lambda *_: None)


@pytest.fixture
def unloaded(monkeypatch):
    """Whoever asks for weights fails the test."""

    def fail(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(Cosmos3, "load", fail)
    monkeypatch.setattr(load, "load_params", fail)
