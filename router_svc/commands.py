"""What other threads ask of the engine's thread: commands, obeyed in the order in which they were given.

Owns the queue, whether anything is left to do, and what was refused. A command is a value; what it does is the
engine's to say.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from router_svc.sequence import Sequence

Ref = tuple[str, int | None]  # a request, and one choice of it or all


@dataclass(frozen=True, slots=True)
class Attach:
    """Begin to report to an owner."""

    name: ClassVar[str] = "attach"
    owner: int


@dataclass(frozen=True, slots=True)
class Detach:
    """End all of an owner's sequences and report to it no more."""

    name: ClassVar[str] = "detach"
    owner: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Take the choices of one request."""

    name: ClassVar[str] = "submit"
    sequences: Seq[Sequence]


@dataclass(frozen=True, slots=True)
class Cancel:
    """End requests or choices of an owner."""

    name: ClassVar[str] = "cancel"
    owner: int
    refs: Seq[Ref]


@dataclass(frozen=True, slots=True)
class Pause:
    """Hold requests or choices of an owner, or let them go on."""

    owner: int
    refs: Seq[Ref]
    is_paused: bool

    @property
    def name(self) -> str:
        """What was asked for, in a word."""
        return "pause" if self.is_paused else "unpause"


@dataclass(frozen=True, slots=True)
class Call:
    """Call a function from the engine's thread."""

    name: ClassVar[str] = "call"
    run: Callable[[], object]


Command = Attach | Detach | Submit | Cancel | Pause | Call


class Commands:
    """Given by any thread, obeyed by the engine's."""

    def __init__(self) -> None:
        self.refused = Counter[str]()  # submissions that were not taken, by reason
        self.is_served = False  # whether the engine's thread runs
        self.is_stopping = False
        self._queue: deque[Command] = deque()
        self._wakeup = threading.Condition()
        self._is_idle = threading.Event()  # no sequence is left, waits to be taken, or has news to be told
        self._is_idle.set()
        self._has_ended = False

    # --- from any thread ---

    def __len__(self) -> int:
        """Count what was asked for and is not begun."""
        return len(self._queue)

    def attach(self, owner: int) -> None:
        """Begin to report to an owner; the first report, empty but for the load, comes at once."""
        self._post(Attach(owner))

    def detach(self, owner: int) -> None:
        """End all of an owner's sequences and report to it no more."""
        self._post(Detach(owner))

    def submit(self, sequences: Seq[Sequence]) -> None:
        """Take the choices of one request."""
        self._post(Submit(sequences))

    def cancel(self, owner: int, refs: Seq[Ref]) -> None:
        """End requests or choices of an owner with Finish.CANCELLED; their blocks are free before the next step.

        Those that are not known are passed over.
        """
        if refs:
            self._post(Cancel(owner, refs))

    def pause(self, owner: int, refs: Seq[Ref], *, is_paused: bool = True) -> None:
        """Hold requests or choices of an owner and compute nothing for them, or let them go on.

        Those that are not known are passed over.
        """
        if refs:
            self._post(Pause(owner, refs, is_paused))

    def call(self, run: Callable[[], object]) -> None:
        """Have something called from the engine's thread, after what was asked for before."""
        self._post(Call(run))

    def stop(self) -> None:
        """Have the engine end after the step at hand."""
        with self._wakeup:
            self.is_stopping = True
            self._wakeup.notify()

    def wait_idle(self, timeout_s: float) -> bool:
        """Block until every sequence that was submitted has ended and its end was delivered, or the time is over.

        Returns True if the engine is idle.
        """
        return self._is_idle.wait(timeout_s)

    def _post(self, command: Command) -> None:
        with self._wakeup:
            if isinstance(command, Submit) and not self._has_ended:
                self._is_idle.clear()
            self._queue.append(command)
            self._wakeup.notify()

    # --- the engine's thread ---

    def take(self) -> Iterator[Command]:
        """Take the commands that are there; those that come meanwhile have the next turn."""
        for _ in range(len(self._queue)):
            yield self._queue.popleft()

    def rest(self, timeout_s: float, *, has_work: bool) -> None:
        """Wait until something is asked for, or the time is over; has_work: whether a sequence is left."""
        with self._wakeup:
            if self._queue:
                return
            if not has_work:
                self._is_idle.set()
            if not self.is_stopping:
                self._wakeup.wait(timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Wait for the time, or until something new is asked for."""
        with self._wakeup:
            self._wakeup.wait(timeout_s)

    def end(self) -> None:
        """Note that nothing will be obeyed any more."""
        with self._wakeup:
            self._has_ended, self.is_served = True, False
            self._is_idle.set()  # nothing will come of what is left
