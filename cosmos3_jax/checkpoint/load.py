"""From a checkpoint folder to a configuration and a parameter tree, without torch.

Two layouts are read, component by component: the public one (diffusers' names and shapes) and the
converted one that `convert` writes (our names and shapes, ready to use). Their rules differ, the
reading does not. Tensors are read ahead by a few threads, and each is written into its place on the
device as it comes (`place.py`): neither host nor device ever holds a second copy of a leaf.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from cosmos3_jax import guard
from cosmos3_jax.checkpoint.files import (
    CONVERTED_STEM,
    FLOAT_DTYPES,
    PUBLIC_STEM,
    TensorFiles,
    has_tensors,
)
from cosmos3_jax.checkpoint.finite import is_finite
from cosmos3_jax.checkpoint.layouts import layouts
from cosmos3_jax.checkpoint.place import Piece, compile_placing, place_pieces
from cosmos3_jax.checkpoint.rules import (
    CheckpointError,
    Layout,
    Rule,
    check,
    is_stacked,
    layer_path,
    raise_problems,
)
from cosmos3_jax.config import (
    Config,
    ConfigError,
    Recipes,
    SchedulerConfig,
    SoundVAEConfig,
    TransformerConfig,
    VideoVAEConfig,
    read_json,
)
from cosmos3_jax.parallel import sharding
from cosmos3_jax.recipes import MODELS

RECIPE_FILE = "cosmos3_recipe.json"
TOKENIZER_FOLDER = "text_tokenizer"
# Where the tree of each component hangs in the whole one.
PREFIXES = {"transformer": "", "vae": "video_vae", "sound_tokenizer": "sound_vae"}


@dataclasses.dataclass(frozen=True)
class Component:
    """One component folder, opened and checked against the model.

    Attributes:
        name: the folder's name in a checkpoint.
        files: its tensors.
        layout: how they are stored.
        leaves: path -> shape of our tree, and `prefix` where that tree hangs in the whole one.
        addition: (path, layer or None) -> what is added to a leaf, or to its layer, as it is read,
            or None; see `lora.merge_on_read`.
    """

    name: str
    files: TensorFiles
    layout: Layout
    leaves: dict[str, tuple[int, ...]]
    prefix: str
    addition: Callable[[str, int | None], np.ndarray | None] | None = None

    def path(self, leaf: str) -> str:
        """The path of a leaf in the whole tree."""
        return f"{self.prefix}/{leaf}" if self.prefix else leaf

    def pieces(
        self, dtype: jnp.dtype, parts: Collection[str] | None = None, unstacked: bool = False
    ) -> list[Piece]:
        """Every leaf of these top-level parts of the tree, or of all; stacked ones layer by layer.

        Their dtype is `dtype` but for those that stay in float32. With `unstacked`, each layer of
        the media tower is a leaf.
        """
        rules: dict[str, list[Rule]] = {leaf: [] for leaf in self.leaves}
        for rule in self.layout.rules:
            rules[rule.leaf].append(rule)
        pieces = []
        for ours in converted_layout(self.layout, self.leaves).rules:
            if parts is not None and self.path(ours.leaf).partition("/")[0] not in parts:
                continue
            depth = len(ours.index)
            shape = self.leaves[ours.leaf][depth:]
            kept = np.dtype(np.float32 if ours.leaf.startswith(self.layout.float32) else dtype)
            filling = tuple(
                (rule, rule.index[depth:])
                for rule in rules[ours.leaf]
                if rule.index[:depth] == ours.index
            )
            leaf, place = ours.leaf, ours.index
            if unstacked and place and leaf.startswith("gen/"):
                leaf, place = layer_path(leaf, *place), ()
            pieces.append(Piece(ours.key, leaf, place, shape, kept, filling))
        return pieces

    def place(self, pieces: list[Piece], mesh: Mesh | None) -> Iterator[tuple[str, jax.Array]]:
        """The path of each leaf in the whole tree, and the leaf on the devices of a mesh."""
        where = partial(_sharding, self, mesh)
        for leaf, values in place_pieces(self.read, pieces, self.leaves, where):
            yield self.path(leaf), values

    def read(self, piece: Piece, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The values of a piece, or of a part of it with a start and a stop on each axis. Weight
        norm is folded, and what is to be added is, before they are rounded to its dtype.

        Raises CheckpointError on values that are not finite, as they are stored or after this.
        """
        with np.errstate(all="ignore"):  # what becomes infinite or NaN is refused
            added = None if self.addition is None else self.addition(*layer_of(piece))
            if added is None:
                values = self._stored(piece, index)
            else:
                wide = dataclasses.replace(piece, dtype=np.dtype(np.float32))
                added = added if index is None else added[index]
                values = (self._stored(wide, index) + added).astype(piece.dtype)
        if (added is not None or self._may_overflow(piece)) and not is_finite(values):
            keys = ", ".join(key for rule, _ in piece.parts for key in rule.keys)
            lora = "" if added is None else " with the LoRA merged"
            way_out = "download the checkpoint again" if added is None else "give a smaller factor"
            raise CheckpointError(
                f"{self.files.folder}: {keys}{lora} is not finite in {piece.dtype.name}: "
                f"{way_out}, or, if the numbers are that large, use float32"
            )
        return values

    def _may_overflow(self, piece: Piece) -> bool:
        """Whether finite tensors may fill a piece with numbers that are not."""
        largest = jnp.finfo(piece.dtype).max
        return any(
            rule.weight_norm or jnp.finfo(FLOAT_DTYPES[self.files.dtypes[key]]).max > largest
            for rule, _ in piece.parts
            for key in rule.keys
        )

    def _stored(self, piece: Piece, index: tuple[slice, ...] | None) -> np.ndarray:
        if index is not None and piece.shape != tuple(x.stop - x.start for x in index):
            return self._read_part(piece, index)
        if [index for _, index in piece.parts] == [()]:  # one tensor is all of it: no copy if alike
            [(rule, _)] = piece.parts
            values = rule.to_leaf(*(self.files.read(key) for key in rule.keys))
            return np.asarray(values, piece.dtype, order="C")
        values = np.empty(piece.shape, piece.dtype)
        for rule, index in piece.parts:
            values[index] = rule.to_leaf(*(self.files.read(key) for key in rule.keys))
        return values

    def _read_part(self, piece: Piece, index: tuple[slice, ...]) -> np.ndarray:
        axes = range(len(index))
        cut = [i for i in axes if index[i].stop - index[i].start != piece.shape[i]]
        parts = [(rule, (*at, *[slice(None)] * (len(index) - len(at)))) for rule, at in piece.parts]
        # Tensors share a piece along axes that they have all of: q, k and v the input.
        if any(rule.weight_norm or at[i] != slice(None) for rule, at in parts for i in cut):
            return self._stored(piece, None)[index]
        values = np.empty([part.stop - part.start for part in index], piece.dtype)
        for rule, at in parts:
            kept = [i for i in axes if isinstance(at[i], slice)]
            sizes = [len(range(*at[i].indices(piece.shape[i]))) for i in kept]
            wanted = [
                index[i] if i in cut else slice(0, n) for i, n in zip(kept, sizes, strict=True)
            ]
            values[at] = rule.to_leaf(self.files.read(rule.key, rule.public_index(wanted, sizes)))
        return values


