"""API keys: who may call this gateway.

Owns the check, which takes the same time whatever the caller sends.
Health checks need no key, or probes could not tell whether the gateway serves.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from collegium.fabric.api_keys import read_keys
from collegium.fabric.errors import Unauthenticated
from collegium.fabric.interceptors import Behaviour, refusing
from collegium.fabric.secret_files import warn_if_open

_OPEN_METHODS = "/grpc.health.v1.Health/"
_METADATA_KEY = "authorization"
_SCHEME = "bearer "
_SALT = secrets.token_bytes(16)  # so that a caller's number tells routers nothing of its key


class KeyRing:
    """The keys that are accepted, as digests."""

    __slots__ = ("_digests",)

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key) for key in keys)

    @classmethod
    def load(cls, path: Path) -> KeyRing:
        """Read a file of keys; SettingsError where it cannot be read or holds none.

        A file that other users can change or read is warned of.
        """
        warn_if_open(path, "--api-keys")
        return cls(read_keys(path))

    def accepts(self, key: str) -> bool:
        """Say whether a key is one of them, in constant time."""
        digest = _digest(key)
        found = False
        for known in self._digests:  # all of them, whichever matches
            found |= hmac.compare_digest(digest, known)
        return found


class KeyInterceptor(aio.ServerInterceptor):
    """Refuses calls without a known key: UNAUTHENTICATED before a byte of the request is read by us."""

    def __init__(self, ring: KeyRing) -> None:
        self._ring = ring

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Give the method's handler, or one that refuses."""
        if str(handler_call_details.method).startswith(_OPEN_METHODS):
            return await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        given = next((str(value) for key, value in metadata if key == _METADATA_KEY), None)
        if (
            given is not None
            and given.lower().startswith(_SCHEME)
            and self._ring.accepts(given[len(_SCHEME) :].strip())
        ):
            return await continuation(handler_call_details)
        why = "there is no API key" if given is None else "the API key is not known"
        return refusing(_refuse(why))


def _refuse(why: str) -> Behaviour:
    async def refuse(_: Any, __: aio.ServicerContext[Any, Any]) -> Any:
        raise Unauthenticated(
            why, field=_METADATA_KEY, remedy="send the metadata authorization: Bearer KEY", reason="API_KEY"
        )

    return refuse


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def caller_of(context: aio.ServicerContext[Any, Any], *, has_keys: bool) -> int:
    """Return a number for who calls: the same for all calls with one API key or, without keys, of one connection.

    Never 0, and tells neither.
    """
    who = str(context.peer())
    if has_keys:
        metadata = context.invocation_metadata() or ()
        who = next((str(value) for key, value in metadata if key == _METADATA_KEY), who)
    digest = hashlib.blake2b(who.encode("utf-8", "surrogateescape"), digest_size=8, key=_SALT).digest()
    return int.from_bytes(digest, "big") or 1
