"""What a generation is made with where the caller says nothing, by model and mode."""

import json
import warnings

import numpy as np
import pytest
from PIL import Image

from cosmos3_jax.checkpoint.load import load_config
from cosmos3_jax.config import Config, ConfigError, Recipes
from cosmos3_jax.io.prepare import prepare, resolve_settings
from cosmos3_jax.io.settings import Settings

GIVEN = {
    "text2image": {"num_frames": 1},
    "text2video": {},
    "image2video": {"image": np.zeros((90, 160, 3), np.uint8)},
    "video2video": {"video": np.zeros((5, 90, 160, 3), np.uint8)},
}
# Model, mode: width x height, frames, steps, guidance, shift.
TABLE = [
    ("Nano", "text2image", (960, 960), 1, 50, 4.0, 3.0),
    ("Nano", "text2video", (1280, 720), 189, 35, 6.0, 10.0),
    ("Nano", "image2video", (1280, 720), 189, 35, 6.0, 10.0),
    ("Nano", "video2video", (1280, 720), 189, 35, 6.0, 10.0),
    ("Super", "text2image", (960, 960), 1, 50, 4.0, 5.0),
    ("Super", "text2video", (1280, 720), 189, 35, 6.0, 5.0),
    ("Super", "image2video", (1280, 720), 189, 35, 6.0, 5.0),
    ("Super", "video2video", (1280, 720), 189, 35, 6.0, 5.0),
]


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("model, mode, size, frames, steps, guidance, shift", TABLE)
def test_each_row(model, mode, size, frames, steps, guidance, shift, sound):
    if sound and mode == "text2image":
        return
    settings = Settings(sound=sound, **GIVEN[mode])
    filled, found, sources, _ = resolve_settings(Recipes(model), settings)
    assert found == mode
    assert (filled.width, filled.height) == size
    assert (filled.num_frames, filled.fps) == (frames, 24)
    assert (filled.num_inference_steps, filled.guidance_scale) == (steps, guidance)
    assert (filled.flow_shift, filled.schedule) == (shift, "native")
    assert filled.negative_prompt == ("" if mode == "text2image" else None)
    assert sources["flow_shift"] == f"{model}'s recipe for {mode}"


def test_a_prompt_for_nano_and_one_frame(byte_tokenizer):
    made = prepare(Config(), byte_tokenizer, "a red cube", Settings(num_frames=1))
    assert made.request.video_shape == (1, 60, 60)
    assert made.request.num_inference_steps == 50 and made.request.guidance_scale == 4
    assert made.texts[0].negative_prompt == "This image is of 960x960 resolution."


def folder_with(tmp_path, recipe, **sizes):
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(sizes if name != "vae" else {}))
    if recipe is not None:
        (tmp_path / "cosmos3_recipe.json").write_text(json.dumps(recipe))
    return load_config(tmp_path, load_sound=False).recipes


def test_super_is_recognised_by_its_sizes(tmp_path):
    sizes = dict(
        hidden_size=5120, num_hidden_layers=64, num_attention_heads=64, intermediate_size=25600
    )
    assert folder_with(tmp_path, None, **sizes).model == "Super"


def test_a_checkpoints_recipe_comes_first(tmp_path):
    recipe = {"flow_shift": 7.0, "num_frames": 49, "modes": {"text2image": {"flow_shift": 2.0}}}
    recipes = folder_with(tmp_path, recipe)
    image, video = (
        resolve_settings(recipes, Settings(**GIVEN[mode])) for mode in ("text2image", "text2video")
    )
    assert (image[0].flow_shift, image[0].num_frames) == (2.0, 1)
    assert (video[0].flow_shift, video[0].num_frames) == (7.0, 49)
    assert video[2]["flow_shift"] == "the checkpoint's recipe"
    assert video[2]["guidance_scale"] == "Nano's recipe for text2video"


