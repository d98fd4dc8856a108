"""Work that gets the core only when nobody else wants it: a thread of its own, of the scheduler's idle class.

Owns the thread. A process may not leave the idle class again without privileges, but a thread can be born into it, do
its work and end. Threads that the work starts stay in that class: it must start none that are to serve.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable


def run_idle(work: Callable[[], object], name: str) -> None:
    """Do work in an idle-class thread and wait for it; raises what it raises."""
    failure: list[BaseException] = []

    def run() -> None:
        with contextlib.suppress(OSError, AttributeError):  # not every system lets a thread say so
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
