"""The transformer on both sides, a layer at a time: neither model is ever whole in memory.

Every layer is read once. The inputs of all cases go through the reference's and through ours, in
each dtype, each side on what its own last layer made, so that errors add up as they do in a
generation; and one input of each case goes through operation by operation, on what the reference's
read (see `witness`), which finds where an error comes from. How our towers put layers together is
compared on the first few (see `transformer_tower`).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from convert.verify import reference
from convert.verify import transformer_ours as ours
from convert.verify.compare import FLOAT32, RATIO, Outcome, Place, Pool
from convert.verify.transformer_around import Around, compare_embeddings
from convert.verify.transformer_inputs import Case, make_cases, watched
from convert.verify.transformer_layer import watch_layer
from convert.verify.transformer_theirs import arguments, make_sides, through_layer
from convert.verify.transformer_tower import LEAST, FirstLayers
from convert.verify.witness import Found, merge
from cosmos3_jax.checkpoint.load import Component
from cosmos3_jax.config import TransformerConfig


def compare(
    outcome: Outcome,
    checkpoint: Path,
    component: Component,
    config: TransformerConfig,
    dtypes: tuple[str, ...],
    *,
    layers: int | None,
    rounded: str,
    device: str,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Compare the transformer of a public checkpoint with ours.

    Args:
        outcome: what is found is added to it, as soon as it is.
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
    cases = make_cases(config)
    weights = ours.Parameters(component)
    if count < config.num_hidden_layers:
        outcome.skipped.append(
            f"transformer: layers {count} to {config.num_hidden_layers - 1}, by --layers {count}"
        )
    if count < LEAST:
        outcome.skipped.append(
            "transformer: how the towers put their layers together, which takes two"
        )
    rest = weights.rest()
    sides = make_sides(checkpoint, cases, dtypes, rounded, device)
    params = {dtype: ours.cast(rest, dtype) for dtype in {"float32", *dtypes}}
    del rest
    exact, operations = sides["float32"], []
    arounds = [
        Around(exact, config, i, case, params["float32"], device) for i, case in enumerate(cases)
    ]
    tower = FirstLayers(config, count, cases, params["float32"])
    embeddings = compare_embeddings(params["float32"], exact)
    with _gathering(outcome, operations, cases) as found:
        for around, one in zip(arounds, found, strict=True):
            around.watch_before(embeddings, one)
    streams = {
        dtype: [ours.run_before(params[dtype], config, dtype, case) for case in cases]
        for dtype in dtypes
    }
    for part in params.values():  # gigabytes at full width, not read again
        del part["und"]
    for side in sides.values():
        side.transformer.forget_text()

    curves = []
    for index in range(count):
        last = index == config.num_hidden_layers - 1
        layer, tree = exact.transformer.layer(index), weights.layer(index, last)
        with _gathering(outcome, operations, cases) as found:
            texts = [
                watch_layer(
                    index, layer, *exact.streams[c][watched(case)], tree, config, last,
                    max(case.texts), found[c],
                )
                for c, case in enumerate(cases)
            ]  # fmt: skip
        for name in dtypes:
            own = ours.cast(tree, name)
            streams[name] = [
                ours.run_layer(own, stream, config=config, dtype=name, last=last)
                for stream in streams[name]
            ]
            del own
        complete = tower.add(tree, texts)
        del tree
        through_layer(sides, layer)
        if complete:
            tower.compare(params["float32"]["gen"], exact, device)
        curves += _curves(index, cases, sides, streams, last)
        worst = max(error for one in found for _, error in one.operations)
        off = "".join(f"; {place}" for place in merge(_by_case(cases, found)))
        say(f"layer {index}: worst operation {worst:.1e}{off}")
    with _gathering(outcome, operations, cases) as found:
        for around, one in zip(arounds, found, strict=True):
            around.watch_after(one)
    outcome.rows += _velocity_rows(cases, sides, streams, params, config, device)
    names = [case.name for case in cases]
    outcome.details = {
        "cases": names, "layers": curves, "operations": operations, "towers": tower.errors
    }  # fmt: skip
    if not outcome.places:  # both add up what is off before
        outcome.places += tower.places or _drift(outcome, curves)


def _by_case(cases: list[Case], found: list[Found]) -> dict[str, Found]:
    return {case.name: one for case, one in zip(cases, found, strict=True)}


@contextlib.contextmanager
def _gathering(outcome: Outcome, operations: list, cases: list[Case]) -> Iterator[list[Found]]:
    """One `Found` a case; what is in them comes into the outcome, whatever happens meanwhile."""
    found = [Found() for _ in cases]
    try:
        yield found
    finally:
        outcome.places += merge(_by_case(cases, found))
        for one in found:
            operations += one.operations


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
                    reference.run(side.transformer, arguments(side, case, i, device))
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


def _drift(outcome: Outcome, curves: list[dict]) -> list[Place]:
    """Where a result is off and no operation is by itself: the first layer after which it is."""
    places = []
    for dtype in dict.fromkeys(row.dtype for row in outcome.rows if not row.passed):
        for entry in curves:
            exact = entry["reference_error"]
            bar = FLOAT32["transformer"] if exact is None else RATIO * exact
            if entry["dtype"] == dtype and not entry["relative_l2"] <= bar:
                name = f"layers.{entry['layer']}, {entry['tower']} tower, {dtype}: errors add up"
                error = entry["relative_l2"]
                places.append(Place("transformer", name, (), "", error, bar, alone=False))
                break
    return places


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.float().cpu().numpy()
