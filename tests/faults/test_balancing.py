"""Experts that move, workers that come and go, balancer and Redis that die: requests go on, and no token changes.

Two routers share the workers, and every request is traced; with all of that, rows go the native way.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import Client
from collegium.client import Cluster as Status
from collegium.fabric.metrics import series
from collegium.model.manifest import ensure_manifest
from tests.collector import listening
from tests.oracle import Oracle

MAX_TOKENS = 24
NUM_LANES = 3
LIMIT_S = 90.0


class Lanes:
    """Requests that stream without end, each answer held against the reference."""

    def __init__(self, cluster: Cluster, oracle: Oracle, checkpoint: Path) -> None:
        self._cluster = cluster
        self._references = oracle.choose_prompts(checkpoint, 6, MAX_TOKENS)
        self.num_done = 0
        self.first, self.last = 0, 3  # the prompts of the phase: another set makes other experts hot
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(NUM_LANES)
        self._lanes = [self._pool.submit(self._ask, lane) for lane in range(NUM_LANES)]

    def _ask(self, lane: int) -> None:
        with Client(self._cluster.targets, timeout_s=120.0) as client:
            number = lane
            while not self._stopping.is_set():
                reference = self._references[self.first + number % (self.last - self.first)]
                answer = client.complete(prompt_ids=reference.prompt_ids, max_tokens=MAX_TOKENS, ignore_eos=True)
                assert list(answer.token_ids) == reference.token_ids
                number += 1
                with self._lock:
                    self.num_done += 1

    def is_well(self) -> bool:
        return not any(lane.done() for lane in self._lanes)

    def close(self) -> None:
        self._stopping.set()
        for lane in self._lanes:
            lane.result(timeout=120)
        self._pool.shutdown()


@pytest.fixture(scope="module")
def cluster(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    checkpoint = oracle.checkpoint("qwen3_moe")
    # Whatever is uneven is moved, whatever it costs: the more moves, the more there is to go wrong.
    eager = (
        "--rebalance-s",
        "0.5",
        "--window-s",
        "0.5",
        "--target",
        "1",
        "--horizon-s",
        "1e9",
        "--spare-share",
        "0.5",
        "--lease-ttl-ms",
        "3000",
    )
    with listening() as (collector, endpoint):
        spec = ClusterSpec(
            model=checkpoint,
            manifest=ensure_manifest(checkpoint, out=tmp_path_factory.mktemp("m") / "manifest.json"),
            num_routers=2,
            log_level="warning",
            flags={"balancer": eager},
            env={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "COLLEGIUM_TRACE_RATIO": "1"},
        )
        with Cluster(spec) as running:
            yield running
        assert {"router.experts", "worker.batch"} <= {one.span.name for one in collector.received}


@pytest.fixture
def lanes(cluster: Cluster, oracle: Oracle) -> Iterator[Lanes]:
    running = Lanes(cluster, oracle, oracle.checkpoint("qwen3_moe"))
    yield running
    running.close()


def wait(cluster: Cluster, lanes: Lanes, condition: Callable[[Status], bool], what: str) -> Status:
    """Supervise until the cluster's status is as wanted, with requests that go on all the while."""
    seen: list[Status] = []
    with Client(cluster.targets, timeout_s=10.0) as client:

        def holds() -> bool:
            assert lanes.is_well()
            seen[:] = [client.get_cluster()]
            return condition(seen[0])

        cluster.wait_until(holds, LIMIT_S, what)
    return seen[0]


def go_on(cluster: Cluster, lanes: Lanes, num_requests: int = 6) -> None:
    """Let some more requests come to their ends."""
    wanted = lanes.num_done + num_requests
    cluster.wait_until(lambda: lanes.num_done >= wanted or not lanes.is_well(), LIMIT_S, "more answers")
    assert lanes.is_well()


def placed(status: Status) -> int:
    """Workers that serve and have homes."""
    serving = {m.member_id for m in status.members if m.role == "worker" and m.state == "SERVING"}
    return sum(bool(num_homes) and worker in serving for worker, num_homes in status.experts_per_worker.items())


