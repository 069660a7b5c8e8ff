"""The record of a generation, beside its file and inside of it, and `--from-record`.

One generation with an image and a LoRA, made for real, serves most tests. Where only the options
count, nothing is denoised.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import PROMPT, without_a_model
from PIL import Image

import cosmos3_jax
from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import lora, lora_files
from cosmos3_jax.checkpoint.find import find_checkpoint
from cosmos3_jax.cli import main as cli
from cosmos3_jax.cli.record import read_record
from cosmos3_jax.io.encode import read_comment

pytestmark = pytest.mark.usefixtures("own_cache", "no_compilation_cache")

SETTINGS = [
    "generate", PROMPT, "--negative-prompt", "blurry", "--num-frames", "5", "--height", "32",
    "--width", "48", "--steps", "2", "--shift", "4.3", "--guidance", "2.3", "--seed", "7",
]  # fmt: skip
SHARD = "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def made(own_cache, tmp_path_factory):
    """A folder `weights`, with a checkpoint and a LoRA, one `given`, with an image, and one `out`,
    with a video and its record.
    """
    folder = tmp_path_factory.mktemp("made")
    weights, given = folder / "weights" / "model", folder / "given"
    shutil.copytree(find_checkpoint("random"), weights)
    given.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(given / "first.png")
    write_lora(folder / "weights" / "style.safetensors", seed=1)
    arguments = [
        "--checkpoint", weights, "--lora", folder / "weights" / "style.safetensors:0.7",
        "--image", given / "first.png", "--sound", "--out", folder / "out" / "a.mp4",
    ]  # fmt: skip
    assert cli.main([*SETTINGS, *map(str, arguments)]) == 0
    return folder


def write_lora(path: Path, seed: int) -> None:
    config = Cosmos3.open("random").config.transformer
    adapter = lora.init(jax.random.key(seed), config, patterns=["mlp"], rank=2, alpha=4)
    random = np.random.RandomState(seed)
    adapters = {
        name: pair | {"b": np.float32(random.standard_normal(pair["b"].shape))}
        for name, pair in adapter.adapters.items()
    }
    lora_files.save(adapter.replace(adapters=adapters), path, config)


@pytest.fixture
def quick(monkeypatch):
    without_a_model(monkeypatch)


def again(record: Path, out: Path, *more: str) -> dict:
    """Make it again; the record of that."""
    assert cli.main(["generate", "--from-record", str(record), "-o", str(out), *more]) == 0
    return json.loads(out.with_suffix(".json").read_text())


def copied(made: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own, which may be changed. Returns its record."""
    shutil.copytree(made, tmp_path / "copy")
    path = tmp_path / "copy" / "out" / "a.json"
    path.write_text(path.read_text().replace(str(made), str(tmp_path / "copy")))
    return path


def differences(capsys) -> list[str]:
    before = "cosmos3-jax: differs from the record: "
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix(before) for line in lines if line.startswith(before)]


# The same again
# --------------------------------------------------------------------------------------------------


def test_from_the_record_beside_it(made, tmp_path, capsys):
    """An image and a LoRA count: without them it is another video."""
    noted = again(made / "out" / "a.json", tmp_path / "b.mp4")
    assert differences(capsys) == []
    assert (tmp_path / "b.mp4").read_bytes() == (made / "out" / "a.mp4").read_bytes()
    recorded = read_record(made / "out" / "a.json")
    run = ("seconds", "sources")
    assert {k: v for k, v in noted.items() if k not in run} == {
        k: v for k, v in recorded.items() if k not in run
    }
    assert recorded["sources"]["flow_shift"] == "given"
    assert (recorded["mode"], recorded["condition_frames"]) == ("image2video", [0])
    assert (recorded["flow_shift"], recorded["schedule"]) == (4.3, "native")
    other = tmp_path / "plain.safetensors"
    write_lora(other, seed=2)
    again(made / "out" / "a.json", tmp_path / "c.mp4", "--lora", f"{other}:0.7")
    assert differences(capsys) == ["the LoRA files hold something else"]
    assert (tmp_path / "c.mp4").read_bytes() != (made / "out" / "a.mp4").read_bytes()