@pytest.mark.parametrize(
    "recipe, says",
    [
        ({"modes": {"text2img": {}}}, "'text2img' is none of text2image, text2video"),
        ({"modes": []}, "an object of objects"),
        ({"modes": {"text2image": {"flow_shift": "x"}}}, "flow_shift='x' must be a number"),
        ({"size": "481"}, "choose one of 256, 480"),
        ({"num_steps": 3}, "'num_steps' is none of .*mean num_inference_steps"),
        ({"modes": {"text2image": {"flow_sift": 7}}}, "'flow_sift' is none of .*mean flow_shift"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_its_file(tmp_path, recipe, says):
    with pytest.raises(ConfigError, match="cosmos3_recipe.json: .*" + says):
        folder_with(tmp_path, recipe)


@pytest.mark.parametrize(
    "given, size, source",
    [
        ({}, (1280, 720), "Nano's recipe for text2video"),
        ({"size": "480p"}, (832, 480), "given"),
        ({"size": "480p", "aspect": "9:16"}, (480, 832), "given"),
        ({"aspect": "3:4"}, (832, 1104), "given"),
        ({"size": "640x352"}, (640, 352), "given"),
        ({"height": 352, "width": 640}, (640, 352), "given"),
        ({"num_frames": 1, "size": "480"}, (640, 640), "given"),
    ],
)
def test_sizes_as_people_say_them(given, size, source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings, _, sources, notes = resolve_settings(Recipes(), Settings(**given))
    assert (settings.width, settings.height) == size
    assert sources["width"] == sources["height"] == source
    assert settings.size is settings.aspect is None and not notes


@pytest.mark.parametrize(
    "given",
    [
        {"image": Image.new("RGB", (90, 160))},
        {"image": [Image.new("RGB", (90, 160))]},
        {"image": np.zeros((160, 90, 3), np.uint8)},
        {"video": np.zeros((5, 160, 90, 3), np.uint8)},
        {"video": [Image.new("RGB", (90, 160))] * 5},
        {"video": np.zeros((1, 3, 5, 160, 90), np.float32)},
    ],
)
def test_the_aspect_nearest_to_the_input_is_taken_and_said(given):
    settings, _, sources, [note] = resolve_settings(Recipes(), Settings(**given))
    assert (settings.width, settings.height) == (720, 1280)
    assert note == "size 720x1280: 9:16 is nearest to the input's 90x160"
    settings, *_ = resolve_settings(Recipes(), Settings(size="480p", **given))
    assert (settings.width, settings.height) == (480, 832)
    settings, *_, notes = resolve_settings(Recipes(), Settings(aspect="16:9", **given))
    assert (settings.width, settings.height) == (1280, 720) and not notes


def test_a_checkpoint_of_one_size_keeps_it_and_says_that_the_input_is_cropped():
    recipes = Recipes(file={"height": 96, "width": 96})
    settings, *_, notes = resolve_settings(recipes, Settings(image=np.zeros((90, 160, 3))))
    assert (settings.width, settings.height) == (96, 96)
    assert notes == ["size 96x96, the checkpoint's own: the input's 160x90 is cropped to it"]
    *_, notes = resolve_settings(recipes, Settings(image=np.zeros((90, 90, 3))))
    assert not notes
    with pytest.raises(ValueError, match="makes 96x96.*give size too"):
        resolve_settings(recipes, Settings(aspect="16:9"))
    with pytest.raises(ValueError, match="choose one of 1:1"):
        resolve_settings(recipes, Settings(aspect="21:9"))


@pytest.mark.parametrize(
    "file, given, size",
    [
        ({}, {"height": 480}, (832, 480)),
        ({}, {"width": 832}, (832, 480)),
        ({}, {"height": 400}, (704, 400)),
        ({}, {"height": 480, "num_frames": 1}, (480, 480)),
        ({}, {"height": 832, "image": np.zeros((160, 90, 3))}, (480, 832)),
        ({"height": 64, "width": 96}, {"height": 128}, (192, 128)),
        ({"size": "480"}, {}, (832, 480)),
        ({"size": "480", "aspect": "9,16"}, {}, (480, 832)),
        ({"size": "640x352"}, {}, (640, 352)),
        ({}, {"size": 480}, (832, 480)),
        ({}, {"size": (640, 352)}, (640, 352)),
    ],
)
def test_what_is_not_said_of_a_size_follows_from_the_rest(file, given, size):
    settings, *_ = resolve_settings(Recipes(file=file), Settings(**given))
    assert (settings.width, settings.height) == size


@pytest.mark.parametrize("given", [{"size": "480p"}, {"aspect": "9:16"}])
def test_a_size_that_is_said_twice_is_refused(given):
    with pytest.raises(ValueError, match="give one or the other"):
        resolve_settings(Recipes(), Settings(height=480, **given))


def test_a_model_of_other_sizes_is_warned_of_nothing_and_said_to_be_none(tmp_path):
    recipes = folder_with(tmp_path, None, num_hidden_layers=4)
    assert not recipes.recognised
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, _, sources, _ = resolve_settings(recipes, Settings(num_frames=13, fps=5.0))
    assert sources["height"] == "Nano's recipe for text2video, as this model is none of Nano, Super"


def test_outside_of_the_recommended_there_is_one_warning():
    with pytest.warns(UserWarning, match="13 frames .*; 5 frames a second") as caught:
        resolve_settings(Recipes(), Settings(num_frames=13, fps=5.0))
    assert len(caught) == 1
