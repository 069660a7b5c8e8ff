"""How a generation is executed: compiled, warmed up, offloaded, shown, stopped."""

import functools
import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm
from checkpoint_files import link_checkpoint, replace_file
from oracle import NEGATIVE, PROMPT, SETTINGS, prepare
from rounding import relative_l2

from cosmos3_jax import Cosmos3, save_mp4
from cosmos3_jax.checkpoint import load
from cosmos3_jax.io import media
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import memory, programs
from cosmos3_jax.runtime.memory import OutOfDeviceMemory

# What a mistake does to the latents, at the very least; see test_pipeline.py.
MISTAKE = 2e-4


def test_other_prompts_compile_nothing(model, compiled):
    settings = dict(SETTINGS, output="latents", negative_prompt=NEGATIVE, num_inference_steps=3)
    model.generate("Rain", **settings)
    assert compiled  # three steps are a new program; it is counted
    compiled.clear()
    model.generate("A cat", seed=3, schedule="karras", **settings | dict(guidance_scale=2.5))
    model.generate("A dog", sigmas=[0.9, 0.5, 0.2, 0], **settings | dict(fps=30.0))
    assert not compiled


def test_a_warmup_is_refused_where_its_generation_would_be(model, monkeypatch):
    monkeypatch.setattr(device, "memory_limit", lambda: 2**20)
    for method in (model.warmup, model.generate):
        with pytest.raises(OutOfDeviceMemory, match="JAX may use 0.00 GiB"):
            method(PROMPT, **SETTINGS)


def test_a_bad_warmup_is_refused(model):
    with pytest.raises(ValueError, match="num_frames=190 is not"):
        model.warmup(num_frames=190)
    with pytest.raises(ValueError, match="output='pixels' is unknown"):
        model.warmup(output="pixels")


def test_offloading_changes_no_bit(public_checkpoint, model, compiled):
    """The same compiled programs run."""
    offloaded = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=True)
    for sound in (False, True):
        settings = SETTINGS | dict(sound=sound, negative_prompt=NEGATIVE, num_inference_steps=2)
        theirs = model.generate(PROMPT, **settings)
        compiled.clear()
        ours = offloaded.generate(PROMPT, **settings)
        assert not compiled
        assert ours.keys() == theirs.keys() and ("sound" in ours) == sound
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    waveform = np.random.RandomState(0).uniform(-1, 1, (1, 2, 4000)).astype(np.float32)
    np.testing.assert_array_equal(offloaded.encode_sound(waveform), model.encode_sound(waveform))
    assert not offloaded.weights.resident


def alive() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


# The functions of the stages, and the part of the weights that each reads.
PARTS = {
    "encode_text": "und", "advance": "gen",
    "decode_video": "video_vae", "decode_sound": "sound_vae",
}  # fmt: skip


@pytest.mark.parametrize("offload", [True, False])
def test_the_device_holds_only_the_part_in_use(public_checkpoint, monkeypatch, offload):
    """Before each program: its part and no other part. Elsewhere: none."""
    before = alive()
    mine = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=offload)
    sizes = {
        part: sum(4 * x.size for x in jax.tree.leaves(tree))
        for part, tree in mine.weights.structs.items()
    }
    assert alive() - before == (0 if offload else sum(sizes.values()))
    seen, leaves = {}, {}

    def watched(function, *options):
        compiled, name = program(function, *options), function.__name__

        def run(params, *arguments, **options):
            others = [jax.tree.leaves(x) for other, x in leaves.items() if other != name]
            assert all(leaf.is_deleted() for tree in others for leaf in tree) or not offload
            # beside the weights only what the stages hand on
            given = sum(x.nbytes for x in jax.tree.leaves(arguments) if isinstance(x, jax.Array))
            seen.setdefault(name, alive() - before - given)  # at the first of the steps
            leaves[name] = params
            return compiled(params, *arguments, **options)

        return run

    program = programs.program
    monkeypatch.setattr(programs, "program", watched)
    result = mine.generate(PROMPT, sound=True, negative_prompt=NEGATIVE, **SETTINGS)
    # In the decoders also what is done already, and latents that still wait.
    sound = result["sound"].shape[-1] // 1920 * mine.config.transformer.sound_dim * 4
    done = {"decode_video": sound, "decode_sound": result["video"].nbytes}
    done["decode_sound"] += 4 * mine.config.video_vae.z_dim * 3 * 3 * 5
    for name, part in PARTS.items():
        weights = sizes[part] if offload else sum(sizes.values())
        assert seen[name] == weights + done.get(name, 0), name
    media = result["video"].nbytes + result["sound"].nbytes
    assert alive() - before == media + (0 if offload else sum(sizes.values()))


