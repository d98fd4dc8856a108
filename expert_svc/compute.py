"""The worker's data loop: the native end reads, joins, computes and answers; here is what it comes back for.

That is a batch some of whose experts are not in slots, or whose weights are none of the native kernels'; hints; and
what was noted for buffer, trials and traces. Owned by one thread, which alone touches the port's links. While it waits
for loads it goes on listening, so that hints for the next layer are heard early. Counters are read by others without a
lock: single numbers, only ever added to by this thread.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from collegium.link.frame import LinkClosed, Status
from collegium.link.header import clip
from collegium.link.memory import rows_at
from collegium.link.tcp_port import TcpPort
from collegium.model.architectures import CheckpointError, ExpertForm
from collegium.model.device_experts import DeviceRun
from collegium.model.experts import PackedExpert, expert_run, run_experts
from collegium.native.worker_end import Batch, Span, Totals, Why
from expert_svc.buffer import ExpertBuffer, Visit
from expert_svc.join_wait import JoinTrial
from expert_svc.prefetch_trial import PrefetchTrial

_CALL_S = 0.1  # counters, and the choice whether rows wait for company, are as old as that at most
_LOAD_POLL_S = 1.0  # a load that lands wakes the port
_WORD_EVERY_S = 0.02
_NONE = np.empty(0, np.uint16)

SpanSink = Callable[[Sequence[Span]], None]


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
    num_native_answers: int = 0  # dispatches read, joined and answered by the native end
    num_whole_answers: int = 0  # of them, those for which it did not come back in between
    num_python_answers: int = 0  # refused here: they could not be served as they were
    compute_us: int = 0
    stall_us: int = 0  # of compute_us, what went by waiting for loads
    wait_us: int = 0
    join_wait_us: int = 0  # time in which nothing was computed, so that other routers' rows could come
    num_parked: int = 0  # times that a link was not read, for others' dispatches took all the memory

    def as_dict(self) -> dict[str, float]:
        """The counters by name."""
        return {name: float(value) for name, value in asdict(self).items()}


class ComputeLoop:
    """Serves dispatches until stopped."""

    def __init__(
        self,
        port: TcpPort,
        buffer: ExpertBuffer,
        form: ExpertForm,
        dtype: torch.dtype,
        *,
        d_model: int,
        num_experts: Sequence[int],
        num_threads: int,
        trial: PrefetchTrial | None = None,
        join_trial: JoinTrial | None = None,
        on_traced: SpanSink | None = None,
        on_end: Callable[[], None] = lambda: None,
    ):
        """`num_experts[layer]` bounds what a dispatch may ask for. `trial` decides whether prefetches pay; without one
        they are made whenever hints come. `join_trial` decides whether rows wait for those of other routers; without
        one they never do. `on_traced` is told of sampled dispatches.
        """
        self._port, self._buffer, self._form, self._dtype, self._trial = port, buffer, form, dtype, trial
        self._num_experts, self._num_threads, self._on_traced = num_experts, num_threads, on_traced
        self._d_model, self._on_end, self._join_trial, self._slab = d_model, on_end, join_trial, buffer.slab
        self._is_native = False  # whether the end knows how to compute
        self._stall_us = 0
        self._num_hits = 0
        self.num_queued = 0  # dispatches that waited when the end was last looked at
        self._last_word_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self.error: BaseException | None = None
        self._tell_end()

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

    @property
    def counters(self) -> Counters:
        """What has been counted. From any thread."""
        totals: Totals = self._port.native.totals
        return Counters(
            num_dispatches=totals.dispatches,
            num_batches=totals.batches,
            num_joined_batches=totals.joined_batches,
            num_joined_dispatches=totals.joined_dispatches,
            num_rows=totals.rows,
            num_pairs=totals.pairs,
            num_expert_calls=totals.groups,
            num_failed=totals.failed + self._port.num_refused,
            num_native_answers=totals.answers,
            num_whole_answers=totals.whole,
            num_python_answers=self._port.num_refused,
            compute_us=totals.compute_ns // 1000,
            stall_us=self._stall_us,
            wait_us=totals.wait_ns // 1000,
            join_wait_us=totals.join_wait_ns // 1000,
            num_parked=totals.parked,
        )

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while not self._stopping.is_set():
                    self._turn()
                self._look(Why(0))  # what the last batch has noted
        except LinkClosed:
            pass  # the port was closed: nothing more can arrive
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._on_end()

    def _turn(self) -> None:
        if not self._is_native and self._slab is None and self._buffer.residents.layout is not None:
            self._tell_end()  # the first expert has come
        why = self._port.run(_CALL_S, is_waiting=self._join_trial is not None and self._join_trial.is_on)
        self._look(why)
        if why & Why.BATCH:
            self._serve(self._port.native.batch())

    def _tell_end(self) -> None:
        """Tell the native end what experts there are, and how to compute them once that is known."""
        residents = self._buffer.residents
        layout = residents.layout if self._slab is None else None
        self._is_native = layout is not None
        self._port.serve(
            (residents.table, residents.leases),
            self._num_experts,
            shape=None if layout is None else layout.shape_of(self._form),
            d_model=self._d_model,
            dtype=self._dtype,
            num_threads=self._num_threads,
            notes_visits=not self._buffer.is_roomy,
        )

    def _look(self, why: Why) -> None:
        """Pass on what calls have noted: visits to the buffer, routers' steps to the trial, spans, hints."""
        end, buffer = self._port.native, self._buffer
        visits, steps, spans = end.noted()
        self.num_queued = end.num_waiting
        num_hits = end.totals.hits
        if visits or num_hits != self._num_hits:
            buffer.visited(visits, num_hits - self._num_hits)
            self._num_hits = num_hits
        if self._trial is not None:
            for visit in visits:
                self._trial.note(visit.began_ns * 1e-9, visit.layer, visit.num_decode_rows)
            self._heed_trial(self._trial)
        if self._join_trial is not None:
            for step in steps:
                routers = [self._port.router_of(link_id) for link_id in (step.link_id, *step.active)]
                self._join_trial.note(routers[0], routers[1:], step.num_decode_rows, step.at_ns * 1e-9)
        if spans and self._on_traced is not None:
            self._on_traced(spans)
        if why & Why.HINTS:
            self._pass_hints()

    def _heed_trial(self, trial: PrefetchTrial) -> None:
        if self._buffer.is_prefetching != trial.is_on:
            self._buffer.is_prefetching = trial.is_on
            self._port.native.keep_hints(keeps=trial.is_on)

    def _pass_hints(self) -> None:
        for _, layer, experts, counts in self._port.native.hints():
            if layer < len(self._num_experts):
                bound = self._num_experts[layer]
                wanted = [(e, c) for e, c in zip(experts.tolist(), counts.tolist(), strict=True) if e < bound]
                self._buffer.hint(layer, [expert for expert, _ in wanted], [count for _, count in wanted])

    # --- a batch at hand ---

    def _serve(self, batch: Batch) -> None:
        end = self._port.native
        try:
            self._compute(batch)
        except (CheckpointError, RuntimeError, MemoryError) as error:  # of torch too: one must not end the worker
            if batch.num_dispatches > 1:  # one dispatch's expert cannot be read: the others must not pay for it
                end.split()
            else:
                end.fail(Status.FAILED, clip(str(error) or type(error).__name__))

    def _compute(self, batch: Batch) -> None:
        buffer, began_ns = self._buffer, time.monotonic_ns()
        self._last_word_s = began_ns * 1e-9
        if self._trial is not None:
            self._trial.note(began_ns * 1e-9, batch.layer, batch.num_decode_rows)
            self._heed_trial(self._trial)
        x = rows_at(batch.x, batch.num_rows, self._d_model, self._dtype)
        visit = buffer.begin(batch.layer, batch.experts, batch.decode_counts, batch.num_decode_rows)
        try:
            if self._slab is None and len(visit.ready) == len(batch.experts):  # nothing to wait for: all in one call
                buffer.landed(visit)  # in the order in which they were found: not asked, slots are taken by group
                args = (batch.counts, batch.pair_rows, batch.pair_weights, self._form)
                y = run_experts(x, _slots(visit, range(len(batch.experts))), *args)
            else:
                y = self._compute_in_parts(x, batch, visit)
        finally:
            buffer.finish(visit)
        if y.dtype is not self._dtype or not y.is_contiguous():
            raise RuntimeError(f"experts gave {y.dtype} rows, the links carry {self._dtype}")
        missed = np.array(visit.missed, np.uint16) if visit.missed else _NONE
        self._port.native.answer(y.data_ptr(), missed, began_ns, time.monotonic_ns())

    def _compute_in_parts(self, x: Tensor, batch: Batch, visit: Visit) -> Tensor:
        """Run what is resident while the rest is loaded."""
        buffer, slab = self._buffer, self._slab
        if slab is None:
            run = expert_run(x, batch.counts, batch.pair_rows, self._form)
        else:
            run = DeviceRun(x, batch.counts, batch.pair_rows, batch.pair_weights, self._form, slab)
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
                self._tell_progress()
            elif not visit.is_over:
                self._wait_for_loads()
        if not isinstance(run, DeviceRun):
            return run.result(batch.pair_rows, batch.pair_weights)
        y = run.result()
        buffer.release(visit, last)
        return y

    def _wait_for_loads(self) -> None:
        began_s = time.monotonic()
        if not self._buffer.help() and self._port.listen(_LOAD_POLL_S) & Why.HINTS:
            self._pass_hints()
        self._stall_us += round((time.monotonic() - began_s) * 1e6)

    def _tell_progress(self) -> None:
        """Let the routers know that this batch is slow and not lost; said only when something of it has been done."""
        now_s = time.monotonic()
        if now_s - self._last_word_s >= _WORD_EVERY_S:
            self._last_word_s = now_s
            self._port.native.progress()


def _slots(visit: Visit, groups: Sequence[int]) -> list[PackedExpert]:
    slots = [visit.slots[group] for group in groups]
    return [slot for slot in slots if slot is not None]
