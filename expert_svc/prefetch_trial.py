"""Find out whether prefetching pays, by doing without it now and then.

Owns what is measured: how long a layer takes to come round again while tokens are decoded, the router's share included.
A prefetch that moves more bytes than it saves shows there and nowhere else. Pure: times are handed in.
"""

from statistics import median

from expert_svc.trial import Trial

_ROUNDS_PER_TURN = 4  # token cycles in one mode before the other has its turn
_TURNS_PER_TRIAL = 8  # of each mode
_IDLE_FACTOR = 5.0  # a round that took so many times the typical one was idle, not slow


class PrefetchTrial:
    """Switches prefetching on and off by what rounds take; on until a trial says otherwise."""

    def __init__(self, *, is_on: bool = True):
        self._trial = Trial(_pays, is_on=is_on, num_turns=_TURNS_PER_TRIAL)
        self._last: tuple[float, int] | None = None  # when the first layer was visited last, with how many rows
        self._num_rounds = 0

    @property
    def is_on(self) -> bool:
        """True if what is hinted is to be loaded now."""
        return self._trial.is_on

    @property
    def num_trials(self) -> int:
        """How often it was decided."""
        return self._trial.num_trials

    def note(self, now_s: float, layer: int, num_rows: int) -> None:
        """Hear of a visit of a layer by so many decoding rows."""
        if layer != 0:
            return
        last, self._last = self._last, (now_s, num_rows)
        if self._trial.is_resting(now_s) or last is None or not num_rows or last[1] != num_rows:
            return
        self._num_rounds += 1
        at = self._num_rounds % _ROUNDS_PER_TURN
        if at != 1:  # the first round of a turn still has the other mode's buffer
            self._trial.add(now_s - last[0])
        if not at:
            self._trial.end_turn(now_s)


def _pays(with_it: list[float], without_it: list[float]) -> bool | None:
    longest_s = _IDLE_FACTOR * median(with_it + without_it)
    on, off = ([seconds for seconds in rounds if seconds < longest_s] for rounds in (with_it, without_it))
    return median(on) <= median(off) if on and off else None
