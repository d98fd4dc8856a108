"""Whether it pays that dispatches wait for other routers' rows of their layer, found out by doing without now and then.

Pure: times are handed in. Routers whose steps pass a worker's layers at different times each have the same experts
read for themselves. Holding back the one in front for a part of a layer's time, again and again, brings them together
within a step; from then on they are answered together and stay so, and each expert is read once for all of them. How
long is the native end's to say (collegium_join_until in worker_end.c).
"""

from collections import deque
from collections.abc import Collection
from statistics import median

_ROUNDS_PER_BLOCK = 8  # of each router in one mode before the other has its turn
_SETTLING_ROUNDS = 3  # of a block, not counted: routers still come together, or part
_BLOCKS_PER_TRIAL = 4  # of each mode
_WORTH = 0.97  # of the rate without waiting: experts that are read once leave memory to others
_PAUSE_S = (20.0, 320.0)  # between trials, doubled while they agree


class JoinTrial:
    """Switches waiting on and off by how many rows are decoded in a second."""

    def __init__(self, *, is_on: bool = True, is_fixed: bool = False):
        """Begin with waiting on or off; `is_fixed`: for good."""
        self._is_on = self._verdict = is_on
        self._is_fixed = is_fixed
        self.num_trials = 0
        self._rates: dict[bool, deque[float]] = {mode: deque(maxlen=_BLOCKS_PER_TRIAL) for mode in (True, False)}
        self._rounds: dict[str, int] = {}
        self._rows = 0
        self._since_s = 0.0
        self._is_counting = False
        self._pause_s = _PAUSE_S[0]
        self._resumes_s = 0.0

    @property
    def is_on(self) -> bool:
        """Whether rows wait."""
        return self._is_on

    def note(self, router_id: str, active: Collection[str], num_rows: int, now_s: float) -> bool:
        """Hear that a router begins a step of so many decoding rows while some are active, itself among them; returns
        whether to wait from now on.
        """
        if self._is_fixed or now_s < self._resumes_s:
            return self._is_on
        if len(active) < 2 or not num_rows or any(one not in active for one in self._rounds):
            self._begin_block()  # others than before: what was counted says nothing
            return self._is_on
        self._rounds[router_id] = self._rounds.get(router_id, 0) + 1
        if self._is_counting:
            self._rows += num_rows
        rounds = min(self._rounds.get(one, 0) for one in active)
        if not self._is_counting and rounds >= _SETTLING_ROUNDS:
            self._is_counting, self._since_s = True, now_s
        elif self._is_counting and rounds >= _ROUNDS_PER_BLOCK:
            self._rates[self._is_on].append(self._rows / (now_s - self._since_s))
            self._is_on = not self._is_on
            self._begin_block()
            if all(len(rates) == _BLOCKS_PER_TRIAL for rates in self._rates.values()):
                self._decide(now_s)
        return self._is_on

    def _begin_block(self) -> None:
        self._rounds.clear()
        self._rows, self._is_counting = 0, False

    def _decide(self, now_s: float) -> None:
        verdict = median(self._rates[True]) >= _WORTH * median(self._rates[False])
        self._pause_s = min(_PAUSE_S[1], 2 * self._pause_s) if verdict == self._verdict else _PAUSE_S[0]
        self._is_on = self._verdict = verdict
        self.num_trials += 1
        for rates in self._rates.values():
            rates.clear()
        self._resumes_s = now_s + self._pause_s
