"""The command line: sizes and numbers that nothing can be made of are one line, at once."""

import json

import numpy as np
import pytest
from checkpoint_files import link_checkpoint, update_json

from cosmos3_jax.checkpoint import find
from cosmos3_jax.cli import main as cli
from cosmos3_jax.io import prepare

pytestmark = pytest.mark.usefixtures("no_compilation_cache", "unloaded")
GENERATE = "generate --prompt ball --out {tmp}/a.mp4"


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Run a command that is refused in one line; the line."""
    monkeypatch.setattr(prepare, "initial_noise", lambda *_: pytest.fail("noise was drawn"))

    def run(command: str) -> str:
        assert cli.main(command.format(tmp=tmp_path).split()) == 2
        said = capsys.readouterr()
        assert said.err.startswith("cosmos3-jax: error: ") and said.err.count("\n") == 1
        assert not said.out and not (tmp_path / "a.mp4").exists()
        return said.err

    return run


SIGMAS = ",".join(map(str, np.linspace(0.999, 0, 1002)))
FAR = [
    (GENERATE, "--num-frames 4000000001", "num_frames=4000000001 is beyond the limit of 100001"),
    (GENERATE, "--height 16000000000", "height=16000000000 is beyond the limit of 16384"),
    (GENERATE, "--steps 2147483648", "num_inference_steps=2147483648 is beyond the limit of 1000"),
    (GENERATE, "--steps 1000001", "num_inference_steps=1000001 is beyond the limit of 1000"),
    (GENERATE, "--guidance-scale 1e39", "guidance_scale=1e+39 is beyond the limit of 10000"),
    (GENERATE, "--guidance-scale inf", "guidance_scale=inf must be a finite number"),
    (GENERATE, "--fps 1e-300", "fps=1e-300 is not within 0.01 to 10000"),
    (GENERATE, "--flow-shift 1e39", "flow_shift=1e+39 is beyond the limit of 10000"),
    (GENERATE, "--flow-shift 1e-300", "flow_shift=1e-300 is not within 0.0001 to 10000"),
    (GENERATE, f"--sigmas {SIGMAS}", "steps=1001 is beyond the limit of 1000"),
    (GENERATE, "--num-frames 100001 --size 768p", "need"),
    ("info", "--num-frames 4000000001", "num_frames=4000000001 is beyond the limit of 100001"),
    ("info", "--height 16000000000", "height=16000000000 is beyond the limit of 16384"),
    ("info", "--fps 1e39", "fps=1e+39 is beyond the limit of 10000"),
    ("bench", "--steps 1000001", "steps=1000001 is beyond the limit of 1000"),
    ("bench", "--num-frames 4000000001", "num_frames=4000000001 is beyond the limit of 100001"),
    ("bench", "--width 16000000000", "width=16000000000 is beyond the limit of 16384"),
    ("bench", "--text-tokens 2147483648", "text_tokens=2147483648 is beyond the limit of 131072"),
    ("bench", "--negative-tokens 9999999", "negative_tokens=9999999 is beyond the limit"),
    ("bench", "--decode-chunk-size 9999999", "decode_chunk_size=9999999 is beyond the limit"),
    ("bench", "--repeats 2147483648", "repeats=2147483648 is beyond the limit of 10000"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "options", "message"), FAR, ids=lambda x: str(x)[:40])
def test_what_is_far_too_much_is_one_line(refused, command, options, message):
    assert message in refused(f"{command} {options}")


@pytest.mark.parametrize("fields", [
    {"num_inference_steps": 1000001}, {"num_inference_steps": 2**31}, {"num_frames": 4000000001},
    {"height": 16 * 10**9}, {"guidance_scale": 1e39}, {"fps": 1e-300},
    {"modes": {"text2video": {"flow_shift": 1e39}}}, {"negative_prompt": "a" * (2**20 + 1)},
], ids=lambda fields: str(fields)[:40])  # fmt: skip
def test_a_recipe_of_far_too_much_is_one_line(refused, silent_checkpoint, tmp_path, fields):
    folder = link_checkpoint(silent_checkpoint, tmp_path / "checkpoint")
    (folder / "cosmos3_recipe.json").write_text(json.dumps(fields))
    for command in (GENERATE, "info"):
        assert "cosmos3_recipe.json: " in refused(f"{command} --checkpoint {folder}")


@pytest.mark.parametrize(("part", "name", "value"), [
    ("transformer", "num_hidden_layers", 10**7), ("transformer", "hidden_size", 10**400),
    ("transformer", "rope_theta", 1e39), ("transformer", "rms_norm_eps", 1e-300),
    ("vae", "num_res_blocks", 10**6), ("vae", "latents_mean", [0.0] * 10**5),
    ("sound_tokenizer", "dec_strides", [1] * 1000),
])  # fmt: skip
def test_a_model_of_far_too_much_is_one_line(
    refused, public_checkpoint, tmp_path, part, name, value
):
    folder = link_checkpoint(public_checkpoint, tmp_path / "checkpoint")
    update_json(folder / part / "config.json", **{name: value})
    assert f"{part}/config.json: " in refused(f"info --sound --checkpoint {folder}")


@pytest.mark.parametrize(
    ("value", "message"), [(1e30, "beyond the limit of 10000"), (1e39, "holds NaN or infinity")]
)
def test_noise_of_a_file_is_noise(refused, tmp_path, value, message):
    config, _ = find.open_folder(find.find_checkpoint("tiny"))
    noise = np.full((1, config.transformer.latent_channel, 3, 2, 3), value)
    np.savez(tmp_path / "noise.npz", noise=noise)
    size = "--num-frames 9 --height 32 --width 48 --noise {tmp}/noise.npz"
    assert message in refused(f"{GENERATE} {size}")
