"""A layer's exchange with all workers in one call, and a whole step's layers, where nothing disturbs it.

Owns when that can be, the loans of the links, and what a call that was disturbed leaves behind. Everything else goes
the long way (expert_calls.py), of which this is a faster copy: a decode step of few rows spent a third of its time
in the interpreter. T rows, K top-k, D model, W workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.link.base import RouterLink
from collegium.link.frame import DTYPE_CODES
from collegium.link.tcp import SocketLink
from collegium.model import native
from collegium.model.dispatch import WorkerShare, plan_dispatch, shares_of
from collegium.model.native.exchange import MAX_PAIRS, Exchange, State
from collegium.model.native.step import CopyTable, DecodeStep, Foretelling
from router_svc.load_counts import LoadCounts
from router_svc.micro_batches import MAX_MICRO_BATCHES
from router_svc.traced_layers import TracedLayers


@dataclass(slots=True)
class Disturbed:
    """What a call left: shares that were answered, those whose answers are to come (with worker, link and number),
    those to be sent, those whose link was lost (with why), and those whose rows came back as no numbers.
    """

    done: list[tuple[WorkerShare, Tensor]] = field(default_factory=list)
    sent: list[tuple[WorkerShare, str, SocketLink, int]] = field(default_factory=list)
    unsent: list[WorkerShare] = field(default_factory=list)
    lost: list[tuple[WorkerShare, str, SocketLink, Exception]] = field(default_factory=list)
    suspect: list[WorkerShare] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """A layer's rows x [T, D], what they chose, ids and weights [T, K], and where that is computed.

    worker_of [E]: each expert's worker; workers [T * K]: each choice's, where experts have replicas. Worker w's
    dispatch gets the number seq + w. is_counted: whether the choices have been counted.
    """

    layer: int
    x: Tensor
    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    worker_of: NDArray[np.int64]
    workers: NDArray[np.int64] | None
    is_counted: bool
    num_decode_rows: int
    seq: int
    deadline_s: float
    patience_s: float  # what a worker that says it is slow has from then on
    epoch: int
    step: int
    traceparent: str = ""


class WholeExchange:
    """Exchanges with a fixed set of workers. Belongs to the engine's thread, but for `fold`."""

    def __init__(self, live: Sequence[tuple[str, SocketLink]], *, num_experts: int, top_k: int, loads: LoadCounts):
        """Use these links, worker w's at index w with its id; choices are counted in `loads`."""
        self.live, links = list(live), [link for _, link in live]
        shape = links[0].shape
        self._links, self._dtype, self._d_model = list(links), shape.dtype, shape.d_model
        self._parts = [  # one for each micro-batch, whose rows are away at the same time
            Exchange(
                no_hints=[link.no_hints for link in links],
                num_experts=num_experts,
                top_k=top_k,
                d_model=shape.d_model,
                dtype=shape.dtype,
                dtype_code=DTYPE_CODES[shape.dtype],
            )
            for _ in range(MAX_MICRO_BATCHES)
        ]
        self._exchange = self._parts[0]
        self._top_k, self._loads = top_k, loads
        self._max_rows = min(min(link.shape.max_rows for link in links), MAX_PAIRS // top_k)
        self._counted = (loads.decode, loads.prefill, loads.activations)
        self._counted_at = tuple(counts.ctypes.data for counts in self._counted)
        self._layer_bytes = 8 * num_experts
        self._folded = np.zeros((len(links), 8), np.int64)
        self.foretelling: Foretelling | None = None  # what its steps tell workers, the caller's to set once
        self._row_bytes = shape.row_bytes
        self._away: dict[int, tuple[Tensor, int]] = {}  # by part: its sums to be, and the number that it began with
        self.disturbed = Disturbed()

    def takes_step(self, step: DecodeStep) -> bool:
        """Say whether all layers of a step can go this way."""
        fits = step.num_rows <= self._max_rows and step.top_k == self._top_k
        return fits and step.work.x.dtype is self._dtype and step.work.x.shape[1] == self._d_model

    def run_step(
        self,
        step: DecodeStep,
        worker_of: NDArray[np.int64],
        *,
        seq: int,
        timeout_s: float,
        epoch: int,
        number: int,
        copies: CopyTable,
        activation_rows: float,
        foretelling: Foretelling | None,
        traced: TracedLayers | None,
    ) -> bool | None:
        """Compute a step's layers from step.layer on; False where one was disturbed, and `disturbed` says how far it
        came; its choices are counted. None where nothing was done, since a link is in use.

        worker_of: [L] addresses of each layer's [E] workers; copies: experts with several. Worker w's dispatch of the
        nth layer of this call gets the number seq + n * W + w.
        """
        exchange = self._exchange
        call = exchange.call
        exchange.fit(step.num_rows)
        with self._lent() as is_lent:
            if not is_lent:
                return None
            call.seq, call.epoch, call.step = seq, epoch, number & 0xFFFFFFFF
            call.patience_us, call.text, call.text_bytes = int(timeout_s * 1e6), None, 0
            told = None if traced is None else (traced.texts, traced.stamps)
            try:
                done = step.run(
                    exchange, worker_of, self._counted, timeout_s, copies, activation_rows, foretelling, told
                )
            except MemoryError:
                for (_, link), state in zip(self.live, exchange.states.tolist(), strict=True):
                    if state in (State.SENT, State.BROKEN):
                        link.spoil("a step was given up for lack of memory before its rows were back")
                raise
            if done:
                return True
            self.disturbed = self._look(exchange, int(call.seq))
            return False

    @contextlib.contextmanager
    def _lent(self) -> Iterator[bool]:
        """Borrow every link; False where one cannot be lent, and then none is."""
        lent = 0
        try:
            for at, link in enumerate(self._links):
                fd = link.lend()
                if fd < 0:
                    break
                self._exchange.fds[at] = fd
                lent += 1
            yield lent == len(self._links)
        finally:
            for link in self._links[:lent]:
                link.take_back()

    def takes(self, x: Tensor, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> bool:
        """Say whether a layer's rows can go this way."""
        return (
            len(ids) <= self._max_rows
            and ids.shape[1] == self._top_k
            and x.dtype is self._dtype
            and x.is_contiguous()
            and ids.dtype == np.int64
            and ids.flags.c_contiguous
            and weights.flags.c_contiguous
        )

    def run(self, asked: LayerCall) -> Tensor | None:
        """Have the experts' sums computed: [T, D]; None where that was disturbed, and `disturbed` says how far it came.

        Choices are counted unless they have been.
        """
        exchange = self._exchange
        with self._lent() as is_lent:
            if not is_lent:
                self.disturbed = self._not_begun(asked)
                return None
            out = self._tell(exchange, asked)
            if exchange.run():
                return out
            self.disturbed = self._look(exchange, asked.seq)
            return None

    def send(self, part: int, asked: LayerCall) -> bool:
        """Send a layer's dispatches for one part of a step, and leave the links to others until `receive`.

        False where that was disturbed, and `disturbed` says how far it came. Choices are counted unless they have been.
        """
        exchange, lent = self._parts[part], 0
        try:
            for at, link in enumerate(self._links):
                exchange.fds[at] = link.lend_to_send()
                if exchange.fds[at] < 0:
                    self.disturbed = self._not_begun(asked)
                    return False
                lent += 1
            out = self._tell(exchange, asked)
            if not exchange.send():
                self.disturbed = self._look(exchange, asked.seq)
                return False
            self._away[part] = out, asked.seq
            for worker, num_rows, num_groups in exchange.sent:
                self._links[worker].adopt((asked.seq + worker) & 0xFFFFFFFF, num_rows, num_groups)
            return True
        finally:
            for link in self._links[:lent]:
                link.take_back()

    def receive(self, part: int) -> Tensor | None:
        """Receive what `send` has sent: sums [T, D]; None where that was disturbed, as `run`."""
        exchange = self._parts[part]
        out, seq = self._away.pop(part)
        lent: list[tuple[SocketLink, int]] = []
        try:
            for worker, _, _ in exchange.sent:
                link, number = self._links[worker], (seq + worker) & 0xFFFFFFFF
                exchange.fds[worker] = link.lend_to_receive(number)
                if exchange.fds[worker] >= 0:
                    lent.append((link, number))
            if exchange.receive():
                for link, number in lent:
                    link.answered(number)
                return out
            self.disturbed = self._look(exchange, seq, is_adopted=True)
            return None
        finally:
            for link, _ in lent:
                link.take_back()

    @property
    def is_away(self) -> bool:
        """Whether something was sent that has not been received."""
        return bool(self._away)

    def _not_begun(self, asked: LayerCall) -> Disturbed:
        shares = plan_dispatch(asked.ids, asked.weights, asked.worker_of, asked.workers).shares
        if not asked.is_counted:
            self._loads.note(asked.layer, asked.ids, asked.num_decode_rows)
        return Disturbed(unsent=list(shares))

    def _tell(self, exchange: Exchange, asked: LayerCall) -> Tensor:
        """Write a layer's call into an exchange; returns where its sums will be."""
        call, num_tokens = exchange.call, len(asked.ids)
        exchange.fit(num_tokens)
        out = torch.empty_like(asked.x)
        call.T, call.num_decode = num_tokens, asked.num_decode_rows
        call.ids, call.weights = asked.ids.ctypes.data, asked.weights.ctypes.data
        call.worker_of = asked.worker_of.ctypes.data
        call.x, call.out = asked.x.data_ptr(), out.data_ptr()
        call.workers = None if asked.workers is None else asked.workers.ctypes.data
        if asked.is_counted:
            call.decode = None
        else:
            offset = asked.layer * self._layer_bytes
            call.decode, call.prefill, call.activations = (at + offset for at in self._counted_at)
        call.seq, call.deadline_us, call.epoch = asked.seq, int(asked.deadline_s * 1e6), asked.epoch
        call.step, call.layer = asked.step & 0xFFFFFFFF, asked.layer
        call.patience_us = int(asked.patience_s * 1e6)
        call.text = asked.traceparent.encode()
        call.text_bytes = len(asked.traceparent)
        return out

    @property
    def waited_s(self) -> tuple[float, float]:
        """Of the last call: time that rows were away, and of that the time that went by waiting."""
        return self._exchange.call.away_ns * 1e-9, self._exchange.call.blocked_ns * 1e-9

    def fold(self) -> int:
        """Add what was counted since the last time to the links' own counts; returns the bytes that were needed."""
        totals = np.sum([exchange.totals for exchange in self._parts], axis=0)
        if self.foretelling is not None:
            totals = np.hstack([totals, self.foretelling.told])
        else:
            totals = np.hstack([totals, np.zeros((len(totals), 2), np.int64)])
        grown = (totals - self._folded).tolist()
        self._folded = totals
        needed = 0
        for link, row in zip(self._links, grown, strict=True):
            dispatches, rows, pairs, bytes_out, rows_back, bytes_back, hints, hint_bytes = row
            stats = link.stats
            stats.hints += hints
            stats.bytes_out += hint_bytes
            stats.dispatches += dispatches
            stats.rows_out += rows
            stats.pairs_out += pairs
            stats.bytes_out += bytes_out
            stats.bytes_back += bytes_back
            stats.rows_back += rows_back
            needed += 2 * rows * self._row_bytes + 8 * pairs
        return needed

    def _look(self, exchange: Exchange, seq: int, *, is_adopted: bool = False) -> Disturbed:
        """Sort the shares of a call by how far they came; the links are still lent.

        is_adopted: their links know already that they were sent.
        """
        found = Disturbed()
        assert exchange.planned is not None
        for share in shares_of(exchange.planned):
            worker_id, link = self.live[share.worker]
            number = (seq + share.worker) & 0xFFFFFFFF
            match State(int(exchange.states[share.worker])):
                case State.DONE:
                    if is_adopted:
                        link.answered(number)
                    found.done.append((share, exchange.rows_of(share.worker).clone()))
                case State.SENT:
                    if not is_adopted:
                        link.adopt(number, share.num_rows, len(share.experts))
                    found.sent.append((share, worker_id, link, number))
                case State.SUSPECT:
                    if is_adopted:
                        link.answered(number)
                    found.suspect.append(share)
                case State.UNSENT:
                    found.unsent.append(share)
                case State.BROKEN:
                    found.lost.append((share, worker_id, link, link.spoil("half a frame was sent or read")))
        return found


def whole_exchange(
    live: Sequence[tuple[str, RouterLink]], *, num_experts: int, top_k: int, loads: LoadCounts
) -> WholeExchange | None:
    """Make an exchange over live links; None where they are of another kind, or the library is not there."""
    plain = [(worker_id, link) for worker_id, link in live if isinstance(link, SocketLink)]
    if not plain or len(plain) < len(live) or native.library() is None:
        return None
    shapes = {(link.shape.dtype, link.shape.reply_dtype, link.shape.d_model) for _, link in plain}
    dtype, reply_dtype, _ = next(iter(shapes))
    if len(shapes) > 1 or dtype is not reply_dtype or dtype not in native.DTYPES:
        return None
    return WholeExchange(plain, num_experts=num_experts, top_k=top_k, loads=loads)
