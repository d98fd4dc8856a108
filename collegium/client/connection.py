"""How the SDK reaches gateways: addresses, channel options, TLS, the metadata of a call.

Owns what Client and AsyncClient share of a connection. Knows no request's meaning.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from opentelemetry.trace import Span

from collegium.client.retry import Addresses, Attempts, RetryPolicy
from collegium.fabric import tracing
from collegium.fabric.channels import Option, TlsTrust, ca_credentials, channel_credentials
from collegium.fabric.errors import InvalidArgument

# Chunks are small. A window that stays small keeps what an unread stream can hold at both ends small as well.
_OPTIONS: tuple[Option, ...] = (("grpc.http2.bdp_probe", 0),)
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to connect. tls_ca: a PEM file or its bytes; with it, or with tls, calls are encrypted."""

    api_key: str | None = None
    tls: bool = False
    tls_ca: str | Path | bytes | None = None
    tls_server_name: str | None = None

    def __post_init__(self) -> None:
        """Check the key: gRPC would refuse it at each call, and name nothing."""
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InvalidArgument(
                "the key has characters that no header can carry, such as a line's end",
                field="api_key",
                remedy="give printable ASCII",
                reason="API_KEY",
            )

    @property
    def options(self) -> tuple[Option, ...]:
        """Channel options beside those that every channel has."""
        if self.tls_server_name is None:
            return _OPTIONS
        return (*_OPTIONS, ("grpc.ssl_target_name_override", self.tls_server_name))

    @property
    def is_encrypted(self) -> bool:
        """Whether calls are encrypted."""
        return self.tls or self.tls_ca is not None

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Give TLS credentials; None for plain text. SettingsError where the CA file cannot be read."""
        if isinstance(self.tls_ca, bytes):
            return ca_credentials(self.tls_ca, "tls_ca")
        if self.tls_ca is not None:
            return channel_credentials(TlsTrust(ca=Path(self.tls_ca)))
        return channel_credentials(TlsTrust()) if self.tls else None

    def metadata(self, span: Span) -> Metadata:
        """Give a call's metadata: the key, and the trace where it is sampled."""
        pairs: list[tuple[str, str]] = []
        if self.api_key is not None:
            pairs.append(("authorization", f"Bearer {self.api_key}"))
        traceparent = tracing.traceparent_of(span)
        if traceparent:
            pairs.append((tracing.TRACEPARENT, traceparent))
        return tuple(pairs)


class Reach:
    """The addresses of one client, and how its calls try them."""

    def __init__(
        self,
        target: str | Sequence[str],
        connection: Connection,
        policy: RetryPolicy | None,
        timeout_s: float | None,
    ) -> None:
        self.addresses = Addresses(target, is_encrypted=connection.is_encrypted)
        self.connection = connection
        self.credentials = connection.credentials()
        self._policy = policy or RetryPolicy()
        self._timeout_s = timeout_s
        self._rng = random.Random()

    def attempts(self, timeout_s: float | None, only: Sequence[str] = ()) -> Attempts:
        """Begin the tries of one call, at all addresses or only at some."""
        return Attempts(
            Addresses(only) if only else self.addresses,
            self._policy,
            now_s=time.monotonic(),
            timeout_s=self._timeout_s if timeout_s is None else timeout_s,
            rng=self._rng,
        )
