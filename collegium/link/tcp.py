"""The router's end of a link over a socket: TCP, TCP under TLS, or a unix socket.

The thread that needs the reply sends and receives itself. A frame leaves with one sendmsg and is read into memory that
was made when the link was opened: one buffer of rows per credit. Knows nothing of what the rows mean.
"""

import contextlib
import threading
import time
from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from collegium.link import header
from collegium.link.base import LinkStats
from collegium.link.frame import (
    HEADER_BYTES,
    MAX_TEXT_BYTES,
    NO_EXPERTS,
    Dispatch,
    FrameError,
    Hint,
    Kind,
    LinkClosed,
    LinkShape,
    LinkTimeout,
    NoCredit,
    Reply,
    Status,
)
from collegium.link.hint import check_hint, write_hint
from collegium.link.memory import buffer_of, byte_view
from collegium.link.rows_apart import Landing, RowCarrier
from collegium.link.stream import PlainStream, Stream, is_readable, rest_of

_SCRATCH_BYTES: Final = 64 * 1024
_ROWS_WITHIN_S: Final = 2.0
_HINT_WITHIN_S: Final = 0.002  # what the rest of a hint may wait for; after that it goes out before the next frame


class _Credit:
    """The right to have one dispatch in flight, and the memory that its reply is read into."""

    __slots__ = ("is_abandoned", "num_groups", "num_rows", "reply", "rows", "view", "y")

    def __init__(self, shape: LinkShape, device: torch.device) -> None:
        rows_bytes = shape.max_rows * shape.framed_reply_row_bytes
        memory = torch.empty(rows_bytes + 2 * shape.max_groups, dtype=torch.uint8)  # rows, then what was missed
        self.view = byte_view(memory)
        if shape.are_rows_apart:
            self.rows = torch.empty((shape.max_rows, shape.d_model), dtype=shape.reply_dtype, device=device)
        else:
            self.rows = memory[:rows_bytes].view(shape.reply_dtype).view(-1, shape.d_model)  # [max_rows, D]
        self.y = self.rows
        self.num_rows = self.num_groups = 0
        self.reply: Reply | None = None
        self.is_abandoned = False

    def first(self, num_rows: int) -> torch.Tensor:
        """Return the first rows; the view is kept, for a decode step asks for as many as the one before."""
        if self.y.shape[0] != num_rows:
            self.y = self.rows[:num_rows]
        return self.y

    def missed(self, head: header.ReplyHeader) -> npt.NDArray[np.uint16]:
        """Return a copy of the experts behind the rows of a reply that has been read."""
        return np.frombuffer(self.view[: head.body_bytes][-2 * head.num_misses :], np.uint16).copy()  # [M]


