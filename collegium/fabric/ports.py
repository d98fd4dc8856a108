"""Where a gRPC server listens and what it bears: the transport options of servers, the bounds, the port.

Owns them. Knows neither TLS files, nor health, nor whose server it is.
"""

from __future__ import annotations

import os
import resource
import socket

import grpc
from grpc import aio

from collegium.fabric.channels import MESSAGE_LIMITS, Option, split_address
from collegium.fabric.errors import FailedPrecondition
from collegium.fabric.interceptors import StatusInterceptor

_HANDSHAKE_MS = 5_000  # from a connection's acceptance to its first frame; TLS included
_IDLE_MS = 600_000  # without a call: a client connects again by itself
_PLAIN_CONNECTIONS = 64
_PLAIN_STREAMS = 64
SERVER_OPTIONS: tuple[Option, ...] = (
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


def limits(max_connections: int, max_streams: int) -> tuple[Option, ...]:
    """Give the options that bound a server's connections and the calls of each; as the settings of these names.

    max_connections 0: half of the descriptors that this process may open. gRPC closes a connection beyond the bound at
    once, and one that sends no valid first frame after 5 s; it counts neither: process_open_fds of the metrics page
    shows how many descriptors are open.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max_connections or (2**20 if descriptors == resource.RLIM_INFINITY else max(64, descriptors // 2))
    return (("grpc.max_allowed_incoming_connections", most), ("grpc.max_concurrent_streams", max_streams))


def plain_server() -> aio.Server:
    """Make a bare gRPC server that maps our errors to statuses, with few connections: for what is no service."""
    options = (*SERVER_OPTIONS, *limits(_PLAIN_CONNECTIONS, _PLAIN_STREAMS))
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


def _why_not(host: str, port: int) -> str:
    # gRPC keeps the reason to itself, and writes lines of its own: try with a plain socket first.
    try:
        with socket.create_server((host.strip("[]"), port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except socket.gaierror as error:
        return error.strerror or str(error)
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
