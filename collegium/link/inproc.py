"""Links between threads of one process: the tests' twin of the socket, and the transport of the one-process mode.

Tensors pass by reference. Sizes, secrets, credits and deadlines are checked as on a socket, and bytes are counted as a
socket would carry them. Both ends live here; a queue each way is all that they share.
"""

import itertools
import logging
import queue
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from collegium.link import header
from collegium.link.base import MAX_HINTS, Arrival, ExpectedLink, HintArrival, LinkStats
from collegium.link.expected import ExpectedLinks
from collegium.link.frame import (
    HEADER_BYTES,
    NO_EXPERTS,
    Dispatch,
    FrameError,
    Hint,
    LinkClosed,
    LinkShape,
    LinkTimeout,
    NoCredit,
    Reply,
    Status,
)
from collegium.link.hint import check_hint, write_hint

log = logging.getLogger("collegium.link")

_Item = tuple[int, Dispatch | Hint | str, int]  # link_id, what came or why the link ends, bytes of a body

_numbers = itertools.count()
_ports: "weakref.WeakValueDictionary[str, InprocPort]" = weakref.WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class _Answer:
    """What travels to the router: a reply, a sign of life (both None), or the reason for the end."""

    reply: Reply | None = None
    end_reason: str | None = None


class InprocLink:
    """A RouterLink whose worker is a thread of this process."""

    def __init__(self, port: "InprocPort", expected: ExpectedLink, worker_id: str) -> None:
        """Made by `connect`, once the secret has been found right."""
        self.shape: LinkShape = expected.shape
        self.link_id, self.router_id, self.worker_id = expected.link_id, expected.router_id, worker_id
        self.transport = "inproc"
        self.num_credits = expected.num_credits
        self.stats = LinkStats()
        self.last_heard_s = time.monotonic()
        self._port = port
        self._answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        self._in_flight: dict[int, int] = {}  # seq -> rows
        self._kept: dict[int, Reply] = {}
        self._abandoned: set[int] = set()
        self._closed_because = ""
        self._owner = threading.Lock()
        self._hint_room = threading.Semaphore(MAX_HINTS)  # what a socket's buffers would hold: no more wait to be read

    @property
    def num_in_flight(self) -> int:
        """How many dispatches are in flight, abandoned ones included."""
        return len(self._in_flight)

    @property
    def is_closed(self) -> bool:
        """Whether the link has ended."""
        return bool(self._closed_because)

    def send(self, dispatch: Dispatch) -> None:
        """Pass a dispatch to the worker's thread; see RouterLink.send."""
        with self._owner:
            self._catch_up()
            num_rows, num_pairs, num_groups = header.check_dispatch(dispatch, self.shape)
            # The header is written and thrown away, so that what a socket could not carry fails here too.
            body_bytes = header.write_dispatch(
                bytearray(HEADER_BYTES),
                dispatch,
                (num_rows, num_pairs, num_groups),
                len(dispatch.traceparent.encode()),
                self.shape,
            )
            if dispatch.seq in self._in_flight:
                raise FrameError(f"seq {dispatch.seq} is in flight already")
            if len(self._in_flight) >= self.num_credits:
                raise NoCredit(f"{self.num_credits} dispatches to {self.worker_id} are in flight")
            self._in_flight[dispatch.seq] = num_rows
            stats = self.stats
            stats.dispatches += 1
            stats.rows_out += num_rows
            stats.pairs_out += num_pairs
            stats.bytes_out += HEADER_BYTES + body_bytes
            self._port.deliver(self.link_id, dispatch, body_bytes)

    def receive(self, seq: int, deadline_s: float, *, patience_s: float = 0.0) -> Reply:
        """Wait for the reply to `seq`; see RouterLink.receive."""
        with self._owner:
            if seq not in self._in_flight or seq in self._abandoned:
                raise KeyError(f"seq {seq} is not in flight")
            while seq not in self._kept:
                self._check_open()
                try:
                    left_s = deadline_s - time.monotonic()
                    answer = self._answers.get(timeout=left_s) if left_s > 0 else self._answers.get_nowait()
                except queue.Empty:
                    self._abandoned.add(seq)
                    raise LinkTimeout(f"no reply from {self.worker_id} within the deadline") from None
                self._take(answer)
                if patience_s:
                    deadline_s = max(deadline_s, self.last_heard_s + patience_s)
            del self._in_flight[seq]
            return self._kept.pop(seq)

    def hint(self, hint: Hint) -> bool:
        """Pass advice to the worker's thread; see RouterLink.hint."""
        with self._owner:
            self._catch_up()
            check_hint(hint, self.shape)
            num_bytes = len(write_hint(hint))  # so that what a socket could not carry fails here too
            if not self._hint_room.acquire(blocking=False):
                return False
            self.stats.hints += 1
            self.stats.bytes_out += num_bytes
            own = replace(hint, experts=hint.experts.copy(), counts=hint.counts.copy())
            self._port.deliver(self.link_id, own, num_bytes - HEADER_BYTES)
            return True

    def has_read_hint(self) -> None:
        """Make room for another; called by the worker's thread."""
        self._hint_room.release()

    def close(self) -> None:
        """End the link and every wait on it; see RouterLink.close."""
        self._closed_because = self._closed_because or "this end closed the link"
        self._answers.put(_Answer())  # the owner may be waiting for one
        self._port.hang_up(self.link_id, "the router closed the connection")

    def end(self, reason: str) -> None:
        """Let every wait end with `reason`, once the replies before it have been read. From any thread."""
        self._answers.put(_Answer(end_reason=reason))

    def answer(self, reply: Reply | None) -> None:
        """Take a reply, or None as a sign of progress, from the worker's thread."""
        self._answers.put(_Answer(reply))

    def _catch_up(self) -> None:
        """Look at what has come. Raises LinkClosed where that, or something before it, ended the link."""
        while not self._answers.empty():
            self._take(self._answers.get_nowait())
        self._check_open()

    def _check_open(self) -> None:
        if self._closed_because:
            raise LinkClosed(self._closed_because)

    def _take(self, answer: _Answer) -> None:
        """Look at one thing that came from the worker."""
        if answer.end_reason is not None:
            self._closed_because = self._closed_because or answer.end_reason
            return
        if self._closed_because:
            return
        self.last_heard_s = time.monotonic()
        self.stats.bytes_back += HEADER_BYTES
        reply = answer.reply
        if reply is None:
            return
        self.stats.bytes_back += _body_bytes(reply, self.shape)
        if reply.y is not None:
            self.stats.rows_back += reply.y.shape[0]
        if reply.seq in self._abandoned:
            self._abandoned.discard(reply.seq)
            del self._in_flight[reply.seq]
            self.stats.late_replies += 1
        else:
            self._kept[reply.seq] = reply


