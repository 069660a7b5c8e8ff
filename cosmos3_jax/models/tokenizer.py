"""A checkpoint's tokenizer and chat template: texts to token ids.

Not through transformers: its `AutoTokenizer` imports torch where torch is installed.
"""

import dataclasses
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import tokenizers

from cosmos3_jax import guard
from cosmos3_jax.config import ConfigError, read_json
from cosmos3_jax.models.chat_template import ChatTemplate

END_OF_TURN = "<|im_end|>"
START_OF_GENERATION = "<|vision_start|>"
MOST_BYTES = 64 * 2**20  # of a tokenizer.json; Qwen's has 11 MiB
MOST_SECONDS = 5.0  # in which a text of any length allowed becomes tokens; Qwen's takes one
MOST_GROWTH = 16  # how many times longer a normalizer may make a text
# Normalizers that make of a letter a few at most.
_SHORT = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer",
    "ByteLevel",
}  # fmt: skip
_WAY_OUT = "fetch the checkpoint's own text_tokenizer/ folder"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer together with its chat template.

    A special token's string in a user's text ("<|im_end|>") becomes that token, as it does in
    transformers.

    Attributes:
        backend: the tokenizer.
        template: of a chat.
        eos_token: what ends a turn.
        name: of the tokenizer and of the template, for messages.
    """

    backend: tokenizers.Tokenizer
    template: ChatTemplate
    eos_token: str
    name: tuple[str, str] = ("the tokenizer", "the chat template")

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Load a checkpoint's `text_tokenizer/`.

        Reads `tokenizer.json`; `chat_template.jinja`, else `chat_template` in
        `tokenizer_config.json`; and `eos_token` from the latter ("<|im_end|>" if absent). Raises
        FileNotFoundError for a missing file, ConfigError for a malformed one, for a vocabulary
        without the tokens that generation needs, and for a tokenizer that gives other ids each
        time.
        """
        folder = Path(path)
        file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
        backend = _backend(file)
        config = read_json(config_file) if config_file.exists() else {}
        eos_token = config.get("eos_token")
        eos_token = eos_token.get("content", 0) if isinstance(eos_token, dict) else eos_token
        eos_token = END_OF_TURN if eos_token in (None, "") else eos_token
        if not isinstance(eos_token, str):
            raise ConfigError(f"{config_file}: eos_token={eos_token!r:.80} must be a text")
        missing = [t for t in (eos_token, START_OF_GENERATION) if backend.token_to_id(t) is None]
        if missing:
            raise ConfigError(
                f"{file} has no token {guard.line(' or '.join(missing))}; is it a Cosmos3 "
                "text_tokenizer?"
            )
        source, name = _chat_template(folder, config)
        with guard.parsing(name, "a chat template", ConfigError, _WAY_OUT):
            template = ChatTemplate(source)
        return cls(backend, template, eos_token, (str(file), name))

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1: how many embedding rows the ids can reach."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def render_chat(self, text: str, system_prompt: str | None = None) -> str:
        """The chat as text, up to where the assistant's answer would begin.

        Raises ValueError if the template fails, does more than a template should (see
        `chat_template`), or does not carry `text` through unchanged.
        """
        messages = [{"role": "user", "content": text}]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
        with guard.parsing(self.name[1], "a chat template for prompts", ConfigError, _WAY_OUT):
            chat = self.template.render(
                messages=messages,
                add_generation_prompt=True,
                add_vision_id=False,
                eos_token=self.eos_token,
            )
            chat.encode("utf-8")  # half a letter, as in a template's "\ud800", has no bytes
        if text not in chat:
            raise ValueError(f"{self.name[1]} alters the prompt; use the checkpoint's own")
        return chat

    def encode_chat(self, text: str, system_prompt: str | None = None) -> list[int]:
        """Token ids of a prompt: the chat, then end of turn and start of generation.

        No BOS, no padding, no truncation. Qwen's tokenizer itself normalises what it gets (NFC).
        Raises ValueError as `render_chat` does, and if the tokenizer fails or takes too long.
        """
        chat = self.render_chat(text, system_prompt)
        with guard.parsing(self.name[0], "a tokenizer for this text", ConfigError, _WAY_OUT):
            # Not `encode`, which holds the interpreter: nothing else would run, nor end it.
            [encoding] = _within(
                MOST_SECONDS, lambda: self.backend.encode_batch([chat], add_special_tokens=False)
            )
        return encoding.ids + [
            self.backend.token_to_id(token) for token in (self.eos_token, START_OF_GENERATION)
        ]


def _backend(file: Path) -> tokenizers.Tokenizer:
    try:
        content = guard.read(file, MOST_BYTES, ConfigError)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{file} is missing; fetch the checkpoint's whole text_tokenizer/ folder"
        ) from error
    with guard.parsing(file, "a tokenizer", ConfigError, _WAY_OUT):
        backend = tokenizers.Tokenizer.from_buffer(content)
        backend.no_padding()
        backend.no_truncation()
        normalizer = backend.normalizer
        growth = 1 if normalizer is None else _growth(json.loads(normalizer.__getstate__()))
        # BPE's, and what unigrams are drawn by.
        random = {name: getattr(backend.model, name, None) for name in ("dropout", "alpha")}
        size = backend.get_vocab_size(with_added_tokens=False)
    if not size:
        raise ConfigError(f"{file} has no vocabulary, so every text would be empty; {_WAY_OUT}")
    for name, value in random.items():
        if value:
            raise ConfigError(
                f"{file} has {name} {value:g}, with which a prompt has other tokens each time; "
                f"{_WAY_OUT}"
            )
    if growth > MOST_GROWTH:
        raise ConfigError(
            f"{file} has a normalizer that makes texts up to {growth:.3g} times longer, and "
            f"{MOST_GROWTH} is the limit; {_WAY_OUT}"
        )
    return backend


def _growth(normalizer: dict[str, Any]) -> float:
    """How many times longer a normalizer can make a text."""
    kind = normalizer["type"]
    if kind == "Sequence":
        return math.prod(map(_growth, normalizer["normalizers"]))
    if kind == "Replace":
        return float(max(1, len(normalizer["content"].encode())))
    if kind == "Prepend":
        return 1 + len(normalizer["prepend"].encode()) / 1024
    return 1 if kind in _SHORT else math.inf


def _chat_template(folder: Path, config: dict[str, Any]) -> tuple[str, str]:
    """The folder's chat template, and what it is called in messages."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return guard.text(guard.read(file, error=ConfigError), file, ConfigError), str(file)
    source = config.get("chat_template")
    if source is None:
        raise FileNotFoundError(
            f"{file} is missing; fetch the checkpoint's whole text_tokenizer/ folder"
        )
    name = f"{folder / 'tokenizer_config.json'}: chat_template"
    if not isinstance(source, str):
        raise ConfigError(f"{name} is a {type(source).__name__}, and one text is read alone")
    return source, name


def _within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns or raises. Raises TimeoutError if that takes too long; it then goes
    on, and ends with the process.
    """
    results: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            results.append((function(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError(f"it takes more than {seconds:g} seconds")
    result, error = results[0]
    if error is not None:
        raise error
    return result
