"""The worker's counters by series name, for its metrics page, its lease and `collegium up`'s table."""

import threading
from dataclasses import replace

from collegium.fabric.metrics import series
from collegium.link.base import LinkStats, WorkerPort
from expert_svc.compute import ComputeLoop
from expert_svc.store import ExpertStore


class WorkerCounters:
    """Reads everything that a worker counts; remembers links that have closed since the last reading."""

    def __init__(self, loop: ComputeLoop, store: ExpertStore, port: WorkerPort):
        self._loop, self._store, self._port = loop, store, port
        self._open: dict[int, LinkStats] = {}
        self._closed = LinkStats()
        self._lock = threading.Lock()

    def read(self) -> dict[str, float]:
        """Collect the counters. Thread-safe."""
        counters, store = self._loop.counters, self._store
        with self._lock:
            is_open = self._port.links()
            for link_id in self._open.keys() - is_open.keys():
                self._closed.add(self._open[link_id])
            self._open = is_open
            links = [*is_open.values(), replace(self._closed)]
        return {
            series("collegium_dispatches_total"): counters.num_dispatches,
            series("collegium_joined_dispatches_total"): counters.num_joined_dispatches,
            series("collegium_expert_calls_total"): counters.num_expert_calls,
            series("collegium_worker_rows_total"): counters.num_pairs,
            series("collegium_expert_hits_total"): counters.num_expert_calls - store.num_misses,
            series("collegium_expert_misses_total"): store.num_misses,
            series("collegium_busy_seconds_total"): counters.compute_us / 1e6,
            series("collegium_expired_dispatches_total"): sum(link.expired for link in links),
            series("collegium_link_rows_total", direction="out"): sum(link.rows_out for link in links),
            series("collegium_link_rows_total", direction="back"): sum(link.rows_back for link in links),
            series("collegium_link_pairs_total", direction="out"): sum(link.pairs_out for link in links),
            series("collegium_link_bytes_total", direction="out"): sum(link.bytes_out for link in links),
            series("collegium_link_bytes_total", direction="back"): sum(link.bytes_back for link in links),
            series("collegium_resident_bytes"): store.resident_bytes,
            series("collegium_resident_experts"): store.num_resident,
            series("collegium_links"): len(is_open),
        }
