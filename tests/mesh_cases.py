"""What `parallel/test_sharding.py` asks of eight simulated devices, run in a process that has them.

It prints one JSON object: the result of each case, by its name. Axes as in `sampling.denoise`.
"""

import json
import math
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import quick
from rounding import farthest, relative_l2, sensitivity

from cosmos3_jax import Cosmos3, T2VRequest, generate
from cosmos3_jax.checkpoint import random_checkpoint
from cosmos3_jax.config import Config, TransformerConfig, VideoVAEConfig
from cosmos3_jax.models import transformer, video_vae
from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.mesh import Meshes, make_mesh, parse_mesh
from cosmos3_jax.sampling import unipc

MODEL = TransformerConfig(
    hidden_size=80, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, head_dim=16,
    intermediate_size=96, vocab_size=128, rope_axes_dim=(4, 2, 2),
)  # fmt: skip
CONFIG = Config(transformer=MODEL)
VAE = VideoVAEConfig(base_dim=8, decoder_base_dim=8, num_res_blocks=1)
STEPS = 2
XLA_FLAGS = quick.simulated(8)

GENERATE = {  # mesh, prompts, sound latents, latent grid
    "cfg2": ("cfg=2", 1, 0, (3, 3, 5)),
    "seq4": ("seq=4", 1, 0, (3, 4, 6)),
    "seq4, odd, with sound": ("seq=4", 1, 5, (3, 3, 5)),
    "data2 x cfg2 x seq2, sound": ("data=2,cfg=2,seq=2", 2, 4, (3, 3, 5)),
    "data2": ("data=2", 2, 0, (3, 3, 5)),
    "fsdp4, sound": ("fsdp=4", 1, 5, (3, 3, 5)),
}
VIDEO = {  # mesh, videos, rows of latents
    "seq4 x cfg2, odd": ("seq=4,cfg=2", 1, 3),
    "data2 x fsdp2, odd": ("data=2,fsdp=2", 2, 3),
    "data2 x cfg2 x seq2, odd": ("data=2,cfg=2,seq=2", 2, 5),
}
SWAP = "data2 x fsdp2, odd"  # two devices share a picture, and swap rows in one exchange
DIFFERENTIATED = SWAP, "data2 x cfg2 x seq2, odd"
# The kind, the dtype and shape of the results, and where in the program it comes from.
COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\(.*?op_name=\"([^\"]*)\""
)


def collectives(text: str) -> list[dict]:
    """Every collective of a compiled program: kind, elements of its result, origin, and whether it
    is in a loop.
    """
    found, entry = [], False
    for line in text.splitlines():
        if line.startswith(("ENTRY", "%")):  # a computation begins
            entry = line.startswith("ENTRY")
        if match := COLLECTIVE.search(line):
            shapes, kind, origin = match.groups()
            arrays = [
                [int(n) for n in filter(None, shape.split(","))]
                for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
            ]
            found.append(
                {"kind": kind, "size": sum(map(math.prod, arrays)), "shapes": arrays,
                 "origin": origin, "looped": not entry}
            )  # fmt: skip
    return found


def kernel_shapes() -> list[list[int]]:
    """Of the matrices of one layer: qkv, out, gate and up, down."""
    heads, size = MODEL.num_attention_heads, MODEL.head_dim
    width, inner = MODEL.hidden_size, MODEL.intermediate_size
    qkv = [width, heads + 2 * MODEL.num_key_value_heads, size]
    return [qkv, [heads, size, width], [width, 2, inner], [inner, width]]


