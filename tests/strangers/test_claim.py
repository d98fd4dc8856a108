"""Two clusters in one Redis: of one name only one may run, and a killed one gives its name back."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.cli import claim as claim_module
from collegium.cli import remembered
from collegium.cli.claim import Claim
from collegium.cli.preflight import check_cluster_name
from collegium.fabric.errors import Cancelled, FailedPrecondition, SettingsError, Unavailable
from collegium.launch import ROOT
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import expert_pb2, expert_pb2_grpc, router_pb2, router_pb2_grpc
from tests.faults.test_up import DEMO, running
from tests.redis_server import RedisServer

HOLDER = """
import sys
from collegium.cli.claim import Claim
with Claim(sys.argv[1], "default"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    found = RedisServer(tmp_path_factory.mktemp("redis"))
    found.start()
    yield found
    found.kill()


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(server.url)
    client.flushall()
    yield client
    client.close()


def test_a_second_up_on_one_redis_is_refused_before_it_starts_anything(
    server: RedisServer, client: redis.Redis
) -> None:
    with Claim(server.url, "default"):
        with running(str(DEMO), "--grpc-port", "0", env={"REDIS_URL": server.url}) as up:
            assert up.end() == 1
        told = [line for line in up.err if "is taken" in line]
        assert len(told) == 1 and not [line for line in up.err if "starting" in line]
    for word in ("REDIS_URL", "'default'", f"process {os.getpid()}", "--cluster NAME"):
        assert word in told[0]
    assert not client.keys("*"), "given back"


def test_names_and_databases_keep_clusters_apart(server: RedisServer, client: redis.Redis) -> None:
    with ExitStack() as stack:
        for name in ("default", "other", "ns/release"):
            stack.enter_context(Claim(server.url, name))
        stack.enter_context(Claim(f"{server.url}?db=1", "default"))
        with pytest.raises(FailedPrecondition, match="'ns/release' is taken"), Claim(server.url, "ns/release"):
            pass
    with Claim(server.url, "default"):
        pass


def test_the_name_of_a_killed_up_is_free_at_once_on_its_machine(server: RedisServer, client: redis.Redis) -> None:
    argv = [sys.executable, "-c", HOLDER, server.url]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(FailedPrecondition, match=f"process {holder.pid}"), Claim(server.url, "default"):
            pass
        holder.kill()
        holder.wait()
    began_s = time.monotonic()
    with Claim(server.url, "default"):
        assert time.monotonic() - began_s < claim_module._TTL_S / 2


@pytest.mark.parametrize(
    ("change", "is_gone"),
    [
        ({}, False),
        ({"started": "1"}, True),  # another process has this number now
        ({"pid": 2**22 + 1}, True),
        ({"machine": "elsewhere"}, False),  # of which nothing can be seen from here
        ({"machine": ""}, False),
        ({"pid": "one"}, False),
    ],
    ids=str,
)
def test_who_is_gone_is_known_of_this_machine_alone(change: dict[str, object], is_gone: bool) -> None:
    assert claim_module._is_gone({**claim_module._this_process(), **change}) is is_gone


@pytest.mark.parametrize("value", [b"\xff", b"[]", b"{}", b"many"])
def test_a_claim_that_cannot_be_read_holds_until_it_lapses(
    value: bytes, server: RedisServer, client: redis.Redis
) -> None:
    client.set("collegium:{default}:up", value, px=60_000)
    with pytest.raises(FailedPrecondition, match="is taken"), Claim(server.url, "default"):
        pass
    client.pexpire("collegium:{default}:up", 1)
    _until(lambda: not client.exists("collegium:{default}:up"))
    with Claim(server.url, "default"):
        pass
    client.set("collegium:{default}:up", value)  # nor does one hold that never lapses: no `up` wrote it
    with Claim(server.url, "default"):
        pass


def test_balancers_that_nobody_here_started_are_found_by_their_lead(server: RedisServer, client: redis.Redis) -> None:
    client.set("collegium:{default}:leader", "b-1", px=60_000)
    polls = 0

    def renew() -> bool:
        nonlocal polls
        polls += 1
        client.pexpire("collegium:{default}:leader", 60_000)
        return False

    # As a balancer renews its lead between two looks.
    entering = Claim(server.url, "default", is_interrupted=renew)
    with pytest.raises(FailedPrecondition, match=r"taken in this Redis by a balancer.*--cluster NAME"), entering:
        pass
    assert not client.exists("collegium:{default}:up"), "what was refused holds no name"
    client.pexpire("collegium:{default}:leader", 400)  # one that was killed renews no more
    said: list[str] = []
    with Claim(server.url, "default", say=said.append):
        assert not client.exists("collegium:{default}:leader")


class Member(expert_pb2_grpc.ExpertServicer, router_pb2_grpc.RouterServicer, health_pb2_grpc.HealthServicer):
    """A worker and a router at one address, of one id."""

    def __init__(self, member_id: str) -> None:
        self.member_id, self.is_serving, self.num_asked = member_id, True, 0

    def GetWorker(self, request: object, context: object) -> expert_pb2.GetWorkerResponse:
        self.num_asked += 1
        return expert_pb2.GetWorkerResponse(worker_id=self.member_id)

    def Describe(self, request: object, context: object) -> router_pb2.DescribeResponse:
        return router_pb2.DescribeResponse(router_id=self.member_id)

    def Check(self, request: object, context: object) -> health_pb2.HealthCheckResponse:
        response = health_pb2.HealthCheckResponse
        return response(status=response.SERVING if self.is_serving else response.NOT_SERVING)


@contextmanager
def answering(member: Member) -> Iterator[str]:
    """Have a member answer; gives its address."""
    with ThreadPoolExecutor(2) as pool:
        server: Any = grpc.server(pool)
        for register in (
            expert_pb2_grpc.add_ExpertServicer_to_server,
            router_pb2_grpc.add_RouterServicer_to_server,
            health_pb2_grpc.add_HealthServicer_to_server,
        ):
            register(member, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def remember(client: redis.Redis, role: int, address: str, member_id: str = "m-1") -> None:
    """Write a member's record as a balancer does."""
    record = pb.Member(member_id=member_id, role=role, address=address, state=pb.MEMBER_STATE_SERVING)  # type: ignore[arg-type]
    client.set(f"collegium:{{default}}:member:{member_id}", record.SerializeToString(), ex=600)
    client.sadd("collegium:{default}:members", member_id)


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit_s in (("_ENDING_S", 0.05), ("_DRAINING_S", 0.1), ("_POLL_S", 0.01)):
        monkeypatch.setattr(claim_module, name, limit_s)


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize(("role", "word"), [(pb.ROLE_WORKER, "worker"), (pb.ROLE_ROUTER, "router")])
@pytest.mark.parametrize("is_serving", [True, False], ids=["serving", "not serving"])
def test_a_member_that_lives_holds_its_clusters_name_though_its_balancer_is_silent(
    role: int, word: str, is_serving: bool, server: RedisServer, client: redis.Redis
) -> None:
    member = Member("m-1")
    member.is_serving = is_serving
    with answering(member) as address:
        remember(client, role, "127.0.0.1:1", "m-0")  # nobody answers there
        remember(client, role, address)
        with pytest.raises(FailedPrecondition, match=f"{word} m-1, which answers at {address}") as caught:
            Claim(server.url, "default").__enter__()
        assert caught.value.reason == "CLUSTER_NAME_TAKEN"
        assert "end that one, or give" in str(caught.value)
        assert not client.exists("collegium:{default}:up"), "what was refused holds no name"
        with Claim(server.url, "other"):
            pass
    with Claim(server.url, "default"):
        pass


def _silent(stack: ExitStack) -> str:
    listener = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0))))
    return f"127.0.0.1:{listener.getsockname()[1]}"


