"""The tiny world's pictures and sounds: scenes -> pixels and samples, in jax.numpy.

One program draws a whole batch, on a GPU or a CPU, and all of its shapes are fixed: training makes
its clips as it goes. Shapes are drawn from signed distances with an edge one pixel wide, so they
move by fractions of a pixel. Every bounce sounds a tone: a soft onset, two harmonics, an
exponential decay, panned to where it happened.

Axes: B batch, T frames, H rows, W columns, O objects (2), A axes (x, y), E events, S samples.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax import sound_latent_length
from cosmos3_jax.config import SoundVAEConfig
from examples.tiny import scenes as sc
from examples.tiny.scenes import Scene

SAMPLE_RATE = 48_000
SAMPLES_PER_LATENT = 1_920
SIZE = 96
ONSET, DECAY = 0.004, 0.13  # seconds
HARMONICS = (1.0, 0.3, 0.12)
LOUDNESS = 0.93  # the peak is then close to 0.92 for every pitch
NEVER = 1e6  # the time of an event that does not happen


def sound_samples(frames: int = sc.FRAMES, fps: float = sc.FPS) -> int:
    """Samples of the sound of a clip: whole latents of the model, up to 1,919 more than the video
    lasts. 49 frames at 24 a second give 52 latents, 99,840 samples.
    """
    return sound_latent_length(SoundVAEConfig(), frames, fps) * SAMPLES_PER_LATENT


def arrays(scene: Scene) -> dict[str, np.ndarray]:
    """What `draw` and `ring` read of a scene: float32 arrays of fixed shapes, and two indices."""
    found = sc.bodies(scene)
    both = [found[0], found[-1]]
    events = sc.bounces(scene)[: sc.MAX_BOUNCES]
    empty = sc.MAX_BOUNCES - len(events)
    colours = [sc.colour_rgb(scene.colour), sc.colour_rgb(scene.other or scene.colour)]
    values = {
        "position": [body.position for body in both],  # [O, A], as the next three
        "velocity": [body.velocity for body in both],
        "low": [body.low for body in both],
        "high": [body.high for body in both],
        "colour": np.array(colours) / 255,  # [O, 3]
        "visible": [1.0, float(scene.other is not None)],  # [O]
        "radius": scene.radius,
        "background": np.array(sc.BACKGROUNDS[scene.background]) / 255,  # [ground and mark, 3]
        "times": [event.time for event in events] + [NEVER] * empty,  # [E]
        "places": [event.x / sc.WORLD for event in events] + [0.5] * empty,  # [E], 0 left, 1 right
        "hertz": sc.pitch_hz(scene.pitch) if scene.pitch else 440.0,
    }
    indices = {
        "shape": np.int32(sc.SHAPES.index(scene.shape)),
        "pattern": np.int32(sc.PATTERNS.index(scene.pattern)),
    }
    return {name: np.asarray(value, np.float32) for name, value in values.items()} | indices


def stack(scenes: Sequence[Scene]) -> dict[str, np.ndarray]:
    """`arrays` of several scenes with a leading B."""
    each = [arrays(scene) for scene in scenes]
    return {name: np.stack([one[name] for one in each]) for name in each[0]}


def distance(shape: jax.Array, x: jax.Array, y: jax.Array, radius: jax.Array) -> jax.Array:
    """Signed distance to the edge of a shape about its centroid, negative inside; exact inside,
    and near enough outside for an edge one pixel wide.
    """
    x_side, y_side = jnp.abs(x), jnp.abs(y)
    circle = jnp.sqrt(x**2 + y**2) - radius
    square = jnp.maximum(x_side, y_side) - sc.SQUARE * radius
    # The three sides are at half the circumradius from the centroid.
    slope = x_side * (math.sqrt(3) / 2) - y / 2
    triangle = jnp.maximum(slope, y) - sc.TRIANGLE / 2 * radius
    arms = jnp.minimum(
        jnp.maximum(x_side - sc.CROSS * radius, y_side - sc.CROSS_ARM * radius),
        jnp.maximum(x_side - sc.CROSS_ARM * radius, y_side - sc.CROSS * radius),
    )
    return jnp.select([shape == i for i in range(4)], [circle, square, triangle, arms])


def marks(pattern: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """How much of a pattern's second tone is at (x, y), from 0 to 1; edges are about a unit wide.

    Stripes and dots repeat every 16 units and squares every 32: what one latent sees.
    """
    stripes = 0.5 + _triangle(x, 16.0)
    across, along = _triangle(x, 32.0), _triangle(y, 32.0)
    checks = 0.5 + jnp.sign(across * along) * jnp.minimum(jnp.abs(across), jnp.abs(along))
    dots = 4.2 - jnp.sqrt(((x % 16) - 8) ** 2 + ((y % 16) - 8) ** 2)
    plain = jnp.zeros_like(dots)
    tones = [plain, stripes, checks, dots + 0.5]
    return jnp.clip(jnp.select([pattern == i for i in range(4)], tones), 0, 1)


def _triangle(x: jax.Array, period: float) -> jax.Array:
    """A triangle wave of slope one, zero at every half period: distance to the nearest edge."""
    phase = x % period
    return jnp.where(phase < period / 2, 1, -1) * (
        jnp.minimum(phase % (period / 2), period / 2 - phase % (period / 2))
    )


def draw(scene: Mapping[str, jax.Array], frames: int, fps: float, size: int) -> jax.Array:
    """Pixels of one scene: float32 [T, H, W, 3] in [0, 1]."""
    scale = sc.WORLD / size
    axis = (jnp.arange(size) + 0.5) * scale
    x, y = axis[None, :], axis[:, None]
    ground, mark = scene["background"]
    amount = jnp.broadcast_to(marks(scene["pattern"], x, y), (size, size))
    picture = ground + amount[..., None] * (mark - ground)
    picture = jnp.broadcast_to(picture, (frames, size, size, 3))
    times = jnp.arange(frames) / fps
    span = scene["high"] - scene["low"]  # [O, A]
    path = scene["position"] - scene["low"] + scene["velocity"] * times[:, None, None]  # [T, O, A]
    phase = path % (2 * span)
    centre = scene["low"] + jnp.minimum(phase, 2 * span - phase)
    for i in range(2):
        from_x, from_y = x - centre[:, i, 0, None, None], y - centre[:, i, 1, None, None]
        edge = distance(scene["shape"], from_x, from_y, scene["radius"]) / scale
        cover = (jnp.clip(0.5 - edge, 0, 1) * scene["visible"][i])[..., None]
        picture = picture + cover * (scene["colour"][i] - picture)
    return picture


def ring(scene: Mapping[str, jax.Array], samples: int) -> jax.Array:
    """Sound of one scene: float32 [2, S] in [-1, 1], left and right, at SAMPLE_RATE."""
    since = jnp.arange(samples) / SAMPLE_RATE - scene["times"][:, None]  # [E, S]
    after = jnp.maximum(since, 0)
    envelope = jnp.where(since > 0, (1 - jnp.exp(-after / ONSET)) * jnp.exp(-after / DECAY), 0)
    turn = 2 * jnp.pi * scene["hertz"] * jnp.where(after > 10, 0, after)
    tone = sum(level * jnp.sin((n + 1) * turn) for n, level in enumerate(HARMONICS))
    # The nearer side always has the full level, so a place changes the balance, never the peak.
    right = 0.15 + 0.7 * scene["places"]
    level = jnp.minimum(1, 2 * jnp.stack([1 - right, right]))  # [2, E]
    return jnp.clip(
        LOUDNESS * jnp.einsum("ce,es->cs", level, envelope * tone, precision="highest"), -1, 1
    )


@functools.partial(jax.jit, static_argnames=("frames", "fps", "size", "samples"))
def render_batch(
    batch: Mapping[str, jax.Array],
    frames: int = sc.FRAMES,
    fps: float = sc.FPS,
    size: int = SIZE,
    samples: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draw and ring a whole batch on the device at hand, in one program.

    Args:
        batch: what `stack` returns.
        frames, fps, size: of the clips; `size` is both height and width.
        samples: of the sound; None for whole latents, `sound_samples(frames, fps)`.

    Returns:
        float32 videos [B, T, H, W, 3] in [0, 1] and sounds [B, 2, S] in [-1, 1].
    """
    samples = sound_samples(frames, fps) if samples is None else samples
    videos = jax.vmap(functools.partial(draw, frames=frames, fps=fps, size=size))(batch)
    return videos, jax.vmap(functools.partial(ring, samples=samples))(batch)


def render(
    scene: Scene, frames: int = sc.FRAMES, fps: float = sc.FPS, size: int = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """One clip on the host: video uint8 [T, H, W, 3] and sound float32 [2, S] at SAMPLE_RATE."""
    videos, sounds = render_batch(stack([scene]), frames, fps, size)
    return np.asarray(jnp.round(videos[0] * 255).astype(jnp.uint8)), np.asarray(sounds[0])
