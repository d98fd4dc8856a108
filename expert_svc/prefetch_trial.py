"""Find out whether prefetching pays, by doing without it now and then.

Pure: times are handed in. What counts is how long a layer takes to come round again while tokens are decoded, the
router's share included: a prefetch that moves more bytes than it saves shows there and nowhere else.
"""

from statistics import median

_ROUNDS_PER_BLOCK = 4  # token cycles in one mode before the other has its turn
_BLOCKS_PER_TRIAL = 8  # of each mode
_PAUSE_S = 20.0  # between trials, doubled while they agree
_LONGEST_PAUSE_S = 320.0
_IDLE_FACTOR = 5.0  # a round that took so many times the typical one was idle, not slow


class PrefetchTrial:
    """Switches prefetching on and off by what rounds take; on until a trial says otherwise."""

    def __init__(self, *, is_on: bool = True):
        self.is_on = is_on
        self.num_trials = 0
        self._verdict = is_on
        self._rounds: dict[bool, list[float]] = {True: [], False: []}
        self._last: tuple[float, int] | None = None  # when layer `_layer` was visited last, with how many rows
        self._layer = 0
        self._num_rounds = 0
        self._pause_s = _PAUSE_S
        self._resumes_s = 0.0
        self._is_trying = True

    def note(self, now_s: float, layer: int, num_rows: int) -> None:
        """Hear of a visit of a layer by so many decoding rows."""
        if layer != self._layer:
            return
        last, self._last = self._last, (now_s, num_rows)
        if not self._is_trying:
            if now_s >= self._resumes_s:
                self._is_trying = True
            return
        if last is None or not num_rows or last[1] != num_rows:
            return
        self._num_rounds += 1
        at = self._num_rounds % _ROUNDS_PER_BLOCK
        if at != 1:  # the first round of a block still has the other mode's buffer
            self._rounds[self.is_on].append(now_s - last[0])
        if at:
            return
        self.is_on = not self.is_on
        if self._num_rounds >= 2 * _BLOCKS_PER_TRIAL * _ROUNDS_PER_BLOCK:
            self._decide(now_s)

    def _decide(self, now_s: float) -> None:
        typical = median(self._rounds[True] + self._rounds[False])
        kept = {mode: [r for r in rounds if r < _IDLE_FACTOR * typical] for mode, rounds in self._rounds.items()}
        verdict = self._verdict
        if kept[True] and kept[False]:
            verdict = median(kept[True]) <= median(kept[False])
        self._pause_s = min(_LONGEST_PAUSE_S, 2 * self._pause_s) if verdict == self._verdict else _PAUSE_S
        self.is_on = self._verdict = verdict
        self.num_trials += 1
        self._rounds = {True: [], False: []}
        self._num_rounds = 0
        self._is_trying, self._resumes_s = False, now_s + self._pause_s
