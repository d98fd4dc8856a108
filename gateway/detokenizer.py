"""Turn a growing run of token ids into text, piece by piece.

Owns the window of ids that a character may still span. Knows no request and no stop strings. The text is a function
of the ids alone, however they arrive, so that a replay gives the same offsets. Windowed decoding as in
text-generation-inference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
# A character of UTF-8 is at most four bytes: at most three replacement characters at the end may still become one.
_MAX_UNSURE = 3
# Ids kept as left context when a run of broken bytes does not end; decoding then costs the same for every token.
_CONTEXT_IDS = 8
_MAX_WINDOW_IDS = 64


class Detokenizer:
    """Text of one choice. `decode` gives the text of a few ids, without special tokens."""

    __slots__ = ("_context_text", "_decode", "_given", "_ids", "_num_context")

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # the last ids whose text was given out whole, then the open ones
        self._num_context = 0
        self._context_text = ""
        self._given = 0  # characters of the open ids' text that were given out

    def feed(self, token_id: int) -> str:
        """Add one id and give the text that is now certain, often one word, empty within a character."""
        self._ids.append(token_id)
        text = self._open_text()
        num_unsure = len(text) - len(text.rstrip(_REPLACEMENT))
        if num_unsure > _MAX_UNSURE and not self._may_become_whole():
            num_unsure = _MAX_UNSURE
        certain = max(self._given, len(text) - num_unsure)
        piece = text[self._given : certain]
        self._given = certain
        if num_unsure == 0 and piece:
            self._close()
        elif len(self._ids) > _MAX_WINDOW_IDS:
            self._shorten(num_unheard=len(text) - certain)
        return piece

    def flush(self) -> str:
        """Give what is left when no id follows: the bytes of an unfinished character as replacement characters."""
        text = self._open_text()
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _may_become_whole(self) -> bool:
        # Whether all was well until the last few ids: then they may be the beginning of a character.
        beginnings = (self._decode(self._ids[:-count]) for count in range(1, _MAX_UNSURE + 1))
        return any(not beginning.endswith(_REPLACEMENT) for beginning in beginnings)

    def _open_text(self) -> str:
        # Decoded with what stands before, as decoders treat a beginning differently. Where that changes what stood
        # before (byte fallback gives up a whole run of bytes for one broken one), the open ids speak for themselves.
        text = self._decode(self._ids)
        if text.startswith(self._context_text):
            return text[len(self._context_text) :]
        return self._decode(self._ids[self._num_context :])

    def _close(self) -> None:
        del self._ids[: self._num_context]
        self._num_context = len(self._ids)
        self._context_text = self._decode(self._ids)
        self._given = 0

    def _shorten(self, num_unheard: int) -> None:
        del self._ids[:-_CONTEXT_IDS]
        self._num_context = 0
        self._context_text = ""
        self._given = max(0, len(self._decode(self._ids)) - num_unheard)
