"""A complete text_tokenizer folder with 264 ids, for small checkpoints, tests and demonstrations.

Byte-level BPE without merges, so the id of an ordinary token is its UTF-8 byte; then the special
tokens of Qwen's vocabulary that generation meets. Files and behaviour (NFC, pre-tokeniser) follow
Qwen's, so `transformers.AutoTokenizer`, `Qwen2TokenizerFast` and `models.tokenizer`
give the same ids.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_tokenizer(folder: str | Path) -> Path:
    """Write the tokenizer's files into `folder`, which is made if need be, and return it.

    The bytes written are the same every time. Files of these names are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config = named | {
        "tokenizer_class": "Qwen2TokenizerFast",
        "model_max_length": 262144,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
    }
    special_tokens_map = named | {"additional_special_tokens": list(SPECIAL_TOKENS)}
    for name, content in {
        "tokenizer.json": _tokenizer().to_str(pretty=True),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special_tokens_map),
        "chat_template.jinja": CHAT_TEMPLATE,
    }.items():
        (folder / name).write_bytes(content.encode("utf-8"))
    return folder


def _tokenizer() -> tokenizers.Tokenizer:
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
    )
    return tokenizer


def byte_characters() -> list[str]:
    """The character by which byte-level BPE (GPT-2) names each of the 256 bytes: itself if it is
    visible.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
