"""gRPC servers and channels as every service has them: limits, keepalive, TLS, health, reflection, statuses.

Owns how these are put together. Knows no service by name; reflection and health are told the names.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from collegium.fabric import probes
from collegium.fabric.channels import (
    MAX_MESSAGE_BYTES,
    Option,
    TlsTrust,
    channel,
    channel_credentials,
    channel_options,
    read_file,
    read_key,
    split_address,
    wait_until_serving,
)
from collegium.fabric.health import SERVICE_NAME, Health
from collegium.fabric.hosts import bracketed
from collegium.fabric.interceptors import StatusInterceptor
from collegium.fabric.ports import SERVER_OPTIONS, limits, listen, plain_server
from collegium.fabric.secret_files import warn_if_open

__all__ = [
    "MAX_MESSAGE_BYTES",
    "Option",
    "Server",
    "TlsFiles",
    "TlsTrust",
    "advertised",
    "channel",
    "channel_credentials",
    "channel_options",
    "limits",
    "listen",
    "plain_server",
    "split_address",
    "wait_until_serving",
]

S = TypeVar("S")
_MAX_STREAMS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """A server's certificate chain and private key, PEM."""

    cert: Path
    key: Path


class Server:
    """One gRPC server: add servicers to `.grpc`, start it, say when it can serve.

    services: their full names, such as "collegium.v1.Router", for reflection and health.
    """

    def __init__(
        self,
        name: str,
        *,
        services: Iterable[str] = (),
        options: Sequence[Option] = (),
        tls: TlsFiles | None = None,
        interceptors: Sequence[aio.ServerInterceptor] = (),
    ) -> None:
        self.name = name
        self._names = tuple(services)
        self._tls = tls
        self.health = Health(self._names)
        merged = dict(SERVER_OPTIONS) | dict(limits(0, _MAX_STREAMS)) | dict(options)
        self.grpc = aio.server(
            interceptors=[StatusInterceptor(self._names), *interceptors], options=tuple(merged.items())
        )
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc)
        reflection.enable_server_reflection((*self._names, SERVICE_NAME, reflection.SERVICE_NAME), self.grpc)

    def add(self, register: Callable[[S, aio.Server], None], servicer: S) -> None:
        """Add a servicer by its generated function, at any time: until then its methods are UNAVAILABLE."""
        register(servicer, cast("aio.Server", _Late(self.grpc)))

    async def start(self, bind: str, *, setting: str = "--bind") -> str:
        """Listen and answer; gives the bound HOST:PORT. NOT_SERVING until set_serving.

        Raises FailedPrecondition, naming the setting and the address, where the address is in use.
        """
        bound = listen(self.grpc, bind, setting, None if self._tls is None else _server_credentials(self._tls))
        await self.grpc.start()
        probes.follow(self.health)
        return bound

    def set_serving(self, is_serving: bool, service: str = "") -> None:
        """Say whether the process can do its work; one name, or all with ""."""
        self.health.set_serving(is_serving, service)

    async def stop(self, grace_s: float) -> None:
        """Say NOT_SERVING, end the watches, give running calls their grace, and end."""
        self.health.end()
        await self.grpc.stop(grace_s)


class _Late:
    # What generated code adds servicers to: gRPC takes generic handlers at any time, registered methods only before its
    # start, and finds a method by either.
    def __init__(self, server: aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Nothing to add."""


def advertised(bound: str, advertise: str, setting: str = "--advertise") -> str:
    """Choose the address that others are told: the given one, else the bound one with a host that can be reached.

    Port 0 of the given one stands for the bound one. SettingsError names the setting where it is no address.

    An IPv6 host comes out in brackets, without which nobody can dial it.
    """
    if advertise:
        given, given_port = split_address(advertise, setting)
        return f"{bracketed(given)}:{given_port or bound.rpartition(':')[2]}"
    host, _, port = bound.rpartition(":")
    return f"{socket.gethostname() if host in ('0.0.0.0', '[::]', '::') else bracketed(host)}:{port}"


def _server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    warn_if_open(tls.key, "--tls-key")
    pair = (read_key(tls.key, "--tls-key"), read_file(tls.cert, "--tls-cert"))
    return grpc.ssl_server_credentials([pair])
