"""Captions: what is made in their fields, in each style."""

import json
import warnings

import pytest
from caption_cases import CAPTION, SMALL, resolve

from cosmos3_jax.config import Config
from cosmos3_jax.io import prompt
from cosmos3_jax.io.prepare import prepare
from cosmos3_jax.io.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:outside of what the model was trained on")

# Tier -> width and height of each aspect ratio, as cosmos-framework's tables have them.
ASPECTS = ["1,1", "4,3", "3,4", "16,9", "9,16"]
SIZES = {
    "256": [(256, 256), (320, 256), (256, 320), (320, 192), (192, 320)],
    "480": [(640, 640), (736, 544), (544, 736), (832, 480), (480, 832)],
    "704": [(960, 960), (1088, 832), (832, 1088), (1280, 704), (704, 1280)],
    "720": [(960, 960), (1104, 832), (832, 1104), (1280, 720), (720, 1280)],
    "768": [(1024, 1024), (1184, 880), (880, 1184), (1360, 768), (768, 1360)],
    "1080": [(1440, 1440), (1664, 1248), (1248, 1664), (1920, 1080), (1080, 1920)],
}


# What is made: the ids of the references


def framework_text(text, aspect, num_frames, fps, width, height):
    """cosmos-framework's prompt, from what it does and not from our code."""
    try:
        fields = json.loads(text)
    except ValueError:
        words = text.strip()
        if num_frames > 1:
            length = format(num_frames / fps, ".1f")
            words = words.rstrip(".") + f". The video is {length} seconds long and is of {fps} FPS."
        noun = "image" if num_frames == 1 else "video"
        return words.rstrip(".") + f". This {noun} is of {height}x{width} resolution."
    if num_frames == 1:
        for name in ("duration", "fps"):
            fields.pop(name, None)
    else:
        fields["duration"] = str(int(num_frames / fps)) + "s"
        fields["fps"] = float(fps)
    fields["resolution"] = {"H": height, "W": width}
    fields["aspect_ratio"] = aspect
    return json.dumps(fields)


TEXTS = [
    "A red fox.",
    '{"subjects": [], "context": "caf\u00e9"}',
    '{"aspect_ratio": "4,3", "fps": 30, "subjects": [], "duration": "9s"}',
]


@pytest.mark.filterwarnings("ignore:the caption contradicts")
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("num_frames", [1, 189])
@pytest.mark.parametrize("aspect", ASPECTS)
def test_native_ids_are_the_frameworks(byte_tokenizer, aspect, num_frames, text):
    for tier in SIZES:
        width, height = SIZES[tier][ASPECTS.index(aspect)]
        resolved = resolve(text, num_frames=num_frames, width=width, height=height)
        expected = framework_text(text, aspect, num_frames, 24, width, height)
        ids, _ = prompt.encode_prompts(byte_tokenizer, resolved)
        assert ids == byte_tokenizer.encode_chat(expected), tier


@pytest.mark.parametrize(
    ("width", "height", "aspect"),
    [
        (512, 768, "3,4"),
        (848, 480, "16,9"),
        (64, 48, "4,3"),
        (1000, 100, "16,9"),
        (16, 320, "9,16"),
        # As ratios go, the middle of 1 and 4/3 is 1.155; their mean is 1.167.
        (1150, 1000, "1,1"),
        (1160, 1000, "4,3"),
    ],
)
def test_another_size_has_the_nearest_aspect_ratio(width, height, aspect):
    text = resolve("{}", width=width, height=height).prompt
    assert json.loads(text)["aspect_ratio"] == aspect


def test_an_aspect_ratio_that_is_given_stays():
    text = resolve("{}", width=720, height=1280, aspect_ratio="1,1").prompt
    assert json.loads(text)["aspect_ratio"] == "1,1"


