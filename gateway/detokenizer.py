"""Turn a growing run of token ids into text, piece by piece, such that the pieces together are the text of all ids.

Owns the few ids that the next text depends on. Knows no request, no prompt and no stop strings. The text is a function
of the ids alone, however they arrive. Windowed decoding as in text-generation-inference, with two differences: ids
without text never enter the window, and a run of byte-fallback tokens is followed byte by byte, since one broken byte
turns the whole run into replacement characters.
"""

from __future__ import annotations

import codecs
import enum
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.decoding import Decoding

_REPLACEMENT = "\ufffd"
# Ids kept as left context. Decoders look back at most one token (WordPiece, Metaspace, CTC: is this the first, does it
# repeat?) or, in broken UTF-8, at most seven bytes: three of an unfinished character and four to find its beginning.
CONTEXT_IDS = 8
# The window is cut back to CONTEXT_IDS once it is this long: one decoding of at most this many ids per token.
_MAX_WINDOW_IDS = 24
_MAX_CHARACTERS = 65_536  # remembered of those that byte-fallback tokens spell: some 10 MB


class Fate(enum.Enum):
    """What became of the draft that earlier pieces gave."""

    OPEN = enum.auto()
    KEPT = enum.auto()
    DROPPED = enum.auto()


@dataclass(frozen=True, slots=True)
class Heard:
    """What one more id says: first the fate of the draft so far, then certain text, then more draft.

    Draft is text that stands if nothing follows, and may still become replacement characters.
    """

    certain: str = ""
    draft: str = ""
    fate: Fate = Fate.OPEN


_NOTHING = Heard()


