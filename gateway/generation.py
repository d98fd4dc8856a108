"""One request while it grows: its choices, what a router still owes it, and what its caller has not been given.

Owns the state; neither sends nor waits. A router's news comes in by take_news, chunks for the caller go out by take.
What remains to be done can be submitted to any router at any time, which is how a request outlives its router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from collegium.fabric.errors import CollegiumError, Internal, Unavailable, from_code
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import router_pb2
from gateway.attachment import Seat
from gateway.choice import Choice, total_tokens
from gateway.requests import Accepted

# Ids that may wait for a caller who does not read before its sequences are held at the router.
MAX_PENDING_TOKENS = 256
# Characters in one message, at four bytes each at most far below the message limit of 16 MiB; more than these wait in
# the gateway only for as long as a step takes. A checkpoint may have tokens of any length.
MAX_MESSAGE_CHARS = 1 << 20


class Generation:
    """A Generate or Resume in progress. The event loop's thread owns it."""

    def __init__(self, accepted: Accepted, choices: Iterable[Choice], *, model: str) -> None:
        self.accepted = accepted
        self.changed = asyncio.Event()
        self.error: CollegiumError | None = None
        self.lost: CollegiumError | None = None  # why the router cannot go on; another one may
        self.is_cancelled = False
        self.cached_prompt_tokens = 0
        self.first_token_s: float | None = None  # when the caller was given one, on the loop's clock
        self._choices = {choice.index: choice for choice in choices}
        self.num_given = total_tokens(self._choices.values())  # of an earlier stream
        self._model = model
        self._is_started = False
        self._is_closed = False
        self._is_paused = False
        self._seat: Seat | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.is_finished for choice in self._choices.values())

    @property
    def is_delivered(self) -> bool:
        """Whether the caller has been given the last message."""
        return self._is_closed

    @property
    def num_pending(self) -> int:
        """Ids that the caller has not been given."""
        return sum(choice.num_pending for choice in self._choices.values())

    @property
    def num_pending_chars(self) -> int:
        """Characters that the caller has not been given."""
        return sum(choice.num_pending_chars for choice in self._choices.values())

    @property
    def has_rest(self) -> bool:
        """Whether the last message had no room for all the text."""
        return any(choice.has_rest for choice in self._choices.values())

    @property
    def num_new_tokens(self) -> int:
        """Ids generated since this stream began, replays not counted."""
        return total_tokens(self._choices.values()) - self.num_given

    @property
    def num_longest(self) -> int:
        """Ids of the longest choice."""
        return max(len(choice.token_ids) for choice in self._choices.values())

    @property
    def finish_reasons(self) -> list[str]:
        """Why choices ended, in lower case, of those that did."""
        ended = (choice.finish_reason for choice in self._choices.values() if choice.is_finished)
        return [pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower() for reason in ended]

    def submission(self, submission_id: str, *, deadline_ms: int, traceparent: str) -> router_pb2.Submission:
        """Write down what remains to be done, for a router that knows nothing of this request."""
        accepted = self.accepted
        is_search = accepted.beam_search is not None
        return router_pb2.Submission(
            request_id=submission_id,
            prompt_ids=accepted.prompt_ids,
            sampling=accepted.sampling,
            stopping=accepted.stopping,
            choices=[
                # A search begins anew: what it finds is the same, and begins with what was delivered of it.
                router_pb2.ChoiceStart(choice_index=choice.index, output_ids=() if is_search else choice.token_ids)
                for choice in self._choices.values()
                if is_search or not choice.is_finished
            ],
            num_logprobs=accepted.num_logprobs,
            forced_id=accepted.forced_id,
            beam_search=accepted.beam_search,
            traceparent=traceparent,
            deadline_ms=deadline_ms,
        )

    def sit(self, seat: Seat) -> None:
        """Note the router that works on it now."""
        self._seat = seat
        self.lost = None
        self._is_paused = False

    def stand_up(self) -> None:
        """Forget the router; a request and its seat that knew each other would outlive both."""
        self._seat = None

    def take_news(self, news: router_pb2.SequenceNews) -> None:
        """Add what a step brought for one choice."""
        choice = self._choices.get(news.choice_index)
        if choice is None or choice.is_finished:
            return
        self.cached_prompt_tokens = max(self.cached_prompt_tokens, news.cached_prompt_tokens)
        if news.HasField("failure"):
            self.fail(from_code(news.failure.code, news.failure.message, news.failure.reason))
            return
        if fault := self._fault_of(news):
            self.fail(Internal(fault, reason="ROUTER_FAULT"))
            return
        if news.HasField("score"):  # which goes with the tokens, as does what ends it by a stop string
            choice.score = news.score
        known = 0 if self.accepted.beam_search is None else len(choice.token_ids)
        try:
            is_stopped = choice.add(news.token_ids[known:], news.logprobs[known:])
        except Internal as error:  # the tokenizer failed on these ids, and would again on any router
            self._fail(error)
            return
        if is_stopped:
            if self._seat is not None:
                self._seat.cancel(choice.index)
        elif news.finish_reason:
            choice.finish(news.finish_reason, str(news.stop_id) if news.HasField("stop_id") else "")
        self.changed.set()
        is_full = self.num_pending > MAX_PENDING_TOKENS or self.num_pending_chars > MAX_MESSAGE_CHARS
        if is_full and not self._is_paused and self._seat is not None:
            self._is_paused = True
            self._seat.pause()

    def lose_router(self, why: CollegiumError) -> None:
        """Note that the router is gone; what it gave stays."""
        self.lost = why
        self.changed.set()

    def cancel(self) -> None:
        """End every choice that goes on, because the caller wants it."""
        self.is_cancelled = True
        for choice in self._choices.values():
            choice.finish(pb.FINISH_REASON_CANCELLED)
        self.changed.set()

    def take(self) -> pb.GenerateResponse | None:
        """Return the next message for the caller; None if there is nothing to say.

        Text that is too much for one message is left for the next: call again while has_rest is True.
        """
        chunks = self._next_chunks()
        if self._is_paused and self._seat is not None and not self.has_rest:
            self._is_paused = False
            self._seat.unpause()
        is_last = self.is_finished and not self.has_rest and not self._is_closed
        if not chunks and not is_last:
            return None
        response = pb.GenerateResponse(request_id=self.accepted.request_id, chunks=chunks)
        if not self._is_started:
            self._is_started = True
            response.start.model = self._model
            response.start.seed = self.accepted.sampling.seed
            response.start.prompt_tokens = len(self.accepted.prompt_ids)
        if is_last:
            self._is_closed = True
            response.usage.prompt_tokens = len(self.accepted.prompt_ids)
            response.usage.cached_prompt_tokens = self.cached_prompt_tokens
            response.usage.output_tokens = total_tokens(self._choices.values())
        return response

    def fail(self, error: CollegiumError) -> None:
        """End the request by an error, or move it to another router if that may help."""
        if isinstance(error, Unavailable):
            self.lose_router(error)
        else:
            self.error = error
            self.changed.set()

    def _next_chunks(self) -> list[pb.Chunk]:
        chunks: list[pb.Chunk] = []
        num_chars = MAX_MESSAGE_CHARS
        for choice in self._choices.values():
            chunk = choice.take(num_chars)
            if chunk is not None:
                chunks.append(chunk)
                num_chars -= len(chunk.text)
        return chunks

    def _fault_of(self, news: router_pb2.SequenceNews) -> str:
        if self.accepted.num_logprobs is not None and len(news.logprobs) != len(news.token_ids):
            return "a router sent tokens without their log-probabilities"
        if news.finish_reason not in pb.FinishReason.values():
            return f"a router sent the unknown finish reason {news.finish_reason}"
        return ""
