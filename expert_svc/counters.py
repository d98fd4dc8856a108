"""The worker's counters by series name, for its metrics page, its lease and `collegium up`'s table."""

import threading
from dataclasses import replace

from collegium.fabric.metrics import series
from collegium.link.base import LinkStats, WorkerPort
from expert_svc.buffer import ExpertBuffer
from expert_svc.compute import ComputeLoop
from expert_svc.regret import RegretSample


class WorkerCounters:
    """Reads everything that a worker counts; remembers links that have closed since the last reading."""

    def __init__(self, loop: ComputeLoop, buffer: ExpertBuffer, port: WorkerPort, sample: RegretSample | None = None):
        self._loop, self._buffer, self._port, self._sample = loop, buffer, port, sample
        self._open: dict[int, LinkStats] = {}
        self._closed = LinkStats()
        self._lock = threading.Lock()

    def read(self) -> dict[str, float]:
        """Collect the counters. Thread-safe."""
        counters, buffer = self._loop.counters, self._buffer
        totals = buffer.totals
        with self._lock:
            is_open = self._port.links()
            for link_id in self._open.keys() - is_open.keys():
                self._closed.add(self._open[link_id])
            self._open = is_open
            links = [*is_open.values(), replace(self._closed)]
        num_expired = sum(link.expired for link in links)  # answered by the port, and never queued
        return {
            series("collegium_worker_dispatches_total"): counters.num_dispatches,
            series("collegium_answers_total", way="native"): counters.num_native_answers + num_expired,
            series("collegium_answers_total", way="python"): counters.num_python_answers,
            series("collegium_joined_dispatches_total"): counters.num_joined_dispatches,
            series("collegium_join_wait_seconds_total"): counters.join_wait_us / 1e6,
            series("collegium_expert_calls_total"): counters.num_expert_calls,
            series("collegium_worker_rows_total"): counters.num_pairs,
            series("collegium_expert_requests_total"): totals.requests,
            series("collegium_expert_hits_total"): totals.hits,
            series("collegium_expert_misses_total"): totals.misses,
            series("collegium_expert_adopted_total"): totals.adopted,
            series("collegium_expert_evictions_total"): totals.evictions,
            series("collegium_expert_streamed_total"): totals.streamed,
            series("collegium_expert_load_bytes_total", tier="host"): totals.bytes_host,
            series("collegium_expert_load_bytes_total", tier="disk"): totals.bytes_disk,
            series("collegium_expert_load_seconds_total"): buffer.load_seconds,
            series("collegium_activated_bytes_total"): counters.num_expert_calls * buffer.slot_bytes,
            series("collegium_queued_dispatches"): self._loop.num_queued,
            series("collegium_expert_stall_seconds_total"): counters.stall_us / 1e6,
            series("collegium_prefetch_loads_total"): totals.prefetched,
            series("collegium_prefetch_useful_total"): totals.prefetch_useful,
            series("collegium_prefetch_late_total"): totals.prefetch_late,
            series("collegium_prefetch_wasted_total"): totals.prefetch_wasted,
            series("collegium_prefetch_useful_bytes_total"): totals.prefetch_useful * buffer.slot_bytes,
            series("collegium_prefetch_wasted_bytes_total"): totals.prefetch_wasted * buffer.slot_bytes,
            series("collegium_prefetch_active"): buffer.is_prefetching,
            series("collegium_expert_memory_bytes"): buffer.budget_bytes,
            **self._regret(),
            series("collegium_busy_seconds_total"): counters.compute_us / 1e6,
            series("collegium_expired_dispatches_total"): num_expired,
            series("collegium_worker_link_rows_total", direction="out"): sum(link.rows_out for link in links),
            series("collegium_worker_link_rows_total", direction="back"): sum(link.rows_back for link in links),
            series("collegium_worker_link_bytes_total", direction="out"): sum(link.bytes_out for link in links),
            series("collegium_worker_link_bytes_total", direction="back"): sum(link.bytes_back for link in links),
            series("collegium_resident_bytes"): buffer.resident_bytes,
            series("collegium_resident_experts"): buffer.num_resident,
            series("collegium_worker_links"): len(is_open),
            series("collegium_link_pauses_total"): counters.num_parked,
        }

    def _regret(self) -> dict[str, float]:
        ratio = None if self._sample is None else self._sample.min_ratio()
        return {} if ratio is None else {series("collegium_expert_min_ratio"): ratio}
