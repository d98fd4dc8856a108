"""How a sequence comes to a router's engine, and how it ends: told, logged, and given back whole.

Owns the numbering of sequences and what follows from an end. Whatever holds something of a sequence gives it back here,
and nothing of that can fail another sequence.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Protocol

from collegium.fabric import logs, tracing
from router_svc.failures import Failure, step_failed
from router_svc.kv_blocks import num_blocks_for
from router_svc.news import NewsBoard
from router_svc.requests import Requests
from router_svc.sequence import Finish, Sequence
from router_svc.sequence_life import SequenceLife
from router_svc.step_faults import StepFaults

_log = logs.get("engine")


class Release(Protocol):
    """Takes a sequence out of the scheduler."""

    def __call__(self, sequence: Sequence, *, has_failed: bool = False) -> None: ...


class LiveSequences:
    """Owned by the engine's thread."""

    def __init__(
        self,
        requests: Requests,
        news: NewsBoard,
        faults: StepFaults,
        *,
        refused: Counter[str],
        release: Release,
        num_blocks: int,
        most_rows: int,
    ):
        """refused: submissions by reason, counted up. release: gives back the place and the blocks of a sequence, which
        are forgotten where it has failed by a fault: they may be the reason. num_blocks: that there are; most_rows: of
        a step.
        """
        self._num_blocks, self._most_rows = num_blocks, most_rows
        self._requests, self._news, self._refused = requests, news, refused
        self._faults, self._release = faults, release
        self._num_submitted = 0

    def take(self, sequences: Seq[Sequence]) -> list[Sequence]:
        """Take the choices of one request. Returns those to be computed; a request that is refused is told so."""
        if sequences[0].owner not in self._news:
            return []
        first = sequences[0]
        num_tokens = len(first.source_ids) + len(first.prompt_ids) + sum(len(s.output_ids) for s in sequences)
        failure = self._requests.refusal(sequences, num_tokens) or self._too_wide(first)
        if failure is not None:
            self._refused[failure.reason] += 1
            for sequence in sequences:
                sequence.finish = Finish.CANCELLED
                self._news.tell(sequence).failure = failure
            return []
        taken: list[Sequence] = []
        for sequence in sequences:
            self._num_submitted += 1
            sequence.number = self._num_submitted
            sequence.end_if_long()
            if sequence.has_ended:  # a replay that had all its tokens
                self._news.tell(sequence).tell_forced()
                continue
            self._requests.enter(sequence, num_tokens)
            sequence.life = SequenceLife(
                sequence.traceparent,
                sequence.request_id,
                sequence.choice_index,
                num_prompt=len(sequence.prompt_ids),
                num_given=len(sequence.output_ids),
            )
            if sequence.searched_by is None:
                taken.append(sequence)
        return taken

    def _too_wide(self, sequence: Sequence) -> Failure | None:
        """Refuse a search whose beams might not fit together: alone, it could not go on by preempting others."""
        if sequence.beams is None:
            return None
        if (width := sequence.beams.options.num_beams) > self._most_rows:
            message = f"{width} beams go on together, and the router computes {self._most_rows} rows in a step"
            return Failure(code="INVALID_ARGUMENT", reason="BEAMS_TOO_LARGE", message=f"{message}; ask for fewer")
        longest = len(sequence.prompt_ids) + sequence.rules.max_tokens
        num_blocks = num_blocks_for(len(sequence.source_ids))
        num_blocks += width * num_blocks_for(longest)
        if num_blocks <= self._num_blocks:
            return None
        message = (
            f"{width} beams of {longest} tokens may take {num_blocks} KV blocks, and the "
            f"router has {self._num_blocks}; ask for fewer beams or tokens"
        )
        return Failure(code="INVALID_ARGUMENT", reason="BEAMS_TOO_LARGE", message=message)

    def end(self, sequence: Sequence, finish: Finish | None, failure: Failure | None = None) -> None:
        """Tell that a sequence has ended, and why, and give back all that it holds."""
        self._news.tell(sequence).failure = failure
        if finish is not None:
            sequence.finish = sequence.finish or finish
        if failure is not None:
            trace_id = tracing.trace_id_of(sequence.traceparent)
            say = _log.info if failure.code == "DEADLINE_EXCEEDED" else _log.warning
            say(
                "a sequence failed",
                code=failure.code,
                reason=failure.reason,
                why=failure.message,
                request_id=sequence.request_id,
                **({"trace_id": trace_id} if trace_id else {}),
            )
        self.forget(sequence, failure)

    def spoil(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence for which something failed that is no other's."""
        self._faults.tell(request_id=sequence.request_id)
        self.end(sequence, None, step_failed(error))

    def fail_all(self, sequences: Iterable[Sequence], failure: Failure) -> None:
        """End sequences that could not go on."""
        for sequence in sequences:
            self.end(sequence, None, failure)

    def forget(self, sequence: Sequence, failure: Failure | None = None) -> None:
        """Give back all that a sequence holds. Never raises: what fails of it is logged."""
        if sequence.finish is None:
            sequence.finish = Finish.CANCELLED
        self._requests.leave(sequence)
        sequence.counts = None
        for one in sequence.best:  # searched by it: what they have not been told by now, nobody will find
            if not one.has_ended:
                self.end(one, Finish.CANCELLED if failure is None else None, failure)
        has_failed = failure is not None and failure.code == "INTERNAL"
        steps = [lambda: _end_life(sequence, failure)]
        if sequence.searched_by is None:
            steps.insert(0, lambda: self._release(sequence, has_failed=has_failed))
        for give_back in steps:
            try:
                give_back()
            except Exception:
                _log.exception("a sequence was not given back whole", request_id=sequence.request_id)

    def detach(self, owner: int) -> None:
        """Forget all sequences of an owner, and report to it no more."""
        self._news.close(owner)
        for sequence in self._requests.of_owner(owner):
            self.forget(sequence)

    def expire(self, now_s: float) -> None:
        """End the sequences whose deadline has passed."""
        for sequence in self._requests.overdue(now_s):
            message = "the request's deadline passed while it was computed"
            self.end(sequence, None, Failure(code="DEADLINE_EXCEEDED", reason="DEADLINE_EXCEEDED", message=message))


def _end_life(sequence: Sequence, failure: Failure | None) -> None:
    """Close the span and the times of a sequence."""
    life, sequence.life = sequence.life, None
    if life is not None:
        life.end(
            finish="" if failure or sequence.finish is None else sequence.finish.name.lower(),
            failure="" if failure is None else failure.reason,
            num_output=len(sequence.output_ids),
            num_cached=sequence.num_cached,
            num_preemptions=sequence.num_preemptions,
        )