def test_all_parameters_of_an_offloaded_model(public_checkpoint, model):
    offloaded = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=True)
    structs = jax.tree.map(lambda x: (x.shape, x.dtype), offloaded.weights.structs)
    assert structs == jax.tree.map(lambda x: (x.shape, x.dtype), model.params)
    params = offloaded.params
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    assert offloaded.weights.resident
    assert offloaded.params["gen"] is params["gen"]  # it stayed
    # parameters put in their place are what is read from then on
    request = prepare(model, num_inference_steps=1)
    right, _ = offloaded.denoise(request)
    offloaded.params = params | {"gen": jax.tree.map(jnp.zeros_like, params["gen"])}
    assert relative_l2(offloaded.denoise(request)[0]["video"], right["video"]) > MISTAKE


def test_a_part_leaves_the_device_after_an_error_too(public_checkpoint, monkeypatch):
    offloaded = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=True)
    request, before, kept = prepare(offloaded), alive(), []

    def fail(params, *_, **__):
        kept.append(params)
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(programs, "program", lambda *_: fail)
    with pytest.raises(RuntimeError, match="on fire"):
        offloaded.denoise(request)
    assert kept and alive() == before


def test_offload_opens_the_files_first(public_checkpoint, tmp_path):
    """Damage is said at once, not when a part is wanted."""
    broken = link_checkpoint(public_checkpoint, tmp_path / "broken")
    [shard, *_] = (broken / "vae").glob("*.safetensors")
    replace_file(shard, shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        Cosmos3.from_pretrained(broken, "float32", offload=True)


@pytest.mark.parametrize(("limit", "offloads"), [(None, False), (2**20, True), (2**40, False)])
def test_offload_by_the_devices_memory(public_checkpoint, monkeypatch, limit, offloads):
    monkeypatch.setattr(device, "memory_limit", lambda: limit)
    model = Cosmos3.from_pretrained(public_checkpoint, "float32")
    assert model.weights.resident is not offloads


def test_what_does_not_fit_is_refused_before_it_runs(model, monkeypatch):
    job = dict(SETTINGS, negative_prompt=NEGATIVE)
    sizes = model.job(model.prepare([PROMPT] * 2, **job))
    assert (sizes.batch, sizes.num_frames, sizes.text_tokens) == (2, 9, 256)
    limit = memory.generation_bytes(model.config, sizes)["peak"]
    monkeypatch.setattr(device, "memory_limit", lambda: limit)
    model.generate([PROMPT] * 2, **job)  # it just fits
    monkeypatch.setattr(device, "memory_limit", lambda: limit - 1)
    with monkeypatch.context() as patch:
        patch.setattr(programs.Run, "__call__", lambda *_: pytest.fail("the model ran"))
        with pytest.raises(OutOfDeviceMemory, match="2 videos of 9 frames of 48x80"):
            model.generate([PROMPT] * 2, **job)
    model.generate(PROMPT, **job)  # one video fits
    if memory.generation_bytes(model.config, sizes.replace(decode=False))["peak"] < limit:
        model.generate([PROMPT] * 2, output="latents", **job)  # nothing is decoded


@pytest.fixture
def watched(monkeypatch):
    """The bars of `denoise(progress=True)`, and its steps in order: dispatched, seen to end."""
    bars, log = [], []

    class Bar(tqdm.tqdm):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.of_steps = settings["desc"] == "denoise"  # weights have bars of their own
            bars.extend([self] * self.of_steps)

        def update(self, n=1):
            log.extend([f"end {self.n}"] * self.of_steps)
            return super().update(n)

    def each_call(self, stage, values):
        for result in original(self, stage, values):
            log.append("run")
            yield result

    def only_the_loop(self, stage, values):
        return each_call(self, stage, values) if stage.loop else original(self, stage, values)

    original = programs.Run.each_call
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(programs.Run, "each_call", only_the_loop)
    return bars, log


def test_progress_bar_counts_steps_as_they_end(model, watched, capsys):
    """Each step is waited for when the next is under way, and the bar is full at the end."""
    bars, log = watched
    request = prepare(model)
    show = functools.partial(model.run, request, output="latents", steps_per_program=1)
    show(progress=True)
    order = ["run", "run", "end 0", "run", "end 1", "run", "end 2", "run", "end 3", "end 4"]
    assert log == order
    [bar] = bars
    assert (bar.total, bar.n, bar.disable) == (5, 5, True)  # full, and closed
    assert "5/5" in capsys.readouterr().err
    show()
    assert not capsys.readouterr().err
    del log[:]
    show(progress=True)  # a second bar counts from the start again
    assert log == order


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(public_checkpoint, monkeypatch, capsys, terminal):
    """Of loading and of denoising, where nobody says whether they are wanted."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    model = Cosmos3.from_pretrained(public_checkpoint, "float32")
    loading = capsys.readouterr().err
    model.denoise(prepare(model, num_inference_steps=1))
    denoising = capsys.readouterr().err
    assert ("load: 100%" in loading, "1/1" in denoising) == (terminal, terminal)
    assert terminal or not loading + denoising
    model = Cosmos3.from_pretrained(public_checkpoint, "float32", progress=False)
    model.denoise(prepare(model, num_inference_steps=1), progress=False)
    assert not capsys.readouterr().err


def test_the_type_that_suits_the_device(public_checkpoint, monkeypatch):
    assert Cosmos3.from_pretrained(public_checkpoint).dtype == "float32"
    monkeypatch.setattr(device, "default_device", device.PlannedGPU)
    assert device.default_dtype() == "bfloat16"


def test_what_is_made_knows_its_rate(model, tmp_path):
    """`save_mp4(made, path)` needs nothing else, and a finished video is never refused."""
    settings = SETTINGS | dict(num_frames=5, num_inference_steps=1, guidance_scale=1.0, fps=12.5)
    made = model.generate([PROMPT, "Rain"], **settings)
    assert made["fps"] == 12.5
    path = tmp_path / "a.mp4"
    assert save_mp4(made, path) == path
    info, first = media.probe(path), path.read_bytes()
    assert (info.frames, info.fps) == (5, 12.5)
    with pytest.warns(UserWarning, match="a.mp4 exists: wrote .*a-1.mp4"):
        assert save_mp4(made, path, example=1) == tmp_path / "a-1.mp4"
    assert path.read_bytes() == first != (tmp_path / "a-1.mp4").read_bytes()
    assert media.probe(save_mp4(made, path, fps=24, overwrite=True)).fps == 24


def test_an_interrupt_closes_the_bar(public_checkpoint, watched, monkeypatch, capsys):
    """And the weights leave the device, as after any error."""
    bars, log = watched
    offloaded = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=True)
    request, before, calls = prepare(offloaded), alive(), programs.calls

    def interrupt(stage, values, block_steps, done):
        for i, change in enumerate(calls(stage, values, block_steps, done)):
            if i == 3:
                raise KeyboardInterrupt
            yield change

    monkeypatch.setattr(programs, "calls", interrupt)
    with pytest.raises(KeyboardInterrupt):
        offloaded.run(request, output="latents", progress=True, steps_per_program=1)
    [bar] = bars
    assert (bar.n, bar.disable) == (2, True)
    assert capsys.readouterr().err.endswith("\n")  # what is said next has a line of its own
    assert alive() == before


@pytest.mark.parametrize("progress", [True, False])
def test_one_program_serves_all_blocks_of_a_length(model, compiled, progress):
    """Whatever the schedule and the prompt, with a bar or without; five steps are such a block."""
    model.denoise(prepare(model, sound=True))
    compiled.clear()
    for settings in (
        dict(num_inference_steps=10), dict(num_inference_steps=35), dict(schedule="karras"),
        dict(guidance_scale=2.5, seed=3),
    ):  # fmt: skip
        model.denoise(prepare(model, "Rain", sound=True, **settings), progress=progress)
    assert not compiled


def test_a_block_divides_the_steps():
    lengths = {1: 1, 2: 2, 4: 4, 7: 1, 12: 4, 18: 3, 24: 4, 35: 5, 50: 5}
    assert {steps: programs.block_length(steps) for steps in lengths} == lengths


def test_a_model_is_freed_after_a_progress_bar(public_checkpoint):
    """Neither the bar nor the programs, which stay, keep 30 GB of weights alive."""
    model = Cosmos3.from_pretrained(public_checkpoint, "float32")
    request = model.prepare("A cat", num_frames=1, height=32, width=32, num_inference_steps=1)
    model.denoise(request, progress=True)
    watcher = weakref.ref(model)
    del model
    gc.collect()
    assert watcher() is None


def test_autoencoders_alone(model):
    """Channels first in and out; what they compute is tested with the modules."""
    rng = np.random.RandomState(0)
    video = rng.uniform(size=(1, 3, 5, 32, 48)).astype(np.float32)
    latents = model.encode_video(video)
    assert latents.shape == (1, model.config.video_vae.z_dim, 2, 2, 3)
    np.testing.assert_array_equal(
        model.decode_video(latents), model.decode({"video": latents})["video"]
    )
    assert model.decode_video(latents).shape == video.shape
    waveform = rng.uniform(-1, 1, (1, 2, 4000)).astype(np.float32)
    latents = model.encode_sound(waveform)
    assert latents.shape == (1, model.config.sound_vae.vocoder_input_dim, 3)
    assert model.decode_sound(latents).shape == (1, 2, 3 * 1920)


@pytest.mark.parametrize("progress", [True, False])
def test_every_program_is_read_from_the_compilation_cache(
    model, compiled, compilation_cache, progress
):
    request, hits = prepare(model, sound=True, num_inference_steps=2), []
    latents = []

    def listen(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    for _ in range(2):  # as two processes would
        jax.clear_caches()
        compiled.clear()
        jax.monitoring.register_event_listener(listen)
        result, trajectory = model.denoise(request, return_trajectory=True, progress=progress)
        jax.monitoring.unregister_event_listener(listen)
        latents.append(result)
        assert len(hits) == (len(compiled) if len(latents) == 2 else 0)
    assert hits  # the event covers programs that are read, too
    names = " ".join(path.name for path in compilation_cache.iterdir())
    assert "jit_advance" in names
    jax.tree.map(np.testing.assert_array_equal, *latents)


@pytest.mark.parametrize(
    ("offload", "progress", "trajectory", "image"),
    [(True, True, True, np.zeros((9, 9, 3), np.uint8))],
    ids=["offload, bar, trajectory, image"],
)  # fmt: skip
def test_after_a_warmup_nothing_is_compiled(
    public_checkpoint, compiled, monkeypatch, offload, progress, trajectory, image
):
    """Neither programs nor the loading of what is offloaded, whatever the prompt."""
    jax.clear_caches()
    warm = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=offload)
    settings = dict(
        SETTINGS, sound=True, num_inference_steps=2, progress=progress,
        return_trajectory=trajectory, image=image,
    )  # fmt: skip
    read = []
    load_params = load.load_params
    monkeypatch.setattr(
        load, "load_params", lambda *x, **options: read.append(x) or load_params(*x, **options)
    )
    compiled.clear()
    warm.warmup(text_tokens=200, decode_chunk_size=2, **settings)
    assert compiled and not read  # nothing ran, so nothing was needed
    compiled.clear()
    long = "rain " * 20  # two buckets of tokens, as was said; the warm-up's own prompt has one
    assert warm.prepare(long, **SETTINGS).text_ids.shape[1] == 256
    assert warm.prepare("warm-up", **SETTINGS).text_ids.shape[1] == 128
    warm.generate(long, seed=3, decode_chunk_size=2, **settings)
    assert not compiled
    small = dict(num_frames=1, sound=False, image=None, output="latents")
    warm.generate(long, **settings | small)
    assert compiled  # another shape is not what was warmed
