"""The settings that make the best picture, by model and mode, and sizes as people say them.

The model was trained on these. A mode is what is made and from what: an image from text, a video
from text, or a video that goes on from an image or from a clip. Sound changes none of this.
"""

import dataclasses
import difflib
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from cosmos3_jax import limits
from cosmos3_jax.json_config import ConfigError, JsonConfig, check

MODES = ("text2image", "text2video", "image2video", "video2video")

_IMAGE = {
    "num_frames": 1, "size": "720", "aspect": "1,1", "fps": 24.0, "num_inference_steps": 50,
    "guidance_scale": 4.0, "flow_shift": 3.0, "schedule": "native", "negative_prompt": "",
}  # fmt: skip
_VIDEO = {
    "num_frames": 189, "size": "720", "aspect": "16,9", "fps": 24.0, "num_inference_steps": 35,
    "guidance_scale": 6.0, "flow_shift": 10.0, "schedule": "native", "negative_prompt": None,
}  # fmt: skip
# Of Super, NVIDIA's document says a shift of 5, for every mode; some of its scripts take 10.
_SUPER = {"flow_shift": 5.0}

# Model -> mode -> settings. `negative_prompt` None is the prompt style's, a long structured one.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "Nano": {
        "text2image": _IMAGE,
        "text2video": _VIDEO,
        "image2video": _VIDEO,
        "video2video": _VIDEO,
    },
    "Super": {
        "text2image": _IMAGE | _SUPER,
        "text2video": _VIDEO | _SUPER,
        "image2video": _VIDEO | _SUPER,
        "video2video": _VIDEO | _SUPER,
    },
}
# What a model is recognised by: layers and width of its towers.
MODELS = {(36, 4096): "Nano", (64, 5120): "Super"}

ASPECTS = ("1,1", "4,3", "3,4", "16,9", "9,16")

# Tier -> width x height for each of ASPECTS.
TIERS = {
    "256": ("256x256", "320x256", "256x320", "320x192", "192x320"),
    "480": ("640x640", "736x544", "544x736", "832x480", "480x832"),
    "704": ("960x960", "1088x832", "832x1088", "1280x704", "704x1280"),
    "720": ("960x960", "1104x832", "832x1104", "1280x720", "720x1280"),
    "768": ("1024x1024", "1184x880", "880x1184", "1360x768", "768x1360"),
    # Images only. Of 1080 rows 1072 are made: the video VAE takes whole blocks of 16.
    "1080": ("1440x1440", "1664x1248", "1248x1664", "1920x1072", "1072x1920"),
}
EXTRA = {("480", "2,3"): "512x768"}
IMAGES_ONLY = ("1080",)

# What the model was trained on: the most frames of a video by tier, the least, and frames a second.
MOST_FRAMES = {"256": 400, "480": 300, "704": 200, "720": 200, "768": 200}
LEAST_FRAMES = 24
LARGEST = limits.PIXELS
FPS = (10, 30)


def aspect_name(text: str) -> str:
    """`9:16`, `9,16`, `9x16` or `9/16` -> `9,16`, as captions and the table write it.

    Raises:
        ValueError: it is none of the ratios that the model knows.
    """
    name = re.sub(r"\s*[:x/,]\s*", ",", str(text).strip().lower())
    if name not in ASPECTS and ("480", name) not in EXTRA:
        known = ", ".join(aspect.replace(",", ":") for aspect in ASPECTS)
        raise ValueError(
            f"aspect={limits.shown(text, 80)} is not one that the model was trained on: choose one "
            f"of {known}, or give height and width"
        )
    return name


def nearest_aspect(width: float, height: float) -> str:
    """The one of ASPECTS that is nearest to width / height, as a ratio."""

    def distance(aspect: str) -> float:
        across, down = map(int, aspect.split(","))
        return abs(math.log(width * down / (height * across)))

    return min(ASPECTS, key=distance)


