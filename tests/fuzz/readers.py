"""Readers of files: each makes one damaged input from a valid one, and says how it is read."""

import contextlib
import json
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import safetensors
from jax._src import xla_bridge
from PIL import Image

from cosmos3_jax.checkpoint import lora_files, lora_spellings
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.checkpoint.load import RECIPE_FILE, load_config, open_components
from cosmos3_jax.checkpoint.lora import families
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.io import captions, media_read, prompt
from cosmos3_jax.io.noise import load_noise
from cosmos3_jax.io.prepare import resolve_settings
from cosmos3_jax.io.settings import Settings
from cosmos3_jax.models.tokenizer import Tokenizer
from cosmos3_jax.parallel import device
from cosmos3_jax.recipes import MODES
from cosmos3_jax.runtime.sampler_state import StateFile
from fuzz import hostile, mutate, originals
from fuzz.frame import Case, Make

Reader = Callable[[Random, Path, Path], Case]
# Name -> (reader, its share of the inputs). A reader gets a generator, a folder for its files, and
# the folder of the originals.
READERS: dict[str, tuple[Reader, int]] = {}


def reader(name: str, share: int) -> Callable[[Reader], Reader]:
    def add(function: Reader) -> Reader:
        READERS[name] = (function, share)
        return function

    return add


def make_of(name: str, valid: Path) -> Make:
    """The reader of this name, with its originals."""
    function, _ = READERS[name]
    return lambda random, folder: function(random, folder, valid)


def linked(valid: Path, folder: Path, *without: str) -> Path:
    """The valid checkpoint again, but for some files: links cost nothing."""
    target = folder / "checkpoint"
    for path in valid.rglob("*"):
        place = target / path.relative_to(valid)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif str(path.relative_to(valid)) not in without:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, place)
    return target


CONFIGS = (
    "transformer/config.json", "vae/config.json", "sound_tokenizer/config.json",
    "scheduler/scheduler_config.json", RECIPE_FILE, "model_index.json",
)  # fmt: skip


@reader("configurations", 24)
def configurations(random: Random, folder: Path, valid: Path) -> Case:
    name = random.choice(CONFIGS[:-1] if random.random() < 0.95 else CONFIGS)
    original = json.loads((valid / "checkpoint" / name).read_text())
    checkpoint = linked(valid / "checkpoint", folder, name)
    (checkpoint / name).write_bytes(mutate.json_bytes(random, original))

    def read() -> Any:
        config = load_config(checkpoint)
        with no_device():
            open_components(checkpoint, config)
        for mode in MODES:
            resolve_settings(config.recipes, Settings(num_frames=1 if "image" in mode else 5))
        return config

    def check(config: Any) -> str | None:
        recipe = config.recipes.of("text2video")
        of_any_sign = ("guidance_scale",)
        numbers = [
            x for name, x in vars(recipe).items()
            if isinstance(x, int | float) and name not in of_any_sign
        ]  # fmt: skip
        finite = np.isfinite(np.float32(numbers)).all() and min(numbers) >= 0
        return None if finite else f"recipe {recipe}"

    return Case(read, folder.name, check=check)


@reader("prompts", 24)
def prompts(random: Random, folder: Path, valid: Path) -> Case:
    content, suffix = hostile.prompt(random)
    file = folder / f"prompt.{suffix}"
    file.write_bytes(content)

    def read() -> Any:
        text = prompt.read_prompt(file)
        return prompt.resolve_prompts(
            text, random.choice((None, "", text)), style=random.choice(prompt.PROMPT_STYLES),
            num_frames=random.choice((1, 5)), height=32, width=32, fps=24.0,
        )  # fmt: skip

    def check(resolved: prompt.ResolvedPrompt) -> str | None:
        resolved.prompt.encode()
        is_text = isinstance(resolved.prompt, str) and isinstance(resolved.negative_prompt, str)
        return None if is_text else "no text"

    return Case(read, file.name, check=check)


@reader("prompt texts", 12)
def prompt_texts(random: Random, folder: Path, valid: Path) -> Case:
    """What `generate` is given as a text, caption or record."""
    content, _ = hostile.prompt(random)
    text = content.decode("utf-8", errors=random.choice(("replace", "surrogateescape")))

    def read() -> Any:
        if random.random() < 0.3:
            captions.check_caption(text)
        of_record, negative = captions.unwrap(text)
        return prompt.resolve_prompts(
            of_record, negative, style=random.choice(prompt.PROMPT_STYLES),
            num_frames=random.choice((1, 5)), height=32, width=32, fps=24.0,
        )  # fmt: skip

    return Case(read, None, check=lambda found: found.prompt.encode() and None)


