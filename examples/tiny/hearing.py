"""What can be heard in a clip of the tiny world: samples -> onsets, pitch and place.

Knows which pitches have names; knows nothing of the sentence or the scene.

Units: seconds, Hz; place is 0 at the left and 1 at the right.
Axes: C channels (2), S samples, N steps of the envelope.
"""

from typing import NamedTuple

import numpy as np

from examples.tiny import scenes as sc

STEP = 0.0025  # of the envelope, in seconds
SMOOTH = 0.012
SILENCE = 0.03  # root mean square; a tone begins at about 0.4
SEMITONE = 2 ** (1 / 12)
WINDOW = 0.25  # seconds of a tone that its spectrum is taken from
PURE = 0.3  # share of the power at the pitch and its harmonics that makes it a tone, not a noise
LOWEST, HIGHEST = 100.0, 2500.0


class Tone(NamedTuple):
    """An onset, and where it came from."""

    time: float
    place: float


class Heard(NamedTuple):
    """A clip: its tones in order of time, the name of their pitch if it has one, and their Hz."""

    tones: list[Tone]
    pitch: str | None
    hertz: float | None


def listen(sound: np.ndarray, sample_rate: int = 48_000) -> Heard:
    """Hear a clip: float [2, S] in [-1, 1]."""
    sound = np.asarray(sound, np.float32)
    step = round(STEP * sample_rate)
    count = sound.shape[1] // step
    power = np.square(sound[:, : count * step]).reshape(2, count, step).mean(2)
    kernel = np.hanning(2 * round(SMOOTH / STEP) + 1)[1:-1]
    level = np.sqrt(np.convolve(power.sum(0), kernel / kernel.sum(), "same"))
    if level.max() < SILENCE:
        return Heard([], None, None)
    tones = []
    for onset in _onsets(level):
        begin = int(max(onset, 0) / STEP)
        left, right = power[:, begin : begin + round(0.1 / STEP)].sum(1) ** 0.5
        tones.append(Tone(float(onset), float(right / (left + right + 1e-9))))
    hertz, pure = _pitch(sound, [tone.time for tone in tones], sample_rate)
    nearest = min(
        sc.PITCHES | sc.NEW_PITCHES, key=lambda name: abs(np.log(hertz / sc.pitch_hz(name)))
    )
    near = abs(np.log(hertz / sc.pitch_hz(nearest))) < np.log(SEMITONE)
    return Heard(tones, nearest if near and pure else None, hertz)


def _onsets(level: np.ndarray) -> list[float]:
    """When the level, [N], has half of each steep rise behind it."""
    reach = round(0.03 / STEP)  # half the time over which a rise is measured
    padded = np.pad(level, reach, mode="edge")
    rise = padded[2 * reach :] - padded[: -2 * reach]
    apart = round(0.1 / STEP)
    onsets = []
    for n in np.flatnonzero(rise > 0.2 * level.max()):
        around = rise[max(0, n - apart) : n + apart + 1]
        if rise[n] < around.max() or (onsets and n * STEP - onsets[-1] < sc.MIN_GAP / 2):
            continue
        start = max(0, n - 2 * reach)
        piece = level[start : n + 2 * reach + 1]
        top = int(np.argmax(piece))
        bottom = int(np.argmin(piece[: top + 1]))
        half = (piece[top] + piece[bottom]) / 2
        above = bottom + int(np.argmax(piece[bottom : top + 1] >= half))
        if above == 0:
            onsets.append(start * STEP)
            continue
        before, after = piece[above - 1], piece[above]
        onsets.append((start + above - 0.5 + (half - before) / (after - before + 1e-9)) * STEP)
    return onsets


def _pitch(sound: np.ndarray, onsets: list[float], sample_rate: int) -> tuple[float, bool]:
    """The strongest frequency after the onsets, and whether it carries the sound."""
    size = 1 << 16
    spectrum = np.zeros(size // 2 + 1)
    for n, onset in enumerate(onsets or [0.0]):
        until = onset + WINDOW if onsets else sound.shape[1] / sample_rate
        until = min([until, *(later - 0.02 for later in onsets[n + 1 : n + 2])])
        piece = sound[:, max(0, round((onset + 0.005) * sample_rate)) : round(until * sample_rate)]
        piece = piece[:, :size] * np.hanning(2 * piece.shape[1])[piece.shape[1] :][:size]
        spectrum += np.square(np.abs(np.fft.rfft(piece, size))).sum(0)
    frequency = np.fft.rfftfreq(size, 1 / sample_rate)
    audible = (frequency > LOWEST) & (frequency < HIGHEST)
    hertz = float(frequency[np.argmax(np.where(audible, spectrum, 0))])
    harmonic = np.zeros(len(frequency), bool)
    for n in (1, 2, 3):
        harmonic |= np.abs(np.log(np.maximum(frequency, 1) / (n * hertz))) < np.log(SEMITONE)
    return hertz, bool(spectrum[harmonic].sum() > PURE * spectrum.sum())
