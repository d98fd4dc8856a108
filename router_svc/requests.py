"""The live sequences of a router by their names: owner, request, choice.

Owns the names, the bound on how much is held at once, and the nearest deadline. Pure; knows neither blocks nor steps.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from router_svc.failures import Failure
from router_svc.sequence import Sequence


@dataclass(slots=True)
class _Request:
    """The live choices of a request, and the tokens that it was submitted with."""

    num_tokens: int
    sequences: list[Sequence] = field(default_factory=list)


class Requests:
    """Owned by the engine's thread."""

    def __init__(self, *, max_queued_seqs: int, max_queued_tokens: int):
        """Hold at most so many choices, and tokens of their prompts, at once."""
        self._max_queued_seqs, self._max_queued_tokens = max_queued_seqs, max_queued_tokens
        self._by_key: dict[tuple[int, str, int], Sequence] = {}
        self._requests: dict[tuple[int, str], _Request] = {}
        self._num_tokens = 0  # of all requests
        self._nearest_s = float("inf")

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def num_tokens(self) -> int:
        """Tokens that the live requests were submitted with."""
        return self._num_tokens

    @property
    def nearest_s(self) -> float:
        """No deadline is before this time; infinite if there is none."""
        return self._nearest_s

    def refusal(self, sequences: Seq[Sequence], num_tokens: int) -> Failure | None:
        """Say why the choices of one request, of so many tokens together, are not taken; None if they are."""
        keys = {_key(sequence) for sequence in sequences}
        request_id = sequences[0].request_id
        if len(keys) < len(sequences):
            message = f"choices: request_id {request_id!r} has a choice_index twice; give each once"
            return Failure(code="INVALID_ARGUMENT", reason="DUPLICATE_REQUEST_ID", message=message)
        if not self._by_key.keys().isdisjoint(keys):
            message = f"request_id {request_id!r} is running already; give each request an id of its own"
            return Failure(code="INVALID_ARGUMENT", reason="DUPLICATE_REQUEST_ID", message=message)
        for what, held, more, limit, flag in (
            ("choices", len(self._by_key), len(sequences), self._max_queued_seqs, "--max-queued-seqs"),
            ("tokens", self._num_tokens, num_tokens, self._max_queued_tokens, "--max-queued-tokens"),
        ):
            if held + more > limit:
                message = f"the router holds {held} {what} and takes at most {limit} ({flag}); try again later"
                return Failure(code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", message=message)
        return None

    def enter(self, sequence: Sequence, num_tokens: int) -> None:
        """Note a sequence under its names; num_tokens: of its whole request."""
        self._by_key[_key(sequence)] = sequence
        self._nearest_s = min(self._nearest_s, sequence.deadline_s)
        name = (sequence.owner, sequence.request_id)
        if name not in self._requests:
            self._requests[name] = _Request(num_tokens)
            self._num_tokens += num_tokens
        self._requests[name].sequences.append(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Forget the names of a sequence. Nothing happens if they are not its own."""
        name = (sequence.owner, sequence.request_id)
        request = self._requests.get(name)
        if request is None or self._by_key.get(_key(sequence)) is not sequence:
            return
        del self._by_key[_key(sequence)]
        request.sequences.remove(sequence)
        if not request.sequences:
            del self._requests[name]
            self._num_tokens -= request.num_tokens

    def of(self, owner: int, request_id: str, choice_index: int | None = None) -> list[Sequence]:
        """List the live choices of a request, or one of them."""
        request = self._requests.get((owner, request_id))
        if request is None:
            return []
        return [s for s in request.sequences if choice_index in (None, s.choice_index)]

    def of_owner(self, owner: int) -> list[Sequence]:
        """List the live sequences of an owner."""
        return [s for s in self._by_key.values() if s.owner == owner]

    def overdue(self, now_s: float) -> list[Sequence]:
        """List the sequences whose deadline has passed; they must leave before this is asked again."""
        if now_s < self._nearest_s:
            return []
        overdue = [s for s in self._by_key.values() if s.deadline_s <= now_s]
        later = (s.deadline_s for s in self._by_key.values() if s.deadline_s > now_s)
        self._nearest_s = min(later, default=float("inf"))
        return overdue


def _key(sequence: Sequence) -> tuple[int, str, int]:
    return sequence.owner, sequence.request_id, sequence.choice_index
