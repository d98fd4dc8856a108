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
from collegium.link.frame import DTYPE_CODES, MAGIC, VERSION
from collegium.link.tcp import SocketLink
from collegium.model import native
from collegium.model.dispatch import WorkerShare, plan_dispatch, shares_of
from collegium.model.native.exchange import MAX_PAIRS, Exchange, State
from collegium.model.native.step import DecodeStep
from router_svc.load_counts import LoadCounts

# Of all rows of a call: more than a socket takes at once would go the long way in the middle.
_MOST_BYTES = 96 * 1024


@dataclass(slots=True)
class Disturbed:
    """What a call left: shares that were answered, those whose answers are to come (with their numbers), those to be
    sent, and those whose link was lost (with why).
    """

    done: list[tuple[WorkerShare, Tensor]] = field(default_factory=list)
    sent: list[tuple[WorkerShare, int]] = field(default_factory=list)
    unsent: list[WorkerShare] = field(default_factory=list)
    lost: list[tuple[WorkerShare, Exception]] = field(default_factory=list)


class WholeExchange:
    """Exchanges with a fixed set of workers. Belongs to the engine's thread, but for `fold`."""

    def __init__(self, links: Sequence[SocketLink], *, num_experts: int, top_k: int, loads: LoadCounts):
        """Use these links, worker w's at index w; choices are counted in `loads`."""
        shape = links[0].shape
        self._links, self._dtype, self._d_model = list(links), shape.dtype, shape.d_model
        self._exchange = Exchange(
            num_workers=len(links),
            num_experts=num_experts,
            top_k=top_k,
            d_model=shape.d_model,
            dtype=shape.dtype,
            frames=(MAGIC, VERSION, DTYPE_CODES[shape.dtype]),
        )
        self._top_k, self._loads = top_k, loads
        self._max_rows = min(
            min(link.shape.max_rows for link in links), MAX_PAIRS // top_k, _MOST_BYTES // shape.row_bytes
        )
        self._counted = (loads.decode, loads.prefill, loads.activations)
        self._counted_at = tuple(counts.ctypes.data for counts in self._counted)
        self._layer_bytes = 8 * num_experts
        self._folded = np.zeros((len(links), 6), np.int64)
        self._row_bytes = shape.row_bytes
        self.disturbed = Disturbed()

    def takes_step(self, step: DecodeStep) -> bool:
        """Say whether all layers of a step can go this way."""
        fits = step.num_rows <= self._max_rows and step.top_k == self._top_k
        return fits and step.work.x.dtype is self._dtype and step.work.x.shape[1] == self._d_model

    def run_step(
        self, step: DecodeStep, worker_of: NDArray[np.int64], *, seq: int, timeout_s: float, epoch: int, number: int
    ) -> bool | None:
        """Compute a step's layers from step.layer on; False where one was disturbed, and `disturbed` says how far it
        came; its choices are counted. None where nothing was done, since a link is in use.

        worker_of: [L] addresses of each layer's [E] workers. Worker w's dispatch of the nth layer of this call gets the
        number seq + n * W + w.
        """
        exchange = self._exchange
        call = exchange.call
        exchange.fit(step.num_rows)
        with self._lent() as is_lent:
            if not is_lent:
                return None
            call.seq, call.epoch, call.step = seq, epoch, number & 0xFFFFFFFF
            if step.run(exchange, worker_of, self._counted, timeout_s):
                return True
            self.disturbed = self._look(int(call.seq))
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

    def run(
        self,
        layer: int,
        x: Tensor,
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        *,
        worker_of: NDArray[np.int64],
        workers: NDArray[np.int64] | None,
        is_counted: bool,
        num_decode_rows: int,
        seq: int,
        deadline_s: float,
        epoch: int,
        step: int,
    ) -> Tensor | None:
        """Have the experts' sums computed: [T, D]; None where that was disturbed, and `disturbed` says how far it came.

        Worker w's dispatch gets the number seq + w. Choices are counted unless they have been.
        """
        exchange = self._exchange
        call, num_tokens = exchange.call, len(ids)
        exchange.fit(num_tokens)
        with self._lent() as is_lent:
            if not is_lent:
                shares = plan_dispatch(ids, weights, worker_of, workers).shares
                if not is_counted:
                    self._loads.note(layer, ids, num_decode_rows)
                self.disturbed = Disturbed(unsent=list(shares))
                return None
            out = torch.empty_like(x)
            call.T, call.num_decode = num_tokens, num_decode_rows
            call.ids, call.weights, call.worker_of = ids.ctypes.data, weights.ctypes.data, worker_of.ctypes.data
            call.x, call.out = x.data_ptr(), out.data_ptr()
            call.workers = None if workers is None else workers.ctypes.data
            if is_counted:
                call.decode = None
            else:
                offset = layer * self._layer_bytes
                call.decode, call.prefill, call.activations = (at + offset for at in self._counted_at)
            call.seq, call.deadline_us, call.epoch = seq, int(deadline_s * 1e6), epoch
            call.step, call.layer = step & 0xFFFFFFFF, layer
            if exchange.run():
                return out
            self.disturbed = self._look(seq)
            return None

    @property
    def waited_s(self) -> tuple[float, float]:
        """Of the last call: time that rows were away, and of that the time that went by waiting."""
        return self._exchange.call.away_ns * 1e-9, self._exchange.call.blocked_ns * 1e-9

    def fold(self) -> int:
        """Add what was counted since the last time to the links' own counts; returns the bytes that were needed."""
        totals = self._exchange.totals.copy()
        grown = (totals - self._folded).tolist()
        self._folded = totals
        needed = 0
        for link, (dispatches, rows, pairs, bytes_out, rows_back, bytes_back) in zip(self._links, grown, strict=True):
            stats = link.stats
            stats.dispatches += dispatches
            stats.rows_out += rows
            stats.pairs_out += pairs
            stats.bytes_out += bytes_out
            stats.bytes_back += bytes_back
            stats.rows_back += rows_back
            needed += 2 * rows * self._row_bytes + 8 * pairs
        return needed

    def _look(self, seq: int) -> Disturbed:
        """Sort the shares of a call by how far they came; the links are still lent."""
        found = Disturbed()
        planned = self._exchange.planned
        assert planned is not None
        for share in shares_of(planned):
            link, number = self._links[share.worker], (seq + share.worker) & 0xFFFFFFFF
            match State(int(self._exchange.states[share.worker])):
                case State.DONE:
                    found.done.append((share, self._exchange.rows_of(share.worker).clone()))
                case State.SENT:
                    link.adopt(number, share.num_rows, len(share.experts))
                    found.sent.append((share, number))
                case State.UNSENT:
                    found.unsent.append(share)
                case State.BROKEN:
                    found.lost.append((share, link.spoil("half a frame was sent or read")))
        return found


def whole_exchange(
    live: Sequence[tuple[str, RouterLink]], *, num_experts: int, top_k: int, loads: LoadCounts
) -> WholeExchange | None:
    """Make an exchange over live links; None where they are of another kind, or the library is not there."""
    links = [link for _, link in live if isinstance(link, SocketLink)]
    if not links or len(links) < len(live) or native.library() is None:
        return None
    shapes = {(link.shape.dtype, link.shape.reply_dtype, link.shape.d_model) for link in links}
    dtype, reply_dtype, _ = next(iter(shapes))
    if len(shapes) > 1 or dtype is not reply_dtype or dtype not in native.DTYPES:
        return None
    return WholeExchange(links, num_experts=num_experts, top_k=top_k, loads=loads)