def load_config(folder: Path, load_sound: bool | None = None) -> Config:
    """Read the configurations of a checkpoint folder.

    Args:
        folder: the checkpoint's root.
        load_sound: None takes sound if the checkpoint has it; True insists; False leaves it out.

    Raises:
        ConfigError: a file is missing, malformed, or asks for what is not implemented.
        CheckpointError: the folder is no checkpoint, or has no sound where it is insisted on.
    """
    if not (folder / "transformer" / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is not a Cosmos3 checkpoint: it has no transformer/config.json"
        )
    transformer_config = TransformerConfig.from_file(folder / "transformer" / "config.json")
    sound_config = folder / "sound_tokenizer" / "config.json"
    has_sound = transformer_config.sound_gen and sound_config.is_file()
    if load_sound and not has_sound:
        raise CheckpointError(
            f"{folder} has no sound (sound_gen is {transformer_config.sound_gen}, {sound_config} "
            f"is {'there' if sound_config.is_file() else 'missing'}): load it without sound"
        )
    sound = has_sound and load_sound is not False
    scheduler = folder / "scheduler" / "scheduler_config.json"
    parts: dict[str, Any] = {
        "transformer": dataclasses.replace(transformer_config, sound_gen=sound),
        "video_vae": VideoVAEConfig.from_file(folder / "vae" / "config.json"),
        "sound_vae": SoundVAEConfig.from_file(sound_config) if sound else None,
        "scheduler": SchedulerConfig.from_file(scheduler)
        if scheduler.exists()
        else SchedulerConfig(),
        "recipes": _read_recipes(folder / RECIPE_FILE, transformer_config),
    }
    try:
        return Config(**parts)
    except ConfigError as error:  # files that do not belong together
        raise ConfigError(f"{folder}: {error}") from error


