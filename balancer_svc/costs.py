"""What a row and a read expert cost a worker, fitted to what workers report.

Owns the fit: busy time = a * rows + b * activated experts, and each worker's speed against it. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from collegium.fabric.metrics import series

_NUM_SAMPLES = 256  # over all workers; the newest count
_LEAST_BUSY_S = 0.05  # of a sample: less is noise
_LEAST_SAMPLES = 3  # of a worker before its speed is believed
_SPEED_STEP = 0.25  # speeds are told in steps, and within one step of 1 as 1: what differs less is other work nearby
_MOST_SPEED = 4.0

_BUSY = series("collegium_busy_seconds_total")
_STALL = series("collegium_expert_stall_seconds_total")
_ROWS = series("collegium_worker_rows_total")
_CALLS = series("collegium_expert_calls_total")
_LOAD_S = series("collegium_expert_load_seconds_total")
_LOADED = tuple(series("collegium_expert_load_bytes_total", tier=tier) for tier in ("host", "disk"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of a worker: per row of an expert, per expert with any row, per byte that it loads."""

    row_s: float = 1e-6
    activation_s: float = 16e-6
    byte_s: float = 1e-9
    is_measured: bool = False


class CostModel:
    """Learns from workers' counters as they come."""

    def __init__(self) -> None:
        self._last: dict[str, Mapping[str, float]] = {}
        self._samples: deque[tuple[str, float, float, float]] = deque(maxlen=_NUM_SAMPLES)  # worker, rows, calls, busy
        self._load_s = self._load_bytes = 0.0

    def note(self, worker_id: str, counters: Mapping[str, float]) -> None:
        """Take a worker's counters since its start."""
        before = self._last.get(worker_id)
        if before is None or counters.get(_BUSY, 0.0) < before.get(_BUSY, 0.0):
            self._last[worker_id] = dict(counters)
            return

        def gained(name: str) -> float:
            return counters.get(name, 0.0) - before.get(name, 0.0)

        busy_s = gained(_BUSY) - gained(_STALL)
        if busy_s < _LEAST_BUSY_S:
            return
        self._last[worker_id] = dict(counters)
        if min(gained(_ROWS), gained(_CALLS)) < 0:
            return  # counters only grow: what these tell is no sample
        self._samples.append((worker_id, gained(_ROWS), gained(_CALLS), busy_s))
        self._load_s += max(0.0, gained(_LOAD_S))
        self._load_bytes += max(0.0, sum(gained(name) for name in _LOADED))

    def forget(self, worker_id: str) -> None:
        """Hear of a worker that is gone."""
        self._last.pop(worker_id, None)

    def fit(self) -> Costs:
        """Fit the costs to the samples; what they cannot tell apart is put down to reading experts."""
        byte_s = self._load_s / self._load_bytes if self._load_bytes else Costs().byte_s
        if not self._samples:
            return Costs(byte_s=byte_s)
        rows, calls, busy = (np.array([sample[i] for sample in self._samples]) for i in (1, 2, 3))
        row_s = _slope(rows, calls, busy)
        activation_s = max(0.0, float((busy - row_s * rows).sum()) / max(1.0, float(calls.sum())))
        return Costs(row_s=row_s, activation_s=activation_s, byte_s=byte_s, is_measured=True)

    def speed_of(self, worker_id: str, costs: Costs) -> float:
        """Say how fast a worker is, the typical one being 1; in steps of a quarter."""
        mine = [sample for sample in self._samples if sample[0] == worker_id]
        if not costs.is_measured or len(mine) < _LEAST_SAMPLES:
            return 1.0
        expected = sum(costs.row_s * rows + costs.activation_s * calls for _, rows, calls, _ in mine)
        speed = expected / sum(busy for *_, busy in mine)
        steps = round(speed / _SPEED_STEP)
        return 1.0 if abs(speed - 1.0) <= _SPEED_STEP else min(_MOST_SPEED, max(1, steps) * _SPEED_STEP)


def _slope(rows: np.ndarray, calls: np.ndarray, busy: np.ndarray) -> float:
    """Least squares for the cost of a row beside that of a call; at least a hundredth of the time goes to rows."""
    least = 0.01 * float(busy.sum()) / max(1.0, float(rows.sum()))
    rr, cc, rc = float((rows * rows).sum()), float((calls * calls).sum()), float((rows * calls).sum())
    determinant = rr * cc - rc * rc
    if determinant <= 1e-3 * rr * cc:  # rows and calls go hand in hand
        return least
    slope = (float((rows * busy).sum()) * cc - float((calls * busy).sum()) * rc) / determinant
    most = float(busy.sum()) / max(1.0, float(rows.sum()))
    return min(most, max(least, slope))
