"""The whole towers as generation runs them, over the first layers of the checkpoint.

The layers are compared one by one elsewhere, each given the text's keys and values of its own
number. Here `encode_condition` and `velocity` run as they are: the order of the layers, which text
keys and values each media layer reads, and the shorter last text layer are theirs.

Axes: B batch, S text tokens, L layers, K key/value heads, H head dimension.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from convert.verify import reference
from convert.verify.compare import FLOAT32, Place, relative_l2
from convert.verify.transformer_inputs import Case, alone, watched
from convert.verify.transformer_theirs import Side, arguments
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import transformer

DEPTH = 3  # the least at which two text layers are stacked and another one ends them
LEAST = 2  # a text tower has a stack and a last layer
FORMS = {"stacked": lambda gen: gen, "unrolled": transformer.unstack_layers}


class FirstLayers:
    """Our first layers, kept as they go by, and what the reference made of the same inputs.

    Attributes:
        count: how many layers, 0 if they are too few.
        errors: `(result, relative L2)`.
        places: what is off.
    """

    def __init__(self, config: TransformerConfig, layers: int, cases: list[Case], params: dict):
        """`params` as in `Parameters.rest`; of the embeddings, the rows that are read are kept."""
        self.count = min(DEPTH, layers) if layers >= LEAST else 0
        self.cases = [alone(case) for case in cases]
        self.number = [watched(case) for case in cases]
        ids = {0, *(token for case in self.cases for token in case.examples[0].ids)}
        self.row = {token: i for i, token in enumerate(sorted(ids))}
        self.embedding = np.asarray(params["und"]["embed"]["embedding"])[sorted(ids)]
        self.config = dataclasses.replace(
            config, num_hidden_layers=max(self.count, LEAST), vocab_size=len(ids)
        )
        self.trees: list[dict] = []
        self.texts: list[list[tuple[np.ndarray, np.ndarray]]] = []
        self.errors: list[tuple[str, float]] = []
        self.places: list[Place] = []

    def add(self, tree: dict, texts: list[tuple[np.ndarray, np.ndarray]]) -> bool:
        """Keep a layer, and the reference's text keys and values there, by case.

        Returns whether all are there now.
        """
        if len(self.texts) < self.count:  # not the trees, which `compare` lets go
            self.trees.append(tree)
            self.texts.append(texts)
            return len(self.trees) == self.count
        return False

    def compare(self, rest: dict, side: Side, device: str) -> None:
        """Run ours; the side's streams are those behind the last of these layers."""
        condition_of = self._conditions()
        gen = rest | {"layers": self._stack("gen", self.count)}
        self.trees.clear()
        for form, change in FORMS.items():
            params = change(gen)
            for at, case in enumerate(self.cases):
                self._compare_velocity(params, side, at, case, condition_of[at], form, device)

    def _conditions(self) -> list[transformer.Condition]:
        last, heads = self.trees[-1]["und"], self.config.num_attention_heads
        if "kv" not in last:  # a whole layer in the checkpoint
            kernel = last["attention"]["qkv"]["kernel"][:, heads:]
            last = {
                "input_norm": last["input_norm"], "kv": {"kernel": kernel},
                "k_norm": last["attention"]["k_norm"],
            }  # fmt: skip
        und = {
            "embed": {"embedding": self.embedding},
            "layers": self._stack("und", self.count - 1),
            "last_layer": last,
        }
        conditions = []
        for at, case in enumerate(self.cases):
            ids, mask = case.padded_ids()
            ids = np.vectorize(self.row.get, otypes=[np.int32])(ids)
            condition = transformer.encode_condition(
                und, self.config, ids, mask, video_shape=case.grid, fps=case.fps,
                sound_frames=case.sound_frames, clean_latents=case.examples[0].video[None],
                frame_mask=case.frame_mask,
            )  # fmt: skip
            self._compare_text(condition, at, case)
            conditions.append(condition)
        return conditions

    def _compare_text(self, condition, at: int, case: Case) -> None:
        for layer, texts in enumerate(self.texts):
            for which, stack, exact in zip(
                ("keys", "values"), (condition.key, condition.value), texts[at], strict=True
            ):
                made = stack[layer][:, : exact.shape[1]]
                self._settle(f"text {which} of layer {layer}", made, exact, case)

    def _compare_velocity(self, params, side, at, case, condition, form, device) -> None:
        number, example = self.number[at], case.examples[0]
        und, gen, _ = side.streams[at][number]
        side.transformer.door.goes = (und, gen)
        exact = reference.run(side.transformer, arguments(side, case, 0, device))
        sound = example.sound[None] if case.sound_frames else None
        latents = transformer.Latents(jnp.asarray(example.video[None]), sound)
        made = transformer.velocity(
            params, self.config, condition, latents, np.int32([example.timestep])
        )
        for name, values in exact.items():
            self._settle(f"velocity, {name}, {form}", getattr(made, name)[0], values, case)

    def _settle(self, what: str, made, exact, case: Case) -> None:
        error, bar = relative_l2(made, exact), FLOAT32["transformer"]
        name = f"layers.0 to {self.count - 1} as one tower: {what}"
        self.errors.append((name, error))
        if not error <= bar and all(place.operation != name for place in self.places):
            hint = "the order of layers, or which text keys and values a media layer reads"
            self.places.append(
                Place("transformer", name, (), "", error, bar, f"{hint}; with: {case.name}", False)
            )

    def _stack(self, tower: str, count: int) -> dict:
        trees = [tree[tower] for tree in self.trees[:count]]
        return jax.tree.map(lambda *layers: np.stack(layers), *trees)
