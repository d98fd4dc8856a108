"""Servers and channels of the fabric over real gRPC: statuses, streams, health, reflection, limits, TLS, ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from collegium.fabric import rpc
from collegium.fabric.errors import (
    CollegiumError,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    SettingsError,
    Unavailable,
    from_rpc_error,
)
from collegium.fabric.interceptors import StatusInterceptor
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc

NAME = "collegium.v1.Balancer"


class Faulty(balancer_pb2_grpc.BalancerServicer):
    """Fails in every way; its stream counts from 1 until it is cancelled."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        raise ResourceExhausted("the queue is full", reason="QUEUE_FULL", field="prompt", retry_after_s=0.5)

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        raise ZeroDivisionError("the secret of this server")

    async def GetPlacement(self, request: pb.GetPlacementRequest, context: Any) -> pb.GetPlacementResponse:
        return pb.GetPlacementResponse()

    async def WatchPlacement(
        self, request: pb.WatchPlacementRequest, context: Any
    ) -> AsyncIterator[pb.WatchPlacementResponse]:
        try:
            for epoch in range(1, 10_000):
                if request.member_id == "fail" and epoch == 3:
                    raise InvalidArgument("is odd", field="epoch")
                yield pb.WatchPlacementResponse(placement=pb.Placement(epoch=epoch))
        finally:
            self.ended.set()


@asynccontextmanager
async def serving(servicer: Faulty | None = None) -> AsyncIterator[tuple[rpc.Server, str]]:
    server = rpc.Server("faulty", services=(NAME,))
    if servicer is not None:
        server.add(balancer_pb2_grpc.add_BalancerServicer_to_server, servicer)
    address = await server.start("127.0.0.1:0")
    try:
        yield server, address
    finally:
        await server.stop(2.0)


