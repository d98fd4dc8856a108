"""Expect the next window's loads from those that were: recent windows count most, and nothing stays as far out.

Owns that expectation. A load that stood out tends to stand out less in the next window; by how much is seen in the last
two (regression towards the mean). Pure. T windows, L layers, E experts of a layer.
"""

from __future__ import annotations

import numpy as np

from collegium.balancing.fleet import Floats

HALF_LIFE_WINDOWS = 1.0  # longer ones are behind where topics drift: docs/lab-notes.md
_LEAST_PERSISTENCE = 0.5


def forecast(history: Floats, *, half_life_windows: float = HALF_LIFE_WINDOWS) -> Floats:
    """Give the loads to plan for, [L, E], from history [T, L, E], oldest first, T at least 1."""
    ages = np.arange(len(history) - 1, -1, -1)
    weights = 0.5 ** (ages / half_life_windows)
    expected = np.tensordot(weights / weights.sum(), history, 1)
    mean = expected.mean(1, keepdims=True)
    return mean + persistence(history) * (expected - mean)


def persistence(history: Floats) -> float:
    """Say how much of an expert's distance from its layer's mean is left a window later: 0.5 to 1; 1 for one window."""
    if len(history) < 2:
        return 1.0
    before, after = (one - one.mean(1, keepdims=True) for one in history[-2:])
    size = float((before**2).sum())
    slope = float((before * after).sum()) / size if size > 0 else 1.0
    return float(np.clip(slope, _LEAST_PERSISTENCE, 1.0))
