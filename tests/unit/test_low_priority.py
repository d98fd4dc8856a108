"""Work of low priority: what it raises, and that it ends on a machine whose cores are all busy."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time

import pytest

from collegium.fabric.low_priority import run_low


def _burn(until: float) -> None:
    while time.monotonic() < until:
        pass


def test_it_raises_what_the_work_raises_and_leaves_the_caller_alone() -> None:
    def fail() -> None:
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        run_low(fail, "test")
    assert os.getpriority(os.PRIO_PROCESS, 0) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, a priority is a process's")
def test_it_is_of_low_priority_and_never_of_the_idle_class() -> None:
    """In the idle class, work on a busy machine never ends, whatever the time it is given."""
    seen: list[int] = []

    def look() -> None:
        seen.extend((os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)))

    run_low(look, "test")
    assert seen == [5, os.SCHED_OTHER]


def test_it_ends_while_every_core_is_busy() -> None:
    """A twentieth of a second of work has an end long before those who hold the cores have one."""
    until = time.monotonic() + 60.0
    num_others = 2 * (os.cpu_count() or 1)
    others = [multiprocessing.Process(target=_burn, args=(until,), daemon=True) for _ in range(num_others)]
    for one in others:
        one.start()
    try:
        spent = time.thread_time

        def work() -> None:
            end = spent() + 0.05
            while spent() < end:
                pass

        run_low(work, "test")
        assert all(one.is_alive() for one in others), "the cores were free before the work was done"
    finally:
        for one in others:
            one.kill()
            one.join()
