"""Find stop strings in text that arrives in pieces.

Owns the text that is held back because it may be the start of a stop string. A match is the one that ends first; of
those, the longest. The answer does not depend on how the text was cut into pieces.

One StopStrings serves all choices of a request: its tables take two bytes for each character of the stop strings, and
a choice adds one number per string and the text that it holds back. Matching is that of Knuth, Morris and Pratt (1977).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence


class StopStrings:
    """The stop strings of one request, compiled. Immutable, so that its choices can share it."""

    __slots__ = ("_first_chars", "borders", "strings")

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self.strings = tuple(dict.fromkeys(strings))
        # borders[s][i]: length of the longest proper prefix of string s that ends at its character i. [len(s)] each
        self.borders = tuple(_borders(string) for string in self.strings)
        self._first_chars = frozenset(string[0] for string in self.strings)

    def may_begin_in(self, text: str) -> bool:
        """Return True if a stop string can begin anywhere in a text."""
        return not self._first_chars.isdisjoint(text)


class StopMatcher:
    """The stop strings of one choice: how far each of them has been matched. Shallow copies are independent."""

    __slots__ = ("_held", "_lengths", "_stops")

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._lengths: list[int] | None = None  # matched characters by string; None: none of any
        self._held = ""

    def feed(self, piece: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Add text; return the text that is free to go and the stop string that matched, or None.

        may_stop False lets matches that end in this piece pass as ordinary text (before min_tokens).
        """
        if not self._stops.strings or (self._lengths is None and not self._stops.may_begin_in(piece)):
            return piece, None
        lengths = [0] * len(self._stops.strings) if self._lengths is None else list(self._lengths)
        text = self._held + piece
        for position, char in enumerate(piece, start=len(self._held) + 1):
            stop = self._advance(lengths, char)
            if stop is not None and may_stop:
                self._held, self._lengths = "", None
                return text[: position - len(stop)], stop
        keep = max(lengths)
        self._held, self._lengths = text[len(text) - keep :], lengths if keep else None
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """Return the text that was held back, when no text follows."""
        held, self._held, self._lengths = self._held, "", None
        return held

    def _advance(self, lengths: list[int], char: str) -> str | None:
        """Match one more character in place; return the longest string that it completes, or None."""
        best: str | None = None
        for idx, (string, borders) in enumerate(zip(self._stops.strings, self._stops.borders, strict=True)):
            length = lengths[idx]
            while length and string[length] != char:
                length = borders[length - 1]
            length += string[length] == char
            if length == len(string):
                if best is None or length > len(best):
                    best = string
                length = borders[-1]  # a match that may not stop goes on as its own longest border
            lengths[idx] = length
        return best


def _borders(string: str) -> array[int]:
    borders = array("H", bytes(2 * len(string)))
    length = 0
    for idx in range(1, len(string)):
        while length and string[idx] != string[length]:
            length = borders[length - 1]
        length += string[idx] == string[length]
        borders[idx] = length
    return borders
