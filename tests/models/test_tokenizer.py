"""The tokenizer and its chat template against diffusers' pipeline and transformers."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_cases import PROMPTS, REAL, SIZES, resolve, write_merging_tokenizer

from cosmos3_jax.checkpoint.tiny_tokenizer import SPECIAL_TOKENS, write_tokenizer
from cosmos3_jax.config import ConfigError
from cosmos3_jax.io import prompt as prompts


@pytest.fixture(scope="session")
def merging_folder(tmp_path_factory):
    return write_merging_tokenizer(tmp_path_factory.mktemp("merging"))


@pytest.fixture(scope="session", params=["tiny", "merging", "real"])
def folder(request, byte_folder, merging_folder):
    if request.param == "real" and not REAL:
        pytest.skip("COSMOS3_TOKENIZER names no folder")
    return {"tiny": byte_folder, "merging": merging_folder, "real": REAL}[request.param]


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


# Byte-exactness

# Characters that a newer Unicode table may compose differently are left out: unassigned and
# surrogates.
texts = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)


@settings(deadline=None)  # a busy machine is no failure
@given(text=texts)
def test_chat_carries_the_text_verbatim(byte_tokenizer, text):
    assert (
        byte_tokenizer.render_chat(text)
        == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    with_system = byte_tokenizer.render_chat(text, "Be brief.")
    assert (
        with_system
        == f"<|im_start|>system\nBe brief.<|im_end|>\n{byte_tokenizer.render_chat(text)}"
    )
    assert byte_tokenizer.render_chat(text, "") == byte_tokenizer.render_chat(text)


@settings(deadline=None)  # a busy machine is no failure
@given(text=texts)
def test_decode_inverts_encode(byte_tokenizer, text):
    ids = byte_tokenizer.encode_chat(text)
    chat = byte_tokenizer.render_chat(
        unicodedata.normalize("NFC", text)
    )  # the tokenizer's own normalisation
    assert (
        byte_tokenizer.backend.decode(ids, skip_special_tokens=False)
        == f"{chat}<|im_end|><|vision_start|>"
    )
    assert ids[-2:] == [258, 259]


@settings(deadline=None)  # a busy machine is no failure
@given(text=texts)
def test_tiny_ids_are_the_bytes(byte_tokenizer, text):
    body = byte_tokenizer.encode_chat(text)[len("<user\n") : -len(">\n<assistant\n__")]
    assert body == list(unicodedata.normalize("NFC", text).encode())


def test_template_carries_the_text_verbatim(tokenizer):
    text = "  two spaces\r\n\ttab \u3000 and an end \n"
    assert f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" == tokenizer.render_chat(
        text
    )


def test_special_tokens_in_the_text_become_tokens(byte_tokenizer):
    assert byte_tokenizer.encode_chat("a<|im_end|>b")[6:9] == [ord("a"), 258, ord("b")]


# Loading


def test_tiny_tokenizer_is_deterministic(byte_folder, tmp_path):
    write_tokenizer(tmp_path / "new" / "folder")
    names = sorted(path.name for path in byte_folder.iterdir())
    assert names == [
        "chat_template.jinja",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in names:
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (
            byte_folder / name
        ).read_bytes()


def test_tiny_vocabulary(byte_tokenizer):
    assert byte_tokenizer.vocab_size == 256 + len(SPECIAL_TOKENS) == 264
    assert [byte_tokenizer.backend.token_to_id(token) for token in SPECIAL_TOKENS] == list(
        range(256, 264)
    )


def test_template_may_be_in_the_config(byte_tokenizer, tmp_path):
    folder = write_tokenizer(tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(FileNotFoundError, match=r"chat_template\.jinja is missing; fetch"):
        prompts.Tokenizer.from_folder(folder)
    config = {"chat_template": template, "eos_token": {"content": "<|im_end|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert prompts.Tokenizer.from_folder(folder).encode_chat("A cat") == byte_tokenizer.encode_chat(
        "A cat"
    )


def test_block_lines_of_a_template_leave_no_white_space(tmp_path):
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "  {% if true %}\n{{ messages[0].content }}\n  {% endif %}\n"
    )
    assert prompts.Tokenizer.from_folder(folder).render_chat("A cat") == "A cat\n"


def test_truncation_and_padding_of_the_file_are_off(byte_tokenizer, tmp_path):
    folder = write_tokenizer(tmp_path)
    backend = prompts.Tokenizer.from_folder(folder).backend
    backend.enable_truncation(5)
    backend.enable_padding(length=100)
    backend.save(str(folder / "tokenizer.json"))
    assert prompts.Tokenizer.from_folder(folder).encode_chat("A cat") == byte_tokenizer.encode_chat(
        "A cat"
    )


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
    [
        ("{% for %}", "is not a chat template: Expected"),
        ("{{ messages[0].content | trim }}", "alters the prompt"),
    ],
)
def test_bad_templates_are_refused(tmp_path, template, error):
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=error):
        prompts.Tokenizer.from_folder(folder).encode_chat(" A cat ")
