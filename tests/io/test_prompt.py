"""Prompts as text: styles, captions, arguments and files."""

import json

import numpy as np
import pytest
from prompt_cases import CAPTION, IMAGE, NANO, PROMPTS, SYSTEM, resolve

from cosmos3_jax.io import prompt as prompts

DURATION = "The video is 7.9 seconds long and is of 24 FPS."
SIZE = "This video is of 720x1280 resolution."
NOT_DURATION = "The video is not 7.9 seconds long and is not of 24 FPS."
NOT_SIZE = "This video is not of 720x1280 resolution."


# Texts, by hand


def test_native_text():
    resolved = resolve(" A cat... ", "blurry. ", style="native")
    assert resolved.prompt == f"A cat. {DURATION} {SIZE}"
    assert resolved.negative_prompt == f"blurry. {DURATION} {SIZE}"
    assert resolved.system_prompt is None
    assert resolved.style == "native"


def test_native_default_negative_is_json_followed_by_sentences():
    negative = resolve("A cat", style="native").negative_prompt
    assert negative == f"{prompts.built_in_negative_prompt()}. {DURATION} {SIZE}"


def test_native_does_not_parse_the_negative():
    negative = resolve("A cat", CAPTION, style="native").negative_prompt
    assert negative == f"{CAPTION}. {DURATION} {SIZE}"


@pytest.mark.parametrize("empty", ["", " \n", "..."])
def test_native_empty_negative_is_the_sentences_alone(empty):
    assert resolve("A cat", empty, style="native").negative_prompt == f"{DURATION} {SIZE}"


@pytest.mark.filterwarnings("ignore:the caption contradicts")
def test_native_json_caption():
    expected = (
        '{"fps": 24.0, "subjects": ["caf\\u00e9"], "aspect_ratio": "16,9", "duration": "7s", '
        '"resolution": {"H": 720, "W": 1280}}'
    )
    assert resolve(CAPTION, style="native").prompt == expected
    assert resolve(f"\n {CAPTION}\n", style="native").prompt == expected
    square = resolve('{"a": "\u00e9"}', style="native", aspect_ratio="1,1", fps=29.97).prompt
    assert square == (
        '{"a": "\\u00e9", "duration": "6s", "fps": 29.97, "resolution": {"H": 720, "W": 1280}, '
        '"aspect_ratio": "1,1"}'
    )


def test_phyai():
    resolved = resolve(" A cat.. ", style="phyai")
    assert resolved.prompt == f"A cat. {DURATION} {SIZE}"
    assert resolved.negative_prompt == prompts.built_in_negative_prompt()
    assert resolved.system_prompt is None
    assert resolve("A cat", " blurry. ", style="phyai").negative_prompt == " blurry. "
    assert resolve("A cat", "", style="phyai").negative_prompt == ""


def test_phyai_json_caption_has_no_aspect_ratio_of_its_own():
    injected = '{"a": 1, "duration": "7s", "fps": 24.0, "resolution": {"H": 720, "W": 1280}'
    assert resolve('{"a": 1}', style="phyai").prompt == injected + "}"
    with_ratio = resolve('{"a": 1}', style="phyai", aspect_ratio="9,16").prompt
    assert with_ratio == injected + ', "aspect_ratio": "9,16"}'


def test_diffusers():
    resolved = resolve(" A cat.. ", "blurry.", style="diffusers")
    assert resolved.prompt == f" A cat.. . {DURATION} {SIZE}"
    assert resolved.negative_prompt == f"blurry. {NOT_DURATION} {NOT_SIZE}"
    assert resolved.system_prompt == SYSTEM
    assert resolve("", style="diffusers").prompt == f"{DURATION} {SIZE}"
    for negative in (None, "", "..."):
        text = resolve("A cat", negative, style="diffusers").negative_prompt
        assert text == f"{NOT_DURATION} {NOT_SIZE}"


@pytest.mark.filterwarnings("ignore:the caption contradicts")
def test_diffusers_takes_json_for_text():
    assert resolve(CAPTION, style="diffusers").prompt == f"{CAPTION}. {DURATION} {SIZE}"


@pytest.mark.parametrize("style", prompts.PROMPT_STYLES)
def test_image(style):
    resolved = resolve("A cat.", "blurry.", style=style, **IMAGE)
    sentence = "This image is of 1024x768 resolution."
    phyai = sentence.replace("image", "video")  # as it says of one frame too
    assert resolved.prompt == f"A cat. {phyai if style == 'phyai' else sentence}"
    negatives = {"native": f"blurry. {sentence}", "phyai": "blurry."}
    negatives["diffusers"] = "blurry. This image is not of 1024x768 resolution."
    assert resolved.negative_prompt == negatives[style]
    systems = {
        "diffusers": "You are a helpful assistant who will generate images from a give prompt."
    }
    assert resolved.system_prompt == systems.get(style)


@pytest.mark.filterwarnings("ignore:the caption contradicts")
def test_image_caption_loses_its_time():
    caption = '{"duration": "5s", "subjects": ["a"], "fps": 24}'
    expected = '{"subjects": ["a"], "resolution": {"H": 1024, "W": 768}'
    assert resolve(caption, style="phyai", **IMAGE).prompt == expected + "}"
    native = resolve(caption, style="native", **IMAGE).prompt
    assert native == expected + ', "aspect_ratio": "3,4"}'


@pytest.mark.parametrize("text", ['["a"]', '"a"', "3", "null", "{broken"])
def test_only_a_json_object_is_a_caption(text):
    assert resolve(text, style="native").prompt == f"{text}. {DURATION} {SIZE}"