async def failure_of(call: Any) -> CollegiumError:
    with pytest.raises(aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_our_errors_arrive_whole() -> None:
    async with serving(Faulty()) as (_, address), rpc.channel(address) as channel:
        error = await failure_of(balancer_pb2_grpc.BalancerStub(channel).Join(pb.JoinRequest()))
    assert type(error) is ResourceExhausted
    assert (error.reason, error.field, error.retry_after_s) == ("QUEUE_FULL", "prompt", 0.5)


async def test_a_fault_of_ours_is_internal_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(Faulty()) as (_, address), rpc.channel(address) as channel:
        error = await failure_of(balancer_pb2_grpc.BalancerStub(channel).Renew(pb.RenewRequest()))
    assert type(error) is Internal
    assert "secret" not in error.message
    assert "the secret of this server" in caplog.text


async def test_a_stream_that_fails_delivers_what_came_before() -> None:
    async with serving(Faulty()) as (_, address), rpc.channel(address) as channel:
        watch = balancer_pb2_grpc.BalancerStub(channel).WatchPlacement(pb.WatchPlacementRequest(member_id="fail"))
        epochs = []
        with pytest.raises(aio.AioRpcError) as caught:
            async for view in watch:
                epochs.append(view.placement.epoch)
    error = from_rpc_error(caught.value)
    assert epochs == [1, 2]
    assert (type(error), error.field) == (InvalidArgument, "epoch")


async def test_a_cancelled_stream_runs_its_handlers_finally_at_once() -> None:
    servicer = Faulty()
    async with serving(servicer) as (_, address), rpc.channel(address) as channel:
        watch = balancer_pb2_grpc.BalancerStub(channel).WatchPlacement(pb.WatchPlacementRequest())
        await watch.read()
        assert not servicer.ended.is_set()
        watch.cancel()
        await servicer.ended.wait()


async def test_a_status_that_finds_its_caller_gone_is_a_cancelled_call_and_no_fault() -> None:
    class Gone:
        """A call's context at the moment when the caller's end of the stream has just gone."""

        def invocation_metadata(self) -> tuple[()]:
            return ()

        async def read(self) -> object:
            return object()

        async def abort(self, *_: object) -> None:
            raise aio.InternalError("Failed execute_batch")

    async def refuse(request: Any, context: Any) -> None:
        raise Unavailable("not now")

    async def find(_: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(refuse)

    details: Any = type("Details", (), {"method": "/a.B/C", "invocation_metadata": ()})()
    handler: Any = await StatusInterceptor(()).intercept_service(find, details)
    with pytest.raises(asyncio.CancelledError):
        await handler.stream_unary(None, Gone())


async def test_a_service_that_is_added_late_is_unavailable_until_then() -> None:
    async with serving() as (server, address), rpc.channel(address) as channel:
        stub = balancer_pb2_grpc.BalancerStub(channel)
        error = await failure_of(stub.GetPlacement(pb.GetPlacementRequest()))
        assert (type(error), error.reason) == (Unavailable, "STARTING")
        server.add(balancer_pb2_grpc.add_BalancerServicer_to_server, Faulty())
        assert await stub.GetPlacement(pb.GetPlacementRequest()) == pb.GetPlacementResponse()


async def test_an_unknown_method_is_unimplemented() -> None:
    async with serving(Faulty()) as (_, address), rpc.channel(address) as channel:
        error = await failure_of(channel.unary_unary("/collegium.v1.Nobody/Asks")(b""))
    assert error.code is grpc.StatusCode.UNIMPLEMENTED


async def test_health_is_told_by_name_and_unknown_names_are_not_found() -> None:
    async with serving(Faulty()) as (server, address), rpc.channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> int:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        not_serving, is_serving = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING
        assert [await status(""), await status(NAME)] == [not_serving, not_serving]
        server.set_serving(True)
        assert [await status(""), await status(NAME)] == [is_serving, is_serving]
        server.set_serving(False, NAME)
        assert [await status(""), await status(NAME)] == [is_serving, not_serving]
        error = await failure_of(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
        assert (error.code, error.field) == (grpc.StatusCode.NOT_FOUND, "service")


async def test_a_watch_tells_every_change_and_an_unknown_name_as_such() -> None:
    async with serving(Faulty()) as (server, address), rpc.channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
        statuses = [(await watch.read()).status]
        for is_serving in (True, False, True):
            server.set_serving(is_serving)
            statuses.append((await watch.read()).status)
        assert statuses == [2, 1, 2, 1]
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def test_stopping_does_not_wait_for_watches() -> None:
    server = rpc.Server("idle")
    address = await server.start("127.0.0.1:0")
    async with rpc.channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        async with asyncio.timeout(60):
            await server.stop(1e6)


async def test_waiting_for_serving_ends_when_it_is() -> None:
    async with serving(Faulty()) as (server, address):
        waiting = asyncio.create_task(rpc.wait_until_serving(address))
        async with rpc.channel(address) as channel:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert not waiting.done()
        server.set_serving(True)
        await waiting


async def test_reflection_lists_the_services() -> None:
    async with serving(Faulty()) as (_, address), rpc.channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        call.cancel()
    assert {NAME, "grpc.health.v1.Health"} <= names


async def test_a_message_over_the_limit_is_refused_and_the_channel_lives_on() -> None:
    async with serving(Faulty()) as (_, address), rpc.channel(address) as channel:
        stub = balancer_pb2_grpc.BalancerStub(channel)
        huge = pb.WatchPlacementRequest(member_id="x" * rpc.MAX_MESSAGE_BYTES)
        error = await failure_of(stub.WatchPlacement(huge).read())
        assert type(error) is ResourceExhausted
        await stub.GetPlacement(pb.GetPlacementRequest())


async def test_a_port_in_use_names_the_setting_and_the_address() -> None:
    async with serving(Faulty()) as (_, address):
        second = rpc.Server("second")
        with pytest.raises(FailedPrecondition) as caught:
            await second.start(address)
        await second.stop(0)
    assert f"--bind={address} cannot be listened on: Address already in use" in caught.value.message
    assert caught.value.reason == "ADDRESS_IN_USE"


@pytest.mark.parametrize("bind", ["", "5000", "h:x", "h:70000"])
async def test_an_address_that_is_none_is_a_settings_error(bind: str) -> None:
    server = rpc.Server("nowhere")
    with pytest.raises(SettingsError, match="give HOST:PORT"):
        await server.start(bind)
    await server.stop(0)


def test_the_advertised_address_is_the_given_one_or_one_that_can_be_reached() -> None:
    assert rpc.advertised("127.0.0.1:5", "") == "127.0.0.1:5"
    assert rpc.advertised("127.0.0.1:5", "box:7") == "box:7"
    assert rpc.advertised("127.0.0.1:5", "box:0") == "box:5"
    assert rpc.advertised("[::1]:5", "") == rpc.advertised("::1:5", "") == "[::1]:5"
    assert rpc.advertised("[::]:5", "[fd00::7]:0") == rpc.advertised("[::]:5", "fd00::7:0") == "[fd00::7]:5"
    host, _, port = rpc.advertised("0.0.0.0:5", "").rpartition(":")
    assert host not in ("", "0.0.0.0")
    assert port == "5"
