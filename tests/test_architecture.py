"""How the package is divided: which part may import which, the old names, no torch; and that a
stage of a generation, or a checkpoint's files, are known in one place.
"""

import ast
import importlib
import pkgutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

import cosmos3_jax
from cosmos3_jax import generate, moved
from cosmos3_jax.checkpoint import load
from cosmos3_jax.cli import main as cli
from cosmos3_jax.models.tokenizer import Tokenizer
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime.measure import Measure
from cosmos3_jax.sampling import stages

ROOT = Path(cosmos3_jax.__file__).parent
PARTS = (
    "guard", "limits", "json_config", "recipes", "config", "parallel", "models", "sampling",
    "checkpoint", "io", "runtime", "training", "pipeline", "cli",
)  # fmt: skip
# What each part may import besides itself. The package's own `__init__` and `__main__`, and the old
# names in `moved`, are above all of them.
BASE = {"guard", "limits", "json_config", "recipes", "config", "parallel"}
MAY_IMPORT = {
    "guard": set(),
    "limits": set(),
    "json_config": {"guard", "limits"},
    "recipes": {"guard", "limits", "json_config"},
    "config": {"guard", "limits", "json_config", "recipes"},
    "parallel": {"guard", "limits", "json_config", "recipes", "config"},
    "models": BASE,
    "sampling": BASE | {"models"},
    "checkpoint": BASE | {"models"},
    "io": BASE | {"models", "sampling", "checkpoint"},
    "runtime": BASE | {"models", "sampling", "checkpoint"},
    "training": BASE | {"models", "sampling", "checkpoint"},
    "pipeline": set(PARTS) - {"pipeline", "cli", "training"},
    "cli": set(PARTS) - {"training", "cli"},
}
APART = {"__init__", "__main__", "moved"}
# The package alone, for its version: it imports no module that is not imported by then.
VERSION_ALONE = {Path("runtime/measure.py"), Path("cli/options.py"), Path("cli/record.py")}


def part_of(file: Path) -> str:
    """The part that a file belongs to, by its path in the package."""
    return file.parts[0].removesuffix(".py")


