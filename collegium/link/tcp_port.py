"""A worker's port: listens, checks secrets, and hands connections to the native end that owns their bytes.

One thread owns the port; expect, drop, wake, links and close are for any thread. Never waits for one peer: a slow or
broken one harms its own link alone. Knows nothing of experts but what it tells the native end.
"""

import contextlib
import ctypes
import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from collegium.link import header
from collegium.link.base import Arrival, ExpectedLink, HintArrival, LinkStats
from collegium.link.caller import HELLO_WITHIN_S, Caller
from collegium.link.expected import ExpectedLinks
from collegium.link.frame import (
    DTYPE_CODES,
    HEADER_BYTES,
    Dispatch,
    FrameError,
    Hint,
    Kind,
    LinkClosed,
    LinkError,
    LinkShape,
    Reply,
    Status,
)
from collegium.link.hint import is_hint, read_hint, read_hint_body
from collegium.link.listener import accept, listen_tcp, listen_unix
from collegium.link.memory import buffer_of, rows_at
from collegium.link.relay import relayed
from collegium.link.rows_apart import Landing, OpenCarrier, RowCarrier
from collegium.link.stream import PlainStream, Stream, send_all
from collegium.native.worker_end import NUM_STATS, Reason, Taken, Why, WorkerEnd

MAX_CALLERS: Final = 64  # connections that have not said HELLO yet
_MUTED_S: Final = 0.1  # between tries to accept while the process has no descriptor left
_MEET_WITHIN_S: Final = 30.0  # what making communicators may take
_BUDGET_BYTES: Final = 1 << 30
_FRAME_WITHIN_S: Final = 30.0  # 32 MiB at 10 Mbit/s
_READER_WITHIN_S: Final = 60.0  # a router that is stopped for so long has lost its lease

log = logging.getLogger("collegium.link")


class Stat(IntEnum):
    """Where a link's counters lie, in the order of LinkStats."""

    DISPATCHES, HINTS, ROWS_OUT, ROWS_BACK, PAIRS_OUT, BYTES_OUT, BYTES_BACK, LATE_REPLIES, EXPIRED = range(NUM_STATS)


@dataclass(slots=True, eq=False)
class _Link:
    """An open link; its bytes are the native end's."""

    handle: int
    stream: Stream
    link_id: int
    router_id: str
    shape: LinkShape
    stats: npt.NDArray[np.int64]
    carrier: RowCarrier | None
    in_flight: dict[int, Taken] = field(default_factory=dict[int, Taken])  # dispatches that were given out by a poll


@dataclass(frozen=True, slots=True)
class _Met:
    """A connection that has shown its secret; when its HELLO was sent and received."""

    stream: Stream
    expected: ExpectedLink
    sent_us: int
    received_us: int
    carrier: RowCarrier | None = None

    def close(self) -> None:
        """Give up the connection and whatever hangs on it."""
        if self.carrier is not None:
            self.carrier.abort()
        self.stream.shutdown()
        self.stream.close()


