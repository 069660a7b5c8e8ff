"""A model's parameters by part: on the device all the time, or only while they are used.

The parts are the top-level keys of the parameter tree: `und` (text tower), `gen` (media tower),
`video_vae` and `sound_vae`.
"""

import dataclasses
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import tqdm
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.lora import Lora, adapted_leaves, merge_on_read
from cosmos3_jax.config import Config, TransformerConfig
from cosmos3_jax.parallel import sharding
from cosmos3_jax.runtime.words import PARTS
from cosmos3_jax.sampling.stages import params_dtype

log = logging.getLogger("cosmos3_jax")


class Weights:
    """The parts of one model's parameters.

    Attributes:
        structs: the whole tree as `jax.ShapeDtypeStruct`s, whatever is on the device.
        mesh: whose devices hold them, see `sharding.weight_sharding`; None is the default device.
    """

    def __init__(self, params: dict, mesh: Mesh | None = None):
        """Parts that are there already and stay."""
        self.mesh = mesh
        self._held = sharding.place_params(dict(params), mesh)
        self.structs = jax.tree.map(self._struct, self._held)
        self._components: list[load.Component] = []
        self._dtype = jnp.dtype(jnp.float32)  # in which missing parts are read
        self._loras: Sequence[Lora] = ()  # merged as they are read
        self._progress = False

    @classmethod
    def of_checkpoint(
        cls,
        folder: Path,
        config: Config,
        dtype: str,
        *,
        offload: bool,
        mesh: Mesh | None = None,
        loras: Sequence[Lora] = (),
        progress: bool = False,
    ) -> "Weights":
        """All parts of a checkpoint, now; with `offload` each when it is used.

        The media tower's layers come apart, which is faster (see `transformer.unstack_layers`).
        LoRAs (see `lora_files.load_scaled`) are merged as the weights are read. `progress` shows a
        bar whenever they are.

        Raises CheckpointError as `load.open_components` and `load.load_params` do.
        """
        components = load.open_components(folder, config)
        components[0] = _with_loras(components[0], loras, config.transformer)
        weights = cls({}, mesh)
        weights._components, weights._dtype = components, jnp.dtype(dtype)
        weights._loras = loras
        weights._progress = progress
        weights.structs = load.param_structs(components, weights._dtype, True, mesh)
        if not offload:
            weights.all()
        return weights

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.structs)

    @property
    def dtype(self) -> str:
        """Of the weights and of the computation."""
        return str(params_dtype(self.structs["video_vae"]))

    @property
    def resident(self) -> bool:
        """Whether every part is on the device and stays."""
        return self._held.keys() == self.structs.keys()

    @contextmanager
    def borrow(self, part: str) -> Generator[dict, None, None]:
        """The tree of one part. A part that does not stay leaves the device at the end.

        What was computed from it must be ready by then, or its memory is not free yet.
        """
        if part in self._held:
            yield self._held[part]
            return
        tree = self._read([part])[part]
        try:
            yield tree
        finally:
            # Whoever still holds the tree, its memory is free now.
            for leaf in jax.tree.leaves(tree):
                leaf.delete()

    def all(self) -> dict:
        """The whole tree. What is not on the device is read, and stays from now on."""
        missing = [part for part in self.structs if part not in self._held]
        if missing:
            self._held |= self._read(missing)
        return {part: self._held[part] for part in self.structs}

    def merge_loras(self, loras: Sequence[Lora], config: TransformerConfig) -> None:
        """Merge these LoRAs instead of those that are merged now.

        Of what is on the device, the kernels that either adapts are read again: bit for bit what
        `of_checkpoint` reads. They leave the device first, so that nothing is there twice.

        Raises CheckpointError and ValueError as `load.load_params` does, and ValueError where there
        is no checkpoint. The weights are then as they were.
        """
        if not self._components:
            raise ValueError(
                "this model was made from parameters: there is no checkpoint to read the weights "
                "from; merge the LoRA into the parameters with checkpoint.lora.merge"
            )
        before, others = self._components[0], self._components[1:]
        after = _with_loras(before, loras, config)
        load.check_addition(after, self._dtype)
        adapted = adapted_leaves([*self._loras, *loras], config)
        pieces = [
            piece
            for piece in before.pieces(self._dtype, self._held.keys(), unstacked=True)
            if load.layer_of(piece)[0] in adapted
        ]
        kept = flatten_dict(self._held, sep="/")
        for piece in pieces:
            kept.pop(before.path(piece.leaf), None)  # a stacked one has several pieces
        self._held = {}
        try:
            read = dict(after.place(pieces, self.mesh))
        except BaseException:
            self._held = unflatten_dict(kept | dict(before.place(pieces, self.mesh)), sep="/")
            raise
        self._held = unflatten_dict(kept | read, sep="/")
        self._components, self._loras = [after, *others], loras

    def compile_loading(self) -> None:
        """Compile what reading the missing parts would."""
        if not self.resident:
            load.compile_loading(self._components, self._dtype, True, self.mesh)

    def _read(self, parts: list[str]) -> dict:
        structs = jax.tree.leaves([self.structs[part] for part in parts])
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in structs)
        named = ", ".join(PARTS.get(part, part) for part in parts)
        log.info("loading %s: %.2f GiB", named, size / 2**30)
        bar = tqdm.tqdm(
            total=size, unit="B", unit_scale=True, desc="load", disable=not self._progress
        )
        with bar:
            return load.load_params(
                self._components, self._dtype, parts=parts, unstacked=True, mesh=self.mesh,
                on_bytes=bar.update,
            )  # fmt: skip

    def _struct(self, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        placed = leaf.sharding if self.mesh is not None else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)


def _with_loras(
    transformer: load.Component, loras: Sequence[Lora], config: TransformerConfig
) -> load.Component:
    """The transformer's files, with these LoRAs added as they are read and no others."""
    addition = merge_on_read(loras, config) if loras else None
    return dataclasses.replace(transformer, addition=addition)
