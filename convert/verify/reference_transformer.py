"""diffusers' transformer from the public files, a layer at a time: it is never whole in memory.

Axes: S text and M media tokens, D model; t latent frames, h rows, w columns, C channels, s sound
latents.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import Cosmos3OmniTransformer
from safetensors import safe_open

from convert.verify import reference
from convert.verify.our_transformer import Case
from cosmos3_jax.checkpoint.load import PUBLIC_STEM

# Never run: the head of the language model, and the weights of actions.
UNUSED = ("lm_head", "action_proj_in", "action_proj_out", "action_modality_embed")
LAYER_FIELDS = (
    "hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size",
    "attention_bias", "rms_norm_eps", "hidden_act", "qk_norm_for_text", "use_und_k_norm_for_gen",
)  # fmt: skip


class PublicTensors:
    """The tensors of a public component folder, read one at a time."""

    def __init__(self, folder: Path, rounded: str):
        """`rounded`: see `reference`."""
        index = folder / f"{PUBLIC_STEM}.safetensors.index.json"
        files = {f"{PUBLIC_STEM}.safetensors"}
        if index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        self.rounded = rounded
        self.files: dict[str, Any] = {}  # by the name of a tensor
        for name in sorted(files):
            # Not mapped into memory: what the process holds is what it uses.
            file = safe_open(folder / name, framework="pt", backend="pread")
            self.files |= dict.fromkeys(file.keys(), file)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in float32."""
        tensor = self.files[name].get_tensor(name)
        if self.rounded and reference.SHARP not in name:
            tensor = tensor.bfloat16()
        return tensor.float()

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names begin so, by the rest of their names."""
        names = [name for name in self.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.read(name) for name in names}


class StandIn(torch.nn.Module):
    """Stands in for all layers: keeps their inputs, and returns what it is told to."""

    inputs: tuple | None = None
    outputs: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, und, gen, rotary):
        self.inputs = (und, gen, rotary)
        return self.outputs or (und, gen)


class ReferenceTransformer:
    """What is before and after the layers, and the inputs of all cases on their way through them.

    Attributes:
        dtype: of the computation.
        streams: by case and example `(und, gen, rotary)`: text tokens [S, D], media tokens [M, D],
            rotary tables.
    """

    def __init__(self, folder: Path, tensors: PublicTensors, device: str, cases: list[Case]):
        """The float32 transformer of `folder`, `transformer/` of a checkpoint."""
        self.device, self.dtype, self.tensors, self.cases = device, torch.float32, tensors, cases
        with init_empty_weights():
            self.model = Cosmos3OmniTransformer.from_config(
                Cosmos3OmniTransformer.load_config(folder)
            )
        self.layer_type = type(self.model.layers[0])
        for name in UNUSED:
            if hasattr(self.model, name):
                delattr(self.model, name)
        self.model.layers = torch.nn.ModuleList([StandIn()])
        around = [n for n in tensors.files if not n.startswith(("layers.", "lm_head.", "action_"))]
        found = {name: tensors.read(name) for name in around}
        self.model.load_state_dict(found, assign=True, strict=False)
        missing = {name for name, _ in self.model.named_parameters()} - found.keys()
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(sorted(missing))}: download it again")
        self.model.to(device).eval()
        self.start()

    def in_bfloat16(self) -> "ReferenceTransformer":
        """A copy in bfloat16, before the first layer."""
        other = copy.copy(self)
        other.model = reference.to_bfloat16(copy.deepcopy(self.model))
        other.dtype = torch.bfloat16
        other.start()
        return other

    def start(self) -> None:
        """Set the streams to what enters the first layer."""
        self.stand_in, self.streams = self.model.layers[0], []
        for case in self.cases:
            self.streams.append([])
            for example, ids in enumerate(case.ids):
                self._run(case, example, ids)
                self.streams[-1].append(self.stand_in.inputs)

    def forget_embedding(self) -> None:
        """Free all of it, which is gigabytes, but the row of token 0."""
        embed = self.model.embed_tokens
        embed.weight = torch.nn.Parameter(embed.weight[:1].clone(), requires_grad=False)

    def advance(self, layer: torch.nn.Module) -> None:
        """Take all streams through a layer, in the dtype of the layer."""
        self.streams = [
            [(*layer(und, gen, rotary), rotary) for und, gen, rotary in examples]
            for examples in self.streams
        ]

    def tokens(self, number: int) -> dict[str, np.ndarray]:
        """Of a case, as `Stream.tokens` has them."""
        und, gen, _ = zip(*self.streams[number], strict=True)
        return {"und": to_numpy(torch.cat(und)), "gen": to_numpy(torch.stack(gen))}

    def velocity(self, number: int) -> dict[str, np.ndarray]:
        """`video` [B, t, h, w, C] and `sound` [B, s, C] that follow from the streams of a case."""
        made: dict[str, list[np.ndarray]] = {}
        for example, (und, gen, _) in enumerate(self.streams[number]):
            self.stand_in.outputs = und, gen
            case = self.cases[number]  # its tokens change nothing here, and are no longer known
            out = self._run(case, example, [0] * len(case.ids[example]))
            found = {"video": out.sample[0][0]} | ({"sound": out.sound[0]} if out.sound else {})
            for name, x in found.items():
                made.setdefault(name, []).append(to_numpy(x.movedim(0, -1)))
        self.stand_in.outputs = None
        return {name: np.stack(several) for name, several in made.items()}

    def _run(self, case: Case, example: int, ids: list[int]) -> Any:
        sound = case.latents["sound"][example] if case.sound_frames else None
        return self.model(
            **reference.pack(
                self.model.config, ids, case.latents["video"][example], sound,
                timestep=int(case.timestep[example]), fps=case.fps, given=case.given,
                device=self.device, dtype=self.dtype,
            )
        )  # fmt: skip

    def layer(self, index: int) -> torch.nn.Module:
        """Layer `index` in float32: its own module and nothing else."""
        config = self.model.config
        with init_empty_weights():
            layer = self.layer_type(**{name: getattr(config, name) for name in LAYER_FIELDS})
        layer.load_state_dict(self.tensors.under(f"layers.{index}."), assign=True)
        return layer.to(self.device).eval()


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
