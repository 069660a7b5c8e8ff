"""The transformer on both sides, a layer at a time: neither model is ever whole in memory.

First every tensor is compared (see `weights`). Then the inputs of all cases go through the layers
of both sides, in each dtype, each side on what its own last layer made, so that errors add up as in
a generation. In float32 each of our layers also runs on what the reference's layer read: that finds
the layer whose computation differs. How our towers combine their layers is compared on the first
few (see `transformer_towers`).

Axes: B batch, S text tokens, M media tokens, D model.
"""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch

from convert.verify import our_transformer as ours
from convert.verify import reference, weights
from convert.verify.compare import FLOAT32, RATIO, Mismatch, Outcome, Pool, relative_l2
from convert.verify.names import Target, transformer_target
from convert.verify.reference_transformer import PublicTensors, ReferenceTransformer
from convert.verify.transformer_inputs import Case, make_cases
from convert.verify.transformer_towers import LEAST, FirstLayers
from cosmos3_jax.checkpoint.load import Component
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import rope

PADDING = 9.0  # what stands behind a prompt's tokens, and is not to be read
AXES = ("time", "height", "width")
SLOT = 1e-3  # a slot of a rotary table that is further off has another frequency or axis


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
        dtypes: of `float32` and `bfloat16`, what to compare in. Layers by themselves are always
            compared in float32.
        layers: how many to run, of both sides, from the first; None runs all.
        rounded: see `reference`.
        device: torch's name of it.
        say: called with a line after each part.
    """
    depth = config.num_hidden_layers
    count = depth if layers is None else layers
    if count < depth:
        outcome.skipped.append(f"transformer: layers {count} to {depth - 1}, by --layers {count}")
    if count < LEAST:
        outcome.skipped.append("transformer: how the towers combine their layers, which takes two")
    folder = checkpoint / "transformer"
    tensors = PublicTensors(folder, rounded)
    wrong = _compare_weights(outcome, component, config, tensors, count)
    say(f"{outcome.details['tensors']} tensors, {len(wrong)} differ")

    cases = make_cases(config)
    outcome.details["cases"] = [case.name for case in cases]
    exact = ReferenceTransformer(folder, tensors, device)
    theirs = {"float32": exact}
    if "bfloat16" in dtypes:
        theirs["bfloat16"] = exact.in_bfloat16()
    for side in theirs.values():
        side.start(cases)
    params = ours.read_around(component)
    first_layers = FirstLayers(config, count, cases, params)
    params = {dtype: ours.cast(params, dtype) for dtype in {"float32", *dtypes}}
    with outcome.naming("transformer", "what enters layers.0"):
        starts = [ours.start(params["float32"], config, "float32", case) for case in cases]
    _check_start(outcome, config, cases, exact, starts, wrong)
    streams = {
        dtype: [ours.start(params[dtype], config, dtype, case) for case in cases]
        for dtype in dtypes
    }
    for part in params.values():  # the embeddings take gigabytes, and are not read again
        del part["und"]

    curves = outcome.details["layers"] = []
    for index in range(count):
        last = index == depth - 1
        layer, tree = exact.layer(index, tensors), ours.read_layer(component, index, last)
        before = [_as_ours(exact, c, stream) for c, stream in enumerate(starts)]
        exact.advance(layer)
        how = {"config": config, "last": last}
        with outcome.naming("transformer", f"layers.{index}"):
            after = [ours.run_layer(tree, stream, dtype="float32", **how) for stream in before]
        # A layer with other weights is not blamed for its computation.
        blame = not any(_is_of_layer(target, index, last) for target in wrong)
        worst = _check_layer(outcome, index, last, cases, exact, after, blame)
        for dtype in dtypes:
            own = ours.cast(tree, dtype)
            streams[dtype] = [ours.run_layer(own, x, dtype=dtype, **how) for x in streams[dtype]]
        if "bfloat16" in theirs:
            theirs["bfloat16"].advance(reference.to_bfloat16(layer))
        del own, layer
        if first_layers.add(tree):
            first_layers.compare(outcome, params["float32"]["gen"], exact, not wrong)
        del tree
        curves += _curves(index, last, cases, theirs, streams)
        say(f"layer {index}: relative L2 {worst:.1e} on the reference's inputs")
    _check_end(outcome, config, params["float32"], cases, exact, starts, wrong)
    outcome.rows += _velocity_rows(cases, config, theirs, streams, params)
    if not outcome.mismatches:
        outcome.mismatches += _first_drift(outcome, curves)


def _compare_weights(
    outcome: Outcome,
    component: Component,
    config: TransformerConfig,
    tensors: PublicTensors,
    count: int,
) -> list[Target]:
    names = sorted(tensors.names(count), key=weights.natural_order)
    read = ((name, x.numpy()) for n in names for name, x in tensors.read(n.__eq__))
    layers = None if count == config.num_hidden_layers else count
    return weights.compare(
        outcome, "transformer", component, read,
        lambda name, axes: transformer_target(name, config), layers=layers,
    )  # fmt: skip


def _is_of_layer(target: Target, index: int, last: bool) -> bool:
    return target.layer == index or (last and "/last_layer/" in target.leaf)


def _as_ours(side: ReferenceTransformer, number: int, stream: ours.Stream) -> ours.Stream:
    """The reference's tokens and rotary tables of a case as a batch of ours, texts padded."""
    und = np.full(stream.und.shape, PADDING, np.float32)
    for row, (text, _, _) in enumerate(side.streams[number]):
        und[row, : len(text)] = _numpy(text)
    gen = np.stack([_numpy(media) for _, media, _ in side.streams[number]])
    half = stream.text_table[0].shape[-1]  # both halves of a reference table are alike
    rotary = [[_numpy(x)[:, :half] for x in tables] for _, _, tables in side.streams[number]]
    text = max(rotary, key=lambda tables: len(tables[0]))[:2]  # text counts from 0 in each
    media = tuple(jnp.stack([tables[i] for tables in rotary]) for i in (2, 3))
    return stream.replace(
        und=jnp.asarray(und), gen=jnp.asarray(gen),
        text_table=tuple(jnp.asarray(table[None]) for table in text),
        condition=stream.condition.replace(rope=media),
    )  # fmt: skip


