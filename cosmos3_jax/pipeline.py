"""Cosmos3: a checkpoint on the device, and prompts turned into videos with it.

This is the stateful shell around the pure `generate`: it reads files, tokenises, draws noise,
compiles and shows progress. Research code that wants none of that calls `prepare` once and then
`generate` itself.

Axes: B batch, C channels, T frames, H rows, W columns; latents t, h, w; s sound latents.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from cosmos3_jax.checkpoint import load, lora_files
from cosmos3_jax.checkpoint.frontend import find_checkpoint, load_frontend
from cosmos3_jax.checkpoint.lora import merge_on_read
from cosmos3_jax.config import Config
from cosmos3_jax.io.prepare import TEXT_BUCKET, prepare_request
from cosmos3_jax.io.prompt import Tokenizer, pad_token_ids
from cosmos3_jax.parallel import device
from cosmos3_jax.parallel.mesh import Meshes, ambient, reachable
from cosmos3_jax.runtime import memory, memory_limits
from cosmos3_jax.runtime.programs import (
    compile_for,
    decode_sound,
    decode_video,
    encode_conditions,
    encode_given,
    encode_sound,
    encode_video,
    loop_request,
    sample_latents,
    text_request,
)
from cosmos3_jax.runtime.progress import compile_with_bar, sample_with_bar
from cosmos3_jax.runtime.weights import Weights
from cosmos3_jax.sampling.generate import params_dtype
from cosmos3_jax.sampling.request import T2VRequest


def _settings_of(function: Callable) -> Callable[[Callable], Callable]:
    """Show the settings of `function` in the signature of a method that passes them on to it."""
    settings = [
        p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]

    def decorate(method: Callable) -> Callable:
        signature = inspect.signature(method)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        method.__signature__ = signature.replace(parameters=[*own, *settings])
        return method

    return decorate


class Cosmos3:
    """A loaded checkpoint.

    Attributes:
        config: its configuration.
        tokenizer: its tokenizer and chat template.
        weights: its parameters by part, on the device or read when they are used.
        meshes: the mesh of devices for each job.
    """

    def __init__(
        self,
        config: Config,
        params: dict | Weights,
        tokenizer: Tokenizer,
        mesh: Mesh | Meshes | str | None = None,
    ):
        if not isinstance(mesh, Meshes):
            mesh = Meshes(mesh, config.transformer.num_key_value_heads)
        self.config, self.tokenizer, self.meshes = config, tokenizer, mesh
        self.weights = params if isinstance(params, Weights) else Weights(params, mesh.weights)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        dtype: str = "bfloat16",
        load_sound: bool | None = None,
        offload: bool | None = None,
        mesh: Mesh | str | None = None,
        lora: str | Path | Sequence[str | Path | tuple[str | Path, float]] | None = None,
    ) -> "Cosmos3":
        """Load a checkpoint in the public or the converted layout.

        The autoencoders come whole: `encode_video` and `encode_sound` read their encoders.

        Args:
            path_or_hub_id: a local folder; a Hub id `owner/name`; `tiny`, the embedded default; or
                `random`, see `frontend.find_checkpoint`.
            dtype: of the weights and of the computation, `bfloat16` or `float32`. The timestep
                embedding and the sampler are always float32.
            load_sound: None loads sound if the checkpoint has it, True insists, False leaves it
                out.
            offload: False loads all parts now, and they stay. True loads none: text tower, media
                tower and autoencoders are read from the checkpoint one after the other, each when
                it is used, and leave the device afterwards; every call reads them again. The
                results are the same. None offloads if the recipe's job would not fit otherwise.
            mesh: the devices and what they divide, with axes `data` (prompts), `cfg` (branches of
                guidance), `seq` (tokens) and `fsdp` (weights, and tokens): a mesh of JAX's, or for
                example `cfg=2,seq=2`. None uses all devices, for each job as suits it; it divides
                the weights if they do not fit whole.
            lora: a LoRA file in diffusers' layout, or a list of files or of (file, factor). They
                are merged into the weights as these are read, and cost nothing afterwards.

        Raises:
            ValueError: the mesh does not fit the devices or the model, or a LoRA changes nothing.
            CheckpointError: the folder is no checkpoint, or its files do not fit the model; or a
                LoRA does not.
            ConfigError: a configuration asks for what is not implemented.
        """
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype={dtype!r} is not supported; choose bfloat16 or float32")
        config, tokenizer = load_frontend(find_checkpoint(path_or_hub_id, False), load_sound)
        loras = [] if lora is None else lora_files.load_scaled(lora, config.transformer)
        job = memory.recipe_sizes(config) | {"dtype": dtype}
        meshes, offload = memory_limits.choose_devices(
            config, device.memory_limit(), mesh, offload, **job
        )
        components = load.open_components(find_checkpoint(path_or_hub_id), config)
        if loras:
            addition = merge_on_read(loras, config.transformer)
            components[0] = dataclasses.replace(components[0], addition=addition)
        weights = Weights.of_checkpoint(components, jnp.dtype(dtype), offload, meshes.weights)
        return cls(config, weights, tokenizer, meshes)

    @property
    def params(self) -> dict:
        """The parameter tree `{"und", "gen", "video_vae"[, "sound_vae"]}`.

        With offload, what is not on the device is read now and stays from then on. Other parameters
        may be put in its place.
        """
        return self.weights.all()

    @params.setter
    def params(self, params: dict) -> None:
        self.weights = Weights(params, self.meshes.weights)

    @_settings_of(prepare_request)
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        output: str = "media",
        return_trajectory: bool = False,
        progress: bool = False,
        decode_chunk_size: int | None = None,
        **settings,
    ) -> dict:
        """Turn prompts into images (`num_frames=1`) or videos, with sound on the same time line if
        asked for, from text alone or going on from an image or a video.

        Args:
            prompt: one prompt or a list of them; a list is a batch.
            output: `media`, or `latents` for the final normalised latents.
            return_trajectory: add every step's latents and clean predictions (see
                `generate.generate`).
            progress: show a bar over the steps.
            decode_chunk_size: latent frames decoded at a time: memory against speed. None
                chooses by size.
            **settings: image or video to start from, sizes, sampler, seeds and prompt style; see
                `prepare.prepare_request`.

        Returns:
            `video`: float32 [B, 3, T, H, W] in [0, 1]; with sound also `sound`: float32
            [B, channels, samples] in [-1, 1], and `sample_rate` in Hz. As latents:
            [B, C, t, h, w] and [B, C_sound, s].

        Raises:
            ValueError: on a value that cannot work, or media that cannot be read.
            FileNotFoundError: on an image or a video that is not there.
            OutOfDeviceMemory: (a ValueError) the device has too little memory. As a rule that is
                known before anything is run.
        """
        _check_output(output)
        request = self.prepare(prompt, **settings)
        job = self._job(request, output, return_trajectory, decode_chunk_size)
        memory_limits.check_fits(**job)
        with memory_limits.exhaustion_explained(**job):
            latents, trajectory = self.denoise(
                request, return_trajectory=return_trajectory, progress=progress
            )
            result = self.decode(latents, decode_chunk_size) if output == "media" else latents
        if trajectory is not None:
            result["trajectory"] = trajectory
        return result

    @_settings_of(prepare_request)
    def warmup(
        self,
        prompt: str | Sequence[str] = "warm-up",
        *,
        text_tokens: int | None = None,
        output: str = "media",
        return_trajectory: bool = False,
        progress: bool = False,
        decode_chunk_size: int | None = None,
        **settings,
    ) -> None:
        """Compile all that `generate` with these arguments would, and run nothing.

        Prompts are padded to a multiple of 128 tokens; one program serves all of one such length.

        Args:
            prompt: one of the length to come, or as many as come in a batch.
            text_tokens: of the longest prompt to come, chat template included, instead of
                `prompt`'s own length.
            output, return_trajectory, progress, decode_chunk_size: as in `generate`.
            **settings: as in `generate`. Of these the sizes, the number of steps, sound, the
                negative prompt's length, the frames read of an image or a video, and whether there
                is guidance count; the rest are arrays.

        Raises:
            ValueError, OutOfDeviceMemory: as `generate` would.
        """
        _check_output(output)
        request = self.prepare(prompt, **settings)
        if text_tokens is not None:
            ids, mask = pad_token_ids([[0] * text_tokens] * len(request.text_ids), TEXT_BUCKET)
            request = request.replace(text_ids=ids, text_mask=mask)
        job = self._job(request, output, return_trajectory, decode_chunk_size)
        memory_limits.check_fits(**job)
        request = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), request)
        with ambient(self._mesh_of(request)):
            self._compile(request, output, return_trajectory, progress, decode_chunk_size)
            self.weights.compile_loading()

    def _compile(
        self,
        request: T2VRequest,
        output: str,
        return_trajectory: bool,
        progress: bool,
        decode_chunk_size: int | None,
    ) -> None:
        structs, config = self.weights.structs, self.config
        if request.clean_video is not None:
            pixels = request.clean_video, request.frame_mask
            given = compile_for(encode_given, structs["video_vae"], *pixels, config=config)
            request = request.replace(**given)
        conditions = compile_for(
            encode_conditions, structs["und"], text_request(request), config=config
        )
        compile_sampling = compile_with_bar if progress else partial(compile_for, sample_latents)
        latents, _ = compile_sampling(
            structs["gen"], conditions, loop_request(request),
            config=config, return_trajectory=return_trajectory,
        )  # fmt: skip
        if output == "media":
            compile_for(
                decode_video, structs["video_vae"], latents["video"], config=config.video_vae,
                chunk_size=decode_chunk_size,
            )  # fmt: skip
        if output == "media" and "sound" in latents:
            compile_for(
                decode_sound, structs["sound_vae"], latents["sound"], config=config.sound_vae
            )

    @property
    def dtype(self) -> str:
        """Of the weights and of the computation."""
        return str(params_dtype(self.weights.structs["video_vae"]))

    @_settings_of(prepare_request)
    def prepare(self, prompt: str | Sequence[str], **settings) -> T2VRequest:
        """Check, read and tokenise everything that one generation needs (see
        `prepare.prepare_request`). Nothing is encoded or compiled yet.
        """
        return prepare_request(self.config, self.tokenizer, prompt, **settings)

    def denoise(
        self, request: T2VRequest, *, return_trajectory: bool = False, progress: bool = False
    ) -> tuple[dict[str, Array], dict | None]:
        """A request -> final latents `{"video"[, "sound"]}`, channels first, and the trajectory or
        None.
        """
        mesh = self._mesh_of(request)
        request = jax.tree.map(partial(reachable, mesh), request)
        with ambient(mesh):
            return self._denoise(request, return_trajectory, progress)

    def _denoise(
        self, request: T2VRequest, return_trajectory: bool, progress: bool
    ) -> tuple[dict[str, Array], dict | None]:
        if request.clean_video is not None:
            pixels = request.clean_video, request.frame_mask
            with self.weights.borrow("video_vae") as vae:
                given = jax.block_until_ready(encode_given(vae, *pixels, config=self.config))
            request = request.replace(**given)
        with self.weights.borrow("und") as und:
            conditions = encode_conditions(und, text_request(request), config=self.config)
            jax.block_until_ready(conditions)
        sample = sample_with_bar if progress else sample_latents
        with self.weights.borrow("gen") as gen:
            result = sample(
                gen,
                conditions,
                loop_request(request),
                config=self.config,
                return_trajectory=return_trajectory,
            )
            return jax.block_until_ready(result)

    def decode(self, latents: dict[str, Array], chunk_size: int | None = None) -> dict:
        """Final latents, channels first -> `video` and, with sound, `sound` and `sample_rate`."""
        result = {"video": self.decode_video(latents["video"], chunk_size)}
        if "sound" in latents:
            result["sound"] = self.decode_sound(latents["sound"])
            result["sample_rate"] = self.config.sound_vae.sampling_rate
        return result

    def decode_video(self, latents: Array, chunk_size: int | None = None) -> Array:
        """Normalised latents [B, C, t, h, w] -> video [B, 3, T, H, W] in [0, 1], T = 4 (t - 1) + 1.

        Raises ValueError on another number of axes or channels.
        """
        _check_axes("latents", latents, "[B, C, t, h, w]", self.config.video_vae.z_dim)
        config = self.config.video_vae
        with self._autoencoder("video_vae", latents) as (params, latents):
            video = decode_video(params, latents, config=config, chunk_size=chunk_size)
            return jax.block_until_ready(video)

    def encode_video(self, video: Array, chunk_size: int = 1) -> Array:
        """Video [B, 3, T, H, W] in [0, 1], T = 4k + 1 -> normalised latents [B, C, t, h, w]: the
        posterior's mean.

        Raises ValueError on another shape, and on integers.
        """
        _check_axes("video", video, "[B, 3, T, H, W]", 3)
        config = self.config.video_vae
        with self._autoencoder("video_vae", video) as (params, video):
            latents = encode_video(params, video, config=config, chunk_size=chunk_size)
            return jax.block_until_ready(latents)

    def decode_sound(self, latents: Array) -> Array:
        """Latents [B, C_sound, s] -> waveform [B, channels, samples] in [-1, 1].

        Raises ValueError on another number of axes or channels, and on a model without sound.
        """
        self._check_sound()
        channels = self.config.transformer.sound_dim
        _check_axes("sound latents", latents, "[B, C_sound, s]", channels)
        with self._autoencoder("sound_vae", latents) as (params, latents):
            sound = decode_sound(params, latents, config=self.config.sound_vae)
            return jax.block_until_ready(sound)

    def encode_sound(self, waveform: Array) -> Array:
        """Waveform [B, channels, samples] in [-1, 1] -> latents [B, C_sound, s]; the last frame is
        padded.

        Raises ValueError on another number of axes or channels, on integers, and on a model without
        sound.
        """
        self._check_sound()
        channels = self.config.sound_vae.dec_out_channels
        _check_axes("waveform", waveform, "[B, channels, samples]", channels)
        with self._autoencoder("sound_vae", waveform) as (params, waveform):
            latents = encode_sound(params, waveform, config=self.config.sound_vae)
            return jax.block_until_ready(latents)

    def _mesh_of(self, request: T2VRequest) -> Mesh | None:
        return self.meshes.of(len(request.text_ids), request.neg_text_ids is not None)

    @contextmanager
    def _autoencoder(self, part: str, array: Array) -> Iterator[tuple[dict, Array]]:
        """Its parameters, and the array on its devices."""
        mesh = self.meshes.of(len(array), guidance=True)
        with ambient(mesh), self.weights.borrow(part) as params:
            yield params, reachable(mesh, array)

    def _job(
        self, request: T2VRequest, output: str, trajectory: bool, chunk_size: int | None
    ) -> dict:
        """What `memory_limits` asks about a generation."""
        return memory.request_sizes(self.config, request) | {
            "config": self.config,
            "limit_bytes": device.memory_limit(),
            "offload": not self.weights.resident,
            "dtype": self.dtype,
            "mesh": dict(mesh.shape) if (mesh := self._mesh_of(request)) else {},
            "decode": output == "media",
            "decode_chunk_size": chunk_size,
            "trajectory_steps": request.num_inference_steps if trajectory else 0,
        }

    def _check_sound(self) -> None:
        if "sound_vae" not in self.weights.structs:
            raise ValueError("this checkpoint was loaded without sound, or has none")


def _check_axes(name: str, array: Array, axes: str, channels: int) -> None:
    """Raise unless these are floats with as many axes, and as many channels on the second."""
    shape, dtype = np.shape(array), jnp.result_type(array)
    if len(shape) != len(axes.split()) or shape[1] != channels:
        raise ValueError(f"{name} of shape {shape}: expected {axes}, with {channels} channels")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} of {dtype}: give floats; pixels are divided by 255")


def _check_output(output: str) -> None:
    if output not in ("media", "latents"):
        raise ValueError(f"output={output!r} is unknown; choose media or latents")
