"""The transformer on both sides, a layer at a time: neither model is ever whole in memory.

Every layer is read once. The inputs of all cases go through the reference's and through ours, in
each dtype, each side on what its own last layer made, so that errors add up as they do in a
generation; and one input goes through operation by operation, on what the reference's read (see
`witness`), which finds where an error comes from.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch

from convert.verify import reference
from convert.verify import transformer_ours as ours
from convert.verify.compare import FLOAT32, Outcome, Place, Pool
from convert.verify.transformer_inputs import FEW, POOLED, Case, make_cases, one
from convert.verify.transformer_layer import compare_tables, one_example, watch_layer
from convert.verify.witness import Operation, Recording, Witness
from cosmos3_jax.checkpoint.load import Component
from cosmos3_jax.config import TransformerConfig

BEFORE = {  # our modules before the layers, and after
    "embed": Operation(("embed_tokens",)),
    "proj_in": Operation(("proj_in",), "patch order"),
    "sound_proj_in": Operation(("audio_proj_in",)),
    "time_embedder/linear_1": Operation(("time_embedder.linear_1",), "timestep"),
    "time_embedder/linear_2": Operation(("time_embedder.linear_2",), "silu"),
}
AFTER = {
    "norm": Operation(("norm_moe_gen",)),
    "proj_out": Operation(("proj_out",)),
    "sound_proj_out": Operation(("audio_proj_out",)),
}


@dataclasses.dataclass
class Side:
    """The reference in one dtype: its model without layers, and the examples on their way.

    Attributes:
        transformer: see `reference.Transformer`.
        dtype: of it.
        streams: by case and example, `(und, gen, rotary)`.
    """

    transformer: reference.Transformer
    dtype: torch.dtype
    streams: list[list[tuple]]


def compare(
    checkpoint: Path,
    component: Component,
    config: TransformerConfig,
    dtypes: tuple[str, ...],
    *,
    layers: int | None,
    rounded: bool,
    device: str,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Compare the transformer of a public checkpoint with ours.

    Args:
        checkpoint: the public one.
        component: our transformer, opened.
        config: its configuration.
        dtypes: of `float32` and `bfloat16`, what to compare in. Operations are always in float32.
        layers: how many to run, of both sides, from the first; None runs all.
        rounded: see `reference`.
        device: torch's name of it.
        say: called with a line after each layer.
    """
    count = config.num_hidden_layers if layers is None else layers
    cases = make_cases(config, POOLED if "bfloat16" in dtypes else FEW)
    weights = ours.Parameters(component)
    outcome = Outcome()
    if count < config.num_hidden_layers:
        outcome.skipped.append(
            f"transformer: layers {count} to {config.num_hidden_layers - 1}, by --layers {count}"
        )
    rest = weights.rest()
    sides = _reference_sides(checkpoint, cases, dtypes, rounded, device)
    params = {dtype: ours.cast(rest, dtype) for dtype in {"float32", *dtypes}}
    del rest
    streams = {
        dtype: [ours.run_before(params[dtype], config, dtype, case) for case in cases]
        for dtype in dtypes
    }
    around = _Around(sides["float32"], config, one(cases[0]), params["float32"], device)
    around.watch_before(outcome)
    for part in params.values():  # gigabytes at full width, not read again
        del part["und"]
    for side in sides.values():
        side.transformer.forget_text()

    curves, operations = [], around.witness.operations
    for index in range(count):
        last = index == config.num_hidden_layers - 1
        layer, tree = sides["float32"].transformer.layer(index), weights.layer(index, last)
        example = sides["float32"].streams[0][0]
        places, found = watch_layer(index, layer, *example, tree, config, last)
        outcome.places += places
        operations += found
        for name in dtypes:
            streams[name] = [
                ours.run_layer(ours.cast(tree, name), stream, config=config, dtype=name, last=last)
                for stream in streams[name]
            ]
        del tree
        _reference_through(sides, layer)
        curves += _curves(index, cases, sides, streams, last)
        worst = max(error for _, error in found)
        say(f"layer {index}: worst operation {worst:.1e}" + "".join(f"; {p}" for p in places))
    around.watch_after(outcome)
    outcome.rows += _velocity_rows(cases, sides, streams, params, config, device)
    outcome.details = {"layers": curves, "operations": operations}
    if not outcome.places:
        outcome.places += _drift(outcome, curves)
    return outcome


def _reference_sides(checkpoint, cases, dtypes, rounded, device) -> dict[str, Side]:
    """The reference in float32 and, if asked for, in bfloat16, up to the first layer."""
    sides = {}
    model = reference.Transformer(checkpoint, rounded, device)
    for name in ("float32", "bfloat16"):
        if name == "bfloat16" and name not in dtypes:
            continue
        if name == "bfloat16":
            model = copy.copy(model)
            model.model = reference.to_bfloat16(copy.deepcopy(model.model))
            model.door = model.model.layers[0]
        side = Side(model, getattr(torch, name), [])
        for case in cases:
            side.streams.append([])
            for i in range(len(case.examples)):
                reference.run(model, _arguments(side, case, i, device))
                side.streams[-1].append(model.door.came)
        sides[name] = side
    return sides


def _arguments(side: Side, case: Case, index: int, device: str) -> dict:
    example = case.examples[index]
    return reference.pack(
        side.transformer.config, example.ids, example.video, example.sound,
        timestep=example.timestep, fps=case.fps, given=case.given, device=device, dtype=side.dtype,
    )  # fmt: skip


