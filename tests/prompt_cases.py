"""Prompts of every kind, and a tokenizer that merges as Qwen3 does."""

import os
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from cosmos3_jax.checkpoint.tiny_tokenizer import SPECIAL_TOKENS, write_tokenizer
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


def resolve(prompt, negative_prompt=None, *, style, **arguments):
    return prompts.resolve_prompts(prompt, negative_prompt, style=style, **(NANO | arguments))
