"""The transformer's inputs for both sides: random latents, padded prompts, given frames.

Axes: B batch, S text tokens; t latent frames, h rows, w columns, C channels; s sound latents.
"""

import dataclasses

import numpy as np

from cosmos3_jax.config import TransformerConfig

TIMESTEPS = (967, 500, 999, 3)
INPUTS = 8  # of a case: errors in bfloat16 scatter


@dataclasses.dataclass(frozen=True)
class Example:
    """One input.

    Attributes:
        ids: the prompt's.
        video: float32 [t, h, w, C].
        sound: float32 [s, C], or None.
        timestep: 0..999.
    """

    ids: list[int]
    video: np.ndarray
    sound: np.ndarray | None
    timestep: int


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one shape: one batch of ours, one after the other in the reference.

    Attributes:
        name: for the report.
        grid: latent frames, rows, columns.
        texts: lengths of the prompts, in turn; padded to the longest.
        sound_frames: sound latents, where the checkpoint has sound.
        fps: of the video.
        given: indices of the latent frames that are known.
        examples: the inputs.
    """

    name: str
    grid: tuple[int, int, int]
    texts: tuple[int, ...]
    sound_frames: int
    fps: float
    given: tuple[int, ...] = ()
    examples: tuple[Example, ...] = ()

    @property
    def given_frames(self) -> np.ndarray:
        """bool [B, t]: the latent frames that are known."""
        given = np.isin(np.arange(self.grid[0]), self.given)
        return np.broadcast_to(given, (len(self.examples), len(given)))

    def latents(self) -> dict[str, np.ndarray]:
        """`video` [B, t, h, w, C] and, with sound, `sound` [B, s, C], of all examples."""
        names = ("video", "sound") if self.sound_frames else ("video",)
        return {name: np.stack([getattr(x, name) for x in self.examples]) for name in names}

    def padded_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 and bool [B, S]: ids and where they are real; S is the case's longest prompt."""
        longest = max(self.texts)
        ids = np.zeros((len(self.examples), longest), np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, example in enumerate(self.examples):
            ids[row, : len(example.ids)] = example.ids
            mask[row, : len(example.ids)] = True
        return ids, mask


# Rows or columns are odd in the first, as those of 720p, so patches are padded; both frame rates
# and both kinds of time line.
CASES = (
    Case("odd grid, prompts of 20, 13, 7 tokens, 24 fps", (2, 3, 5), (20, 13, 7), 4, 24.0),
    Case("given frame, prompts of 9 tokens, 30 fps", (3, 2, 4), (9,), 3, 30.0, (0,)),
)


def make_cases(config: TransformerConfig) -> list[Case]:
    """The cases with their examples, without sound if the model has none."""
    random = np.random.default_rng(0)
    cases = []
    for case in CASES:
        frames = case.sound_frames if config.sound_gen else 0
        examples = []
        for i in range(INPUTS):
            text = case.texts[i % len(case.texts)]
            ids = random.integers(0, config.vocab_size, text).tolist()
            video = random.standard_normal((*case.grid, config.latent_channel), np.float32)
            sound = random.standard_normal((frames, config.sound_dim or 1), np.float32)
            step = TIMESTEPS[i % len(TIMESTEPS)]
            examples.append(Example(ids, video, sound if frames else None, step))
        cases.append(dataclasses.replace(case, examples=tuple(examples), sound_frames=frames))
    return cases
