"""The interface of links: what a router holds (RouterLink), what a worker listens on (WorkerPort).

Every transport stands behind these two protocols and passes one conformance suite. Owns no socket and no thread.
"""

import ssl
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final, Protocol

import torch

from collegium.link.frame import Dispatch, Hint, LinkShape, Reply

MAX_HINTS: Final = 64  # kept at a worker's port until asked for; older advice is stale by then


@dataclass(slots=True, kw_only=True)
class LinkStats:
    """What one end of a link counted since it began; bytes are all those of dispatches, hints, replies and progress."""

    dispatches: int = 0
    hints: int = 0  # begun at the router's end, whole at the worker's
    rows_out: int = 0  # rows of dispatches, router to worker
    rows_back: int = 0  # rows of replies, worker to router
    pairs_out: int = 0
    bytes_out: int = 0
    bytes_back: int = 0
    late_replies: int = 0  # replies to a dispatch that its router had abandoned
    expired: int = 0  # dispatches that reached the worker past their deadline

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "LinkStats":
        """Make them of numbers in the order above."""
        return cls(**dict(zip((counter.name for counter in fields(cls)), numbers, strict=True)))

    def add(self, more: "LinkStats") -> None:
        """Add another link's counters to these."""
        for counter in fields(LinkStats):
            setattr(self, counter.name, getattr(self, counter.name) + getattr(more, counter.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedLink:
    """A link that a router was promised over the control channel and has not opened yet."""

    link_id: int
    secret: bytes  # SECRET_BYTES random bytes, good once
    router_id: str
    dtype: torch.dtype
    reply_dtype: torch.dtype
    d_model: int
    max_rows: int
    num_credits: int
    expires_s: float  # monotonic time after which the secret is worth nothing
    max_pairs: int = 0  # 0: PAIRS_PER_ROW * max_rows
    are_rows_apart: bool = False  # for transport "nccl"

    @property
    def shape(self) -> LinkShape:
        """What both ends agree on. Raises ValueError where no frame could carry it."""
        return LinkShape(
            dtype=self.dtype,
            reply_dtype=self.reply_dtype,
            d_model=self.d_model,
            max_rows=self.max_rows,
            num_credits=self.num_credits,
            max_pairs=self.max_pairs,
            are_rows_apart=self.are_rows_apart,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A dispatch that has arrived whole, is well formed, and is not past its deadline."""

    link_id: int
    router_id: str
    dispatch: Dispatch
    received_s: float  # monotonic


@dataclass(frozen=True, slots=True, kw_only=True)
class HintArrival:
    """A hint that has arrived whole and is well formed; whether there are such experts is for the worker to say."""

    link_id: int
    router_id: str
    hint: Hint


class RouterLink(Protocol):
    """The router's end. Owned by one thread; `close` and the read-only attributes may be used from any."""

    @property
    def worker_id(self) -> str:
        """The worker at the other end."""
        ...

    @property
    def link_id(self) -> int:
        """The link's id, given by the worker."""
        ...

    @property
    def transport(self) -> str:
        """The name of the transport: "tcp", "unix" or "nccl"."""
        ...

    @property
    def shape(self) -> LinkShape:
        """Data types, width and limits that both ends agreed on."""
        ...

    @property
    def num_credits(self) -> int:
        """How many dispatches may be in flight."""
        ...

    @property
    def num_in_flight(self) -> int:
        """How many dispatches are in flight, abandoned ones whose reply has not come included."""
        ...

    @property
    def stats(self) -> LinkStats:
        """Counters; the caller does not write them."""
        ...

    @property
    def last_heard_s(self) -> float:
        """Monotonic time of the last frame read from the worker, a progress frame included."""
        ...

    @property
    def is_closed(self) -> bool:
        """Whether the link has ended."""
        ...

    @property
    def takes_hints(self) -> bool:
        """Whether the worker has a use for hints, as far as its last reply said."""
        ...

    def send(self, dispatch: Dispatch) -> None:
        """Hand a dispatch to the transport, blocking at most until its own deadline.

        The dispatch's arrays may be used again at once. Raises FrameError before a byte leaves where the dispatch
        breaks the link's shape; NoCredit where `num_credits` are in flight; LinkTimeout where the deadline passes
        first, the link then lives on; LinkClosed.
        """
        ...

    def receive(self, seq: int, deadline_s: float, *, patience_s: float = 0.0) -> Reply:
        """Wait for the reply to `seq`; replies to others in flight are kept for their own receive.

        Each sign of life from the worker moves the deadline to at least `patience_s` after it: slow is not lost.
        `deadline_s` is monotonic; what has already arrived is returned even past it. `Reply.y` is a view of memory
        of that dispatch's credit: valid until the credit is used again by a later send. Raises KeyError where `seq`
        is not in flight; LinkTimeout, after which `seq` is abandoned: its reply, when it comes, is read into scratch,
        counted as late, and gives back the credit; LinkClosed.
        """
        ...

    def hint(self, hint: Hint) -> bool:
        """Tell the worker what it may be asked for next: advice that takes no credit and has no reply.

        Never waits for a worker that does not read: returns False where the hint could not go out now and is forgotten.
        One that has begun to leave is sure to arrive whole, and is True. The arrays may be used again at once. Raises
        FrameError before a byte leaves where the hint breaks the link's shape; LinkClosed.
        """
        ...

    def close(self) -> None:
        """End the link and every wait on it with LinkClosed. Idempotent, from any thread."""
        ...


class WorkerPort(Protocol):
    """The worker's end of all its links. Owned by one thread, apart from what is marked thread-safe."""

    @property
    def addresses(self) -> Sequence[tuple[str, str]]:
        """(transport, address) of each way in; an abstract unix socket begins with "@". Thread-safe."""
        ...

    def expect(self, link: ExpectedLink) -> None:
        """Let a router open `link` with its secret, once. Thread-safe.

        Raises ValueError where the shape cannot be carried, or the link_id is expected or open already.
        """
        ...

    def poll(self, timeout_s: float) -> list[Arrival]:
        """Move what can move without blocking, waiting at most `timeout_s` for anything to do.

        Accepts connections, reads what is there, sends what is queued. Returns dispatches that are whole; sockets
        read at most one of each link, so that links take turns: call again with 0.0 to gather more. A dispatch past
        its deadline is answered EXPIRED and not returned; one whose counts do not add up is answered BAD_FRAME. A
        frame that cannot be read, or a peer that broke, closes that link alone. A hint ends the wait as a dispatch
        does, and is kept for `hints`. May be called while dispatches that it returned before are unanswered: their
        arrays stay as they are. Raises LinkClosed after `close`.
        """
        ...

    def hints(self) -> list[HintArrival]:
        """Return the hints that polls have read since the last call, oldest first; at most the newest MAX_HINTS."""
        ...

    def reply(self, link_id: int, reply: Reply) -> None:
        """Answer a dispatch; never blocks. What the transport does not take now is sent by later polls.

        The dispatch's arrays are invalid from here on. `y` may be written again at once. Dropped without a word where
        the link is gone. Raises FrameError where `y` or `missed` does not match the dispatch, KeyError where
        `reply.seq` is not in flight.
        """
        ...

    def progress(self, link_id: int) -> None:
        """Tell the router that this worker is slow, not suspect; never blocks, dropped where it cannot go out now."""
        ...

    def drop(self, link_id: int, reason: str) -> None:
        """End one link and tell its router why. Thread-safe; done by the next poll."""
        ...

    def wake(self) -> None:
        """Make the current or next poll return. Thread-safe."""
        ...

    def links(self) -> dict[int, LinkStats]:
        """The counters of each open link. Thread-safe."""
        ...

    def close(self) -> None:
        """End every link and stop listening. Idempotent, thread-safe: a poll that waits raises LinkClosed."""
        ...


class Connect(Protocol):
    """How a router opens a link; `collegium.link.connect.connect` picks the one of a transport."""

    def __call__(
        self,
        address: str,
        *,
        link_id: int,
        secret: bytes,
        dtype: torch.dtype,
        d_model: int,
        deadline_s: float,
        tls: ssl.SSLContext | None = None,
    ) -> RouterLink:
        """Open a link that the worker expects; limits, reply dtype and worker_id come in its answer.

        Blocks until the worker's port is polled. Raises LinkTimeout, or LinkClosed with the worker's reason: no such
        link, wrong, used or expired secret, another dtype or width.
        """
        ...
