"""Does it pay? Two ways of doing something take turns, and what was measured of each decides.

Owns whose turn it is, the verdict, and when it is tried again: a verdict that is confirmed is tried ever more rarely.
Pure: times are handed in. What is measured, and when a turn is over, is for the owner of a trial to say.
"""

from collections.abc import Callable

_PAUSE_S = (20.0, 320.0)  # between trials, doubled while they agree


class Trial:
    """Switches something on and off; as it was at first until a trial says otherwise."""

    def __init__(self, pays: Callable[[list[float], list[float]], bool | None], *, is_on: bool, num_turns: int):
        """pays(with it, without it): whether it pays, by what was measured of each in `num_turns` turns; None: no
        telling, and the verdict stands.
        """
        self.is_on = is_on
        self.num_trials = 0
        self._pays, self._num_turns = pays, num_turns
        self._verdict = is_on
        self._measured: dict[bool, list[float]] = {True: [], False: []}
        self._turns_left = 2 * num_turns
        self._pause_s = _PAUSE_S[0]
        self._resumes_s = 0.0

    def is_resting(self, now_s: float) -> bool:
        """True between two trials, while the verdict of the last one is acted on."""
        return now_s < self._resumes_s

    def add(self, value: float) -> None:
        """Take what was measured of the way that has its turn."""
        self._measured[self.is_on].append(value)

    def end_turn(self, now_s: float) -> None:
        """Let the other way have its turn; after the last one, decide."""
        self.is_on = not self.is_on
        self._turns_left -= 1
        if self._turns_left:
            return
        pays = self._pays(self._measured[True], self._measured[False])
        verdict = self._verdict if pays is None else pays
        self._pause_s = min(_PAUSE_S[1], 2 * self._pause_s) if verdict == self._verdict else _PAUSE_S[0]
        self.is_on = self._verdict = verdict
        self.num_trials += 1
        self._measured = {True: [], False: []}
        self._turns_left, self._resumes_s = 2 * self._num_turns, now_s + self._pause_s