SENTENCES = ("a red ball", "Ein Ball\n\n 🎈 <|im_start|>", " ".join(["word"] * 300))


def encoded(folder: Path, random: Random) -> list[list[int]]:
    """Twice the same text as tokens, as many as one prompt and its negative are."""
    tokenizer = Tokenizer.from_folder(folder / "text_tokenizer")
    text, system = random.choice(SENTENCES), random.choice((None, "", "be kind"))
    return [tokenizer.encode_chat(text, system) for _ in range(2)]


def check_ids(ids: list[list[int]]) -> str | None:
    if not all(isinstance(i, int) and 0 <= i < 2**32 for each in ids for i in each):
        return "ids out of range"
    return None if ids[0] == ids[1] else "other ids each time"


@reader("tokenizers", 20)
def tokenizers(random: Random, folder: Path, valid: Path) -> Case:
    source = valid / "checkpoint" / "text_tokenizer"
    file = folder / "text_tokenizer" / "tokenizer.json"
    linked(source, folder, file.name).rename(file.parent)
    values = json.loads((source / file.name).read_text())
    file.write_bytes(hostile.tokenizer(random, values))
    return Case(lambda: encoded(folder, random), folder.name, check=check_ids)


@reader("chat templates", 24)
def templates(random: Random, folder: Path, valid: Path) -> Case:
    """As a file or in `tokenizer_config.json`, which is damaged otherwise too."""
    source, target = valid / "checkpoint" / "text_tokenizer", folder / "text_tokenizer"
    linked(source, folder, "chat_template.jinja", "tokenizer_config.json").rename(target)
    values = json.loads((source / "tokenizer_config.json").read_text())
    template = hostile.template(random, values.get("chat_template") or CHATML)
    values.pop("chat_template", None)
    if random.random() < 0.4:
        (target / "chat_template.jinja").write_bytes(template)
    elif random.random() < 0.3:
        values["chat_template"] = mutate.any_json(random)
    else:
        values["chat_template"] = template.decode("utf-8", errors="replace")
    content = json.dumps(values).encode("utf-8", errors="surrogatepass")
    if random.random() < 0.4:
        content = mutate.json_bytes(random, json.loads(json.dumps(values)))
    (target / "tokenizer_config.json").write_bytes(content)
    return Case(lambda: encoded(folder, random), folder.name, check=check_ids)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@reader("weights", 24)
def weights(random: Random, folder: Path, valid: Path) -> Case:
    """A shard, its header, an index, or what kind of file it is."""
    checkpoint = linked(valid / "checkpoint", folder)
    files = sorted(checkpoint.glob("*/*.safetensors"))
    indices = sorted(checkpoint.glob("*/*.index.json"))
    file = random.choice(indices * 3 + files)
    content = file.read_bytes()
    file.unlink()
    if random.random() < 0.1:
        hostile.odd_file(random, file, valid)
    elif file.suffix == ".json":
        file.write_bytes(hostile.index(random, content))
    else:
        file.write_bytes(hostile.shard(random, content))

    def read() -> Any:
        with no_device():
            components = open_components(checkpoint, load_config(checkpoint))
        for component in components:
            for piece in component.pieces(np.dtype(np.float32)):
                component.read(piece)
        return components

    return Case(read, folder.name, check=_like_safetensors)


def _like_safetensors(components: list[Any]) -> str | None:
    """Whether what is read of each file is what the library reads of it."""
    for component in components:
        theirs = {}
        for file in component.files.folder.glob("*.safetensors"):
            theirs |= dict(safetensors.deserialize(file.read_bytes()))
        for key in component.files.shapes:
            if list(component.files.shapes[key]) != theirs[key]["shape"]:
                return f"{key} has another shape"
            try:
                values = component.files.read(key)
            except CheckpointError:  # not finite, and not used
                continue
            if values.tobytes() != bytes(theirs[key]["data"]):
                return f"{key} has other values"
    return None


@reader("LoRAs", 24)
def loras(random: Random, folder: Path, valid: Path) -> Case:
    name = random.choice(("peft", "diffusers", "kohya", "comfy"))
    config = load_config(valid / "checkpoint").transformer
    if name == "peft":
        file = folder / "peft" / "adapter_model.safetensors"
        file.parent.mkdir()
        content = (valid / "lora" / "peft" / file.name).read_bytes()
        settings = json.loads((valid / "lora" / "peft" / lora_spellings.PEFT_CONFIG).read_text())
        written = json.dumps(settings).encode()
        if random.random() < 0.6:
            written = hostile.adapter_settings(random, settings)
        else:
            content = hostile.shard(random, content)
        (file.parent / lora_spellings.PEFT_CONFIG).write_bytes(written)
        file.write_bytes(content)
        path = file.parent
    else:
        path = folder / f"{name}.safetensors"
        content = (valid / "lora" / path.name).read_bytes()
        if random.random() < 0.03:
            hostile.odd_file(random, path, valid)
        else:
            path.write_bytes(hostile.shard(random, content))

    def read() -> Any:
        # Arrays stay on the host: no device is started for them.
        lora_files.jnp = np  # type: ignore[misc]
        return lora_files.load(path, config)

    def check(lora: Any) -> str | None:
        halves = [x for pair in lora.adapters.values() for x in pair.values()]
        finite = all(np.isfinite(x).all() for x in halves)
        return None if finite and halves else "not finite, or empty"

    return Case(read, folder.name, check=check)