class TcpPort:
    """A WorkerPort over TCP, a unix socket, or both."""

    def __init__(
        self,
        *,
        worker_id: str,
        bind: str | None = None,
        unix: str | None = None,
        tls: ssl.SSLContext | None = None,
        open_carrier: OpenCarrier | None = None,
        budget_bytes: int = _BUDGET_BYTES,
        frame_within_s: float = _FRAME_WITHIN_S,
        reader_within_s: float = _READER_WITHIN_S,
    ) -> None:
        """Listen on `bind` ("HOST:PORT", port 0 for any) and on `unix` (a path, "@name", or "@" for any abstract name).

        `tls` wraps the TCP connections, never the unix socket. With `open_carrier` (see nccl.opener) the TCP address is
        offered as "nccl" too, for links whose rows travel apart. Of all links together, dispatches take no more than
        `budget_bytes`; a frame that is not whole `frame_within_s` after it has begun ends its link, as does a reply of
        which nothing is read for `reader_within_s`. Raises OSError where an address cannot be had.
        """
        if open_carrier is not None and (bind is None or tls is not None):
            raise ValueError("links whose rows travel apart need `bind`, and cannot be put under TLS")
        if bind is None and unix is None:
            raise ValueError("a port listens on `bind`, on `unix`, or on both")
        self._worker_id = worker_id
        self._tls = tls
        self._frame_within_s, self._reader_within_s = frame_within_s, reader_within_s
        self._control = select.epoll()  # of whatever is no link
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        self._muted: dict[int, float] = {}  # until when listeners, by descriptor, are not listened to
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._control.register(self._wake_fd, select.EPOLLIN)
        self._native = WorkerEnd(
            self._control.fileno(),
            budget_bytes=budget_bytes,
            frame_within_s=frame_within_s,
            reader_within_s=reader_within_s,
        )
        self._num_experts: list[int] = []
        self.num_refused = 0  # dispatches that could not be served as they were
        self._callers: dict[int, Caller] = {}  # by descriptor, oldest first
        self._by_id: dict[int, _Link] = {}
        self._landing: dict[int, tuple[_Link, Landing, Arrival]] = {}  # by handle: rows on their way by a carrier
        self._landed: list[Arrival] = []
        self._orphans: dict[tuple[int, int], Taken] = {}  # given out, and not answered when their link ended
        self._expected = ExpectedLinks()
        self._open_carrier = open_carrier
        self._guard = threading.Lock()  # of those below, which any thread may touch
        self._drops: list[tuple[int, str]] = []
        self._meeting: set[Stream] = set()  # streams of links whose carrier is being opened in a thread
        self._met: list[_Met] = []
        self._is_closing = False
        self._owner = threading.Lock()  # held while polling, so that `close` knows when to give up the descriptors
        self.addresses: Sequence[tuple[str, str]] = ()
        try:
            if bind is not None:
                self._listen("tcp", *listen_tcp(bind))
            if open_carrier is not None:
                self.addresses = (*self.addresses, ("nccl", dict(self.addresses)["tcp"]))
            if unix is not None:
                self._listen("unix", *listen_unix(unix))
        except BaseException:
            self.close()
            raise

    def _listen(self, transport: str, listener: socket.socket, address: str) -> None:
        self._listeners[listener.fileno()] = (listener, transport)
        self._control.register(listener.fileno(), select.EPOLLIN)
        self.addresses = (*self.addresses, (transport, address))

    # What any thread may call.

    def expect(self, link: ExpectedLink) -> None:
        """Let a router open `link` once; see WorkerPort.expect."""
        if link.link_id in self._by_id:
            raise ValueError(f"link {link.link_id} is open already")
        self._expected.add(link)

    def drop(self, link_id: int, reason: str) -> None:
        """End one link at the next poll; see WorkerPort.drop."""
        with self._guard:
            self._drops.append((link_id, reason))
        self.wake()

    def wake(self) -> None:
        """Make the current or next poll return."""
        with self._guard:
            if not self._is_closing:
                os.eventfd_write(self._wake_fd, 1)

    def links(self) -> dict[int, LinkStats]:
        """Return a copy of the counters of each open link."""
        return {link_id: LinkStats.of(link.stats.tolist()) for link_id, link in list(self._by_id.items())}

    def close(self) -> None:
        """End every link and stop listening; see WorkerPort.close."""
        with self._guard:
            was_closing, self._is_closing = self._is_closing, True
            for stream in self._meeting:
                stream.shutdown()
            if not was_closing:
                os.eventfd_write(self._wake_fd, 1)
        if was_closing or not self._owner.acquire(timeout=1.0):  # a signal handler that interrupts the owner itself
            return
        try:
            for link in list(self._by_id.values()):
                self._end(link, "the worker is closing its port")
            for link in self._met:
                link.close()
            for caller in list(self._callers.values()):
                self._forget(caller)
            for listener, _ in self._listeners.values():
                listener.close()
            for transport, address in self.addresses:
                if transport == "unix" and not address.startswith("@"):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(address)
            self._native.close()
            self._control.close()
            os.close(self._wake_fd)
        finally:
            self._owner.release()

    # What the owner calls.

    def serve(
        self,
        residents: tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]],
        num_experts: Sequence[int],
        *,
        shape: int | None,
        d_model: int,
        dtype: torch.dtype,
        num_threads: int,
        notes_visits: bool,
    ) -> None:
        """Say what experts there are, and how `run` computes them; see WorkerEnd.serve. residents: table, leases."""
        self._num_experts = list(num_experts)
        self._native.serve(
            *residents,
            num_experts,
            shape=shape,
            d_model=d_model,
            dtype_code=DTYPE_CODES[dtype],
            num_threads=num_threads,
            notes_visits=notes_visits,
        )

    def run(self, timeout_s: float, *, is_waiting: bool) -> Why:
        """Read, compute and answer for a time, or until there is something to do: a batch, hints, notes to fetch."""
        with self._owner:
            timeout_s = self._prepare(timeout_s)
            why = self._native.run(time.monotonic_ns() + int(timeout_s * 1e9), is_waiting=is_waiting)
            self._see_to(why)
            return why

    def listen(self, timeout_s: float) -> Why:
        """Move bytes while a batch is in the caller's hands, or until there is something to do."""
        with self._owner:
            why = self._native.move(self._prepare(timeout_s))
            self._see_to(why)
            return why

    @property
    def native(self) -> WorkerEnd:
        """The end of all links, for the owner: batches, hints and what was noted."""
        return self._native

    def router_of(self, link_id: int) -> str:
        """The router at the other end of a link; empty where the link is gone."""
        link = self._by_id.get(link_id)
        return link.router_id if link is not None else ""

    def poll(self, timeout_s: float) -> list[Arrival]:
        """Move what can move and return what has arrived; see WorkerPort.poll."""
        with self._owner:
            timeout_s = self._prepare(timeout_s)
            self._see_to(self._native.move(0.0 if self._landing else timeout_s))
            for handle, (link, landing, arrival) in list(self._landing.items()):
                try:
                    if not landing.is_complete():
                        continue
                except OSError as error:
                    self._end(link, str(error), tell=False)
                    continue
                del self._landing[handle]
                link.stats[Stat.BYTES_OUT] += arrival.dispatch.x.shape[0] * link.shape.row_bytes
                self._landed.append(arrival)
            while (taken := self._native.take()) is not None:
                self._receive(taken)
            arrivals, self._landed = self._landed, []
            return arrivals

    def hints(self) -> list[HintArrival]:
        """Return the hints that polls have read; see WorkerPort.hints."""
        with self._owner:
            return [
                HintArrival(
                    link_id=link_id,
                    router_id=self.router_of(link_id),
                    hint=Hint(layer=layer, experts=experts, counts=counts),
                )
                for link_id, layer, experts, counts in self._native.hints()
            ]

    def reply(self, link_id: int, reply: Reply) -> None:
        """Answer a dispatch without blocking; see WorkerPort.reply."""
        with self._owner:
            link = self._by_id.get(link_id)
            if self._is_closing:
                return
            if link is None or reply.seq not in link.in_flight:
                orphan = self._orphans.pop((link_id, reply.seq), None)
                if orphan is not None:
                    self._native.reply(orphan.handle, int(Status.FAILED), None, None, 0, 0, b"")
                if link is not None and orphan is None:
                    raise KeyError(f"seq {reply.seq} is not in flight")
                return
            taken, shape = link.in_flight[reply.seq], link.shape
            header.check_reply(reply, taken.num_rows, taken.num_groups, shape)
            is_ok = reply.y is not None and reply.status == Status.OK
            rows = buffer_of(reply.y) if is_ok and reply.y is not None and link.carrier is None else None
            missed = np.ascontiguousarray(reply.missed) if is_ok else None
            del link.in_flight[reply.seq]
            self._native.reply(
                taken.handle,
                int(reply.status),
                None if rows is None else rows.ctypes.data,
                missed,
                reply.compute_us,
                reply.wait_us,
                b"" if is_ok else header.clip(reply.message),
            )
            if link.carrier is not None and is_ok and reply.y is not None:
                link.stats[Stat.BYTES_BACK] += taken.num_rows * shape.reply_row_bytes
                try:
                    link.carrier.send(reply.y)
                except OSError as error:
                    self.drop(link_id, f"the rows of seq {reply.seq} cannot be sent: {error}")

    def progress(self, link_id: int) -> None:
        """Tell a router that its dispatch is being worked on; see WorkerPort.progress."""
        with self._owner:
            link = self._by_id.get(link_id)
            if link is not None and not self._is_closing:
                link.stats[Stat.BYTES_BACK] += HEADER_BYTES
                self._native.post(link.handle, header.plain(Kind.PROGRESS, 0))

    def _prepare(self, timeout_s: float) -> float:
        """Look after callers; return how long a call may wait for anything else."""
        if self._is_closing:
            raise LinkClosed("the port is closed")
        if self._callers:
            timeout_s = min(timeout_s, self._expire_callers())
        if self._muted:
            timeout_s = min(timeout_s, self._unmute())
        return max(0.0, timeout_s)

    def _see_to(self, why: Why) -> None:
        """Do what a call of the native end came back for, but for what is its caller's."""
        if self._is_closing:
            raise LinkClosed("the port is closed")
        if why & Why.ENDED:
            for link in list(self._by_id.values()):
                self._end_if_over(link)
        if why & Why.ARRIVED:
            while (taken := self._native.take(only_odd=True)) is not None:
                self._refuse(taken)
        if why & Why.CONTROL:
            for fd, _ in self._control.poll(0.0):
                if fd == self._wake_fd:
                    os.eventfd_read(fd)
                    self._do_drops()
                    self._take_met()
                elif fd in self._listeners:
                    self._accept(*self._listeners[fd])
                elif fd in self._callers:
                    self._greet(self._callers[fd])

    def _receive(self, taken: Taken) -> None:
        """Take a dispatch up as an arrival, at once or when its rows have landed."""
        link = self._by_id[taken.link_id]
        dispatch = _dispatch(taken, link.shape, link.carrier)
        link.in_flight[taken.seq] = taken
        arrival = Arrival(
            link_id=taken.link_id,
            router_id=link.router_id,
            dispatch=dispatch,
            received_s=taken.received_ns * 1e-9,
        )
        if link.carrier is None:
            self._landed.append(arrival)
            return
        try:
            self._landing[taken.handle] = (link, link.carrier.receive(dispatch.x), arrival)
        except OSError as error:
            self._end(link, str(error), tell=False)

    def _refuse(self, taken: Taken) -> None:
        """Say what is wrong with a dispatch that cannot be served."""
        self.num_refused += 1
        message = _problem_of(taken, self._num_experts).encode()
        self._native.reply(taken.handle, int(Status.BAD_FRAME), None, None, 0, 0, message)

    def _end_if_over(self, link: _Link) -> None:
        reason, error, head = self._native.why(link.handle)
        match reason:
            case Reason.OPEN:
                return
            case Reason.CLOSED_BY_PEER:
                self._end(link, "the router closed the connection", tell=False)
            case Reason.BROKE:
                self._end(link, f"the router's connection broke: {os.strerror(error)}", tell=False)
            case Reason.BAD_HEADER:
                self._end(link, f"bad frame: {_header_problem(head, link.shape)}")
            case Reason.BAD_HINT:
                self._end(link, f"bad frame: {_hint_problem(head, self._native.hint_body(link.handle), link.shape)}")
            case Reason.NO_CREDIT:
                allowed = link.shape.num_credits
                self._end(link, f"bad frame: more than the {allowed} dispatches that the link allows")
            case Reason.TWICE:
                self._end(link, f"bad frame: seq {header.read_common(head).seq} is in flight already")
            case Reason.SLOW_FRAME:
                self._end(link, f"a frame was not whole {self._frame_within_s:g} s after it had begun")
            case Reason.SLOW_READER:
                self._end(link, f"nothing of a reply was read for {self._reader_within_s:g} s", tell=False)
            case Reason.NO_MEMORY:
                self._end(link, "this worker has no memory for a frame of the link")

    def _end(self, link: _Link, reason: str, *, tell: bool = True) -> None:
        log.info("link %d of router %s ended: %s", link.link_id, link.router_id, reason)
        if tell:
            self._native.say(link.handle, header.goodbye(reason))
        del self._by_id[link.link_id]
        self._native.remove(link.handle)
        for handle, (landing_link, _, arrival) in list(self._landing.items()):
            if landing_link is link:  # nobody has been given it
                del self._landing[handle], link.in_flight[arrival.dispatch.seq]
                self._native.reply(handle, int(Status.FAILED), None, None, 0, 0, b"")
        self._orphans |= {(link.link_id, seq): taken for seq, taken in link.in_flight.items()}
        if link.carrier is not None:
            link.carrier.abort()
        link.stream.shutdown()
        link.stream.close()

    def _do_drops(self) -> None:
        with self._guard:
            drops, self._drops = self._drops, []
        for link_id, reason in drops:
            link = self._by_id.get(link_id)
            if link is not None:
                self._end(link, reason)

    # Those who call.

    def _accept(self, listener: socket.socket, transport: str) -> None:
        try:
            stream = accept(listener, self._tls if transport == "tcp" else None)
        except BlockingIOError:
            return
        except OSError as error:  # it went away again, or no descriptor is left
            if not self._muted:
                log.warning("a connection could not be accepted: %s", error)
            self._control.modify(listener, 0)  # or every poll would find it again
            self._muted[listener.fileno()] = time.monotonic() + _MUTED_S
            return
        if len(self._callers) >= MAX_CALLERS:
            self._forget(next(iter(self._callers.values())))
        self._callers[stream.fileno()] = Caller(stream, transport)
        self._control.register(stream.fileno(), select.EPOLLIN)

    def _unmute(self) -> float:
        """Listen again where the pause is over; return how long the next one has."""
        now_s = time.monotonic()
        for fd, until_s in list(self._muted.items()):
            if until_s <= now_s:
                del self._muted[fd]
                self._control.modify(fd, select.EPOLLIN)
        return min(self._muted.values(), default=now_s + HELLO_WITHIN_S) - now_s

    def _expire_callers(self) -> float:
        """Forget the callers that said nothing in time; return how long the next one has."""
        now_s = time.monotonic()
        for caller in list(self._callers.values()):
            if caller.expires_s > now_s:
                return caller.expires_s - now_s
            self._forget(caller)
        return HELLO_WITHIN_S

    def _forget(self, caller: Caller, reason: str = "") -> None:
        fd = caller.stream.fileno()
        if reason:
            log.info("a caller was refused: %s", reason)
            caller.farewell(reason)
        del self._callers[fd]
        self._control.unregister(fd)
        caller.stream.shutdown()
        caller.stream.close()

    def _greet(self, caller: Caller) -> None:
        """Read a caller's HELLO; make it a link, or turn it away."""
        try:
            if not caller.read():
                return
            secret, dtype, d_model = header.read_hello(caller.buffer[HEADER_BYTES:])
            expected = self._expected.claim(
                caller.link_id, secret, dtype, d_model, are_rows_apart=caller.wants_rows_apart
            )
            if expected.are_rows_apart and self._open_carrier is None:
                raise FrameError("this worker's rows travel in frames only")
        except FrameError as error:
            self._forget(caller, str(error))
            return
        except (LinkClosed, OSError) as error:
            log.debug("a caller went away: %s", error)
            self._forget(caller)
            return
        fd = caller.stream.fileno()
        del self._callers[fd]
        self._control.unregister(fd)
        welcome = header.welcome(expected.link_id, expected.shape, self._worker_id)
        if self._open_carrier is None or not expected.are_rows_apart:
            stream = caller.stream
            if not isinstance(stream, PlainStream):
                stream = relayed(stream, name=f"tls-{expected.link_id}")
            self._add(_Met(stream, expected, caller.sent_us, header.now_us()), welcome)
            return
        with self._guard:
            self._meeting.add(caller.stream)
        meet = (caller, expected, welcome, self._open_carrier)
        threading.Thread(target=self._meet, args=meet, name=f"link-{expected.link_id}", daemon=True).start()

    def _meet(self, caller: Caller, expected: ExpectedLink, welcome: bytes, open_carrier: OpenCarrier) -> None:
        """Open a link's carrier with its router, in a thread of its own: that takes long, and the port goes on."""
        stream, deadline_s = caller.stream, time.monotonic() + _MEET_WITHIN_S
        met: _Met | None = None
        received_us = header.now_us()
        try:
            send_all(stream, welcome, deadline_s)
            met = _Met(stream, expected, caller.sent_us, received_us, open_carrier(stream, deadline_s))
        except (LinkError, OSError) as error:
            log.warning("link %d of router %s could not be opened: %s", expected.link_id, expected.router_id, error)
        with self._guard:
            self._meeting.discard(stream)
            has_port = not self._is_closing
            if met is not None and has_port:
                self._met.append(met)
        if met is None:
            stream.shutdown()
            stream.close()
        elif has_port:
            self.wake()
        else:
            met.close()

    def _take_met(self) -> None:
        with self._guard:
            met, self._met = self._met, []
        for one in met:
            self._add(one)

    def _add(self, met: _Met, welcome: bytes = b"") -> None:
        expected, shape = met.expected, met.expected.shape
        stats = np.zeros(NUM_STATS, np.int64)
        agreed = (
            shape.d_model, shape.dtype.itemsize, shape.reply_dtype.itemsize, DTYPE_CODES[shape.dtype],
            DTYPE_CODES[shape.reply_dtype], shape.max_rows, shape.max_pairs, shape.max_groups, shape.num_credits,
            shape.are_rows_apart,
        )  # fmt: skip
        try:
            handle = self._native.add(
                met.stream.fileno(), expected.link_id, agreed, met.sent_us, met.received_us, stats
            )
        except MemoryError as error:
            log.warning("link %d of router %s could not be opened: %s", expected.link_id, expected.router_id, error)
            met.close()
            return
        link = _Link(handle, met.stream, expected.link_id, expected.router_id, shape, stats, met.carrier)
        self._by_id[link.link_id] = link
        if welcome:
            self._native.post(handle, welcome)
        log.info("link %d of router %s opened", link.link_id, link.router_id)


