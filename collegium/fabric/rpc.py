"""gRPC servers and channels as every service has them: limits, keepalive, TLS, health, reflection, statuses.

Owns the transport options. Knows no service by name; reflection and health are told the names.
"""

from __future__ import annotations

import os
import resource
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
    MESSAGE_LIMITS,
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
from collegium.fabric.errors import FailedPrecondition
from collegium.fabric.health import SERVICE_NAME, Health
from collegium.fabric.hosts import bracketed
from collegium.fabric.interceptors import StatusInterceptor
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
_HANDSHAKE_MS = 5_000  # from a connection's acceptance to its first frame; TLS included
_IDLE_MS = 600_000  # without a call: a client connects again by itself
_MAX_STREAMS = 4096
_PROBE_CONNECTIONS = 64
_PROBE_STREAMS = 64
_SERVER_OPTIONS: tuple[Option, ...] = (
    *MESSAGE_LIMITS,
    ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
    ("grpc.max_connection_idle_ms", _IDLE_MS),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.so_reuseport", 0),  # else a port in use is shared in silence
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """A server's certificate chain and private key, PEM."""

    cert: Path
    key: Path


def limits(max_connections: int, max_streams: int) -> tuple[Option, ...]:
    """Give the options that bound a server's connections and the calls of each; as the settings of these names.

    max_connections 0: half of the descriptors that this process may open. gRPC closes a connection beyond the bound at
    once, and one that sends no valid first frame after 5 s; it counts neither: process_open_fds of the metrics page
    shows how many descriptors are open.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max_connections or (2**20 if descriptors == resource.RLIM_INFINITY else max(64, descriptors // 2))
    return (("grpc.max_allowed_incoming_connections", most), ("grpc.max_concurrent_streams", max_streams))


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
        merged = dict(_SERVER_OPTIONS) | dict(limits(0, _MAX_STREAMS)) | dict(options)
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


def plain_server() -> aio.Server:
    """Make a bare gRPC server that maps our errors to statuses, with few connections: for what is no service."""
    options = (*_SERVER_OPTIONS, *limits(_PROBE_CONNECTIONS, _PROBE_STREAMS))
    return aio.server(interceptors=[StatusInterceptor(())], options=options)


def listen(server: aio.Server, bind: str, setting: str, credentials: grpc.ServerCredentials | None = None) -> str:
    """Give a server its port before it starts; returns the bound HOST:PORT.

    Raises FailedPrecondition, naming the setting and the address, where it cannot be listened on.
    """
    host, port = split_address(bind, setting)
    why_not = _why_not(host, port)
    bound = 0
    if not why_not:
        try:
            bound = server.add_insecure_port(bind) if credentials is None else server.add_secure_port(bind, credentials)
        except RuntimeError:
            bound = 0
    if bound == 0:
        raise FailedPrecondition(
            f"{setting}={bind} cannot be listened on: {why_not or 'gRPC refused it'}",
            reason="ADDRESS_IN_USE",
            field=setting,
            remedy="choose another port, or 0 for any free one",
        )
    return f"{host}:{bound}"


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


def _why_not(host: str, port: int) -> str:
    # gRPC keeps the reason to itself, and writes lines of its own: try with a plain socket first.
    try:
        with socket.create_server((host.strip("[]"), port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except socket.gaierror as error:
        return error.strerror or str(error)
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