def test_from_the_video_alone(made, tmp_path, monkeypatch, capsys):
    """Its files are beside it, in a folder where the recorded ones are not."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(made / "out" / "a.mp4", folder)
    for name in ("given/first.png", "weights/style.safetensors"):
        shutil.copy(made / name, folder)
    shutil.copytree(made / "weights" / "model", folder / "model")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 32)).save("first.png")  # of that name, and another
    again(folder / "a.mp4", tmp_path / "b.mp4")
    assert differences(capsys) == []
    assert (tmp_path / "b.mp4").read_bytes() == (folder / "a.mp4").read_bytes()


def test_from_a_picture(tmp_path, capsys):
    command = [*SETTINGS, "--num-frames", "1", "--checkpoint", "random", "--out"]
    assert cli.main([*command, str(tmp_path / "a.png")]) == 0
    again(tmp_path / "a.png", tmp_path / "b.png")
    assert differences(capsys) == []
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("kind", ["mov", "webm", "gif", "webp", "png", "jpg"])
def test_each_kind_of_file_holds_its_record(tmp_path, quick, kind):
    frames = ["--num-frames", "1"] * (kind in ("png", "jpg"))
    command = [*SETTINGS, *frames, "--checkpoint", "random"]
    path = tmp_path / f"a.{kind}"
    assert cli.main([*command, "-o", str(path)]) == 0
    record, inside = read_record(path.with_suffix(".json")), read_record(path)
    assert inside.keys() == record.keys() - {"seconds", "peak_memory_bytes", "offload", "sources"}
    assert inside == {name: record[name] for name in inside}
    again(path, tmp_path / f"b.{kind}")
    assert (tmp_path / f"b.{kind}").read_bytes() == path.read_bytes()
    assert cli.main([*command, "--no-metadata", "-o", str(tmp_path / f"c.{kind}")]) == 0
    assert read_comment(tmp_path / f"c.{kind}") is None
    assert PROMPT.encode() not in (tmp_path / f"c.{kind}").read_bytes()


def test_what_is_inside_names_no_folder(made):
    held = (made / "out" / "a.mp4").read_bytes()
    assert str(made).encode() not in held and b"/weights" not in held and b"/given" not in held
    inside, record = (read_record(made / "out" / name) for name in ("a.mp4", "a.json"))
    assert inside["checkpoint"] == "model"
    assert inside["image"] == record["image"] | {"path": "first.png"}
    assert inside["lora"] == [record["lora"][0] | {"path": "style.safetensors"}]
    assert len(inside["image"]["sha256"]) == len(inside["lora"][0]["sha256"]) == 64
    files = inside["checkpoint_files"]["files"]
    assert files.keys() >= {"transformer/config.json", SHARD, "text_tokenizer/tokenizer.json"}
    assert all(len(file["sha256"]) == 64 for file in files.values())


# What differs
# --------------------------------------------------------------------------------------------------


def test_a_changed_weight_file_is_named(made, tmp_path, quick, capsys):
    """One byte of one tensor."""
    record = copied(made, tmp_path)
    shard = tmp_path / "copy" / "weights" / "model" / SHARD
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    again(record, tmp_path / "b.mp4")
    assert differences(capsys) == [f"{SHARD} holds something else"]


def test_a_missing_file_and_a_new_one_are_named(made, tmp_path, quick, capsys):
    record = copied(made, tmp_path)
    model = tmp_path / "copy" / "weights" / "model"
    recipe = json.loads((model / "cosmos3_recipe.json").read_text())
    (model / "cosmos3_recipe.json").unlink()
    (model / "vae" / "notes.txt").write_text(str(recipe))
    again(record, tmp_path / "b.mp4")
    assert differences(capsys) == ["cosmos3_recipe.json is missing", "vae/notes.txt was not there"]


def test_other_inputs_and_versions_are_named(made, tmp_path, quick, capsys, monkeypatch):
    record = copied(made, tmp_path)
    Image.new("RGB", (48, 32)).save(tmp_path / "copy" / "given" / "first.png")
    write_lora(tmp_path / "copy" / "weights" / "style.safetensors", seed=3)
    monkeypatch.setattr(cosmos3_jax, "__version__", "9.9")
    again(record, tmp_path / "b.mp4")
    assert differences(capsys) == [
        "cosmos3_jax is 9.9, was 0.1.0",
        "the image holds something else",
        "the LoRA files hold something else",
    ]


def test_another_device_is_named(made, tmp_path, quick, capsys):
    record = copied(made, tmp_path)
    record.write_text(json.dumps(read_record(record) | {"device": "abacus", "processes": 3}))
    again(record, tmp_path / "b.mp4")
    device = jax.devices()[0].device_kind
    assert differences(capsys) == [f"device is {device}, was abacus", "processes is 1, was 3"]


# Other options change what the record says
# --------------------------------------------------------------------------------------------------

CHANGES = [
    (["--seed", "9"], {"seed": 9, "prompt": PROMPT, "flow_shift": 4.3}),
    (["--seeds", "9"], {"seed": 9}),
    (["--steps", "3"], {"num_inference_steps": 3, "steps_per_program": 3, "flow_shift": 4.3}),
    (["--shift", "6"], {"num_inference_steps": 2, "flow_shift": 6}),
    (["--sigmas", "0.9,0.5,0.2,0"], {"sigmas": [0.9, 0.5, 0.2, 0], "num_inference_steps": 3}),
    (["--size", "64x48"], {"width": 64, "height": 48, "seed": 7}),
    (["--height", "64"], {"width": 48, "height": 64}),
    (["A blue ball"], {"prompt": "A blue ball", "negative_prompt": "blurry", "seed": 7}),
    (["-p", "A blue ball"], {"prompt": "A blue ball"}),
    (["--negative-prompt-file", "{folder}/text"], {"negative_prompt": "grey"}),
    (["--prompt-file", "{folder}/text"], {"prompt": "grey"}),
    (["--no-sound"], {"sound_frames": 0}),
    (["--checkpoint", "random"], {"checkpoint": "random"}),
    (["--guidance", "1"], {"guidance_scale": 1, "negative_prompt_tokens": None}),
]


@pytest.mark.parametrize(("options", "changed"), CHANGES, ids=[str(o) for o, _ in CHANGES])
def test_options_go_before_the_record(made, tmp_path, quick, options, changed):
    (tmp_path / "text").write_text("grey")
    options = [option.format(folder=tmp_path) for option in options]
    noted = again(made / "out" / "a.json", tmp_path / "b.mp4", *options)
    assert {name: noted[name] for name in changed} == changed
    if "--steps" not in options and "--sigmas" not in options and "--shift" not in options:
        assert noted["sigmas"] == read_record(made / "out" / "a.json")["sigmas"]


def test_a_clip_goes_before_the_recorded_image(made, tmp_path, quick):
    clip = made / "out" / "a.mp4"
    noted = again(
        made / "out" / "a.json", tmp_path / "b.mp4", "--video", str(clip), "--frames", "9"
    )
    assert (noted["image"], noted["video"]["path"]) == (None, str(clip))
    assert noted["condition_frames"] == [0, 1]
    image = str(made / "given" / "first.png")
    turned = again(tmp_path / "b.json", tmp_path / "c.mp4", "--image", image)
    assert (turned["image"]["path"], turned["video"], turned["keep"]) == (image, None, None)


@pytest.mark.parametrize("frames", [[], ["--num-frames", "1"]])
def test_an_image_of_a_recorded_video_has_its_own_settings(made, tmp_path, quick, frames):
    noted = again(made / "out" / "a.json", tmp_path / "n.png", *frames)
    recipe = Cosmos3.open("random").config.recipes.of("text2image")
    assert (noted["mode"], noted["num_frames"], noted["image"]) == ("text2image", 1, None)
    for name in ("guidance_scale", "flow_shift", "num_inference_steps"):
        assert noted[name] == getattr(recipe, name)
        assert noted["sources"][name] != "given"
    assert noted["negative_prompt"] is None and (noted["prompt"], noted["seed"]) == (PROMPT, 7)


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(made, tmp_path, monkeypatch, capsys):
    """Though its name looks like one there."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    (tmp_path / "a.json").write_text(
        json.dumps(read_record(made / "out" / "a.json") | {"checkpoint": "weights/nano"})
    )
    with pytest.raises(SystemExit):
        cli.main(["generate", "--from-record", str(tmp_path / "a.json"), "-o", "b.mp4"])
    assert "weights/nano is neither there nor beside the record; name it with --checkpoint" in (
        capsys.readouterr().err
    )


