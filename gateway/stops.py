"""Find stop strings in text that arrives in pieces.

Owns the text that is held back because it may be the start of a stop string. A match is the one that ends first; of
those, the longest. The answer does not depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Stop strings of one choice."""

    __slots__ = ("_held", "_longest", "_prefixes", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._prefixes = frozenset(stop[:length] for stop in self._stops for length in range(1, len(stop)))
        self._held = ""

    def feed(self, piece: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Add text; give the text that is free to go and the stop string that matched, if one did.

        may_stop False lets matches that end in this piece pass as ordinary text (before min_tokens).
        """
        if not self._stops or not piece:
            return piece, None
        text = self._held + piece
        if may_stop:
            match = self._first_match(text, len(self._held))
            if match is not None:
                start, stop = match
                self._held = ""
                return text[:start], stop
        keep = self._num_open(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """Give what was held back when no text follows."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str, num_old: int) -> tuple[int, str] | None:
        # Only matches that end beyond num_old are new.
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop, max(0, num_old - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _num_open(self, text: str) -> int:
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if text[len(text) - length :] in self._prefixes:
                return length
        return 0
