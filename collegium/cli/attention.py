"""What a command that runs on waits for: a key, a signal, or another thread that has something for it.

Owns the handlers of signals and the terminal's mode while it runs, and puts both back. The thread that enters it waits.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import threading
import tty
from collections.abc import Generator
from types import FrameType, TracebackType
from typing import TextIO

from collegium.fabric.signals import heeded

_QUIT_KEYS = frozenset(b"qQ\x04")
_DISABLED = b"\0"  # of a terminal's control character


class Attention:
    """Sleeps until something is to be done. Signals are a flag: an exception could come up where nobody hears of it."""

    def __init__(self) -> None:
        self._is_over = threading.Event()
        self._reader, self._writer = os.pipe()
        self._handlers: dict[signal.Signals, signal._HANDLER] = {}  # pyright: ignore[reportPrivateUsage]

    @property
    def is_over(self) -> bool:
        """Whether somebody wants an end."""
        return self._is_over.is_set()

    def __enter__(self) -> Attention:
        """Take the signals over, in the main thread; elsewhere nothing is taken over."""
        os.set_blocking(self._writer, False)
        if threading.current_thread() is threading.main_thread():
            for number in (*heeded(), signal.SIGWINCH):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._reader)
        os.close(self._writer)

    def wake(self) -> None:
        """End a wait, or the next one. Any thread may call it."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: it will wake; closed: nobody waits
            os.write(self._writer, b"w")

    def wait(self, limit_s: float, keys: int | None = None) -> None:
        """Sleep until woken, a signal came, or a key was hit. keys: the file to read them from; q ends."""
        ready, _, _ = select.select([self._reader, *([] if keys is None else [keys])], [], [], limit_s)
        if self._reader in ready:
            os.read(self._reader, 4096)
        if keys is not None and keys in ready:
            hit = os.read(keys, 4096)
            if not hit or _QUIT_KEYS & set(hit):  # nothing to read: the terminal is gone
                self._is_over.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGWINCH:
            self._is_over.set()
        self.wake()


@contextlib.contextmanager
def keys_of(stdin: TextIO) -> Generator[int | None]:
    """Have a terminal give each key as it is hit, unseen; gives its file, or None where stdin is no terminal."""
    if not stdin.isatty():
        yield None
        return
    file = stdin.fileno()
    before = termios.tcgetattr(file)
    try:
        tty.setcbreak(file, termios.TCSADRAIN)
        mode = termios.tcgetattr(file)
        mode[6][termios.VSUSP] = _DISABLED  # a stop would leave the terminal as it is now
        termios.tcsetattr(file, termios.TCSADRAIN, mode)
        yield file
    finally:
        termios.tcsetattr(file, termios.TCSADRAIN, before)
