"""The supervisor's patience: a member that dies often waits longer, and a cluster that has served is never ended."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.cli import cluster as supervised
from collegium.cli.child import ChildFailed, RestartPolicy
from collegium.cli.cluster import Cluster
from collegium.cli.scaling import MOST_AT_ONCE, plan_scale
from collegium.cli.spec import ClusterSpec, check_counts, members_of
from collegium.fabric.errors import SettingsError
from collegium.v1 import balancer_pb2 as pb

SPEC = ClusterSpec(model=Path("/m"), manifest=Path("/m.json"), num_workers=2, max_workers=4)


class Process:
    """A child without a process: dies when told to, of what it is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.policy = RestartPolicy()
        self.restart_at_s: float | None = None
        self.lost_at_s: float | None = None
        self.num_starts = 1
        self.pid = 1
        self.is_running = True
        self.has_served = False
        self.exit_status: int | None = None
        self.start_error: OSError | None = None

    def die(self, status: int) -> None:
        self.is_running, self.exit_status = False, status

    def start(self) -> None:
        self.restart_at_s = None
        if self.start_error is not None:
            raise self.start_error
        self.num_starts += 1
        self.is_running, self.exit_status = True, None

    def tail(self) -> list[str]:
        return ["its last line"]

    def send(self, number: int) -> None:
        self.is_running = False

    def wait(self, limit_s: float) -> bool:
        return True

    def close(self) -> None: ...


