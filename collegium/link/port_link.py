"""The worker's end of one link over a socket: reads dispatches into memory made beforehand, queues what cannot go out.

Never blocks. Owned by the thread that polls its TcpPort. Knows no other link and no selector.
R rows, P pairs, G groups, D model width, as in frame.py.
"""

from collections import deque
from typing import Final

import numpy as np
import torch

from collegium.link import header
from collegium.link.base import ExpectedLink, LinkStats
from collegium.link.clock import ClockOffset
from collegium.link.frame import (
    HEADER_BYTES,
    MAX_TEXT_BYTES,
    Dispatch,
    FrameError,
    Hint,
    Kind,
    LinkClosed,
    LinkShape,
    Reply,
    Status,
)
from collegium.link.hint import HintHeader, is_hint, read_hint, read_hint_body
from collegium.link.memory import buffer_of, byte_view, round_up
from collegium.link.rows_apart import Landing, RowCarrier
from collegium.link.stream import Buffers, PlainStream, Stream, rest_of

_WORD: Final = 4


class _Slot:
    """Where the body of one dispatch lies until it is answered.

    One piece of memory: groups and pairs end where the rows begin, so that the rows are aligned and a body of any
    sizes is read with one call. [ .. experts counts pair_rows pair_weights | x | traceparent ]
    """

    __slots__ = ("f32", "num_groups", "num_rows", "seq", "start_bytes", "u16", "u32", "view", "x", "x_rows")

    def __init__(self, shape: LinkShape, device: torch.device) -> None:
        self.start_bytes = round_up(_WORD * shape.max_groups + 2 * _WORD * shape.max_pairs)
        rows_bytes = shape.max_rows * shape.framed_row_bytes
        memory = torch.empty(self.start_bytes + rows_bytes + MAX_TEXT_BYTES, dtype=torch.uint8)
        self.view = byte_view(memory)
        if shape.are_rows_apart:
            self.x = torch.empty((shape.max_rows, shape.d_model), dtype=shape.dtype, device=device)
        else:
            self.x = memory[self.start_bytes : self.start_bytes + rows_bytes].view(shape.dtype).view(-1, shape.d_model)
        counted = memory[: self.start_bytes]
        self.u16 = counted.view(torch.uint16).numpy()
        self.u32 = counted.view(torch.uint32).numpy()
        self.f32 = counted.view(torch.float32).numpy()
        self.x_rows = self.x
        self.seq = 0
        self.num_rows = self.num_groups = 0

    def body(self, head: header.DispatchHeader) -> memoryview:
        """Return where the body that a header announces is to be read."""
        start = self.start_bytes - _WORD * head.num_groups - 2 * _WORD * head.num_pairs
        return self.view[start : start + head.body_bytes]

    def rows(self, num_rows: int) -> torch.Tensor:
        """Return the first rows; the view is kept, for a decode step sends as many as the one before."""
        if self.x_rows.shape[0] != num_rows:
            self.x_rows = self.x[:num_rows]  # [R, D]
        return self.x_rows

    def dispatch(self, head: header.DispatchHeader, deadline_s: float) -> Dispatch:
        """Return the dispatch whose body has been read, as views. Raises FrameError where its groups cannot be."""
        num_rows, num_pairs, num_groups = head.num_rows, head.num_pairs, head.num_groups
        pairs = self.start_bytes // _WORD  # in words; pairs and groups are counted back from the rows
        groups = self.start_bytes // 2 - 4 * num_pairs  # in half words
        counts = self.u16[groups - num_groups : groups]
        pair_rows = self.u32[pairs - 2 * num_pairs : pairs - num_pairs]
        experts = self.u16[groups - 2 * num_groups : groups - num_groups]
        header.check_counts(counts, pair_rows, num_rows)
        header.check_distinct(experts)
        text = b""
        if head.text_bytes:
            text = bytes(self.body(head)[-head.text_bytes :])
        return Dispatch(
            seq=head.seq,
            layer=head.layer,
            step=head.step,
            epoch=head.epoch,
            micro_batch=head.micro_batch,
            deadline_s=deadline_s,
            experts=experts,
            counts=counts,
            pair_rows=pair_rows,
            pair_weights=self.f32[pairs - num_pairs : pairs],
            x=self.rows(num_rows),
            num_prompt_rows=head.num_prompt_rows,
            traceparent=text.decode("ascii", "replace"),
        )


