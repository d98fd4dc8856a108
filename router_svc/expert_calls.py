"""Have the experts of a layer computed: plan, send, receive, combine; and again elsewhere where a worker fails.

Owns the router's links while they are used. `compute` runs in the engine's thread alone; links and placements are
handed in from the control loop. Expert calls are pure, so a share whose worker is lost is simply planned anew over
those that live.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from collegium.link.base import LinkStats, RouterLink
from collegium.link.frame import Dispatch, FrameError, LinkError, LinkTimeout, Status
from collegium.model.dispatch import WorkerShare, combine, needed_bytes, plan_dispatch, replan, rows_for
from collegium.model.placement import NO_PLACEMENT, Placement
from router_svc.routing import route


class ExpertsUnavailableError(Exception):
    """No worker can be reached; the step may be computed again when one is back."""


class ExpertFailedError(Exception):
    """A worker answered that it cannot compute what was asked; asking again would not help."""


@dataclass(slots=True)
class CallTotals:
    """What all links of this router did since its start, closed ones included."""

    retries: int = 0
    needed_bytes: int = 0


class ExpertCalls:
    """The router's way to the experts."""

    def __init__(
        self, *, num_layers: int, num_experts: int, timeout_s: float, on_lost: Callable[[str, str], None] | None = None
    ):
        """`on_lost(worker_id, why)` is called from the engine's thread when a link is given up."""
        self._num_layers, self._num_experts, self._timeout_s = num_layers, num_experts, timeout_s
        self._on_lost = on_lost
        self._lock = threading.Lock()  # guards the three below: written by the control loop, read by the engine
        self._links: dict[str, RouterLink] = {}
        self._placement = NO_PLACEMENT
        self._version = 0
        self._routed_version = -1
        self._live: list[tuple[str, RouterLink]] = []
        self._table: list[NDArray[np.int64]] = []
        self._seq = 0
        self._closed = LinkStats()
        self.totals = CallTotals()
        self.step = 0
        self.traceparent = ""

    # --- control loop ---

    def add_link(self, worker_id: str, link: RouterLink) -> None:
        """Use a link from the next layer on. Thread-safe."""
        with self._lock:
            self._links[worker_id] = link
            self._version += 1

    def drop_link(self, worker_id: str) -> None:
        """Close a link and use it no more. Thread-safe."""
        with self._lock:
            link = self._links.pop(worker_id, None)
            self._version += 1
            if link is not None:
                self._closed.add(link.stats)
        if link is not None:
            link.close()

    def rename_link(self, old_id: str, new_id: str) -> None:
        """Go on with the link of a worker that has a new lease. Thread-safe."""
        with self._lock:
            if old_id in self._links:
                self._links[new_id] = self._links.pop(old_id)
                self._version += 1

    def set_placement(self, placement: Placement) -> None:
        """Use a placement from the next layer on; an older epoch is ignored. Thread-safe."""
        with self._lock:
            if placement.epoch > self._placement.epoch:
                self._placement = placement
                self._version += 1

    @property
    def epoch(self) -> int:
        """Epoch of the placement in use."""
        return self._placement.epoch

    @property
    def worker_ids(self) -> list[str]:
        """Workers with a link."""
        with self._lock:
            return sorted(self._links)

    def link_stats(self) -> dict[str, LinkStats]:
        """Totals by worker, and those of all closed links under "". Thread-safe."""
        with self._lock:
            stats = {"": replace(self._closed)}
            for worker_id, link in self._links.items():
                stats[worker_id] = replace(link.stats)
            return stats

    def close(self) -> None:
        """Close every link."""
        for worker_id in self.worker_ids:
            self.drop_link(worker_id)

    # --- engine ---

    def compute(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Compute the experts' weighted sums: x [T, D], ids and weights [T, K]; returns [T, D] in x's dtype.

        Blocks until every row is back. Raises ExpertsUnavailableError or ExpertFailedError.
        """
        worker_of = self._worker_of(layer)
        host_x = x if x.device.type == "cpu" else x.cpu()
        plan = plan_dispatch(ids.cpu().numpy(), weights.float().cpu().numpy(), worker_of)
        self.totals.needed_bytes += needed_bytes(plan.shares, x.shape[1], x.element_size())
        pending: tuple[WorkerShare, ...] = plan.shares
        answers: list[tuple[WorkerShare, Tensor]] = []
        while pending:
            done, failed = self._exchange(layer, host_x, pending)
            if failed:  # what came back lies in buffers that the next round may use again
                done = [(share, rows.clone()) for share, rows in done]
                self.totals.retries += len(failed)
                worker_of = self._worker_of(layer)
            answers += done
            pending = tuple(new for share in failed for new in replan(share, worker_of, plan.num_tokens))
        return combine(answers, plan.num_tokens, x.shape[1], x.dtype).to(x.device)

    def _exchange(
        self, layer: int, x: Tensor, shares: tuple[WorkerShare, ...]
    ) -> tuple[list[tuple[WorkerShare, Tensor]], list[WorkerShare]]:
        """Send every share and wait for every answer: (answered, to be planned anew)."""
        deadline_s = time.monotonic() + self._timeout_s
        live = self._live
        sent: list[tuple[WorkerShare, str, RouterLink, int]] = []
        done: list[tuple[WorkerShare, Tensor]] = []
        failed: list[WorkerShare] = []
        refusal = ""
        for share in shares:
            worker_id, link = live[share.worker]
            self._seq = (self._seq + 1) & 0xFFFFFFFF
            dispatch = Dispatch(
                seq=self._seq,
                layer=layer,
                step=self.step & 0xFFFFFFFF,
                epoch=self.epoch,
                deadline_s=deadline_s,
                experts=share.experts,
                counts=share.counts,
                pair_rows=share.pair_rows,
                pair_weights=share.pair_weights,
                x=rows_for(x, share),
                traceparent=self.traceparent,
            )
            try:
                link.send(dispatch)
                sent.append((share, worker_id, link, self._seq))
            except FrameError as error:  # what is sent already must still be received, or its credits are lost
                refusal = f"a dispatch does not fit link {link.link_id}: {error}"
                break
            except LinkError as error:
                self._lose(worker_id, link, error)
                failed.append(share)
        for share, worker_id, link, seq in sent:
            try:
                reply = link.receive(seq, deadline_s)
            except (LinkError, KeyError) as error:
                self._lose(worker_id, link, error)
                failed.append(share)
                continue
            if reply.status == Status.EXPIRED:
                self._lose(worker_id, link, LinkTimeout("the dispatch had expired when the worker came to it"))
                failed.append(share)
            elif reply.status != Status.OK or reply.y is None:
                refusal = f"worker {worker_id}: {reply.message or reply.status.name}"
            else:
                done.append((share, reply.y))
        if refusal:
            raise ExpertFailedError(refusal)
        return done, failed

    def _worker_of(self, layer: int) -> NDArray[np.int64]:
        if self._routed_version != self._version:
            with self._lock:
                self._live = sorted(self._links.items())
                placement, version = self._placement, self._version
            if self._live:
                self._table = route(
                    placement, [worker_id for worker_id, _ in self._live], self._num_layers, self._num_experts
                )
            self._routed_version = version
        if not self._live:
            raise ExpertsUnavailableError("no expert worker can be reached")
        return self._table[layer]

    def _lose(self, worker_id: str, link: RouterLink, error: Exception) -> None:
        with self._lock:
            is_current = self._links.get(worker_id) is link
        if is_current:
            self.drop_link(worker_id)
            if self._on_lost is not None:
                self._on_lost(worker_id, str(error))
