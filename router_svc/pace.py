"""How many rows a step may have while several callers are served, so that none waits long for another's prompt.

Owns what steps took. Pure: it is told times. A caller that decodes waits for every step whole, so a step full of
prompt rows is what the others' time between tokens is made of. Sarathi-Serve (Agrawal et al., OSDI 2024) derives a
budget of tokens from a bound on that time, by a profile made beforehand; here the profile is the steps themselves.
"""

from __future__ import annotations

LEAST_ROWS = 32  # of a prompt in a step, however slow steps are: each reads the experts' weights anew
_OVER_DECODE = 3.0  # where decoding alone takes long, a step with prompts may take so many times as long
_TAKEN = 0.25  # how far one step moves the estimate


class StepPace:
    """Bounds steps by what steps took; the engine's thread asks before a step and tells its time after it."""

    def __init__(self, bound_s: float, max_rows: int):
        """`bound_s`: how long a step with prompts should take at most, in seconds; 0: any time."""
        if bound_s < 0 or max_rows < 1:
            raise ValueError(f"a bound of {bound_s} s and {max_rows} rows; at least 0 and 1")
        self._bound_s, self._max_rows = bound_s, max_rows
        self._row_s = 0.0  # what a row of a step with prompts takes, in seconds; 0: not known
        self._decode_s = 0.0  # what a step without prompts takes

    @property
    def max_rows(self) -> int:
        """Rows of the next step, those that decode among them."""
        if not self._bound_s or not self._row_s:
            return self._max_rows
        bound_s = max(self._bound_s, _OVER_DECODE * self._decode_s)
        return min(self._max_rows, max(LEAST_ROWS, int(bound_s / self._row_s)))

    def note(self, num_rows: int, *, has_prompts: bool, seconds: float) -> None:
        """Take what a step took."""
        if not has_prompts:
            self._decode_s += _TAKEN * (seconds - self._decode_s) if self._decode_s else seconds
        elif 2 * num_rows >= min(self.max_rows, 2 * LEAST_ROWS):
            # What a small step takes is mostly the same for any number of rows: it says little of a row.
            row_s = seconds / num_rows
            self._row_s += _TAKEN * (row_s - self._row_s) if self._row_s else row_s