def _dispatch(taken: Taken, shape: LinkShape, carrier: RowCarrier | None) -> Dispatch:
    """What was taken, as views of its memory."""
    num_rows, num_pairs, num_groups = taken.num_rows, taken.num_pairs, taken.num_groups
    if carrier is not None:
        x = torch.empty((num_rows, shape.d_model), dtype=shape.dtype, device=carrier.device)
    else:
        x = rows_at(taken.x, num_rows, shape.d_model, shape.dtype)
    return Dispatch(
        seq=taken.seq,
        layer=taken.layer,
        step=taken.step,
        epoch=taken.epoch,
        micro_batch=taken.micro_batch,
        deadline_s=taken.deadline_us / 1e6,
        experts=np.ctypeslib.as_array((ctypes.c_uint16 * num_groups).from_address(taken.experts)),
        counts=np.ctypeslib.as_array((ctypes.c_uint16 * num_groups).from_address(taken.counts)),
        pair_rows=np.ctypeslib.as_array((ctypes.c_uint32 * num_pairs).from_address(taken.pair_rows)),
        pair_weights=np.ctypeslib.as_array((ctypes.c_float * num_pairs).from_address(taken.pair_weights)),
        x=x,
        num_prompt_rows=taken.num_prompt_rows,
        traceparent=ctypes.string_at(taken.text, taken.text_bytes).decode("ascii", "replace"),
    )


