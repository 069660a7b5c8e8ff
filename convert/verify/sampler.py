"""UniPC on both sides, on the same velocities, for every schedule."""

from pathlib import Path

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

from convert.verify.compare import FLOAT32, Outcome, Pool, relative_l2
from convert.verify.sides import Sides
from cosmos3_jax.config import Config
from cosmos3_jax.io.prepare import resolve_sigmas
from cosmos3_jax.io.settings import Settings
from cosmos3_jax.sampling import unipc

STEPS = (1, 2, 5, 35)
SHIFT = 10.0
BARS = {"timesteps": 0.0, "sigmas": FLOAT32["sampler"], "latents": FLOAT32["sampler"]}


def compare(outcome: Outcome, sides: Sides) -> None:
    """Compare the sampler that a checkpoint's scheduler file asks for; float32 in both."""
    for schedule in unipc.SCHEDULES:
        pool = Pool()
        for steps in STEPS:
            ours = _our_steps(sides.config, schedule, steps)
            exact = _their_steps(sides.checkpoint, schedule, steps)
            pool.add(ours["latents"][-1], exact["latents"][-1])
            errors = (
                (name, i, relative_l2(ours[name][i], exact[name][i]), bar)
                for name, bar in BARS.items() for i in range(steps)
            )  # fmt: skip
            for name, i, error, bar in errors:
                if not error <= bar:  # the first of them alone
                    step = f"{schedule} schedule, {steps} steps: {name} of step {i}"
                    outcome.add(step, relative_l2=error, bar=bar)
                    break
        case = f"{schedule} schedule, {', '.join(map(str, STEPS))} steps"
        outcome.rows.append(pool.row("sampler", case, "float32"))


def _velocity(x, random):
    """Another at each step, and dependent on the latents."""
    return 0.3 * x + random


def _random(steps: int) -> np.ndarray:
    """The noise to start from, and what each step's velocity has besides the latents."""
    shape = (steps + 1, 1, 4, 8, 8)
    return np.random.RandomState(0).standard_normal(shape).astype(np.float32)


def _our_steps(config: Config, schedule: str, steps: int) -> dict[str, np.ndarray]:
    settings = Settings(num_inference_steps=steps, flow_shift=SHIFT, schedule=schedule)
    table, (noise, *random) = unipc.tableau(resolve_sigmas(config, settings)), _random(steps)
    _, latents = unipc.advance(
        lambda x, timestep, random: _velocity(x, random), unipc.initial_state(noise), table,
        np.stack(random), collect=lambda state: state.latents,
    )  # fmt: skip
    made = {"timesteps": table.timestep, "sigmas": table.sigma, "latents": latents}
    return {name: np.asarray(values) for name, values in made.items()}


def _their_steps(checkpoint: Path, schedule: str, steps: int) -> dict[str, np.ndarray]:
    fields = {
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_karras_sigmas": True,
        "sigma_max": 200.0, "sigma_min": 0.147, "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
    }  # fmt: skip
    if (checkpoint / "scheduler" / "scheduler_config.json").is_file():
        fields = UniPCMultistepScheduler.load_config(checkpoint / "scheduler")
    # Whichever of them this checkpoint samples by itself.
    change: dict = {"use_karras_sigmas": schedule == "karras"}
    change |= {} if schedule == "karras" else {"flow_shift": SHIFT}
    scheduler = UniPCMultistepScheduler.from_config(fields, **change)
    native = (
        {"sigmas": np.linspace(1 - 1 / 1000, 0, steps + 1)[:-1]} if schedule == "native" else {}
    )
    scheduler.set_timesteps(steps, **native)
    (x, *random), latents = torch.from_numpy(_random(steps)), []
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(_velocity(x, random[i]), t, x, return_dict=False)[0]
        latents.append(x.numpy())
    return {
        "timesteps": scheduler.timesteps.numpy(),
        "sigmas": scheduler.sigmas[:-1].numpy(),
        "latents": np.stack(latents),
    }
