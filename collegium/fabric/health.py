"""grpc.health.v1 with a Watch that streams and that ends when the server does.

Owns what a server says of itself, by service name; "" is the whole process. grpcio's own servicer keeps its watches
open until the grace of a stop is over, which would make every stop last that long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.fabric.errors import NotFound, shown

SERVICE_NAME = "grpc.health.v1.Health"
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
Context = aio.ServicerContext[Any, Any]


class Health(health_pb2_grpc.HealthServicer):
    """Answers health checks of one server; owned by its event loop."""

    def __init__(self, names: Iterable[str]) -> None:
        self._serving: dict[str, bool] = dict.fromkeys(("", *names), False)
        self._changed = asyncio.Event()
        self._is_over = False

    def is_serving(self, service: str = "") -> bool:
        """Say what a check would answer."""
        return self._serving.get(service, False)

    def set_serving(self, is_serving: bool, service: str = "") -> None:
        """Change the answer of one name; of all names where it is "". Ignored after end()."""
        if self._is_over:
            return
        names = [service] if service else list(self._serving)
        if any(self._serving.get(name) != is_serving for name in names):
            self._serving |= dict.fromkeys(names, is_serving)
            self._notify()

    def end(self) -> None:
        """Answer NOT_SERVING from now on and end every watch."""
        self.set_serving(False)
        self._is_over = True
        self._notify()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Answer once; NOT_FOUND for a name that is not served here."""
        if request.service not in self._serving:
            raise NotFound(
                f"{shown(request.service)} is not a service of this server", reason="UNKNOWN_SERVICE", field="service"
            )
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Answer now and at every change, until the server ends."""
        last = None
        while True:
            changed, status, is_over = self._changed, self._status(request.service), self._is_over
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            if is_over:
                return
            await changed.wait()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in self._serving:
            return _UNKNOWN
        return _SERVING if self._serving[service] else _NOT_SERVING

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
