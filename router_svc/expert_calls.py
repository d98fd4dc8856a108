"""Have the experts of a layer computed: plan, send, receive, combine; and again elsewhere where a worker fails.

Owns the router's links while they are used. `compute` runs in the engine's thread alone; links and placements are
handed in from the control loop. Expert calls are pure, so a share whose worker is lost is simply planned anew over
those that live.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from opentelemetry.trace import Span
from torch import Tensor

from collegium.fabric import tracing
from collegium.link.base import LinkStats, RouterLink
from collegium.link.frame import NO_EXPERTS, Dispatch, FrameError, LinkError, LinkTimeout, Status
from collegium.model.dispatch import WorkerShare, combine, needed_bytes, plan_dispatch, replan, rows_for
from collegium.model.native.step import CopyTable, DecodeStep, Foretelling
from collegium.model.placement import NO_PLACEMENT, Placement
from router_svc.exchange import Disturbed, LayerCall, WholeExchange, whole_exchange
from router_svc.foresight import Foretells
from router_svc.hinting import Hinting, HintTotals
from router_svc.load_counts import LoadCounts
from router_svc.micro_batches import MAX_MICRO_BATCHES
from router_svc.routing import ACTIVATION_ROWS, LayerRoute, choose_replicas, route
from router_svc.shared_experts import Shared
from router_svc.token_memory import TokenMemory
from router_svc.traced_layers import TracedLayers, is_traced, layer_span
from router_svc.turns import pause

# Told of a layer once it is computed: (layer, ids [T, K], weights [T, K], experts that had to be loaded for it [M]).
OnLayer = Callable[[int, NDArray[np.int64], NDArray[np.float32], NDArray[np.uint16]], None]

_MOST_SUSPECT = 3  # rounds in which rows come back that are no numbers
_PARTS = range(MAX_MICRO_BATCHES)


class ExpertsUnavailableError(Exception):
    """No worker can be reached; the step may be computed again when one is back."""


class ExpertFailedError(Exception):
    """A worker answered that it cannot compute what was asked; asking again would not help."""


@dataclass(slots=True)
class CallTotals(HintTotals):
    """What all links of this router did since its start, closed ones included."""

    retries: int = 0
    suspect_answers: int = 0  # shares that were planned anew since the rows that came back were no numbers
    needed_bytes: int = 0
    # A layer's exchange with all workers, by what carried it: the native call, or this module from where it had to.
    native_exchanges: int = 0
    python_exchanges: int = 0
    away_s: float = 0.0  # time in which any rows were with workers
    blocked_s: float = 0.0  # of that, what went by with nothing else to compute


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    """A share on its way."""

    share: WorkerShare
    worker_id: str
    link: RouterLink
    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What one micro-batch of a step is told by: its first `num_decode_rows` decode."""

    num_decode_rows: int
    hinting: Hinting | None


