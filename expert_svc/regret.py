"""How the buffer's hits compare with Belady's MIN, which knows the future, on a sample of recent decode visits.

Owns the sample: the data thread adds to it, a reader of metrics replays it now and then. The first half of the sample
fills MIN's buffer, the second half is judged.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from collegium.buffering.belady import Min
from collegium.buffering.replay import Capacity, Scope, replay
from collegium.buffering.visits import Visit

_SAMPLE_VISITS = 2048
_LEAST_VISITS = 256
_EVERY_S = 30.0


class RegretSample:
    """The last visits, and what they came to."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        is_selective: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`num_slots` experts can be resident at once; `is_selective`: the policy may refuse to keep one."""
        self._is_selective = is_selective
        self._visits: deque[tuple[int, tuple[int, ...], int]] = deque(maxlen=_SAMPLE_VISITS)
        sizes = (1,) * num_layers
        self._capacity = Capacity(scope=Scope.POOL, sizes=sizes, num_experts=num_experts, room=(num_slots,))
        self._clock, self._read_s, self._ratio = clock, float("-inf"), None
        self._lock = threading.Lock()

    def note(self, layer: int, experts: Sequence[int], num_hits: int) -> None:
        """Take one visit of decoding rows into the sample."""
        self._visits.append((layer, tuple(experts), num_hits))

    def min_ratio(self) -> float | None:
        """Give hits over MIN's on the sample's second half; None while it is short. Replayed at most twice a minute."""
        with self._lock:
            if self._clock() - self._read_s >= _EVERY_S:
                self._read_s = self._clock()
                self._ratio = self._judge(list(self._visits))
            return self._ratio

    def _judge(self, sample: list[tuple[int, tuple[int, ...], int]]) -> float | None:
        if len(sample) < _LEAST_VISITS:
            return None
        half = len(sample) // 2
        visits = [
            Visit(is_decode=at >= half, layer=layer, experts=experts, counts=(1,) * len(experts), num_tokens=1)
            for at, (layer, experts, _) in enumerate(sample)
        ]
        best = replay(visits, Min(visits, is_selective=self._is_selective), self._capacity).decode_hits
        return sum(num_hits for _, _, num_hits in sample[half:]) / best if best else None