class Detokenizer:
    """Text of one run of ids."""

    __slots__ = ("_base", "_decoding", "_given", "_ids", "_run")

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._ids: list[int] = []  # those whose text was given, as context, and those whose text is open
        self._base = ""  # text of the context, within the text of _ids
        self._given = 0  # characters beyond _base that were given
        self._run: _ByteRun | None = None

    def copy(self) -> Detokenizer:
        """Return a twin that goes its own way."""
        twin = Detokenizer(self._decoding)
        twin._ids, twin._base, twin._given = list(self._ids), self._base, self._given
        twin._run = None if self._run is None else self._run.copy()
        return twin

    def feed(self, token_id: int) -> Heard:
        """Add one id and return what is now known, often one word, nothing within a character."""
        byte = self._decoding.bytes_by_id.get(token_id)
        if byte is not None:
            if self._run is None:
                self._run = _ByteRun(self._decoding, self._ids)
            return self._run.feed(token_id, byte)
        if self._decoding.token(token_id) is None:
            return _NOTHING
        ended = self._end_run()
        text = self._feed_token(token_id)
        return Heard(ended.certain + text, "", ended.fate)

    def feed_run(self, token_ids: Sequence[int]) -> Heard:
        """Add many byte-fallback tokens in one go, after others of the same run that made at least one character."""
        assert self._run is not None
        return self._run.feed_many(bytes(self._decoding.bytes_by_id[token_id] for token_id in token_ids))

    def flush(self) -> Heard:
        """Return what is left if no id follows: the bytes of an unfinished character as replacement characters."""
        ended = self._end_run()
        text = self._open_text()
        piece = text[self._given :]
        self._given = len(text)
        return Heard(ended.certain + piece, "", ended.fate)

    def _feed_token(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._open_text()
        # An unfinished character at the end is one replacement character; it may also be a broken one.
        num_unsure = 1 if self._decoding.joins_bytes and text.endswith(_REPLACEMENT) else 0
        certain = max(self._given, len(text) - num_unsure)
        piece = text[self._given : certain]
        self._given = certain
        if num_unsure == 0:
            self._base += text
            self._given = 0
            if self._decoding.only_joins_bytes:  # at the end of a character, what follows does not depend on it
                self._ids.clear()
                self._base = ""
        if len(self._ids) > _MAX_WINDOW_IDS:
            self._shorten(num_unsure)
        return piece

    def _open_text(self) -> str:
        text = self._decoding.text(self._ids)
        if text.startswith(self._base):
            return text[len(self._base) :]
        return text[num_common(text, self._base) :]

    def _shorten(self, num_unsure: int) -> None:
        del self._ids[:-CONTEXT_IDS]
        text = self._decoding.text(self._ids)
        self._base, self._given = text[: len(text) - num_unsure], 0

    def _end_run(self) -> Heard:
        run, self._run = self._run, None
        if run is None:
            return _NOTHING
        self._ids += run.last_ids
        self._ids = self._ids[-_MAX_WINDOW_IDS:]
        self._base, self._given = self._decoding.text(self._ids), 0
        return run.end()


class _ByteRun:
    """Byte-fallback tokens in a row: their characters if all of them together are UTF-8, else one mark for each."""

    __slots__ = ("_before", "_character", "_decoding", "_is_broken", "_num_bytes", "_previous", "_utf8", "last_ids")

    def __init__(self, decoding: Decoding, before: list[int]) -> None:
        self._decoding = decoding
        self._before = list(before)
        self._previous: list[int] = []  # the last whole character
        self._character: list[int] = []  # the one that grows
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._is_broken = False
        self._num_bytes = 0
        self.last_ids: list[int] = []

    def copy(self) -> _ByteRun:
        """Return a twin that goes its own way."""
        twin = _ByteRun(self._decoding, self._before)
        twin._previous, twin._character = list(self._previous), list(self._character)
        twin._utf8.setstate(self._utf8.getstate())
        twin._is_broken, twin._num_bytes = self._is_broken, self._num_bytes
        twin.last_ids = list(self.last_ids)
        return twin

    def feed(self, token_id: int, byte: int) -> Heard:
        """Add one byte: whole characters are a draft, and broken bytes are certain from the first one on."""
        self._num_bytes += 1
        if len(self.last_ids) == CONTEXT_IDS:
            del self.last_ids[0]
        self.last_ids.append(token_id)
        if self._is_broken:
            return Heard(_REPLACEMENT)
        self._character.append(token_id)
        try:
            character = self._utf8.decode(bytes((byte,)))
        except UnicodeDecodeError:
            self._is_broken = True
            return Heard(_REPLACEMENT * self._num_bytes, "", Fate.DROPPED)
        return Heard("", self._take(character)) if character else _NOTHING

    def feed_many(self, data: bytes) -> Heard:
        """Add bytes as feed does, in one go, after a whole character or a broken byte."""
        ids_of = self._decoding.ids_by_byte
        self._num_bytes += len(data)
        self.last_ids = [*self.last_ids, *(ids_of[byte] for byte in data[-CONTEXT_IDS:])][-CONTEXT_IDS:]
        if self._is_broken:
            return Heard(_REPLACEMENT * len(data))
        try:
            characters = self._utf8.decode(data)
        except UnicodeDecodeError:
            self._is_broken = True
            return Heard(_REPLACEMENT * self._num_bytes, "", Fate.DROPPED)
        texts: dict[str, str] = {}
        for character in (*dict.fromkeys(characters), *characters[-1:]):
            self._character = [ids_of[byte] for byte in character.encode()]
            texts[character] = self._take(character)
        self._character = [ids_of[byte] for byte in self._utf8.getstate()[0]]
        return Heard("", "".join(map(texts.__getitem__, characters)))

    def end(self) -> Heard:
        """Settle the draft, because no byte follows."""
        if self._is_broken:
            return _NOTHING
        if self._character:
            return Heard(_REPLACEMENT * self._num_bytes, "", Fate.DROPPED)
        return Heard("", "", Fate.KEPT)

    def _take(self, character: str) -> str:
        # The library says what a character becomes, as it may strip the very first space of a text. Further on it is
        # the same everywhere, and asked for once.
        known = self._before + self._previous
        texts = self._decoding.texts_of_characters if known else {}
        text = texts.get(character)
        if text is None:
            text = self._decoding.text(known + self._character)[len(self._decoding.text(known)) :]
            if len(texts) >= _MAX_CHARACTERS:
                texts.clear()
            texts[character] = text
        self._previous, self._character = self._character, []
        return text


def num_common(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
