"""What an attack is, and what attacks share: the statuses that refuse, and calls that many make at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from tests.strangers.rigs.target import Target

# How a request that is wrong, or more than there is room for, may be refused.
REFUSED = frozenset({"INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED"})
# What no caller may ever be told: both say that the fault is the server's.
FAULTS = frozenset({"UNKNOWN", "INTERNAL", "DATA_LOSS"})
SOON_S = 20.0  # a guard: statuses come at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One hostile input. run is given the target and how much of it: `few` in the short run, `many` in the long one.

    peak_mb: by process, how much memory it may take for a moment. restarts: processes that the attack itself ends.
    is_long: too long for the short run.
    """

    name: str
    run: Callable[[Target, int], None]
    few: int
    many: int
    peak_mb: Mapping[str, float] = field(default_factory=dict[str, float])
    restarts: frozenset[str] = frozenset()
    is_long: bool = False


@contextmanager
def left_calls() -> Iterator[list[Any]]:
    """Collect calls that are left, all of them, when the block ends."""
    calls: list[Any] = []
    try:
        yield calls
    finally:
        for call in calls:
            call.cancel()


@contextmanager
def channels(target: Target, process: str, count: int) -> Iterator[list[grpc.Channel]]:
    """Open so many channels, each with a connection of its own."""
    with ExitStack() as stack:
        own = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
        yield [stack.enter_context(grpc.insecure_channel(target.address(process), options=own)) for _ in range(count)]


class Ending(str):
    """The name of a status, which shows what was said with it."""

    details: str

    def __new__(cls, name: str, details: str = "") -> Ending:
        """Make one."""
        made = super().__new__(cls, name)
        made.details = details
        return made

    def __format__(self, form: str) -> str:
        """Show the name and what was said."""
        return f"{self!s} ({self.details[:200]})" if self.details else str(self)


def status(call: Any) -> Ending:
    """Return how a call has ended, reading what it answers."""
    return unary_status(lambda: [None for _ in call])


def unary_status(make: Callable[[], object]) -> Ending:
    """Return how a unary call ends."""
    try:
        make()
    except grpc.RpcError as error:
        return Ending(error.code().name, str(error.details()))  # type: ignore[attr-defined]
    return Ending("OK")


def at_once(count: int, run: Callable[[int], None]) -> None:
    """Run something in so many threads and wait for all; raises what the first one raised."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            run(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SOON_S)
        assert not thread.is_alive(), "a caller still waits for its answer"
    if errors:
        raise errors[0]
