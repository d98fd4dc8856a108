"""Signals that ask for an end: those that were ignored when the process began stay ignored.

nohup has SIGHUP ignored, and a shell without job control has SIGINT ignored for what it starts with "&": both mean that
the process is to go on. Owns the question, not the handlers.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heeded(*numbers: signal.Signals) -> Iterator[signal.Signals]:
    """Yield those of the signals (without any: of all that ask for an end) that are not ignored now."""
    for number in numbers or ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            yield number
