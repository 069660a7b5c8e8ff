"""What is before and after the transformer's layers, operation by operation, and its embeddings.

Axes: S text and M media tokens, D model, V vocabulary.
"""

import jax.numpy as jnp
import numpy as np
import torch

from convert.verify import reference
from convert.verify import transformer_ours as ours
from convert.verify.autoencoder_names import modules_with_weights
from convert.verify.compare import FLOAT32, relative_l2
from convert.verify.transformer_inputs import Case, alone, watched
from convert.verify.transformer_layer import compare_tables, one_example
from convert.verify.transformer_theirs import Side, arguments
from convert.verify.witness import Found, Operation, Recording, Witness
from cosmos3_jax.models.transformer import patch_grid

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
UNREAD = {"norm"}  # of the text tower, whose last output nothing reads
SOUND = "audio_modality_embed"
BLOCK = 4096  # rows of the embeddings at a time


class Around:
    """One example of a case through what is before and after the layers."""

    def __init__(self, side: Side, config, index: int, case: Case, params: dict, device: str):
        """`case` is the side's number `index`; the rest is as in `transformer.compare`."""
        self.side, self.config, self.params, self.device = side, config, params, device
        self.at, self.whole, self.case = (index, watched(case)), case, alone(case)
        self.witness = Witness(
            "transformer",
            BEFORE.get,
            Recording(),
            leaf=lambda path: ("und/" if path == "embed" else "gen/") + path,
            tensors=self._tensors,
            hint=self._hint,
        )

    def watch_before(self, embeddings: tuple[float, str], found: Found) -> None:
        """Embedding, patches, time, and the rotary tables; `embeddings` of `compare_embeddings`."""
        witness, params = self.witness, self.params
        witness.tell(found)
        self.embeddings = embeddings[1]
        witness.note("embed_tokens", embeddings[0], module="embed_tokens", path="embed")
        self._record()
        with witness.watching():
            self.stream = ours.run_before(params, self.config, "float32", self.case)
        und, gen, rotary = (_numpy(x) if torch.is_tensor(x) else x for x in self._came())
        witness.compare("layers.0, its text input", self.stream.und[0, : len(und)], und)
        media = self.stream.gen[0]
        if self.case.sound_frames:
            mine = np.asarray(params["gen"]["sound_modality_embed"])
            theirs = _numpy(self.side.transformer.model.get_parameter(SOUND))
            witness.compare(SOUND, mine, theirs, module=SOUND, path="sound_modality_embed")
            if mine.shape == theirs.shape:  # it is not to be blamed twice
                media = media.at[-self.case.sound_frames :].add(theirs - mine)
        why = "time on noisy frames, sums"
        witness.compare(f"layers.0, its media input ({why})", media, gen)
        compare_tables(witness, self.stream, rotary, self.config)

    def watch_after(self, found: Found) -> None:
        """Final norm, projections, patches."""
        witness = self.witness
        witness.tell(found)
        case, example = self.at
        und, gen, _ = self.side.streams[case][example]
        self.side.transformer.door.goes = (und, gen)
        exact = self._record()
        out = jnp.asarray(_numpy(gen))[None]
        witness.find = AFTER.get
        with witness.watching():
            made = ours.run_after(self.params, self.config, "float32", self.case, self.stream, out)
        for name, x in made.items():
            witness.compare(f"velocity, {name} (patch order)", x[0], exact[name])
        witness.check_coverage(UNREAD)

    def _came(self) -> tuple:
        return self.side.transformer.door.came

    def _record(self) -> dict[str, np.ndarray]:
        """Run the reference; what its modules read and made is in the recording."""
        self.witness.recording = Recording()
        model = self.side.transformer.model
        longest = max(self.whole.texts)

        def arrange(name: str, module, x: torch.Tensor, made: bool) -> torch.Tensor:
            """Tokens of one example, padded as ours, given frames among them, which the reference
            leaves out at the end; of the timestep embedding, which all tokens share, one row.
            """
            if name == "embed_tokens":
                blank = module.weight[:1] if made else torch.zeros(1, dtype=x.dtype)
                x = torch.cat([x, *[blank.to(x.device)] * (longest - len(x))])
            if name == "norm_moe_gen":
                self._normed = x
            elif name == "proj_out":
                noisy = self._noisy()
                every = self._normed[: len(noisy)].clone()
                full = module.forward(every) if made else every
                full[noisy] = x
                x = full
            x = x[:1] if name.startswith("time_embedder") else one_example(name, module, x, made)
            return x

        with self.witness.recording.of(modules_with_weights(model), arrange):
            packed = arguments(self.side, self.whole, self.at[1], self.device)
            return reference.run(self.side.transformer, packed)

    def _noisy(self) -> torch.Tensor:
        """bool [M]: which video tokens are to be made."""
        _, height, width = patch_grid(self.config, self.case.grid)
        mask = torch.from_numpy(~self.case.frame_mask[0])
        return mask.repeat_interleave(height * width).to(self.device)

    def _tensors(self, module: str) -> tuple[str, ...]:
        if module == SOUND:
            return (SOUND,)
        part = self.side.transformer.model.get_submodule(module)
        return tuple(f"{module}.{name}" for name, _ in part.named_parameters(recurse=False))

    def _hint(self, module: str, path: str) -> str:
        """Which of a module's tensors differ, compared by themselves."""
        if module == "embed_tokens":
            return self.embeddings
        node = self.params["gen"]
        for part in path.split("/"):
            node = node[part]
        if module == SOUND:
            return "ours is all zeros" if not np.any(node) else ""
        return differing(module, self.side.transformer.model.get_submodule(module), node)


def differing(name: str, module: torch.nn.Module, node: dict) -> str:
    """Which tensors of a dense layer or norm differ from ours, and how, or ""."""
    said = []
    for part, theirs in module.named_parameters(recurse=False):
        theirs = _numpy(theirs)
        mine = np.asarray(node["bias"] if part == "bias" else node.get("kernel", node.get("scale")))
        mine = mine if part == "bias" else mine.T
        if relative_l2(mine, theirs) <= FLOAT32["operation"]:
            continue
        how = "differs"
        for value, what in ((0, "zeros"), (1, "ones")):
            how = f"is all {what} here" if np.all(mine == value) else how
        if relative_l2(mine.T, theirs) <= FLOAT32["operation"]:
            how = "is transposed here"
        said.append(f"{name}.{part} {how}")
    return ", ".join(said)


def compare_embeddings(params: dict, side: Side) -> tuple[float, str]:
    """Relative L2 of all V rows, the largest of one row, and which rows differ."""
    mine, theirs = params["und"]["embed"]["embedding"], side.transformer.model.embed_tokens.weight
    if mine.shape != tuple(theirs.shape):
        return np.inf, f"{mine.shape} rows and columns, in the reference {tuple(theirs.shape)}"
    worst, rows = 0.0, []
    for start in range(0, len(mine), BLOCK):
        exact = _numpy(theirs[start : start + BLOCK])
        error = np.linalg.norm(np.asarray(mine[start : start + BLOCK]) - exact, axis=1)
        norm = np.linalg.norm(exact, axis=1)
        relative = np.divide(error, norm, out=np.where(error > 0, np.inf, error), where=norm > 0)
        rows += [start + int(i) for i in np.flatnonzero(~(relative <= FLOAT32["operation"]))]
        worst = max(worst, float(np.max(relative)))
    shown = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
    return worst, f"{len(rows)} of {len(mine)} rows differ: {shown}" if rows else ""


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()