def _reference_through(sides: dict[str, Side], layer: torch.nn.Module) -> None:
    """Every example through a float32 layer, and through the same layer in bfloat16."""
    for name, side in sides.items():
        if name == "bfloat16":
            layer = reference.to_bfloat16(layer)
        side.streams = [
            [(*layer(und, gen, rotary), rotary) for und, gen, rotary in examples]
            for examples in side.streams
        ]


def _curves(index, cases, sides, streams, last) -> list[dict]:
    """How far the streams are apart after a layer, over all cases, by tower and dtype."""
    found = []
    for tower, at in (("und", 0), ("gen", 1)):
        if last and tower == "und":
            continue  # ours ends at keys and values there
        for dtype, mine in streams.items():
            pool = Pool()
            for c, case in enumerate(cases):
                for i, example in enumerate(case.examples):
                    real = len(example.ids) if tower == "und" else None
                    exact = _numpy(sides["float32"].streams[c][i][at])
                    low = _numpy(sides[dtype].streams[c][i][at]) if dtype == "bfloat16" else None
                    pool.add(np.asarray(getattr(mine[c], tower)[i][:real]), exact, low)
            found.append(
                {
                    "layer": index, "tower": tower, "dtype": dtype,
                    "relative_l2": pool.relative_l2, "reference_error": pool.reference_error,
                }
            )  # fmt: skip
    return found


def _velocity_rows(cases, sides, streams, params, config, device) -> list:
    """The velocity of all cases, for video and for sound."""
    theirs: dict[str, list] = {}
    for name, side in sides.items():
        theirs[name] = []
        for case, examples in zip(cases, side.streams, strict=True):
            for i, (und, gen, _) in enumerate(examples):
                side.transformer.door.goes = (und, gen)
                theirs[name].append(
                    reference.run(side.transformer, _arguments(side, case, i, device))
                )
    rows = []
    for dtype, mine in streams.items():
        pools = {"video": Pool()} | ({"sound": Pool()} if config.sound_gen else {})
        at = 0
        for case, stream in zip(cases, mine, strict=True):
            made = ours.run_after(params[dtype], config, dtype, case, stream, stream.gen)
            for i in range(len(case.examples)):
                for name, pool in pools.items():
                    low = theirs[dtype][at][name] if dtype == "bfloat16" else None
                    found = np.asarray(made[name][i], np.float32)
                    pool.add(found, theirs["float32"][at][name], low)
                at += 1
        rows += [
            pool.row("transformer", f"velocity, {name}", dtype) for name, pool in pools.items()
        ]
    return rows


class _Around:
    """One example through what is before and after the layers, operation by operation."""

    def __init__(self, side: Side, config, case: Case, params: dict, device: str):
        self.side, self.config, self.case, self.params = side, config, case, params
        self.device, self.recording = device, Recording()
        self.witness = Witness(
            "transformer",
            BEFORE.get,
            self.recording,
            leaf=lambda path: ("und/" if path == "embed" else "gen/") + path,
            tensors=lambda module: (
                (f"{module}.weight",)
                + (() if module.startswith(("embed", "norm")) else (f"{module}.bias",))
            ),
        )

    def watch_before(self, outcome: Outcome) -> None:
        """Embedding, patches, time, and the rotary tables."""
        self._record()
        with self.witness.watching():
            self.stream = ours.run_before(self.params, self.config, "float32", self.case)
        und, gen, rotary = self.side.transformer.door.came
        self.witness.compare("layers.0, its text input", self.stream.und[0], _numpy(und))
        because = "time on noisy frames, audio_modality_embed"
        self.witness.compare(
            f"layers.0, its media input ({because})", self.stream.gen[0], _numpy(gen)
        )
        compare_tables(self.witness, self.stream, rotary, self.config)
        outcome.places += self.witness.places

    def watch_after(self, outcome: Outcome) -> None:
        """Final norm, projections, patches."""
        self.witness.places = []
        und, gen, _ = self.side.streams[0][0]
        self.side.transformer.door.goes = (und, gen)
        exact = self._record()
        out = jnp.asarray(_numpy(gen))[None]
        self.witness.find = AFTER.get
        with self.witness.watching():
            made = ours.run_after(self.params, self.config, "float32", self.case, self.stream, out)
        for name, x in made.items():
            self.witness.compare(f"velocity, {name} (patch order)", x[0], exact[name])
        outcome.places += self.witness.places

    def _record(self) -> dict[str, np.ndarray]:
        """Run the reference; what its modules read and made is in the recording."""
        self.recording.read.clear()
        self.recording.made.clear()
        names = {operation.modules[0] for operation in (BEFORE | AFTER).values()}
        model = self.side.transformer.model
        modules = {name: module for name, module in model.named_modules() if name in names}
        with self.recording.of(modules, _arrange):
            arguments = _arguments(self.side, self.case, 0, self.device)
            return reference.run(self.side.transformer, arguments)


def _arrange(name: str, module, x: torch.Tensor, made: bool) -> torch.Tensor:
    """Tokens of one example; of the timestep embedding, which all tokens share, one row."""
    return x[:1] if name.startswith("time_embedder") else one_example(name, module, x, made)


def _drift(outcome: Outcome, curves: list[dict]) -> list[Place]:
    """Where a result is off and no operation is by itself: the first layer after which it is."""
    places = []
    for dtype in {row.dtype for row in outcome.rows if not row.passed}:
        for entry in curves:
            exact = entry["reference_error"]
            bar = FLOAT32["transformer"] if exact is None else 1.2 * exact
            if entry["dtype"] == dtype and not entry["relative_l2"] <= bar:
                name = f"layers.{entry['layer']}, {entry['tower']} tower, {dtype}: errors add up"
                places.append(Place("transformer", name, (), "", entry["relative_l2"], bar))
                break
    return places


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.float().cpu().numpy()
