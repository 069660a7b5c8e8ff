"""The parts of the tiny Cosmos3 as one checkpoint in the public layout.

    python -m examples.tiny.assemble base --video RUN/vae --sound RUN/sound_tokenizer --out BASE
    python -m examples.tiny.assemble recipe --out FOLDER [--steps 24] [--guidance 2.5] [--shift 3]

`base` has trained autoencoders and towers that know nothing yet: what `train_towers` starts from,
and into which it puts what it trained. `recipe` changes what a checkpoint does by default.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from cosmos3_jax.checkpoint import publish, random_checkpoint
from cosmos3_jax.checkpoint.export import write_public_checkpoint
from cosmos3_jax.checkpoint.files import FLOAT_DTYPES, TensorFiles, write_shard
from cosmos3_jax.checkpoint.layouts import transformer_layout
from cosmos3_jax.checkpoint.load import (
    PUBLIC_STEM,
    RECIPE_FILE,
    TOKENIZER_FOLDER,
    load_config,
    open_components,
)
from cosmos3_jax.config import Recipes, SoundVAEConfig, TransformerConfig, VideoVAEConfig
from cosmos3_jax.models.tokenizer import Tokenizer
from examples.tiny import grammar, model
from examples.tiny import tokenizer as tiny_tokenizer

NOTICE_FILE = "NOTICE.md"
SCHEDULER_FILE = "scheduler/scheduler_config.json"
NOTICE = """\
# A tiny Cosmos3

Made from nothing by the scripts in `examples/tiny` of cosmos3_jax: both autoencoders, both towers
and the tokenizer. All of its training data are clips that a program draws (coloured shapes that
move, bounce and ring), with sentences from a grammar. No weights and no data of others are in it.
License: Apache-2.0, as cosmos3_jax.

It makes {num_frames} frames of {height} x {width} pixels at {fps:g} a second, with 48 kHz stereo
sound. It understands the grammar's sentences alone. Combinations of colour, shape, direction and
pitch whose hash says so were held out of training ({held_out} of {combinations}).

Tensors of the public layout that generation never reads (the language head, actions, most of the
text tower's last layer) are zero.

{made}
"""


def write_base(
    folder: Path,
    video: Path,
    sound: Path,
    *,
    seed: int = 0,
    sizes: dict[str, Any] = model.TRANSFORMER,
    recipe: dict[str, Any] = model.RECIPE,
) -> Path:
    """Write a whole checkpoint whose towers are random (see `model.init_params`).

    Args:
        folder: to make; it must not be there.
        video, sound: folders of trained autoencoders in the public layout.
        seed: of the towers.
        sizes: the transformer's; what depends on the autoencoders and the tokenizer is put in.
        recipe: what generation does by default.

    Raises FileExistsError if the folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; remove it or choose another folder")
    with publish.folder(folder) as partial:
        shutil.copytree(video, partial / "vae")
        shutil.copytree(sound, partial / "sound_tokenizer")
        tiny_tokenizer.write(partial / TOKENIZER_FOLDER)
        values = model.transformer_values(
            VideoVAEConfig.from_file(partial / "vae" / "config.json"),
            SoundVAEConfig.from_file(partial / "sound_tokenizer" / "config.json"),
            Tokenizer.from_folder(partial / TOKENIZER_FOLDER).vocab_size,
            sizes,
        )
        config = TransformerConfig.from_dict(values)
        _write_json(partial / "transformer" / "config.json", values)
        _write_json(partial / "model_index.json", model.MODEL_INDEX)
        write_recipe(partial, recipe)
        params = flatten_dict(model.init_params(config, seed), sep="/")
        tensors = {
            rule.key: np.ascontiguousarray(rule.to_public(params[rule.leaf]))
            for rule in transformer_layout(config).rules
        }
        unread = random_checkpoint.unread_shapes(config, values)
        tensors |= {key: np.zeros(shape, np.float32) for key, shape in unread.items()}
        tensors = {key: tensors[key].astype(jnp.bfloat16) for key in sorted(tensors)}
        write_shard(partial / "transformer" / f"{PUBLIC_STEM}.safetensors", tensors)
        check(partial)
    return folder


def write_trained(folder: Path, params: dict, base: Path, made: str) -> Path:
    """Write the base with trained towers in it, in bfloat16; a folder that is there is replaced.

    Args:
        folder: to make.
        params: `{"und", "gen"}`, layers stacked.
        base: of `write_base`.
        made: how the towers were trained, for the notice.
    """
    write_public_checkpoint(folder, params, base, overwrite=True)
    recipe = json.loads((folder / RECIPE_FILE).read_text())
    of_all = list(grammar.combinations())
    notice = NOTICE.format(
        **recipe, made=made, held_out=sum(map(grammar.held_out, of_all)), combinations=len(of_all)
    )
    (folder / NOTICE_FILE).write_text(notice, encoding="utf-8")
    check(folder)
    return folder


def write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    """Write the recipe, and the scheduler's file that makes diffusers sample alike."""
    Recipes(file=recipe)  # or it is none
    _write_json(folder / RECIPE_FILE, recipe)
    _write_json(folder / SCHEDULER_FILE, model.scheduler(recipe))


def change_recipe(folder: Path, settings: dict[str, Any]) -> None:
    """Change what a checkpoint does by default."""
    write_recipe(folder, json.loads((folder / RECIPE_FILE).read_text()) | settings)


def check(folder: Path) -> int:
    """The bytes of a checkpoint. Raises ValueError if they are too many, or weights are not finite;
    CheckpointError if it does not load.
    """
    open_components(folder, load_config(folder))
    for name in ("transformer", "vae", "sound_tokenizer"):
        files = TensorFiles(folder / name, PUBLIC_STEM)
        bad = [key for key in files.shapes if not np.isfinite(files.read(key)).all()]
        if bad:
            raise ValueError(f"{folder / name} has values that are not finite in {', '.join(bad)}")
        wide = [key for key in files.shapes if FLOAT_DTYPES[files.dtypes[key]] != jnp.bfloat16]
        if wide_others := [key for key in wide if not key.startswith("time_embedder.")]:
            raise ValueError(f"{folder / name} is not in bfloat16: {', '.join(wide_others)}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > model.MAX_BYTES:
        raise ValueError(f"{folder} has {size:,} bytes, the limit is {model.MAX_BYTES:,}")
    return size


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Put a checkpoint of the tiny world together.")
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="trained autoencoders and towers that know nothing")
    base.add_argument("--video", type=Path, required=True, help="a trained vae/")
    base.add_argument("--sound", type=Path, required=True, help="a trained sound_tokenizer/")
    base.add_argument("--seed", type=int, default=0)
    recipe = commands.add_parser("recipe", help="change what a checkpoint does by default")
    recipe.add_argument("--steps", dest="num_inference_steps", type=int)
    recipe.add_argument("--guidance", dest="guidance_scale", type=float)
    recipe.add_argument("--shift", dest="flow_shift", type=float)
    for command in (base, recipe):
        command.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    args = parser.parse_args()
    if args.command == "base":
        write_base(args.out, args.video, args.sound, seed=args.seed)
    else:
        names = ("num_inference_steps", "guidance_scale", "flow_shift")
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        change_recipe(args.out, given)
    print(f"{args.out}: {check(args.out):,} bytes")


if __name__ == "__main__":
    main()
