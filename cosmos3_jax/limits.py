"""The most that one generation and one model may ask for: generous, and finite.

They are looked at before anything of such a size is made. Whether a generation fits the memory at
hand is another question, for `runtime.memory`.
"""

import math
from collections.abc import Mapping

FRAMES = 100_001  # more than an hour at 24 a second
PIXELS = 16384  # across or down; no encoder takes more
STEPS = 1000  # as many as there are timesteps that the model knows
BATCH = 1024  # prompts
SEED = 2**32 - 1  # numpy's RandomState takes no more
TEXT_TOKENS = 2**17  # of one prompt
LETTERS = 2**20  # of one text
REPEATS = 10_000  # of a measurement
FPS = (0.01, 10_000.0)
GUIDANCE = 10_000.0  # either way
FLOW_SHIFT = 10_000.0  # and not less than 1 / FLOW_SHIFT
LATENT = 10_000.0  # noise is standard normal, and latents of about unit variance

# Of a model's configuration.
LAYERS = 512
STAGES = 16  # of an autoencoder, and blocks of one stage
WIDTH = 4096  # of an autoencoder's first stage, and of a head; heads
FACTOR = 64  # by which a stage is wider than the first
DIMENSION = 2**18  # any other whole number
VOCABULARY = 2**22
ENTRIES = 4096  # of a list
# Numbers are computed with in float32: larger ones are infinite there, and smaller ones 0.
LARGEST_FLOAT, SMALLEST_FLOAT = 3.4028234663852886e38, 1.1754943508222875e-38

# The largest value of each setting of a generation, by its name in `Settings`, `Recipe` and `Job`.
SETTINGS: Mapping[str, float] = {
    "num_frames": FRAMES, "height": PIXELS, "width": PIXELS, "fps": FPS[1],
    "num_inference_steps": STEPS, "steps": STEPS, "guidance_scale": GUIDANCE,
    "flow_shift": FLOW_SHIFT, "text_tokens": TEXT_TOKENS, "negative_tokens": TEXT_TOKENS,
    "batch": BATCH, "decode_chunk_size": FRAMES, "repeats": REPEATS,
}  # fmt: skip


def check_most(name: str, value: float, most: float | None = None) -> None:
    """Raise ValueError if a number is beyond `most`, or beyond its entry in `SETTINGS`.

    What is not finite passes: whoever reads it has more to say of it.
    """
    most = SETTINGS[name] if most is None else most
    if most < abs(value) < math.inf:
        raise ValueError(f"{name}={shown(value)} is beyond the limit of {most:g}: take less")


def shown(value: object, letters: int = 500) -> str:
    """A value as part of one line, cut off where it is long."""
    try:
        text = " ".join(repr(value).split("\n"))
    except Exception as error:  # of a whole number with more digits than Python writes
        text = f"<{type(value).__name__} that cannot be shown: {error}>"
    return text if len(text) <= letters else text[:letters] + "..."
