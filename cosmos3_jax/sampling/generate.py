"""The pure generate function: conditions -> scan over steps -> latents -> pixels, waveform.

It composes with `jax.jit`, `jax.grad`, `jax.vmap` and sharding. Only shapes and the number of steps
are static: prompts (of one padded length), noise, guidance scale, fps and sigmas are arrays, and
changing them compiles nothing.
"""

from cosmos3_jax.config import Config
from cosmos3_jax.sampling.request import Request, check_request
from cosmos3_jax.sampling.stages import Stage, Values, initial_values, result_of, walk


def generate(
    params: dict,
    request: Request,
    *,
    config: Config,
    output: str = "media",
    return_trajectory: bool = False,
    decode_chunk_size: int | None = None,
) -> dict:
    """Generate a video, or a video with sound, from noise and from what is given.

    Args:
        params: `{"und", "gen", "video_vae", "sound_vae"}`; the autoencoders are read only for
            media, and the video's encoder for `clean_video`.
        request: see `Request`.
        config: the checkpoint's.
        output: `media` (pixels and waveform) or `latents` (final normalised latents).
        return_trajectory: adds `trajectory`: under `latents` and `clean`, every step's latents and
            clean predictions, stacked on a leading axis K.
        decode_chunk_size: latent frames decoded at a time, see `video_vae.decode`.

    Returns:
        `video`: float32 [B, 3, T, H, W] in [0, 1], or latents [B, C, t, h, w]; with sound also
        `sound`: float32 [B, channels, samples] in [-1, 1], or latents [B, C_sound, s].

    Raises:
        ValueError: if the request's arrays do not fit one another or the model.
    """
    check_request(request, config)
    values = initial_values(
        request, output=output, decode_chunk_size=decode_chunk_size, trajectory=return_trajectory
    )

    def execute(stage: Stage, values: Values) -> Values:
        inputs, static = stage.inputs(values), stage.static(values)
        return stage.function(params[stage.part], *inputs, config=config, **static)

    return result_of(walk(values, execute))
