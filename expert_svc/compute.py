"""The worker's data loop: poll the port, join, run what is resident while the rest is loaded, reply.

Owned by one thread, which alone touches the port's buffers. While it waits for loads it goes on listening, so that
hints for the next layer are heard early. The sum of all that it did is in Counters, read by others without a lock:
single numbers, only ever added to by this thread.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.link.base import Arrival, WorkerPort
from collegium.link.frame import Dispatch, LinkClosed, Reply, Status
from collegium.link.tcp_port import TcpPort
from collegium.model.architectures import CheckpointError, ExpertForm
from collegium.model.device_experts import DeviceRun
from collegium.model.experts import PackedExpert, expert_run, run_experts
from expert_svc.answering import Answering
from expert_svc.buffer import ExpertBuffer, Visit
from expert_svc.join_wait import JoinWait
from expert_svc.joining import DispatchQueue, JoinedBatch, join
from expert_svc.prefetch_trial import PrefetchTrial

_IDLE_POLL_S = 1.0
_NONE = np.empty(0, np.uint16)
_WORD_EVERY_S = 0.02
_MAX_JOINED_ROWS = 16_384  # bounds the activations of one call

SpanSink = Callable[[Sequence[Arrival], int, int], None]  # (dispatches, began ns, ended ns)


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    num_dispatches: int = 0
    num_batches: int = 0
    num_joined_batches: int = 0  # batches with dispatches of more than one router
    num_joined_dispatches: int = 0  # dispatches that shared a batch with another router's
    num_rows: int = 0
    num_pairs: int = 0
    num_expert_calls: int = 0
    num_failed: int = 0
    num_native_answers: int = 0  # dispatches answered by the native call
    num_python_answers: int = 0  # and by this module, those that failed or expired in the queue among them
    compute_us: int = 0
    stall_us: int = 0  # of compute_us, what went by waiting for loads
    wait_us: int = 0
    join_wait_us: int = 0  # time in which nothing was computed, so that other routers' rows could come

    def as_dict(self) -> dict[str, float]:
        """The counters by name."""
        return {name: float(value) for name, value in asdict(self).items()}


class ComputeLoop:
    """Serves dispatches until stopped."""

    def __init__(
        self,
        port: WorkerPort,
        buffer: ExpertBuffer,
        form: ExpertForm,
        *,
        num_experts: Sequence[int],
        num_threads: int,
        trial: PrefetchTrial | None = None,
        join_wait: JoinWait | None = None,
        on_traced: SpanSink | None = None,
        on_end: Callable[[], None] = lambda: None,
    ):
        """`num_experts[layer]` bounds what a dispatch may ask for. `trial` decides whether prefetches pay; without one
        they are made whenever hints come. `on_traced` is told of batches with sampled dispatches.
        """
        self.counters = Counters()
        self._port, self._buffer, self._form, self._trial = port, buffer, form, trial
        self._num_experts, self._num_threads, self._on_traced = num_experts, num_threads, on_traced
        self._on_end, self._join_wait, self._slab = on_end, join_wait, buffer.slab
        self._queue = DispatchQueue()
        self._answering: Answering | None = None
        if isinstance(port, TcpPort):
            self._answering = Answering(port, buffer, form, num_threads=num_threads, join_wait=join_wait, trial=trial)
        self._last_word_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self.error: BaseException | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Finish the batch at hand, close the port and end the thread."""
        self._stopping.set()
        self._port.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        self._port.close()

    @property
    def is_alive(self) -> bool:
        """Whether the loop can serve."""
        return self._thread.is_alive()

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while not self._stopping.is_set():
                    self._turn()
        except LinkClosed:
            pass  # the port was closed: nothing more can arrive
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._on_end()

    @property
    def num_queued(self) -> int:
        """Dispatches that wait."""
        return len(self._queue)

    def _turn(self) -> None:
        if self._answering is not None and not len(self._queue) and self._answering.run(self.counters):
            return
        self._listen(0.0 if len(self._queue) else _IDLE_POLL_S)
        if not len(self._queue):
            return
        layer = None
        if self._join_wait is not None and self._join_wait.has_company:
            layer = self._layer_to_serve(self._join_wait)
            if layer is None:
                return
        taken = self._queue.take(_MAX_JOINED_ROWS, layer)
        began_ns = time.time_ns()
        self._serve(taken)
        if self._on_traced is not None and any(a.dispatch.traceparent for a in taken):
            self._on_traced(taken, began_ns, time.time_ns())

    def _layer_to_serve(self, join_wait: JoinWait) -> int | None:
        """Choose the oldest layer that waits for nobody; None once there was a wait, after which to look anew."""
        now_s = time.monotonic()
        soonest_s = now_s + _IDLE_POLL_S
        for layer, routers, arrived_s in self._queue.layers():
            until_s = join_wait.until(layer, routers, arrived_s)
            if until_s <= now_s:
                return layer
            soonest_s = min(soonest_s, until_s)
        self._listen(soonest_s - now_s)
        self.counters.join_wait_us += round((time.monotonic() - now_s) * 1e6)
        return None

    def _listen(self, timeout_s: float) -> None:
        """Queue what arrives, and pass hints on."""
        arrivals = self._port.poll(timeout_s)
        self._queue.add(arrivals)
        if self._join_wait is not None:
            for arrival in arrivals:
                dispatch = arrival.dispatch
                num_decode_rows = dispatch.x.shape[0] - dispatch.num_prompt_rows
                self._join_wait.note(arrival.router_id, dispatch.layer, num_decode_rows, arrival.received_s)
        for arrival in self._port.hints():
            hint = arrival.hint
            if hint.layer < len(self._num_experts):
                bound = self._num_experts[hint.layer]
                wanted = [(e, c) for e, c in zip(hint.experts.tolist(), hint.counts.tolist(), strict=True) if e < bound]
                self._buffer.hint(hint.layer, [expert for expert, _ in wanted], [count for _, count in wanted])

    def _serve(self, arrivals: Sequence[Arrival]) -> None:
        now = time.monotonic()
        live: list[Arrival] = []
        for arrival in arrivals:
            if arrival.dispatch.deadline_s < now:  # it expired in the queue
                self._reply(arrival, Reply(seq=arrival.dispatch.seq, status=Status.EXPIRED))
            elif problem := self._problem_of(arrival):
                self._fail(arrival, Status.BAD_FRAME, problem)
            else:
                live.append(arrival)
        if not live:
            return
        try:
            self._compute(live, now)
        except (
            CheckpointError,
            RuntimeError,
            MemoryError,
        ) as error:  # of torch too: one dispatch must not end the worker
            if len(live) == 1:
                self._fail(live[0], Status.FAILED, str(error) or type(error).__name__)
            else:  # one dispatch's expert cannot be read: the others must not pay for it
                for arrival in live:
                    self._serve([arrival])

    def _problem_of(self, arrival: Arrival) -> str:
        dispatch = arrival.dispatch
        if dispatch.layer >= len(self._num_experts):
            return f"layer {dispatch.layer} of a model with {len(self._num_experts)} MoE layers"
        largest = int(dispatch.experts.max(initial=0))
        if largest >= self._num_experts[dispatch.layer]:
            return f"expert {largest} of layer {dispatch.layer}, which has {self._num_experts[dispatch.layer]}"
        return ""

    def _compute(self, arrivals: Sequence[Arrival], now: float) -> None:
        batch = join([a.dispatch for a in arrivals])
        counters, buffer = self.counters, self._buffer
        if self._trial is not None:
            self._trial.note(now, batch.layer, batch.num_decode_rows)
            buffer.is_prefetching = self._trial.is_on
        self._last_word_s = now
        visit = buffer.begin(batch.layer, batch.experts, batch.decode_counts, batch.num_decode_rows)
        try:
            if self._slab is None and len(visit.ready) == len(batch.experts):  # nothing to wait for: all in one call
                buffer.landed(visit)  # in the order in which they were found: not asked, slots are taken by group
                args = (batch.counts, batch.pair_rows, batch.pair_weights, self._form)
                y = run_experts(batch.x, _slots(visit, range(len(batch.experts))), *args)
            else:
                y = self._compute_in_parts(arrivals, batch, visit)
        finally:
            buffer.finish(visit)
        parts = (y,) if len(arrivals) == 1 else y.split(batch.row_counts)
        compute_us = round((time.monotonic() - now) * 1e6)
        for arrival, rows in zip(arrivals, parts, strict=True):
            wait_us = round((now - arrival.received_s) * 1e6)
            counters.wait_us += wait_us
            self._reply(
                arrival,
                Reply(
                    seq=arrival.dispatch.seq,
                    y=rows,
                    compute_us=compute_us,
                    wait_us=wait_us,
                    missed=_missed(arrival.dispatch, visit),
                ),
            )
        counters.num_batches += 1
        counters.num_dispatches += len(arrivals)
        counters.num_rows += batch.x.shape[0]
        counters.num_pairs += len(batch.pair_rows)
        counters.num_expert_calls += len(batch.experts)
        counters.compute_us += compute_us
        if len({a.router_id for a in arrivals}) > 1:
            counters.num_joined_batches += 1
            counters.num_joined_dispatches += len(arrivals)

    def _compute_in_parts(self, arrivals: Sequence[Arrival], batch: JoinedBatch, visit: Visit) -> Tensor:
        """Run what is resident while the rest is loaded."""
        buffer, slab = self._buffer, self._slab
        if slab is None:
            run = expert_run(batch.x, batch.counts, batch.pair_rows, self._form)
        else:
            run = DeviceRun(batch.x, batch.counts, batch.pair_rows, batch.pair_weights, self._form, slab)
        last: Sequence[int] = ()
        while not visit.is_over:
            if groups := buffer.landed(visit):
                run.compute(groups, _slots(visit, groups))
                if isinstance(run, DeviceRun):  # who gets the slots next writes them from another stream
                    if visit.is_over:
                        last = groups
                        break
                    run.wait()
                buffer.release(visit, groups)
                self._tell_progress(arrivals)
            elif not visit.is_over:
                self._wait_for_loads()
        if not isinstance(run, DeviceRun):
            return run.result(batch.pair_rows, batch.pair_weights)
        y = run.result()
        buffer.release(visit, last)
        return y

    def _wait_for_loads(self) -> None:
        began_s = time.monotonic()
        if not self._buffer.help():
            self._listen(_IDLE_POLL_S)  # a load that lands wakes the port
        self.counters.stall_us += round((time.monotonic() - began_s) * 1e6)

    def _tell_progress(self, arrivals: Sequence[Arrival]) -> None:
        """Let the routers know that this batch is slow and not lost; said only when something of it has been done."""
        now_s = time.monotonic()
        if now_s - self._last_word_s >= _WORD_EVERY_S:
            self._last_word_s = now_s
            for link_id in {arrival.link_id for arrival in arrivals}:
                self._port.progress(link_id)

    def _fail(self, arrival: Arrival, status: Status, message: str) -> None:
        self.counters.num_failed += 1
        self._reply(arrival, Reply(seq=arrival.dispatch.seq, status=status, message=message))

    def _reply(self, arrival: Arrival, reply: Reply) -> None:
        self.counters.num_python_answers += 1
        self._port.reply(arrival.link_id, reply)


def _slots(visit: Visit, groups: Sequence[int]) -> list[PackedExpert]:
    slots = [visit.slots[group] for group in groups]
    return [slot for slot in slots if slot is not None]


def _missed(dispatch: Dispatch, visit: Visit) -> NDArray[np.uint16]:
    """Of the experts that a visit had to load, those that this dispatch asked for."""
    if not visit.missed:
        return _NONE
    missed = set(visit.missed)  # numpy's isin takes a tenth of a millisecond
    return np.array([expert for expert in dispatch.experts.tolist() if expert in missed], np.uint16)