def random_params(shapes: dict) -> dict:
    random = np.random.RandomState(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = random.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return 1 + 0.1 * values
        stacked = any(key.key == "layers" for key in path)
        inputs = math.prod(leaf.shape[stacked:-1])
        return values / np.sqrt(inputs) if len(leaf.shape) > 1 + stacked else 0.1 * values

    return jax.tree_util.tree_map_with_path(draw, shapes)


def request(batch: int, sound: int, shape: tuple) -> T2VRequest:
    random = np.random.RandomState(1)
    ids = [random.randint(0, 128, (batch, tokens)).astype(np.int32) for tokens in (16, 24)]
    lengths = [random.randint(tokens // 2, tokens, (batch, 1)) for tokens in (16, 24)]
    masks = [np.arange(x.shape[1]) < length for x, length in zip(ids, lengths, strict=True)]
    mask = np.zeros((batch, shape[0]), bool)
    mask[:, 0] = True
    sound_noise = random.standard_normal((batch, 64, sound))
    return T2VRequest(
        text_ids=ids[0], text_mask=masks[0], neg_text_ids=ids[1], neg_text_mask=masks[1],
        video_shape=shape, num_inference_steps=STEPS, guidance_scale=np.float32(3),
        fps=np.float32(24), noise=random.standard_normal((batch, 48, *shape)).astype(np.float32),
        sound_frames=sound,
        sound_noise=sound_noise.astype(np.float32) if sound else None,
        sampler=unipc.tableau(unipc.sigmas("native", STEPS)),
        clean_latents=random.standard_normal((batch, 48, *shape)).astype(np.float32),
        frame_mask=mask,
    )  # fmt: skip


# Results of one device, and their sensitivities, of each function of inputs of each shape.
ALONE = {}


def alone(function, params: dict, inputs) -> tuple:
    shapes = str(jax.tree.map(np.shape, inputs))
    if (function, shapes) not in ALONE:
        run = jax.jit(function)
        ALONE[function, shapes] = run(params, inputs), sensitivity(run, params, inputs)
    return ALONE[function, shapes]


def mesh_of(name: str) -> jax.sharding.Mesh:
    """With its axes in the order of the name, as in a mesh that a user made."""
    sizes = parse_mesh(name)
    if list(sizes) == [axis for axis in sharding.AXES if axis in sizes]:
        return make_mesh(sizes)
    devices = np.asarray(jax.devices()[: math.prod(sizes.values())])
    return jax.sharding.Mesh(devices.reshape([*sizes.values()]), tuple(sizes))


def on_mesh(name: str, function, params: dict, inputs) -> dict:
    """A function of parameters and inputs on a mesh: how far off one device's, how far that moves
    by rounding, and what the mesh moves.
    """
    mesh = mesh_of(name)
    placed = sharding.place_params(params, mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(placed, inputs).compile()
        ours = compiled(placed, inputs)
    expected, moved = alone(function, params, inputs)
    leaves = jax.tree.leaves(placed)
    return {
        "error": farthest(ours, expected),
        "sensitivity": moved,
        "collectives": collectives(compiled.as_text()),
        "shards": [str(x.sharding.spec) for x in jax.tree.leaves(ours)],
        "held": sum(x.addressable_shards[0].data.size for x in leaves),
        "weights": sum(x.size for x in leaves),
    }


def transforms(params: dict) -> dict:
    """`jax.grad` by the noise, and `jax.vmap` over guidance scales, on a mesh and on one device."""
    inputs = request(1, 5, (3, 3, 5))
    target = jax.tree.map(lambda x: 0.1 * x, inputs.noise)

    def loss(noise, params, inputs):
        out = generate(params, inputs.replace(noise=noise), config=CONFIG, output="latents")
        return ((out["video"] - target) ** 2).sum() + (out["sound"] ** 2).sum()

    def scaled(params, inputs):
        def one(scale):
            return generate(
                params, inputs.replace(guidance_scale=scale), config=CONFIG, output="latents"
            )

        return jax.vmap(one)(np.float32([1.5, 3]))

    gradient = on_mesh("cfg=2,seq=2", lambda p, x: jax.grad(loss)(x.noise, p, x), params, inputs)
    return {"gradient": gradient, "vmap": on_mesh("cfg=2,seq=2", scaled, params, inputs)}


def whole_model() -> dict:
    """`Cosmos3` from a checkpoint on a mesh: warmed up, then run, beside one device."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    settings = dict(
        num_frames=5, height=48, width=32, num_inference_steps=2, sound=True, output="latents"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "heads")
        one, many = (
            Cosmos3.from_pretrained(Path(folder) / "heads", "float32", mesh=mesh)
            for mesh in ("data=1", "cfg=2,seq=2,fsdp=2")
        )

    expected = one.generate("A red ball.", seed=1, **settings)
    many.warmup(**settings)
    compiled.clear()
    ours = many.generate("A red ball.", seed=1, **settings)
    errors = [relative_l2(ours[name], expected[name]) for name in expected]
    return {"compiled_after_warmup": len(compiled), "error": float(np.max(errors))}


def default_meshes() -> list:
    """What is chosen where nobody asks."""
    everything = jax.devices()
    with mock.patch.object(jax, "devices", lambda: everything[:3]):
        found = [("3 devices", Meshes(None, 8).weights)]
    two_heads = Meshes(None, 2)
    found.append(("8 devices, 2 heads", two_heads.of(1, guidance=True)))
    found.append(("8 devices, 2 heads, no guidance", two_heads.of(1, guidance=False)))
    return [(name, dict(made.shape)) for name, made in found]


def write_checkpoint(folder: Path) -> None:
    """`random` with four key/value heads, which eight devices can share out."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}
    parts = {
        "TRANSFORMER": heads, "VIDEO_VAE": {"base_dim": 8, "decoder_base_dim": 8},
    }  # fmt: skip
    changed = {name: getattr(random_checkpoint, name) | values for name, values in parts.items()}
    with mock.patch.multiple(random_checkpoint, **changed):
        random_checkpoint.write(folder)


def decode(params: dict, latents: np.ndarray) -> jax.Array:
    return video_vae.decode(params, VAE, latents)


def encode(params: dict, pixels: np.ndarray) -> jax.Array:
    return video_vae.encode(params, VAE, pixels)


def gradient_of_decode(params: dict, latents: np.ndarray) -> jax.Array:
    """By the latents; unclipped, for a clipped pixel has none."""
    return jax.grad(lambda z: (video_vae.decode(params, VAE, z, clip=False) ** 2).mean())(latents)


def main() -> dict:
    params = random_params(transformer.param_shapes(MODEL))
    params["gen"] = jax.tree.map(np.asarray, transformer.unstack_layers(params["gen"]))
    run = partial(generate, config=CONFIG, output="latents")
    results = {}
    for name, (mesh, *sizes) in GENERATE.items():
        results[f"generate {name}"] = on_mesh(mesh, run, params, request(*sizes))
    vae = random_params(video_vae.param_shapes(VAE))
    for name, (mesh, batch, rows) in VIDEO.items():
        random = np.random.RandomState(2)
        latents = random.standard_normal((batch, 3, rows, 2, 48)).astype(np.float32)
        results[f"decode {name}"] = on_mesh(mesh, decode, vae, latents)
        pixels = random.uniform(size=(batch, 3, 9, 16 * rows, 32)).astype(np.float32)
        results[f"encode {name}"] = on_mesh(mesh, encode, vae, pixels)
        if name in DIFFERENTIATED:
            results[f"gradient of decode {name}"] = on_mesh(mesh, gradient_of_decode, vae, latents)
    return results | transforms(params) | {
        "model": whole_model(), "default meshes": default_meshes(),
    }  # fmt: skip


if __name__ == "__main__":
    json.dump(main(), sys.stdout)
