"""The reference's transformer in each dtype, its inputs on their way from layer to layer."""

import copy
import dataclasses
from pathlib import Path

import torch

from convert.verify import reference
from convert.verify.transformer_inputs import Case


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


def make_sides(
    checkpoint: Path, cases: list[Case], dtypes: tuple[str, ...], rounded: str, device: str
) -> dict[str, Side]:
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
                reference.run(model, arguments(side, case, i, device))
                side.streams[-1].append(model.door.came)
        sides[name] = side
    return sides


def arguments(side: Side, case: Case, index: int, device: str) -> dict:
    example = case.examples[index]
    return reference.pack(
        side.transformer.config, example.ids, example.video, example.sound,
        timestep=example.timestep, fps=case.fps, given=case.given, device=device, dtype=side.dtype,
    )  # fmt: skip


def through_layer(sides: dict[str, Side], layer: torch.nn.Module) -> None:
    """Every example through a float32 layer, and through the same layer in bfloat16 if need be."""
    for name, side in sides.items():
        if name == "bfloat16":
            layer = reference.to_bfloat16(layer)
        side.streams = [
            [(*layer(und, gen, rotary), rotary) for und, gen, rotary in examples]
            for examples in side.streams
        ]
