"""A real gateway over fake routers, in the test's own event loop, reached over real gRPC on loopback."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from collegium.fabric import rpc
from collegium.fabric.errors import CollegiumError, from_rpc_error
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import inference_pb2_grpc
from gateway.app import Gateway, open_gateway
from gateway.settings import GatewaySettings
from tests.fake_router import FakeRouter

DEMO = Path(__file__).parent.parent / "models" / "demo-lm"


@dataclass
class Rig:
    """What a test holds."""

    gateway: Gateway
    stub: Any
    address: str
    router_addresses: list[str]


@asynccontextmanager
async def rig(
    *routers: FakeRouter, model_dir: Path = DEMO, is_waiting: bool = True, **settings: Any
) -> AsyncIterator[Rig]:
    """Run a gateway over these routers and open a plain stub to it."""
    async with AsyncExitStack() as stack:
        addresses = [await router.start() for router in routers]
        for router in routers:
            stack.push_async_callback(router.stop)
        defaults: dict[str, Any] = {"model": model_dir, "routers": tuple(addresses), "metrics_bind": ""}
        gateway = await stack.enter_async_context(open_gateway(GatewaySettings(**(defaults | settings))))
        if is_waiting:
            await rpc.wait_until_serving(gateway.address)
        channel = await stack.enter_async_context(aio.insecure_channel(gateway.address))
        yield Rig(
            gateway=gateway,
            stub=inference_pb2_grpc.InferenceStub(channel),
            address=gateway.address,
            router_addresses=addresses,
        )


def ids_request(*prompt_ids: int, max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    """Ask for a greedy continuation of ids."""
    fields.setdefault("stopping", pb.Stopping(max_tokens=max_tokens))
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt_ids), **fields)


def text_request(text: str | bytes, max_tokens: int = 8, **fields: Any) -> pb.GenerateRequest:
    """Ask for a greedy continuation of a text."""
    fields.setdefault("stopping", pb.Stopping(max_tokens=max_tokens))
    return pb.GenerateRequest(text=text.encode() if isinstance(text, str) else text, **fields)


def token_ids(responses: list[pb.GenerateResponse], choice_index: int = 0) -> list[int]:
    """Gather one choice's ids, checking that offsets leave no gap and repeat nothing."""
    found: list[int] = []
    num_characters = 0
    for chunk in (chunk for response in responses for chunk in response.chunks):
        if chunk.choice_index == choice_index:
            assert chunk.token_offset == len(found)
            assert chunk.text_offset == num_characters
            found.extend(chunk.token_ids)
            num_characters += len(chunk.text)
    return found


def text(responses: list[pb.GenerateResponse], choice_index: int = 0) -> str:
    """Gather one choice's text."""
    chunks = (chunk for response in responses for chunk in response.chunks)
    return "".join(chunk.text for chunk in chunks if chunk.choice_index == choice_index)


def endings(responses: list[pb.GenerateResponse]) -> dict[int, tuple[str, str]]:
    """Give (finish reason, stop reason) by choice."""
    return {
        chunk.choice_index: (pb.FinishReason.Name(chunk.finish_reason), chunk.stop_reason)
        for response in responses
        for chunk in response.chunks
        if chunk.finish_reason
    }


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for loopback that signs itself; gives it and its key, in PEM."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return cert, key


async def gather(call: Any) -> list[pb.GenerateResponse]:
    """Read a stream to its end."""
    return [response async for response in call]


async def error_of(call: Any) -> CollegiumError:
    """Give the error that a call ends with."""
    with pytest.raises(aio.AioRpcError) as caught:
        if hasattr(call, "__aiter__"):
            await gather(call)
        else:
            await call
    return from_rpc_error(caught.value)


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until something holds; the test's own limit ends it where it never does."""
    while not condition():  # noqa: ASYNC110 - what is looked at has no event
        await asyncio.sleep(0.001)
