"""One supervised process: started on a leash, its lines relayed, its deaths counted.

Owns the process and the thread that reads its output. When to start it again is decided by RestartPolicy, which is
pure.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collegium.fabric.errors import Internal

_LEASH = Path(__file__).with_name("leash.py")
_TAIL_LINES = 60
_FORGIVEN_S = 60.0  # without a death, after which the next one is the first again
_BACKOFF_S = (0.1, 30.0)


class RestartPolicy:
    """Says how long to wait before a restart: three times as long after each death, up to 30 s.

    num_deaths: in a row, the newest one included; a minute without a death ends a row. num_recent: within a minute.
    """

    def __init__(self) -> None:
        self.num_deaths = 0
        self._deaths_s: collections.deque[float] = collections.deque()

    @property
    def num_recent(self) -> int:
        """Deaths within the minute before the newest one, which counts."""
        return len(self._deaths_s)

    def after_death(self, now_s: float) -> float:
        """Note a death; returns the pause before the restart, in seconds."""
        is_first = not self._deaths_s or now_s - self._deaths_s[-1] >= _FORGIVEN_S
        self.num_deaths = 1 if is_first else self.num_deaths + 1
        self._deaths_s.append(now_s)
        while self._deaths_s[0] <= now_s - _FORGIVEN_S:
            self._deaths_s.popleft()
        return min(_BACKOFF_S[0] * 3.0 ** min(self.num_deaths - 1, 10), _BACKOFF_S[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What to run: a name for logs, the arguments, and what the environment has beside ours."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]


class ChildFailed(Internal):
    """A process of the cluster ended and is not started again; the message holds its last lines.

    summary: the message without them, for where they were relayed already. exit_status: negative for a signal.
    """

    def __init__(self, summary: str, *, last_lines: Sequence[str], has_relayed_lines: bool, exit_status: int) -> None:
        lines = "".join(f"\n  {line}" for line in last_lines)
        super().__init__(summary + (f"; its last lines:{lines}" if lines else ""))
        self.summary = summary
        self.has_relayed_lines = has_relayed_lines
        self.exit_status = exit_status


class Child:
    """A process on a leash. start() must be called from the main thread: the leash is tied to the calling thread."""

    def __init__(self, command: Command, relay: Callable[[str, str], None]) -> None:
        self.command = command
        self.has_served = False
        self.num_starts = 0
        self.policy = RestartPolicy()
        self.restart_at_s: float | None = None
        self.lost_at_s: float | None = None  # when it died while it served, until it serves again
        self._relay = relay
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    @property
    def name(self) -> str:
        """Its name, such as "worker-0"."""
        return self.command.name

    @property
    def pid(self) -> int:
        """The id of the process, the last one's where it is dead; 0 before the first start."""
        return self._process.pid if self._process else 0

    @property
    def exit_status(self) -> int | None:
        """None while it runs; negative for a signal."""
        return self._process.poll() if self._process else None

    @property
    def is_running(self) -> bool:
        """Whether a process is there, stopped ones included."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it."""
        assert threading.current_thread() is threading.main_thread(), "the leash is tied to the calling thread"
        self.restart_at_s = None
        self.num_starts += 1
        self.has_served = False
        self._process = subprocess.Popen(
            [sys.executable, "-IS", str(_LEASH), str(os.getpid()), *self.command.argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(self.command.env),
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), name=self.name, daemon=True)
        self._reader.start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, limit_s: float) -> bool:
        """Wait for its end; whether it ended in time."""
        if self._process is None:
            return True
        try:
            self._process.wait(max(0.0, limit_s))
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """Wait for the last lines of a process that has ended."""
        if self._reader is not None:
            self._reader.join(1.0)

    def tail(self, num_lines: int = 20) -> Sequence[str]:
        """Give its last lines."""
        return list(self._tail)[-num_lines:]

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                text = line.decode(errors="replace").rstrip("\n")
                self._tail.append(text)
                with contextlib.suppress(OSError, ValueError):  # nobody reads ours; the child must not block for that
                    self._relay(self.name, text)