def imported(node: ast.AST, package: tuple[str, ...]) -> set[str]:
    """The parts that a node of a module in `package` imports; `__init__` is the package itself."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = (node.module or "").split(".") if node.module else []
        if node.level:
            base = [*package[: len(package) - node.level + 1], *base]
        names = [base + [alias.name] for alias in node.names]
    else:
        return set()
    ours = [name[1:] for name in names if name[0] == "cosmos3_jax"]
    return {name[0] if name and name[0] in {*PARTS, *APART} else "__init__" for name in ours}


def violations(file: Path, source: str) -> list[str]:
    """The imports of one file that go in another direction than allowed.

    Args:
        file: its path in the package.
        source: its text.
    """
    part, package = part_of(file), ("cosmos3_jax", *file.parts[:-1])
    if part in APART:
        return []
    allowed = MAY_IMPORT[part] | {part}
    if file in VERSION_ALONE:
        allowed |= {"__init__"}
    return [
        f"{file}:{node.lineno} {part} imports {name}"
        for node in ast.walk(ast.parse(source))
        for name in sorted(imported(node, package) - allowed)
    ]


def test_every_module_belongs_to_a_part():
    files = [file.relative_to(ROOT) for file in ROOT.rglob("*.py")]
    assert {part_of(file) for file in files} == {*PARTS, *APART}


def test_imports_go_in_one_direction():
    files = sorted(ROOT.rglob("*.py"))
    found = [x for file in files for x in violations(file.relative_to(ROOT), file.read_text())]
    assert not found, "\n".join(found)


def test_no_part_imports_another_that_imports_it():
    """The table above has no cycle, and keeps some parts from each other."""
    reached = {part: set(others) for part, others in MAY_IMPORT.items()}
    for _ in PARTS:
        for others in reached.values():
            others |= set().union(*(reached[other] for other in others))
    assert not [part for part in PARTS if part in reached[part]]
    for one, other in (("sampling", "checkpoint"), ("runtime", "io"), ("training", "pipeline")):
        assert other not in MAY_IMPORT[one] and one not in MAY_IMPORT[other]
    assert not {"io", "runtime", "pipeline"} & MAY_IMPORT["training"]


@pytest.mark.parametrize(
    ("file", "source", "said"),
    [
        ("sampling/a.py", "from cosmos3_jax.checkpoint import load", "sampling imports checkpoint"),
        ("sampling/a.py", "from cosmos3_jax import checkpoint", "sampling imports checkpoint"),
        ("sampling/a.py", "from ..checkpoint import load", "sampling imports checkpoint"),
        ("sampling/a.py", "from .. import checkpoint", "sampling imports checkpoint"),
        ("checkpoint/a.py", "import cosmos3_jax.sampling.unipc", "checkpoint imports sampling"),
        ("models/a.py", "def f():\n    import cosmos3_jax.runtime.job", "models imports runtime"),
        ("runtime/a.py", "from cosmos3_jax.io import media as m", "runtime imports io"),
        ("training/a.py", "from cosmos3_jax.pipeline import Cosmos3", "training imports pipeline"),
        ("io/a.py", "from cosmos3_jax import Cosmos3", "io imports __init__"),
        ("io/a.py", "import cosmos3_jax", "io imports __init__"),
        ("pipeline.py", "from cosmos3_jax.cli import main", "pipeline imports cli"),
        ("io/a.py", "import cosmos3_jax.unipc", "io imports __init__"),  # an old name
    ],
)
def test_a_wrong_import_is_found(file, source, said):
    line = source.count("\n") + 1
    assert violations(Path(file), source) == [f"{file}:{line} {said}"]


def test_a_right_import_is_not_found():
    source = "import numpy\nfrom cosmos3_jax.models import rope\nfrom . import unipc\nimport jax.io"
    assert violations(Path("sampling/a.py"), source) == []


@pytest.mark.parametrize("old", sorted(moved.MOVED))
def test_an_old_name_warns_and_is_the_new_module(old):
    name, new = f"cosmos3_jax.{old}", f"cosmos3_jax.{moved.MOVED[old]}"
    module = importlib.import_module(new)
    sys.modules.pop(name, None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert importlib.import_module(name) is module
    assert [x.category for x in said] == [DeprecationWarning]
    assert f"{name} is {new} now" in str(said[0].message)
    assert module.__name__ == module.__spec__.name == new


def test_the_old_module_of_generate():
    from cosmos3_jax.generate import generate

    from cosmos3_jax.sampling import generate as module

    assert generate is module.generate is cosmos3_jax.generate
    assert sys.modules["cosmos3_jax.generate"] is module


def test_the_warning_names_the_line_that_imports(tmp_path):
    (tmp_path / "theirs.py").write_text("import jax\nfrom cosmos3_jax.unipc import tableau\n")
    command = [sys.executable, "-W", "always::DeprecationWarning", "theirs.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if "cosmos3_jax" in line]
    assert said[0].startswith(f"{tmp_path}/theirs.py:2: DeprecationWarning: cosmos3_jax.unipc is")
    assert sum("DeprecationWarning" in line for line in said) == 1


def test_no_module_imports_torch_or_an_old_name():
    """All modules, in a process of its own in which an old name is an error."""
    found = pkgutil.walk_packages([str(ROOT)], "cosmos3_jax.")
    names = sorted(module.name for module in found if not module.name.endswith("__main__"))
    assert len(names) > 40
    script = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    command = [sys.executable, "-W", "error:cosmos3_jax:DeprecationWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported_now = set(done.stdout.split())
    assert {"cosmos3_jax", "jax", "optax"} <= imported_now  # the list is one
    assert not imported_now & {"torch", "diffusers", "transformers", "accelerate"}


# ---------------------------------------------------------------- a stage more, told in one place

SETTINGS = dict(num_frames=5, height=32, width=48, num_inference_steps=2, guidance_scale=1.0)


@pytest.fixture
def traced(monkeypatch):
    """A last stage: the video's brightest value. What it was traced with."""
    shapes = []

    def brightest(params, video, *, config):
        shapes.append((video.shape, params.keys() >= {"decoder"}, config.recipe.fps))
        return {"brightest": video.max()}

    stage = stages.Stage(
        "brightest", "video_vae", brightest, lambda values: (values["video"],),
        needed=lambda values: "video" in values,
    )  # fmt: skip
    monkeypatch.setattr(stages, "STAGES", (*stages.STAGES, stage))
    return shapes


