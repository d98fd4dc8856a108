"""One tree of errors and the one table between it and gRPC statuses.

Owns the details that travel with a status: google.rpc.ErrorInfo (reason, field, remedy) and RetryInfo, and the bounds
of its texts. Knows no service and no request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # pyright: ignore[reportMissingTypeStubs]

DOMAIN = "collegium"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
SHOWN_CHARACTERS = 128  # of a caller's text that a message repeats
# gRPC peers take 8 KiB of metadata. The message is in it twice: percent-encoded as grpc-message (up to 3 bytes a byte),
# and in the details as base64 (4 bytes for 3), beside the other texts: 3 * 1024 + 4/3 * (1024 + 512 + 3 * 128) < 6 KiB.
_MESSAGE_BYTES = 1024
_REMEDY_BYTES = 512
_NAME_BYTES = 128


class SettingsError(Exception):
    """A setting that is unknown, missing or unreadable: the process must not start. Exit status 2."""


class CollegiumError(Exception):
    """What went wrong, where (field), and what to do (remedy)."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str | None = None,
        remedy: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.message = _complete(message, field, remedy)
        self.reason = reason or self.code.name
        self.field = field
        self.remedy = remedy
        self.retry_after_s = retry_after_s
        super().__init__(self.message)


class InvalidArgument(CollegiumError):
    """A field of the request is wrong, whatever the state of the cluster."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFound(CollegiumError):
    """A name is not known here."""

    code = grpc.StatusCode.NOT_FOUND


class ResourceExhausted(CollegiumError):
    """No room now; retry_after_s says when to come back."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(CollegiumError):
    """Nobody can serve this at the moment; trying again may help."""

    code = grpc.StatusCode.UNAVAILABLE


class FailedPrecondition(CollegiumError):
    """The system is not in the state that the call needs; trying again does not help."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class DeadlineExceeded(CollegiumError):
    """The caller's time is over."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(CollegiumError):
    """The caller ended it."""

    code = grpc.StatusCode.CANCELLED


class Unauthenticated(CollegiumError):
    """No key, or not one that is known."""

    code = grpc.StatusCode.UNAUTHENTICATED


class OutOfRange(CollegiumError):
    """A position past the end of what exists."""

    code = grpc.StatusCode.OUT_OF_RANGE


class Unimplemented(CollegiumError):
    """The other side does not offer this."""

    code = grpc.StatusCode.UNIMPLEMENTED


class Internal(CollegiumError):
    """A fault of ours."""

    code = grpc.StatusCode.INTERNAL


_TREE: tuple[type[CollegiumError], ...] = (
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    FailedPrecondition,
    DeadlineExceeded,
    Cancelled,
    Unauthenticated,
    OutOfRange,
    Unimplemented,
    Internal,
)
_BY_CODE: Mapping[grpc.StatusCode, type[CollegiumError]] = {kind.code: kind for kind in _TREE} | {
    # What gRPC's core sends by itself and our tree has no class of its own for.
    grpc.StatusCode.PERMISSION_DENIED: Unauthenticated,
    grpc.StatusCode.ALREADY_EXISTS: FailedPrecondition,
    grpc.StatusCode.ABORTED: Unavailable,
    grpc.StatusCode.UNKNOWN: Internal,
    grpc.StatusCode.DATA_LOSS: Internal,
}
_BY_NUMBER: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def shown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Quote a caller's text for a message, cut to `limit` characters; a cut text is followed by its length."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def status_message(error: CollegiumError) -> str:
    """Return an error's message as a status carries it: at most 1,024 bytes of UTF-8."""
    return _cut(error.message, _MESSAGE_BYTES)


def to_status(error: CollegiumError) -> status_pb2.Status:
    """Express an error as google.rpc.Status with ErrorInfo and, where it says when to come back, RetryInfo.

    Every text is cut so that the whole status fits the metadata that gRPC peers take.
    """
    status = status_pb2.Status(code=error.code.value[0], message=status_message(error))
    metadata: dict[str, str] = {}
    if error.field:
        metadata["field"] = _cut(error.field, _NAME_BYTES)
    if error.remedy:
        metadata["remedy"] = _cut(error.remedy, _REMEDY_BYTES)
    info = error_details_pb2.ErrorInfo(reason=_cut(error.reason, _NAME_BYTES), domain=DOMAIN, metadata=metadata)
    status.details.add().Pack(info)
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(max(0, round(error.retry_after_s * 1e9)))
        status.details.add().Pack(retry)
    return status


def trailing_metadata(error: CollegiumError) -> tuple[tuple[str, bytes], ...]:
    """Give the trailing metadata that carries an error's details beside its code and message."""
    return ((STATUS_DETAILS_KEY, to_status(error).SerializeToString()),)


def from_status(status: status_pb2.Status) -> CollegiumError:
    """Read google.rpc.Status back into the tree; details that are absent or foreign leave their fields empty."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    for detail in status.details:
        # Unpack answers whether the detail is of that kind.
        if not detail.Unpack(info) and detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return _class_of(status.code)(
        status.message,
        reason=info.reason,
        field=info.metadata.get("field"),
        remedy=info.metadata.get("remedy"),
        retry_after_s=retry_after_s,
    )


def from_rpc_error(error: grpc.RpcError) -> CollegiumError:
    """Read what a failed call raised, of grpc or of grpc.aio, back into the tree.

    A status that gRPC's core made by itself has no details; its code and text are kept.
    """
    code, details, trailing = _parts(error)
    packed = next((value for key, value in trailing if key == STATUS_DETAILS_KEY), None)
    if isinstance(packed, bytes):
        status = status_pb2.Status()
        try:
            status.ParseFromString(packed)
        except DecodeError:
            status.Clear()
        if status.code == code.value[0]:
            return from_status(status)
    return _class_of(code.value[0])(details or code.name)


def from_code(code: int, message: str, reason: str) -> CollegiumError:
    """Make the error of a canonical status number, as a router reports one inside a frame."""
    return _class_of(code)(message, reason=reason)


def _class_of(number: int) -> type[CollegiumError]:
    code = _BY_NUMBER.get(number, grpc.StatusCode.UNKNOWN)
    return _BY_CODE.get(code, Internal)


def _parts(error: grpc.RpcError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]:
    # grpc's RpcError declares nothing; both kinds of call errors answer code(), details(), trailing_metadata().
    ask = {name: getattr(error, name, None) for name in ("code", "details", "trailing_metadata")}
    code = ask["code"]() if ask["code"] else None
    details = ask["details"]() if ask["details"] else str(error)
    trailing = ask["trailing_metadata"]() if ask["trailing_metadata"] else None
    pairs = tuple((str(pair[0]), pair[1]) for pair in trailing or ())
    return (code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN), details or "", pairs


def _cut(text: str, num_bytes: int) -> str:
    # A lone surrogate, which JSON can carry, is no UTF-8.
    packed = text.encode("utf-8", "replace")
    if len(packed) <= num_bytes:
        return packed.decode()
    return packed[: num_bytes - 3].decode(errors="ignore") + "..."


def _complete(message: str, field: str | None, remedy: str | None) -> str:
    # Idempotent, so that an error read back from a status keeps its text.
    if field and field not in message:
        message = f"{field}: {message}"
    if remedy and remedy not in message:
        message = f"{message}; {remedy}"
    return message
