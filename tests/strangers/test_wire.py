"""What callers send that is no request: bytes of no message, methods that do not exist, texts beyond any measure."""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st

from collegium.fabric import interceptors, probes, rpc
from collegium.fabric.errors import (
    CollegiumError,
    Internal,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    from_rpc_error,
    shown,
    to_status,
    trailing_metadata,
)
from collegium.v1 import balancer_pb2_grpc
from gateway.auth import KeyInterceptor, KeyRing
from tests.balancers import running_balancer
from tests.fake_router import FakeRouter
from tests.gateway_rig import rig
from tests.memory_store import MemoryStore

SERVICES = ("Inference", "Router", "Expert", "Balancer")
GARBAGE = b"\xff\xff\xff\xff"  # a field number of 2^29 - 1, cut off
NOT_ASKED = [(InvalidArgument, "NO_REQUEST"), (Unimplemented, "UNKNOWN_METHOD")]


@dataclass(frozen=True)
class Method:
    path: str
    streams_requests: bool
    streams_responses: bool


def methods_of(service: str) -> list[Method]:
    found = descriptor_pool.Default().FindServiceByName(service)
    return [
        Method(f"/{service}/{method.name}", method.client_streaming, method.server_streaming)
        for method in found.methods
    ]


def servicer_of(service: str) -> tuple[Any, Any]:
    """A servicer of our own .proto whose every method reads what it is sent and answers nothing, and its function."""
    module = importlib.import_module(f"collegium.v1.{service.lower()}_pb2_grpc")

    async def read(self: Any, request: Any, context: Any) -> Any:
        """Read a stream as the router does: in another task, whose end is the end of the call."""
        if hasattr(request, "__aiter__"):

            async def drain() -> None:
                async for _ in request:
                    pass

            await asyncio.gather(asyncio.create_task(drain()), return_exceptions=True)
        else:
            await context.abort(grpc.StatusCode.DATA_LOSS, "a handler was called without a request")

    methods = {method.path.rpartition("/")[2]: read for method in methods_of(f"collegium.v1.{service}")}
    made = type("Reads", (getattr(module, f"{service}Servicer"),), methods)()
    return getattr(module, f"add_{service}Servicer_to_server"), made


@asynccontextmanager
async def every_server() -> AsyncIterator[dict[str, list[str]]]:
    """One server with every service of ours, a gateway, a balancer and a probes port: services by address."""
    for service in SERVICES:
        importlib.import_module(f"collegium.v1.{service.lower()}_pb2_grpc")
    async with AsyncExitStack() as stack:
        server = rpc.Server("all", services=[f"collegium.v1.{service}" for service in SERVICES])
        for service in SERVICES:
            server.add(*servicer_of(service))
        address = await server.start("127.0.0.1:0")
        stack.push_async_callback(server.stop, 0)
        gateway = await stack.enter_async_context(rig(FakeRouter()))
        balancer = await stack.enter_async_context(running_balancer(MemoryStore()))
        port = await stack.enter_async_context(probes.listening("127.0.0.1:0"))
        public = ["grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"]
        yield {
            address: [*(f"collegium.v1.{service}" for service in SERVICES), *public],
            gateway.address: ["collegium.v1.Inference", *public],
            balancer.address: ["collegium.v1.Balancer", *public],
            port: public[:1],
        }


async def status_of(channel: aio.Channel, method: Method, requests: list[bytes]) -> CollegiumError:
    """Call with raw bytes and give the status, whatever kind of method it is.

    A single request goes out with the call: grpc.aio hides the server's status behind an INTERNAL of its own where it
    comes while a stream is being written.
    """

    async def sending() -> AsyncIterator[bytes]:
        for request in requests:
            yield request

    if len(requests) == 1:
        call = channel.unary_stream(method.path)(requests[0], timeout=20)
    else:
        call = channel.stream_stream(method.path)(sending(), timeout=20)
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return from_rpc_error(caught.value)


async def test_bytes_that_are_no_message_are_an_invalid_argument_of_every_method(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = 0
    async with every_server() as servers:
        for address, services in servers.items():
            async with rpc.channel(address) as channel:
                for method in (method for service in services for method in methods_of(service)):
                    error = await status_of(channel, method, [GARBAGE])
                    is_offered = method.path != "/grpc.health.v1.Health/List" and (
                        address != list(servers)[-1] or method.path.endswith("/Check")  # all that probes need
                    )
                    expected = (
                        (InvalidArgument, "UNREADABLE_REQUEST") if is_offered else (Unimplemented, "UNKNOWN_METHOD")
                    )
                    assert (type(error), error.reason) == expected, (address, method.path)
                    seen += is_offered
    assert seen > 25
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]


async def test_a_unary_call_without_a_request_is_answered_at_once() -> None:
    async with every_server() as servers:
        for address, services in servers.items():
            async with rpc.channel(address) as channel:
                for method in (method for service in services for method in methods_of(service)):
                    if not method.streams_requests:
                        error = await status_of(channel, method, [])
                        assert (type(error), error.reason) in NOT_ASKED, (address, method.path)


async def test_a_request_that_does_not_come_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "_REQUEST_S", 0.05)
    async with every_server() as servers:
        for address in servers:
            async with rpc.channel(address) as channel:
                call = channel.stream_stream("/grpc.health.v1.Health/Check")(timeout=20)  # nothing is ever written
                with pytest.raises(aio.AioRpcError) as caught:
                    await call.read()
                assert from_rpc_error(caught.value).reason == "SLOW_REQUEST"


