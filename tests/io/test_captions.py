"""Captions: what is made in their fields, the forms that hold them, their schema and their keys."""

import copy
import json
import re
import warnings

import pytest

from cosmos3_jax import check_caption
from cosmos3_jax.config import Config
from cosmos3_jax.io import captions, prompt
from cosmos3_jax.io.prepare import prepare
from cosmos3_jax.io.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:outside of what the model was trained on")
SMALL = dict(num_frames=5, height=32, width=32, num_inference_steps=1)
CAPTION = {
    "temporal_caption": "A fox crosses a bridge.",
    "audio_description": "Water.",
    "subjects": [{"description": "A red fox", "number_of_legs": 4, "breed": "Vulpes vulpes"}],
    "background_setting": "A caf\u00e9 by a stream",
    "lighting": {"conditions": "Morning", "direction": "left", "shadows": "long"},
    "aesthetics": {"composition": "thirds", "color_scheme": "blue", "mood_atmosphere": "quiet"},
    "cinematography": {"camera_motion": "Static", "framing": "Wide", "camera_angle": "Eye-level"},
    "style_medium": "Live-action video",
    "artistic_style": "realistic",
    "context": "wildlife",
    "actions": [{"time": "0:00-0:07", "description": "It crosses"}],
    "segments": [{"segment_index": 0, "time_range": "0:00-0:07", "description": "One shot"}],
    "text_renders": [],
    "duration": "7s",
    "fps": 24.0,
    "resolution": {"H": 720, "W": 1280},
    "aspect_ratio": "16,9",
}
TEXT = json.dumps(CAPTION)
IMAGE = {
    key: value
    for key, value in CAPTION.items()
    if key
    not in ("temporal_caption", "audio_description", "actions", "segments", "duration", "fps")
}

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


def resolve(text, negative=None, *, style="native", num_frames=189, fps=24, **rest):
    size = dict(height=720, width=1280) | rest
    return prompt.resolve_prompts(
        text, negative, style=style, num_frames=num_frames, fps=fps, **size
    )


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


# Records, arrays, lines, fences

