"""The transformer on both sides, a layer at a time: neither model is ever whole in memory.

First every tensor is compared (see `weights`). Then the inputs of all cases go through the layers
of both sides, in each dtype, each side on what its own last layer made, so that errors add up as in
a generation. In float32 each of our layers also runs on what the reference's layer read: that finds
the layer whose computation differs. Last, the first few layers run as the whole towers that
generation runs: the order of the layers, and the text that each media layer reads.

Axes: B batch, S text tokens, M media tokens, D model.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from convert.verify import reference, weights
from convert.verify.compare import FLOAT32, RATIO, Outcome, Pool, relative_l2
from convert.verify.names import Target, transformer_target
from convert.verify.our_transformer import OurTransformer, Stream, cast, make_cases, run_layer
from convert.verify.reference_transformer import PublicTensors, ReferenceTransformer, to_numpy
from convert.verify.sides import Sides
from cosmos3_jax.checkpoint.load import Component
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import rope, transformer

Theirs = dict[str, ReferenceTransformer]  # by dtype
Streams = dict[str, list[Stream]]  # by dtype, for each case

PADDING = 9.0  # what stands behind a prompt's tokens, and is not to be read
AXES = ("time", "height", "width")
SLOT = 1e-3  # a slot of a rotary table that is further off has another frequency or axis
BAR = FLOAT32["operation"]
TOWERS = {"und": "text tower", "gen": "media tower"}
# Layers that run as whole towers: the least at which two text layers are stacked and another one
# ends them. Two are the least that a model has.
DEPTH, LEAST = 3, 2
FORMS: dict[str, Callable[[dict], dict]] = {
    "stacked": lambda gen: gen, "unrolled": transformer.unstack_layers,
}  # fmt: skip


def compare(outcome: Outcome, sides: Sides) -> None:
    """Compare the transformer; what is found is added to the outcome as soon as it is.

    Layers by themselves are always compared in float32.
    """
    component, config = sides.component("transformer"), sides.config.transformer
    folder, dtypes = sides.checkpoint / "transformer", sides.dtypes
    depth = config.num_hidden_layers
    count = sides.layers or depth
    if count < depth:
        outcome.skipped.append(f"transformer: layers {count} to {depth - 1}, by --layers {count}")
    if count < LEAST:
        outcome.skipped.append("transformer: how the towers combine their layers, which takes two")
    tensors = PublicTensors(folder, sides.rounded("transformer"))
    wrong = _compare_weights(outcome, component, config, tensors, count)
    print(f"{outcome.details['tensors']} tensors, {len(wrong)} differ", flush=True)

    cases = make_cases(config)
    outcome.details["cases"] = [case.name for case in cases]
    exact = ReferenceTransformer(folder, tensors, sides.device, cases)
    theirs = {"float32": exact} | (
        {"bfloat16": exact.in_bfloat16()} if "bfloat16" in dtypes else {}
    )
    for side in theirs.values():
        side.forget_embedding()
    ours = OurTransformer(component, config, cases)
    with outcome.naming("what enters layers.0"):
        starts = [ours.start(case, "float32") for case in cases]
    _check_start(outcome, exact, starts, rope.axis_of_slot(config), wrong)
    streams = {
        dtype: starts if dtype == "float32" else [ours.start(case, dtype) for case in cases]
        for dtype in dtypes
    }

    first: list[dict] = []
    outcome.details["layers"] = []
    for index in range(count):
        last = index == depth - 1
        layer, tree = exact.layer(index), ours.read_layer(index)
        before = [_as_ours(exact, number, start) for number, start in enumerate(starts)]
        exact.advance(layer)
        with outcome.naming(f"layers.{index}"):
            alone = [run_layer(tree, x, config=config, dtype="float32") for x in before]
        for dtype in dtypes:
            own = cast(tree, dtype)
            streams[dtype] = [run_layer(own, x, config=config, dtype=dtype) for x in streams[dtype]]
        if "bfloat16" in theirs:
            theirs["bfloat16"].advance(reference.to_bfloat16(layer))
        # A layer with other weights is not blamed for its computation.
        blame = not any(
            target.layer == index or (last and "/last_layer/" in target.leaf) for target in wrong
        )
        worst = _check_layer(outcome, index, last, theirs, alone, streams, blame)
        if index < DEPTH:
            first.append(tree)
        if len(first) == min(DEPTH, count) >= LEAST:
            _check_towers(outcome, ours, config, exact, first, not wrong)
            first.clear()
        del tree, own, layer
        print(f"layer {index}: relative L2 {worst:.1e} on the reference's inputs", flush=True)
    _check_end(outcome, ours, theirs, starts, streams, _right_around(wrong, "gen/"))
    if not outcome.mismatches:
        _add_first_drift(outcome)


def _compare_weights(
    outcome: Outcome, component: Component, config: TransformerConfig, tensors: PublicTensors,
    count: int,
) -> list[Target]:  # fmt: skip
    beyond = tuple(f"layers.{index}." for index in range(count, config.num_hidden_layers))
    names = sorted(
        (n for n in tensors.files if not n.startswith(beyond)), key=weights.natural_order
    )
    return weights.compare(
        outcome, component, ((name, tensors.read(name).numpy()) for name in names),
        lambda name, axes: transformer_target(name, config), layers=count if beyond else None,
    )  # fmt: skip


def _right_around(wrong: list[Target], prefix: str) -> bool:
    """Whether the tensors around the layers are right that our tree has there."""
    return not any(x.layer is None and x.leaf.startswith(prefix) for x in wrong)


def _as_ours(side: ReferenceTransformer, number: int, stream: Stream) -> Stream:
    """The reference's tokens and rotary tables of a case as a batch of ours, texts padded."""
    und = np.full(stream.und.shape, PADDING, np.float32)
    for row, (text, _, _) in enumerate(side.streams[number]):
        und[row, : len(text)] = to_numpy(text)
    half = stream.text_table[0].shape[-1]  # both halves of a reference table are alike
    rotary = [[to_numpy(x)[:, :half] for x in tables] for *_, tables in side.streams[number]]
    text = max(rotary, key=lambda tables: len(tables[0]))[:2]  # text counts from 0 in each
    media = tuple(jnp.stack([tables[i] for tables in rotary]) for i in (2, 3))
    return Stream(
        und=jnp.asarray(und), gen=jnp.asarray(side.tokens(number)["gen"]),
        text_table=tuple(jnp.asarray(table[None]) for table in text),
        condition=stream.condition.replace(rope=media),
    )  # fmt: skip


