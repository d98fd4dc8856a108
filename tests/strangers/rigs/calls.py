"""Calls as a stranger makes them: any bytes to any method of a port, found by asking the descriptors.

Owns the list of methods and how each of the four kinds of call is spoken in raw bytes. Knows no message's meaning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from collegium.v1 import balancer_pb2, expert_pb2, inference_pb2, router_pb2

# Imported for their descriptors, which every service that a port names is looked up in.
KNOWN = (balancer_pb2, expert_pb2, health_pb2, inference_pb2, reflection_pb2, router_pb2)
CALL_S = 30.0  # a guard: what takes longer hangs
OK = "OK"
OPEN = "OPEN"  # a stream that goes on, and was left


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One RPC of a port."""

    path: str  # "/package.Service/Verb"
    request: Descriptor
    streams_requests: bool
    streams_responses: bool


def methods_of(channel: grpc.Channel, *more: str) -> list[Method]:
    """List the methods of every service that a port says it has, and of those named."""
    names = [*ProtoReflectionDescriptorDatabase(channel).get_services(), *more]
    pool = descriptor_pool.Default()
    found: list[Method] = []
    for name in sorted(set(names)):
        verbs: Sequence[MethodDescriptor] = pool.FindServiceByName(name).methods
        found += [
            Method(
                path=f"/{name}/{verb.name}",
                request=verb.input_type,
                streams_requests=verb.client_streaming,
                streams_responses=verb.server_streaming,
            )
            for verb in verbs
        ]
    return found


def open_call(channel: grpc.Channel, method: Method, requests: Iterable[bytes], timeout_s: float = CALL_S) -> Any:
    """Begin a call in raw bytes; its answers can be iterated, and it can be cancelled."""
    kind = ("stream" if method.streams_requests else "unary") + "_stream"
    make = getattr(channel, kind)  # unary answers are read as a stream of one: one way of reading for all kinds
    call = make(method.path, request_serializer=None, response_deserializer=None)
    return call(iter(requests) if method.streams_requests else next(iter(requests)), timeout=timeout_s)


def status_of(
    channel: grpc.Channel, method: Method, requests: Iterable[bytes], *, timeout_s: float = CALL_S, num_answers: int = 3
) -> tuple[str, str]:
    """Speak to a method; returns (status, detail). A stream is left, OPEN, after so many answers or when time is up."""
    call = open_call(channel, method, requests, timeout_s)
    try:
        for _ in range(num_answers):
            if next(call, None) is None:
                return OK, ""
    except grpc.RpcError as error:
        name: str = error.code().name  # type: ignore[attr-defined]
        is_left = name == "DEADLINE_EXCEEDED" and method.streams_responses
        return OPEN if is_left else name, str(error.details())  # type: ignore[attr-defined]
    finally:
        call.cancel()
    return OPEN, ""


def unary_unary(channel: grpc.Channel, path: str, request: bytes, timeout_s: float = CALL_S) -> tuple[str, str, bytes]:
    """Call any path with any bytes, as a unary call; returns (status, detail, answer)."""
    try:
        answer = channel.unary_unary(path, request_serializer=None, response_deserializer=None)(
            request, timeout=timeout_s
        )
    except grpc.RpcError as error:
        return error.code().name, str(error.details()), b""  # type: ignore[attr-defined]
    return OK, "", answer