def _real_text(und, case: Case) -> np.ndarray:
    """The tokens of all texts [*, D], without padding."""
    return np.concatenate([x[: len(e.ids)] for x, e in zip(und, case.examples, strict=True)])


def _check_start(outcome, config, cases, exact, starts, wrong: list[Target]) -> None:
    """Embeddings, patches, times and rotary tables."""
    bar = FLOAT32["operation"]
    right_und = not any(target.leaf.startswith("und/embed") for target in wrong)
    right_gen = not any(target.layer is None and target.leaf.startswith("gen/") for target in wrong)
    axes = rope.axis_of_slot(config)
    for number, (case, ours_in) in enumerate(zip(cases, starts, strict=True)):
        theirs_in = _as_ours(exact, number, ours_in)
        for what, text, mine, right, blame in (
            ("text input (embedding)", True, ours_in.und, theirs_in.und, right_und),
            ("media input (patches, time, sums)", False, ours_in.gen, theirs_in.gen, right_gen),
        ):
            pair = [_real_text(x, case) if text else np.asarray(x) for x in (mine, right)]
            outcome.check_step("transformer", f"layers.0, its {what}", *pair, bar, blame)
        for which, mine, right in zip(
            ("cos of text", "sin of text", "cos of media", "sin of media"),
            (*ours_in.text_table, *ours_in.condition.rope),
            (*theirs_in.text_table, *theirs_in.condition.rope), strict=True,
        ):  # fmt: skip
            off = [
                f"{j} ({AXES[axis]})" for j, axis in enumerate(axes)
                if relative_l2(mine[..., j], right[..., j]) > SLOT
            ]  # fmt: skip
            where = f", slots off, with our axis: {', '.join(off[:8])}" if off else ""
            step = f"rotary_emb: {which} positions{where}"
            outcome.check_step("transformer", step, mine, right, bar)