@pytest.mark.parametrize("style", ["native", "phyai"])
def test_empty_positive_keeps_the_separator(style):
    assert resolve("", style=style).prompt == f". {DURATION} {SIZE}"


@pytest.mark.parametrize("style", prompts.PROMPT_STYLES)
def test_system_prompt_can_be_given_or_turned_off(style):
    assert resolve("A cat", style=style, system_prompt="Be brief.").system_prompt == "Be brief."
    assert resolve("A cat", style=style, system_prompt="").system_prompt is None
    assert resolve("A cat", style=style, system_prompt=False).system_prompt is None


def test_fractional_rates_round_as_the_model_reads_them():
    text = resolve("A cat", style="native", num_frames=61, fps=29.97).prompt
    assert (
        text == "A cat. The video is 2.0 seconds long and is of 30 FPS. "
        "This video is of 720x1280 resolution."
    )


def test_built_in_negative_is_a_normalised_structured_caption():
    text = prompts.built_in_negative_prompt()
    caption = json.loads(text)
    assert text == json.dumps(caption)
    assert 1500 <= len(text) <= 5000
    assert {
        "subjects",
        "background_setting",
        "lighting",
        "cinematography",
        "actions",
    } <= caption.keys()
    # The request's metadata, not the file, says these.
    assert not {"duration", "fps", "resolution", "aspect_ratio"} & caption.keys()


# Pitfall 14: the styles are different prompts to the model


@pytest.mark.parametrize("text", ["A cat. ", '{"a": 1}'])
def test_every_style_gives_other_ids(byte_tokenizer, text):
    pairs = [
        prompts.encode_prompts(byte_tokenizer, resolve(text, style=style))
        for style in prompts.PROMPT_STYLES
    ]
    negatives = {tuple(negative) for _, negative in pairs}
    assert len(negatives) == 3
    assert len({(tuple(ids), tuple(negative)) for ids, negative in pairs}) == 3


def test_each_difference_reaches_the_ids(byte_tokenizer):
    def ids(text="A cat", negative="blurry", **arguments):
        return prompts.encode_prompts(byte_tokenizer, resolve(text, negative, **arguments))

    without_system, with_system = ids(style="diffusers", system_prompt=""), ids(style="diffusers")
    turn = list(b"system\n" + SYSTEM.encode())
    assert with_system[0] == [257, *turn, 258, 10] + without_system[0]
    # The same words, the positive sentences in both: only the negative's metadata is left to
    # differ.
    native, phyai = ids(style="native"), ids(style="phyai")
    assert native[0] == phyai[0] == without_system[0]
    assert len({tuple(x[1]) for x in (native, phyai, without_system)}) == 3
    # JSON injection
    native, phyai, diffusers = (
        ids('{"a": 1}', style=s, system_prompt="")[0] for s in prompts.PROMPT_STYLES
    )
    assert len(native) - len(phyai) == len(', "aspect_ratio": "16,9"')
    assert bytes(i for i in diffusers if i < 256).count(b'{"a": 1}. The video is 7.9') == 1


# Arguments and files


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"style": "nativ"},
            ValueError,
            r"'nativ' is unknown; choose one of native, phyai, diffusers",
        ),
        ({"prompt": None}, TypeError, "prompt is a NoneType"),
        ({"prompt": ["A cat"]}, TypeError, "prompt is a list"),
        ({"prompt": "\ud800"}, ValueError, "not valid Unicode"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt is a int"),
        ({"system_prompt": True}, TypeError, "system_prompt is a bool"),
        ({"num_frames": 0}, ValueError, "num_frames=0"),
        ({"height": 720.0}, ValueError, "height=720.0"),
        ({"fps": 0}, ValueError, "fps=0.0"),
        ({"fps": float("nan")}, ValueError, "fps=nan"),
    ],
)
def test_impossible_arguments(change, error, message):
    arguments = {"prompt": "A cat", "negative_prompt": None, "style": "native"} | NANO | change
    with pytest.raises(error, match=message):
        prompts.resolve_prompts(**arguments)


def test_read_prompt_is_byte_exact(tmp_path):
    text = "  A cat.\r\nIt purrs.\r \u96e8\n\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    assert prompts.read_prompt(tmp_path / "prompt.txt") == text
    (tmp_path / "caption.json").write_bytes(PROMPTS["json indented"].encode())
    assert prompts.read_prompt(str(tmp_path / "caption.json")) == PROMPTS["json indented"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b"\xef\xbb\xbfA cat", "byte order mark"),
        ("a.txt", b" \n", 'is empty; for an empty prompt pass ""'),
        ("a.json", b'{"a": 1,}', "no JSON object"),
        ("a.JSON", b'["a"]', "no JSON object"),
    ],
)
def test_read_prompt_refuses(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prompts.read_prompt(tmp_path / name)


def test_read_prompt_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        prompts.read_prompt(tmp_path / "absent.txt")


def test_pad_token_ids():
    ids, mask = prompts.pad_token_ids([[5, 6, 7], [8]], bucket=4)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert ids.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert mask.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert prompts.pad_token_ids([[1] * 8], bucket=4)[0].shape == (1, 8)
    assert prompts.pad_token_ids([[1] * 9], bucket=4)[0].shape == (1, 12)


@pytest.mark.parametrize(("id_lists", "bucket"), [([], 4), ([[1], []], 4), ([[1]], 0)])
def test_pad_token_ids_refuses(id_lists, bucket):
    with pytest.raises(ValueError, match="at least 1 token"):
        prompts.pad_token_ids(id_lists, bucket)
