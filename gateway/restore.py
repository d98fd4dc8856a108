"""Put the choices of a resumed request where its caller stands.

Owns the question whether what the caller has is already the whole of a choice: its stop string, end-of-sequence id or
length may have been delivered while the message that said so was lost. Pure; works in slices, so that others get their
turn between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from collegium.fabric.errors import InvalidArgument
from collegium.v1 import inference_pb2 as pb
from gateway.choice import Choice
from gateway.requests import Accepted, Progress

_SLICE_TOKENS = 256  # a few milliseconds of work


def restore(
    choices: Sequence[Choice], progress: Mapping[int, Progress], accepted: Accepted, model: pb.Model
) -> Iterator[None]:
    """Replay what the caller has into fresh choices, in slices: iterate to the end.

    InvalidArgument where it cannot have come from this request.
    """
    eos_ids = () if accepted.stopping.ignore_eos else model.eos_ids
    end_ids = frozenset(map(int, (*accepted.stopping.stop_ids, *eos_ids)))
    for choice in choices:
        given = progress.get(choice.index)
        if given is not None:
            yield from _restore_one(choice, given, accepted, end_ids)


def _restore_one(choice: Choice, given: Progress, accepted: Accepted, end_ids: frozenset[int]) -> Iterator[None]:
    field = f"progress of choice {choice.index}"
    ends = [
        position
        for position, token_id in enumerate(given.token_ids, start=1)
        if token_id in end_ids and position >= max(1, accepted.stopping.min_tokens)
    ]
    num_taken = 0
    for start in range(0, len(given.token_ids), _SLICE_TOKENS):
        num_taken += choice.restore(given.token_ids[start : start + _SLICE_TOKENS])
        yield
    if num_taken < len(given.token_ids) or (ends and ends[0] < len(given.token_ids)):
        raise InvalidArgument(
            "ids go on after the choice had ended",
            field=f"{field}: token_ids",
            remedy="give the ids that this request's streams delivered",
        )
    if given.finish_reason:
        choice.finish(given.finish_reason)
        choice.settle_all()
        return
    if ends:
        choice.finish(pb.FINISH_REASON_STOP, str(given.token_ids[-1]))
    elif len(given.token_ids) >= accepted.max_tokens:
        choice.finish(pb.FINISH_REASON_LENGTH)
    if not choice.settle(given.text_offset):
        raise InvalidArgument(
            f"{given.text_offset} characters are more than the text of these ids",
            field=f"{field}: text_offset",
            remedy="give text_offset plus the length of text of the last chunk received",
        )
