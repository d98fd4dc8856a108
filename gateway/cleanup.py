"""Clean up the spaces of a tokenizer's text as transformers does where a checkpoint asks for it, piece by piece.

Owns the text that may still be the beginning of something to replace. Ten replacements, one after the other, each over
the whole result of the one before: so ten stages, each with what it holds back.
"""

from __future__ import annotations

from collections.abc import Sequence

# transformers, PreTrainedTokenizerBase.clean_up_tokenization, in its order
_REPLACEMENTS = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
CLEANED = frozenset("".join(old for old, _ in _REPLACEMENTS))


class Cleanup:
    """One text on its way through the replacements. Shallow copies are independent."""

    __slots__ = ("_held",)

    def __init__(self, held: Sequence[str] = ("",) * len(_REPLACEMENTS)) -> None:
        self._held = list(held)

    def __copy__(self) -> Cleanup:
        return Cleanup(self._held)

    @property
    def is_holding(self) -> bool:
        """True if text waits for what follows it."""
        return any(self._held)

    def feed(self, text: str) -> str:
        """Add text and return what nothing that follows can change."""
        for stage in range(len(_REPLACEMENTS)):
            text = self._pass(stage, text)
        return text

    def flush(self) -> str:
        """Return what was held back when nothing follows."""
        text = ""
        for stage in range(len(_REPLACEMENTS)):
            text = self._pass(stage, text) + self._held[stage]
            self._held[stage] = ""
        return text

    def _pass(self, stage: int, text: str) -> str:
        if not text:
            return ""
        old, new = _REPLACEMENTS[stage]
        head, *parts = (self._held[stage] + text).split(old)
        done = [head, *parts]
        last = done[-1]
        num_open = next((n for n in range(min(len(old) - 1, len(last)), 0, -1) if old.startswith(last[-n:])), 0)
        self._held[stage] = last[len(last) - num_open :]
        done[-1] = last[: len(last) - num_open]
        return new.join(done)


def clean_up(text: str) -> str:
    """Clean up a whole text."""
    for old, new in _REPLACEMENTS:
        text = text.replace(old, new)
    return text
