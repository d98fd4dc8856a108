"""How long a dispatch waits for other routers' rows of its layer, and whether waiting pays at all.

Pure: times are handed in. Routers whose steps pass a worker's layers at different times each have the same experts
read for themselves. Holding back the one in front for a part of a layer's time, again and again, brings them together
within a step; from then on they are answered together and stay so, and each expert is read once for all of them.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from statistics import median

_LONGEST_WAIT = 0.5  # of the time that a router takes from layer to layer
_LATE = 1.25  # an expected dispatch may take so much longer than usual
_ACTIVE = 6.0  # a router that has not been heard of for so many of its layers is idle
_FORGOTTEN_S = 60.0
_ROUNDS_PER_BLOCK = 8  # of each router in one mode before the other has its turn
_SETTLING_ROUNDS = 3  # of a block, not counted: routers still come together, or part
_BLOCKS_PER_TRIAL = 4  # of each mode
_WORTH = 0.97  # of the rate without waiting: experts that are read once leave memory to others
_PAUSE_S = (20.0, 320.0)  # between trials, doubled while they agree


@dataclass(slots=True)
class _Router:
    """Where a router was met last, and how fast it goes."""

    layer: int
    at_s: float
    layer_s: float = 0.0  # from one layer's dispatch to the next one's


class JoinWait:
    """One worker's waiting. Owned by the computing thread."""

    def __init__(self, num_layers: int, *, is_on: bool = True, is_fixed: bool = False):
        """`is_fixed`: as it is, without trials."""
        self._num_layers = num_layers
        self.is_on, self._is_fixed = is_on, is_fixed
        self._routers: dict[str, _Router] = {}
        self._trial = JoinTrial(is_on=is_on)

    @property
    def has_company(self) -> bool:
        """Whether more than one router has been heard of, within the minute before a step began."""
        return len(self._routers) > 1

    def note(self, router_id: str, layer: int, num_decode_rows: int, at_s: float) -> None:
        """Hear of a dispatch that has arrived."""
        router = self._routers.get(router_id)
        if router is None:
            self._routers[router_id] = _Router(layer=layer, at_s=at_s)
            return
        if layer == 0:
            for one in [one for one, state in self._routers.items() if at_s - state.at_s > _FORGOTTEN_S]:
                if one != router_id:
                    del self._routers[one]
        if len(self._routers) == 1:
            router.layer, router.at_s = layer, at_s
            return
        gap_s = at_s - router.at_s
        if layer == (router.layer + 1) % self._num_layers:
            usual_s = router.layer_s or gap_s
            router.layer_s = min(0.8 * usual_s + 0.2 * gap_s, 2 * usual_s)  # one long pause is no habit
        router.layer, router.at_s = layer, at_s
        if layer == 0 and not self._is_fixed:
            active = [one for one, state in self._routers.items() if at_s - state.at_s < _ACTIVE * state.layer_s]
            self.is_on = self._trial.note(router_id, active, num_decode_rows, at_s)

    def met(self, router_id: str) -> tuple[int, int, int]:
        """Where a router was met last: layer, when in ns, and ns from layer to layer; (-1, 0, 0): never."""
        router = self._routers.get(router_id)
        if router is None:
            return -1, 0, 0
        return router.layer, int(router.at_s * 1e9), int(router.layer_s * 1e9)

    def until(self, layer: int, here: Collection[str], arrived_s: float) -> float:
        """Say until when a dispatch that arrived at `arrived_s` waits; a time that has passed: no longer.

        `here`: the routers that wait for its layer, its own included.
        """
        if not self.is_on or not self.has_company:
            return 0.0
        layer_s = max((self._routers[one].layer_s for one in here if one in self._routers), default=0.0)
        longest_s = arrived_s + _LONGEST_WAIT * layer_s
        until_s = 0.0
        for router_id, router in self._routers.items():
            if router_id in here or not router.layer_s:
                continue
            behind = (layer - router.layer) % self._num_layers
            if 1 <= behind <= self._num_layers // 2 and arrived_s - router.at_s < _ACTIVE * router.layer_s:
                expected_s = router.at_s + behind * _LATE * router.layer_s
                until_s = max(until_s, min(longest_s, expected_s))
        return until_s


class JoinTrial:
    """Switches waiting on and off by how many rows are decoded in a second."""

    def __init__(self, *, is_on: bool):
        self._is_on = self._verdict = is_on
        self.num_trials = 0
        self._rates: dict[bool, deque[float]] = {mode: deque(maxlen=_BLOCKS_PER_TRIAL) for mode in (True, False)}
        self._rounds: dict[str, int] = {}
        self._rows = 0
        self._since_s = 0.0
        self._is_counting = False
        self._pause_s = _PAUSE_S[0]
        self._resumes_s = 0.0

    def note(self, router_id: str, active: Collection[str], num_rows: int, now_s: float) -> bool:
        """Hear that a router begins a step of so many decoding rows; returns whether to wait from now on."""
        if now_s < self._resumes_s:
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
