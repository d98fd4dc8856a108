"""Work that stands back behind those who serve: a thread of its own, with a third of the share of others.

Owns the thread. Not the scheduler's idle class: on a machine whose cores are all busy, what is in that class never
runs, and a worker that was added because the machine is busy would never start; nor would a thread that holds the
interpreter's lock ever give it up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable

_NICE = 5  # a weight of 335 where others have 1,024


def run_low(work: Callable[[], object], name: str) -> None:
    """Do work in a thread of low priority and wait for it; raises what it raises.

    Threads that the work starts have that priority too, for ever: it must start none that are to serve.
    """
    failure: list[BaseException] = []

    def run() -> None:
        if sys.platform == "linux":  # elsewhere, a priority is a process's
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
