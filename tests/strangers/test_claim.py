"""Two clusters in one Redis: of one name only one may run, and a killed one gives its name back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis

from collegium.cli import claim as claim_module
from collegium.cli.claim import Claim
from collegium.cli.preflight import check_cluster_name
from collegium.fabric.errors import Cancelled, FailedPrecondition, SettingsError, Unavailable
from collegium.launch import ROOT
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
