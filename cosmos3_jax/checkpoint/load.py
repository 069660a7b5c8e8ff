"""From a checkpoint folder to a configuration and a parameter tree, without torch.

Two layouts are read, component by component: the public one (diffusers' names and shapes) and the
converted one that `convert` writes (our names and shapes, ready to use). Their rules differ, the reading
does not. A stacked leaf is filled one tensor at a time and handed to the device before the next is read,
so host memory peaks near the largest leaf.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax import sound_vae, transformer, video_vae
from cosmos3_jax.checkpoint.files import TensorFiles, has_tensors
from cosmos3_jax.checkpoint.rules import CheckpointError, Layout, Rule, check, leaf_shapes
from cosmos3_jax.checkpoint.sound_vae_layout import sound_vae_layout
from cosmos3_jax.checkpoint.transformer_layout import transformer_layout
from cosmos3_jax.checkpoint.video_vae_layout import video_vae_layout
from cosmos3_jax.config import (
    Config,
    Recipe,
    SchedulerConfig,
    SoundVAEConfig,
    TransformerConfig,
    VideoVAEConfig,
)

PUBLIC_STEM, CONVERTED_STEM = "diffusion_pytorch_model", "params"
RECIPE_FILE = "cosmos3_recipe.json"
TOKENIZER_FOLDER = "text_tokenizer"
HUB_FILES = ["*.json", "*/*.json", "*/*.safetensors", "text_tokenizer/*"]
HUB_IGNORED = ["vision_encoder/*", "model.safetensors*"]


@dataclasses.dataclass(frozen=True)
class Component:
    """One component folder, opened and checked against the model.

    Attributes:
        name: the folder's name in a checkpoint.
        files: its tensors.
        layout: how they are stored.
        leaves: path -> shape of our tree, and `prefix` where that tree hangs in the whole one.
    """

    name: str
    files: TensorFiles
    layout: Layout
    leaves: dict[str, tuple[int, ...]]
    prefix: str

    def dtype_of(self, leaf: str, dtype: jnp.dtype) -> np.dtype:
        """The dtype in which a leaf is kept when `dtype` is asked for."""
        return np.dtype(np.float32 if leaf.startswith(self.layout.float32) else dtype)

    def read(self, rule: Rule) -> np.ndarray:
        """The values that one rule puts into its leaf, in the stored dtype (float32 if folded)."""
        return rule.to_leaf(*(self.files.read(key) for key in rule.keys))

    def rules_by_leaf(self) -> dict[str, list[Rule]]:
        grouped: dict[str, list[Rule]] = {leaf: [] for leaf in self.leaves}
        for rule in self.layout.rules:
            grouped[rule.leaf].append(rule)
        return grouped


def find_checkpoint(path_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint; a Hub id is downloaded (only the files that generation reads).

    Raises:
        CheckpointError: if it is neither a folder nor a Hub id that can be reached.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)):
        raise CheckpointError(f"{path_or_hub_id} is not a folder, nor a Hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path_or_hub_id), allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED)
        )
    except Exception as error:  # the client raises a dozen kinds, from DNS to a licence not accepted
        raise CheckpointError(
            f"{path_or_hub_id} is not a local folder, and downloading it from the Hub failed: {error}"
        ) from error


def load_config(folder: Path, load_sound: bool | None = None) -> Config:
    """Read the configurations of a checkpoint folder.

    Args:
        folder: the checkpoint's root.
        load_sound: None takes sound if the checkpoint has it; True insists; False leaves it out.

    Raises:
        ConfigError: a file is missing, malformed, or asks for what is not implemented.
        CheckpointError: the folder is no checkpoint, or has no sound where it is insisted on.
    """
    if not (folder / "transformer" / "config.json").is_file():
        raise CheckpointError(f"{folder} is not a Cosmos3 checkpoint: it has no transformer/config.json")
    transformer_config = TransformerConfig.from_file(folder / "transformer" / "config.json")
    has_sound = transformer_config.sound_gen and (folder / "sound_tokenizer" / "config.json").is_file()
    if load_sound and not has_sound:
        raise CheckpointError(
            f"{folder} has no sound (sound_gen is {transformer_config.sound_gen}, sound_tokenizer/ is "
            f"{'there' if (folder / 'sound_tokenizer').is_dir() else 'missing'}): load it without sound"
        )
    sound = has_sound and load_sound is not False
    recipe, scheduler = folder / RECIPE_FILE, folder / "scheduler" / "scheduler_config.json"
    return Config(
        transformer=dataclasses.replace(transformer_config, sound_gen=sound),
        video_vae=VideoVAEConfig.from_file(folder / "vae" / "config.json"),
        sound_vae=SoundVAEConfig.from_file(folder / "sound_tokenizer" / "config.json") if sound else None,
        scheduler=SchedulerConfig.from_file(scheduler) if scheduler.is_file() else SchedulerConfig(),
        recipe=Recipe.from_file(recipe) if recipe.is_file() else Recipe(),
    )


def open_components(folder: Path, config: Config) -> list[Component]:
    """Open every component that a configuration needs, and check each against the model.

    Raises:
        CheckpointError: a file is missing or truncated, or keys or shapes do not fit.
    """
    components = [
        _open(folder / "transformer", "", transformer.param_shapes(config.transformer), transformer_layout, config.transformer),
        _open(folder / "vae", "video_vae", video_vae.param_shapes(config.video_vae), video_vae_layout, config.video_vae),
    ]  # fmt: skip
    if config.has_sound:
        sound = folder / "sound_tokenizer"
        encoder = _has_encoder(sound)
        shapes = sound_vae.param_shapes(config.sound_vae, encoder)
        components.append(_open(sound, "sound_vae", shapes, sound_vae_layout, config.sound_vae, encoder))
    return components


def load_params(
    components: list[Component], dtype: jnp.dtype, on_bytes: Callable[[int], None] | None = None
) -> dict:
    """The parameter tree `{"und", "gen", "video_vae"[, "sound_vae"]}` on the default device.

    Args:
        components: see `open_components`.
        dtype: of every leaf but the few that stay in float32.
        on_bytes: called with the size of each leaf once it is placed, for progress.
    """
    tree: dict = {}
    for component in components:
        for leaf, rules in component.rules_by_leaf().items():
            values = np.empty(component.leaves[leaf], component.dtype_of(leaf, dtype))
            for rule in rules:
                values[rule.index] = component.read(rule)
            *parents, name = f"{component.prefix}/{leaf}".strip("/").split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = jax.block_until_ready(jnp.asarray(values))
            if on_bytes is not None:
                on_bytes(values.nbytes)
    return tree


def converted_layout(name: str, leaves: dict[str, tuple[int, ...]], float32: tuple[str, ...]) -> Layout:
    """Our own layout: a tensor a leaf under its path, a tensor a layer where layers are stacked."""
    rules = []
    for leaf, shape in leaves.items():
        if "/layers/" in f"/{leaf}" and name == "transformer":
            rules += [Rule(f"{leaf}/{layer}", leaf, "... -> ...", (layer,)) for layer in range(shape[0])]
        else:
            rules.append(Rule(leaf, leaf, "... -> ..."))
    # Sound may be there and not asked for; it is then passed over, as in the public layout.
    unused = () if any(leaf.startswith("gen/sound_") for leaf in leaves) else (r"gen/sound_.*",)
    return Layout(name, tuple(rules), unused, float32)


def is_converted(folder: Path) -> bool:
    """Whether a component folder is in the converted layout."""
    return has_tensors(folder, CONVERTED_STEM)


def _open(folder: Path, prefix: str, shapes: dict, public_layout: Callable, *arguments) -> Component:
    leaves = leaf_shapes(shapes)
    layout = public_layout(*arguments)
    converted = is_converted(folder)
    if converted:
        layout = converted_layout(layout.name, leaves, layout.float32)
    files = TensorFiles(folder, CONVERTED_STEM if converted else PUBLIC_STEM)
    check(layout, files.shapes, leaves)
    return Component(folder.name, files, layout, leaves, prefix)


def _has_encoder(folder: Path) -> bool:
    """Early revisions of the sound VAE hold the decoder alone, under the same configuration."""
    stem = CONVERTED_STEM if is_converted(folder) else PUBLIC_STEM
    return any(key.startswith(("encoder.", "encoder/")) for key in TensorFiles(folder, stem).shapes)
