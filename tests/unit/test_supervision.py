"""The pure parts of a cluster on one machine: threads, restarts, commands, numbers."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.cli.child import RestartPolicy
from collegium.cli.show import Completion
from collegium.cli.spec import ClusterSpec, members_of, service_env
from collegium.cli.threads import Allotment, allot, parse_threads
from collegium.cli.up import resolve_dtype
from collegium.fabric.errors import SettingsError

SPEC = ClusterSpec(model=Path("/m"), manifest=Path("/m.json"), num_workers=2, num_routers=2, num_gateways=2)


@given(st.integers(1, 256), st.integers(1, 8), st.integers(1, 16))
def test_threads_never_exceed_the_cores_unless_there_are_more_processes(
    num_cores: int, num_routers: int, num_workers: int
) -> None:
    allotment = allot(num_cores, num_routers=num_routers, num_workers=num_workers)
    used = allotment.per_router * num_routers + allotment.per_worker * num_workers
    assert allotment.per_router >= 1 and allotment.per_worker >= 1
    assert used <= max(num_cores, num_routers + num_workers)


def test_sixteen_cores_are_mostly_the_workers() -> None:
    assert allot(16, num_routers=1, num_workers=2) == Allotment(per_router=6, per_worker=5)


def test_threads_are_read_in_every_form() -> None:
    shared = {"num_cores": 4, "num_routers": 1, "num_workers": 1}
    assert parse_threads("auto", **shared) == allot(4, num_routers=1, num_workers=1)
    assert parse_threads("8", **shared) == allot(8, num_routers=1, num_workers=1)
    assert parse_threads("worker=3,router=2", **shared) == Allotment(per_router=2, per_worker=3)


@pytest.mark.parametrize("text", ["0", "-1", "many", "router=2", "router=0,worker=1", "router=1,worker=1,gateway=1"])
def test_threads_in_no_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="auto"):
        parse_threads(text, num_cores=4, num_routers=1, num_workers=1)


def test_restarts_back_off_and_end_after_five_in_a_minute() -> None:
    policy = RestartPolicy()
    pauses = [policy.after_death(float(second)) for second in range(6)]
    assert pauses[0] == pytest.approx(0.1)
    assert all(a is not None and b is not None and a < b for a, b in itertools.pairwise(pauses[:5]))
    assert pauses[5] is None


def test_deaths_that_are_far_apart_are_always_forgiven() -> None:
    policy = RestartPolicy()
    assert [policy.after_death(60.0 * n) for n in range(20)] == [0.1] * 20


def test_members_find_each_other_and_keep_distinct_addresses() -> None:
    members = members_of(SPEC, "redis://h")
    by_name = {member.name: member for member in members}
    assert list(by_name) == ["balancer", *(f"{role}-{i}" for role in ("worker", "router", "gateway") for i in (0, 1))]
    assert len({member.address for member in members}) == len(members)
    balancer = by_name["balancer"].address
    for member in members[1:]:
        argv = member.command.argv
        assert argv[argv.index("--balancer") + 1] == balancer
        assert argv[argv.index("--bind") + 1] == member.address


def test_only_balancer_and_gateways_know_redis_and_never_by_a_flag() -> None:
    for member in members_of(SPEC, "redis://:secret@h"):
        assert not any("secret" in word for word in member.command.argv)
        assert ("REDIS_URL" in member.command.env) == (member.role in ("balancer", "gateway"))


def test_what_up_decides_is_not_taken_from_the_users_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLLEGIUM_ADVERTISE", "elsewhere:1")
    monkeypatch.setenv("COLLEGIUM_LOG_LEVEL", "debug")
    env = service_env(3)
    assert "COLLEGIUM_ADVERTISE" not in env
    assert env["COLLEGIUM_LOG_LEVEL"] == "debug"
    assert (env["OMP_NUM_THREADS"], env["OMP_WAIT_POLICY"], env["COLLEGIUM_SUPERVISED"]) == ("3", "passive", "1")


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"num_workers": 0}, "--workers"), ({"num_gateways": -1}, "--gateways"), ({"grpc_port": 70000}, "--grpc-port")],
    ids=["workers", "gateways", "port"],
)
def test_an_impossible_cluster_names_the_flag(change: dict[str, int], flag: str) -> None:
    with pytest.raises(SettingsError, match=flag):
        ClusterSpec(model=Path("/m"), manifest=Path("/m.json"), **change)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [('{"dtype": "bfloat16"}', "bfloat16"), ('{"torch_dtype": "float16"}', "float32"), ("{}", "float32")],
)
def test_auto_is_the_checkpoints_own_type_where_it_is_served(config: str, dtype: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    assert resolve_dtype("auto", tmp_path) == dtype
    assert resolve_dtype("float32", tmp_path) == "float32"
    with pytest.raises(SettingsError, match="--dtype"):
        resolve_dtype("int3", tmp_path)


def test_the_rate_counts_tokens_after_the_first_one() -> None:
    assert Completion(num_tokens=11, first_token_s=1.0, total_s=3.0, finish_reason="length").tokens_per_s == 5.0
    assert Completion(num_tokens=1, first_token_s=1.0, total_s=1.0, finish_reason="stop").tokens_per_s == 0.0