class Rig:
    """A cluster of processes that are none, its clock and what it said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spec: ClusterSpec = SPEC, *, has_served: bool = True) -> None:
        self.now_s = 100.0
        self.said: list[str] = []
        monkeypatch.setattr(supervised, "time", SimpleNamespace(monotonic=lambda: self.now_s, sleep=lambda _: None))
        self.cluster = Cluster(spec, say=self.said.append)
        self.cluster._has_served = has_served
        self.members = {name: Process(name) for name in ("redis", "balancer", "worker-0", "router-0", "gateway-0")}
        for name, process in self.members.items():
            child: Any = process
            self.cluster._add(name.partition("-")[0], child)

    def until_started(self, process: Process) -> float:
        """Supervise until it runs again; gives how long that took."""
        began_s = self.now_s
        for _ in range(10_000):
            self.cluster.tick()
            if process.is_running:
                return self.now_s - began_s
            self.now_s += 0.05
        raise AssertionError("it was never started again")


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(monkeypatch)
    yield made
    made.cluster.kill_all()


@pytest.mark.parametrize("status", [0, 1, 2, 3, 70, 134, -6, -9, -11])
@pytest.mark.parametrize("name", ["redis", "balancer", "worker-0", "router-0", "gateway-0"])
def test_a_member_that_dies_often_waits_longer_and_the_others_stay(rig: Rig, name: str, status: int) -> None:
    sick = rig.members[name]
    waits: list[float] = []
    for _ in range(20):
        sick.die(status)
        waits.append(rig.until_started(sick))
    assert all(a < b for a, b in itertools.pairwise(waits[:6]))
    assert max(waits) == pytest.approx(30.0, abs=0.2)
    assert min(waits[7:]) == pytest.approx(30.0, abs=0.2)
    assert [other.num_starts for other in rig.members.values() if other is not sick] == [1] * 4
    assert any("(death 20 in a row)" in line and "30.0 s" in line for line in rig.said)


def test_a_minute_without_a_death_makes_the_next_one_the_first(rig: Rig) -> None:
    sick = rig.members["worker-0"]
    for _ in range(10):
        sick.die(1)
        rig.until_started(sick)
    rig.now_s += 61.0
    sick.die(1)
    assert rig.until_started(sick) == pytest.approx(0.1, abs=0.06)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from([0, 1, 2, -9])), min_size=1, max_size=40))
def test_no_order_of_deaths_ends_a_cluster_that_has_served(deaths: list[tuple[float, int]]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        rig = Rig(monkeypatch)
        for (after_s, status), process in zip(deaths, itertools.cycle(rig.members.values())):
            rig.now_s += after_s
            process.die(status)
            rig.cluster.tick()
        for process in rig.members.values():
            rig.until_started(process)
        rig.cluster.kill_all()


def test_before_the_cluster_has_served_five_deaths_in_a_minute_end_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, has_served=False)
    sick = rig.members["worker-0"]
    for _ in range(4):
        sick.die(-9)
        rig.until_started(sick)
    sick.die(-9)
    with pytest.raises(ChildFailed, match=r"worker-0 was ended by SIGKILL; its last lines:\n  its last line"):
        rig.cluster.tick()
    rig.cluster.kill_all()


@pytest.mark.parametrize("status", [1, 2])
def test_before_the_cluster_has_served_one_that_cannot_start_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    rig = Rig(monkeypatch, has_served=False)
    rig.members["router-0"].die(status)
    with pytest.raises(ChildFailed, match="router-0"):
        rig.cluster.tick()
    rig.cluster.kill_all()


def test_without_restarts_the_dead_stay_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ClusterSpec(model=Path("/m"), manifest=Path("/m.json"), can_restart=False)
    rig = Rig(monkeypatch, spec)
    rig.members["worker-0"].die(2)
    for _ in range(1_000):
        rig.cluster.tick()
        rig.now_s += 1.0
    assert not rig.members["worker-0"].is_running
    assert any("it is not restarted" in line for line in rig.said)
    rig.cluster.kill_all()


def test_a_machine_without_room_for_a_process_is_tried_again(rig: Rig) -> None:
    sick = rig.members["worker-0"]
    sick.die(-9)
    sick.start_error = BlockingIOError(11, "Resource temporarily unavailable")
    for _ in range(200):
        rig.cluster.tick()
        rig.now_s += 0.5
    assert any("worker-0 cannot be started: [Errno 11]" in line for line in rig.said)
    sick.start_error = None
    rig.until_started(sick)


def view(wanted: int, num_workers: int = 2) -> pb.WatchPlacementResponse:
    members = [
        pb.Member(member_id=f"w{i}", role=pb.ROLE_WORKER, address=f"h:{i + 1}", state=pb.MEMBER_STATE_SERVING)
        for i in range(num_workers)
    ]
    return pb.WatchPlacementResponse(wanted_workers=wanted, members=members)


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(1, 12))
def test_no_more_workers_run_than_the_machine_was_said_to_take(wanted: int, num_running: int, most: int) -> None:
    running = {f"worker-{i}": f"h:{i + 1}" for i in range(num_running)}
    plan = plan_scale(view(wanted, num_running), running, most)
    assert 0 <= plan.num_to_start <= MOST_AT_ONCE
    if plan.num_to_start:
        assert num_running + plan.num_to_start <= min(wanted, most)


def test_a_number_from_redis_above_the_bound_starts_no_more_than_the_bound(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Process] = []

    def child(command: Any, relay: Any) -> Process:
        started.append(Process(command.name))
        return started[-1]

    monkeypatch.setattr(supervised, "Child", child)
    monkeypatch.setattr(rig.cluster, "_view", lambda: view(2**32 - 1, 0))
    rig.cluster._has_scaled = True
    for _ in range(100):
        rig.cluster.tick()
        rig.now_s += 1.0
    assert len(started) == SPEC.most_workers == 4
    assert [line for line in rig.said if "at most 4 are started: see --max-workers" in line] == [
        "4294967295 workers are wanted; at most 4 are started: see --max-workers"
    ]


def test_a_worker_that_cannot_be_added_ends_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(command: Any, relay: Any) -> Process:
        made = Process(command.name)
        made.start_error = OSError(12, "Cannot allocate memory")
        return made

    monkeypatch.setattr(supervised, "Child", child)
    monkeypatch.setattr(rig.cluster, "_view", lambda: view(4, 0))
    rig.cluster._has_scaled = True
    for _ in range(20):
        rig.cluster.tick()
        rig.now_s += 1.0
    assert len([line for line in rig.said if "cannot be started" in line]) == 1


@pytest.mark.parametrize(
    ("count", "bound"), [("workers", 4096), ("routers", 256), ("gateways", 256), ("balancers", 16)]
)
def test_numbers_of_processes_have_a_bound(count: str, bound: int) -> None:
    check_counts(**{count: bound})
    with pytest.raises(SettingsError, match=f"--{count}={bound + 1} cannot be used: give at most {bound}"):
        check_counts(**{count: bound + 1})


@pytest.mark.parametrize("most", [1, 4097, 2**32])
def test_a_bound_below_the_start_or_beyond_any_cluster_names_its_flag(most: int) -> None:
    with pytest.raises(SettingsError, match=f"--max-workers={most} cannot be used: give 2"):
        ClusterSpec(model=Path("/m"), manifest=Path("/m.json"), num_workers=2, max_workers=most)


def test_the_balancer_is_told_the_bound_and_a_default_suits_the_start() -> None:
    balancer = members_of(SPEC, "redis://h")[0]
    assert balancer.command.argv[balancer.command.argv.index("--max-workers") + 1] == "4"
    large = ClusterSpec(model=Path("/m"), manifest=Path("/m.json"), num_workers=64)
    small = ClusterSpec(model=Path("/m"), manifest=Path("/m.json"), num_workers=1)
    assert large.most_workers >= 64
    assert small.most_workers >= 8
