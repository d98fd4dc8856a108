"""The model's tokenizer and chat template, from the files of its checkpoint.

Owns tokenizer.json, tokenizer_config.json and chat_template.jinja. Needs tokenizers and jinja2, not transformers.
Knows no request; every method is pure and may run in any thread.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import tokenizers

from collegium.fabric.errors import FailedPrecondition, InvalidArgument
from gateway.chat import ChatTemplate

# A normalizer may shorten a text before it is cut: three bytes of a wide letter to one, runs of blanks to one blank.
_NORMALIZED_SHARE = 4
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """Text to ids and back."""

    __slots__ = ("_bytes_per_token", "_chat", "_inner")

    def __init__(self, inner: tokenizers.Tokenizer, chat: ChatTemplate | None = None) -> None:
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._chat = chat
        longest = max((len(token.encode()) for token in inner.get_vocab(with_added_tokens=True)), default=1)
        self._bytes_per_token = longest * (_NORMALIZED_SHARE if inner.normalizer is not None else 1)

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer | None:
        """Read a checkpoint's tokenizer; None where it has none.

        FailedPrecondition where the files are there and broken.
        """
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise FailedPrecondition(f"{path} cannot be read: {error}", remedy="fetch the checkpoint again") from error
        return cls(inner, _chat_template(model_dir))

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        return self._chat is not None

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, added ones included."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    def max_bytes(self, num_tokens: int) -> int:
        """Return how many bytes of UTF-8 a text can have at most that is encoded to so many tokens."""
        return num_tokens * self._bytes_per_token

    def encode(self, text: str) -> list[int]:
        """Give the ids of a prompt, with the special tokens that the checkpoint's post-processor adds."""
        return self._inner.encode(text, add_special_tokens=True).ids

    def encode_chat(self, messages: Sequence[tuple[str, str]], *, max_bytes: int | None = None) -> list[int]:
        """Give the ids of a conversation of (role, content), rendered by the checkpoint's template.

        max_bytes: a rendered text of more bytes is refused before it is tokenised.
        """
        if self._chat is None:
            raise InvalidArgument(
                "this model has no chat template",
                field="chat",
                remedy="send text or token_ids",
                reason="NO_CHAT_TEMPLATE",
            )
        text = self._chat.render(messages)
        if max_bytes is not None and (size := len(text.encode())) > max_bytes:
            raise InvalidArgument(
                f"the conversation is rendered to {size} bytes, and at most {max_bytes} fit into the model's length",
                field="chat.messages",
                remedy="shorten it",
                reason="PROMPT_TOO_LONG",
            )
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Give the text of ids, without special tokens; ids that the tokenizer does not know have no text."""
        return self._inner.decode(token_ids, skip_special_tokens=True)


def _chat_template(model_dir: Path) -> ChatTemplate | None:
    config = _read_json(model_dir / "tokenizer_config.json")
    file = model_dir / "chat_template.jinja"
    source: object = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        # Named templates: a list of {"name", "template"}; conversations use "default".
        entries = cast("list[dict[str, object]]", source)
        source = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, _special_tokens(config))


def _special_tokens(config: dict[str, object]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        if isinstance(value, dict):  # an AddedToken written out
            value = cast("dict[str, object]", value).get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        return cast("dict[str, object]", json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise FailedPrecondition(f"{path} is not JSON: {error}", remedy="fetch the checkpoint again") from error
