"""Fixtures that several kinds of tests share: tiny checkpoints and the reference answers on them."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Many processes share few cores here: threads that spin for each other cost more than they bring. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Everything that tests speak to is on this machine: a proxy of the shell is not for them.
os.environ.update({name: "" for name in os.environ if name.lower().endswith("_proxy")})

import pytest
from hypothesis import settings

from tests.collector import collector
from tests.oracle import Oracle

__all__ = ["collector", "oracle"]

settings.register_profile("same every time", derandomize=True, deadline=None, database=None)
settings.load_profile("same every time")


# Tests that are run in a script's background begin with these ignored, and hand that on to what they start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


# Files that take longest, begun first: a process that came to one last would keep the others waiting.
LONGEST = (
    "test_fuzz_ports.py",
    "test_processes.py",
    "test_hostility.py",
    "test_rolling_restart.py",
    "test_telemetry.py",
    "test_native_check.py",
    "test_balancing.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def oracle(request: pytest.FixtureRequest) -> Iterator[Oracle]:
    """The reference process; `oracle.checkpoint(arch)` makes checkpoints. Both are kept in pytest's cache."""
    cache = request.config.cache
    assert cache is not None
    reference = Oracle(Path(cache.mkdir("collegium")))
    yield reference
    reference.close()
