"""A checkpoint's tokenizer and chat template: texts to token ids.

Not through transformers: its `AutoTokenizer` imports torch where torch is installed.
"""

import dataclasses
from pathlib import Path
from typing import Any, Self

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cosmos3_jax.config import ConfigError, read_json

END_OF_TURN = "<|im_end|>"
START_OF_GENERATION = "<|vision_start|>"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer together with its chat template.

    A special token's string in a user's text ("<|im_end|>") becomes that token, as it does in
    transformers.
    """

    backend: tokenizers.Tokenizer
    template: jinja2.Template
    eos_token: str

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Load a checkpoint's `text_tokenizer/`.

        Reads `tokenizer.json`; `chat_template.jinja`, else `chat_template` in
        `tokenizer_config.json`; and `eos_token` from the latter ("<|im_end|>" if absent). Raises
        FileNotFoundError for a missing file, ConfigError for a malformed one or a vocabulary
        without the tokens that generation needs.
        """
        folder = Path(path)
        file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; fetch the checkpoint's whole text_tokenizer/ folder"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigError(f"{file} is not a tokenizer: {error}") from error
        backend.no_padding()
        backend.no_truncation()
        config = read_json(config_file) if config_file.is_file() else {}
        eos_token = config.get("eos_token") or END_OF_TURN
        eos_token = eos_token["content"] if isinstance(eos_token, dict) else eos_token
        missing = [t for t in (eos_token, START_OF_GENERATION) if backend.token_to_id(t) is None]
        if missing:
            raise ConfigError(
                f"{file} has no token {' or '.join(missing)}; is it a Cosmos3 text_tokenizer?"
            )
        return cls(backend, _chat_template(folder, config), eos_token)

    @property
    def vocab_size(self) -> int:
        """Largest token id + 1: how many embedding rows the ids can reach."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def render_chat(self, text: str, system_prompt: str | None = None) -> str:
        """The chat as text, up to where the assistant's answer would begin.

        Raises ValueError if the template does not carry `text` through unchanged.
        """
        messages = [{"role": "user", "content": text}]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
        chat = self.template.render(
            messages=messages,
            add_generation_prompt=True,
            add_vision_id=False,
            eos_token=self.eos_token,
        )
        if text not in chat:
            raise ValueError("the chat template alters the prompt; use the checkpoint's own")
        return chat

    def encode_chat(self, text: str, system_prompt: str | None = None) -> list[int]:
        """Token ids of a prompt: the chat, then end of turn and start of generation.

        No BOS, no padding, no truncation. Qwen's tokenizer itself normalises what it gets (NFC).
        """
        ids = self.backend.encode(
            self.render_chat(text, system_prompt), add_special_tokens=False
        ).ids
        return ids + [
            self.backend.token_to_id(token) for token in (self.eos_token, START_OF_GENERATION)
        ]


def _chat_template(folder: Path, config: dict[str, Any]) -> jinja2.Template:
    """The folder's chat template, compiled with the whitespace rules that transformers gives
    templates.
    """
    file = folder / "chat_template.jinja"
    source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        raise FileNotFoundError(
            f"{file} is missing; fetch the checkpoint's whole text_tokenizer/ folder"
        )
    try:
        return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            source
        )
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template in {folder} is malformed: {error}") from error
