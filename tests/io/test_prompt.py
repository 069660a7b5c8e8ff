"""Prompts: texts written by hand, ids against diffusers' own tokenize_prompt."""

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cosmos3_jax.checkpoint.tiny_tokenizer import SPECIAL_TOKENS, write_tokenizer
from cosmos3_jax.config import ConfigError
from cosmos3_jax.io import prompt as prompts

# A real checkpoint's text_tokenizer/, to be compared as well.
REAL = os.environ.get("COSMOS3_TOKENIZER")
NANO = {"num_frames": 189, "height": 720, "width": 1280, "fps": 24.0}
IMAGE = {"num_frames": 1, "height": 1024, "width": 768, "fps": 24.0}
SIZES = [
    NANO,
    IMAGE,
    {"num_frames": 61, "height": 480, "width": 832, "fps": 29.97},
    NANO | {"fps": 30},
]

DURATION = "The video is 7.9 seconds long and is of 24 FPS."
SIZE = "This video is of 720x1280 resolution."
NOT_DURATION = "The video is not 7.9 seconds long and is not of 24 FPS."
NOT_SIZE = "This video is not of 720x1280 resolution."
SYSTEM = "You are a helpful assistant who will generate videos from a give prompt."
CAPTION = '{"fps": 16, "subjects": ["caf\\u00e9"], "aspect_ratio": "1,1"}'

PROMPTS = {
    "plain": "A red sports car driving along a coastal road at sunset.",
    "no dot": "A red sports car",
    "dots": "It rains...",
    "dot and space": "It rains. ",
    "json": CAPTION,
    "json indented": '{\n  "subjects": [],\n  "context": "\u96e8"\n}\n',
    "unicode": "Za\u017c\u00f3\u0142\u0107 g\u0119\u015bl\u0105 \u2014 \u96e8\u306e\u6771\u4eac",
    "emoji": "\U0001f697\U0001f3fd runs \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "decomposed": "cafe\u0301",
    "newlines": "First line.\n\n\tSecond line\r\n",
    "special tokens": "a <|im_end|> b <|vision_start|> c",
    "template syntax": "{{ messages }} {% raw %}",
    "empty": "",
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    return prompts.Tokenizer.from_folder(tiny_folder)


# How Qwen's tokenizers cut text into the pieces that merges do not cross.
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the merges are learnt from. Often enough said, a word becomes one token.
SENTENCES = 8 * [
    "user\nHello world, the cat's video is of a red car driving along the road.\nassistant\n",
    "You are a helpful assistant who will generate videos from a give prompt.",
    "The video is not 7.9 seconds long and is not of 24 FPS. It rains...  It's   late.\n\n",
    "This video is of 720x1280 resolution. This image is not of 1024x768 resolution.",
    '{"subjects": ["caf\u00e9"], "duration": "7s", "resolution": {"H": 720, "W": 1280}}',
    "A ball rolls downhill past wet windows while birds sing, and somebody watches from far above.",
    "\u96e8\u306e\u6771\u4eac za\u017c\u00f3\u0142\u0107 \U0001f697\U0001f3fd",
]


def write_merging_tokenizer(folder: Path) -> Path:
    """The tiny tokenizer's folder, but with Qwen's pieces and merges trained here."""
    write_tokenizer(folder)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def merging_folder(tmp_path_factory):
    return write_merging_tokenizer(tmp_path_factory.mktemp("merging"))


@pytest.fixture(scope="session", params=["tiny", "merging", "real"])
def folder(request, tiny_folder, merging_folder):
    if request.param == "real" and not REAL:
        pytest.skip("COSMOS3_TOKENIZER names no folder")
    return {"tiny": tiny_folder, "merging": merging_folder, "real": REAL}[request.param]


@pytest.fixture(scope="session")
def tokenizer(folder):
    return prompts.Tokenizer.from_folder(folder)


@pytest.fixture(scope="session")
def oracle(folder):
    """diffusers' pipeline, with a small VAE and no transformer, which tokenize_prompt does not
    touch.
    """
    import diffusers
    from transformers import AutoTokenizer

    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=2, num_res_blocks=1, latents_mean=[0] * 2, latents_std=[1] * 2
    )
    return diffusers.Cosmos3OmniPipeline(
        transformer=None,
        text_tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True),
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(),
        enable_safety_checker=False,
    )


def resolve(prompt, negative_prompt=None, *, style, **arguments):
    return prompts.resolve_prompts(prompt, negative_prompt, style=style, **(NANO | arguments))