RECORD = json.dumps({"prompt": TEXT, "negative_prompt": "blurry"})
THOUGHT = json.dumps({"scene_imagination": "focus: fox"} | CAPTION)
FORMS = {
    "plain": ("A fox. \n", "A fox. \n", None),
    "caption": (f"\n{TEXT} ", f"\n{TEXT} ", None),
    "spelling of a caption": (
        '{"b":1,  "a":"\u00e9"}',
        '{"b":1,  "a":"\u00e9"}',
        None,
    ),
    "record": (RECORD, TEXT, "blurry"),
    "record without a negative": (json.dumps({"prompt": TEXT}), TEXT, None),
    "negative null": (json.dumps({"prompt": TEXT, "negative_prompt": None}), TEXT, None),
    "negative empty": (json.dumps({"prompt": TEXT, "negative_prompt": ""}), TEXT, ""),
    "record of a sentence": ('{"prompt": "A fox."}', "A fox.", None),
    "record of an object": (json.dumps({"prompt": CAPTION}), TEXT, None),
    "record with remarks": (
        json.dumps({"name": "a", "extra": {"prompt": "x"}, "prompt": TEXT}),
        TEXT,
        None,
    ),
    "record, indented": (json.dumps(json.loads(RECORD), indent=2) + "\n", TEXT, "blurry"),
    "record of a fence": (json.dumps({"prompt": f"```json\n{TEXT}\n```"}), TEXT, None),
    "array": (f"[\n{RECORD}\n]", TEXT, "blurry"),
    "array of a caption": (f"[ {TEXT} ]", TEXT, None),
    "a line": (f"{RECORD}\n\n", TEXT, "blurry"),
    "a line with CRLF": (f"\r\n{RECORD}\r\n", TEXT, "blurry"),
    "fence": (f"```json\n{TEXT}\n```\n", TEXT, None),
    "fence, untagged": (f"```\n{TEXT}\n```", TEXT, None),
    "fence, capitals": (f"```JSON\r\n{TEXT}\r\n```", TEXT, None),
    "fence on one line": (f"```json {TEXT}```", TEXT, None),
    "fence of a sentence": ("```\nA fox.\n```", "A fox.", None),
    "fence of a record": (f"```json\n{RECORD}\n```", TEXT, "blurry"),
    "array of text": ('["a"]', '["a"]', None),
    "after thoughts": (f"<think>\nA {{fox}}?\n</think>\n\n{TEXT}\n", TEXT, None),
    "after thoughts, fenced": (f"<think>a</think>```json\n{TEXT}\n```", TEXT, None),
    "after thoughts, a record": (f"thus...</think>\n{RECORD}", TEXT, "blurry"),
    "tag in a caption": ('{"context": "</think>"}', '{"context": "</think>"}', None),
    "number": ("1984", "1984", None),
    "tildes within": ("A sign: ~~~ and <think>", "A sign: ~~~ and <think>", None),
    "backticks within": ("A sign: ``` and `code`", "A sign: ``` and `code`", None),
    "scratchpad": (THOUGHT, TEXT, None),
    "scratchpad, nested": (
        json.dumps(CAPTION | {"subjects": [{"scene_imagination": "x"} | CAPTION["subjects"][0]]}),
        TEXT,
        None,
    ),
    "scratchpad in a fenced array of records": (
        f"```json\n{json.dumps([{'prompt': THOUGHT}])}\n```",
        TEXT,
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_unwrap(form):
    text, expected, negative = FORMS[form]
    assert captions.unwrap(text) == (expected, negative)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join([RECORD] * 12), "the prompt holds 12 prompts; give one"),
        ("\r\n".join([TEXT, "", TEXT, ""]), "holds 2 prompts"),
        (json.dumps([CAPTION] * 3), "holds 3 prompts"),
        (f"```json\n{TEXT}\n{TEXT}\n```", "holds 2 prompts"),
        (f"```json\n{TEXT}", "does not end with the fence"),
        (f"```json\n{TEXT}\n```\nEnjoy!", "does not end with the fence"),
        (f"```json\n{TEXT[:-9]}\n```", "no valid JSON; it may have been cut off"),
        (f"Here it is:\n```json\n{TEXT}\n```", "text before its fenced caption"),
        ("```python\nprint()\n```", "fenced as 'python'"),
        ('{"prompt": "A fox", "seed": 3, "gide": 6, "a": 1}', "a record with a, gide beside"),
        (f"~~~json\n{TEXT}\n~~~", "fenced with ~~~; a caption is fenced with three backticks"),
        ("~~~\nA fox.\n~~~", "fenced with ~~~"),
        (f"'''{TEXT}'''", "fenced with '''"),
        (f'"""json\n{TEXT}\n"""', 'fenced with """'),
        ("<think>A fox, then.</think>\nA red fox runs.", "holds <think>, a tag of an upsampler's"),
        (f"<think>A fox.\n{TEXT}", "holds <think>"),
        (f"<think>{TEXT}</think>", "holds <think>"),
        (f"<think>A fox.</think>{TEXT[:-2]}", "holds <think>"),
        ("<final_prompt>A fox.</final_prompt>", "holds <final_prompt>"),
        (f"<think>x</think><answer>{TEXT}</answer>", "holds <think>"),
        ('{"prompt": 3}', "whose prompt is 3, not a text"),
        ('{"prompt": "a", "negative_prompt": ["b"]}', "whose negative_prompt is"),
        ('{"negative_prompt": "b", "prompt": null}', "whose prompt is None"),
        ('{"caption": "A fox"}', "has its text under 'caption'"),
        (json.dumps({"upsampled_prompt": TEXT}), "has its text under 'upsampled_prompt'"),
    ],
)
def test_unwrap_refuses(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        captions.unwrap(text)


def test_unwrap_warns():
    with pytest.warns(UserWarning, match="holds model_mode and vision_path, which is not read"):
        text = json.dumps({"model_mode": "image2video", "vision_path": "a.jpg", "prompt": TEXT})
        assert captions.unwrap(text) == (TEXT, None)
    for broken in (TEXT[:-1], str(CAPTION)):
        with pytest.warns(UserWarning, match="looks like a JSON caption but is no valid JSON"):
            assert captions.unwrap(broken) == (broken, None)
    with pytest.raises(TypeError, match="is a dict, not a string; give a caption by json.dumps"):
        captions.unwrap(CAPTION)


@pytest.mark.parametrize("key", ["seed", "fps", "num_frames", "resolution", "guidance", "steps"])
def test_settings_of_a_record_are_named(key):
    record = json.dumps({"prompt": TEXT, "duration": "7s", "aspect_ratio": "1,1", key: 3})
    with pytest.warns(UserWarning) as log:
        assert captions.unwrap(record) == (TEXT, None)
    [message] = [str(one.message) for one in log]
    words = message.partition("also holds ")[2].partition(", which is not read")[0]
    assert sorted(words.split(" and ")) == sorted(["duration", "aspect_ratio", key])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is a JSON array and no caption"),
        ('["a", {}]', "is a JSON array"),
        ('"A fox."', "is a JSON string, in quotes, and no caption"),
        ("{}", "a JSON object with no key of a caption"),
        ('{"scene": "A fox"}', "no key of a caption"),
        ('```\n["a"]\n```', "is a JSON array"),
    ],
)
def test_json_that_is_no_caption_is_named(text, message):
    with pytest.warns(UserWarning, match=message):
        captions.unwrap(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plain in (TEXT, "A fox.", "7", "true", "[a fox", '"Go," he said.'):
            assert captions.unwrap(plain) == (plain, None)


def test_prompts_of_every_form_have_the_ids_of_what_they_hold(byte_tokenizer):
    def ids(text, **settings):
        request = prepare(Config(), byte_tokenizer, text, Settings(**SMALL, **settings)).request
        return request.text_ids.tolist(), request.neg_text_ids.tolist()

    caption = '{"subjects": []}'
    record = json.dumps({"prompt": caption, "negative_prompt": "blurry"})
    expected = ids(caption, negative_prompt="blurry")
    assert ids(record) == ids(f"[{record}]") == ids(f"```json\n{record}\n```") == expected
    assert ids(caption) != expected
    # What the user gave counts, an empty text too.
    assert ids(record, negative_prompt="ugly") == ids(caption, negative_prompt="ugly")
    assert ids(record, negative_prompt="") == ids(caption, negative_prompt="")
    # In a batch each has its own, and the recipe's where it has none.
    image = Settings(**SMALL | dict(num_frames=1), prompt_style="phyai")
    prepared = prepare(Config(), byte_tokenizer, [record, caption], image)
    assert [one.negative_prompt for one in prepared.texts] == ["blurry", ""]
    assert prepared.sources["negative_prompt"] == "the prompt's record"


def test_a_caption_as_an_object_is_refused(byte_tokenizer):
    with pytest.raises(TypeError, match=r"json\.dumps"):
        prepare(Config(), byte_tokenizer, CAPTION, Settings(**SMALL))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("text", [RECORD, f"[{RECORD}]", f"{RECORD}\r\n", f"```\n{TEXT}\n```"])
def test_files_of_every_form(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert prompt.read_prompt(tmp_path / name) == text
    assert captions.unwrap(text)[0] == TEXT


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", f"{RECORD}\n{RECORD}\n", r"a\.jsonl holds 2 prompts; give one"),
        ("a.json", f"[{RECORD}, {RECORD}]", "holds 2 prompts"),
        ("a.jsonl", "A fox.\n", "no JSON object"),
        ("a.jsonl", '"A fox."\n', "no JSON object"),
        ("a.jsonl", f"{RECORD}\nA fox.\n", "no JSON object"),
        ("a.json", '{"prompt": "A fox", "stebs": 3}', "with stebs beside its prompt"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text.encode())
    with pytest.raises(ValueError, match=message):
        prompt.read_prompt(tmp_path / name)


# The schema

TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
}  # fmt: skip


def is_valid(value, schema):
    """Whether a value satisfies the keywords of JSON Schema that ours uses."""
    unknown = schema.keys() - {
        "$schema", "title", "description", "type", "properties", "required", "items", "pattern",
        "additionalProperties", "enum", "minimum", "exclusiveMinimum", "anyOf", "if", "then",
    }  # fmt: skip
    assert not unknown
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(isinstance(value, TYPES[kind]) for kind in kinds):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(is_valid(value, one) for one in schema["anyOf"]):
        return False
    if "if" in schema and is_valid(value, schema["if"]) and not is_valid(value, schema["then"]):
        return False
    if isinstance(value, str):
        return "pattern" not in schema or re.search(schema["pattern"], value) is not None
    if isinstance(value, int | float):
        return value >= schema.get("minimum", value) and value > schema.get("exclusiveMinimum", -1)
    if isinstance(value, list):
        return all(is_valid(one, schema.get("items", {})) for one in value)
    properties = schema.get("properties", {})
    return (
        value.keys() >= set(schema.get("required", []))
        and (schema.get("additionalProperties", True) or value.keys() <= properties.keys())
        and all(is_valid(one, properties.get(key, {})) for key, one in value.items())
    )


@pytest.mark.filterwarnings("ignore:the caption contradicts")
def test_schema_accepts_captions():
    schema = captions.caption_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"])[: len(CAPTION)] == list(CAPTION)
    assert is_valid(CAPTION, schema)
    assert is_valid(IMAGE, schema)
    made = json.loads(resolve(TEXT, num_frames=49, fps=29.97, width=704, height=1280).prompt)
    assert is_valid(made, schema)


DAMAGED = {
    "no subjects": {key: CAPTION[key] for key in CAPTION if key != "subjects"},
    "no actions": {key: CAPTION[key] for key in CAPTION if key != "actions"},
    "no text": {key: CAPTION[key] for key in CAPTION if key != "text_renders"},
    "misspelt": CAPTION | {"ligthing": {}},
    "misspelt below": CAPTION | {"lighting": CAPTION["lighting"] | {"shadow": "long"}},
    "subjects are texts": CAPTION | {"subjects": ["a fox"]},
    "lighting is a text": CAPTION | {"lighting": "Morning"},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_check_caption_agrees_with_the_schema(damage):
    assert not is_valid(DAMAGED[damage], captions.caption_schema())
    assert check_caption(DAMAGED[damage])


@pytest.mark.parametrize(
    "change", [{"fps": 0}, {"duration": "0:07"}, {"aspect_ratio": "16:9"}, {"resolution": {"H": 1}}]
)
def test_schema_refuses_values(change):
    assert not is_valid(CAPTION | change, captions.caption_schema())


def test_check_caption():
    assert check_caption(CAPTION) == check_caption(TEXT) == check_caption(RECORD) == []
    assert check_caption(IMAGE) == []
    assert check_caption({"scene_imagination": "x"} | CAPTION) == []
    without = {key: value for key, value in CAPTION.items() if key not in ("duration", "fps")}
    assert check_caption(without) == []  # the style adds them
    other_name = {key: value for key, value in CAPTION.items() if key != "text_renders"}
    assert check_caption(other_name | {"text_and_signage_elements": []}) == []
    assert check_caption(other_name) == ["text_renders or text_and_signage_elements is missing"]

    caption = copy.deepcopy(CAPTION)
    caption["cinematograpy"] = caption.pop("cinematography")
    caption["BackgroundSetting"] = caption.pop("background_setting")
    caption["lighting"]["shadow"] = caption["lighting"].pop("shadows")
    caption["subjects"][0]["clothes"] = "none"
    caption["subjects"][0]["facial_feature"] = "none"
    caption["subjects"][0]["wings"] = 0  # a subject may have keys of its own
    caption["actions"].append({"time": "0:07-0:08"})
    caption["camera"] = "a phone"
    del caption["context"], caption["segments"]
    assert check_caption(caption) == [
        "subjects[0].clothes is unknown: did you mean clothing?",
        "subjects[0].facial_feature is unknown: did you mean facial_features?",
        "lighting.shadow is unknown: did you mean shadows?",
        "actions[1].description is missing",
        "cinematograpy is unknown: did you mean cinematography?",
        "BackgroundSetting is unknown: did you mean background_setting?",
        "camera is unknown",
        "context is missing",
        "segments is missing",
    ]
    with pytest.raises(ValueError, match="no JSON object: 'A fox'"):
        check_caption("A fox")


def test_keys_come_from_the_schema(monkeypatch):
    schema = copy.deepcopy(captions.caption_schema())
    schema["properties"]["camera"] = {"type": "string"}
    schema["required"].append("camera")
    monkeypatch.setattr(captions, "caption_schema", lambda: schema)
    assert check_caption(CAPTION) == ["camera is missing"]
    assert check_caption(CAPTION | {"camera": "a phone"}) == []
