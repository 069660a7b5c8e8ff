"""The forms that hold a caption: records, arrays, lines, fences, answers."""

import json
import re
import warnings

import pytest
from caption_cases import CAPTION, RECORD, SMALL, TEXT

from cosmos3_jax.config import Config
from cosmos3_jax.io import captions, prompt
from cosmos3_jax.io.prepare import prepare
from cosmos3_jax.io.settings import Settings

pytestmark = pytest.mark.filterwarnings("ignore:outside of what the model was trained on")

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
