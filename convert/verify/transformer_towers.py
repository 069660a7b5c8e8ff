"""The whole towers as generation runs them, over the first layers of a checkpoint.

Layers are compared one by one elsewhere, each given the text of its own number. Here the order of
the layers, which text keys and values each media layer reads, and the shorter last text layer are
those of `encode_condition` and `velocity`.
"""

import dataclasses

import jax
import numpy as np

from convert.verify import our_transformer as ours
from convert.verify.compare import FLOAT32, Outcome
from convert.verify.reference_transformer import ReferenceTransformer
from convert.verify.transformer_inputs import Case
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import transformer

DEPTH = 3  # the least at which two text layers are stacked and another one ends them
LEAST = 2  # a text tower has a stack and a last layer
FORMS = {"stacked": lambda gen: gen, "unrolled": transformer.unstack_layers}


class FirstLayers:
    """Our first layers, kept as they are read, until the towers can be run."""

    def __init__(self, config: TransformerConfig, layers: int, cases: list[Case], params: dict):
        """`params` as of `read_around`; of the embeddings only the rows that are read are kept."""
        self.count = min(DEPTH, layers) if layers >= LEAST else 0
        self.cases = cases
        self.ids = sorted({0, *(i for case in cases for x in case.examples for i in x.ids)})
        self.embedding = np.asarray(params["und"]["embed"]["embedding"])[self.ids]
        self.config = dataclasses.replace(
            config, num_hidden_layers=max(self.count, LEAST), vocab_size=len(self.ids)
        )
        self.layers: list[dict] = []
        self.added = 0

    def add(self, layer: dict) -> bool:
        """Keep a layer, if it is one of the first. Returns whether all are there now."""
        self.added += 1
        if self.added <= self.count:
            self.layers.append(layer)
        return self.added == self.count

    def compare(
        self, outcome: Outcome, around: dict, exact: ReferenceTransformer, blame: bool
    ) -> None:
        """Run our towers.

        Args:
            outcome: what is found is added to it.
            around: the media tower without layers, float32.
            exact: the reference, whose streams are behind the last of these layers.
            blame: see `Outcome.check_step`.
        """
        last, heads = self.layers[-1]["und"], self.config.num_attention_heads
        if "kv" not in last:  # a whole layer in the checkpoint
            last = {
                "input_norm": last["input_norm"], "k_norm": last["attention"]["k_norm"],
                "kv": {"kernel": last["attention"]["qkv"]["kernel"][:, heads:]},
            }  # fmt: skip
        und = {
            "embed": {"embedding": self.embedding}, "last_layer": last,
            "layers": self._stack("und", self.count - 1),
        }  # fmt: skip
        gen = around | {"layers": self._stack("gen", self.count)}
        self.layers.clear()
        # A step that one layer computes wrong is named there.
        blame = blame and not outcome.mismatches
        for number, case in enumerate(self.cases):
            ids = np.searchsorted(self.ids, case.padded_ids()[0]).astype(np.int32)
            condition = ours.encode_condition(und, self.config, case, ids)
            right = [exact.velocity(case, number, i) for i in range(len(case.examples))]
            timestep = np.int32([example.timestep for example in case.examples])
            for form, arranged in FORMS.items():
                made = transformer.velocity(
                    arranged(gen), self.config, condition, case.latents(), timestep
                )
                for name, values in made.items():
                    step = (
                        f"layers.0 to {self.count - 1} as one tower, {form}: velocity, {name} "
                        "(order of the layers, or the text that each reads)"
                    )
                    pair = np.asarray(values), np.stack([x[name] for x in right])
                    outcome.check_step("transformer", step, *pair, FLOAT32["transformer"], blame)

    def _stack(self, tower: str, count: int) -> dict:
        layers = [layer[tower] for layer in self.layers[:count]]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
