"""Channels of an asyncio client: a set for each event loop, as gRPC ties a channel to the loop that opened it.

Owns the channels. Scripts call asyncio.run() more than once, notebooks and pytest-asyncio bring loops of their own:
each of them finds channels that are its own, and those of a loop that is over are dropped.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable

from grpc import aio

from collegium.fabric.errors import FailedPrecondition

# gRPC's asyncio part has one thread per process, which a fork does not copy: the process that it runs in.
_home_pid = 0


class ChannelsByLoop:
    """Opens a channel per loop and address at first use. Safe to use from several threads, each with a loop."""

    def __init__(self, open_channel: Callable[[str], aio.Channel]) -> None:
        self._open = open_channel
        self._channels: dict[asyncio.AbstractEventLoop, dict[str, aio.Channel]] = {}
        self._is_closed = False
        self._lock = threading.Lock()

    def get(self, address: str) -> aio.Channel:
        """Return the running loop's channel to an address. Raises FailedPrecondition if none can be had here."""
        loop = running_loop()
        _check_process()
        with self._lock:
            if self._is_closed:
                raise FailedPrecondition("the client is closed", reason="CLIENT_CLOSED", remedy="make another one")
            self._drop_ended()
            own = self._channels.setdefault(loop, {})
            if address not in own:
                own[address] = self._open(address)
            return own[address]

    async def close(self) -> None:
        """Close every channel: this loop's now, another running loop's over there. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._drop_ended()
            channels, self._channels = self._channels, {}
        here = running_loop()
        for loop, own in channels.items():
            for channel in own.values():
                if loop is here:
                    await channel.close()
                elif loop.is_running():
                    asyncio.run_coroutine_threadsafe(channel.close(), loop)

    def _drop_ended(self) -> None:
        for loop in [loop for loop in self._channels if loop.is_closed()]:
            del self._channels[loop]  # gRPC closes a channel that nobody holds


def running_loop() -> asyncio.AbstractEventLoop:
    """Return the running loop. Raises FailedPrecondition if there is none of asyncio's."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise FailedPrecondition(
            "AsyncClient is used where no asyncio event loop runs",
            reason="NO_EVENT_LOOP",
            remedy="await it in a coroutine that asyncio.run() or the notebook runs, or use Client",
        ) from None


def _check_process() -> None:
    global _home_pid
    _home_pid = _home_pid or os.getpid()
    if _home_pid != os.getpid():
        raise FailedPrecondition(
            f"an AsyncClient was used in process {_home_pid} before this one, {os.getpid()}, was forked from it",
            reason="FORKED",
            remedy='start processes with multiprocessing\'s "spawn", or use Client in the child',
        )