def _read_recipes(path: Path, transformer: TransformerConfig) -> Recipes:
    sizes = (transformer.num_hidden_layers, transformer.hidden_size)
    file = read_json(path) if path.exists() else {}
    try:
        return Recipes(MODELS.get(sizes, "Nano"), file, recognised=sizes in MODELS)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def open_components(folder: Path, config: Config) -> list[Component]:
    """Open every component that a configuration needs, and check each against the model.

    Raises:
        CheckpointError: a file is missing or truncated, or keys or shapes do not fit.
        ConfigError: numbers of the configuration do not fit each other.
    """
    encoder = config.has_sound and _has_encoder(folder / "sound_tokenizer")
    with guard.parsing(folder, "a checkpoint of shapes that fit each other", ConfigError):
        found = layouts(config, encoder)
    return [_open(folder / name, layout, leaves) for name, (layout, leaves) in found.items()]


def load_params(
    components: list[Component],
    dtype: jnp.dtype,
    on_bytes: Callable[[int], None] | None = None,
    parts: Collection[str] | None = None,
    unstacked: bool = False,
    mesh: Mesh | None = None,
) -> dict:
    """The parameter tree `{"und", "gen", "video_vae"[, "sound_vae"]}`.

    Args:
        components: see `open_components`.
        dtype: of every leaf but the few that stay in float32.
        on_bytes: called with the size of each leaf once it is placed.
        parts: the top-level parts to load, for example `{"und"}`; None loads all.
        unstacked: the media tower's layers, see `transformer.unstack_layers`.
        mesh: whose devices get the parameters, each what `sharding.weight_sharding` says; of a file
            only what devices of this process get is read. None is the default device.

    Raises:
        CheckpointError: a file no longer gives what it held when it was opened, or a tensor is not
            finite.
        ValueError: of all that is added to a component, the dtype's rounding leaves nothing.
    """
    leaves = {}
    for component in components:
        pieces = component.pieces(dtype, parts, unstacked)
        for path, leaf in component.place(pieces, mesh):
            leaves[path] = leaf
            if on_bytes is not None:
                on_bytes(leaf.nbytes)
        if pieces:
            check_addition(component, dtype)
    return unflatten_dict(leaves, sep="/")


def check_addition(component: Component, dtype: jnp.dtype) -> None:
    """Raise ValueError if what is added to a component changes none of its values.

    It looks at one piece after the other until one differs, which is the first one that anything is
    added to, but for additions that are about to be lost in rounding.
    """
    if component.addition is None:
        return
    plain = dataclasses.replace(component, addition=None)
    for piece in component.pieces(dtype):
        if component.addition(*layer_of(piece)) is None:
            continue
        if np.any(component.read(piece) != plain.read(piece)):
            return
    raise ValueError(
        "the adapter changes nothing: what it adds is too small for any weight of "
        f"{jnp.dtype(dtype).name}; read the checkpoint in float32, or train it for longer"
    )