def _check_layer(outcome, index, last, cases, exact, after, blame: bool) -> float:
    """Our layer on what the reference's read. Returns the largest error."""
    worst, bar = 0.0, FLOAT32["operation"]
    for number, (case, made) in enumerate(zip(cases, after, strict=True)):
        right = _as_ours(exact, number, made)
        pairs = {"media tower": (np.asarray(made.gen), np.asarray(right.gen))}
        if not last:  # ours ends at the keys and values of the text, which the media reads
            text = (_real_text(made.und, case), _real_text(right.und, case))
            pairs = {"text tower": text} | pairs
        for tower, pair in pairs.items():
            step = f"layers.{index}, {tower}: its computation"
            worst = max(worst, outcome.check_step("transformer", step, *pair, bar, blame))
    return worst


def _check_end(outcome, config, params, cases, exact, starts, wrong: list[Target]) -> None:
    """Final norm, projections and patches, on what leaves the reference's last layer."""
    blame = not any(target.layer is None and target.leaf.startswith("gen/") for target in wrong)
    for number, (case, stream) in enumerate(zip(cases, starts, strict=True)):
        stream = _as_ours(exact, number, stream)
        made = ours.velocity(params, config, "float32", case, stream)
        for name, values in made.items():
            right = [exact.velocity(case, number, i)[name] for i in range(len(case.examples))]
            step = f"velocity, {name}: final norm, projection, patches"
            pair = (np.asarray(values), np.stack(right))
            outcome.check_step("transformer", step, *pair, FLOAT32["operation"], blame)


def _curves(index: int, last: bool, cases, theirs, streams) -> list[dict]:
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
                    exact = _numpy(theirs["float32"].streams[c][i][at])
                    low = _numpy(theirs[dtype].streams[c][i][at]) if dtype == "bfloat16" else None
                    pool.add(np.asarray(getattr(mine[c], tower)[i][:real]), exact, low)
            found.append(
                {
                    "layer": index, "tower": tower, "dtype": dtype,
                    "relative_l2": pool.relative_l2, "reference_error": pool.reference_error,
                }
            )  # fmt: skip
    return found


def _velocity_rows(cases, config, theirs, streams, params) -> list:
    """The velocity of all cases, for video and for sound."""
    rows = []
    for dtype, mine in streams.items():
        pools = {name: Pool() for name in ("video", "sound")[: 2 if config.sound_gen else 1]}
        for c, (case, stream) in enumerate(zip(cases, mine, strict=True)):
            made = ours.velocity(params[dtype], config, dtype, case, stream)
            for i in range(len(case.examples)):
                exact = theirs["float32"].velocity(case, c, i)
                low = theirs["bfloat16"].velocity(case, c, i) if dtype == "bfloat16" else {}
                for name, pool in pools.items():
                    pool.add(np.asarray(made[name][i], np.float32), exact[name], low.get(name))
        rows += [pool.row("transformer", f"velocity, {n}", dtype) for n, pool in pools.items()]
    return rows


def _first_drift(outcome: Outcome, curves: list[dict]) -> list[Mismatch]:
    """Where a result is off and no step is by itself: the first layer after which it is."""
    found = []
    for dtype in dict.fromkeys(row.dtype for row in outcome.rows if not row.passed):
        for entry in curves:
            exact, error = entry["reference_error"], entry["relative_l2"]
            bar = FLOAT32["transformer"] if exact is None else RATIO * exact
            if entry["dtype"] == dtype and not error <= bar:
                step = f"layers.{entry['layer']}, {entry['tower']} tower, {dtype}: errors add up"
                found.append(Mismatch("transformer", step, (), "", error, bar, alone=False))
                break
    return found


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