def nearest_tier(width: int, height: int) -> str:
    """The tier whose picture of this aspect ratio is nearest in its number of pixels."""
    aspect = nearest_aspect(width, height)

    def distance(tier: str) -> float:
        return abs(math.log(width * height / math.prod(of_tier(tier, aspect))))

    return min(TIERS, key=distance)


def tier_name(size: str) -> str | None:
    """`480`, `480p` or `480P` -> `480`; None if `size` is not of that form.

    Raises:
        ValueError: it is a number, but no tier.
    """
    found = re.fullmatch(r"(\d+)p?", size.strip().lower())
    if not found:
        return None
    if found[1] not in TIERS:
        raise ValueError(
            f"size={limits.shown(size, 80)} is no tier of the model: choose one of "
            f"{', '.join(TIERS)}, or write WIDTHxHEIGHT"
        )
    return found[1]


def of_tier(tier: str, aspect: str) -> tuple[int, int]:
    """Width and height in pixels.

    Raises:
        ValueError: the tier has no such aspect ratio.
    """
    if aspect in ASPECTS:
        text = TIERS[tier][ASPECTS.index(aspect)]
    elif (tier, aspect) in EXTRA:
        text = EXTRA[tier, aspect]
    else:
        ratio, tiers = aspect.replace(",", ":"), [key for key, of in EXTRA if of == aspect]
        raise ValueError(
            f"aspect={ratio!r} is for size {', '.join(tiers)} only, and not for {tier}: choose "
            "another aspect, or give height and width"
        )
    width, height = map(int, text.split("x"))
    return width, height


def fill_size(width: int | None, height: int | None, across: int, down: int) -> tuple[int, int]:
    """Width and height of which one is given, at about the ratio across : down: a trained size if
    there is one with this width or height, else the nearest multiple of 16.
    """
    aspect = f"{across},{down}"
    for tier in TIERS if aspect in ASPECTS else ():
        trained = of_tier(tier, aspect)
        if trained[0] == width or trained[1] == height:
            return trained
    if width is None:
        return max(16, round((height or 0) * across / down / 16) * 16), height or 0
    return width, max(16, round(width * down / across / 16) * 16)


def parse_size(size: str, aspect: str | None, default_aspect: str) -> tuple[int, int]:
    """Width and height in pixels of `480p` (with an aspect ratio) or of `832x480`.

    Args:
        size: a tier, with or without a `p`, or WIDTHxHEIGHT.
        aspect: such as `9:16`; None is the default. Not beside WIDTHxHEIGHT.
        default_aspect: of ASPECTS.

    Raises:
        ValueError: it can be read as neither, or both say how wide it is.
    """
    if tier := tier_name(size):
        return of_tier(tier, aspect_name(aspect) if aspect else default_aspect)
    found = re.fullmatch(r"(\d+)\s*[x×*]\s*(\d+)", size.strip().lower())
    said = limits.shown(size, 80)
    if not found:
        raise ValueError(
            f"size={said} cannot be read: write a tier such as 480p ({', '.join(TIERS)}), or "
            "WIDTHxHEIGHT such as 832x480"
        )
    if aspect:
        other = limits.shown(aspect, 80)
        raise ValueError(f"size={said} says its aspect already: leave aspect={other} out")
    width, height = int(found[1]), int(found[2])
    if not (0 < width <= LARGEST and 0 < height <= LARGEST):
        raise ValueError(f"size={said} is not within 1x1 to {LARGEST}x{LARGEST}")
    return width, height


