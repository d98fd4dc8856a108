"""Which way a cluster's rows went: by the native calls, or through the interpreter. Said after every benchmark.

A figure is of the way that ran, and which one that was hangs on many conditions; only counters know.
"""

import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from collegium.cli.cluster import Cluster
from collegium.client import Client, CollegiumError
from collegium.fabric.metrics import series

if TYPE_CHECKING:
    from benchmarks.one_process import OneProcess

_HEARD_S = 1.5  # members tell their counters about once a second


@contextmanager
def told(cluster: Cluster, name: str = "cluster") -> Generator[Cluster]:
    """Run a cluster; as its benchmark ends, write to stderr which way its rows went."""
    with cluster as running:
        yield running
        with suppress(CollegiumError):
            time.sleep(_HEARD_S)
            with Client(running.targets) as client:
                members = client.get_cluster().members
            counters: dict[str, float] = {}
            for member in members:
                for key, value in member.counters.items():
                    counters[key] = counters.get(key, 0.0) + value
            sys.stderr.write(f"{name}: {tell(counters)}\n")


def tell(counters: Mapping[str, float]) -> str:
    """Write the native share of exchanges and answers, from counters summed over routers and workers."""
    return "native way: " + ", ".join(
        _share(what, counters.get(_key(what, "native"), 0.0), counters.get(_key(what, "python"), 0.0))
        for what in ("exchanges", "answers")
    )


@contextmanager
def told_of_one(running: "OneProcess", name: str) -> Generator["OneProcess"]:
    """Say which way the rows of one process went."""
    with running:
        yield running
        totals = running.calls.totals
        share = _share("exchanges", totals.native_exchanges, totals.python_exchanges)
        sys.stderr.write(f"{name}: native way: {share}\n")


def _key(what: str, way: str) -> str:
    return series(f"collegium_{what}_total", way=way)


def _share(what: str, native: float, python: float) -> str:
    return f"{native / (native + python):.1%} of {native + python:,.0f} {what}" if native + python else f"no {what}"
