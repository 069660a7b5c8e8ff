"""What a generation says of its stages, and when its bar begins."""

import logging

import pytest
import tqdm
from command_line import PROMPT

from cosmos3_jax.cli import main as cli
from cosmos3_jax.io import media

pytestmark = pytest.mark.usefixtures("own_cache")


def test_stages_and_compiling_are_told(model, caplog, monkeypatch, tmp_path):
    """Of a size that nothing else has; the second time nothing is compiled."""
    begun = []
    real = tqdm.tqdm

    def bar(*args, **more):
        begun.append([record.getMessage() for record in caplog.records])
        return real(*args, **more)

    monkeypatch.setattr(tqdm, "tqdm", bar)
    settings = dict(num_frames=5, height=48, width=112, num_inference_steps=2, progress=True)
    with caplog.at_level(logging.INFO, "cosmos3_jax"):
        made = model.generate(PROMPT, **settings)
        stages = ["encoding the prompt", "denoising", "decoding the video"]
        said = [record.getMessage() for record in caplog.records]
        assert [line for line in said if line in stages] == stages
        assert "compiling the program for denoising" in begun[0]
        assert "decoding the video" not in begun[0] and len(begun) == 1
        caplog.clear()
        model.generate(PROMPT, **settings)
    assert not [r for r in caplog.records if r.getMessage().startswith("compiling")]
    for video in (made["video"], made["video"][0]):
        assert media.probe(media.save_mp4(video, tmp_path / "a.mp4", overwrite=True)).frames == 5
    with pytest.raises(TypeError, match=r"the video is a list: give what `generate` returns"):
        media.save_mp4([1, 2], tmp_path / "b.mp4")


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--frames", "a" * 5000],
        ["generate", "a", "b\nc"],
        ["info", "\x1b[31m" + "b" * 5000],
        ["generate", "a", "--out", "b\nc"],
        ["generate", "a", "--out", "1" * 5000 + ".mp4"],
        ["generate", "a", "--save-latents", "1" * 5000 + ".npz"],
        ["generate", "--prompt-file", "1" * 5000],
        ["convert", "a\nb", "c\nd"],
        ["bench", "--out", "a\nb/" * 2000],
    ],
)
def test_what_was_typed_comes_back_short_and_printable(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        raise SystemExit(cli.main(arguments))
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert "error: " in said and "\x1b" not in said
    assert len(said.partition("error: ")[2].splitlines()) == 1
    assert max(map(len, said.splitlines())) < 1000