def param_structs(
    components: list[Component],
    dtype: jnp.dtype,
    unstacked: bool = False,
    mesh: Mesh | None = None,
) -> dict:
    """The tree of `load_params` as `jax.ShapeDtypeStruct`s. No tensor is read."""
    leaves = {}
    for component in components:
        for piece in component.pieces(dtype, unstacked=unstacked):
            shape = component.leaves[piece.leaf] if piece.place else piece.shape
            where = _sharding(component, mesh, piece.leaf, shape)
            struct = jax.ShapeDtypeStruct(shape, piece.dtype, sharding=where)
            leaves[component.path(piece.leaf)] = struct
    return unflatten_dict(leaves, sep="/")


def compile_loading(
    components: list[Component],
    dtype: jnp.dtype,
    unstacked: bool = False,
    mesh: Mesh | None = None,
) -> None:
    """Compile the small programs with which `load_params` fills stacked leaves."""
    for component in components:
        where = partial(_sharding, component, mesh)
        compile_placing(component.pieces(dtype, unstacked=unstacked), component.leaves, where)


def _sharding(
    component: Component, mesh: Mesh | None, leaf: str, shape: tuple[int, ...]
) -> NamedSharding | None:
    return sharding.weight_sharding(mesh, component.path(leaf), shape)


def layer_of(piece: Piece) -> tuple[str, int | None]:
    """The path of our leaf that a piece belongs to, and its layer if that is stacked."""
    rule, _ = piece.parts[0]
    return rule.leaf, rule.index[0] if is_stacked(rule.leaf) else None


def converted_layout(public: Layout, leaves: dict[str, tuple[int, ...]]) -> Layout:
    """Our own layout: a tensor a leaf under its path, a tensor a layer where layers are stacked."""
    rules = []
    for leaf, shape in leaves.items():
        if is_stacked(leaf):
            places = [(f"{leaf}/{layer}", (layer,)) for layer in range(shape[0])]
        else:
            places = [(leaf, ())]
        rules += [Rule(key, leaf, "... -> ...", index) for key, index in places]
    # Sound may be there and not asked for; it is then passed over, as in the public layout.
    unused = () if any(leaf.startswith("gen/sound_") for leaf in leaves) else (r"gen/sound_.*",)
    return Layout(public.name, tuple(rules), unused, public.float32)


def is_converted(folder: Path) -> bool:
    """Whether a component folder is in the converted layout."""
    return has_tensors(folder, CONVERTED_STEM)


def _open(folder: Path, layout: Layout, leaves: dict[str, tuple[int, ...]]) -> Component:
    stem = PUBLIC_STEM
    if is_converted(folder):
        layout, stem = converted_layout(layout, leaves), CONVERTED_STEM
    files = TensorFiles(folder, stem)
    # Before the keys: a quantised checkpoint has other keys too, and this is why.
    stored = {key: files.dtypes.get(key) for rule in layout.rules for key in rule.keys}
    odd = [f"{key}: {kind}" for key, kind in stored.items() if kind not in (*FLOAT_DTYPES, None)]
    raise_problems(
        f"{folder} is quantised or damaged; weights are read from {', '.join(FLOAT_DTYPES)} alone",
        {"stored otherwise": odd},
    )
    try:
        check(layout, files.shapes, leaves)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return Component(folder.name, files, layout, leaves, PREFIXES[folder.name])


def _has_encoder(folder: Path) -> bool:
    """Early revisions of the sound VAE hold the decoder alone, under the same configuration."""
    stem = CONVERTED_STEM if is_converted(folder) else PUBLIC_STEM
    return any(key.startswith(("encoder.", "encoder/")) for key in TensorFiles(folder, stem).shapes)
