"""Cosmos3: a checkpoint on the device, and prompts turned into videos with it.

This is the stateful shell around the pure `generate`: it reads files, tokenises, draws noise,
compiles and shows progress. Research code that wants none of that calls `prepare` once and then
`generate` itself.

Axes: B batch, C channels, T frames, H rows, W columns; latents t, h, w; s sound latents.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

from jax import Array
from jax.sharding import Mesh

from cosmos3_jax import limits
from cosmos3_jax.checkpoint import lora_files
from cosmos3_jax.checkpoint.find import find_checkpoint, open_folder
from cosmos3_jax.config import Config, SoundVAEConfig
from cosmos3_jax.io.prepare import TEXT_BUCKET, Prepared, prepare
from cosmos3_jax.io.prompt import pad_token_ids
from cosmos3_jax.io.settings import SettingsDict, read_settings
from cosmos3_jax.models.tokenizer import Tokenizer
from cosmos3_jax.parallel import device
from cosmos3_jax.parallel.mesh import Meshes
from cosmos3_jax.runtime import memory, programs
from cosmos3_jax.runtime.generation import Generation, Step
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.sampler_state import StateFile
from cosmos3_jax.runtime.weights import Weights
from cosmos3_jax.sampling import stages
from cosmos3_jax.sampling.request import Request, check_axes
from cosmos3_jax.sampling.stages import Stage, Values

DTYPES = ("bfloat16", "float32")
Loras = str | Path | Sequence[str | Path | tuple[str | Path, float]]


class Cosmos3:
    """A checkpoint: opened, which is enough to prepare a request, or loaded.

    Attributes:
        config: its configuration.
        tokenizer: its tokenizer and chat template.
        weights: its parameters by part, on the device or read when they are used; None until they
            are loaded.
        meshes: the mesh of devices for each job.
    """

    def __init__(
        self,
        config: Config,
        params: dict | Weights | None,
        tokenizer: Tokenizer,
        mesh: Mesh | Meshes | str | None = None,
    ):
        if not isinstance(mesh, Meshes):
            mesh = Meshes(mesh, config.transformer.num_key_value_heads)
        self.config, self.tokenizer, self.meshes = config, tokenizer, mesh
        self.weights = Weights(params, mesh.weights) if isinstance(params, dict) else params
        self._name: str | Path | None = None
        self._revision: str | None = None
        self._loras: list = []

    @classmethod
    def open(
        cls,
        path_or_hub_id: str | Path,
        *,
        load_sound: bool | None = None,
        lora: Loras | None = None,
        revision: str | None = None,
    ) -> "Cosmos3":
        """A checkpoint's configuration and tokenizer, and LoRAs for it; no weights yet.

        Args:
            path_or_hub_id: a local folder; a Hub id `owner/name`; `tiny`, the embedded default; or
                `random`, see `find.find_checkpoint`.
            load_sound: None takes the sound that there is, True insists, False leaves it out.
            lora: a LoRA's file or folder, of diffusers, PEFT or kohya, or a list of them or of
                (file, factor); see `checkpoint.lora_files.load`. They are merged into the weights
                as these are read, and cost nothing afterwards.
            revision: of a Hub id, a branch, a tag or a commit.

        Raises:
            ValueError: a LoRA changes nothing.
            CheckpointError: the folder is no checkpoint, or a LoRA does not fit it.
            ConfigError: a configuration asks for what is not implemented.
        """
        folder = find_checkpoint(path_or_hub_id, False, revision)
        config, tokenizer = open_folder(folder, load_sound)
        model = cls(config, None, tokenizer)
        model._name, model._revision = path_or_hub_id, revision
        model._loras = [] if lora is None else lora_files.load_scaled(lora, config.transformer)
        return model

    def load(
        self,
        dtype: str | None = None,
        *,
        offload: bool | None = None,
        mesh: Mesh | Meshes | str | None = None,
        progress: bool | None = None,
    ) -> "Cosmos3":
        """Read the weights of an opened checkpoint.

        The autoencoders come whole: `encode_video` and `encode_sound` read their encoders.

        Args:
            dtype: of the weights and of the computation, `bfloat16` or `float32`; None is float32
                on a CPU, else bfloat16. The timestep embedding and the sampler are always float32.
            offload: False loads all parts now, and they stay. True loads none: text tower, media
                tower and autoencoders are read from the checkpoint one after the other, each when
                it is used, and leave the device afterwards; every call reads them again. The
                results are the same. None offloads if the recipe's job would not fit otherwise.
            mesh: the devices and what they divide, with axes `data` (prompts), `cfg` (branches of
                guidance), `seq` (tokens) and `fsdp` (weights, and tokens): a mesh of JAX's, or for
                example `cfg=2,seq=2`. None uses all devices, for each job as suits it; it divides
                the weights if they do not fit whole.
            progress: show a bar over the bytes; None does where stderr is a terminal.

        Returns:
            The same object.

        Raises:
            ValueError: the mesh does not fit the devices or the model.
            CheckpointError: the checkpoint's files do not fit the model.
        """
        dtype = device.default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not supported; choose bfloat16 or float32")
        if self._name is None:
            raise ValueError("this model was made from parameters; there is no checkpoint to load")
        if isinstance(mesh, Meshes):
            self.meshes, offload = mesh, bool(offload)
        else:
            job = Job.of_recipe(self.config, dtype=dtype)
            self.meshes, offload = memory.choose_devices(
                self.config, device.memory_limit(), mesh, offload, job
            )
        self.weights = Weights.of_checkpoint(
            self.folder(), self.config, dtype, offload=offload,
            mesh=self.meshes.weights, loras=self._loras,
            progress=sys.stderr.isatty() if progress is None else progress,
        )  # fmt: skip
        return self

    def load_lora(self, lora: Loras) -> None:
        """Merge LoRAs into the weights, instead of those that are merged now; as in diffusers, the
        one that was loaded last counts. A list merges several.

        The weights are those of a model that was opened with these LoRAs, bit for bit. Only what
        they change is read from the checkpoint again. Compiled programs stay.

        Args:
            lora: as in `open`.

        Raises:
            ValueError: a LoRA changes nothing; or the model was made from parameters.
            CheckpointError: a LoRA does not fit the model. The model is then as it was.
        """
        self._merge(lora_files.load_scaled(lora, self.config.transformer))

    def unload_lora(self) -> None:
        """Take all LoRAs out of the weights, which are then the checkpoint's bit for bit.

        Raises ValueError if the model was made from parameters.
        """
        self._merge([])

    def _merge(self, loras: list) -> None:
        if self.weights is not None:
            self.weights.merge_loras(loras, self.config.transformer)
        self._loras = loras

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: str | None = None,
        load_sound: bool | None = None,
        offload: bool | None = None,
        mesh: Mesh | str | None = None,
        lora: Loras | None = None,
        revision: str | None = None,
        progress: bool | None = None,
    ) -> "Cosmos3":
        """`open` and `load`: a checkpoint in the public or the converted layout, with weights."""
        model = cls.open(path_or_hub_id, load_sound=load_sound, lora=lora, revision=revision)
        return model.load(dtype, offload=offload, mesh=mesh, progress=progress)

    def folder(self) -> Path:
        """Where the checkpoint's files are, weights included; a Hub id is downloaded."""
        if self._name is None:
            raise ValueError("this model was made from parameters; it has no checkpoint")
        return find_checkpoint(self._name, revision=self._revision)

    @property
    def params(self) -> dict:
        """The parameter tree `{"und", "gen", "video_vae"[, "sound_vae"]}`.

        With offload, what is not on the device is read now and stays from then on. Other parameters
        may be put in its place.
        """
        return self._loaded().all()

    @params.setter
    def params(self, params: dict) -> None:
        self.weights = Weights(params, self.meshes.weights)

    @property
    def dtype(self) -> str:
        """Of the weights and of the computation."""
        return self._loaded().dtype

    def prepare(self, prompt: str | Sequence[str], **settings: Unpack[SettingsDict]) -> Request:
        """Check, read and tokenise everything that one generation needs (see `io.settings` and
        `io.prepare`). Nothing is encoded or compiled yet, and no weights are needed.
        """
        return self.resolve(prompt, **settings).request

    def resolve(
        self,
        prompt: str | Sequence[str],
        *,
        check: Callable[[Request], object] = lambda request: None,
        **settings: Unpack[SettingsDict],
    ) -> Prepared:
        """The request that `prepare` returns, and what it was made from; `check` as in
        `io.prepare.prepare`.
        """
        return prepare(self.config, self.tokenizer, prompt, read_settings(dict(settings)), check)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        output: str = "media",
        return_trajectory: bool = False,
        progress: bool | None = None,
        decode_chunk_size: int | None = None,
        steps_per_program: int | None = None,
        **settings: Unpack[SettingsDict],
    ) -> dict:
        """Turn prompts into images (`num_frames=1`) or videos, with sound on the same time line if
        asked for, from text alone or going on from an image or a video.

        Args:
            prompt: one prompt or a list of them; a list is a batch.
            output: `media`, or `latents` for the final normalised latents.
            return_trajectory: add `trajectory`: `latents` and `clean`, every step's latents and
                clean predictions, stacked on a leading axis.
            progress: show a bar over the steps; None does where stderr is a terminal.
            decode_chunk_size: latent frames decoded at a time; more are faster and need more
                memory. None chooses by size.
            steps_per_program: denoising steps of one call to the device; another number rounds
                otherwise. None chooses, see `programs.block_length`.
            **settings: image or video to start from, sizes, sampler, seeds and prompt style; see
                `io.settings.Settings`.

        Returns:
            `video`: float32 [B, 3, T, H, W] in [0, 1], and `fps`; with sound also `sound`: float32
            [B, channels, samples] in [-1, 1], and `sample_rate` in Hz. As latents:
            [B, C, t, h, w] and [B, C_sound, s].

        Raises:
            ValueError: on a value that cannot work, or media that cannot be read.
            FileNotFoundError: on an image or a video that is not there.
            OutOfDeviceMemory: (a ValueError) the device has too little memory. As a rule that is
                known before anything is run.
        """
        options = dict(
            output=output, return_trajectory=return_trajectory,
            decode_chunk_size=decode_chunk_size, steps_per_program=steps_per_program,
        )  # fmt: skip
        request = self._prepare_fitting(prompt, settings, options)
        return self.run(request, progress=progress, **options)

    def _prepare_fitting(self, prompt: Any, settings: SettingsDict, options: dict) -> Request:
        """`prepare`, and before its noise is drawn the check that a generation with it fits."""
        if self.weights is None:  # whoever needs them says so
            return self.prepare(prompt, **settings)

        def check(request: Request) -> None:
            job = self._generation(request, **options).job
            memory.check_fits(self.config, device.memory_limit(), job)

        return self.resolve(prompt, check=check, **settings).request

    def run(
        self,
        request: Request,
        *,
        output: str = "media",
        return_trajectory: bool = False,
        progress: bool | None = None,
        decode_chunk_size: int | None = None,
        steps_per_program: int | None = None,
        after: Callable[[Stage, Values], None] | None = None,
        states: StateFile | None = None,
    ) -> dict:
        """Run the stages of a generation that is prepared.

        Args:
            request: see `prepare`.
            output, return_trajectory, progress, decode_chunk_size, steps_per_program: see
                `generate`.
            after: called when a stage has ended, with all values so far.
            states: where the sampler's state is kept, and gone on from if it is there; see
                `runtime.sampler_state.StateFile`.

        Returns:
            What `generate` does.

        Raises:
            ValueError, OutOfDeviceMemory: as `generate`.
        """
        generation = self._generation(
            request, output=output, return_trajectory=return_trajectory,
            decode_chunk_size=decode_chunk_size, steps_per_program=steps_per_program,
        )  # fmt: skip
        return generation.run(progress=progress, after=after, states=states)

    def warmup(
        self,
        prompt: str | Sequence[str] = "warm-up",
        *,
        text_tokens: int | None = None,
        output: str = "media",
        return_trajectory: bool = False,
        progress: bool | None = None,
        decode_chunk_size: int | None = None,
        steps_per_program: int | None = None,
        **settings: Unpack[SettingsDict],
    ) -> None:
        """Compile all that `generate` with these arguments would, and run nothing.

        Prompts are padded to a multiple of 128 tokens; one program serves all of one such length.

        Args:
            prompt: one of the length to come, or as many as come in a batch.
            text_tokens: of the longest prompt to come, chat template included, instead of
                `prompt`'s own length.
            output, return_trajectory, progress, decode_chunk_size, steps_per_program: as in
                `generate`.
            **settings: as in `generate`. Of these the sizes, the number of steps (by its
                `steps_per_program`), sound, the negative prompt's length, the frames read of an
                image or a video, and whether there is guidance count; the rest are arrays.

        Raises:
            ValueError, OutOfDeviceMemory: as `generate` would.
        """
        options = dict(
            output=output, return_trajectory=return_trajectory,
            decode_chunk_size=decode_chunk_size, steps_per_program=steps_per_program,
        )  # fmt: skip
        request = self._prepare_fitting(prompt, settings, options)
        if text_tokens is not None:
            limits.check_most("text_tokens", text_tokens)
            ids, mask = pad_token_ids([[0] * text_tokens] * len(request.text_ids), TEXT_BUCKET)
            request = request.replace(text_ids=ids, text_mask=mask)
        self._generation(request, **options).compile()

    def steps(self, request: Request) -> Iterator[Step]:
        """Denoise a request, a step at a time: `for step in model.steps(request)`.

        The caller may stop early; the model can be used as before. The last step's latents are
        those of `denoise`, but for the rounding of a program that makes one step.

        Raises:
            ValueError, OutOfDeviceMemory: as `generate`, at the first step.
        """
        yield from self._generation(request, output="latents").steps()

    def denoise(
        self, request: Request, *, return_trajectory: bool = False, progress: bool | None = None
    ) -> tuple[dict[str, Array], dict | None]:
        """A request -> final latents, channels first, and the trajectory or None."""
        result = self.run(
            request, output="latents", return_trajectory=return_trajectory, progress=progress
        )
        trajectory = result.pop("trajectory", None)
        return result, trajectory

    def decode(self, latents: dict[str, Array], chunk_size: int | None = None) -> dict:
        """Final latents, channels first -> `video` and, with sound, `sound` and `sample_rate`."""
        result: dict = {"video": self.decode_video(latents["video"], chunk_size)}
        if "sound" in latents:
            result["sound"] = self.decode_sound(latents["sound"])
            result["sample_rate"] = self._sound().sampling_rate
        return result

    def decode_video(self, latents: Array, chunk_size: int | None = None) -> Array:
        """Normalised latents [B, C, t, h, w] -> video [B, 3, T, H, W] in [0, 1], T = 4 (t - 1) + 1.

        Raises ValueError on another number of axes or channels.
        """
        check_axes("latents", latents, "[B, C, t, h, w]", self.config.video_vae.z_dim)
        decode = stages.decode_video
        return self._autoencode("video_vae", decode, latents, chunk_size=chunk_size)["video"]

    def encode_video(self, video: Array, chunk_size: int = 1) -> Array:
        """Video [B, 3, T, H, W] in [0, 1], T = 4k + 1 -> normalised latents [B, C, t, h, w]: the
        posterior's mean.

        Raises ValueError on another shape, and on integers.
        """
        check_axes("video", video, "[B, 3, T, H, W]", 3)
        return self._autoencode("video_vae", stages.encode_video, video, chunk_size=chunk_size)

    def decode_sound(self, latents: Array) -> Array:
        """Latents [B, C_sound, s] -> waveform [B, channels, samples] in [-1, 1].

        Raises ValueError on another number of axes or channels, and on a model without sound.
        """
        channels = self._sound().vocoder_input_dim
        check_axes("sound latents", latents, "[B, C_sound, s]", channels)
        return self._autoencode("sound_vae", stages.decode_sound, latents)["sound"]

    def encode_sound(self, waveform: Array) -> Array:
        """Waveform [B, channels, samples] in [-1, 1] -> latents [B, C_sound, s]; the last frame is
        padded.

        Raises ValueError on another number of axes or channels, on integers, and on a model without
        sound.
        """
        channels = self._sound().dec_out_channels
        check_axes("waveform", waveform, "[B, channels, samples]", channels)
        return self._autoencode("sound_vae", stages.encode_sound, waveform)

    def steps_per_program(
        self, request: Request, asked: int | None = None, return_trajectory: bool = False
    ) -> int:
        """Denoising steps of one call to the device; see `programs.block_length`."""
        return programs.block_length(request.num_inference_steps, asked, return_trajectory)

    def job(
        self,
        request: Request,
        output: str = "media",
        return_trajectory: bool = False,
        decode_chunk_size: int | None = None,
    ) -> Job:
        """The job of a request on this model's devices; see `generate` for the arguments."""
        return self._generation(
            request, output=output, return_trajectory=return_trajectory,
            decode_chunk_size=decode_chunk_size,
        ).job  # fmt: skip

    def _generation(self, request: Request, **options: Any) -> Generation:
        return Generation(self._loaded(), self.config, self.meshes, request, **options)

    def _autoencode(self, part: str, function: Callable, array: Array, **static) -> Any:
        """A function of one autoencoder's parameters and an array, on the array's mesh."""
        mesh = self.meshes.of(len(array), guidance=True)
        weights = self._loaded()
        return programs.run_alone(weights, self.config, mesh, part, function, array, **static)

    def _loaded(self) -> Weights:
        if self.weights is None:
            raise ValueError("this checkpoint is open, without weights: call load() first")
        return self.weights

    def _sound(self) -> SoundVAEConfig:
        if "sound_vae" not in self._loaded().structs or self.config.sound_vae is None:
            raise ValueError("this checkpoint was loaded without sound, or has none")
        return self.config.sound_vae
