"""The loop over steps as one program a step, run from the host under a bar.

`programs.sample_latents` is the same loop as one program. That one could move a bar only by calling
back to the host, and JAX 0.10 keeps no program that does in its compilation cache.

Axes: as in `pipeline`; K steps.
"""

import jax
import tqdm
from jax import Array

from cosmos3_jax.config import Config
from cosmos3_jax.models.transformer import Condition
from cosmos3_jax.runtime.programs import (
    compile_for,
    sample_step,
    stack_steps,
    start_request,
    start_sampling,
)
from cosmos3_jax.sampling import unipc
from cosmos3_jax.sampling.generate import sampler
from cosmos3_jax.sampling.request import T2VRequest


def sample_with_bar(
    params: dict,
    conditions: list[Condition],
    request: T2VRequest,
    *,
    config: Config,
    return_trajectory: bool = False,
) -> tuple[dict[str, Array], dict | None]:
    """`programs.sample_latents`, and a bar that moves as each step ends."""
    conditions, state = start_sampling(conditions, start_request(request), config=config)
    steps = []
    with tqdm.tqdm(total=request.num_inference_steps, unit="step", desc="denoise") as bar:
        for row in unipc.rows(sampler(request)):
            state, made = sample_step(
                params, conditions, request.guidance_scale, state, row,
                config=config, return_trajectory=return_trajectory,
            )  # fmt: skip
            if steps:  # waited for only now, when the device has the next one to go on with
                _finish(steps[-1], bar)
            steps = [*steps, made] if return_trajectory else [made]
        _finish(steps[-1], bar)
    return made["latents"], stack_steps(steps) if return_trajectory else None


def compile_with_bar(
    params: dict,
    conditions: list[Condition],
    request: T2VRequest,
    *,
    config: Config,
    return_trajectory: bool = False,
) -> tuple[dict, dict | None]:
    """Compile all that `sample_with_bar` runs on arrays of these shapes; what it would return."""
    conditions, state = compile_for(
        start_sampling, conditions, start_request(request), config=config
    )
    row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), request.sampler)
    _, made = compile_for(
        sample_step, params, conditions, request.guidance_scale, state, row,
        config=config, return_trajectory=return_trajectory,
    )  # fmt: skip
    if not return_trajectory:
        return made["latents"], None
    return made["latents"], compile_for(stack_steps, [made] * request.num_inference_steps)


def _finish(step: dict, bar: tqdm.tqdm) -> None:
    jax.block_until_ready(step)
    bar.update()