@reader("noise", 20)
def noise(random: Random, folder: Path, valid: Path) -> Case:
    file = folder / "noise.npz"
    hostile.archive(random, (valid / "noise.npz").read_bytes(), file)

    def check(found: dict[str, np.ndarray]) -> str | None:
        right = all(x.dtype.kind == "f" and np.isfinite(x).all() for x in found.values())
        return None if right and "noise" in found else "no finite floats"

    return Case(lambda: load_noise(file), file.name, check=check)


@reader("sampler states", 10)
def sampler_states(random: Random, folder: Path, valid: Path) -> Case:
    """One that is damaged is passed over, with a warning; another generation's stays."""
    state = StateFile(folder / "out.mp4", 1, {"prompt": "a", "dtype": "float32"})
    hostile.archive(random, (valid / "state.npz").read_bytes(), state.path)

    def read() -> Any:
        state.check()
        return state.restore(originals.STATE)

    def check(found: Any) -> str | None:
        done, restored = found
        same = [x.shape == np.shape(originals.STATE[name]) for name, x in restored.items()]
        return None if done >= 0 and all(same) else f"{done} steps, {restored}"

    return Case(read, state.path.name, check=check)


@reader("images", 40)
def images(random: Random, folder: Path, valid: Path) -> Case:
    files = sorted((valid / "media").glob("*.*"))
    pictures = [file for file in files if file.stem != "video" or file.suffix in (".gif", ".webp")]
    source = random.choice(pictures)
    other = random.choice(pictures)
    suffix = source.suffix if random.random() < 0.9 else random.choice(pictures).suffix
    file = folder / f"input{suffix}"
    file.write_bytes(hostile.media(random, source, other))

    def read() -> Any:
        return media_read.image_shape(file), media_read.read_image(file)

    def check(found: Any) -> str | None:
        shape, pixels = found
        right = pixels.dtype == np.uint8 and pixels.shape == (*shape, 3) and pixels.size
        return None if right else f"{pixels.dtype} {pixels.shape} of {shape}"

    return Case(read, file.name, check=check)


@reader("videos", 32)
def videos(random: Random, folder: Path, valid: Path) -> Case:
    suffix = random.choice(originals.VIDEOS)
    source = valid / "media" / f"video.{suffix}"
    other = valid / "media" / f"video.{random.choice(originals.VIDEOS)}"
    file = folder / f"input.{suffix}"
    file.write_bytes(hostile.media(random, source, other))
    keep, rate = random.choice(("first", "last")), random.choice((None, None, 12.0))
    most = random.choice((1, 3, 5, None))

    def read() -> Any:
        media_read.probe(file)
        try:
            sound, _ = media_read.read_sound(file)
            if not np.isfinite(sound).all():
                raise AssertionError("the sound is not finite")
        except ValueError:  # it has none, or that is damaged
            pass
        return media_read.read_video(file, max_frames=most, keep=keep, fps=rate)

    def check(found: Any) -> str | None:
        frames, fps = found
        right = frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3
        if not right or not frames.size or (most and len(frames) > most):
            return f"{frames.dtype} {frames.shape}"
        return None if fps is None or 0 < fps < np.inf else f"fps {fps}"

    return Case(read, file.name, check=check)


def checkpoint_of(valid: Path) -> tuple[Any, Tokenizer]:
    """The valid configuration and tokenizer."""
    return open_folder(valid / "checkpoint")


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    """Shapes of parameters are asked for without a device to compute on."""
    cpu = types.SimpleNamespace(platform="cpu", device_kind="cpu")
    with mock.patch.object(device, "default_device", lambda: cpu):
        yield


def warm(valid: Path) -> None:
    """Import and trace what every input needs, before processes are forked."""
    Image.init()
    config, _ = checkpoint_of(valid)
    with no_device():
        open_components(valid / "checkpoint", config)
        families(config.transformer)
    if xla_bridge.backends_are_initialized():
        raise RuntimeError("a device was started, so that no process can be forked")
