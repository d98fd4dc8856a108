"""What one choice has grown to, and what of it its caller has not been given yet.

Owns ids, text, offsets and the end of a choice. Knows neither streams nor routers. Text lags behind ids while a
character or a possible stop string is incomplete; both are functions of the ids alone, so a resumed choice has the
same offsets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from collegium.v1 import inference_pb2 as pb
from gateway.answer_text import PromptEnd
from gateway.stops import StopMatcher, StopStrings

RUNNING = pb.FINISH_REASON_UNSPECIFIED
_NO_STOPS = StopStrings()
_NO_TOKENS: Mapping[int, str] = MappingProxyType({})


class Choice:
    """One of a request's answers. Without the prompt's end (no tokenizer) its text stays empty.

    stops: its request's stop strings. stop_tokens: those of them that are special tokens, by id: as these have no
    text, only their ids can be found.
    """

    __slots__ = (
        "_delivered_ids",
        "_delivered_text",
        "_is_end_delivered",
        "_logprobs",
        "_min_tokens",
        "_stop_tokens",
        "_text",
        "_words",
        "finish_reason",
        "has_rest",
        "index",
        "score",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        index: int,
        *,
        prompt_end: PromptEnd | None,
        stops: StopStrings = _NO_STOPS,
        stop_tokens: Mapping[int, str] = _NO_TOKENS,
        min_tokens: int = 0,
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: pb.FinishReason = RUNNING
        self.stop_reason = ""
        self._words = None if prompt_end is None else prompt_end.answer(StopMatcher(stops))
        self._stop_tokens = stop_tokens
        self._min_tokens = min_tokens
        self._text = ""  # certain and not delivered
        self._logprobs: list[pb.TokenLogprobs] = []  # of the ids that are not delivered
        self._delivered_ids = 0
        self._delivered_text = 0
        self.has_rest = False  # of text whose ids are delivered, left out of the last chunk
        self._is_end_delivered = False
        self.score: float | None = None  # of a beam search

    @property
    def is_finished(self) -> bool:
        """Whether nothing will be added."""
        return self.finish_reason != RUNNING

    @property
    def num_pending(self) -> int:
        """Ids that the caller has not been given."""
        return len(self.token_ids) - self._delivered_ids

    @property
    def num_pending_chars(self) -> int:
        """Characters of certain text that the caller has not been given."""
        return len(self._text)

    def add(self, token_ids: Sequence[int], logprobs: Sequence[pb.TokenLogprobs] = ()) -> bool:
        """Add sampled ids. Returns True if a stop string ended the choice; ids after it are dropped."""
        for position, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            if logprobs:
                self._logprobs.append(logprobs[position])
            may_stop = len(self.token_ids) >= self._min_tokens
            if may_stop and token_id in self._stop_tokens:
                self.finish(pb.FINISH_REASON_STOP, self._stop_tokens[token_id])
                return True
            if self._words is None:
                continue
            text, stop = self._words.feed(token_id, may_stop=may_stop)
            self._text += text
            if stop is not None:
                self.finish_reason = pb.FINISH_REASON_STOP
                self.stop_reason = stop
                return True
        return False

    def finish(self, reason: pb.FinishReason, stop_reason: str = "") -> None:
        """End the choice; text that was held back becomes certain. A second end changes nothing."""
        if self.is_finished:
            return
        self.finish_reason = reason
        self.stop_reason = stop_reason
        if self._words is not None:
            self._text += self._words.flush()

    def restore(self, token_ids: Sequence[int]) -> int:
        """Add ids that the caller has from an earlier stream; gives how many the choice took before it ended."""
        for taken, token_id in enumerate(token_ids):
            if self.is_finished:
                return taken
            self.add((token_id,))
        return len(token_ids)

    def settle(self, text_offset: int) -> bool:
        """Take all ids, and this much of the text, as delivered; False where there is not that much text."""
        if not self._delivered_text <= text_offset <= self._delivered_text + len(self._text):
            return False
        self._delivered_ids = len(self.token_ids)
        self._logprobs.clear()
        self._text = self._text[text_offset - self._delivered_text :]
        self._delivered_text = text_offset
        return True

    def settle_all(self) -> None:
        """Take everything as delivered, the end too."""
        self.take()

    def take(self, max_chars: int | None = None) -> pb.Chunk | None:
        """Return what the caller has not been given, as one chunk; None if there is nothing.

        max_chars: of text; the rest of it and the end of the choice are for the next chunk, which may have no ids.
        """
        has_end = self.is_finished and not self._is_end_delivered
        if not (self.num_pending or has_end or self.has_rest):
            return None
        text = self._text[:max_chars]
        self.has_rest = len(text) < len(self._text)
        if self.has_rest and not text and not self.num_pending:
            return None
        is_end = self.is_finished and not self.has_rest
        chunk = pb.Chunk(
            choice_index=self.index,
            token_offset=self._delivered_ids,
            text_offset=self._delivered_text,
            token_ids=self.token_ids[self._delivered_ids :],
            text=text,
            logprobs=self._logprobs,
            finish_reason=self.finish_reason if is_end else RUNNING,
            stop_reason=self.stop_reason if is_end else "",
            score=self.score if is_end else None,
        )
        self._delivered_ids = len(self.token_ids)
        self._delivered_text += len(text)
        self._text = self._text[len(text) :]
        self._logprobs = []
        self._is_end_delivered = is_end
        return chunk


def total_tokens(choices: Iterable[Choice]) -> int:
    """Count the ids of all choices."""
    return sum(len(choice.token_ids) for choice in choices)
