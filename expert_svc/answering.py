"""Routers' plain dispatches, read, joined, computed and answered by one C call that goes on until anything else comes.

Owns when that may be: where weights are in host memory, and every link is a plain socket that is amid nothing. What
the call does not know (traces, experts that are not there and hints of them, half a frame) it leaves unread for the
port's poll, and the buffer is told afterwards of what it has computed. A batch in the interpreter costs a quarter of
a millisecond, on caches that the weights have just emptied.
"""

import time
from typing import TYPE_CHECKING

from collegium.link.frame import DTYPE_CODES, MAGIC, VERSION
from collegium.link.port_link import PortLink
from collegium.link.tcp_port import TcpPort
from collegium.model.architectures import ExpertForm
from collegium.model.native.answer import Answer, LinkState, Outcome
from expert_svc.buffer import ExpertBuffer
from expert_svc.join_wait import JoinWait
from expert_svc.prefetch_trial import PrefetchTrial

if TYPE_CHECKING:
    from expert_svc.compute import Counters

_CALL_S = 0.1  # counters, and the choice whether rows wait for company, are as old as that at most
_MOST_LINKS = 16


class Answering:
    """Owned by the worker's computing thread."""

    def __init__(
        self,
        port: TcpPort,
        buffer: ExpertBuffer,
        form: ExpertForm,
        *,
        num_threads: int,
        join_wait: JoinWait | None = None,
        trial: PrefetchTrial | None = None,
    ):
        """Serve `port` from `buffer`. `join_wait` hears of every dispatch once there are several routers, `trial` of
        every batch while experts may have to be loaded.
        """
        self._port, self._buffer, self._form, self._num_threads = port, buffer, form, num_threads
        self._join_wait, self._trial = join_wait, trial
        self._links: list[PortLink] = []
        self._answer: Answer | None = None

    def run(self, counters: "Counters") -> bool:
        """Answer dispatches for a while; False where there is, or may be, something for a poll of the port."""
        if not self._buffer.lend():
            return False
        try:
            links = self._port.lend()
            if not links:
                return False
            try:
                if self._answer is None or links != self._links:  # none: no expert may have been there yet
                    self._links, self._answer = links, self._answer_for(links)
                return self._answer is not None and self._run(links, self._answer, counters)
            finally:
                self._port.take_back(links)
        finally:
            self._buffer.take_back()

    def _answer_for(self, links: list[PortLink]) -> Answer | None:
        residents, shapes = self._buffer.residents, [link.shape for link in links]
        layout = residents.layout
        if layout is None or len(links) > _MOST_LINKS:
            return None
        if {(s.dtype, s.reply_dtype, s.d_model) for s in shapes} != {(layout.dtype, layout.dtype, layout.d_model)}:
            return None
        return Answer(
            residents.table,
            layout,
            self._form,
            num_links=len(links),
            max_rows=min(shape.max_rows for shape in shapes),
            max_pairs=min(shape.max_pairs for shape in shapes),
            max_groups=min(shape.max_groups for shape in shapes),
            num_threads=self._num_threads,
            frames=(MAGIC, VERSION, DTYPE_CODES[layout.dtype]),
            notes_visits=not self._buffer.is_roomy,
        )

    def _run(self, links: list[PortLink], answer: Answer, counters: "Counters") -> bool:
        call, join_wait = answer.call, self._join_wait if len(links) > 1 else None
        call.epoll_fd = self._port.epoll_fd
        for link, lent in zip(links, answer.links, strict=True):
            lent.fd, lent.offset_us = link.fd, link.clock_offset_us
            if join_wait is not None:
                lent.last_layer, lent.last_ns, lent.layer_ns = join_wait.met(link.router_id)
        outcome = answer.run(
            until_ns=time.monotonic_ns() + int(_CALL_S * 1e9),
            is_logged=join_wait is not None,
            is_waiting=join_wait is not None and join_wait.is_on,
        )
        for link, lent in zip(links, answer.links, strict=True):
            if lent.dispatches or lent.hints:
                link.adopt(
                    num_dispatches=lent.dispatches,
                    num_hints=lent.hints,
                    num_rows=lent.total_rows,
                    num_pairs=lent.total_pairs,
                    bytes_out=lent.bytes_out,
                    bytes_back=lent.bytes_back,
                    heard=(lent.least_sent_us, lent.least_received_us),
                    rest=lent.rest(answer.row_bytes) if lent.state == LinkState.OWES else b"",
                )
            if lent.state == LinkState.BROKE:
                link.end_reason = link.end_reason or "the router's connection broke within a frame"
            counters.num_dispatches += lent.dispatches
            counters.num_native_answers += lent.dispatches
            counters.num_rows += lent.total_rows
            counters.num_pairs += lent.total_pairs
        counters.num_batches += call.batches
        counters.num_joined_batches += call.joined_batches
        counters.num_joined_dispatches += call.joined_dispatches
        counters.num_expert_calls += call.groups
        counters.compute_us += call.compute_ns // 1000
        counters.wait_us += call.wait_ns // 1000
        counters.join_wait_us += call.join_wait_ns // 1000
        self._buffer.totals.hits += call.groups
        if call.num_visits:
            visits = answer.visits()
            self._buffer.visited(visits)
            if self._trial is not None:
                for visit in visits:
                    self._trial.note(visit.began_ns * 1e-9, visit.layer, visit.num_decode_rows)
                self._buffer.is_prefetching = self._trial.is_on
        if join_wait is not None:
            for idx, layer, num_decode_rows, received_ns in answer.log[: call.num_log].tolist():
                join_wait.note(links[idx].router_id, layer, num_decode_rows, received_ns * 1e-9)
        return outcome is Outcome.IDLE
