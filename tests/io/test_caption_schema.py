"""The schema of a caption, and what is said of its keys."""

import copy
import json
import re

import pytest
from caption_cases import CAPTION, IMAGE, RECORD, TEXT, resolve

from cosmos3_jax import check_caption
from cosmos3_jax.io import captions

pytestmark = pytest.mark.filterwarnings("ignore:outside of what the model was trained on")

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