def test_folders_are_recorded_whole(made, tmp_path, quick, monkeypatch):
    """And the record beside a video tells where its inputs are."""
    monkeypatch.chdir(made / "given")
    command = [*SETTINGS, "--checkpoint", "../weights/model", "--image", "first.png"]
    assert cli.main([*command, "-o", str(tmp_path / "a.mp4")]) == 0
    record = read_record(tmp_path / "a.json")
    assert Path(record["checkpoint"]).is_absolute()
    monkeypatch.chdir(tmp_path)
    noted = again(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert Path(noted["image"]["path"]).samefile(made / "given" / "first.png")
    assert Path(noted["checkpoint"]).samefile(made / "weights" / "model")


def test_noise_is_found_again_unless_a_seed_is_named(tmp_path, quick):
    request = Cosmos3.open("random").prepare("", num_frames=5, height=32, width=48, seed=3)
    np.savez(tmp_path / "noise.npz", noise=request.noise)
    out = tmp_path / "out" / "a.mp4"
    command = [*SETTINGS, "--checkpoint", "random", "--noise", str(tmp_path / "noise.npz")]
    assert cli.main([*command, "-o", str(out)]) == 0
    shutil.move(tmp_path / "noise.npz", out.parent)
    noted = again(out, tmp_path / "b.mp4")
    assert noted["noise"] == str(out.parent / "noise.npz")
    assert again(out, tmp_path / "c.mp4", "--seed", "1")["noise"] is None


# What the record of the version before had.
OLD_NAMES = (
    "checkpoint", "lora", "prompt", "negative_prompt", "system_prompt", "resolved_prompt",
    "resolved_negative_prompt", "resolved_system_prompt", "prompt_style", "prompt_tokens",
    "negative_prompt_tokens", "image", "video", "num_frames", "height", "width", "fps",
    "sound_frames", "seed", "noise", "condition_frames", "keep", "num_inference_steps",
    "guidance_scale", "sigmas", "steps_per_program", "timesteps", "dtype", "offload", "device",
    "mesh", "processes", "peak_memory_bytes", "versions", "seconds",
)  # fmt: skip


def test_a_record_of_the_version_before(made, tmp_path, quick, capsys):
    recorded = read_record(made / "out" / "a.json")
    (tmp_path / "old.json").write_text(json.dumps({name: recorded[name] for name in OLD_NAMES}))
    noted = again(tmp_path / "old.json", tmp_path / "b.mp4")
    assert differences(capsys) == []
    same = set(OLD_NAMES) - {"seconds"}
    assert {name: noted[name] for name in same} == {name: recorded[name] for name in same}


# What cannot be made again
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("none.json", "none.json: there is no such file"),
        ("odd.json", "the record in it is damaged: sigmas=None, not a list of noise levels"),
        ("list.json", "list.json: there is no record in it; give the .json beside it"),
        ("text.json", "text.json: there is no record in it"),
        ("plain.png", "plain.png: there is no record inside of it"),
        ("noise.mp4", "noise.mp4 is not a media file, or is damaged"),
        (".", "there is no such file"),
        ("lost.json", "first.png is neither there nor beside the record; name it with --image"),
        ("moved.json", "model is neither there nor beside the record; name it with --checkpoint"),
    ],
)
def test_what_is_no_record_is_one_line(
    made, tmp_path, monkeypatch, capsys, unloaded, record, message
):
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[1]")
    Path("text.json").write_text("a prompt")
    Path("odd.json").write_text('{"prompt": "a", "seed": 1, "sigmas": null}')
    Path("noise.mp4").write_bytes(b"\0" * 100)
    Image.new("RGB", (48, 32)).save("plain.png")
    recorded = read_record(made / "out" / "a.json")
    Path("lost.json").write_text(json.dumps(recorded | {"image": {"path": "/no/first.png"}}))
    Path("moved.json").write_text(json.dumps(recorded | {"checkpoint": "/no/model"}))
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", "--from-record", record, "-o", "b.mp4"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("b.mp4").exists()