def _problem_of(taken: Taken, num_experts: Sequence[int]) -> str:
    """Say why a dispatch cannot be served as it is."""
    experts = np.ctypeslib.as_array((ctypes.c_uint16 * taken.num_groups).from_address(taken.experts))
    counts = np.ctypeslib.as_array((ctypes.c_uint16 * taken.num_groups).from_address(taken.counts))
    pair_rows = np.ctypeslib.as_array((ctypes.c_uint32 * taken.num_pairs).from_address(taken.pair_rows))
    try:
        header.check_counts(counts, pair_rows, taken.num_rows)
        header.check_distinct(experts)
    except FrameError as error:
        return str(error)
    if taken.layer >= len(num_experts):
        return f"layer {taken.layer} of a model with {len(num_experts)} MoE layers"
    return f"expert {experts.max()} of layer {taken.layer}, which has {num_experts[taken.layer]}"


def _header_problem(head: bytes, shape: LinkShape) -> str:
    try:
        if is_hint(bytearray(head)):
            read_hint(head, shape)
        else:
            header.read_dispatch(head, shape)
    except FrameError as error:
        return str(error)
    return "a header that cannot be followed"


def _hint_problem(head: bytes, body: bytes, shape: LinkShape) -> str:
    try:
        read_hint_body(read_hint(head, shape), body, shape)
    except FrameError as error:
        return str(error)
    return "a hint that makes no sense"
