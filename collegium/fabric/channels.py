"""Channels as every caller has them: limits, keepalive, TLS, no proxy; and the reading of addresses.

Every channel of the project is opened here. Owns the transport options that both ends share. Needs grpc alone, so that
the SDK can use it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.fabric.addresses import read_address
from collegium.fabric.errors import SettingsError

# By PKCS #8, and by OpenSSL's older form.
_ENCRYPTED_KEY = (b"-----BEGIN ENCRYPTED PRIVATE KEY-----", b"Proc-Type: 4,ENCRYPTED")
_UTF8_MARK = b"\xef\xbb\xbf"
MAX_MESSAGE_BYTES = 16 * 2**20
Option = tuple[str, int | str]
MESSAGE_LIMITS: tuple[Option, ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
# Processes of a cluster reach each other directly: an http_proxy of the shell is for the world outside.
NO_PROXY: tuple[Option, ...] = (("grpc.enable_http_proxy", 0),)
_CHANNEL_OPTIONS: tuple[Option, ...] = (
    *MESSAGE_LIMITS,
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    *NO_PROXY,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsTrust:
    """Whom a client trusts: a CA file in PEM, None for the system's."""

    ca: Path | None = None


def channel(
    address: str,
    *,
    tls: TlsTrust | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[Option] = (),
) -> aio.Channel:
    """Open a channel with our limits and keepalive and without a proxy; options beat ours.

    address: HOST:PORT, or several with numeric hosts, separated by commas: the first that answers is used; see
    check_target. Plain text unless tls or credentials are given. SettingsError where the CA file cannot be read.
    """
    trust = channel_credentials(tls) if credentials is None and tls is not None else credentials
    if trust is None:
        return aio.insecure_channel(_target(address), options=_merged(options))
    return aio.secure_channel(_target(address), trust, options=_merged(options))


def blocking_channel(
    address: str,
    *,
    tls: TlsTrust | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    options: Sequence[Option] = (),
) -> grpc.Channel:
    """Open a synchronous channel; see channel()."""
    trust = channel_credentials(tls) if credentials is None and tls is not None else credentials
    if trust is None:
        return grpc.insecure_channel(_target(address), options=_merged(options))
    return grpc.secure_channel(_target(address), trust, options=_merged(options))


def channel_options() -> tuple[Option, ...]:
    """Give our options for channels."""
    return _CHANNEL_OPTIONS


def _merged(options: Sequence[Option]) -> tuple[Option, ...]:
    return tuple((dict(_CHANNEL_OPTIONS) | dict(options)).items())


def channel_credentials(tls: TlsTrust) -> grpc.ChannelCredentials:
    """Make credentials from a CA file; SettingsError if it cannot be read or holds no certificate."""
    if tls.ca is None:
        return grpc.ssl_channel_credentials()
    return ca_credentials(read_file(tls.ca, "the CA file"), f"the CA file {tls.ca}")


def ca_credentials(pem: bytes, what: str) -> grpc.ChannelCredentials:
    """Make credentials from certificates in PEM; SettingsError, naming what it is, if there is none."""
    try:
        ssl.create_default_context(cadata=pem.decode("ascii", "ignore"))
    except (ValueError, ssl.SSLError):
        raise SettingsError(f"{what} holds no certificate in PEM") from None
    return grpc.ssl_channel_credentials(pem)


def check_target(text: str, setting: str) -> None:
    """Check what a setting gives as the address of a channel; SettingsError names the setting."""
    parts = [part for part in text.split(",") if part.strip()]
    try:
        addresses = [read_address(part, is_encrypted=False) for part in parts]  # services speak plain text
        hosts = {address.rpartition(":")[0].strip("[]") for address in addresses}
    except ValueError as error:
        raise SettingsError(f"{setting}={text!r} cannot be used: {error}; give HOST:PORT") from None
    if not parts:
        raise SettingsError(f"{setting}={text!r} cannot be used: give HOST:PORT")
    if len(parts) == 1:
        return
    try:
        versions = {ipaddress.ip_address(host).version for host in hosts}
    except ValueError as error:
        raise SettingsError(f"{setting}={text!r}: several addresses need numeric hosts ({error})") from None
    if len(versions) != 1:
        raise SettingsError(f"{setting}={text!r}: several addresses need hosts of one kind, IPv4 or IPv6")


def _target(address: str) -> str:
    """Write an address for gRPC. One that is none, as a peer may tell it, is left to gRPC, which will not reach it."""
    try:
        check_target(address, "address")
    except SettingsError:
        return address
    parts = [read_address(part) for part in address.split(",") if part.strip()]
    if len(parts) == 1:
        return parts[0]
    kind = "ipv6" if parts[0].startswith("[") else "ipv4"
    return f"{kind}:{','.join(parts)}"


async def wait_until_serving(address: str, *, service: str = "", tls: TlsTrust | None = None) -> None:
    """Wait, without a limit of its own, until a server says SERVING."""
    async with channel(address, tls=tls) as link:
        stub: Any = health_pb2_grpc.HealthStub(link)
        while True:
            try:
                watch: AsyncIterator[health_pb2.HealthCheckResponse] = stub.Watch(
                    health_pb2.HealthCheckRequest(service=service), wait_for_ready=True
                )
                async for response in watch:
                    if response.status == health_pb2.HealthCheckResponse.SERVING:
                        return
            except aio.AioRpcError:
                await asyncio.sleep(0.05)


def split_address(address: str, setting: str) -> tuple[str, int]:
    """Split HOST:PORT; SettingsError names the setting."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise SettingsError(f"{setting}={address!r} cannot be used: give HOST:PORT, such as 127.0.0.1:0")
    return host, int(port)


def read_file(path: Path, setting: str) -> bytes:
    """Read a PEM file that a setting names, without the byte order mark that some editors put before it.

    SettingsError says why it cannot be read.
    """
    try:
        return path.read_bytes().removeprefix(_UTF8_MARK)
    except OSError as error:
        raise SettingsError(f"{setting}={path} cannot be read: {error.strerror}") from error


def read_key(path: Path, setting: str) -> bytes:
    """Read a private key in PEM; SettingsError as read_file, and if it is encrypted: gRPC takes no password."""
    pem = read_file(path, setting)
    if any(mark in pem for mark in _ENCRYPTED_KEY):
        raise SettingsError(
            f"{setting}={path} cannot be used: it is encrypted, and keys with a password are not supported; write it "
            f"without one: openssl pkey -in {path} -out plain.pem"
        )
    return pem
