"""The text of one answer: what its ids add to the text of the prompt, up to a stop string.

Owns the way from ids to text that may be delivered: detokenise, clean up as the checkpoint asks, leave out what the
prompt has said already, look for stop strings. Knows neither requests nor offsets.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from gateway.cleanup import CLEANED, Cleanup
from gateway.decoding import Decoding
from gateway.detokenizer import CONTEXT_IDS, Detokenizer, Fate, Heard, num_common
from gateway.stops import StopMatcher

# Where no letter or digit stands among so many ids, what the clean-up made of the ones before no longer matters.
_MAX_CLEANED_IDS = 512


class PromptEnd:
    """Where a prompt's text ends and every answer to it begins. Made once per request; its choices do not change it.

    If the prompt ends within a character, the character belongs to the answers.
    """

    __slots__ = ("_cleanup", "_draft", "_said", "_tokens")

    def __init__(self, decoding: Decoding, prompt_ids: Sequence[int], *, cleans_up: bool = False) -> None:
        self._tokens = Detokenizer(decoding)
        self._cleanup = Cleanup() if cleans_up else None
        self._draft = ""  # text of byte-fallback tokens that the prompt ends with
        tail = _tail(decoding, prompt_ids, cleans_up=cleans_up)
        others = (i for i, token_id in enumerate(reversed(tail)) if token_id not in decoding.bytes_by_id)
        num_bytes = next(others, len(tail))  # of the run that the prompt ends with
        num_single = len(tail) - max(0, num_bytes - CONTEXT_IDS)
        for token_id in tail[:num_single]:
            self._note(self._tokens.feed(token_id))
        if num_single < len(tail):
            self._note(self._tokens.feed_run(tail[num_single:]))
        last = self._tokens.copy().flush()
        cleanup = copy.copy(self._cleanup)
        end = ("" if last.fate is Fate.DROPPED else self._draft) + last.certain
        # Not settled, and part of the prompt's text all the same: an answer that begins with it does not repeat it.
        self._said = _clean(cleanup, end) + ("" if cleanup is None else cleanup.flush())

    def _note(self, heard: Heard) -> None:
        if heard.fate is Fate.KEPT:
            _clean(self._cleanup, self._draft)
        if heard.fate is not Fate.OPEN:
            self._draft = ""
        _clean(self._cleanup, heard.certain)
        self._draft += heard.draft

    def answer(self, stops: StopMatcher) -> AnswerText:
        """Begin an answer; `stops` is its own."""
        line = _Line(copy.copy(self._cleanup), self._said, stops)
        return AnswerText(self._tokens.copy(), line, self._draft)


class AnswerText:
    """Text of one choice, id by id."""

    __slots__ = ("_draft", "_line", "_prompt_draft", "_tokens")

    def __init__(self, tokens: Detokenizer, line: _Line, prompt_draft: str) -> None:
        self._tokens = tokens
        self._line = line
        self._prompt_draft = prompt_draft  # what the prompt left open; not heard before an id says more of it
        self._draft: _Draft | None = None

    def feed(self, token_id: int, *, may_stop: bool) -> tuple[str, str | None]:
        """Add one id; return the text that is free to go, and the stop string that ends the answer, if one does.

        may_stop False lets stop strings that end here pass as ordinary text (before min_tokens).
        """
        heard = self._tokens.feed(token_id)
        text = self._settle(heard.fate)
        stop = None
        if heard.certain:
            free, stop = self._line.feed(heard.certain, may_stop=may_stop)
            text += free
        if stop is None and heard.draft:
            self._draft = self._draft or _Draft(self._line)
            stop = self._draft.feed(self._take_prompt_draft() + heard.draft, may_stop=may_stop)
            if stop is not None:
                text += self._draft.text
        if stop is None:
            free, stop = (self._line if self._draft is None else self._draft.line).look_ahead(may_stop=may_stop)
            if stop is not None:
                text += free if self._draft is None else self._draft.text + free
        return text, stop

    def flush(self) -> str:
        """Return what was held back when no id follows. Stop strings were looked for in it already."""
        heard = self._tokens.flush()
        return self._settle(heard.fate) + self._line.feed(heard.certain, may_stop=False)[0] + self._line.flush()

    def _settle(self, fate: Fate) -> str:
        """Take the draft as certain, or forget it; return the text that this sets free."""
        if fate is Fate.OPEN:
            return ""
        draft, self._draft = self._draft, None
        earlier = self._take_prompt_draft()
        if fate is Fate.DROPPED:
            return ""
        if draft is None:
            return self._line.feed(earlier, may_stop=False)[0]
        self._line = draft.line
        return draft.text

    def _take_prompt_draft(self) -> str:
        text, self._prompt_draft = self._prompt_draft, ""
        return text


class _Draft:
    """Text that a broken byte may take back, and where the line stands if none does."""

    __slots__ = ("line", "text")

    def __init__(self, line: _Line) -> None:
        self.line = copy.copy(line)
        self.text = ""

    def feed(self, text: str, *, may_stop: bool) -> str | None:
        free, stop = self.line.feed(text, may_stop=may_stop)
        self.text += free
        return stop


class _Line:
    """Text on its way from the detokenizer to where it is free to go. Shallow copies are independent."""

    __slots__ = ("_ahead", "_cleanup", "_said", "_stops")

    def __init__(self, cleanup: Cleanup | None, said: str, stops: StopMatcher) -> None:
        self._cleanup = cleanup
        self._said = said  # what the prompt has said of the text that comes next
        self._ahead = ""  # text that the clean-up holds back, in which stop strings were looked for already
        self._stops = stops

    def __copy__(self) -> _Line:
        twin = _Line(copy.copy(self._cleanup), self._said, copy.copy(self._stops))
        twin._ahead = self._ahead
        return twin

    def feed(self, text: str, *, may_stop: bool) -> tuple[str, str | None]:
        """Add text; return what is free to go and the stop string that ends in it."""
        return self._match(_clean(self._cleanup, text), may_stop=may_stop)

    def look_ahead(self, *, may_stop: bool) -> tuple[str, str | None]:
        """Look for stop strings in what the clean-up holds back; return as feed does, as if nothing followed."""
        if self._cleanup is None or not self._cleanup.is_holding:
            self._ahead = ""
            return "", None
        twin = copy.copy(self)
        assert twin._cleanup is not None
        rest = twin._cleanup.flush()
        found = twin._match(rest, may_stop=may_stop)
        self._ahead = rest[num_common(rest, self._said) :]
        return found

    def flush(self) -> str:
        """Return everything that is held back."""
        rest = "" if self._cleanup is None else self._cleanup.flush()
        return self._match(rest, may_stop=False)[0] + self._stops.flush()

    def _match(self, text: str, *, may_stop: bool) -> tuple[str, str | None]:
        if self._said:
            text = self._unsaid(text)
        num_known = num_common(text, self._ahead) if self._ahead else 0
        self._ahead = self._ahead[num_known:] if num_known == len(text) else ""
        free = self._stops.feed(text[:num_known], may_stop=False)[0] if num_known else ""
        more, stop = self._stops.feed(text[num_known:], may_stop=may_stop)
        return free + more, stop

    def _unsaid(self, text: str) -> str:
        num_same = num_common(text, self._said)
        self._said = self._said[num_same:] if num_same == len(text) else ""
        return text[num_same:]


def _clean(cleanup: Cleanup | None, text: str) -> str:
    return text if cleanup is None else cleanup.feed(text)


def _tail(decoding: Decoding, prompt_ids: Sequence[int], *, cleans_up: bool) -> list[int]:
    """Return as many of a prompt's last ids, without hidden ones, as decide how its text goes on."""
    tail: list[int] = []
    num_settled = 0  # ids before the bytes that the prompt ends with
    is_clean = not cleans_up
    for token_id in reversed(prompt_ids):
        token = decoding.token(token_id)
        if token is None:
            continue
        tail.append(token_id)
        if num_settled or token_id not in decoding.bytes_by_id:
            num_settled += bool(token)
            is_clean = is_clean or num_settled >= _MAX_CLEANED_IDS or _separates(decoding.text((token_id,)))
        if num_settled >= 2 * CONTEXT_IDS and is_clean:
            break
    return tail[::-1]


def _separates(text: str) -> bool:
    """Return True if text has a character that no replacement of the clean-up crosses."""
    return any(c.isalnum() and c not in CLEANED for c in text)
