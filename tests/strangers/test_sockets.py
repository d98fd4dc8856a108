"""Connections that say nothing, say it slowly, or read nothing: each listening socket has a few, for seconds each."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import socketserver
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, Gauge

from collegium.fabric import rpc
from collegium.fabric.metrics_page import CONNECTION_S, MAX_CONNECTIONS, MetricsPage
from collegium.link import tcp_port
from tests.link_rig import make_rig

LIMIT_S = 30.0


@pytest.fixture
def opened() -> Iterator[list[socket.socket]]:
    sockets: list[socket.socket] = []
    yield sockets
    for one in sockets:
        one.close()


def silent(opened: list[socket.socket], address: str, count: int) -> list[socket.socket]:
    host, _, port = address.rpartition(":")
    made = [socket.create_connection((host, int(port))) for _ in range(count)]
    for one in made:
        one.setblocking(False)
    opened += made
    return made


def is_open(connection: socket.socket) -> bool:
    try:
        while connection.recv(65536):
            pass
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


class Served:
    """A page, and what it shows."""

    def __init__(self, **limits: Any) -> None:
        registry = CollectorRegistry()
        Gauge("answer", "The answer", registry=registry).set(42)
        self.page = MetricsPage(("127.0.0.1", 0), registry, **limits)
        self.address = f"127.0.0.1:{self.page.server_port}"

    def scrape(self) -> bytes:
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=LIMIT_S) as response:
            answer: bytes = response.read()
        return answer


@pytest.fixture
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    made = Served(**getattr(request, "param", {}))
    yield made
    made.page.end()


def threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_a_page_is_read_amid_any_number_of_silent_connections(served: Served, opened: list[socket.socket]) -> None:
    before = threads()
    for _ in range(10):
        silent(opened, served.address, 30)
        assert b"answer 42.0" in served.scrape()
        assert threads() - before <= 2 * MAX_CONNECTIONS
    assert sum(map(is_open, opened)) <= 2 * MAX_CONNECTIONS
    assert served.page.num_cut >= 300 - 2 * MAX_CONNECTIONS
    assert CONNECTION_S <= 10


@pytest.mark.parametrize("served", [{"max_connections": 4, "connection_s": 0.3}], indirect=True)
def test_a_connection_that_says_nothing_is_cut_and_its_thread_ends(served: Served, opened: list[socket.socket]) -> None:
    before = threads()
    made = silent(opened, served.address, 3)
    wait_for(lambda: not any(map(is_open, made)))
    wait_for(lambda: threads() == before)
    assert served.page.counters()["collegium_metrics_page_cuts_total"] >= 3


@pytest.mark.parametrize("served", [{"max_connections": 4, "connection_s": 0.3}], indirect=True)
def test_a_request_in_drops_and_an_answer_that_is_not_read_are_cut(served: Served, opened: list[socket.socket]) -> None:
    (drops,) = silent(opened, served.address, 1)

    def drop() -> bool:
        try:
            drops.send(b"X")  # each one in time, the whole never
        except OSError:
            return False
        return is_open(drops)

    wait_for(lambda: not drop())
    assert b"answer" in served.scrape()


def test_a_page_without_descriptors_waits_instead_of_turning_without_end(
    served: Served, opened: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def refuse(_: object) -> None:
        tries.append(time.monotonic())
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(socketserver.TCPServer, "get_request", refuse)
        silent(opened, served.address, 1)
        wait_for(lambda: len(tries) >= 4)
    assert tries[3] - tries[0] > 0.25  # three pauses
    assert b"answer" in served.scrape()


async def ask(address: str) -> None:
    async with aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S, wait_for_ready=True)


async def test_a_grpc_port_has_so_many_connections_and_cuts_those_that_say_nothing(
    opened: list[socket.socket],
) -> None:
    soon = ("grpc.server_handshake_timeout_ms", 300)
    server = rpc.Server("few", options=(*rpc.limits(8, 10), soon))
    address = await server.start("127.0.0.1:0")
    try:
        made = silent(opened, address, 50)
        wait_for(lambda: sum(map(is_open, made)) <= 8)
        await ask(address)  # once the silent ones are cut, however many there were
        wait_for(lambda: not any(map(is_open, made)))
    finally:
        await server.stop(0)


def test_every_grpc_port_has_a_bound_and_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    real = aio.server

    def server(*args: Any, **kwargs: Any) -> Any:
        made.append(dict(kwargs["options"]))
        return real(*args, **kwargs)

    async def make() -> None:
        monkeypatch.setattr(aio, "server", server)
        rpc.Server("any")
        rpc.plain_server()

    asyncio.run(make())
    assert len(made) == 2
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for options in made:
        assert 0 < options["grpc.max_allowed_incoming_connections"] <= max(64, descriptors // 2)
        assert 0 < options["grpc.max_concurrent_streams"] <= 4096
        assert options["grpc.server_handshake_timeout_ms"] <= 10_000
        assert options["grpc.max_metadata_size"] <= 8192


@pytest.mark.parametrize(("soft", "most"), [(1024, 512), (100, 64), (resource.RLIM_INFINITY, 2**20)])
def test_connections_are_bounded_by_the_descriptors_of_the_process(
    monkeypatch: pytest.MonkeyPatch, soft: int, most: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert dict(rpc.limits(0, 1))["grpc.max_allowed_incoming_connections"] == most
    assert dict(rpc.limits(7, 1))["grpc.max_allowed_incoming_connections"] == 7


def test_a_data_port_without_descriptors_does_not_turn_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[socket.socket]
) -> None:
    rig = make_rig("tcp", tmp_path)
    try:
        port: Any = rig.port
        tries: list[float] = []

        def refuse(*_: object) -> None:
            tries.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patched:
            patched.setattr(tcp_port, "accept", refuse)
            silent(opened, rig.address, 1)
            polls = 0
            while len(tries) < 4:
                port.poll(1.0)
                polls += 1
                assert polls < 100
        assert tries[3] - tries[0] > 0.25  # three pauses
        wait_for(lambda: port.poll(0.05) == [] and len(port._callers) == 1)
    finally:
        rig.close()