class PortLink:
    """One accepted link."""

    def __init__(
        self, stream: Stream, expected: ExpectedLink, hello_sent_us: int, carrier: RowCarrier | None = None
    ) -> None:
        """Take over a non-blocking stream that has said a good HELLO. Makes the memory of every credit.

        `carrier` is there where rows travel apart.
        """
        assert (carrier is not None) == expected.are_rows_apart
        self._carrier = carrier
        self._landing: Landing | None = None
        self.stream, self.fd = stream, stream.fileno()
        self.link_id, self.router_id = expected.link_id, expected.router_id
        self.shape = shape = expected.shape
        self.stats = LinkStats()
        self.end_reason = ""  # set where a write found the peer gone; the port ends the link at its next poll
        self._recv_into = stream.recv_into
        self._clock = ClockOffset(hello_sent_us, header.now_us())
        device = torch.device("cpu") if carrier is None else carrier.device
        self._free = [_Slot(shape, device) for _ in range(shape.num_credits)]  # last in, first out: the warm one
        self._in_flight: dict[int, _Slot] = {}
        self._head = bytearray(HEADER_BYTES)
        self._head_view = memoryview(self._head)
        self._reading: header.DispatchHeader | HintHeader | None = None
        self._slot = self._free[0]
        self._hinted = byte_view(torch.empty(_WORD * shape.max_groups, dtype=torch.uint8))
        self._target = self._head_view
        self._got = 0
        self._out = bytearray(HEADER_BYTES)
        self._outbox: deque[bytes] = deque()  # whole frames or the rest of one; at most a reply per credit and notices

    @property
    def has_queued(self) -> bool:
        """Whether something waits until the peer reads."""
        return bool(self._outbox)

    @property
    def has_hidden(self) -> bool:
        """Whether `read` is to be called again though the socket shows nothing: rows land, or TLS holds bytes."""
        return self._landing is not None or self.stream.has_buffered()

    @property
    def is_idle(self) -> bool:
        """Whether no frame is half read or half sent, no dispatch is unanswered, and all bytes are the socket's."""
        is_amid = self._reading is not None or self._got or self._in_flight or self._outbox or self.end_reason
        return not is_amid and self._carrier is None and type(self.stream) is PlainStream

    @property
    def clock_offset_us(self) -> int:
        """This host's clock minus the router's, as it is known."""
        return self._clock.to_local_us(0)

    def adopt(
        self,
        *,
        num_dispatches: int,
        num_hints: int,
        num_rows: int,
        num_pairs: int,
        bytes_out: int,
        bytes_back: int,
        heard: tuple[int, int],
        rest: bytes,
    ) -> None:
        """Take note of what a borrower of this link has read and answered.

        num_hints: of what is here already, which it passed over; heard: when the frame that travelled least was sent
        and received; rest: what is still to be sent of a reply.
        """
        stats = self.stats
        stats.dispatches += num_dispatches
        stats.rows_out += num_rows
        stats.rows_back += num_rows
        stats.pairs_out += num_pairs
        stats.bytes_out += bytes_out
        stats.bytes_back += bytes_back
        stats.hints += num_hints
        if num_dispatches:
            self._clock.heard(*heard)
        if rest:
            self._outbox.append(rest)

    def read(self) -> Dispatch | Hint | None:
        """Read what is here, to the end of one frame at most; return it where somebody should see it.

        Raises LinkClosed where the peer has gone, FrameError where a header cannot be followed, OSError.
        """
        if self._landing is None:
            try:
                if self._reading is None:
                    if not self._read_on():
                        return None
                    self._open_body()
                if not self._read_on():
                    return None
            except BlockingIOError:
                return None
            if self._carrier is not None and isinstance(self._reading, header.DispatchHeader):
                self._landing = self._carrier.receive(self._slot.rows(self._reading.num_rows))
        if self._landing is not None:
            if not self._landing.is_complete():
                return None
            self._landing = None
            self.stats.bytes_out += self._slot.x_rows.shape[0] * self.shape.row_bytes
        return self._finish()

    def _read_on(self) -> bool:
        """Read into the target; return whether it is full."""
        got = self._got
        taken = self._recv_into(self._target[got:] if got else self._target)
        if taken == 0:
            raise LinkClosed("the router closed the connection")
        self._got = got + taken
        return self._got == len(self._target)

    def _open_body(self) -> None:
        """Look at a whole header; say where its body goes, or refuse it."""
        self._got = 0
        if is_hint(self._head):
            self._reading = advice = read_hint(self._head, self.shape)
            self._target = self._hinted[: advice.body_bytes]
            return
        head = header.read_dispatch(self._head, self.shape)
        if not self._free:
            raise FrameError(f"more than the {self.shape.num_credits} dispatches that the link allows")
        if head.seq in self._in_flight:
            raise FrameError(f"seq {head.seq} is in flight already")
        self._slot = self._free.pop()
        self._reading = head
        self._target = self._slot.body(head)

    def _finish(self) -> Dispatch | Hint | None:
        """Take in a whole frame; answer by ourselves what nobody should compute."""
        head, slot, stats = self._reading, self._slot, self.stats
        assert head is not None
        self._reading, self._target, self._got = None, self._head_view, 0
        if isinstance(head, HintHeader):
            stats.hints += 1
            stats.bytes_out += HEADER_BYTES + head.body_bytes
            self._clock.heard(head.sent_us, header.now_us())
            return read_hint_body(head, self._hinted, self.shape)
        slot.seq, slot.num_rows, slot.num_groups = head.seq, head.num_rows, head.num_groups
        self._in_flight[head.seq] = slot
        stats.dispatches += 1
        stats.rows_out += head.num_rows
        stats.pairs_out += head.num_pairs
        stats.bytes_out += HEADER_BYTES + head.body_bytes
        now_us = header.now_us()
        self._clock.heard(head.sent_us, now_us)
        deadline_us = self._clock.to_local_us(head.deadline_us)
        try:
            dispatch = slot.dispatch(head, deadline_us / 1e6)
        except FrameError as error:
            self.reply(Reply(seq=head.seq, status=Status.BAD_FRAME, message=str(error)))
            return None
        if deadline_us <= now_us:
            stats.expired += 1
            late_ms = (now_us - deadline_us) // 1000
            self.reply(Reply(seq=head.seq, status=Status.EXPIRED, message=f"arrived {late_ms} ms past its deadline"))
            return None
        return dispatch

    def reply(self, reply: Reply) -> None:
        """Answer a dispatch; see WorkerPort.reply."""
        slot = self._in_flight[reply.seq]
        header.check_reply(reply, slot.num_rows, slot.num_groups, self.shape)
        if reply.y is not None and reply.status == Status.OK:
            body = buffer_of(reply.y) if self._carrier is None else b""
            num_rows, body_bytes = slot.num_rows, slot.num_rows * self.shape.framed_reply_row_bytes
            buffers: Buffers = (self._out, body)
            if reply.num_misses:
                buffers = (self._out, body, np.ascontiguousarray(reply.missed))
                body_bytes += reply.missed.nbytes
        else:
            body = header.clip(reply.message)
            num_rows, body_bytes = 0, len(body)
            buffers = (self._out, body)
        header.write_reply(self._out, reply, num_rows, body_bytes)
        del self._in_flight[reply.seq]
        self._free.append(slot)
        self.stats.rows_back += num_rows
        self.stats.bytes_back += HEADER_BYTES + body_bytes
        taken = 0 if self._outbox else self._send_now(buffers)
        if taken < HEADER_BYTES + body_bytes:
            self._outbox.append(rest_of(buffers, taken))
        if self._carrier is not None and reply.y is not None and num_rows:
            self.stats.bytes_back += num_rows * self.shape.reply_row_bytes
            try:
                self._carrier.send(reply.y)
            except OSError as error:
                self.end_reason = self.end_reason or f"the rows of seq {reply.seq} cannot be sent: {error}"

    def progress(self) -> None:
        """Send a progress frame, unless others wait already: the router then hears of us anyway."""
        if not self._outbox:
            self.stats.bytes_back += HEADER_BYTES
            self.post(header.plain(Kind.PROGRESS, 0))

    def say_goodbye(self, reason: str) -> None:
        """Tell the router why the link ends, where that can be told at once."""
        if not self._outbox:
            self._send_now((header.goodbye(reason),))

    def close(self) -> None:
        """Give up the connection and whatever hangs on it."""
        if self._carrier is not None:
            self._carrier.abort()
        self.stream.shutdown()
        self.stream.close()

    def flush(self) -> None:
        """Send what is queued, as far as the peer takes it."""
        while self._outbox:
            taken = self._send_now((self._outbox[0],))
            if taken < len(self._outbox[0]):
                self._outbox[0] = self._outbox[0][taken:]
                return
            self._outbox.popleft()

    def post(self, frame: bytes) -> None:
        """Send a small frame, or queue what is left of it."""
        taken = 0 if self._outbox else self._send_now((frame,))
        if taken < len(frame):
            self._outbox.append(frame[taken:])

    def _send_now(self, buffers: Buffers) -> int:
        """Send without blocking. A peer that is gone is noted, not raised: the caller may be computing for others."""
        try:
            return self.stream.send_now(buffers)
        except OSError as error:
            self.end_reason = self.end_reason or f"the router's connection broke: {error}"
            self._outbox.clear()
            return len(rest_of(buffers, 0))