def check_that_rows_go_the_native_way(cluster: Cluster, lanes: Lanes, num_routers: int = 2) -> None:
    """Hold every router's exchanges and every worker's answers, since each has started, to 99 % native ones."""
    ways = {"router": "exchanges", "worker": "answers"}

    def counted(status: Status) -> dict[str, tuple[str, float, float]]:
        return {
            member.member_id: (
                member.role,
                *(
                    member.counters.get(series(f"collegium_{ways[member.role]}_total", way=way), 0.0)
                    for way in ("native", "python")
                ),
            )
            for member in status.members
            if member.role in ways and member.state == "SERVING"
        }

    def have_all_worked(status: Status) -> bool:
        busy = [role for role, native, _ in counted(status).values() if native > 300]
        return busy.count("router") == num_routers and busy.count("worker") >= 2

    for member_id, (_, native, python) in counted(wait(cluster, lanes, have_all_worked, "work of all")).items():
        assert native >= 99 * python, f"{member_id}: {native:.0f} the native way, {python:.0f} in Python"


def test_experts_move_with_the_hot_set_and_tokens_stay(cluster: Cluster, lanes: Lanes) -> None:
    first = wait(cluster, lanes, lambda status: status.balance.moves > 0, "a move")
    lanes.first, lanes.last = 3, 6
    moved = first.balance.moves
    second = wait(cluster, lanes, lambda status: status.balance.moves > moved, "a move after the hot set changed")
    assert second.placement_epoch > first.placement_epoch > 1
    assert second.balance.moved_bytes > 0
    assert second.balance.decode.mean > 0
    check_that_rows_go_the_native_way(cluster, lanes)


def test_workers_come_and_go_under_load(cluster: Cluster, lanes: Lanes) -> None:
    command = [sys.executable, "-m", "collegium", "scale", "--target", cluster.targets[0], "--workers", "3", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as scaling:
        cluster.wait_until(lambda: scaling.poll() is not None, LIMIT_S, "the end of `collegium scale`")
        assert scaling.stdout is not None
        said = json.loads(scaling.stdout.read())
    assert (said["before"], said["serving"]) == (2, 3)
    with Client(cluster.targets, timeout_s=10.0) as client:
        grown = wait(cluster, lanes, lambda status: placed(status) == 3, "three workers with homes")
        assert grown.wanted_workers == 3
        go_on(cluster, lanes)
        retiring = client.scale_workers(2).retiring
        assert len(retiring) == 1
        shrunk = wait(cluster, lanes, lambda status: len(status.experts_per_worker) == 2, "two workers with homes")
        assert retiring[0] not in shrunk.experts_per_worker
    cluster.wait_until(lambda: len(cluster.addresses("worker")) == 2, LIMIT_S, "the end of the third process")
    go_on(cluster, lanes)
    check_that_rows_go_the_native_way(cluster, lanes)


def test_balancer_and_redis_may_die_together_and_both_heal(cluster: Cluster, lanes: Lanes) -> None:
    before = wait(cluster, lanes, lambda status: not status.stale_ms, "a status")
    starts = {name: cluster.num_starts(name) for name in ("balancer", "redis")}
    for name in starts:
        cluster.kill(name)
    with Client(cluster.targets, timeout_s=10.0) as client:
        stale = client.get_cluster()
    assert stale.stale_ms > 0
    assert stale.placement_epoch >= before.placement_epoch
    assert "LOST" in [member.state for member in stale.members if member.role == "balancer"]
    go_on(cluster, lanes)
    cluster.wait_until(lambda: all(cluster.num_starts(name) > n for name, n in starts.items()), LIMIT_S)
    healed = wait(
        cluster,
        lanes,
        lambda status: not status.stale_ms and status.balance.has_memory and placed(status) == 2,
        "a balancer that reaches its memory and knows two workers",
    )
    assert healed.placement_epoch >= before.placement_epoch
    go_on(cluster, lanes)