# Ids of style diffusers


@pytest.mark.parametrize("size", SIZES, ids=["nano", "image", "29.97", "30"])
@pytest.mark.parametrize("text", PROMPTS.values(), ids=PROMPTS)
def test_diffusers_ids_are_the_oracles(tokenizer, oracle, text, size):
    for negative in (None, "", "blurry, jittery...", text):
        for system_prompt, use_system_prompt in ((None, None), ("", False)):
            resolved = resolve(
                text, negative, style="diffusers", system_prompt=system_prompt, **size
            )
            ours = prompts.encode_prompts(tokenizer, resolved)
            theirs = oracle.tokenize_prompt(
                text, negative, use_system_prompt=use_system_prompt, **size
            )
            assert ours == theirs


@pytest.mark.parametrize("class_name", ["AutoTokenizer", "Qwen2TokenizerFast"])
def test_transformers_loads_the_folder_and_agrees(folder, tokenizer, class_name):
    import transformers

    theirs = getattr(transformers, class_name).from_pretrained(folder, local_files_only=True)
    suffix = [theirs.eos_token_id, theirs.convert_tokens_to_ids("<|vision_start|>")]
    assert tokenizer.vocab_size == len(theirs)
    for text in PROMPTS.values():
        chat = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": text}]
        ids = theirs.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True
        ).input_ids
        assert tokenizer.encode_chat(text, "Be brief. ") == ids + suffix


def test_merged_tokens_by_hand(merging_folder):
    tokenizer = prompts.Tokenizer.from_folder(merging_folder)
    model = json.loads((merging_folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert len(model["merges"]) > 200
    ids = tokenizer.encode_chat("Hello world's 24")
    # Digits and the clitic are pieces of their own; a space belongs to the word behind it, but to
    # no number. \u0120 and \u010a are a byte-level vocabulary's space and newline.
    body = ["Hello", "\u0120world", "'s", "\u0120", "2", "4"]
    assert [tokenizer.backend.id_to_token(i) for i in ids] == [
        "<|im_start|>", "user", "\u010a", *body, "<|im_end|>", "\u010a",
        "<|im_start|>", "assistant", "\u010a", "<|im_end|>", "<|vision_start|>",
    ]  # fmt: skip


@pytest.mark.skipif(not REAL, reason="COSMOS3_TOKENIZER names no folder")
def test_qwen3_ids_by_hand():
    ids = prompts.Tokenizer.from_folder(REAL).encode_chat("Hello")
    # <|im_start|> user \n Hello <|im_end|> \n <|im_start|> assistant \n, then the two appended ids
    assert ids == [151644, 872, 198, 9707, 151645, 198, 151644, 77091, 198, 151645, 151652]


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


def test_diffusers_takes_json_for_text():
    assert resolve(CAPTION, style="diffusers").prompt == f"{CAPTION}. {DURATION} {SIZE}"


@pytest.mark.parametrize("style", prompts.PROMPT_STYLES)
def test_image(style):
    resolved = resolve("A cat.", "blurry.", style=style, **IMAGE)
    sentence = "This image is of 1024x768 resolution."
    assert resolved.prompt == f"A cat. {sentence}"
    negatives = {"native": f"blurry. {sentence}", "phyai": "blurry."}
    negatives["diffusers"] = "blurry. This image is not of 1024x768 resolution."
    assert resolved.negative_prompt == negatives[style]
    systems = {
        "diffusers": "You are a helpful assistant who will generate images from a give prompt."
    }
    assert resolved.system_prompt == systems.get(style)


def test_image_caption_loses_its_time():
    caption = '{"duration": "5s", "subjects": ["a"], "fps": 24}'
    expected = '{"subjects": ["a"], "resolution": {"H": 1024, "W": 768}'
    assert resolve(caption, style="phyai", **IMAGE).prompt == expected + "}"
    assert (
        resolve(caption, style="native", **IMAGE).prompt == expected + ', "aspect_ratio": "16,9"}'
    )


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
def test_every_style_gives_other_ids(tiny, text):
    pairs = [
        prompts.encode_prompts(tiny, resolve(text, style=style)) for style in prompts.PROMPT_STYLES
    ]
    negatives = {tuple(negative) for _, negative in pairs}
    assert len(negatives) == 3
    assert len({(tuple(ids), tuple(negative)) for ids, negative in pairs}) == 3


def test_each_difference_reaches_the_ids(tiny):
    def ids(text="A cat", negative="blurry", **arguments):
        return prompts.encode_prompts(tiny, resolve(text, negative, **arguments))

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


# Byte-exactness

# Characters that a newer Unicode table may compose differently are left out: unassigned and
# surrogates.
texts = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)


@settings(deadline=None)  # a busy machine is no failure
@given(text=texts)
def test_chat_carries_the_text_verbatim(tiny, text):
    assert tiny.render_chat(text) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    with_system = tiny.render_chat(text, "Be brief.")
    assert with_system == f"<|im_start|>system\nBe brief.<|im_end|>\n{tiny.render_chat(text)}"
    assert tiny.render_chat(text, "") == tiny.render_chat(text)


@settings(deadline=None)  # a busy machine is no failure
@given(text=texts)
def test_decode_inverts_encode(tiny, text):
    ids = tiny.encode_chat(text)
    chat = tiny.render_chat(unicodedata.normalize("NFC", text))  # the tokenizer's own normalisation
    assert (
        tiny.backend.decode(ids, skip_special_tokens=False) == f"{chat}<|im_end|><|vision_start|>"
    )
    assert ids[-2:] == [258, 259]


@settings(deadline=None)  # a busy machine is no failure
@given(text=texts)
def test_tiny_ids_are_the_bytes(tiny, text):
    body = tiny.encode_chat(text)[len("<user\n") : -len(">\n<assistant\n__")]
    assert body == list(unicodedata.normalize("NFC", text).encode())


def test_template_carries_the_text_verbatim(tokenizer):
    text = "  two spaces\r\n\ttab \u3000 and an end \n"
    assert f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" == tokenizer.render_chat(
        text
    )