def _check_start(
    outcome: Outcome, exact: ReferenceTransformer, starts: list[Stream], axes: np.ndarray,
    wrong: list[Target],
) -> None:  # fmt: skip
    """Embeddings, patches, times and rotary tables."""
    for number, mine in enumerate(starts):
        right = _as_ours(exact, number, mine)
        for what, tower, prefix in (
            ("text input (embedding)", "und", "und/embed"),
            ("media input (patches, time, sums)", "gen", "gen/"),
        ):
            pair = (stream.tokens(exact.cases[number])[tower] for stream in (mine, right))
            blame = _right_around(wrong, prefix)
            outcome.check_step(f"layers.0, its {what}", *pair, BAR, blame)
        for which, one, other in zip(
            ("cos of text", "sin of text", "cos of media", "sin of media"),
            (*mine.text_table, *mine.condition.rope), (*right.text_table, *right.condition.rope),
            strict=True,
        ):  # fmt: skip
            off = [
                f"{slot} ({AXES[axis]})" for slot, axis in enumerate(axes)
                if relative_l2(one[..., slot], other[..., slot]) > SLOT
            ]  # fmt: skip
            where = f", slots off, with our axis: {', '.join(off[:8])}" if off else ""
            outcome.check_step(f"rotary_emb: {which} positions{where}", one, other, BAR)


