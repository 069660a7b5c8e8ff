"""Cosmos3: a checkpoint on the device, and prompts turned into videos with it.

This is the stateful shell around the pure `generate`: it reads files, tokenises, draws noise,
compiles and shows progress. Research code that wants none of that calls `prepare` once and then
`generate` itself.

Axes: B batch, C channels, T frames, H rows, W columns; latents t, h, w; s sound latents.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import tqdm
from jax import Array

from cosmos3_jax import sound_vae, tiny, video_vae
from cosmos3_jax.checkpoint import load
from cosmos3_jax.config import Config
from cosmos3_jax.generate import (
    T2VRequest,
    channels_first,
    channels_last,
    decode,
    denoise,
    params_dtype,
)
from cosmos3_jax.prompt import Tokenizer
from cosmos3_jax.request import prepare_request

_denoise = jax.jit(denoise, static_argnames=("config", "on_step", "return_trajectory"))
_decode = jax.jit(decode, static_argnames=("config", "chunk_size"))
_encode_video = jax.jit(video_vae.encode, static_argnames=("config", "chunk_size", "dtype"))
_encode_sound = jax.jit(sound_vae.encode, static_argnames=("config", "dtype"))
_decode_sound = jax.jit(sound_vae.decode, static_argnames=("config", "dtype"))


class _Progress:
    """What a compiled loop calls back. One for all models: the compiled program keeps it alive."""

    bar: tqdm.tqdm | None = None

    def __call__(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update()


_progress = _Progress()


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
        params: the parameter tree `{"und", "gen", "video_vae"[, "sound_vae"]}`.
        tokenizer: its tokenizer and chat template.
    """

    def __init__(self, config: Config, params: dict, tokenizer: Tokenizer):
        self.config, self.params, self.tokenizer = config, params, tokenizer

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, dtype: str = "bfloat16", load_sound: bool | None = None
    ) -> "Cosmos3":
        """Load a checkpoint in the public or the converted layout.

        The autoencoders come whole: `encode_video` and `encode_sound` read their encoders.

        Args:
            path_or_hub_id: a local folder; a Hub id `owner/name`; or `tiny`, the embedded default.
            dtype: of the weights and of the computation, `bfloat16` or `float32`. The timestep
                embedding and the sampler are always float32.
            load_sound: None loads sound if the checkpoint has it, True insists, False leaves it
                out.

        Raises:
            CheckpointError: the folder is no checkpoint, or its files do not fit the model.
            ConfigError: a configuration asks for what is not implemented.
        """
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"dtype={dtype!r} is not supported; choose bfloat16 or float32")
        config, tokenizer = load_frontend(find_checkpoint(path_or_hub_id, False), load_sound)
        folder = find_checkpoint(path_or_hub_id)
        params = load.load_params(load.open_components(folder, config), jnp.dtype(dtype))
        return cls(config, params, tokenizer)

    @_settings_of(prepare_request)
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        output: str = "media",
        return_trajectory: bool = False,
        progress: bool = False,
        decode_chunk_size: int = 1,
        **settings,
    ) -> dict:
        """Turn prompts into videos, with sound on the same time line if asked for.

        Args:
            prompt: one prompt or a list of them; a list is a batch.
            output: `media`, or `latents` for the final normalised latents.
            return_trajectory: add every step's latents and clean predictions (see
                `generate.generate`).
            progress: show a bar over the steps.
            decode_chunk_size: latent frames decoded at a time: memory against speed.
            **settings: sizes, sampler, seeds and prompt style; see `request.prepare_request`.

        Returns:
            `video`: float32 [B, 3, T, H, W] in [0, 1]; with sound also `sound`: float32
            [B, channels, samples] in [-1, 1], and `sample_rate` in Hz. As latents:
            [B, C, t, h, w] and [B, C_sound, s].
        """
        if output not in ("media", "latents"):
            raise ValueError(f"output={output!r} is unknown; choose media or latents")
        request = self.prepare(prompt, **settings)
        latents, trajectory = self.denoise(
            request, return_trajectory=return_trajectory, progress=progress
        )
        result = self.decode(latents, decode_chunk_size) if output == "media" else latents
        if trajectory is not None:
            result["trajectory"] = trajectory
        return result

    @_settings_of(prepare_request)
    def prepare(self, prompt: str | Sequence[str], **settings) -> T2VRequest:
        """Check and tokenise everything that one generation needs (see
        `request.prepare_request`).
        """
        return prepare_request(self.config, self.tokenizer, prompt, **settings)

    def denoise(
        self, request: T2VRequest, *, return_trajectory: bool = False, progress: bool = False
    ) -> tuple[dict[str, Array], dict | None]:
        """A request -> final latents `{"video"[, "sound"]}`, channels first, and the trajectory or
        None.
        """
        if progress:
            _progress.bar = tqdm.tqdm(
                total=request.num_inference_steps, unit="step", desc="denoise"
            )
        try:
            latents, trajectory = _denoise(
                self.params,
                request,
                config=self.config,
                on_step=_progress if progress else None,
                return_trajectory=return_trajectory,
            )
            jax.block_until_ready(latents)
            jax.effects_barrier()
        finally:
            if progress:
                _progress.bar.close()
        if trajectory is not None:
            trajectory = {
                name: jax.vmap(channels_first)(states) for name, states in trajectory.items()
            }
        return channels_first(latents), trajectory

    def decode(self, latents: dict[str, Array], chunk_size: int = 1) -> dict:
        """Final latents, channels first -> `video` and, with sound, `sound` and `sample_rate`."""
        latents = channels_last(latents["video"], latents.get("sound"))
        result = dict(_decode(self.params, latents, config=self.config, chunk_size=chunk_size))
        if "sound" in result:
            result["sample_rate"] = self.config.sound_vae.sampling_rate
        return result

    def encode_sound(self, waveform: Array) -> Array:
        """Waveform [B, channels, samples] in [-1, 1] -> latents [B, C_sound, s]; the last frame is
        padded.
        """
        params = self._sound_params()
        latents = _encode_sound(params, self.config.sound_vae, waveform, dtype=params_dtype(params))
        return einops.rearrange(latents, "b s c -> b c s")

    def decode_sound(self, latents: Array) -> Array:
        """Latents [B, C_sound, s] -> waveform [B, channels, samples] in [-1, 1]."""
        params = self._sound_params()
        latents = einops.rearrange(latents, "b c s -> b s c")
        return _decode_sound(params, self.config.sound_vae, latents, dtype=params_dtype(params))

    def decode_video(self, latents: Array, chunk_size: int = 1) -> Array:
        """Normalised latents [B, C, t, h, w] -> video [B, 3, T, H, W] in [0, 1]."""
        return self.decode({"video": latents}, chunk_size)["video"]

    def encode_video(self, video: Array, chunk_size: int = 1) -> Array:
        """Video [B, 3, T, H, W] in [0, 1], T = 4k + 1 -> normalised latents [B, C, t, h, w]."""
        params = self.params["video_vae"]
        latents = _encode_video(
            params, self.config.video_vae, video, chunk_size=chunk_size, dtype=params_dtype(params)
        )
        return einops.rearrange(latents, "b t h w c -> b c t h w")

    def _sound_params(self) -> dict:
        if "sound_vae" not in self.params:
            raise ValueError("this checkpoint was loaded without sound, or has none")
        return self.params["sound_vae"]


def find_checkpoint(path_or_hub_id: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint: itself, the embedded default for `tiny`, or a Hub
    download.
    """
    if str(path_or_hub_id) == tiny.NAME and not Path(path_or_hub_id).is_dir():
        return tiny.tiny_checkpoint()
    return load.find_checkpoint(path_or_hub_id, weights)


def load_frontend(folder: Path, load_sound: bool | None = None) -> tuple[Config, Tokenizer]:
    """The configuration and tokenizer of a checkpoint folder: what `prepare_request` needs, no
    weights.

    Raises:
        CheckpointError: the folder is no checkpoint, or its tokenizer belongs to another one.
    """
    config = load.load_config(folder, load_sound)
    tokenizer = Tokenizer.from_folder(folder / load.TOKENIZER_FOLDER)
    if tokenizer.vocab_size > config.transformer.vocab_size:
        raise load.CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the transformer "
            f"{config.transformer.vocab_size} embeddings; they belong to different checkpoints"
        )
    return config, tokenizer
