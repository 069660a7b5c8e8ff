"""Held-out sentences while towers are trained: generated now, judged meanwhile, logged later."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from pathlib import Path

import jax.numpy as jnp

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.models.transformer import unstack_layers
from cosmos3_jax.training.params import cast_params, load_towers
from examples.tiny import evaluate, grammar
from examples.tiny import judge as jd


class Watch:
    """Generates sentences from the towers as they are, and logs what judges say when they have.

    Nothing is chosen by it: the sentences are the first of the test.
    """

    def __init__(
        self,
        base: Path,
        vaes: dict,
        count: int,
        pool: Executor | None,
        log: Callable[[dict], None],
        dtype: str,
    ):
        """
        Args:
            base: of `assemble.write_base`.
            vaes: parameters of both autoencoders.
            count: of sentences.
            pool: processes that judge; None judges here, and training waits.
            log: takes a line.
            dtype: to compute in.
        """
        self.config, tokenizer = open_folder(base)
        self.test, self.pool, self.log, self.dtype = (
            grammar.held_out_sentences(count), pool, log, dtype,
        )  # fmt: skip
        self.vaes, self.waiting = vaes, []
        self.model = Cosmos3(self.config, self._params(load_towers(base, dtype)[0]), tokenizer)

    def warm_up(self) -> None:
        """Compile, before training is timed."""
        began = time.monotonic()
        for _ in self._clips():
            pass
        self.log({"generation_compiled_in": round(time.monotonic() - began, 1)})

    def start(self, step: int, towers: dict) -> None:
        """Generate now, and let others judge."""
        began = time.monotonic()
        self.model.params = self._params(towers)
        judged = evaluate.submit(self.pool, self._clips())
        self.waiting.append((step, time.monotonic() - began, judged))

    def _params(self, towers: dict) -> dict:
        """The whole model's, as `Cosmos3.from_pretrained` would have them."""
        towers = cast_params(towers, jnp.dtype(self.dtype), self.config.transformer)
        return {"und": towers["und"], "gen": unstack_layers(towers["gen"]), **self.vaes}

    def _clips(self) -> Iterator[evaluate.Clip]:
        sentences = [text for _, text in self.test]
        return evaluate.generate(self.model, sentences, batch=len(sentences))

    def finish(self, wait: bool = False) -> None:
        """Log what is ready, or all."""
        while self.waiting:
            step, seconds, judged = self.waiting[0]
            if not wait and self.pool is not None and not all(one.done() for one in judged):
                return
            rows = jd.score([scene for scene, _ in self.test], evaluate.collect(judged))
            found = {"merit": evaluate.merit(rows), "shares": evaluate.shares(rows)}
            self.log({"step": step, "generated_in": round(seconds, 1), **found})
            self.waiting.pop(0)
