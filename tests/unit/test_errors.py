"""The tree of errors and its one table to statuses."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from collegium.fabric import errors
from collegium.fabric.errors import CollegiumError, from_code, from_rpc_error, from_status, to_status, trailing_metadata

KINDS = [kind for kind in CollegiumError.__subclasses__() if kind.__module__ == errors.__name__]


class FailedCall(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str, metadata: tuple[tuple[str, bytes], ...] = ()) -> None:
        self._parts = (code, details, metadata)

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str:
        return self._parts[1]

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._parts[2]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_comes_back_from_its_status_as_it_was(kind: type[CollegiumError]) -> None:
    error = kind("is negative", reason="BAD", field="max_tokens", remedy="give at least 1", retry_after_s=1.5)
    back = from_status(to_status(error))
    assert type(back) is kind
    assert (back.message, back.reason, back.field, back.remedy) == (error.message, "BAD", "max_tokens", error.remedy)
    assert back.retry_after_s == 1.5


def test_a_message_names_the_field_and_the_remedy_once() -> None:
    error = errors.InvalidArgument("is negative", field="max_tokens", remedy="give at least 1")
    assert error.message == "max_tokens: is negative; give at least 1"
    assert errors.InvalidArgument(error.message, field=error.field, remedy=error.remedy).message == error.message


def test_a_status_carries_error_info_and_retry_info() -> None:
    status = to_status(errors.ResourceExhausted("full", reason="QUEUE_FULL", retry_after_s=0.25))
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain) == ("QUEUE_FULL", "collegium")
    assert retry.retry_delay.ToMilliseconds() == 250


def test_a_failed_call_is_read_back_with_its_details() -> None:
    error = errors.Unavailable("no router", reason="NO_ROUTER", retry_after_s=2)
    back = from_rpc_error(FailedCall(error.code, error.message, trailing_metadata(error)))
    assert type(back) is errors.Unavailable
    assert (back.reason, back.retry_after_s) == ("NO_ROUTER", 2)


@pytest.mark.parametrize("metadata", [(), ((errors.STATUS_DETAILS_KEY, b"\xff\xff"),)], ids=["none", "broken"])
def test_a_status_of_grpcs_own_keeps_its_code_and_text(metadata: tuple[tuple[str, bytes], ...]) -> None:
    back = from_rpc_error(FailedCall(grpc.StatusCode.RESOURCE_EXHAUSTED, "message too large", metadata))
    assert type(back) is errors.ResourceExhausted
    assert back.message == "message too large"


def test_every_status_code_has_a_class_and_unknown_numbers_are_internal() -> None:
    for code in grpc.StatusCode:
        if code is not grpc.StatusCode.OK:
            assert isinstance(from_code(code.value[0], "x", "R"), CollegiumError)
    assert type(from_code(99, "x", "R")) is errors.Internal
    assert type(from_code(8, "x", "R")) is errors.ResourceExhausted