def _check_layer(
    outcome: Outcome, index: int, last: bool, theirs: Theirs, alone: list[Stream],
    streams: Streams, blame: bool,
) -> float:  # fmt: skip
    """Our layer on what the reference's read; and, over all cases, how far the streams are apart.

    Returns the largest error of the former.
    """
    towers, worst = list(TOWERS), 0.0
    if last:  # ours ends at the keys and values of the text, which the media reads
        towers.remove("und")
    pools = {(tower, dtype): Pool() for tower in towers for dtype in streams}
    for number, case in enumerate(theirs["float32"].cases):
        right = {dtype: side.tokens(number) for dtype, side in theirs.items()}
        exact, made = right.pop("float32"), alone[number].tokens(case)
        for tower in towers:
            step = f"layers.{index}, {TOWERS[tower]}: its computation"
            error = outcome.check_step(step, made[tower], exact[tower], BAR, blame)
            worst = max(worst, error)
        for (tower, dtype), pool in pools.items():
            mine = streams[dtype][number].tokens(case)[tower]
            pool.add(mine, exact[tower], right[dtype][tower] if dtype in right else None)
    for (tower, dtype), pool in pools.items():
        errors = {"relative_l2": pool.relative_l2, "reference_error": pool.reference_error}
        entry = {"layer": index, "tower": tower, "dtype": dtype} | errors
        outcome.details["layers"].append(entry)
    return worst


def _check_towers(
    outcome: Outcome, ours: OurTransformer, config: TransformerConfig,
    exact: ReferenceTransformer, layers: list[dict], blame: bool,
) -> None:  # fmt: skip
    """The first layers, float32, as whole towers; the reference's streams are behind them."""
    count, last = len(layers), layers[-1]["und"]
    if "kv" not in last:  # a whole layer in the checkpoint
        kernel = last["attention"]["qkv"]["kernel"][:, config.num_attention_heads :]
        last = {
            "input_norm": last["input_norm"], "k_norm": last["attention"]["k_norm"],
            "kv": {"kernel": kernel},
        }  # fmt: skip
    und, gen = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *(layer[tower] for layer in some))
        for tower, some in (("und", layers[:-1]), ("gen", layers))
    )
    und = ours.params["und"] | {"layers": und, "last_layer": last}
    gen = ours.params["gen"] | {"layers": gen}
    config = dataclasses.replace(config, num_hidden_layers=count, vocab_size=ours.config.vocab_size)
    # A step that one layer computes wrong is named there.
    blame = blame and not outcome.mismatches
    for number, case in enumerate(exact.cases):
        condition, right = ours.condition(und, config, case), exact.velocity(number)
        for form, arranged in FORMS.items():
            made = transformer.velocity(
                arranged(gen), config, condition, case.latents, case.timestep
            )
            for name, values in made.items():
                step = (
                    f"layers.0 to {count - 1} as one tower, {form}: velocity, {name} "
                    "(order of the layers, or the text that each reads)"
                )
                outcome.check_step(step, values, right[name], FLOAT32["transformer"], blame)


def _check_end(
    outcome: Outcome, ours: OurTransformer, theirs: Theirs, starts: list[Stream],
    streams: Streams, blame: bool,
) -> None:  # fmt: skip
    """The velocity, for video and for sound: of the reference's tokens, and of each side's own."""
    exact, pools = theirs["float32"], {}
    for number, case in enumerate(exact.cases):
        right = {dtype: side.velocity(number) for dtype, side in theirs.items()}
        made = ours.velocity(case, "float32", _as_ours(exact, number, starts[number]))
        own = {dtype: ours.velocity(case, dtype, mine[number]) for dtype, mine in streams.items()}
        for name, values in right["float32"].items():
            step = f"velocity, {name}: final norm, projection, patches"
            outcome.check_step(step, made[name], values, BAR, blame)
            for dtype, velocity in own.items():
                low = right[dtype][name] if dtype == "bfloat16" else [None] * len(values)
                for one in zip(velocity[name], values, low, strict=True):
                    pools.setdefault((dtype, name), Pool()).add(*one)
    for dtype, name in sorted(pools, key=lambda key: list(streams).index(key[0])):
        row = pools[dtype, name].row("transformer", f"velocity, {name}", dtype)
        outcome.rows.append(row)


def _add_first_drift(outcome: Outcome) -> None:
    """Where a result is off and no step is by itself: the first layer after which it is."""
    for dtype in dict.fromkeys(row.dtype for row in outcome.rows if not row.passed):
        for entry in outcome.details["layers"]:
            low, error = entry["reference_error"], entry["relative_l2"]
            bar = FLOAT32["transformer"] if low is None else RATIO * low
            if entry["dtype"] == dtype and not error <= bar:
                step = f"layers.{entry['layer']}, {entry['tower']} tower, {dtype}: errors add up"
                outcome.add(step, relative_l2=error, bar=bar, alone=False)
                break
