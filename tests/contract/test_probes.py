"""The port for probes: up before anything heavy, alive while the loop turns, ready when the service says so."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.fabric import probes, rpc
from collegium.fabric.errors import FailedPrecondition

ROOT = Path(__file__).parents[2]
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
LIMIT_S = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


async def check(address: str, service: str) -> int:
    async with aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_readiness_is_what_the_service_says_and_liveness_an_answer() -> None:
    async with probes.listening("127.0.0.1:0") as address:
        assert await check(address, "live") == SERVING
        assert await check(address, "") == NOT_SERVING  # there is no service yet
        server = rpc.Server("service", services=("collegium.v1.Inference",))
        await server.start("127.0.0.1:0")
        assert await check(address, "") == NOT_SERVING
        server.set_serving(True)
        assert await check(address, "") == SERVING
        other = rpc.Server("another one of the same process")
        await other.start("127.0.0.1:0")
        assert await check(address, "") == SERVING
        await other.stop(0)
        await server.stop(0)
        assert (await check(address, ""), await check(address, "live")) == (NOT_SERVING, SERVING)
        with pytest.raises(aio.AioRpcError) as caught:
            await check(address, "collegium.v1.Inference")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(aio.AioRpcError):
        await check(address, "live")


async def test_a_port_in_use_is_named_with_its_setting() -> None:
    async with probes.listening("127.0.0.1:0") as address:
        with pytest.raises(FailedPrecondition, match="--health-bind") as caught:
            async with probes.listening(address):
                pass
        assert caught.value.field == "--health-bind"


@contextmanager
def running(module: str, flags: Sequence[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", module, *flags], cwd=ROOT, env=os.environ | env, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ask(address: str, service: str) -> int:
    """Check once the port is there."""
    with grpc.insecure_channel(address) as channel:
        grpc.channel_ready_future(channel).result(LIMIT_S)
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=LIMIT_S).status


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        ("gateway", ["--model", "models/demo-lm"]),
        ("balancer_svc", []),  # its Redis is not there
        ("router_svc", ["--model", "models/demo-lm"]),
    ],
)
def test_a_service_that_waits_for_others_is_alive_and_not_ready(module: str, flags: list[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    given = [*flags, "--health-bind", address]
    if module != "balancer_svc":
        given += ["--balancer", f"127.0.0.1:{free_port()}"]
    with running(module, given, {"REDIS_URL": f"redis://127.0.0.1:{free_port()}"}) as process:
        assert ask(address, "live") == SERVING
        assert ask(address, "") == NOT_SERVING
        assert process.poll() is None
        process.terminate()
        process.wait(LIMIT_S)
        with pytest.raises(grpc.FutureTimeoutError), grpc.insecure_channel(address) as channel:
            grpc.channel_ready_future(channel).result(0.2)