class ExpertCalls:
    """The router's way to the experts.

    `begin` opens each step, `end` closes it; `trace` and `on_layer` are the engine's to set before it. A step may
    be computed in parts that take turns (`turns.by_turns`): `enter` says whose turn it is, and each part's `compute`
    pauses while its rows are away.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        timeout_s: float,
        on_lost: Callable[[str, str], None] | None = None,
        foresight: Foretells | None = None,
        num_ahead: int = 1,
        memory: TokenMemory | None = None,
    ):
        """`on_lost(worker_id, why)` is called from the engine's thread when a link is given up.

        With `foresight`, workers are told of the likely choices of the next `num_ahead` layers while they compute one;
        with `memory` too, of those of the first layers when a step begins.
        """
        self._num_layers, self._num_experts, self._timeout_s = num_layers, num_experts, timeout_s
        self._on_lost = on_lost
        self._lock = threading.Lock()  # guards the five below: written by the control loop, read by the engine
        self._links: dict[str, RouterLink] = {}
        self._placement = NO_PLACEMENT
        self._version = 0
        self._is_amid_step = False
        self._retired: dict[str, RouterLink] = {}  # in use no more, but what was sent is still to be answered
        self._routed_version = -1
        # What computes plain layers in one call, while links stay as they are.
        self._exchanges: WholeExchange | None = None
        self._former: list[WholeExchange] = []  # replaced while rows were away
        self._whole_version = -1
        self._live: list[tuple[str, RouterLink]] = []
        self._wanting: set[RouterLink] = set()  # links whose workers have a use for hints
        self._table: list[LayerRoute] = []
        self._copies = CopyTable(())
        self._worker_of = np.zeros(num_layers, np.int64)  # addresses of the table's rows
        self._seq = 0
        self._closed = LinkStats()
        self.totals = CallTotals()
        self.loads = LoadCounts(num_layers, num_experts)
        self.activation_rows = ACTIVATION_ROWS  # set from the control loop, once the balancer has measured it
        self._num_ahead = num_ahead
        self._asks_gates = foresight is not None and foresight.asks_gates
        # One for each micro-batch; they share the memory of tokens.
        self._hintings = [] if foresight is None else [Hinting(foresight, self.totals, memory) for _ in _PARTS]
        self._step = 0
        self._parts: list[_Part] = []
        self._part, self._part_idx = _Part(num_decode_rows=0, hinting=None), 0
        self._num_away = 0  # parts whose rows are with workers
        self._away_since_s = 0.0
        self.shared: Mapping[int, Shared] = {}  # by layer
        self._traceparent = ""
        self._num_traced = 0  # steps
        self.on_layer: OnLayer | None = None

    # --- control loop ---

    def add_link(self, worker_id: str, link: RouterLink, *, wants_hints: bool = True) -> None:
        """Use a link from the next layer on. Thread-safe."""
        with self._lock:
            self._links[worker_id] = link
            if wants_hints:
                self._wanting.add(link)
            self._version += 1

    def drop_link(self, worker_id: str) -> None:
        """Close a link and use it no more, whatever is on it. Thread-safe."""
        with self._lock:
            link = self._take_out(worker_id) or self._retired.pop(worker_id, None)
            if link is not None:
                self._closed.add(link.stats)
        if link is not None:
            link.close()

    def retire_link(self, worker_id: str) -> None:
        """Use a link no more, and close it once the step at hand is over: what was sent is answered. Thread-safe."""
        with self._lock:
            link = self._take_out(worker_id)
            if link is not None and self._is_amid_step:
                self._retired[worker_id] = link
                return
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
            self._fold()
            stats = {"": replace(self._closed)}
            for link in self._retired.values():
                stats[""].add(link.stats)
            for worker_id, link in self._links.items():
                stats[worker_id] = replace(link.stats)
            return stats

    def close(self) -> None:
        """Close every link."""
        with self._lock:
            worker_ids = [*self._links, *self._retired]
        for worker_id in worker_ids:
            self.drop_link(worker_id)

    # --- engine ---

    def trace(self, traceparent: str) -> None:
        """Have the steps to come traced under a span; the empty string ends that."""
        self._traceparent = traceparent
        self._num_traced += bool(traceparent)

    def begin(self, step: int, parts: Sequence[tuple[Sequence[int], int]]) -> None:
        """Open a step of one or several parts, each of tokens [T], of which the first so many decode."""
        with self._lock:
            self._is_amid_step = True
        self._step, self._parts = step, []
        self._num_away = 0
        for shared in self.shared.values():
            shared.forget()
        hintings = self._hintings or [None] * len(parts)
        for (tokens, num_decode_rows), hinting in zip(parts, hintings, strict=False):
            self._parts.append(_Part(num_decode_rows=num_decode_rows, hinting=hinting))
            if hinting is None:
                continue
            self._refresh()
            hinting.begin(tokens if self._wants_hints else ())
            if self._wants_hints and num_decode_rows and self._live:
                table = [route.worker_of for route in self._table]
                hinting.recall(num_decode_rows, table, self._live)
        self.enter(0)

    def end(self) -> None:
        """Close a step: nothing is under way on any link, but what was given up. Idempotent."""
        with self._lock:
            self._is_amid_step = False
            self._fold()
            retired, self._retired = list(self._retired.values()), {}
            for link in retired:
                self._closed.add(link.stats)
        for link in retired:
            link.close()

    def enter(self, idx: int) -> None:
        """Let a part of the step have its turn."""
        self._part, self._part_idx = self._parts[idx], idx

    @contextlib.contextmanager
    def sources(self, heard_by: OnLayer | None) -> Generator[None]:
        """Let rows of sources come first: none of them decodes, nothing is foretold of them, others listen."""
        part, on_layer = self._part, self.on_layer
        self._part, self.on_layer = _Part(num_decode_rows=0, hinting=None), heard_by
        try:
            yield
        finally:
            self._part, self.on_layer = part, on_layer

    def compute(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Compute the experts' weighted sums: x [T, D], ids and weights [T, K]; returns [T, D] in x's dtype.

        While the rows are away, the layer's shared experts are computed and other parts of the step have their turns.
        Blocks until every row is back. Raises ExpertsUnavailableError or ExpertFailedError. Where the layer is traced,
        it has a span of its own, and the workers' are under it.
        """
        if not self._is_traced(layer):
            return self._compute(layer, x, ids, weights, None)
        with layer_span(self._traceparent, layer, len(ids)) as span:
            return self._compute(layer, x, ids, weights, span)

    def _compute(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor, span: Span | None) -> Tensor:
        route = self._route(layer)
        host_x = x if x.device.type == "cpu" else x.cpu()
        host_ids, host_weights = ids.cpu().numpy(), weights.float().cpu().numpy()
        workers, is_counted = None, bool(route.replicas)
        if is_counted:
            counts = self.loads.note(layer, host_ids, self._part.num_decode_rows)
            workers = choose_replicas(host_ids, counts, route, len(self._live), self.activation_rows)
        whole = self._whole_for(host_x, host_ids, host_weights)
        if whole is None:
            shares = plan_dispatch(host_ids, host_weights, route.worker_of, workers).shares
            found = Disturbed(unsent=list(shares))
            return self._finish(layer, x, host_x, host_ids, host_weights, found, is_counted=is_counted, span=span)
        asked = LayerCall(
            layer=layer,
            x=host_x,
            ids=host_ids,
            weights=host_weights,
            worker_of=route.worker_of,
            workers=workers,
            is_counted=is_counted,
            num_decode_rows=self._part.num_decode_rows,
            seq=(self._seq + 1) & 0xFFFFFFFF,
            deadline_s=time.monotonic() + self._timeout_s,
            patience_s=self._timeout_s,
            epoch=self.epoch,
            step=self._step,
            traceparent="" if span is None else tracing.traceparent_of(span),
        )
        self._seq = (self._seq + len(self._live)) & 0xFFFFFFFF
        if self._has_other_work(layer):
            away = whole if whole.send(self._part_idx, asked) else None
            found = Disturbed() if away is not None else whole.disturbed
            return self._finish(layer, x, host_x, host_ids, host_weights, found, is_counted=True, away=away, span=span)
        y = whole.run(asked)
        if y is None:
            found = whole.disturbed
            return self._finish(layer, x, host_x, host_ids, host_weights, found, is_counted=True, span=span)
        self._note_whole(whole.waited_s)
        return y.to(x.device)

    def compute_step(self, step: DecodeStep) -> bool:
        """Compute a step's layers, attention and experts, for as long as nothing needs the interpreter between them.

        True where the rows for the head are ready; else step.layer says with which layer the caller goes on. Raises as
        `compute` does.
        """
        traced: TracedLayers | None = None
        while not step.is_done:
            self._refresh()
            is_told = self._wants_hints and (not self._asks_gates or step.layer > step.first_layer)
            is_plain = len(self._parts) == 1 and not is_told
            whole = self._whole(step.top_k) if is_plain and self._live else None
            if whole is None or not whole.takes_step(step):
                return False
            seq, first = (self._seq + 1) & 0xFFFFFFFF, step.layer
            foretelling = self._foretelling(whole, step)
            traced = traced or self._traced_layers(step)
            self._seq = (self._seq + len(self._live) * (step.num_layers - first)) & 0xFFFFFFFF
            done = whole.run_step(
                step,
                self._worker_of,
                seq=seq,
                timeout_s=self._timeout_s,
                epoch=self.epoch,
                number=self._step,
                copies=self._copies,
                activation_rows=self.activation_rows,
                foretelling=foretelling,
                traced=traced,
            )
            if traced is not None:
                traced.tell(first, step.layer)
            if foretelling is not None and self._part.hinting is not None:
                self._part.hinting.take_back(foretelling, step.layer + (done is False))
            if done is None:
                return False
            self._note_whole(step.waited_s, num_layers=step.layer - first)
            if done:
                return True
            x, found = step.work.x, whole.disturbed
            with contextlib.nullcontext() if traced is None else traced.finishing(step.layer) as span:
                y = self._finish(step.layer, x, x, step.ids, step.weights, found, is_counted=True, span=span)
            step.add(y)
        return False

    def _finish(
        self,
        layer: int,
        x: Tensor,
        host_x: Tensor,
        host_ids: NDArray[np.int64],
        host_weights: NDArray[np.float32],
        found: Disturbed,
        *,
        is_counted: bool,
        away: WholeExchange | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """Have a layer computed that has come as far as `found` says. away: has sent all of it, and will receive it."""
        if away is None:
            self.totals.python_exchanges += 1
        traceparent, num_retries = "" if span is None else tracing.traceparent_of(span), 0
        part, num_tokens = self._part, len(host_ids)
        missed: list[NDArray[np.uint16]] = []
        answers: list[tuple[WorkerShare, Tensor]] = list(found.done)
        pending: tuple[WorkerShare, ...] = tuple(found.unsent)
        begun, lost, suspect = _begun(found), self._lost(found), list(found.suspect)
        is_first = True
        num_suspect = 0
        while pending or begun or lost or suspect or away is not None:
            deadline_s = time.monotonic() + self._timeout_s
            sent, unsent, refusal = self._send(layer, host_x, pending, deadline_s, traceparent)
            sent, begun = begun + sent, []
            self._note_away()
            try:
                if is_first:  # the rows are away: nobody waits for this
                    is_first = False
                    self.totals.needed_bytes += needed_bytes(pending, x.shape[1], x.element_size())
                    if not is_counted:
                        self.loads.note(layer, host_ids, part.num_decode_rows)
                    if part.hinting is not None:
                        part.hinting.settle(layer, host_ids)
                        self._foretell(part.hinting, layer, x)
                    if layer in self.shared:
                        self.shared[layer].compute(x)
                    pause()
            except BaseException:  # the step ends here: what was sent must be received, or its credits are lost
                with contextlib.suppress(ExpertFailedError):
                    if away is None:
                        self._receive(host_x, sent, refusal, deadline_s, missed)
                    elif self._receive_whole(away) is None:
                        self.totals.python_exchanges += 1
                        self._lost(away.disturbed)
                        self._receive(host_x, _begun(away.disturbed), refusal, deadline_s, missed)
                raise
            if away is not None:
                y = self._receive_whole(away)
                if y is not None:
                    return y.to(x.device)
                self.totals.python_exchanges += 1
                answers += away.disturbed.done
                sent += _begun(away.disturbed)
                lost += self._lost(away.disturbed)
                suspect += away.disturbed.suspect
                away = None
            done, failed, wrong = self._receive(host_x, sent, refusal, deadline_s, missed)
            suspect += wrong
            if suspect:
                num_suspect += 1
                self._note_suspect(suspect, num_suspect)
            elsewhere = {share.worker for share in suspect}
            failed += unsent + lost + suspect
            lost, suspect = [], []
            if failed:  # what came back lies in buffers that the next round may use again
                done = [(share, rows.clone()) for share, rows in done]
                self.totals.retries += len(failed)
                num_retries += len(failed)
                if span is not None:
                    span.set_attribute("collegium.retries", num_retries)
                worker_of = self._beside(self._route(layer).worker_of, elsewhere)
                pending = tuple(new for share in failed for new in replan(share, worker_of, num_tokens))
            else:
                pending = ()
            answers += done
        if self.on_layer is not None:
            self.on_layer(layer, host_ids, host_weights, np.concatenate([*missed, NO_EXPERTS]))
        return combine(answers, num_tokens, x.shape[1], x.dtype).to(x.device)

    def _note_suspect(self, suspect: Sequence[WorkerShare], num_rounds: int) -> None:
        """Count answers whose rows are no numbers; raises ExpertFailedError once that has been so too often."""
        self.totals.suspect_answers += len(suspect)
        worker_id = self._live[suspect[0].worker][0] if suspect[0].worker < len(self._live) else "a worker"
        if num_rounds >= _MOST_SUSPECT:
            raise ExpertFailedError(f"{worker_id} and others answered rows that are no numbers, to rows that are")

    def _beside(self, worker_of: NDArray[np.int64], workers: Collection[int]) -> NDArray[np.int64]:
        """Give a layer's workers but for some, whose experts the next ones compute; where there are no others, all."""
        num_live = len(self._live)
        if not workers or all(worker in workers for worker in range(num_live)):
            return worker_of
        others = [worker for worker in range(num_live) if worker not in workers]
        stand_in = [worker if worker in others else others[worker % len(others)] for worker in range(num_live)]
        return np.array(stand_in, np.int64)[worker_of]

    def _lost(self, found: Disturbed) -> list[WorkerShare]:
        """Give up the links that a call found broken; returns what is to be planned anew."""
        for _, worker_id, link, error in found.lost:
            self._lose(worker_id, link, error)
        return [share for share, *_ in found.lost]

    def _receive_whole(self, whole: WholeExchange) -> Tensor | None:
        """Receive what a whole exchange has sent for this part; None where that was disturbed."""
        began_s = time.monotonic()
        y = whole.receive(self._part_idx)
        if y is not None:
            self.totals.native_exchanges += 1
            self._note_back(began_s)
        return y

    def _note_whole(self, waited_s: tuple[float, float], num_layers: int = 1) -> None:
        self.totals.native_exchanges += num_layers
        self.totals.away_s += waited_s[0]
        self.totals.blocked_s += waited_s[1]

    def _has_other_work(self, layer: int) -> bool:
        """Whether there is something to do while a layer's rows are away."""
        return self._wants_hints or layer in self.shared or len(self._parts) != 1

    @property
    def _wants_hints(self) -> bool:
        """Whether anything is foretold, and any worker has a use for hints now."""
        return bool(self._hintings) and any(link in self._wanting and link.takes_hints for _, link in self._live)

    def _foretelling(self, whole: WholeExchange, step: DecodeStep) -> Foretelling | None:
        """Give what a step in one call foretells with; None where nobody has a use for hints."""
        hinting = self._part.hinting
        if hinting is None or not self._wants_hints:
            return None
        if whole.foretelling is None:
            whole.foretelling = Foretelling(
                [link in self._wanting for _, link in self._live],
                num_layers=step.num_layers,
                num_experts=self._num_experts,
                top_k=step.top_k,
                num_ahead=self._num_ahead,
            )
        hinting.hand_over(whole.foretelling, step.num_rows)
        return whole.foretelling

    def _whole_for(self, x: Tensor, ids: NDArray[np.int64], weights: NDArray[np.float32]) -> WholeExchange | None:
        """Say whether a layer can be exchanged by calls, and by what."""
        whole = self._whole(ids.shape[1])
        return whole if whole is not None and whole.takes(x, ids, weights) else None

    def _is_traced(self, layer: int) -> bool:
        """Whether a layer of this step gets spans: where layers times workers are many, some, others the next time."""
        return bool(self._traceparent) and is_traced(layer, self._num_traced, self._num_layers * len(self._live))

    def _traced_layers(self, step: DecodeStep) -> TracedLayers | None:
        layers = [layer for layer in range(step.layer, step.num_layers) if self._is_traced(layer)]
        if not layers:
            return None
        return TracedLayers(self._traceparent, layers, num_layers=step.num_layers, num_rows=step.num_rows)

    def _whole(self, top_k: int) -> WholeExchange | None:
        """Give what exchanges in calls; None where somebody listens."""
        if self.on_layer is not None:
            return None
        if self._whole_version != self._routed_version:
            with self._lock:
                self._fold()
                if self._exchanges is not None and self._exchanges.is_away:
                    self._former.append(self._exchanges)
                self._exchanges = whole_exchange(
                    self._live, num_experts=self._num_experts, top_k=top_k, loads=self.loads
                )
                self._whole_version = self._routed_version
        return self._exchanges

    def _take_out(self, worker_id: str) -> RouterLink | None:
        """Use a link no more; under the lock."""
        self._fold()
        link = self._links.pop(worker_id, None)
        self._version += 1
        if link is not None:
            self._wanting.discard(link)
        return link

    def _fold(self) -> None:
        """Take over what the exchanges have counted; under the lock."""
        for exchange in (*self._former, self._exchanges):
            if exchange is not None:
                self.totals.needed_bytes += exchange.fold()
        self._former = [exchange for exchange in self._former if exchange.is_away]

    def _send(
        self, layer: int, x: Tensor, shares: Sequence[WorkerShare], deadline_s: float, traceparent: str
    ) -> tuple[list[_Sent], list[WorkerShare], str]:
        """Send every share: (sent, to be planned anew, why nothing more was sent)."""
        sent: list[_Sent] = []
        failed: list[WorkerShare] = []
        for share in shares:
            worker_id, link = self._live[share.worker]
            self._seq = (self._seq + 1) & 0xFFFFFFFF
            dispatch = Dispatch(
                seq=self._seq,
                layer=layer,
                step=self._step & 0xFFFFFFFF,
                epoch=self.epoch,
                deadline_s=deadline_s,
                experts=share.experts,
                counts=share.counts,
                pair_rows=share.pair_rows,
                pair_weights=share.pair_weights,
                x=rows_for(x, share),
                num_prompt_rows=share.num_rows - int(share.tokens.searchsorted(self._part.num_decode_rows)),
                traceparent=traceparent,
            )
            try:
                link.send(dispatch)
                sent.append(_Sent(share=share, worker_id=worker_id, link=link, seq=self._seq))
            except FrameError as error:  # what is sent already must still be received, or its credits are lost
                return sent, failed, f"a dispatch does not fit link {link.link_id}: {error}"
            except LinkError as error:
                self._lose(worker_id, link, error)
                failed.append(share)
        return sent, failed, ""

    def _receive(
        self, x: Tensor, sent: Sequence[_Sent], refusal: str, deadline_s: float, missed: list[NDArray[np.uint16]]
    ) -> tuple[list[tuple[WorkerShare, Tensor]], list[WorkerShare], list[WorkerShare]]:
        """Wait for every answer: (answered, to be planned anew, answered by what is no numbers); what workers had to
        load is added to `missed`.
        """
        done: list[tuple[WorkerShare, Tensor]] = []
        failed: list[WorkerShare] = []
        suspect: list[WorkerShare] = []
        began_s = time.monotonic()
        for one in sent:
            try:
                reply = one.link.receive(one.seq, deadline_s, patience_s=self._timeout_s)
            except (LinkError, KeyError) as error:
                self._lose(one.worker_id, one.link, error)
                failed.append(one.share)
                continue
            if reply.status == Status.EXPIRED:
                error = LinkTimeout("the dispatch had expired when the worker came to it")
                self._lose(one.worker_id, one.link, error)
                failed.append(one.share)
            elif reply.status != Status.OK or reply.y is None:
                refusal = f"worker {one.worker_id}: {reply.message or reply.status.name}"
            elif not _is_plausible(reply.y, x, one.share):
                suspect.append(one.share)
            else:
                done.append((one.share, reply.y))
                if self.on_layer is not None and reply.num_misses:
                    missed.append(reply.missed)
        self._note_back(began_s)
        if refusal:
            raise ExpertFailedError(refusal)
        return done, failed, suspect

    def _note_away(self) -> None:
        if not self._num_away:
            self._away_since_s = time.monotonic()
        self._num_away += 1

    def _note_back(self, waits_since_s: float) -> None:
        now_s = time.monotonic()
        self.totals.blocked_s += now_s - waits_since_s
        self._num_away -= 1
        if not self._num_away:
            self.totals.away_s += now_s - self._away_since_s

    def _foretell(self, hinting: Hinting, layer: int, x: Tensor) -> None:
        if self._part.num_decode_rows and self._wants_hints:
            rows = x[: self._part.num_decode_rows]
            for ahead in range(layer + 1, min(layer + 1 + self._num_ahead, self._num_layers)):
                hinting.tell(ahead, rows, self._table[ahead].worker_of, self._live)

    def _route(self, layer: int) -> LayerRoute:
        self._refresh()
        if not self._live:
            raise ExpertsUnavailableError("no expert worker can be reached")
        return self._table[layer]

    def _refresh(self) -> None:
        if self._routed_version != self._version:
            with self._lock:
                self._live = sorted(self._links.items())
                placement, version = self._placement, self._version
            if self._live:
                self._table = route(
                    placement, [worker_id for worker_id, _ in self._live], self._num_layers, self._num_experts
                )
                self._copies = CopyTable([route.copies for route in self._table])
                self._worker_of = np.array([route.worker_of.ctypes.data for route in self._table], np.int64)
            self._routed_version = version

    def _lose(self, worker_id: str, link: RouterLink, error: Exception) -> None:
        with self._lock:
            is_current = self._links.get(worker_id) is link
        if is_current:
            self.drop_link(worker_id)
            if self._on_lost is not None:
                self._on_lost(worker_id, str(error))


def _is_plausible(y: Tensor, x: Tensor, share: WorkerShare) -> bool:
    """Whether an answer's rows [R, D] may be summed: finite, or made of rows or weights that are not."""
    if torch.isfinite(y).all():
        return True
    return not (np.isfinite(share.pair_weights).all() and torch.isfinite(rows_for(x, share)).all())


def _begun(found: Disturbed) -> list[_Sent]:
    return [_Sent(share=share, worker_id=worker_id, link=link, seq=seq) for share, worker_id, link, seq in found.sent]