def check_recommended(num_frames: int, height: int, width: int, fps: float) -> None:
    """Warn, once, about all that is outside of what the model was trained on."""
    tier = nearest_tier(width, height)
    outside = []
    if num_frames > 1:
        if tier in IMAGES_ONLY:
            outside.append(f"{width}x{height} is a size for images")
        most = MOST_FRAMES.get(tier, min(MOST_FRAMES.values()))
        if not LEAST_FRAMES <= num_frames <= most:
            outside.append(
                f"{num_frames} frames are not within {LEAST_FRAMES} to {most}, which size {tier} "
                "was trained on"
            )
        if not FPS[0] <= fps <= FPS[1]:
            outside.append(f"{fps:g} frames a second are not within {FPS[0]} to {FPS[1]}")
    if outside:
        warnings.warn(
            f"outside of what the model was trained on: {'; '.join(outside)}; expect less quality",
            stacklevel=2,
        )


@dataclasses.dataclass(frozen=True)
class Recipe(JsonConfig):
    """Sizes and sampler settings of one mode, where the caller names none.

    `size` is the tier of the model's that the pixels come from (see `TIERS`), None for
    pixels of their own. `negative_prompt` None is the prompt style's default.
    """

    _least = {"guidance_scale": -math.inf}
    _most = limits.SETTINGS

    num_frames: int = 189
    height: int = 720
    width: int = 1280
    fps: float = 24.0
    num_inference_steps: int = 35
    guidance_scale: float = 6.0
    flow_shift: float = 10.0
    schedule: str = "native"
    negative_prompt: str | None = None
    size: str | None = None


@dataclasses.dataclass(frozen=True)
class Recipes:
    """The recipe of each mode: a row of `RECIPES`, and over it what the checkpoint says.

    Attributes:
        model: whose rows, `Nano` or `Super`.
        file: the checkpoint's `cosmos3_recipe.json`. Fields of `Recipe`, `aspect` beside `size`,
            for every mode; and `modes`, from a mode's name to fields for it alone. An image has
            one frame whatever the file says.
        recognised: whether the sizes of the model are those of `model`; others take its rows too.
    """

    model: str = "Nano"
    file: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    recognised: bool = dataclasses.field(default=True, compare=False)

    def __post_init__(self):
        modes = self.file.get("modes", {})
        named = isinstance(modes, dict) and all(
            isinstance(fields, dict) for fields in modes.values()
        )
        check(named, f"modes={limits.shown(modes, 80)} must be an object of objects")
        for mode in modes:
            check(mode in MODES, f"modes: {limits.shown(mode, 80)} is none of {', '.join(MODES)}")
        known = [*(field.name for field in dataclasses.fields(Recipe)), "aspect", "modes"]
        for name in {*self.file, *(name for fields in modes.values() for name in fields)}:
            near = difflib.get_close_matches(name, known, 1, 0.4)
            hint = f" (do you mean {near[0]}?)" if near else ""
            check(name in known, f"{limits.shown(name, 80)} is none of {', '.join(known)}{hint}")
        for mode in MODES:
            self.of(mode)

    def of(self, mode: str) -> Recipe:
        """The recipe of one of `MODES`."""
        own = self._own(mode)
        fields = RECIPES[self.model][mode] | own
        if own.keys() & {"height", "width"}:
            fields["size"] = None
        if fields["size"] is not None:
            size, aspect = str(fields["size"]), own.get("aspect")
            try:
                tier = tier_name(size)
                default = str(RECIPES[self.model][mode]["aspect"])
                fields["width"], fields["height"] = parse_size(size, aspect, default)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            fields["size"] = tier
        return Recipe.from_dict(fields)

    def source(self, mode: str, name: str) -> str:
        """Where the recipe's value of a field comes from, in words."""
        own = self._own(mode)
        if name in own or (name in ("height", "width") and own.keys() & {"size", "aspect"}):
            return "the checkpoint's recipe"
        unknown = "" if self.recognised else ", as this model is none of " + ", ".join(RECIPES)
        return f"{self.model}'s recipe for {mode}{unknown}"

    def _own(self, mode: str) -> dict[str, Any]:
        own = {name: value for name, value in self.file.items() if name != "modes"}
        own |= self.file.get("modes", {}).get(mode, {})
        if mode == "text2image":
            own.pop("num_frames", None)
        return own
