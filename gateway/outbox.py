"""What a gateway has to tell one router, gathered into frames.

Owns the order that a frame keeps: a sequence is submitted before it is paused or cancelled, and what undoes itself
before it was sent is not sent at all. Pure; knows no stream.
"""

from __future__ import annotations

from collections import deque

from collegium.v1 import router_pb2 as pb

# Ids in one frame, of prompts and of outputs that are replayed; at five bytes each at most this stays far below the
# message limit of 16 MiB.
MAX_FRAME_TOKENS = 1_000_000


class Outbox:
    """Everything that happened since the last frame."""

    __slots__ = ("_cancellations", "_paused", "_split", "_submissions", "_to_pause", "_to_unpause")

    def __init__(self) -> None:
        self._submissions: deque[pb.Submission] = deque()
        self._split: set[str] = set()  # submissions that went into several, until they end
        self._cancellations: list[pb.SequenceRef] = []
        self._paused: set[str] = set()  # as the router knows it
        self._to_pause: dict[str, None] = {}
        self._to_unpause: dict[str, None] = {}

    def submit(self, submission: pb.Submission) -> None:
        """Add a new request; one whose choices are together too large for a frame goes in several submissions."""
        parts = _parts(submission)
        self._submissions.extend(parts)
        if len(parts) > 1:
            self._split.add(submission.request_id)

    def cancel(self, submission_id: str, choice_index: int | None = None) -> None:
        """End a request, or one choice of it. A request that was not sent yet is forgotten."""
        if choice_index is None:
            self._forget(submission_id)
            waiting = [s for s in self._submissions if s.request_id == submission_id]
            for one in waiting:
                self._submissions.remove(one)
            if waiting and submission_id not in self._split:
                return
            self._split.discard(submission_id)  # some of it may have been sent
        self._cancellations.append(pb.SequenceRef(request_id=submission_id, choice_index=choice_index))

    def close(self, submission_id: str) -> None:
        """Forget a request that the router has ended by itself."""
        self._forget(submission_id)
        self._split.discard(submission_id)

    def pause(self, submission_id: str) -> None:
        """Hold a request."""
        self._to_unpause.pop(submission_id, None)
        if submission_id not in self._paused:
            self._to_pause[submission_id] = None

    def unpause(self, submission_id: str) -> None:
        """Let a held request go on."""
        self._to_pause.pop(submission_id, None)
        if submission_id in self._paused:
            self._to_unpause[submission_id] = None

    def next_frame(self) -> pb.AttachRequest | None:
        """Take the next frame; None where there is nothing to say."""
        frame = pb.AttachRequest()
        num_tokens = 0
        while self._submissions and (num_tokens == 0 or num_tokens < MAX_FRAME_TOKENS):
            num_tokens += _num_ids(self._submissions[0])
            if frame.submissions and num_tokens > MAX_FRAME_TOKENS:
                break
            frame.submissions.append(self._submissions.popleft())
        if not self._submissions:  # what is said of a sequence never overtakes its submission
            frame.cancellations.extend(self._cancellations)
            frame.pauses.extend(pb.SequenceRef(request_id=name) for name in self._to_pause)
            frame.unpauses.extend(pb.SequenceRef(request_id=name) for name in self._to_unpause)
            self._paused.update(self._to_pause)
            self._paused.difference_update(self._to_unpause)
            self._cancellations.clear()
            self._to_pause.clear()
            self._to_unpause.clear()
        has_news = frame.submissions or frame.cancellations or frame.pauses or frame.unpauses
        return frame if has_news else None

    def _forget(self, submission_id: str) -> None:
        self._to_pause.pop(submission_id, None)
        self._to_unpause.pop(submission_id, None)
        self._paused.discard(submission_id)


def _num_ids(submission: pb.Submission) -> int:
    return len(submission.prompt_ids) + sum(len(choice.output_ids) for choice in submission.choices)


def _parts(submission: pb.Submission) -> list[pb.Submission]:
    if _num_ids(submission) <= MAX_FRAME_TOKENS or len(submission.choices) < 2:
        return [submission]
    parts: list[pb.Submission] = []
    for choice in submission.choices:
        if not parts or _num_ids(parts[-1]) + len(choice.output_ids) > MAX_FRAME_TOKENS:
            parts.append(pb.Submission())
            parts[-1].CopyFrom(submission)
            del parts[-1].choices[:]
        parts[-1].choices.append(choice)
    return parts
