"""Our transformer a layer at a time, and what is before and after the layers.

Axes: B batch, S text tokens, M media tokens, D model; t latent frames, h rows, w columns, C
channels, s sound latents.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jax import Array

from cosmos3_jax.checkpoint.load import Component
from cosmos3_jax.checkpoint.place import Piece
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import rope, transformer

TIMESTEPS = (967, 500, 999, 3)
INPUTS = 8  # of a case: errors in bfloat16 scatter


@dataclasses.dataclass(frozen=True)
class Case:
    """Inputs of one shape: one batch of ours, one after the other in the reference."""

    name: str  # for the report
    grid: tuple[int, int, int]  # latent frames, rows, columns
    texts: tuple[int, ...]  # lengths of the prompts, in turn; padded to the longest
    sound_frames: int  # sound latents, where the checkpoint has sound
    fps: float
    given: tuple[int, ...] = ()  # the latent frames that are known
    ids: tuple[list[int], ...] = ()  # of the prompts
    latents: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # see `transformer`
    timestep: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


# Rows or columns are odd in the first, as those of 720p, so patches are padded; both frame rates
# and both kinds of time line.
CASES = (
    Case("odd grid, prompts of 20, 13, 7 tokens, 24 fps", (2, 3, 5), (20, 13, 7), 4, 24.0),
    Case("given frame, prompts of 9 tokens, 30 fps", (3, 2, 4), (9,), 3, 30.0, (0,)),
)


def make_cases(config: TransformerConfig) -> list[Case]:
    """The cases with random inputs, without sound if the model has none."""
    random, cases = np.random.default_rng(0), []
    for case in CASES:
        frames, ids, video, sound = case.sound_frames * config.sound_gen, [], [], []
        for i in range(INPUTS):
            text = case.texts[i % len(case.texts)]
            ids.append(random.integers(0, config.vocab_size, text).tolist())
            video.append(random.standard_normal((*case.grid, config.latent_channel), np.float32))
            sound.append(random.standard_normal((frames, config.sound_dim or 1), np.float32))
        latents = {"video": np.stack(video)} | ({"sound": np.stack(sound)} if frames else {})
        timestep = np.resize(np.int32(TIMESTEPS), INPUTS)
        drawn = {"ids": tuple(ids), "latents": latents, "timestep": timestep}
        cases.append(dataclasses.replace(case, sound_frames=frames, **drawn))
    return cases


@struct.dataclass
class Stream:
    """The tokens of one case between two layers, and what stays beside them."""

    und: Array  # [B, S, D]
    text_table: rope.Rope
    gen: Array  # [B, M, D]
    condition: transformer.Condition  # its keys and values are no layer's

    def tokens(self, case: Case) -> dict[str, np.ndarray]:
        """`und`, the text tokens [*, D] of all examples without padding, and `gen` [B, M, D]."""
        und = [x[: len(ids)] for x, ids in zip(self.und, case.ids, strict=True)]
        return {
            "und": np.float32(np.concatenate(und)), "gen": np.asarray(self.gen, np.float32)
        }  # fmt: skip


class OurTransformer:
    """What is before and after the layers, as generation runs it.

    Between the two are layers of zeros, which leave the tokens as they are.

    Attributes:
        config: of these towers: two layers, and a vocabulary of the tokens that the cases have.
        params: `{"und", "gen"}` of these towers, float32.
    """

    def __init__(self, component: Component, config: TransformerConfig, cases: list[Case]):
        self.component, self.depth = component, config.num_hidden_layers
        self.vocabulary = sorted({0, *(i for case in cases for ids in case.ids for i in ids)})
        self.config = dataclasses.replace(
            config, num_hidden_layers=2, intermediate_size=1, vocab_size=len(self.vocabulary)
        )
        zeros = jax.tree.map(
            lambda x: np.zeros(x.shape, np.float32), transformer.param_shapes(self.config)
        )
        tree = self._read(lambda piece: "layer" not in piece.leaf.split("/")[1])
        rows = tree["und"]["embed"]["embedding"][self.vocabulary]
        self.params = {
            "und": zeros["und"] | {"embed": {"embedding": rows}},
            "gen": transformer.unstack_layers(zeros["gen"]) | tree["gen"],
        }

    def read_layer(self, index: int) -> dict:
        """`{"und", "gen"}`: layer `index` of both towers, float32; the text's last is shorter."""
        last = index == self.depth - 1
        tree = self._read(lambda x: x.place == (index,) or (last and "/last_layer/" in x.leaf))
        return {tower: next(iter(tree[tower].values())) for tower in tree}

    def _read(self, chosen: Callable[[Piece], bool]) -> dict:
        pieces = filter(chosen, self.component.pieces(jnp.dtype(jnp.float32)))
        leaves = {piece.leaf: self.component.read(piece) for piece in pieces}
        return traverse_util.unflatten_dict(leaves, sep="/")

    def start(self, case: Case, dtype: str) -> Stream:
        """What enters the first layer."""
        params, ids = cast(self.params, dtype), self._padded(case)[0]
        condition = self.condition(params["und"], self.config, case)
        _, seen = transformer.TextTower(self.config, jnp.dtype(dtype)).apply(
            {"params": params["und"]}, ids, capture_intermediates=_of_kind(nn.Embed)
        )
        [und] = seen["intermediates"]["embed"]["__call__"]
        tower = transformer.MediaTower(self.config, jnp.dtype(dtype), unrolled=True)
        _, seen = tower.apply(
            {"params": params["gen"]}, condition.keep_given(case.latents), case.timestep, condition,
            capture_intermediates=_of_kind(transformer.Block),
        )  # fmt: skip
        [(gen, _)] = seen["intermediates"]["layers"]["0"]["__call__"]
        table = rope.rope_table(self.config, rope.text_positions(ids.shape[1]))
        return Stream(und, table, gen, condition)

    def velocity(self, case: Case, dtype: str, stream: Stream) -> dict[str, np.ndarray]:
        """`video` [B, t, h, w, C] and, with sound, `sound` [B, s, C], that follow from a stream."""

        class AfterLayers(transformer.MediaTower):
            """Its tokens are the stream's, whatever the latents are."""

            def embed(self, name: str, x: Array, *_) -> Array:
                first = stream.gen.shape[1] - case.sound_frames  # of sound
                return stream.gen[:, :first] if name == "video" else stream.gen[:, first:]

        tower = AfterLayers(self.config, jnp.dtype(dtype), unrolled=True)
        params = {"params": cast(self.params["gen"], dtype)}
        made = tower.apply(params, case.latents, case.timestep, stream.condition)
        return {name: np.asarray(x, np.float32) for name, x in made.items()}

    def condition(self, und: dict, config: TransformerConfig, case: Case) -> transformer.Condition:
        """The condition of a case, by the text tower `und`."""
        given = np.isin(np.arange(case.grid[0]), case.given)
        return transformer.encode_condition(
            und, config, *self._padded(case), video_shape=case.grid, fps=case.fps,
            sound_frames=case.sound_frames, clean={"video": case.latents["video"]},
            given={"video": np.broadcast_to(given, (len(case.ids), len(given)))},
        )  # fmt: skip

    def _padded(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """int32 and bool [B, S]: numbers of the tokens here, and where they are real."""
        mask = np.arange(max(case.texts)) < np.array([[len(ids)] for ids in case.ids])
        numbers = np.zeros(mask.shape, np.int32)
        numbers[mask] = np.searchsorted(self.vocabulary, np.concatenate(case.ids))
        return numbers, mask


def _of_kind(kind: type[nn.Module]) -> Callable[[nn.Module, str], bool]:
    return lambda module, method: isinstance(module, kind)


def cast(tree: Mapping, dtype: str) -> dict:
    """Weights in `dtype`; the timestep embedding stays in float32."""
    return {
        name: value if name == "time_embedder"
        else cast(value, dtype) if isinstance(value, Mapping)
        else jnp.asarray(value, jnp.dtype(dtype))
        for name, value in tree.items()
    }  # fmt: skip


@partial(jax.jit, static_argnames=("config", "dtype"))
def run_layer(params: dict, stream: Stream, *, config: TransformerConfig, dtype: str) -> Stream:
    """One layer of both towers; the last of the text tower leaves its tokens as they are."""
    kind, und, condition = jnp.dtype(dtype), stream.und, stream.condition
    if "kv" in params["und"]:
        module = transformer.KeyValue(config, kind)
        text = module.apply({"params": params["und"]}, und, stream.text_table)
    else:
        module = transformer.Block(config, kind)
        und, text = module.apply({"params": params["und"]}, und, None, stream.text_table, None)
    module = transformer.Block(config, kind)
    gen, _ = module.apply(
        {"params": params["gen"]}, stream.gen, text, condition.rope, condition.text_length
    )
    return stream.replace(und=und, gen=gen)