def test_a_record_is_not_overwritten_by_what_it_makes(made, tmp_path, quick):
    record = copied(made, tmp_path)
    before = record.read_bytes()
    again(record, tmp_path / "b.mp4")
    out = record.with_name("a.mp4")
    command = ["generate", "--from-record", str(record), "-o", str(out), "--overwrite"]
    assert cli.main(command) == 0
    assert record.read_bytes() == before and out.with_name("a.mp4.json").exists()
    out = tmp_path / "a.png"
    assert cli.main([*SETTINGS, "--num-frames", "1", "--checkpoint", "random", "-o", str(out)]) == 0
    before = out.read_bytes()
    assert cli.main(["generate", "--from-record", str(out), "-o", str(out), "--overwrite"]) == 2
    assert out.read_bytes() == before


def test_a_revision_is_of_the_hub(made, tmp_path, capsys, unloaded):
    model = str(made / "weights" / "model")
    command = ["generate", "--checkpoint", model, "--revision", "v1", "-o", str(tmp_path / "a.mp4")]
    assert cli.main(command) == 2
    assert "revision 'v1' is for a Hub id owner/name" in capsys.readouterr().err


def test_the_hub_is_asked_for_the_recorded_commit(made, tmp_path, monkeypatch, quick):
    """And another checkpoint that is named is not."""
    asked = []

    def find(name, weights=True, revision=None):
        asked.append((name, revision))
        return made / "weights" / "model"

    monkeypatch.setattr("cosmos3_jax.pipeline.find_checkpoint", find)
    monkeypatch.setattr("cosmos3_jax.cli.generate.find_checkpoint", find)
    recorded = read_record(made / "out" / "a.json") | {"checkpoint": "owner/name"}
    recorded["checkpoint_files"] = recorded["checkpoint_files"] | {"revision": "c0ffee"}
    (tmp_path / "a.json").write_text(json.dumps(recorded))
    again(tmp_path / "a.json", tmp_path / "b.mp4")
    assert set(asked) == {("owner/name", "c0ffee")}
    asked.clear()
    again(tmp_path / "a.json", tmp_path / "c.mp4", "--checkpoint", "owner/other")
    assert set(asked) == {("owner/other", None)}
