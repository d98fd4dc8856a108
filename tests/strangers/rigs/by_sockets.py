"""What a stranger does to a listening socket without speaking its protocol, or by speaking it wrongly.

Each function is one attack; ATTACKS is the table. The ports are those that the kernel shows, of every process.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.link import header
from collegium.link.stream import unix_address
from tests.strangers.rigs.attack import SOON_S, Attack, at_once, unary_status
from tests.strangers.rigs.calls import OK
from tests.strangers.rigs.footprint import footprint
from tests.strangers.rigs.target import Port, Target, read_page

_MANY = 1000
_CONNECT_S = 0.25  # a port whose queue is full takes no more, which is an answer as well
_SILENT_S = 15.0  # how long a port may keep others waiting while silent connections hang on it


def silent_connections(target: Target, count: int) -> None:
    """Connections that say nothing, more than a process has descriptors: others are answered.

    On metrics pages and data ports at once, and in the long run on each kind of port. A silent connection may hold its
    place for some seconds.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # of this process, which holds the other ends
    kinds = [("metrics", "data")] if count < _MANY else [("metrics",), ("data",), ("health",), ("grpc",)]
    try:
        for some in kinds:
            ports = [port for port in target.ports if port.kind in some]
            with _few_descriptors(target, count), ExitStack() as stack:
                for port in ports:
                    stack.enter_context(_connections(port.address, count))
                _check_answers(ports)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def half_requests(target: Target, count: int) -> None:
    """Beginnings of HTTP requests, of HTTP/2 connections and of TLS, that never go on, on every port at once."""
    beginnings = (
        b"GET /metrics HTTP/1.1\r\nHost: x\r\nX: ",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x40\x00\x01\x04\x00\x00\x00\x01",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x11\xc0\x02\x01" + bytes(40),
    )
    with ExitStack() as stack:
        for port in target.ports:
            for at, one in enumerate(stack.enter_context(_connections(port.address, count))):
                with contextlib.suppress(OSError):
                    one.sendall(beginnings[at % len(beginnings)])
        _check_answers(target.ports)


def noise(target: Target, count: int) -> None:
    """Random bytes, a long line, a request with 10,000 headers: on every port."""
    draw = random.Random(5)
    sent = (
        draw.randbytes(4096),
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"".join(b"X%d: y\r\n" % at for at in range(10_000)) + b"\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + bytes(1000),
        b"\xff" * 70_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + draw.randbytes(4096),
    )
    for port in target.ports:
        for at in range(count):
            with _connections(port.address, 1) as opened:
                for one in opened:
                    one.settimeout(1.0)
                    with contextlib.suppress(OSError):
                        one.sendall(sent[at % len(sent)])
                        one.shutdown(socket.SHUT_WR)
    _check_answers(target.ports)


def wrong_handshakes(target: Target, count: int) -> None:
    """Handshakes of links: silent, short, with another secret, kind or size; by TCP and by unix socket."""
    good = header.hello(1, bytes(16), torch.float32, 192)
    openings = (
        b"",
        good[:1],
        good[:63],
        good[:64],
        good[:-1],
        good,
        good * 20,
        good[:64] + bytes(len(good) - 64),
        header.hello(2**64 - 1, b"\xff" * 16, torch.bfloat16, 2**32 - 1, are_rows_apart=True),
        header.goodbye("x" * 1000),
        header.plain(header.Kind.DISPATCH, 1, bytes(100)),
        b"\xff" * 200,
        bytes(200),
    )
    with ExitStack() as stack:
        for port in target.of("data"):
            addresses: list[str] = [port.address, *target.data_names(port.process)]
            for address in addresses:
                for at in range(count):
                    for one in stack.enter_context(_connections(address, 1)):
                        with contextlib.suppress(OSError):
                            one.sendall(openings[at % len(openings)])
        target.wait_for_canary(3)


@contextmanager
def _few_descriptors(target: Target, count: int) -> Iterator[None]:
    """Let every process have fewer descriptors than so many connections to each of its ports take."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in target.pids.values()}
    for pid, (_, most) in before.items():
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (footprint(pid).num_descriptors + count, most))
    try:
        yield
    finally:
        for pid, limits in before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@contextmanager
def _connections(address: str, count: int) -> Iterator[list[socket.socket]]:
    """Open connections, fewer where no more are taken; all are closed in the end."""
    opened: list[socket.socket] = []
    try:
        for _ in range(count):
            try:
                if address.startswith(("@", "/")):
                    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                    opened.append(one)
                    one.settimeout(_CONNECT_S)
                    one.connect(unix_address(address))
                else:
                    host, _, number = address.rpartition(":")
                    opened.append(socket.create_connection((host, int(number)), timeout=_CONNECT_S))
            except OSError:
                break
        yield opened
    finally:
        for one in opened:
            one.close()


def _check_answers(ports: Sequence[Port]) -> None:
    """Hold that a new caller of each port is answered in time."""
    wrong: list[str] = []

    def look(at: int) -> None:
        port, until_s = ports[at], time.monotonic() + _SILENT_S
        while not _answers(port):
            if time.monotonic() > until_s:
                wrong.append(f"{port.process} {port.kind}: a new caller got no answer within {_SILENT_S:g} s")
                return
            time.sleep(0.1)

    at_once(len(ports), look)
    assert not wrong, "\n".join(wrong)


def _answers(port: Port) -> bool:
    if port.kind == "metrics":
        with contextlib.suppress(OSError, Exception):
            return bool(read_page(int(port.address.rpartition(":")[2]), timeout_s=2.0))
        return False
    if port.kind == "data":
        host, _, number = port.address.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(number)), timeout=2.0) as one:
            one.sendall(header.hello(1, os.urandom(16), torch.float32, 192))
            return bool(one.recv(1))  # the reason why not
        return False
    own = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0))
    with grpc.insecure_channel(port.address, options=own) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return unary_status(lambda: stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)) == OK


ATTACKS = (
    Attack(name="silent connections", run=silent_connections, few=90, many=1007),
    Attack(name="half requests", run=half_requests, few=10, many=200),
    Attack(name="noise", run=noise, few=6, many=60),
    Attack(name="wrong handshakes", run=wrong_handshakes, few=26, many=300),
)
assert SOON_S > _SILENT_S
