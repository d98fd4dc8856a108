"""What all workers together count, so that a cluster can be watched without a series for each of them.

Owns the totals since this balancer began to hear of workers, and how workers differ. Told counters and the time by the
balancer's loop, read from any thread. A worker that leaves takes nothing away.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from collegium.fabric.metric_names import METRICS, SERIES, SUMMED, series

_BUSY = series("collegium_busy_seconds_total")
_HITS = series("collegium_expert_hits_total")
_REQUESTS = series("collegium_expert_requests_total")
Counters = Mapping[str, float]


@dataclass(slots=True)
class _Seen:
    newest: Counters
    since_s: float  # when the interval began that shares are of
    at_since: Counters
    shares: dict[str, float] = field(default_factory=dict[str, float])  # by metric


class WorkerTotals:
    """`note` is for the balancer's loop, `counters` for any thread."""

    def __init__(self, interval_s: float = 5.0) -> None:
        """interval_s: of the shares."""
        self._interval_s = interval_s
        self._seen: dict[str, _Seen] = {}
        self._totals: dict[str, float] = {}

    def note(self, workers: Iterable[tuple[str, Counters]], now_s: float) -> None:
        """Take what workers, all that there are, counted since their start: (id, counters by series)."""
        there = dict(workers)
        for worker_id in self._seen.keys() - there.keys():
            del self._seen[worker_id]
        for worker_id, counters in there.items():
            if not counters:
                continue
            seen = self._seen.get(worker_id)
            if seen is None:  # what it did before is not of this balancer's time
                self._seen[worker_id] = _Seen(counters, now_s, counters)
                continue
            if counters is not seen.newest:
                self._add(counters, seen.newest)
                seen.newest = counters
            if now_s - seen.since_s >= self._interval_s:
                seen.shares = _shares(counters, seen.at_since, now_s - seen.since_s)
                seen.since_s, seen.at_since = now_s, counters

    def counters(self) -> dict[str, float]:
        """Give the totals, and the shares over workers, by series."""
        found = dict(self._totals)
        every = list(self._seen.values())
        for seen in every:
            for key, value in seen.newest.items():
                name, summed = _summed(key)
                if summed and METRICS[name].kind == "gauge":
                    found[summed] = found.get(summed, 0.0) + value
        for name in ("collegium_workers_busy_ratio", "collegium_workers_hit_ratio"):
            shares = [seen.shares[name] for seen in every if name in seen.shares]
            if shares:
                found[series(name, statistic="min")] = min(shares)
                found[series(name, statistic="mean")] = sum(shares) / len(shares)
                found[series(name, statistic="max")] = max(shares)
        return found

    def _add(self, counters: Counters, before: Counters) -> None:
        for key, value in counters.items():
            name, summed = _summed(key)
            if summed and METRICS[name].kind == "counter":
                gained = max(0.0, value - before.get(key, 0.0))
                self._totals[summed] = self._totals.get(summed, 0.0) + gained


@functools.cache
def _summed(key: str) -> tuple[str, str]:
    """Give a series' metric, and the series that it adds to; both empty where it adds to none."""
    match = SERIES.fullmatch(key)
    if match is None or match[1] not in SUMMED:
        return "", ""
    return match[1], SUMMED[match[1]] + key[len(match[1]) :]


def _shares(counters: Counters, before: Counters, seconds: float) -> dict[str, float]:
    def gained(key: str) -> float:
        return counters.get(key, 0.0) - before.get(key, 0.0)

    shares = {"collegium_workers_busy_ratio": min(1.0, gained(_BUSY) / seconds)}
    if gained(_REQUESTS) > 0:
        shares["collegium_workers_hit_ratio"] = gained(_HITS) / gained(_REQUESTS)
    return shares