async def test_a_bad_message_amid_a_stream_ends_that_stream_with_its_status() -> None:
    async with every_server() as servers, rpc.channel(next(iter(servers))) as channel:
        attach = Method("/collegium.v1.Router/Attach", True, True)
        error = await status_of(channel, attach, [b"", b"", GARBAGE])
        assert (type(error), error.reason) == (InvalidArgument, "UNREADABLE_REQUEST")


@pytest.mark.parametrize(
    "path", ["/collegium.v1.Inference/Nothing", "/collegium.v1.Nobody/Asks", "/x", "/", "/grpc.health.v1.Health/No"]
)
async def test_a_method_that_does_not_exist_is_unimplemented_at_every_server(path: str) -> None:
    async with every_server() as servers:
        for address in servers:
            async with rpc.channel(address) as channel:
                for requests in ([], [b""], [GARBAGE]):
                    error = await status_of(channel, Method(path, True, True), requests)
                    assert (type(error), error.reason) == (Unimplemented, "UNKNOWN_METHOD"), (address, requests)


async def test_a_service_that_is_still_starting_says_so_of_its_own_methods_alone() -> None:
    server = rpc.Server("late", services=("collegium.v1.Balancer",))
    address = await server.start("127.0.0.1:0")
    try:
        async with rpc.channel(address) as channel:
            real = await status_of(channel, Method("/collegium.v1.Balancer/Join", False, False), [b""])
            other = await status_of(channel, Method("/collegium.v1.Balancer/Joint", False, False), [b""])
    finally:
        await server.stop(0)
    assert (type(real), real.reason) == (Unavailable, "STARTING")
    assert (type(other), other.reason) == (Unimplemented, "UNKNOWN_METHOD")
    assert balancer_pb2_grpc.BalancerStub is not None


async def test_a_caller_without_a_key_is_refused_before_it_has_sent_a_message() -> None:
    server = rpc.Server("keyed", interceptors=[KeyInterceptor(KeyRing(["k"]))])
    address = await server.start("127.0.0.1:0")
    try:
        async with rpc.channel(address) as channel:
            call = channel.stream_stream("/collegium.v1.Inference/Generate")(timeout=20)  # nothing is ever written
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
            error = await status_of(channel, Method("/collegium.v1.Inference/Generate", False, True), [GARBAGE])
            assert type(error) is Unauthenticated
    finally:
        await server.stop(0)


class Panic(BaseException):
    """As the panics of libraries written in Rust: no Exception."""


@pytest.mark.parametrize("kind", [Panic, ZeroDivisionError, RecursionError, MemoryError, StopIteration])
async def test_whatever_a_handler_raises_its_caller_gets_a_status(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(health_pb2_grpc.HealthServicer):
        async def Check(self, request: Any, context: Any) -> Any:
            raise kind("a secret")

        async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
            yield health_pb2.HealthCheckResponse()
            raise kind("a secret")

    server = rpc.plain_server()
    health_pb2_grpc.add_HealthServicer_to_server(Fails(), server)
    address = rpc.listen(server, "127.0.0.1:0", "--bind")
    await server.start()
    try:
        async with rpc.channel(address) as channel:
            for verb in ("Check", "Watch"):
                error = await status_of(channel, Method(f"/grpc.health.v1.Health/{verb}", False, True), [b""])
                assert (type(error), error.reason) == (Internal, "FAULT")
                assert "secret" not in error.message
    finally:
        await server.stop(0)
    assert caplog.text.count("a call failed by a fault of ours") == 2


async def test_a_callers_name_of_any_length_comes_back_cut() -> None:
    async with every_server() as servers:
        for address in servers:
            async with rpc.channel(address) as channel:
                for name in ("x" * 5_000, "é" * 100_000, "\n" * 20_000, "😀" * 9_000):
                    with pytest.raises(aio.AioRpcError) as caught:
                        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
                    error = from_rpc_error(caught.value)
                    assert type(error) is NotFound, address
                    assert f"({len(name)} characters)" in error.message
                    assert len(error.message) < 700
                error = await status_of(channel, Method("/" + "y" * 4_000, False, False), [b""])
                assert (type(error), "y" * 129 in error.message) == (Unimplemented, False)


@given(st.text(max_size=3_000), st.text(max_size=3_000), st.text(max_size=3_000), st.text(max_size=3_000))
def test_no_status_outgrows_the_metadata_that_peers_take(message: str, field: str, remedy: str, reason: str) -> None:
    size = max(1, 8_000 // max(1, len(message)))
    error = InvalidArgument(message * size, field=field * size, remedy=remedy * size, reason=reason)
    status = to_status(error)
    (_, details), *_ = trailing_metadata(error)
    percent_encoded = 3 * len(status.message.encode())
    assert percent_encoded + len(details) * 4 // 3 < 7_500


@pytest.mark.parametrize("text", ["\ud800" * 10, "ok", "\ud800" + "x" * 5_000])
def test_a_message_that_is_no_text_becomes_one(text: str) -> None:
    assert to_status(InvalidArgument(text)).message.encode()


def test_a_short_text_is_shown_whole_and_a_long_one_cut_with_its_length() -> None:
    assert shown("it's") == repr("it's")
    assert shown("a" * 128) == repr("a" * 128)
    assert shown("a" * 129) == f"{'a' * 128!r}... (129 characters)"
