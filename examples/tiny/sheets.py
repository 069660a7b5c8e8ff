"""Contact sheets of clips: a few frames, the sound under them, the sentence above.

    python -m examples.tiny.sheets --out sheet.png [--folder DIR] [--rows 6] [--seed 0]

With `--folder`, the clips of a folder that `judge` reads; without, true clips of held-out
sentences.

Axes: T frames, H rows, W columns, S samples, F frequencies, N columns of a spectrogram.
"""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cosmos3_jax.io import media
from examples.tiny import clips as cl
from examples.tiny import grammar, world
from examples.tiny import scenes as sc

PAPER, INK, FAINT = (252, 252, 250), (38, 40, 46), (176, 180, 188)
LEFT, RIGHT = (52, 110, 190), (222, 106, 66)  # the two channels
COLUMNS, GAP, MARGIN = 9, 6, 28
TILE = 128  # side of a frame on the sheet
WAVE, SPECTRUM = 46, 54  # heights of the two strips
LINE, FONT_SIZE = 21, 15
LOWEST, HIGHEST = 120.0, 3_000.0
DETAIL = 2  # everything is drawn this much larger, for sharp text on sharp screens

Clip = tuple[np.ndarray, np.ndarray, str]


def sheet(clips: Sequence[Clip], columns: int = COLUMNS, sample_rate: int = 48_000) -> Image.Image:
    """One row a clip.

    Args:
        clips: (video, sound, sentence) each: [T, H, W, 3], uint8 or float in [0, 1]; [2, S].
        columns: frames shown, spread over the whole clip; first and last are among them.
        sample_rate: of the sounds, in Hz.

    Raises ValueError if there are no clips, or fewer than two columns.
    """
    if not clips or columns < 2:
        raise ValueError(
            f"{len(clips)} clips in {columns} columns: give a clip and two columns or more"
        )
    width = columns * TILE + (columns - 1) * GAP
    captions = [textwrap.wrap(text, width // 8) for _, _, text in clips]
    heights = [len(lines) * LINE + 8 + TILE + GAP + WAVE + SPECTRUM + GAP for lines in captions]
    between = 26
    height = sum(heights) + between * (len(clips) - 1) + 2 * MARGIN
    size = ((width + 2 * MARGIN) * DETAIL, height * DETAIL)
    picture = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE * DETAIL)
    top = MARGIN
    for (video, sound, _), lines, tall in zip(clips, captions, heights, strict=True):
        y = top
        for line in lines:
            pen.text((MARGIN * DETAIL, y * DETAIL), line, INK, font)
            y += LINE
        y += 8
        _frames(picture, media.to_uint8(video), columns, y)
        y += TILE + GAP
        # The sound of the same seconds: what the model adds after the last frame is left out.
        seen = np.asarray(sound, np.float32)[:, : round(len(video) / sc.FPS * sample_rate)]
        _paste(picture, _wave(seen, width * DETAIL, WAVE * DETAIL), MARGIN, y)
        y += WAVE + GAP // 2
        strip = _spectrogram(seen, width * DETAIL, SPECTRUM * DETAIL, sample_rate)
        _paste(picture, strip, MARGIN, y)
        top += tall + between
    return picture


def _paste(picture: Image.Image, part: Image.Image, x: int, y: int) -> None:
    picture.paste(part, (x * DETAIL, y * DETAIL))


def _frames(picture: Image.Image, video: np.ndarray, columns: int, y: int) -> None:
    side = TILE * DETAIL
    for column, t in enumerate(np.linspace(0, len(video) - 1, columns).round().astype(int)):
        tile = Image.fromarray(video[t]).resize((side, side), Image.Resampling.BICUBIC)
        _paste(picture, tile, MARGIN + column * (TILE + GAP), y)


def _wave(sound: np.ndarray, width: int, height: int) -> Image.Image:
    """Left above the middle line, right below it: the peak level of every column."""
    strip = Image.new("RGB", (width, height), PAPER)
    pen, middle = ImageDraw.Draw(strip), height // 2
    edges = np.linspace(0, sound.shape[1], width + 1).astype(int)
    for channel, (colour, sign) in enumerate(((LEFT, -1), (RIGHT, 1))):
        peaks = np.maximum.reduceat(np.abs(sound[channel]), edges[:-1])
        # A column may fall between two crests of a low tone: its neighbours help.
        peaks = np.lib.stride_tricks.sliding_window_view(np.pad(peaks, 4), 9).max(1)
        for x, peak in enumerate(peaks):
            reach = round(float(min(peak, 1.0)) * (middle - 2))
            if reach:
                pen.line((x, middle, x, middle + sign * reach), colour)
    pen.line((0, middle, width, middle), FAINT)
    return strip


def _spectrogram(sound: np.ndarray, width: int, height: int, sample_rate: int) -> Image.Image:
    """Power of both channels on a logarithmic axis of frequency, 50 dB from dark to light."""
    window, hop = 2560, 256
    padded = np.pad(sound, ((0, 0), (window // 2, window // 2)))
    pieces = np.lib.stride_tricks.sliding_window_view(padded, window, 1)[:, ::hop]
    power = np.square(np.abs(np.fft.rfft(pieces * np.hanning(window), axis=2))).sum(0)  # [N, F]
    bins = np.geomspace(HIGHEST, LOWEST, height) * window / sample_rate
    low = bins.astype(int)
    part = bins - low
    power = power[:, low] * (1 - part) + power[:, low + 1] * part
    reference = (window / 4 * 0.5) ** 2  # about a tone of half the full level
    level = np.clip(1 + 10 * np.log10(power / reference + 1e-9) / 50, 0, 1).T  # [height, N]
    stops = np.array([(24, 26, 38), (52, 50, 110), (146, 60, 120), (236, 122, 84), (252, 226, 150)])
    place = level * (len(stops) - 1)
    index = np.minimum(place.astype(int), len(stops) - 2)
    shades = stops[index] + (place - index)[..., None] * (stops[index + 1] - stops[index])
    image = Image.fromarray(shades.round().astype(np.uint8))
    return image.resize((width, height), Image.Resampling.BILINEAR)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a contact sheet of clips.")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--folder", type=Path, help="mp4 files and scenes.json, as the judge reads")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder:
        clips = cl.read_folder(args.folder, args.rows)
        clips = [(clip.video, clip.sound, clip.sentence) for clip in clips]
    else:
        chosen = grammar.held_out_sentences(args.rows, args.seed)
        clips = [(*world.render(scene), text) for scene, text in chosen]
    media.check_writable(args.out, overwrite=True)
    sheet(clips).save(args.out, optimize=True)
    print(f"{args.out}: {len(clips)} clips")


if __name__ == "__main__":
    main()
