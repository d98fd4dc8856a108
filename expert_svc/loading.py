"""Loads under way: what waits to be loaded, the threads that load, and what has landed.

Owns the queue between the data thread, which asks, and the loading threads, which fill slots. What was asked for by
rows that wait goes before everything else, and the thread that waits may load it itself: no hand-off where none is
needed. Knows nothing of residency.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from collegium.buffering.policies import ExpertId
from collegium.model.architectures import CheckpointError
from collegium.model.experts import PackedExpert
from expert_svc.tiers import Source, Tier

# Below this a load is over before another thread has woken up to do it (measured: 10 to 60 us, with the interpreter's
# lock to be had first).
_WORTH_A_WAKE_S = 100e-6
# Above this the thread that waits does not load itself: it would not hear hints and dispatches for so long.
_TOO_LONG_TO_HELP_S = 2e-3


class Purpose(StrEnum):
    """What becomes of an expert when it has landed."""

    RESIDENT = "resident"
    STREAM = "stream"  # for the rows that wait, and then gone
    PREFETCH = "prefetch"  # held a while for rows that are expected


@dataclass(slots=True, eq=False)
class Load:
    """One expert on its way into one slot. `tier` or `error` is set when it has ended."""

    expert_id: ExpertId
    slot: PackedExpert
    purpose: Purpose
    tier: Tier | None = None
    error: Exception | None = None


class Loads:
    """Loads experts in `num_threads` threads, and in those that ask for it."""

    def __init__(self, source: Source, *, num_threads: int):
        self._source = source
        self.on_landed: Callable[[], None] = lambda: None  # called by the thread that loaded, after each load
        self._urgent: deque[Load] = deque()
        self._others: deque[Load] = deque()
        self._ended: deque[Load] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.mean_s = 0.0  # of one load, over the last ones
        self.total_s = 0.0  # of all loads; what two threads add at the same moment may be lost
        self._threads = [threading.Thread(target=self._run, name=f"load-{i}", daemon=True) for i in range(num_threads)]
        for thread in self._threads:
            thread.start()

    @property
    def can_help(self) -> bool:
        """Whether the thread that waits should load too."""
        return self.mean_s < _TOO_LONG_TO_HELP_S or not self._threads

    def submit(self, load: Load, *, is_urgent: bool) -> None:
        """Queue a load; after urgent ones call `wake`."""
        with self._changed:
            (self._urgent if is_urgent else self._others).append(load)
            if not is_urgent:
                self._changed.notify()

    def wake(self, num_awaited: int, *, has_other_work: bool) -> None:
        """Wake threads for urgent loads, as far as they are faster than the asking thread, which will call `help`."""
        if self.mean_s < _WORTH_A_WAKE_S:
            return
        num_for_others = num_awaited if has_other_work or not self.can_help else num_awaited - 1
        if num_for_others > 0:
            with self._changed:
                self._changed.notify(num_for_others)

    def hasten(self, load: Load) -> None:
        """Put a load that waits before all others; one that has begun goes on as it is."""
        with self._changed:
            if load in self._others:
                self._others.remove(load)
                self._urgent.append(load)

    def withdraw(self, load: Load) -> bool:
        """Take back a load that has not begun. Returns whether it was."""
        with self._changed:
            for waiting in (self._others, self._urgent):
                if load in waiting:
                    waiting.remove(load)
                    return True
        return False

    def help(self) -> bool:
        """Load the next urgent expert in this thread. Returns whether there was one."""
        with self._changed:
            load = self._urgent.popleft() if self._urgent else None
        if load is None:
            return False
        self._load(load)
        return True

    def load_here(self, load: Load) -> None:
        """Load one that was never queued in this thread, and tell whoever may wait for it."""
        self._load(load)
        self.on_landed()

    def ended(self) -> list[Load]:
        """Take what has ended since the last call."""
        ended: list[Load] = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    def close(self) -> None:
        """End the threads after what they are loading; what waits is forgotten."""
        with self._changed:
            self._is_closed = True
            self._urgent.clear()
            self._others.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(5.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._urgent or self._others or self._is_closed):
                    self._changed.wait()
                if self._is_closed:
                    return
                load = (self._urgent or self._others).popleft()
            self._load(load)
            self.on_landed()

    def _load(self, load: Load) -> None:
        began_s = time.monotonic()
        try:
            load.tier = self._source.fill(load.expert_id, load.slot)
        except CheckpointError as error:
            load.error = error
        except Exception as error:  # the load's own end, never the thread's
            layer, expert = load.expert_id
            why = str(error) or type(error).__name__
            load.error = CheckpointError(f"expert {expert} of MoE layer {layer} cannot be loaded: {why}")
            load.error.__cause__ = error
        took_s = time.monotonic() - began_s
        self.total_s += took_s
        self.mean_s += (took_s - self.mean_s) / 8 if self.mean_s else took_s
        self._ended.append(load)
        if not self.can_help:  # it could when `wake` relied on that
            with self._changed:
                self._changed.notify(len(self._urgent))
