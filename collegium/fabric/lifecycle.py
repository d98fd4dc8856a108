"""The life of a service's process: one event loop on uvloop, signals, exit status.

Owns signal handling and the measuring of the loop's lag. Knows nothing of what the service does.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import cast

import uvloop

from collegium.fabric import logs, metrics, probes, streams, telemetry
from collegium.fabric.errors import Cancelled, CollegiumError, SettingsError
from collegium.fabric.signals import heeded, is_supervised

_LAG_PERIOD_S = 0.25

_log = logs.get("lifecycle")


_current: contextvars.ContextVar[Stop | None] = contextvars.ContextVar("stop", default=None)


class Stop:
    """The wish that the process ends: set by a signal, or by the service itself."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()

    def request(self) -> None:
        """Ask the process to end; idempotent."""
        self.requested.set()

    async def wait(self) -> None:
        """Wait until the end is wanted."""
        await self.requested.wait()


async def sleep_unless_stopping(delay_s: float) -> None:
    """Sleep; Cancelled as soon as the process that run() runs is asked to stop. For waits at the start."""
    stop = _current.get()
    if stop is None:
        await asyncio.sleep(delay_s)
        return
    try:
        async with asyncio.timeout(delay_s):
            await stop.wait()
    except TimeoutError:
        return
    raise Cancelled("asked to stop")


def keep_imports() -> None:
    """Keep what has been imported from the garbage collector, without a look for garbage in it: that takes a tenth of a
    second of a core where torch was imported, and finds 0.7 MB. To be called when all imports are done, before anything
    else is made. Does nothing in a process that run() does not run.
    """
    if _current.get() is not None:
        gc.freeze()


def freeze() -> None:
    """Keep what is there now from the garbage collector, and let it run from now on. To be called once what lasts is
    made: with torch and transformers imported, a full collection stops a process for a quarter of a second, wherever it
    happens to be. Does nothing in a process that run() does not run, as it cannot be undone for a part.
    """
    if _current.get() is not None:
        gc.collect()  # what is garbage already would stay for ever; of what was made since the imports
        gc.freeze()
        gc.enable()
        _log.debug("frozen", objects=gc.get_freeze_count())


def run(main: Callable[[Stop], Awaitable[None]], *, name: str, health_bind: str = "") -> int:
    """Run a service until its main returns, and give the exit status of the process. `health_bind`: see probes.

    SIGTERM sets Stop; so do SIGINT and SIGHUP unless the process is supervised; a second one cancels main. A signal
    that was ignored when the process began stays ignored. A CollegiumError or SettingsError that main raises becomes
    one line on stderr and status 1 or 2. Garbage is not collected before main calls freeze(). A supervised process
    ends here: the interpreter's tidying up takes seconds after torch was imported, and gives nothing back that the
    kernel does not.
    """
    try:
        status = _run(main, name, health_bind)
    finally:
        telemetry.shutdown()
    if is_supervised():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(status)
    return status


def _run(main: Callable[[Stop], Awaitable[None]], name: str, health_bind: str) -> int:
    gc.disable()  # until freeze(): what is imported and loaded meanwhile would be looked through again and again
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_probed(main, health_bind))
    except SettingsError as error:
        return _complain(name, error, 2)
    except CollegiumError as error:
        return _complain(name, error, 1)
    except BaseExceptionGroup as group:
        known = first_known(group)
        if known is None:
            raise
        return _complain(name, known, 2 if isinstance(known, SettingsError) else 1)
    finally:
        gc.enable()


def first_known(group: BaseExceptionGroup[BaseException]) -> CollegiumError | SettingsError | None:
    """Find our own error inside what a TaskGroup raised; None unless every error in it is ours."""
    known: CollegiumError | SettingsError | None = None
    for error in group.exceptions:
        is_group = isinstance(error, BaseExceptionGroup)
        found = first_known(cast("BaseExceptionGroup[BaseException]", error)) if is_group else error
        if not isinstance(found, CollegiumError | SettingsError):
            return None
        known = known or found
    return known


async def _probed(main: Callable[[Stop], Awaitable[None]], health_bind: str) -> int:
    async with probes.listening(health_bind) as bound:
        if bound:
            _log.info("probes", address=bound)
        return await _supervise(main)


async def _supervise(main: Callable[[Stop], Awaitable[None]]) -> int:
    stop = Stop()
    _current.set(stop)
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(main(stop))

    def on_signal() -> None:
        if stop.requested.is_set():
            work.cancel()
        stop.request()

    if is_supervised():  # the terminal speaks to `up`
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in heeded():
        loop.add_signal_handler(number, on_signal)
    lag = asyncio.create_task(_measure_lag(), name="loop-lag")
    try:
        await work
    except Cancelled:
        if not stop.requested.is_set():
            raise
        return 0
    except asyncio.CancelledError:
        if not stop.requested.is_set():
            raise
        _log.warning("ended before everything was handed over")
        return 1
    finally:
        lag.cancel()
    return 0


async def _measure_lag() -> None:
    # How late the loop runs what is due: the floor of every control-plane latency, and what lease TTLs are sized by.
    histogram = metrics.histogram("collegium_event_loop_lag_seconds")
    while True:
        due = time.monotonic() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        histogram.observe(max(0.0, time.monotonic() - due))


def _complain(name: str, error: Exception, status: int) -> int:
    streams.complain(f"{name}: {error}")
    return status
