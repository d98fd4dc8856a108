"""One Score request while a router works on it.

Owns the log-probabilities that have come. A router that is lost costs only time: the request starts again on another
one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from collegium.fabric.errors import CollegiumError, Internal, Unavailable, from_code
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import router_pb2
from gateway.attachment import Seat


class Scoring:
    """A Score in progress. The event loop's thread owns it."""

    def __init__(self, token_ids: Sequence[int], target_ids: Sequence[int] = (), forced_id: int | None = None) -> None:
        """target_ids: scored instead, as an answer to token_ids; forced_id: given where it is the first of them."""
        self.changed = asyncio.Event()
        self.error: CollegiumError | None = None
        self.lost: CollegiumError | None = None
        self._token_ids, self._target_ids = token_ids, target_ids
        self._scored = target_ids or token_ids
        self._first_is_given = not target_ids or target_ids[0] == forced_id
        self._logprobs: list[float] = [] if target_ids else [0.0]  # nothing comes for a first token with nothing before
        self._num_unasked = len(self._logprobs)

    @property
    def is_finished(self) -> bool:
        """Whether every token has its log-probability."""
        return len(self._logprobs) == len(self._scored)

    def submission(self, submission_id: str, *, deadline_ms: int, traceparent: str) -> router_pb2.Submission:
        """Write down the whole request; what an earlier router gave is dropped."""
        del self._logprobs[self._num_unasked :]
        return router_pb2.Submission(
            request_id=submission_id,
            prompt_ids=self._token_ids,
            target_ids=self._target_ids,
            sampling=pb.Sampling(seed=0),
            stopping=pb.Stopping(max_tokens=1),
            choices=[router_pb2.ChoiceStart(choice_index=0)],
            num_logprobs=0,
            is_score=True,
            traceparent=traceparent,
            deadline_ms=deadline_ms,
        )

    def sit(self, seat: Seat) -> None:
        """Note that a router works on it now."""
        self.lost = None

    def stand_up(self) -> None:
        """Nothing is kept of the router."""

    def fail(self, error: CollegiumError) -> None:
        """End by an error, or start again on another router if that may help."""
        if isinstance(error, Unavailable):
            self.lost = error
        else:
            self.error = error
        self.changed.set()

    def take_news(self, news: router_pb2.SequenceNews) -> None:
        """Add the log-probabilities that a step brought."""
        if news.HasField("failure"):
            self.fail(from_code(news.failure.code, news.failure.message, news.failure.reason))
        self._logprobs.extend(entry.chosen for entry in news.logprobs)
        too_many = len(self._logprobs) > len(self._scored)
        if too_many or (news.finish_reason and not self.is_finished):
            count, wanted = (len(some) - self._num_unasked for some in (self._logprobs, self._scored))
            self.error = Internal(f"a router scored {count} of {wanted} tokens", reason="ROUTER_FAULT")
        self.changed.set()

    def lose_router(self, why: CollegiumError) -> None:
        """Note that the router is gone."""
        self.lost = why
        self.changed.set()

    def result(self) -> pb.ScoreResponse:
        """Give the answer of a finished scoring."""
        asked = self._logprobs[self._first_is_given :]
        given = [0.0] * self._first_is_given
        return pb.ScoreResponse(
            token_ids=self._scored, logprobs=given + asked, perplexity=perplexity(asked), num_given=len(given)
        )


def perplexity(logprobs: Sequence[float]) -> float:
    """Give exp of the mean negative log-probability; 1 for no tokens, infinite where a token was impossible."""
    if not logprobs:
        return 1.0
    try:
        return math.exp(-math.fsum(logprobs) / len(logprobs))
    except OverflowError:
        return math.inf
