"""A media sequence of several items, and given frames of any modality, against diffusers' tower.

Controls that share the target's positions are transfer, a source image before the target is
editing: neither needs code of the tower's own.
"""

import jax
import numpy as np
import pytest
import torch
from rounding import check, relative_l2
from training_cases import oracle, params
from training_run import CONFIG

from cosmos3_jax.models.rope import Item
from cosmos3_jax.models.transformer import encode_condition, velocity

# One unit in the last place moves the velocity by 8e-7.
TOLERANCE = 1e-5
MISTAKE = 1e-3  # wrong positions are 7e-2 off, a time embedding on what is given 1e-2
TEXT, TIMESTEP, FPS = 7, 909.0, 24.0
FRAMES, HEIGHT, WIDTH = 3, 4, 6
ROWS, COLUMNS = 2, 3  # of patches
PATCHES = ROWS * COLUMNS
MARGIN = CONFIG.unified_3d_mrope_temporal_modality_margin


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


IDS = np.random.RandomState(9).randint(0, CONFIG.vocab_size, TEXT)


def grid(frames: int, offset: float) -> torch.Tensor:
    """Positions [3, patches] of an item; at 24 fps a latent frame is one position."""
    time, rows, columns = torch.meshgrid(
        torch.arange(frames) + TEXT + MARGIN + offset, torch.arange(ROWS), torch.arange(COLUMNS),
        indexing="ij",
    )  # fmt: skip
    return torch.stack([x.flatten().float() for x in (time, rows, columns)])


def diffusers_velocity(items: list, offsets: list, given: list) -> np.ndarray:
    """Of the last item. `given`: of each item's frames, which are; a sequence item by item."""
    text = torch.arange(TEXT).float().expand(3, -1)
    frames = [len(item) for item in items]
    positions = [grid(n, offset) for n, offset in zip(frames, offsets, strict=True)]
    noisy = [torch.tensor(np.flatnonzero(~mask)) for mask in given]
    first, tokens = TEXT, []
    for n, mask in zip(frames, given, strict=True):
        in_frame = torch.arange(PATCHES) + first
        tokens += [in_frame + t * PATCHES for t in np.flatnonzero(~mask)]
        first += n * PATCHES
    loss = torch.cat(tokens)
    with torch.no_grad():
        out = oracle()(
            torch.from_numpy(IDS), torch.arange(TEXT), torch.cat([text, *positions], 1), TEXT,
            first, [torch.from_numpy(x).permute(3, 0, 1, 2)[None] for x in items],
            [(n, ROWS, COLUMNS) for n in frames], torch.arange(TEXT, first), loss,
            torch.full((len(loss),), TIMESTEP), noisy, return_dict=False,
        )  # fmt: skip
    return out[0][-1][0].permute(1, 2, 3, 0).numpy()


encode = jax.jit(
    encode_condition, static_argnames=("config", "video_shape", "sound_frames", "items")
)
step = jax.jit(velocity, static_argnames="config")


def our_velocity(params: dict, items: list, offsets: list, given: list) -> np.ndarray:
    video = np.concatenate(items)[None]
    condition = encode(
        params["und"], CONFIG, IDS[None], np.ones((1, TEXT), bool), video_shape=video.shape[1:4],
        fps=FPS, clean={"video": video}, given={"video": np.concatenate(given)[None]},
        items=tuple(Item(len(x), float(at)) for x, at in zip(items, offsets, strict=True)),
    )  # fmt: skip
    found = step(params["gen"], CONFIG, condition, {"video": video}, TIMESTEP)["video"]
    return np.asarray(found[0, -len(items[-1]) :])


def all_of(frames: int) -> np.ndarray:
    return np.ones(frames, bool)


SEQUENCES = {
    # Two controls and a target whose first frame is given, all at the same positions.
    "transfer": (
        [draw(FRAMES, HEIGHT, WIDTH, CONFIG.latent_channel, seed=i) for i in range(3)],
        [0, 0, 0],
        [all_of(FRAMES), all_of(FRAMES), np.arange(FRAMES) == 0],
        [0, FRAMES, 2 * FRAMES],
    ),
    # A source image, and the image that it becomes a position later.
    "editing": (
        [draw(1, HEIGHT, WIDTH, CONFIG.latent_channel, seed=i) for i in range(2)],
        [0, 1],
        [all_of(1), ~all_of(1)],
        [0, 0],
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_items_have_positions_of_their_own(record_property, name):
    items, offsets, given, wrong = SEQUENCES[name]
    expected = diffusers_velocity(items, offsets, given)
    assert relative_l2(our_velocity(params(), items, offsets, given), expected) <= TOLERANCE
    assert relative_l2(our_velocity(params(), items, wrong, given), expected) > MISTAKE
    alone = our_velocity(params(), items[-1:], [offsets[-1]], given[-1:])
    assert relative_l2(alone, expected) > MISTAKE  # what stands before is attended to
    check(
        record_property, TOLERANCE,
        lambda params, items: our_velocity(params, items, offsets, given), params(), items,
    )  # fmt: skip


def test_given_sound_has_no_time_and_no_velocity():
    """Video from sound: a mask of frames for sound as for video."""
    sound_frames = 9
    video = draw(1, FRAMES, HEIGHT, WIDTH, CONFIG.latent_channel)
    sound = draw(1, sound_frames, CONFIG.sound_dim, seed=1)
    positions = torch.cat(
        [
            torch.arange(TEXT).float().expand(3, -1),
            grid(FRAMES, 0),
            torch.stack(
                [
                    torch.arange(sound_frames) / CONFIG.sound_latent_fps * 24 + TEXT + MARGIN,
                    *torch.zeros(2, sound_frames),
                ]
            ),
        ],
        dim=1,
    )
    end, empty = TEXT + FRAMES * PATCHES, torch.zeros(0, dtype=torch.long)
    patches, frames = torch.arange(TEXT, end), torch.arange(FRAMES)
    with torch.no_grad():
        out = oracle()(
            torch.from_numpy(IDS), torch.arange(TEXT), positions, TEXT, end + sound_frames,
            [torch.from_numpy(video).permute(0, 4, 1, 2, 3)], [(FRAMES, ROWS, COLUMNS)], patches,
            patches, torch.full((len(patches),), TIMESTEP), [frames],
            sound_tokens=[torch.from_numpy(sound[0]).T],
            sound_token_shapes=[(sound_frames, 1, 1)],
            sound_sequence_indexes=torch.arange(end, end + sound_frames),
            sound_mse_loss_indexes=empty, sound_timesteps=torch.zeros(0),
            sound_noisy_frame_indexes=[empty], return_dict=False,
        )  # fmt: skip
    expected = out[0][0][0].permute(1, 2, 3, 0).numpy()

    def ours(given: np.ndarray, clean: np.ndarray, held: np.ndarray) -> dict:
        condition = encode(
            params()["und"], CONFIG, IDS[None], np.ones((1, TEXT), bool),
            video_shape=video.shape[1:4], fps=FPS, sound_frames=sound_frames,
            clean={"sound": clean}, given={"sound": given},
        )  # fmt: skip
        latents = {"video": video, "sound": held}
        return step(params()["gen"], CONFIG, condition, latents, TIMESTEP)

    known = np.ones((1, sound_frames), bool)
    found = ours(known, sound, np.full_like(sound, np.nan))
    assert relative_l2(found["video"][0], expected) <= TOLERANCE
    assert (found["sound"] == 0).all()
    noisy = ours(~known, sound, sound)
    assert relative_l2(noisy["video"][0], expected) > MISTAKE
