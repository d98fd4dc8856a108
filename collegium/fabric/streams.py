"""What a process writes to its user: text that the terminal cannot show, readers that leave or do not read.

Owns sys.stdout and sys.stderr of the command line. A tool ends when nobody reads it; a supervisor must not.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from typing import TextIO, cast

_PATIENCE_S = 1.0  # for a reader that is there and does not read; then what is written is lost until it does
_PIECE_BYTES = 4096  # what a pipe that says it has room takes without blocking


def prepare() -> None:
    """Have both streams there, and show a mark for a character that the terminal's encoding lacks. Idempotent."""
    for name in ("stdout", "stderr"):
        stream = cast("TextIO | None", getattr(sys, name))
        if stream is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if name == "stderr" else "replace")


def outlive_readers() -> None:
    """Make both streams lose what cannot be written (nobody reads it, the disk is full), instead of raising."""
    prepare()
    for name in ("stdout", "stderr"):
        stream = cast(TextIO, getattr(sys, name))
        try:
            descriptor = stream.fileno()
        except (OSError, AttributeError):  # a test's own stream
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        raw = io.BufferedWriter(_Lossy(descriptor, stream))
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def silence() -> None:
    """Send what is still to be written nowhere: who read it has gone."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def complain(text: str) -> None:
    """Write one line to stderr, if anybody reads it."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class _Lossy(io.RawIOBase):
    """A descriptor that takes everything: what it cannot write in time is lost."""

    def __init__(self, descriptor: int, owner: TextIO) -> None:
        super().__init__()
        self._descriptor, self._owner = descriptor, owner  # which closes the descriptor when it goes
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._is_stuck = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if not self.closed and self._owner not in (sys.__stdout__, sys.__stderr__):
            with contextlib.suppress(OSError):
                self._owner.close()
        super().close()

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object, /) -> int:
        view = memoryview(cast(bytes, data)).cast("B")
        done = 0
        with contextlib.suppress(OSError):
            while done < len(view):
                self._is_stuck = not self._poll.poll(0 if self._is_stuck else _PATIENCE_S * 1e3)
                if self._is_stuck:
                    break
                with contextlib.suppress(BlockingIOError):  # whoever shares it made it so
                    done += os.write(self._descriptor, view[done : done + _PIECE_BYTES])
        return len(view)
