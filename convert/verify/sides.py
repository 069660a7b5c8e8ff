"""What is compared: a public checkpoint, which diffusers reads, and the weights that we read."""

import dataclasses
from pathlib import Path

from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.files import TensorFiles
from cosmos3_jax.checkpoint.load import Component
from cosmos3_jax.config import Config

FOLDERS = {"transformer": "transformer", "video_vae": "vae", "sound_vae": "sound_tokenizer"}


@dataclasses.dataclass(frozen=True)
class Sides:
    """Both sides, and how they are compared."""

    checkpoint: Path  # the public one, for the reference
    folder: Path  # where our weights are read from
    config: Config  # of both
    components: dict[str, Component]  # ours, opened, by the name of their folder
    dtypes: tuple[str, ...]  # of `float32` and `bfloat16`, what to compare in
    layers: int | None = None  # of the transformer, how many to run, of both sides; None runs all
    device: str = "cpu"  # torch's name of it

    def component(self, name: str) -> Component:
        """Ours, by the name of the component."""
        return self.components[FOLDERS[name]]

    def rounded(self, name: str) -> str:
        """How the reference's weights are rounded before they are compared.

        A converted checkpoint in bfloat16 holds rounded weights. Against the public float32 ones
        its error would be that rounding, and a mistake could hide in it; so the reference gets
        weights that are rounded alike: `folded`, after weight norm is folded, as our converter
        does it; `stored`, tensor by tensor, as in a checkpoint of the public layout; or "".
        """
        ours = self.component(name).files
        if "BF16" not in ours.dtypes.values():
            return ""
        if load.is_converted(ours.folder):
            return "folded"
        theirs = TensorFiles(self.checkpoint / FOLDERS[name], load.PUBLIC_STEM)
        sharp = "F32" in theirs.dtypes.values() and self.folder != self.checkpoint
        return "stored" if sharp else ""
