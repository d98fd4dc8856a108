"""One death after another in a cluster of real processes: each comes back, and answers stay what they were."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from collegium.cli.cluster import ChildFailed, Cluster, ClusterSpec
from collegium.cli.spec import members_of
from collegium.client import Client
from collegium.model.manifest import ensure_manifest

DEMO = Path(__file__).parents[2] / "models" / "demo-lm"
LIMIT_S = 100.0


def spec_of(folder: Path, **changes: object) -> ClusterSpec:
    manifest = ensure_manifest(DEMO, out=folder / "manifest.json")
    return ClusterSpec(model=DEMO, manifest=manifest, log_level="warning", **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(spec_of(tmp_path_factory.mktemp("cluster"), num_gateways=2)) as running:
        yield running


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[int]:
    return ask(cluster)


def ask(cluster: Cluster) -> list[int]:
    with Client(cluster.targets) as client:
        return list(client.complete(prompt_ids=[5, 6, 7, 8], max_tokens=8, ignore_eos=True).choices[0].token_ids)


@pytest.mark.parametrize("name", ["worker-0", "worker-1", "balancer", "redis", "gateway-0", "router-0"])
def test_a_killed_member_comes_back_by_itself_and_answers_stay(
    cluster: Cluster, expected: list[int], name: str
) -> None:
    starts = cluster.num_starts(name)
    killed = cluster.kill(name)
    cluster.wait_until(lambda: cluster.num_starts(name) > starts, LIMIT_S)
    cluster.wait_until_serving(limit_s=LIMIT_S)
    assert cluster.pid(name) != killed
    assert ask(cluster) == expected


def test_a_stopped_member_that_goes_on_is_the_same_process(cluster: Cluster, expected: list[int]) -> None:
    pid = cluster.kill("worker-0", signal.SIGSTOP)
    cluster.kill("worker-0", signal.SIGCONT)
    cluster.wait_until_serving(limit_s=LIMIT_S)
    assert cluster.pid("worker-0") == pid
    assert ask(cluster) == expected


def test_a_member_that_cannot_start_fails_the_cluster_with_its_last_lines(tmp_path: Path) -> None:
    broken = Cluster(spec_of(tmp_path, num_workers=1, flags={"worker": ["--data-bind=nonsense"]}))
    try:
        broken.start()
        with pytest.raises(ChildFailed, match=r"worker-0 exited with status \d; its last lines:\n.*--data-bind"):
            broken.wait_until_serving(limit_s=LIMIT_S)
    finally:
        broken.kill_all()


def test_a_member_that_came_back_is_said_to_serve_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium.cli.cluster.members_of", lambda spec, url: members_of(spec, url)[:1])
    told: list[str] = []
    with Cluster(spec_of(tmp_path), say=told.append) as balancer_alone:
        balancer_alone.kill("balancer")
        balancer_alone.wait_until(lambda: any("balancer SERVING again after" in line for line in told), LIMIT_S)


def test_without_restarts_the_dead_stay_dead_and_the_others_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("collegium.cli.cluster.members_of", lambda spec, url: members_of(spec, url)[:1])
    told: list[str] = []
    with Cluster(spec_of(tmp_path, can_restart=False), say=told.append) as balancer_alone:
        balancer_alone.kill("redis")
        balancer_alone.wait_until(lambda: any("redis was ended by SIGKILL" in line for line in told), LIMIT_S)
        balancer_alone.wait_until_serving(limit_s=LIMIT_S)
        assert balancer_alone.num_starts("redis") == 1