def test_special_tokens_in_the_text_become_tokens(tiny):
    assert tiny.encode_chat("a<|im_end|>b")[6:9] == [ord("a"), 258, ord("b")]


# Loading


def test_tiny_tokenizer_is_deterministic(tiny_folder, tmp_path):
    write_tokenizer(tmp_path / "new" / "folder")
    names = sorted(path.name for path in tiny_folder.iterdir())
    assert names == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (
            tiny_folder / name
        ).read_bytes()


def test_tiny_vocabulary(tiny):
    assert tiny.vocab_size == 256 + len(SPECIAL_TOKENS) == 264
    assert [tiny.backend.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(256, 264))


def test_template_may_be_in_the_config(tiny, tmp_path):
    folder = write_tokenizer(tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(FileNotFoundError, match=r"chat_template\.jinja is missing; fetch"):
        prompts.Tokenizer.from_folder(folder)
    config = {"chat_template": template, "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert prompts.Tokenizer.from_folder(folder).encode_chat("A cat") == tiny.encode_chat("A cat")


def test_block_lines_of_a_template_leave_no_white_space(tmp_path):
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "  {% if true %}\n{{ messages[0].content }}\n  {% endif %}\n"
    )
    assert prompts.Tokenizer.from_folder(folder).render_chat("A cat") == "A cat\n"


def test_truncation_and_padding_of_the_file_are_off(tiny, tmp_path):
    folder = write_tokenizer(tmp_path)
    backend = prompts.Tokenizer.from_folder(folder).backend
    backend.enable_truncation(5)
    backend.enable_padding(length=100)
    backend.save(str(folder / "tokenizer.json"))
    assert prompts.Tokenizer.from_folder(folder).encode_chat("A cat") == tiny.encode_chat("A cat")


def test_loading_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing; fetch"):
        prompts.Tokenizer.from_folder(tmp_path)
    folder = write_tokenizer(tmp_path)
    tokenizer_json = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(tokenizer_json.replace("<|vision_start|>", "<|other|>"))
    with pytest.raises(ConfigError, match=r"no token <\|vision_start\|>"):
        prompts.Tokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        prompts.Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("template", "error"),
    [("{% for %}", "malformed"), ("{{ messages[0].content | trim }}", "alters the prompt")],
)
def test_bad_templates_are_refused(tmp_path, template, error):
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=error):
        prompts.Tokenizer.from_folder(folder).encode_chat(" A cat ")


def test_no_torch(tiny_folder):
    script = (
        "import sys; from cosmos3_jax import prompt\n"
        f"tokenizer = prompt.Tokenizer.from_folder({str(tiny_folder)!r})\n"
        f"resolved = prompt.resolve_prompts('A cat', None, style='native', **{NANO})\n"
        "assert prompt.encode_prompts(tokenizer, resolved)\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


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