class SocketLink:
    """A RouterLink over one connected stream, after its handshake."""

    def __init__(
        self,
        stream: Stream,
        *,
        transport: str,
        link_id: int,
        worker_id: str,
        shape: LinkShape,
        carrier: RowCarrier | None = None,
    ) -> None:
        """Take over a blocking stream whose peer has said WELCOME. Makes the memory of every credit.

        `carrier` is there where the shape says that rows travel apart.
        """
        assert (carrier is not None) == shape.are_rows_apart
        self.transport, self.link_id, self.worker_id, self.shape = transport, link_id, worker_id, shape
        self.num_credits = shape.num_credits
        self.no_hints = np.zeros(1, np.uint8)  # 1: the worker has no use for hints now, as its last reply said
        self.stats = LinkStats()
        self.last_heard_s = time.monotonic()
        self._stream = stream
        self._recv_into = stream.recv_into
        # First in, first out: the memory of a credit stays as it is for as long as it can.
        device = torch.device("cpu") if carrier is None else carrier.device
        self._carrier = carrier
        self._free = deque(_Credit(shape, device) for _ in range(shape.num_credits))
        self._in_flight: dict[int, _Credit] = {}
        self._out = bytearray(HEADER_BYTES)
        self._tail = b""  # the rest of a frame whose time was up while it was sent; goes out before the next
        self._head = bytearray(HEADER_BYTES)
        self._head_view = memoryview(self._head)
        self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        self._text = memoryview(bytearray(MAX_TEXT_BYTES))
        # The frame being read: its header once that is whole, where its body goes, how much of it is missing.
        self._header: header.ReplyHeader | header.Common | None = None
        self._target = self._head_view
        self._got = 0
        self._left = 0
        self._closed_because = ""
        self._owner = threading.Lock()  # held during every call, so that `close` knows when to give up the descriptor

    @property
    def num_in_flight(self) -> int:
        """How many dispatches are in flight, abandoned ones included."""
        return len(self._in_flight)

    @property
    def is_closed(self) -> bool:
        """Whether the link has ended."""
        return bool(self._closed_because)

    @property
    def takes_hints(self) -> bool:
        """Whether the worker has a use for hints, as far as its last reply said."""
        return not self.no_hints[0]

    def send(self, dispatch: Dispatch) -> None:
        """Hand a dispatch to the socket; see RouterLink.send."""
        with self._owner:
            self._check_open()
            if not self._free:
                self._drain()
            if self._tail:
                self._send_tail(dispatch.deadline_s)
            sizes = header.check_dispatch(dispatch, self.shape)
            if self._carrier is not None and dispatch.x.device != self._carrier.device:
                raise FrameError(f"x is on {dispatch.x.device}; the link carries rows of {self._carrier.device}")
            if dispatch.seq in self._in_flight:
                raise FrameError(f"seq {dispatch.seq} is in flight already")
            if not self._free:
                raise NoCredit(f"{self.num_credits} dispatches to {self.worker_id} are in flight")
            text = dispatch.traceparent.encode() if dispatch.traceparent else b""
            total_bytes = HEADER_BYTES + header.write_dispatch(self._out, dispatch, sizes, len(text), self.shape)
            buffers = (
                self._out,
                dispatch.experts,
                dispatch.counts,
                dispatch.pair_rows,
                dispatch.pair_weights,
                buffer_of(dispatch.x) if self._carrier is None else b"",
                text,
            )
            try:
                taken = self._stream.send_now(buffers)
            except OSError as error:
                raise self._end(f"the worker's connection broke: {error}") from error
            except (BufferError, ValueError) as error:
                raise FrameError(f"an array of the dispatch is not contiguous: {error}") from error
            has_left = taken == total_bytes
            if not has_left:
                self._tail = rest_of(buffers, taken)
                try:
                    self._send_tail(dispatch.deadline_s)
                    has_left = True
                except LinkTimeout:
                    if len(self._tail) == total_bytes and self._stream.can_take_back:
                        self._tail = b""  # not a byte has left: as if it had never been sent
                        raise
            credit = self._free.popleft()
            credit.num_rows, credit.num_groups = sizes[0], sizes[2]
            credit.reply, credit.is_abandoned = None, not has_left
            self._in_flight[dispatch.seq] = credit
            stats = self.stats
            if self._carrier is not None:
                stats.bytes_out += sizes[0] * self.shape.row_bytes
                try:
                    self._carrier.send(dispatch.x)
                except OSError as error:
                    raise self._end(f"the rows of dispatch {dispatch.seq} cannot be sent: {error}") from error
            stats.dispatches += 1
            stats.rows_out += sizes[0]
            stats.pairs_out += sizes[1]
            stats.bytes_out += total_bytes
            if not has_left:
                raise LinkTimeout(f"the deadline passed while dispatch {dispatch.seq} was sent to {self.worker_id}")

    def hint(self, hint: Hint) -> bool:
        """Hand advice to the socket where it has room; see RouterLink.hint."""
        with self._owner:
            self._check_open()
            check_hint(hint, self.shape)
            frame = write_hint(hint)
            try:
                if self._tail:
                    self._tail = self._tail[self._stream.send_now((self._tail,)) :]
                    if self._tail:
                        return False
                taken = self._stream.send_now((frame,))
            except OSError as error:
                raise self._end(f"the worker's connection broke: {error}") from error
            if taken == 0 and self._stream.can_take_back:
                return False
            self.stats.hints += 1
            self.stats.bytes_out += len(frame)
            if taken < len(frame):
                self._tail = frame[taken:]
                with contextlib.suppress(LinkTimeout):
                    self._send_tail(time.monotonic() + _HINT_WITHIN_S)
            return True

    def receive(self, seq: int, deadline_s: float, *, patience_s: float = 0.0) -> Reply:
        """Wait for the reply to `seq`; see RouterLink.receive."""
        with self._owner:
            credit = self._in_flight.get(seq)
            if credit is None or credit.is_abandoned:
                raise KeyError(f"seq {seq} is not in flight")
            if credit.reply is None:
                self._check_open()
                self._stream.set_wait(deadline_s - time.monotonic())
                try:
                    while credit.reply is None:
                        self._read_frame(deadline_s)
                        if patience_s and credit.reply is None and self.last_heard_s + patience_s > deadline_s:
                            deadline_s = self.last_heard_s + patience_s
                            self._stream.set_wait(patience_s)
                except LinkTimeout:
                    credit.is_abandoned = True
                    raise
            reply, credit.reply = credit.reply, None
            del self._in_flight[seq]
            self._free.append(credit)
            return reply

    def lend(self) -> int:
        """Hand the descriptor to one that sends and receives whole frames by itself, until `take_back`; -1 where that
        cannot be: something is in flight, waits to be sent or is half read, or bytes are not those of the socket.
        """
        return self._lend(not (self._in_flight or self._tail or self._got or self._header is not None))

    def lend_to_send(self) -> int:
        """Hand the descriptor to one that sends one whole dispatch by itself, until `take_back`; -1 where that cannot
        be: no credit is left, or something else waits to be sent.
        """
        return self._lend(bool(self._free) and not self._tail)

    def lend_to_receive(self, seq: int) -> int:
        """Hand the descriptor to one that receives the reply to `seq` by itself, until `take_back`; -1 where that
        cannot be: it was abandoned or has been read already, or another frame is half read.
        """
        credit = self._in_flight.get(seq)  # in this thread's hands alone
        is_next = credit is not None and not credit.is_abandoned and credit.reply is None
        return self._lend(is_next and not self._got and self._header is None)

    def take_back(self) -> None:
        """End a loan."""
        self._owner.release()

    def answered(self, seq: int) -> None:
        """Hear that the reply to `seq` was received during a loan; before `take_back`."""
        self.last_heard_s = time.monotonic()
        self._free.append(self._in_flight.pop(seq))

    def adopt(self, seq: int, num_rows: int, num_groups: int) -> None:
        """Take over a dispatch that was sent during a loan, whose reply is still to come; before `take_back`."""
        credit = self._free.popleft()
        credit.num_rows, credit.num_groups = num_rows, num_groups
        credit.reply, credit.is_abandoned = None, False
        self._in_flight[seq] = credit

    def spoil(self, reason: str) -> LinkClosed:
        """Close a link on which a loan has left half a frame; before `take_back`. Returns what to raise."""
        return self._end(reason)

    def close(self) -> None:
        """End the link and every wait on it; see RouterLink.close."""
        self._closed_because = self._closed_because or "this end closed the link"
        self._stream.shutdown()
        if self._carrier is not None:
            self._carrier.abort()
        # The owner leaves its wait at once. The limit is for a signal handler that interrupts the owner itself.
        if self._owner.acquire(timeout=1.0):
            try:
                self._stream.close()
            finally:
                self._owner.release()

    def _lend(self, is_fit: bool) -> int:
        self._owner.acquire()
        if is_fit and not self._closed_because and type(self._stream) is PlainStream and self._carrier is None:
            return self._stream.fileno()
        self._owner.release()
        return -1

    def _check_open(self) -> None:
        if self._closed_because:
            raise LinkClosed(self._closed_because)

    def _end(self, reason: str) -> LinkClosed:
        """Close after an error; return what to raise. The reason that came first stays."""
        self._closed_because = self._closed_because or reason
        self._stream.shutdown()
        if self._carrier is not None:
            self._carrier.abort()
        self._stream.close()
        return LinkClosed(self._closed_because)

    def _send_tail(self, deadline_s: float) -> None:
        """Send what is left of a frame; raises LinkTimeout with the rest kept."""
        while self._tail:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise LinkTimeout(f"{len(self._tail)} bytes wait for {self.worker_id} to read")
            try:
                self._tail = self._tail[self._stream.send_wait(memoryview(self._tail), left_s) :]
            except OSError as error:
                raise self._end(f"the worker's connection broke: {error}") from error

    def _drain(self) -> None:
        """Read the replies that are here, for the late ones give back credits."""
        now_s = time.monotonic()
        self._stream.set_wait(0.0)
        try:
            while not self._free and is_readable(self._stream):
                self._read_frame(now_s)
        except LinkTimeout:
            pass  # the frame goes on with the next read

    def _read_frame(self, deadline_s: float) -> None:
        """Read to the end of one frame. Where the time is up first, the next call goes on from there."""
        try:
            if self._header is None:
                self._fill(self._head_view, deadline_s)
                self._open_body()
            while self._left:
                self._fill(self._target, deadline_s)
                self._left -= len(self._target)
                self._target = self._scratch[: self._left]
            self._finish()
        except FrameError as error:
            raise self._end(f"{self.worker_id} sent a bad frame: {error}") from error

    def _fill(self, view: memoryview, deadline_s: float) -> None:
        """Read exactly `view`, counting on from `_got`."""
        num_bytes = len(view)
        while self._got < num_bytes:
            try:
                taken = self._recv_into(view[self._got :] if self._got else view)
            except BlockingIOError:
                taken = -1
            except OSError as error:
                raise self._end(f"the worker's connection broke: {error}") from error
            if taken == 0:
                raise self._end(f"{self.worker_id} closed the connection")
            if taken > 0:
                self._got += taken
                if self._got == num_bytes:
                    break
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 and taken < 0:
                raise LinkTimeout(f"no reply from {self.worker_id} within the deadline")
            self._stream.set_wait(left_s)
        self._got = 0

    def _open_body(self) -> None:
        """Look at a whole header; say where its body goes, or refuse it."""
        self.last_heard_s = time.monotonic()
        reply = header.read_reply(self._head, self.shape)
        if reply is None:
            common = header.read_common(self._head)
            if common.kind not in (Kind.PROGRESS, Kind.GOODBYE) or common.body_bytes > MAX_TEXT_BYTES:
                raise FrameError(f"a worker does not send {common.kind.name} of {common.body_bytes} bytes")
            self._target = self._text[: common.body_bytes]
            self._header, self._left = common, common.body_bytes
            return
        credit = self._in_flight.get(reply.seq)
        if credit is None or credit.reply is not None:
            raise FrameError(f"a reply to seq {reply.seq}, which waits for none")
        if reply.status == Status.OK and reply.num_rows != credit.num_rows:
            raise FrameError(f"{reply.num_rows} rows for the {credit.num_rows} of seq {reply.seq}")
        if reply.num_misses > credit.num_groups:
            raise FrameError(f"{reply.num_misses} misses of the {credit.num_groups} experts of seq {reply.seq}")
        if credit.is_abandoned:
            self._target = self._scratch[: reply.body_bytes]
        else:
            memory = credit.view if reply.status == Status.OK else self._text
            self._target = memory[: reply.body_bytes]
        self._header, self._left = reply, reply.body_bytes

    def _land(self, landing: Landing) -> None:
        """Wait for rows whose header is here: they are on their way, so this is short, or the link is broken."""
        limit_s = time.monotonic() + _ROWS_WITHIN_S
        try:
            while not landing.is_complete():
                self._check_open()
                if time.monotonic() > limit_s:
                    raise self._end(f"rows that {self.worker_id} announced did not come within {_ROWS_WITHIN_S:.0f} s")
        except OSError as error:
            raise self._end(f"the rows of {self.worker_id} did not come: {error}") from error
        self._check_open()  # an abort completes what it ends

    def _finish(self) -> None:
        """Act on a frame that is whole."""
        head, self._header = self._header, None
        assert head is not None
        stats = self.stats
        stats.bytes_back += HEADER_BYTES + head.body_bytes
        if isinstance(head, header.Common):
            if head.kind == Kind.GOODBYE:
                reason = str(self._text[: head.body_bytes], "utf-8", "replace")
                raise self._end(f"{self.worker_id} ended the link: {reason}")
            return
        credit = self._in_flight[head.seq]
        is_ok = head.status == Status.OK
        self.no_hints[0] = bool(head.flags & header.NO_HINTS)
        if is_ok:
            stats.rows_back += head.num_rows
            if self._carrier is not None:
                stats.bytes_back += head.num_rows * self.shape.reply_row_bytes
                self._land(self._carrier.receive(credit.first(head.num_rows)))
        if credit.is_abandoned:
            stats.late_replies += 1
            del self._in_flight[head.seq]
            self._free.append(credit)
            return
        credit.reply = Reply(
            seq=head.seq,
            status=head.status,
            y=credit.first(head.num_rows) if is_ok else None,
            compute_us=head.compute_us,
            wait_us=head.wait_us,
            missed=credit.missed(head) if head.num_misses else NO_EXPERTS,
            message="" if is_ok else str(self._text[: head.body_bytes], "utf-8", "replace"),
        )
