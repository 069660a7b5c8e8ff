"""One generation by its sizes: what its memory, its mesh and its programs depend on."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from cosmos3_jax.config import Config
from cosmos3_jax.parallel.device import AnyDevice
from cosmos3_jax.sampling.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Sizes, branches and devices of one generation.

    Attributes:
        num_frames, height, width, fps: of the video, see `prepare.prepare_request`.
        steps: denoising steps.
        sound: whether sound is denoised and decoded along with the video.
        text_tokens: of the prompt; of a request's, padding included.
        negative_tokens: of the negative prompt likewise; 0 leaves guidance, the second branch, out.
        batch: videos at a time.
        clean_frames: pixel frames that are given, to be encoded.
        trajectory_steps: steps whose latents and clean predictions are kept; 0 keeps none.
        decode: whether the latents are decoded in the end.
        decode_chunk_size: see `video_vae.decode`.
        dtype: of weights and computation.
        offload: whether each part of the weights is on the device only in its own stage.
        mesh: sizes of the axes of the mesh of devices (`sharding`); empty for one device.
        device: that computes; None for the default one.
    """

    num_frames: int
    height: int
    width: int
    fps: float = 24.0
    steps: int = 35
    sound: bool = False
    text_tokens: int = 2048
    negative_tokens: int = 2048
    batch: int = 1
    clean_frames: int = 0
    trajectory_steps: int = 0
    decode: bool = True
    decode_chunk_size: int | None = None
    dtype: str = "bfloat16"
    offload: bool = False
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    device: AnyDevice | None = None

    @classmethod
    def of_recipe(cls, config: Config, **others) -> "Job":
        """The recipe's job, with sound if there is any; `others` that are not None replace it."""
        recipe = config.recipe
        fields = {name: getattr(recipe, name) for name in ("num_frames", "height", "width", "fps")}
        fields |= {"steps": recipe.num_inference_steps, "sound": config.has_sound}
        return cls(**fields | {name: x for name, x in others.items() if x is not None})

    @classmethod
    def of_request(cls, config: Config, request: Request, **others) -> "Job":
        """The job of a request. `others` are the fields that a request does not determine."""
        frames, rows, columns = request.video_shape
        scale = config.video_vae.scale_factor_spatial
        return cls(
            num_frames=config.video_vae.scale_factor_temporal * (frames - 1) + 1,
            height=scale * rows,
            width=scale * columns,
            fps=float(np.min(request.fps)),
            steps=request.num_inference_steps,
            sound=request.sound_frames > 0,
            text_tokens=request.text_ids.shape[1],
            negative_tokens=0 if request.neg_text_ids is None else request.neg_text_ids.shape[1],
            batch=request.text_ids.shape[0],
            clean_frames=0 if request.clean_video is None else request.clean_video.shape[2],
            **others,
        )

    @property
    def guidance(self) -> bool:
        """Whether there is a second branch, with the negative prompt."""
        return self.negative_tokens > 0

    @property
    def longest_text(self) -> int:
        """Tokens of the longer of the two prompts."""
        return max(self.text_tokens, self.negative_tokens)

    def __str__(self) -> str:
        frames = "1 frame" if self.num_frames == 1 else f"{self.num_frames} frames"
        batch = f"{self.batch} videos of " if self.batch > 1 else ""
        sound = " with sound" if self.sound else ""
        return f"{batch}{frames} of {self.height}x{self.width}{sound}"

    def replace(self, **changes) -> "Job":
        return dataclasses.replace(self, **changes)
