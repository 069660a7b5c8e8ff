"""One request on one model: run, compiled ahead, or made a step at a time."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Generator
from functools import partial

import jax
import numpy as np
import tqdm
from jax import Array

from cosmos3_jax.config import Config
from cosmos3_jax.parallel import device
from cosmos3_jax.parallel.mesh import Meshes, ambient, reachable
from cosmos3_jax.runtime import memory, programs
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.sampler_state import StateFile
from cosmos3_jax.runtime.weights import Weights
from cosmos3_jax.sampling import stages
from cosmos3_jax.sampling.request import Request
from cosmos3_jax.sampling.stages import Stage, Values


@dataclasses.dataclass(frozen=True)
class Step:
    """What a generation has after one of its steps.

    Attributes:
        index: of the step, from 0 on.
        sigma: the noise level that the step began at; the latents are at the next one.
        latents: after the step, `{"video"[, "sound"]}`, channels first.
        clean: the step's prediction of the clean latents, likewise.
    """

    index: int
    sigma: float
    latents: dict[str, Array]
    clean: dict[str, Array]


class Generation:
    """A request, the weights that it is made with, and where.

    Attributes:
        job: its sizes.
        mesh: its devices; None for the default one.
        block_steps: denoising steps of one call to the device.
    """

    def __init__(
        self,
        weights: Weights,
        config: Config,
        meshes: Meshes,
        request: Request,
        *,
        output: str = "media",
        return_trajectory: bool = False,
        decode_chunk_size: int | None = None,
        steps_per_program: int | None = None,
    ):
        """See `Cosmos3.generate` for the options. Raises ValueError where they do not fit one
        another, or the request the mesh.
        """
        self.weights, self.config, self.request = weights, config, request
        self.trajectory = return_trajectory
        self.values = stages.initial_values(
            request, output=output, decode_chunk_size=decode_chunk_size
        )
        self.mesh = meshes.of(len(request.text_ids), request.neg_text_ids is not None)
        self.job = Job.of_request(
            config,
            request,
            dtype=weights.dtype,
            offload=not weights.resident,
            mesh={} if self.mesh is None else dict(self.mesh.shape),
            decode=output == "media",
            decode_chunk_size=decode_chunk_size,
            trajectory_steps=request.num_inference_steps if return_trajectory else 0,
        )
        self.block_steps = programs.block_length(
            request.num_inference_steps, steps_per_program, return_trajectory
        )

    def run(
        self,
        *,
        progress: bool | None = None,
        after: Callable[[Stage, Values], None] | None = None,
        states: StateFile | None = None,
    ) -> dict:
        """See `Cosmos3.run`."""
        if progress is None:
            progress = sys.stderr.isatty()
        if states is not None and self.trajectory:
            raise ValueError("a trajectory has every step: it cannot go on from a state on disk")
        limit = device.memory_limit()
        memory.check_fits(self.config, limit, self.job)
        trajectory: list[dict] = []
        total = self.request.num_inference_steps
        with (
            memory.exhaustion_explained(self.config, limit, self.job),
            ambient(self.mesh),
            contextlib.ExitStack() as stack,
        ):
            bars: list[tqdm.tqdm] = []

            # Only then, so that compiling does not count in its rate.
            def begun(stage: Stage, done: int) -> None:
                if stage.loop and progress:
                    bar = tqdm.tqdm(total=total, initial=done, unit="step", desc="denoise")
                    bars.append(stack.enter_context(bar))

            def listen(values: Values) -> None:
                for bar in bars:
                    bar.update(min(self.block_steps, total - bar.n))
                    if bar.n == total:
                        bar.close()
                if self.trajectory:
                    trajectory.append({name: values[name] for name in ("latents", "clean")})

            execute = programs.Run(
                self.weights, self.config, block_steps=self.block_steps, listen=listen,
                after=after, begun=begun, states=states,
            )  # fmt: skip
            result = stages.result_of(stages.walk(self._reachable(), execute))
        if self.job.decode:
            result["fps"] = float(np.ravel(self.request.fps)[0])
        if "sound" in result and self.job.decode and self.config.sound_vae:
            result["sample_rate"] = self.config.sound_vae.sampling_rate
        if self.trajectory:
            result["trajectory"] = programs.stack(trajectory)
        return result

    def compile(self) -> None:
        """Compile all that `run` would, and run nothing."""
        memory.check_fits(self.config, device.memory_limit(), self.job)
        with ambient(self.mesh):
            execute = programs.Compile(self.weights.structs, self.config, self.block_steps)
            values = stages.walk(programs.structs_of(self.values), execute)
            if self.trajectory:
                step = {name: values["latents"] for name in ("latents", "clean")}
                programs.compile_for(programs.stack, [step] * self.request.num_inference_steps)
            self.weights.compile_loading()

    def steps(self) -> Generator[Step, None, None]:
        """What there is after each step, as it is made. Nothing is decoded."""
        memory.check_fits(self.config, device.memory_limit(), self.job)
        before, loop = stages.up_to_the_loop()
        execute = programs.Run(self.weights, self.config, block_steps=1)
        with ambient(self.mesh):
            values = stages.walk(self._reachable(), execute, before)
        sigmas = values["steps"].solver.sigma
        with contextlib.closing(execute.each_call(loop, values)) as calls:
            for index in range(self.request.num_inference_steps):
                with ambient(self.mesh):  # only while a program runs: the caller goes on in between
                    values = next(calls)
                yield Step(index, float(sigmas[index]), values["latents"], values["clean"])

    def _reachable(self) -> Values:
        """The values that the first stage starts from, on this mesh."""
        return self.values | {"request": jax.tree.map(partial(reachable, self.mesh), self.request)}
