"""diffusers' transformer from the public files, a layer at a time: it is never whole in memory.

Axes: S text and M media tokens, D model; t latent frames, h rows, w columns, C channels, s sound
latents.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import Cosmos3OmniTransformer
from safetensors import safe_open

from convert.verify import reference
from convert.verify.transformer_inputs import Case
from cosmos3_jax.checkpoint.load import PUBLIC_STEM

# Never run: the head of the language model, and the weights of actions.
UNUSED = ("lm_head", "action_proj_in", "action_proj_out", "action_modality_embed")


class PublicTensors:
    """The tensors of a public component folder, read one at a time."""

    def __init__(self, folder: Path, rounded: str):
        """`rounded`: see `reference`."""
        index = folder / f"{PUBLIC_STEM}.safetensors.index.json"
        files = {f"{PUBLIC_STEM}.safetensors"}
        if index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        self.rounded = rounded
        self._files: dict[str, Any] = {}
        for name in sorted(files):
            # Not mapped into memory: what the process holds is what it uses.
            file = safe_open(folder / name, framework="pt", backend="pread")
            self._files |= dict.fromkeys(file.keys(), file)

    def read(self, chosen: Callable[[str], Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors whose names are chosen, in float32, by name."""
        for name in filter(chosen, self._files):
            tensor = self._files[name].get_tensor(name)
            if self.rounded and reference.SHARP not in name:
                tensor = tensor.bfloat16()
            yield name, tensor.float()

    def names(self, layers: int) -> list[str]:
        """All names but those of layers from number `layers` on."""
        layer = re.compile(r"layers\.(\d+)\.").match
        return [n for n in self._files if not (found := layer(n)) or int(found[1]) < layers]


class StandIn(torch.nn.Module):
    """Stands in for all layers: keeps their inputs, and returns what it is told to."""

    def __init__(self):
        super().__init__()
        self.inputs: tuple | None = None
        self.outputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, und, gen, rotary):
        self.inputs = (und, gen, rotary)
        return self.outputs or (und, gen)


class ZeroEmbedding(torch.nn.Module):
    """An embedding of zeros, in place of one of gigabytes that is not needed any more."""

    def __init__(self, like: torch.Tensor):
        super().__init__()
        self.zero = torch.zeros_like(like)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.zero.expand(len(ids), -1)


class ReferenceTransformer:
    """What is before and after the layers, and the inputs of all cases on their way through them.

    Attributes:
        dtype: of the computation.
        config: diffusers' own.
        streams: by case and example `(und, gen, rotary)`: text tokens [S, D], media tokens [M, D],
            rotary tables.
    """

    def __init__(self, folder: Path, tensors: PublicTensors, device: str):
        """The float32 transformer of `folder`, `transformer/` of a checkpoint."""
        self.device, self.dtype, self.streams = device, torch.float32, []
        with init_empty_weights():
            self.model = Cosmos3OmniTransformer.from_config(
                Cosmos3OmniTransformer.load_config(folder)
            )
        self.config, self._layer_type = self.model.config, type(self.model.layers[0])
        for name in UNUSED:
            if hasattr(self.model, name):
                delattr(self.model, name)
        self._stand_in = StandIn()
        self.model.layers = torch.nn.ModuleList([self._stand_in])
        found = dict(tensors.read(lambda n: not n.startswith(("layers.", "lm_head.", "action_"))))
        self.model.load_state_dict(found, assign=True, strict=False)
        missing = {name for name, _ in self.model.named_parameters()} - found.keys()
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(sorted(missing))}: download it again")
        self.model.to(device).eval()

    def in_bfloat16(self) -> "ReferenceTransformer":
        """A copy in bfloat16, without streams."""
        other = copy.copy(self)
        other.model = reference.to_bfloat16(copy.deepcopy(self.model))
        other._stand_in = other.model.layers[0]
        other.dtype, other.streams = torch.bfloat16, []
        return other

    def start(self, cases: list[Case]) -> None:
        """Set the streams to what enters the first layer; the embeddings are freed."""
        for case in cases:
            self.streams.append([])
            for example in range(len(case.examples)):
                self._run(case, example)
                self.streams[-1].append(self._stand_in.inputs)
        self.model.embed_tokens = ZeroEmbedding(self.model.embed_tokens.weight[:1])

    def advance(self, layer: torch.nn.Module) -> None:
        """Take all streams through a layer, in the dtype of the layer."""
        self.streams = [
            [(*layer(und, gen, rotary), rotary) for und, gen, rotary in examples]
            for examples in self.streams
        ]

    def velocity(self, case: Case, number: int, example: int) -> dict[str, np.ndarray]:
        """`video` [t, h, w, C] and `sound` [s, C] that follow from an example's stream.

        Args:
            case: the inputs; `number` is its place among the cases.
            example: index.
        """
        self._stand_in.outputs = self.streams[number][example][:2]
        out = self._run(case, example)
        self._stand_in.outputs = None
        found = {"video": out.sample[0][0]} | ({"sound": out.sound[0]} if out.sound else {})
        return {name: x.movedim(0, -1).float().cpu().numpy() for name, x in found.items()}

    def _run(self, case: Case, index: int) -> Any:
        example = case.examples[index]
        return self.model(
            **reference.pack(
                self.config, example.ids, example.video, example.sound, timestep=example.timestep,
                fps=case.fps, given=case.given, device=self.device, dtype=self.dtype,
            )
        )  # fmt: skip

    def layer(self, index: int, tensors: PublicTensors) -> torch.nn.Module:
        """Layer `index` in float32: its own module and nothing else."""
        fields = (
            "hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "attention_bias", "rms_norm_eps", "hidden_act",
            "qk_norm_for_text", "use_und_k_norm_for_gen",
        )  # fmt: skip
        with init_empty_weights():
            layer = self._layer_type(**{name: getattr(self.config, name) for name in fields})
        prefix = f"layers.{index}."
        found = tensors.read(lambda name: name.startswith(prefix))
        layer.load_state_dict({n.removeprefix(prefix): x for n, x in found}, assign=True)
        return layer.to(self.device).eval()