@pytest.mark.parametrize(
    ("num_frames", "text", "expected"),
    [
        (1, " A fox.. ", "A fox. This video is of 480x832 resolution."),
        (
            13,
            "A fox",
            "A fox. The video is 0.5 seconds long and is of 24 FPS. "
            "This video is of 480x832 resolution.",
        ),
        (
            1,
            '{"duration": "5s", "fps": 24, "a": 1}',
            '{"a": 1, "resolution": {"H": 480, "W": 832}}',
        ),
        (
            13,
            '{"fps": 24, "a": 1}',
            '{"fps": 24.0, "a": 1, "duration": "0s", "resolution": {"H": 480, "W": 832}}',
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:the caption contradicts")
def test_ids_of_phyai(byte_tokenizer, num_frames, text, expected):
    resolved = resolve(
        text, "blurry. ", style="phyai", num_frames=num_frames, height=480, width=832
    )
    ids, negative_ids = prompt.encode_prompts(byte_tokenizer, resolved)
    assert ids == byte_tokenizer.encode_chat(expected)
    assert negative_ids == byte_tokenizer.encode_chat("blurry. ")


# Contradictions


def warned(text, **settings):
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        resolved = resolve(text, **settings)
    return resolved, [str(warning.message) for warning in log]


def test_contradictions_are_named_in_one_warning():
    text = json.dumps(
        {"duration": "5s", "fps": 30, "resolution": {"H": 480, "W": 832}, "aspect_ratio": "1,1"}
    )
    resolved, messages = warned(text)
    assert messages == [
        'the caption contradicts what is made: duration "5s" is replaced by "7s"; '
        'fps 30 is replaced by 24.0; resolution {"H": 480, "W": 832} is replaced by '
        '{"H": 720, "W": 1280}; aspect_ratio "1,1" is replaced by "16,9"'
    ]
    assert json.loads(resolved.prompt) == {key: CAPTION[key] for key in json.loads(text)}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("duration", "7s"), ("duration", "8s"), ("duration", "0:07"), ("duration", 7.9),
        ("fps", 24), ("fps", "24 fps"), ("fps", 23.976), ("resolution", {"W": 1280, "H": 720}),
        ("resolution", "1280x720"), ("resolution", "720p"), ("aspect_ratio", "16:9"),
        ("resolution", [1280, 720]), ("resolution", "1280 * 720"), ("fps", "23.98"), ("fps", 24.2),
        ("aspect_ratio", "1280:704"), ("aspect_ratio", [832, 480]), ("aspect_ratio", "1.78:1"),
        ("aspect_ratio", "16,9"), ("duration", ""), ("fps", 0), ("resolution", {}),
    ],
)  # fmt: skip
def test_another_spelling_is_no_contradiction(name, said):
    assert warned(json.dumps({name: said}))[1] == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("duration", "6s"), ("duration", "9s"), ("duration", "1:07"), ("duration", "long"),
        ("fps", 25), ("fps", 16), ("resolution", {"H": 1280, "W": 720}), ("resolution", "480p"),
        ("resolution", {"H": 720}), ("aspect_ratio", "9:16"), ("aspect_ratio", "wide"),
        ("aspect_ratio", "0,9"), ("resolution", "720x1280"), ("resolution", [720, 1280]),
        ("resolution", "1280"), ("resolution", "720x720"), ("fps", 24.4), ("fps", 23.7),
        ("fps", "12 to 24"), ("fps", "24 or 30"), ("aspect_ratio", "21,9"),
        ("aspect_ratio", "16:10"), ("aspect_ratio", "4:3"), ("aspect_ratio", "2:1"),
    ],
)  # fmt: skip
def test_contradiction(name, said):
    [message] = warned(json.dumps({name: said}))[1]
    assert f"{name} {json.dumps(said)} is replaced by " in message


def test_an_image_has_no_time():
    resolved, [message] = warned('{"duration": "5s", "fps": 24}', num_frames=1)
    assert 'duration "5s" is left out: an image has none; fps 24 is left out' in message
    assert "duration" not in resolved.prompt and "fps" not in resolved.prompt


def test_fields_that_a_style_leaves_alone():
    text = '{"aspect_ratio": "1,1"}'
    for settings in (dict(style="phyai"), dict(style="diffusers"), dict(metadata=False)):
        resolved, [message] = warned(text, **settings)
        assert 'aspect_ratio "1,1" stays, though not true: "16,9"' in message
        assert '"1,1"' in resolved.prompt


# Texts without metadata or system turn


@pytest.mark.parametrize("style", prompt.PROMPT_STYLES)
@pytest.mark.parametrize("text", [" A fox. ", '{\n "subjects": []}'])
def test_without_metadata_the_texts_stay(style, text):
    resolved = resolve(text, " blurry. ", style=style, metadata=False, system_prompt=False)
    assert (resolved.prompt, resolved.negative_prompt) == (text, " blurry. ")
    assert resolved.system_prompt is None
    with_system = resolve(text, style=style, metadata=False).system_prompt
    assert (with_system is not None) == (style == "diffusers")


def test_settings_reach_the_texts(byte_tokenizer):
    def texts(**settings):
        settings = Settings(**SMALL, prompt_style="diffusers", **settings)
        return prepare(Config(), byte_tokenizer, "A fox.", settings).texts[0]

    bare = texts(prompt_metadata=False, system_prompt=False)
    assert (bare.prompt, bare.negative_prompt, bare.system_prompt) == ("A fox.", "", None)
    full = texts()
    assert "This video is of 32x32 resolution." in full.prompt and full.system_prompt
