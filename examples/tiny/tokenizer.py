"""The tiny model's tokenizer: every word of the world is one token, any other text is its bytes.

Files and behaviour follow Qwen's (NFC, pre-tokeniser, byte-level BPE), so that
`transformers.Qwen2TokenizerFast` and `cosmos3_jax.models.tokenizer` give the same ids. The merges
spell each word from its beginning: all that they can join is the beginning of a known word.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from cosmos3_jax.checkpoint.tiny_tokenizer import SPECIAL_TOKENS, byte_characters, write_tokenizer
from examples.tiny import grammar

# What begins a sentence; and the rest of those in which a prompt says how long and large a clip is.
CAPITALS = ("Over", "On", "In", "It", "The", "This")
METADATA_WORDS = ("video", "is", "not", "seconds", "long", "FPS", "of", "resolution")
# Splits a text into words with the space before them, single digits, marks and white space.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def words() -> list[str]:
    """All that become one token, as BPE names them: "Ġ" is the space before a word.

    A small letter without one begins no token: it may stand within a word.
    """
    letters = {word for word in grammar.vocabulary() if word.isalpha()}
    notes = {word[0].upper() for word in grammar.vocabulary() if word[-1].isdigit()}
    spaced = letters | notes | {*CAPITALS, *METADATA_WORDS}
    return sorted({f"Ġ{word}" for word in spaced} | set(CAPITALS))


def merges() -> list[tuple[str, str]]:
    """Each beginning of a word and its next letter; shorter ones first, and the space before all
    letters: it is taken before "The" is.
    """
    pairs = {(word[:end], word[end]) for word in words() for end in range(1, len(word))}
    return sorted(pairs, key=lambda pair: (len(pair[0]), pair[0][0] != "Ġ", pair))


def write(folder: str | Path) -> Path:
    """Write the tokenizer's files into `folder`, which is made if need be, and return it."""
    folder = write_tokenizer(folder)  # chat template and settings are those of the random default
    (folder / "tokenizer.json").write_text(_tokenizer().to_str(pretty=False), encoding="utf-8")
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if len(vocabulary["vocab"]) != 256 + len(merges()):
        raise ValueError("two beginnings of words are the same token; the ids would have holes")
    return folder


def _tokenizer() -> tokenizers.Tokenizer:
    pairs = merges()
    tokens = [*byte_characters(), *("".join(pair) for pair in pairs)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS]
    )
    return tokenizer
