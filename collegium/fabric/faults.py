"""What the turns of a loop raise: a loop that one exception ends would end its whole process.

Owns the counting, the saying (each kind once) and the pause before the next try. Pure: told the time.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

_PAUSE_S = (0.1, 5.0)
_SAY_AGAIN_S = 600.0


class Faults:
    """The faults of one loop, or of one part of it. Owned by its event loop."""

    def __init__(
        self,
        log: Any,
        what: str,
        *,
        longest_pause_s: float = _PAUSE_S[1],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """log: where faults are written, a logger of collegium.fabric.logs. what: the loop, in words."""
        self.num_faults = 0
        self.again_s = 0.0  # when the next try is due, by the clock
        self._log, self._what, self._clock = log, what, clock
        self._longest_pause_s = longest_pause_s
        self._pause_s = 0.0
        self._said: dict[tuple[str, str, int], float] = {}  # when a kind was written last

    def note(self, error: Exception) -> float:
        """Take what a turn raised, while it is being handled. Returns the pause before the next try, in seconds."""
        self.num_faults += 1
        now_s = self._clock()
        self._pause_s = min(2 * self._pause_s or _PAUSE_S[0], self._longest_pause_s)
        self.again_s = now_s + self._pause_s
        frames = traceback.extract_tb(error.__traceback__)
        kind = (type(error).__name__, frames[-1].filename if frames else "", (frames[-1].lineno or 0) if frames else 0)
        if now_s - self._said.get(kind, -_SAY_AGAIN_S) >= _SAY_AGAIN_S:
            self._said[kind] = now_s
            self._log.exception(f"{self._what} failed; it is tried again", retry_in_s=self._pause_s)
        return self._pause_s

    def clear(self) -> None:
        """Note a turn that went well."""
        self._pause_s = self.again_s = 0.0