STALE = {
    "an address that nobody has": lambda stack: "127.0.0.1:1",
    "an address that is another process's": lambda stack: stack.enter_context(answering(Member("m-2"))),
    "an address that takes connections and says nothing": _silent,
    "no address": lambda stack: "here",
}


@pytest.mark.usefixtures("hurry")
@pytest.mark.parametrize("kind", STALE)
def test_the_record_of_a_member_that_is_gone_holds_no_name(
    kind: str, server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_ASK_S", 0.2)
    with ExitStack() as stack:
        remember(client, pb.ROLE_WORKER, STALE[kind](stack))
        client.sadd("collegium:{default}:members", "lapsed", b"\xff")
        client.set("collegium:{default}:member:lapsed", b"\xff\xff")
        with Claim(server.url, "default"):
            pass


def test_keys_of_another_type_hold_no_name(server: RedisServer, client: redis.Redis) -> None:
    client.set("collegium:{default}:members", "text")
    with Claim(server.url, "default"):
        pass


@pytest.mark.usefixtures("hurry")
def test_members_of_a_killed_up_are_waited_for_while_they_end(
    server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "_DRAINING_S", 60.0)
    member, said = Member("m-1"), list[str]()
    member.is_serving = False

    def end_in_time() -> bool:
        if said:
            member.member_id = "gone"
        return False

    with answering(member) as address:
        remember(client, pb.ROLE_WORKER, address)
        with Claim(server.url, "default", say=said.append, is_interrupted=end_in_time):
            pass
    assert member.num_asked > 1
    assert len(said) == 1 and "waiting to see whether members of the cluster 'default' end: worker m-1" in said[0]


def test_the_name_is_kept_and_a_redis_that_forgot_it_is_told_again(
    server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim_module, "_RENEW_S", 0.01)
    said: list[str] = []
    with Claim(server.url, "default", say=said.append):
        client.flushall()
        _until(lambda: bool(client.exists("collegium:{default}:up")))
        client.set("collegium:{default}:up", "somebody else")  # who came while this one stood still
        _until(lambda: bool(said))
    assert "took the cluster name 'default' in REDIS_URL" in said[0]
    assert client.get("collegium:{default}:up") == b"somebody else"


def test_a_redis_that_is_not_there_or_refuses_is_told_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"REDIS_URL: Redis did not answer within 0\.2 s"):
        Claim(f"unix://{tmp_path}/none", "default", wait_s=0.2).__enter__()
    with pytest.raises(Cancelled):
        Claim(f"unix://{tmp_path}/none", "default", is_interrupted=lambda: True).__enter__()
    (tmp_path / "s").mkdir()
    locked = RedisServer(tmp_path / "s", password="word")
    locked.start()
    try:
        with pytest.raises(FailedPrecondition, match="REDIS_URL: Redis refuses"):
            Claim(locked.url.replace("word", "other"), "default").__enter__()
    finally:
        locked.kill()


@pytest.mark.parametrize("name", ["", "a b", "a}b", "{a}", "ä", "a\n", "x" * 129, "a:b"])
def test_a_name_that_cannot_be_part_of_a_key_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="--cluster="):
        check_cluster_name(name)
    check_cluster_name("ns/release-1.b_c")


def _until(condition: object) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
