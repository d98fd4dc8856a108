"""Signals that ask for an end: those that were ignored when the process began stay ignored.

nohup has SIGHUP ignored, and a shell without job control has SIGINT ignored for what it starts with "&": both mean that
the process is to go on. Who alone may ask: of a process that `collegium up` started, that is `up`. Owns the questions,
not the handlers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SUPERVISED_ENV = "COLLEGIUM_SUPERVISED"


def heeded(*numbers: signal.Signals) -> Iterator[signal.Signals]:
    """Yield those of the signals (without any: of all that ask for an end) that are not ignored now."""
    for number in numbers or ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            yield number


def is_supervised() -> bool:
    """Return True if this process was started by `collegium up`, which alone decides when it ends."""
    return os.environ.get(SUPERVISED_ENV) == "1"
