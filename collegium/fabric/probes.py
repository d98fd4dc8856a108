"""A plaintext port for Kubernetes' probes, which speak neither mutual TLS nor our API keys.

Owns the server that answers grpc.health.v1 there, and nothing else, from before anything heavy is imported until the
process ends: service "live" is SERVING as long as the event loop turns, for an answer is all it takes; "" is what the
service's own server says of itself, and NOT_SERVING before there is one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.fabric.errors import NotFound, shown
from collegium.fabric.health import Health
from collegium.fabric.ports import listen, plain_server

LIVE = "live"
_current: ContextVar[Probes | None] = ContextVar("probes", default=None)
Context = aio.ServicerContext[Any, Any]


class Probes(health_pb2_grpc.HealthServicer):
    """Answers probes; `Check` alone, since nobody watches by them."""

    def __init__(self) -> None:
        self._health: Health | None = None

    def follow(self, health: Health) -> None:
        """Answer readiness as the service's first server does."""
        self._health = self._health or health

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Answer once; NOT_FOUND for any other name."""
        if request.service not in ("", LIVE):
            raise NotFound(f"{shown(request.service)} is not probed here", reason="UNKNOWN_SERVICE", field="service")
        is_well = request.service == LIVE or (self._health is not None and self._health.is_serving())
        status = health_pb2.HealthCheckResponse.SERVING if is_well else health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse(status=status)


def follow(health: Health) -> None:
    """Let the probes of this process, if it has any, answer readiness as `health` does."""
    probes = _current.get()
    if probes is not None:
        probes.follow(health)


@asynccontextmanager
async def listening(bind: str) -> AsyncGenerator[str]:
    """Answer probes at `bind` (HOST:PORT; empty: none) inside the context; gives the bound address.

    Raises FailedPrecondition, naming the setting and the address, where it cannot be listened on.
    """
    if not bind:
        yield ""
        return
    probes = Probes()
    server = plain_server()
    health_pb2_grpc.add_HealthServicer_to_server(probes, server)
    bound = listen(server, bind, "--health-bind")
    await server.start()
    token = _current.set(probes)
    try:
        yield bound
    finally:
        _current.reset(token)
        await server.stop(0)