def test_a_new_stage_is_compiled_ahead_and_run(model, traced, compiled):
    request, seen = model.prepare("A red ball", **SETTINGS), []
    model.warmup("A red ball", **SETTINGS)
    [(shape, has_decoder, fps)] = traced
    assert (shape, has_decoder, fps) == ((1, 3, 5, 32, 48), True, model.config.recipe.fps)
    assert compiled
    compiled.clear()
    result = model.run(request, after=lambda stage, values: seen.append((stage.name, {**values})))
    assert not compiled and len(traced) == 1
    assert [name for name, _ in seen] == ["condition", "denoise", "video decode", "brightest"]
    assert seen[-1][1]["brightest"] == np.asarray(result["video"]).max()
    assert "brightest" not in seen[-2][1]
    # It reads the video: without one, it is not needed.
    model.run(request, output="latents", after=lambda stage, values: seen.append((stage.name, {})))
    assert [name for name, _ in seen[4:]] == ["condition", "denoise"]


def test_a_new_stage_is_part_of_the_pure_function(model, traced):
    request = model.prepare("A red ball", **SETTINGS)
    made = jax.eval_shape(partial(generate, config=model.config), model.params, request)
    assert [shape for shape, *_ in traced] == [made["video"].shape]


def test_a_new_stage_is_measured(model, traced):
    measure = Measure(model.params, model.config, repeats=1)
    request = jax.device_put(model.prepare("A red ball", **SETTINGS))
    values = stages.walk(stages.initial_values(request), measure)
    assert [*measure.stages][-2:] == ["video decode", "brightest"]
    found = measure.stages["brightest"]
    assert found["seconds"] > 0 and found["compile_seconds"] > 0 and len(found["samples"]) == 1
    assert found["output_gib"] * 2**30 == values["brightest"].nbytes == 4


# ---------------------------------------------------------------- a command opens each file once


def test_a_command_reads_configuration_and_tokenizer_once(public_checkpoint, tmp_path, monkeypatch):
    opened = []

    def counted(owner, name):
        original = getattr(owner, name)

        def function(*arguments, **options):
            opened.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, function)

    counted(Tokenizer, "from_folder")
    counted(load, "load_config")
    monkeypatch.setattr(device, "use_compilation_cache", lambda *_: None)
    settings = "--num-frames 5 --height 32 --width 48 --steps 1 --guidance-scale 1".split()
    command = ["generate", "--checkpoint", str(public_checkpoint), "--prompt", "A red ball"]
    assert cli.main([*command, *settings, "--out", str(tmp_path / "a.mp4")]) == 0
    assert sorted(opened) == ["from_folder", "load_config"]


# ---------------------------------------------------------------- tests

TESTS = Path(__file__).parent
OURS = {"cosmos3_jax", "convert", "examples"} | {
    path.stem for path in (TESTS.parent / "benchmarks").glob("*.py")
}


def is_private(name) -> bool:
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__")


def private_names(source: str) -> set[str]:
    """Names of this repository's modules that are no test's business."""
    nodes, modules, found = list(ast.walk(ast.parse(source))), set(), set()
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if (getattr(node, "module", None) or alias.name).split(".")[0] in OURS:
                    modules.add(alias.asname or alias.name)
                    found |= {alias.name} if is_private(alias.name) else set()
    for node in nodes:
        owner, name = None, None
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1:  # monkeypatch.setattr
            owner, name = node.args[0], getattr(node.args[1], "value", None)
        if is_private(name) and ast.unparse(owner) in modules:
            found.add(f"{ast.unparse(owner)}.{name}")
    return found


def test_tests_reach_no_private_name():
    reached = {path: private_names(path.read_text("utf-8")) for path in TESTS.rglob("*.py")}
    assert {str(path): names for path, names in reached.items() if names} == {}
    wrong = (
        "from cosmos3_jax.models import rope as r, _x\nr._y\npatch.setattr(r, '_z', 1)\nr.__doc__"
    )
    assert private_names(wrong) == {"_x", "r._y", "r._z"}


def test_no_file_of_tests_is_long():
    lines = {path.name: len(path.read_text("utf-8").splitlines()) for path in TESTS.rglob("*.py")}
    assert {name: count for name, count in lines.items() if count > 400} == {}
