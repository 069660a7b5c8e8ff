"""What a run saves is good, and what it reads again is what it saved."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cosmos3_jax.training import records
from cosmos3_jax.training.checkpoints import Checkpoints
from cosmos3_jax.training.step import TrainState


def state_of(step: int) -> TrainState:
    """Each number in it says which step it is of."""
    numbers = np.random.RandomState(step).standard_normal((64, 33)).astype(np.float32)
    params = {"gen": {"w": jnp.asarray(numbers), "b": jnp.full(7, step, jnp.float32)}}
    copies = [jax.tree.map(jnp.copy, params) for _ in range(2)]
    moments, best = {"mu": copies[0]}, jnp.float32(np.inf)  # of no loss seen so far
    return TrainState(jnp.int32(step), params, (moments, best), copies[1], jax.random.key(step))


def is_of(state: TrainState, step: int) -> bool:
    """Whether a state is that of a step, to the bit."""
    pairs = zip(
        jax.tree.leaves(numbers(state)), jax.tree.leaves(numbers(state_of(step))), strict=True
    )
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def numbers(state: TrainState) -> TrainState:
    return state.replace(key=jax.random.key_data(state.key))


@pytest.fixture(scope="module")
def two_states(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / "run"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state_of(step))
    return folder


@pytest.fixture
def run(two_states, tmp_path):
    """A folder of a run with states of steps 1 and 2, to be damaged."""
    return shutil.copytree(two_states, tmp_path / "run")


# ---------------------------------------------------------------- what is saved


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["params", "opt_state", "ema"])
def test_a_state_that_is_not_finite_is_not_saved(run, part, value):
    """Nor does it push out the good ones, whatever is saved after it."""
    state = state_of(3)
    tree = getattr(state, part)
    leaves, structure = jax.tree.flatten(tree)
    bad = [x.at[(-1,) * x.ndim].set(value) if x.shape == (64, 33) else x for x in leaves]
    bad = state.replace(**{part: structure.unflatten(bad)})
    message = rf"step 3 is not saved: {part}/.*gen/w has numbers .* of step 2 in \S*run\)"
    with Checkpoints(run, keep=2) as checkpoints:
        for step in (3, 4):
            with pytest.raises(ValueError, match=message.replace("step 3", f"step {step}")):
                checkpoints.save(bad.replace(step=jnp.int32(step)))
        assert checkpoints.last == 2
        assert is_of(checkpoints.restore(state), 2) and is_of(checkpoints.restore(state, 1), 1)
        checkpoints.save(state)
        assert checkpoints.last == 3


def test_all_that_is_not_finite_is_counted(tmp_path):
    bad = jax.tree.map(lambda x: x * jnp.nan, state_of(1).params)
    with Checkpoints(tmp_path) as checkpoints:
        message = "step 1 .*params/gen/b and 2 other leaves have .*state .there is none in"
        state = state_of(1)
        with pytest.raises(ValueError, match=message):
            ema = state.ema | {"gen": state.ema["gen"] | {"b": bad["gen"]["b"]}}
            checkpoints.save(state.replace(params=bad, ema=ema))


def test_a_checksum_misses_no_bit_and_no_place():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3)).astype(np.float32)

    def checksum(x) -> str:
        return records.record_of({"x": jnp.asarray(x)})["x"]["sum"]

    def flipped(*bits: int) -> np.ndarray:
        raw = x.copy().reshape(-1).view(np.uint32)
        for bit in bits:
            raw[bit // 32] ^= np.uint32(1 << (bit % 32))
        return raw.view(np.float32).reshape(x.shape)

    sums = {checksum(flipped(bit)) for bit in range(32 * x.size)} | {checksum(x)}
    assert len(sums) == 32 * x.size + 1
    assert checksum(flipped(31, 63)) not in sums  # two signs
    assert checksum(x[::-1]) not in sums and checksum(0 * x) != checksum(-0.0 * np.abs(x))
    for dtype in ("bool", "int8", "bfloat16", "uint32"):
        one = jnp.zeros(4, dtype).at[2].set(1)
        assert checksum(one) != checksum(jnp.roll(one, 1)) != checksum(0 * one)


# ---------------------------------------------------------------- what is damaged


def files_of(folder):
    return sorted(path for path in (folder / "2").rglob("*") if path.is_file())


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_each(path):
    """A bit of every 64th byte."""
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[::64] ^= 4
    path.write_bytes(data.tobytes())


def make_empty_folder(path):
    shutil.rmtree(path)
    path.mkdir()


DAMAGE = {
    "no metadata of arrays": ("default/_METADATA", lambda path: path.unlink()),
    "empty metadata of arrays": ("default/_METADATA", empty),
    "half of the metadata": ("default/_METADATA", cut),
    "nested metadata": ("default/_METADATA", lambda path: path.write_text("[" * 10**5)),
    "its record": ("_CHECKPOINT_METADATA", lambda path: path.write_text(
        path.read_text().replace("float32 (7,)", "float32 (9,)"))),
    "no index": ("default/manifest.ocdbt", lambda path: path.unlink()),
    "half of the index": ("default/manifest.ocdbt", cut),
    "no arrays": ("default", shutil.rmtree),
    "no files": (".", make_empty_folder),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_state_falls_back_to_the_one_before(run, kind, caplog):
    name, damage = DAMAGE[kind]
    damage(run / "2" / name)
    with Checkpoints(run) as checkpoints:
        with pytest.raises(ValueError, match=f"{run}: the state of step 2 is damaged: ") as error:
            checkpoints.restore(state_of(0), step=2)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        assert (run / "2").is_dir()
        assert is_of(checkpoints.restore(state_of(0)), 1)
        [said] = [x.getMessage() for x in caplog.records if x.name == "cosmos3_jax"]
        assert said.startswith(f"the state of step 2 in {run} is damaged, and is now 2.damaged: ")
        assert said.endswith("; going on from that of step 1") and "\n" not in said
        assert checkpoints.last == 1
        checkpoints.save(state_of(2))  # the run goes on
        assert is_of(checkpoints.restore(state_of(0)), 2)
    assert (run / "2.damaged").exists()
    with Checkpoints(run) as checkpoints:
        assert checkpoints.last == 2


def test_a_state_that_cannot_be_listed_falls_back_too(run, caplog):
    """With one such state Orbax opened no folder."""
    file = run / "2" / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"performance_metrics": "fast"}))
    with Checkpoints(run) as checkpoints:
        assert checkpoints.last == 1
        assert is_of(checkpoints.restore(state_of(0)), 1)
    [said] = [x.getMessage() for x in caplog.records if x.name == "cosmos3_jax"]
    assert said.startswith(f"the state of step 2 in {run} is damaged, and is now 2.damaged: ")
    assert "\n" not in said and (run / "2.damaged").is_dir()


def test_whatever_rots_no_wrong_number_is_read(two_states, tmp_path):
    """A bit here and there in each file; a state is read as it was saved, or not at all."""
    found = []
    for index, path in enumerate(files_of(two_states)):
        folder = shutil.copytree(two_states, tmp_path / str(index))
        flip_each(folder / path.relative_to(two_states))
        with Checkpoints(folder) as checkpoints:
            state = checkpoints.restore(state_of(0))
        assert is_of(state, int(state.step)), path.name
        found.append(int(state.step))
    assert set(found) == {1, 2}  # some files hold nothing that is read


def test_where_every_state_is_damaged(run):
    for step in (1, 2):
        shutil.rmtree(run / str(step) / "default")
    with Checkpoints(run) as checkpoints:
        with pytest.raises(ValueError, match=f"{run}: .* 2 is damaged: .*; .* 1 is damaged: "):
            checkpoints.restore(state_of(0))
    assert (run / "1").is_dir() and (run / "2").is_dir()


def test_another_run_is_no_damage(run):
    """It is refused; nothing older is tried, and nothing renamed."""
    like = state_of(0)
    with Checkpoints(run) as checkpoints:
        with pytest.raises(ValueError, match=r"step 2 is not one of this run"):
            checkpoints.restore(like.replace(params={"gen": {"w": like.params["gen"]["w"]}}))
    assert (run / "2").is_dir()


def test_a_state_of_an_earlier_version_has_no_record(tmp_path):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(numbers(state_of(1))))
    with Checkpoints(tmp_path) as checkpoints:
        assert is_of(checkpoints.restore(state_of(0)), 1)
        with pytest.raises(ValueError, match=r"params/gen/b: float32 \(7,\) on disk, bfloat16"):
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state_of(0).params)
            checkpoints.restore(state_of(0).replace(params=params))
    (tmp_path / "1" / "default" / "_METADATA").write_text("{}")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="the state of step 1 is damaged: "):
            checkpoints.restore(state_of(0))
