"""What the library's decoder does with ids, in the terms that a stream needs.

Owns the answers to three questions: which ids have a token that is shown, what text a run of ids has, and whether the
decoder builds characters from bytes. The text itself always comes from the tokenizers library. Knows no request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import cast

import tokenizers

from collegium.fabric.errors import Internal

# What the library's ByteFallback takes as one byte: `<0x`, two hexadecimal digits, `>`.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class Decoding:
    """Ids to text, without special tokens."""

    __slots__ = (
        "_hidden",
        "_inner",
        "bytes_by_id",
        "ids_by_byte",
        "joins_bytes",
        "only_joins_bytes",
        "texts_of_characters",
    )

    def __init__(self, inner: tokenizers.Tokenizer, hidden: Collection[str]) -> None:
        """`hidden`: the special tokens, which have no text."""
        self._inner = inner
        self._hidden = frozenset(hidden)
        steps = set(_steps(inner))
        self.joins_bytes = "ByteLevel" in steps  # tokens are runs of bytes: a character may span several
        self.only_joins_bytes = self.joins_bytes and steps <= {"ByteLevel", "Sequence"}  # and looks at nothing else
        # Characters outside the vocabulary are tokens of one byte each, in tokenizers with byte fallback.
        self.bytes_by_id = _bytes_by_id(inner, self._hidden) if "ByteFallback" in steps else {}
        self.ids_by_byte = {byte: token_id for token_id, byte in self.bytes_by_id.items()}
        # Of characters that bytes spell, other than at the beginning of a text; a cache.
        self.texts_of_characters: dict[str, str] = {}

    def token(self, token_id: int) -> str | None:
        """Return the token that an id shows; None for special tokens and for ids that the tokenizer does not know."""
        token = self._inner.id_to_token(token_id)
        return None if token is None or token in self._hidden else token

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of ids. Internal if the library fails, which it does by panicking."""
        try:
            return self._inner.decode(token_ids, skip_special_tokens=True)
        except BaseException as error:
            if not is_library_failure(error):
                raise
            raise Internal(
                f"the model's tokenizer cannot decode its own ids: {error}",
                reason="TOKENIZER",
                remedy="ask for no text by removing the tokenizer's files, or repair the decoder of tokenizer.json",
            ) from None


def is_library_failure(error: BaseException) -> bool:
    """Return True for what the tokenizers library raises: exceptions, and panics, which are none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _bytes_by_id(inner: tokenizers.Tokenizer, hidden: Collection[str]) -> dict[int, int]:
    matches = (
        (token_id, _BYTE.fullmatch(token)) for token, token_id in inner.get_vocab().items() if token not in hidden
    )
    return {token_id: int(match[1], 16) for token_id, match in matches if match is not None}


def _steps(inner: tokenizers.Tokenizer) -> Iterator[str]:
    decoder = inner.decoder
    if decoder is None:
        return
    state = cast("dict[str, object]", json.loads(decoder.__getstate__()))
    waiting = [state]
    while waiting:
        step = waiting.pop()
        yield str(step.get("type"))
        waiting.extend(cast("list[dict[str, object]]", step.get("decoders", ())))
