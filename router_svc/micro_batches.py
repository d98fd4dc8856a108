"""Into how many micro-batches steps are split, chosen by what steps took.

Owns a choice for each size and kind of step. Pure: it is told times. Micro-batches hide the wait for experts behind
the attention of other rows (MegaScale-Infer calls it ping-pong), but read weights once for each of them, so whether
they pay hangs on sizes, links and cores; what a formula says of that is wrong somewhere, what was measured is not.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

MAX_MICRO_BATCHES = 4

_TRIAL_STEPS = 4
_FIRST_TRIAL_AFTER = 8  # steps of a size
_LONGEST_PAUSE = 4096
_PAUSE_GROWS = 8
_LEAST_GAIN = 0.03  # below that, noise decides
_LEAST_HIDEABLE = 0.05


@dataclass(slots=True)
class _Choice:
    """What is known of one size and kind of step. Times are seconds per row."""

    current: int = 1
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_TRIAL_STEPS))
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=_TRIAL_STEPS))  # share of time blocked
    challenger: int = 0  # 0: no trial
    trial: list[float] = field(default_factory=list)
    pause: int = _FIRST_TRIAL_AFTER
    steps_left: int = _FIRST_TRIAL_AFTER  # until the next trial
    is_upward: bool = True  # which way the next trial looks


class MicroBatching:
    """Chooses m for each step; the engine's thread asks before a step and tells its time after it."""

    def __init__(self, fixed: int = 0):
        """`fixed`: always so many, as far as there are rows; 0: as measured."""
        if not 0 <= fixed <= MAX_MICRO_BATCHES:
            raise ValueError(f"{fixed} micro-batches; 1 to {MAX_MICRO_BATCHES}, or 0 for as measured")
        self._fixed = fixed
        self._choices: dict[tuple[bool, int, int], _Choice] = {}

    def choose(self, num_rows: int, *, has_prompts: bool) -> int:
        """Say into how many parts a step of so many rows is split."""
        if self._fixed:
            return min(self._fixed, num_rows)
        choice = self._choice(num_rows, has_prompts)
        if choice.challenger:
            return choice.challenger
        if choice.steps_left <= 0:
            choice.challenger = self._challenger(choice, num_rows)
            if choice.challenger:
                choice.trial = []
                return choice.challenger
        return min(choice.current, num_rows)

    def note(self, num_rows: int, *, has_prompts: bool, num_parts: int, seconds: float, blocked_s: float) -> None:
        """Take what a step took, and how much of that went by waiting for experts."""
        if self._fixed:
            return
        choice = self._choice(num_rows, has_prompts)
        per_row = seconds / num_rows
        if choice.challenger and num_parts == choice.challenger:
            choice.trial.append(per_row)
            self._judge(choice)
        elif num_parts == min(choice.current, num_rows):
            choice.times.append(per_row)
            choice.waits.append(blocked_s / seconds if seconds else 0.0)
            choice.steps_left -= 1

    def _choice(self, num_rows: int, has_prompts: bool) -> _Choice:
        exponent = max(0, num_rows.bit_length() - 3)  # sizes of a kind differ by a seventh at most, small ones by none
        return self._choices.setdefault((has_prompts, exponent, num_rows >> exponent), _Choice())

    def _challenger(self, choice: _Choice, num_rows: int) -> int:
        """Say what to try next to the current choice; 0 where nothing can gain."""
        choice.is_upward = not choice.is_upward if choice.current > 1 else True
        if not choice.is_upward:
            return choice.current - 1
        if choice.current >= min(MAX_MICRO_BATCHES, num_rows):
            choice.steps_left = choice.pause
            return 0
        # At best, all that is waited for goes by while the rest of the step is computed, and as fast as before.
        wait = median(choice.waits)
        if min(wait, 1.0 - wait) < _LEAST_HIDEABLE:
            choice.steps_left = choice.pause
            return 0
        return choice.current + 1

    def _judge(self, choice: _Choice) -> None:
        usual, trial = median(choice.times), choice.trial
        gain = _LEAST_GAIN if choice.challenger > choice.current else 0.0  # where it is all the same, fewer
        is_better = median(trial) < usual * (1.0 - gain)
        if is_better and len(trial) < _TRIAL_STEPS:
            return  # the first step that disappoints ends a trial, a choice needs all of them
        if is_better:
            choice.current, choice.pause = choice.challenger, _FIRST_TRIAL_AFTER
            choice.times = deque(trial, maxlen=_TRIAL_STEPS)
            choice.waits.clear()
        else:
            choice.pause = min(choice.pause * _PAUSE_GROWS, _LONGEST_PAUSE)
        choice.challenger, choice.steps_left = 0, choice.pause


__all__ = ["MAX_MICRO_BATCHES", "MicroBatching"]
