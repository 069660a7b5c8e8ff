"""The tiny world's recipe at a miniature size."""

import jax
import numpy as np
import quick

from examples.tiny import evaluate, model, train_towers

SIZES = model.TRANSFORMER | dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=32, rope_scaling={"mrope_section": [4, 2, 2]},
)  # fmt: skip
RECIPE = model.RECIPE | dict(height=32, width=32, num_inference_steps=2)
RUN = train_towers.Run(batch=4, warmup=2, dtype="float32", learning_rate=1e-2, ema_decay=0.5)
COUNT = 8  # clips


def hurried(step):
    """The same program, in a tenth of the time to compile."""
    return jax.jit(step.__wrapped__, donate_argnums=0, compiler_options=quick.OPTIONS)


def share_that_differs(clip: evaluate.Clip, other: evaluate.Clip, steps: int = 0) -> float:
    """The share of 8-bit values that are more than `steps` apart."""
    return np.mean(np.abs(clip.video.astype(int) - other.video.astype(int)) > steps)
