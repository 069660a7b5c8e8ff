"""A picture of clips from the command line: frames, waveform and spectrum, under their prompts.

    python -m examples.tiny.contact_sheet outputs/demo.mp4 [MORE.mp4 ...] --out sheet.png

The prompt is in the JSON that `cosmos3-jax generate` writes beside a video; without one, the file's
name stands for it.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from cosmos3_jax.io import media
from examples.tiny import sheets


def read(path: Path) -> sheets.Clip:
    """A video with its sound and its prompt. A file without sound is silent.

    Raises ValueError if its sound is not at 48 kHz, OSError if it cannot be read.
    """
    video, fps = media.read_video(path)
    rate, channels = 48_000, media.probe(path).channels
    sound = np.zeros((2, round(len(video) / fps * rate)), np.float32)
    if channels:
        sound, rate = media.read_sound(path)
        sound = np.broadcast_to(sound, (2, sound.shape[1]))
    if rate != 48_000:
        raise ValueError(f"{path} has sound at {rate} Hz; the sheet draws 48000 Hz alone")
    record = path.with_suffix(".json")
    prompt = path.name
    if record.is_file():
        prompt = json.loads(record.read_text(encoding="utf-8"))["prompt"]
    return video, sound, prompt


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what generated clips show and sound like.")
    parser.add_argument("videos", type=Path, nargs="+", help="mp4 files")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args()
    media.check_writable(args.out, overwrite=True)
    clips = [read(path) for path in args.videos]
    sheets.sheet(clips).save(args.out, optimize=True)
    print(f"{args.out}: {len(clips)} clips")


if __name__ == "__main__":
    main()
