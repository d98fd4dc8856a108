"""What gates chose, window by window: routers' counts since their start become the load of stretches of time.

Owns the windows, and that no sum over them wraps. Pure: told the time. A window in which nothing was chosen says
nothing and is not kept.
L layers, E experts of a layer, T windows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collegium.v1 import balancer_pb2 as pb

Counts = NDArray[np.int64]
NUM_WINDOWS = 12  # that are kept, and remembered
# Choices of one expert in one window, of all routers together; what is above is not counted. The sum over a dozen
# windows, both kinds of rows and 4,096 experts is below 2^62.
MAX_IN_WINDOW = 2**44


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """One stretch of time: choices by decoding rows and by rows of prompts, and steps with any row, each [L, E]."""

    unix_ms: int
    length_s: float
    decode: Counts
    prefill: Counts
    activations: Counts

    @property
    def tokens(self) -> Counts:
        """Choices by all rows, [L, E]."""
        return self.decode + self.prefill


def read_layers(layers: Sequence[pb.LayerLoad]) -> Counts:
    """Read counts by kind, [3, L, E]; ValueError where they have no common shape."""
    rows = [[list(one.decode_tokens), list(one.prefill_tokens), list(one.activations)] for one in layers]
    if not rows or len({len(kind) for layer in rows for kind in layer}) != 1:
        raise ValueError("layers differ in their number of experts")
    return np.asarray(rows, np.int64).transpose(1, 0, 2)


def write_layers(counts: Counts) -> list[pb.LayerLoad]:
    """Write counts by kind, [3, L, E]."""
    return [
        pb.LayerLoad(decode_tokens=decode, prefill_tokens=prefill, activations=activations)
        for decode, prefill, activations in zip(*counts.tolist(), strict=True)
    ]


class LoadWindows:
    """The newest windows, and the one that fills."""

    def __init__(self, *, window_s: float, num_kept: int) -> None:
        self._window_s = window_s
        self._windows: deque[Window] = deque(maxlen=num_kept)
        self._heard: dict[str, Counts | None] = {}  # by router, its counts when it last reported; None: begins at 0
        self._filling: Counts | None = None  # [3, L, E]
        self._began_s: float | None = None

    @property
    def windows(self) -> Sequence[Window]:
        """What is kept, oldest first."""
        return tuple(self._windows)

    def restore(self, windows: Iterable[Window], shape: tuple[int, int]) -> None:
        """Take up what is remembered, oldest first, of models of this shape [L, E]; others' loads say nothing."""
        self._windows.extend(window for window in windows if window.decode.shape == shape)

    def expect(self, router_id: str) -> None:
        """Hear of a router that has just started: all that it will report is news."""
        self._heard.setdefault(router_id, None)

    def forget(self, router_id: str) -> None:
        """Hear of a router that is gone."""
        self._heard.pop(router_id, None)

    def clear(self) -> None:
        """Forget all: the model is another one."""
        self._windows.clear()
        self._heard.clear()
        self._filling = self._began_s = None

    def report(self, router_id: str, counts: Counts, now_s: float) -> None:
        """Take a router's counts since its start, [3, L, E].

        The first report of a router that was not expected only says where it stands: it was counted before.
        """
        if self._began_s is None:
            self._began_s = now_s
        is_known = router_id in self._heard
        before = self._heard.get(router_id)
        self._heard[router_id] = counts
        if not is_known:
            return
        news = counts if before is None or before.shape != counts.shape or (counts < before).any() else counts - before
        if self._filling is None or self._filling.shape != news.shape:
            self._filling = np.zeros_like(news)
        # Both are at most MAX_CHOICES, so the sum does not wrap before it is cut.
        self._filling = np.minimum(self._filling + news, MAX_IN_WINDOW)

    def roll(self, now_s: float, unix_ms: int) -> Window | None:
        """Close the window that fills when its time is over and give it; None where it is not or nothing was chosen."""
        if self._began_s is None or now_s - self._began_s < self._window_s:
            return None
        began_s, self._began_s = self._began_s, now_s
        filled, self._filling = self._filling, None
        if filled is None or not filled[:2].any():
            return None
        decode, prefill, activations = filled
        window = Window(
            unix_ms=unix_ms, length_s=now_s - began_s, decode=decode, prefill=prefill, activations=activations
        )
        self._windows.append(window)
        return window


def to_message(window: Window) -> pb.LoadWindow:
    """Write a window."""
    counts = np.stack([window.decode, window.prefill, window.activations])
    return pb.LoadWindow(unix_ms=window.unix_ms, length_ms=round(window.length_s * 1e3), layers=write_layers(counts))


def from_message(message: pb.LoadWindow) -> Window:
    """Read a window; ValueError where it has no shape."""
    decode, prefill, activations = read_layers(message.layers)
    return Window(
        unix_ms=message.unix_ms,
        length_s=message.length_ms / 1e3,
        decode=decode,
        prefill=prefill,
        activations=activations,
    )
