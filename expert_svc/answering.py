"""A lone router's plain dispatches, read, computed and answered by one C call that goes on until anything else happens.

Owns when that may be: where nothing is ever evicted and one link is all there is. What the call does not know (hints,
traces, other routers, experts that are not there yet, a frame that is not whole) it leaves unread for the port's poll.
A batch in the interpreter costs a quarter of a millisecond, on caches that the weights have just emptied.
"""

import time
from typing import TYPE_CHECKING

from collegium.link.frame import DTYPE_CODES, MAGIC, VERSION
from collegium.link.port_link import PortLink
from collegium.link.tcp_port import TcpPort
from collegium.model.architectures import ExpertForm
from collegium.model.native.answer import Answer, Outcome
from expert_svc.buffer import ExpertBuffer

if TYPE_CHECKING:
    from expert_svc.compute import Counters

_CALL_S = 0.1  # counters are as old as that at most


class Answering:
    """Owned by the worker's computing thread."""

    def __init__(self, port: TcpPort, buffer: ExpertBuffer, form: ExpertForm, *, num_threads: int):
        """Serve `port` from `buffer`."""
        self._port, self._buffer, self._form, self._num_threads = port, buffer, form, num_threads
        self._link: PortLink | None = None
        self._answer: Answer | None = None

    def run(self, counters: "Counters") -> bool:
        """Answer dispatches for a while; False where there is, or may be, something for a poll of the port."""
        if not self._buffer.lend():
            return False
        try:
            link = self._port.lend()
            if link is None:
                return False
            try:
                if link is not self._link:
                    self._link, self._answer = link, self._answer_for(link)
                if self._answer is None:
                    return False
                return self._run(link, self._answer, counters)
            finally:
                self._port.take_back(link)
        finally:
            self._buffer.take_back()

    def _answer_for(self, link: PortLink) -> Answer | None:
        residents, shape = self._buffer.residents, link.shape
        layout = residents.layout
        if layout is None or shape.dtype != layout.dtype or shape.reply_dtype != layout.dtype:
            return None
        if shape.d_model != layout.d_model:
            return None
        return Answer(
            residents.table,
            layout,
            self._form,
            max_rows=shape.max_rows,
            max_pairs=shape.max_pairs,
            max_groups=shape.max_groups,
            num_threads=self._num_threads,
            frames=(MAGIC, VERSION, DTYPE_CODES[layout.dtype]),
        )

    def _run(self, link: PortLink, answer: Answer, counters: "Counters") -> bool:
        call = answer.call
        call.fd, call.epoll_fd = link.fd, self._port.epoll_fd
        call.offset_us = link.clock_offset_us
        call.until_ns = time.monotonic_ns() + int(_CALL_S * 1e9)
        outcome = answer.run()
        if call.batches:
            counters.num_batches += call.batches
            counters.num_dispatches += call.batches
            counters.num_rows += call.rows
            counters.num_pairs += call.pairs
            counters.num_expert_calls += call.groups
            counters.compute_us += call.compute_ns // 1000
            counters.wait_us += call.wait_ns // 1000
            self._buffer.totals.hits += call.groups
            link.adopt(
                num_dispatches=call.batches,
                num_rows=call.rows,
                num_pairs=call.pairs,
                bytes_out=call.bytes_out,
                bytes_back=call.bytes_back,
                heard=(call.least_sent_us, call.least_received_us),
                rest=answer.rest() if outcome is Outcome.UNSENT_REST else b"",
            )
        if outcome is Outcome.USELESS:
            link.end_reason = link.end_reason or "the router's connection broke within a frame"
        return outcome is Outcome.IDLE