@dataclass(slots=True, kw_only=True)
class _Accepted:
    """The worker's end of one link."""

    link: InprocLink
    stats: LinkStats
    in_flight: dict[int, tuple[int, int]]  # seq -> (rows, groups)


class InprocPort:
    """A WorkerPort whose routers are threads of this process."""

    def __init__(self, *, worker_id: str) -> None:
        """Listen under an address that no other port of this process has."""
        self._worker_id = worker_id
        self._address = f"inproc-{next(_numbers)}"
        self.addresses: Sequence[tuple[str, str]] = (("inproc", self._address),)
        self._inbox: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()  # None: wake
        self._hints: deque[HintArrival] = deque(maxlen=MAX_HINTS)
        self._expected = ExpectedLinks()
        self._guard = threading.Lock()  # of the two below, which any thread may touch
        self._links: dict[int, _Accepted] = {}
        self._is_closing = False
        _ports[self._address] = self

    # What any thread may call.

    def expect(self, link: ExpectedLink) -> None:
        """Let a router open `link` once; see WorkerPort.expect."""
        if link.link_id in self._links:
            raise ValueError(f"link {link.link_id} is open already")
        self._expected.add(link)

    def accept(self, link_id: int, secret: bytes, dtype: torch.dtype, d_model: int) -> InprocLink:
        """Open a link that is expected; called by the router's thread. Raises LinkClosed with the reason if not."""
        with self._guard:
            if self._is_closing:
                raise LinkClosed(f"no connection to {self._address}: the port is closed")
            try:
                expected = self._expected.claim(link_id, secret, dtype, d_model)
            except FrameError as error:
                raise LinkClosed(f"{self._address} refused the link: {error}") from None
            link = InprocLink(self, expected, self._worker_id)
            self._links[link_id] = _Accepted(link=link, stats=LinkStats(), in_flight={})
        return link

    def deliver(self, link_id: int, item: Dispatch | Hint, body_bytes: int) -> None:
        """Take a dispatch or a hint from a router's thread."""
        self._inbox.put((link_id, item, body_bytes))

    def hang_up(self, link_id: int, reason: str) -> None:
        """Take notice that a router has closed its end."""
        self._inbox.put((link_id, reason, 0))

    def drop(self, link_id: int, reason: str) -> None:
        """End one link at the next poll; see WorkerPort.drop."""
        self._inbox.put((link_id, reason, 0))

    def wake(self) -> None:
        """Make the current or next poll return."""
        self._inbox.put(None)

    def links(self) -> dict[int, LinkStats]:
        """Return a copy of the counters of each open link."""
        with self._guard:
            return {link_id: replace(accepted.stats) for link_id, accepted in self._links.items()}

    def close(self) -> None:
        """End every link and stop listening; see WorkerPort.close."""
        with self._guard:
            self._is_closing = True
            links, self._links = list(self._links.values()), {}
        for accepted in links:
            accepted.link.end(f"{self._worker_id} ended the link: the worker is closing its port")
        self._inbox.put(None)

    # What the owner calls.

    def poll(self, timeout_s: float) -> list[Arrival]:
        """Return what has arrived; see WorkerPort.poll."""
        self._check_open()
        arrivals: list[Arrival] = []
        try:
            item = self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get_nowait()
            while True:
                if item is not None:
                    self._take(*item, arrivals)
                item = self._inbox.get_nowait()
        except queue.Empty:
            pass
        self._check_open()
        return arrivals

    def hints(self) -> list[HintArrival]:
        """Return the hints that polls have read; see WorkerPort.hints."""
        hints = list(self._hints)
        self._hints.clear()
        return hints

    def reply(self, link_id: int, reply: Reply) -> None:
        """Answer a dispatch; see WorkerPort.reply."""
        accepted = self._links.get(link_id)
        if accepted is None:
            return
        num_rows, num_groups = accepted.in_flight[reply.seq]
        header.check_reply(reply, num_rows, num_groups, accepted.link.shape)
        del accepted.in_flight[reply.seq]
        stats = accepted.stats
        stats.bytes_back += HEADER_BYTES + _body_bytes(reply, accepted.link.shape)
        if reply.status == Status.OK:
            stats.rows_back += num_rows
            if reply.num_misses:  # they may stand in the router's own arrays
                reply = replace(reply, missed=reply.missed.copy())
        else:
            reply = replace(reply, y=None, missed=NO_EXPERTS, message=header.clip(reply.message).decode())
        accepted.link.answer(reply)

    def progress(self, link_id: int) -> None:
        """Tell a router that its dispatch is being worked on; see WorkerPort.progress."""
        accepted = self._links.get(link_id)
        if accepted is not None:
            accepted.stats.bytes_back += HEADER_BYTES
            accepted.link.answer(None)

    def _take(self, link_id: int, item: Dispatch | Hint | str, body_bytes: int, arrivals: list[Arrival]) -> None:
        """Look at one thing that came from a router."""
        accepted = self._links.get(link_id)
        if accepted is None:
            return
        if isinstance(item, str):
            self._end(accepted, item)
            return
        if isinstance(item, Hint):
            accepted.link.has_read_hint()
            accepted.stats.hints += 1
            accepted.stats.bytes_out += HEADER_BYTES + body_bytes
            self._hints.append(HintArrival(link_id=link_id, router_id=accepted.link.router_id, hint=item))
            return
        now_s = time.monotonic()
        accepted.in_flight[item.seq] = (item.x.shape[0], len(item.experts))
        stats = accepted.stats
        stats.dispatches += 1
        stats.rows_out += item.x.shape[0]
        stats.pairs_out += len(item.pair_rows)
        stats.bytes_out += HEADER_BYTES + body_bytes
        if item.deadline_s <= now_s:
            stats.expired += 1
            late_ms = int((now_s - item.deadline_s) * 1e3)
            message = f"arrived {late_ms} ms past its deadline"
            self.reply(link_id, Reply(seq=item.seq, status=Status.EXPIRED, message=message))
            return
        arrivals.append(Arrival(link_id=link_id, router_id=accepted.link.router_id, dispatch=item, received_s=now_s))

    def _end(self, accepted: _Accepted, reason: str) -> None:
        link = accepted.link
        log.info("link %d of router %s ended: %s", link.link_id, link.router_id, reason)
        with self._guard:
            self._links.pop(link.link_id, None)
        link.end(f"{self._worker_id} ended the link: {reason}")

    def _check_open(self) -> None:
        if self._is_closing:
            raise LinkClosed("the port is closed")


def connect(
    address: str,
    *,
    link_id: int,
    secret: bytes,
    dtype: torch.dtype,
    d_model: int,
    deadline_s: float,
    tls: ssl.SSLContext | None = None,
) -> InprocLink:
    """Open a link to a port of this process; see base.Connect. Neither the deadline nor TLS is needed."""
    del deadline_s, tls
    port = _ports.get(address)
    if port is None:
        raise LinkClosed(f"no connection to {address}: this process has no such port")
    return port.accept(link_id, secret, dtype, d_model)


def _body_bytes(reply: Reply, shape: LinkShape) -> int:
    """Return what a reply's body would take on a socket."""
    if reply.status == Status.OK and reply.y is not None:
        return reply.y.shape[0] * shape.reply_row_bytes + reply.missed.nbytes
    return len(header.clip(reply.message))
