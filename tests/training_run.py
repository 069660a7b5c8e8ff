"""A small training run that can be killed: `python training_run.py FOLDER STEPS`.

It imports no torch, and its parameters and batches are functions of a seed. It says which step it
is about to save.
"""

import functools
import sys

import jax
import numpy as np
import optax
import quick

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models.transformer import Latents, param_shapes
from cosmos3_jax.training import flow
from cosmos3_jax.training.checkpoints import Checkpoints
from cosmos3_jax.training.params import split_params
from cosmos3_jax.training.step import TrainOptions, TrainState, init_state, train_step

# 1 s instead of 10, also in a process that was started without flags.
compiled = functools.partial(jax.jit, compiler_options=quick.OPTIONS)

CONFIG = TransformerConfig.from_dict(
    dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=96, vocab_size=264, latent_channel=6,
        rope_scaling={"mrope_section": [4, 2, 2]}, patch_latent_dim=24, sound_gen=True, sound_dim=5,
    )
)  # fmt: skip
FRAMES, HEIGHT, WIDTH, SOUND = 3, 3, 5, 4
LENGTHS, BUCKET = (5, 11), 12
OPTIONS = TrainOptions(
    levels=flow.NoiseLevels(shift=3.0), weights=flow.LossWeights(sound=0.5), text_dropout=0.3,
    dtype="float32", remat=False, ema_decay=0.9,
)  # fmt: skip
OPTIMIZER = optax.adam(1e-3)


def normal(random: np.random.RandomState, *shape: int) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def make_batch(seed: int = 0, count: int = 2, sound: bool = True) -> flow.Batch:
    """Two prompt lengths in turn; the first example's frame 0 is given."""
    random = np.random.RandomState(seed)
    frame_mask = np.zeros((count, FRAMES), bool)
    frame_mask[0, 0] = True
    return flow.Batch(
        text_ids=random.randint(0, CONFIG.vocab_size, (count, BUCKET)).astype(np.int32),
        text_mask=np.arange(BUCKET) < np.resize(LENGTHS, count)[:, None],
        video=normal(random, count, FRAMES, HEIGHT, WIDTH, CONFIG.latent_channel),
        sound=normal(random, count, SOUND, CONFIG.sound_dim) if sound else None,
        fps=np.resize(np.float32([24, 30]), count),
        frame_mask=frame_mask,
        uncond_ids=np.array([3, 1, 4], np.int32),
        uncond_mask=np.ones(3, bool),
        weight=np.resize(np.float32([1, 2]), count),
    )


def draw(batch: flow.Batch, seed: int = 1) -> tuple[Latents, np.ndarray]:
    """Noise and noise levels."""
    random = np.random.RandomState(seed)
    sound = None if batch.sound is None else normal(random, *batch.sound.shape)
    sigma = random.uniform(0.1, 0.99, len(batch.video)).astype(np.float32)
    noise = {"video": normal(random, *batch.video.shape)}
    return noise | ({} if sound is None else {"sound": sound}), sigma


def random_params() -> dict:
    random = np.random.RandomState(5)
    return jax.tree.map(lambda x: 0.1 * normal(random, *x.shape), param_shapes(CONFIG))


def start(optimizer: optax.GradientTransformation = OPTIMIZER) -> tuple[TrainState, dict]:
    """The MLPs of both towers learn: few leaves compile fast. Their state, and the rest."""
    learns, frozen = split_params(random_params(), ["/layers/mlp/"])
    return init_state(learns, optimizer, jax.random.key(7), ema=True), frozen


@functools.cache
def compiled_step(**changes):
    """The step of the options above, but for `changes`: of them, or of the step's arguments."""
    arguments = {"optimizer": OPTIMIZER}
    for name in ("optimizer", "combine"):
        if name in changes:
            arguments[name] = changes.pop(name)
    options = functools.partial(TrainOptions, **vars(OPTIONS) | changes)()
    return compiled(functools.partial(train_step, config=CONFIG, options=options, **arguments))


def run(folder, steps: int) -> list[float]:
    """Train up to `steps`, from what the folder holds or from the start; the losses."""
    (state, frozen), losses = start(), []
    with Checkpoints(folder, keep=2) as checkpoints:
        if checkpoints.last is not None:
            state = checkpoints.restore(state)
        for step in range(int(state.step), steps):
            state, metrics = compiled_step()(state, frozen, make_batch(step))
            losses.append(float(metrics["loss"]))
            print("saving", step + 1, losses[-1], flush=True)
            checkpoints.save(state)
    return losses


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]))
