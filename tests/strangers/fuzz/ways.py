"""Every way into a running cluster, each as something that a fuzzer can do once: a call, a page, a link.

Owns how one case is spoken and how it ended; draws everything from the Random that it is given. Ways are found by
asking: ports from the kernel, services by reflection, methods from their descriptors.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch
from google.protobuf.message import DecodeError, Message

from collegium.fabric.hosts import host_identity
from collegium.fabric.model_shape import shape_of
from collegium.link.frame import HEADER_BYTES, LinkShape
from collegium.link.stream import unix_address
from collegium.model.manifest import Manifest
from collegium.v1 import balancer_pb2 as bpb
from collegium.v1 import expert_pb2, expert_pb2_grpc
from tests.strangers.fuzz import frames
from tests.strangers.fuzz.grammar import F, Words, broken, message, wild_number
from tests.strangers.rigs.calls import OK, OPEN, Method, methods_of, open_call, status_of
from tests.strangers.rigs.target import Port, Target

STREAM_S = 0.3  # how long a stream is listened to; that it goes on is no fault
UNARY_S = 30.0  # a guard
_LINK_S = 0.05
_REQUESTS = (b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n", b"HEAD / HTTP/1.0\r\n\r\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a case ended, and what was sent."""

    status: str
    detail: str = ""
    sent: Sequence[bytes] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One thing that can be done to one port."""

    name: str
    run: Callable[[random.Random], Ending]


@dataclass(slots=True, kw_only=True)
class Knowledge:
    """What a stranger can know of the cluster, so that it gets past the first check at times."""

    manifest: Manifest
    ghosts: list[str] = field(default_factory=list)  # members that the fuzzer has joined

    @property
    def shape(self) -> bpb.ModelShape:
        """The shape of the model served."""
        return shape_of(self.manifest, "float32")

    @property
    def words(self) -> Words:
        """Values worth trying, by the name of the field."""
        return {
            "digest": [self.manifest.digest, "another"],
            "model_digest": [self.manifest.digest],
            "dtype": ["float32"],
            "transports": ["tcp", "unix"],
            "max_rows": [1, 8, 64],
            "host": [host_identity(), "elsewhere"],
            "model": ["checkpoint", ""],
            "role": ["user", "assistant"],
            "max_tokens": [1, 3],
            "min_tokens": [0, 1],
            "num_choices": [0, 1, 2, 64],
            "num_logprobs": [0, 5, 20],
            "address": ["127.0.0.1:1", "127.0.0.1:2"],
            "member_id": self.ghosts[-5:] or ["nobody"],
            "num_workers": [0],
            "num_tokens": [0, 1, 100],
            "service": ["", "live", "collegium.v1.Inference"],
        }


@contextmanager
def ways_into(target: Target, manifest: Manifest) -> Iterator[list[Way]]:
    """List every way into a cluster; what they hold open is closed in the end."""
    known = Knowledge(manifest=manifest)
    with ExitStack() as stack:
        found: list[Way] = []
        for port in target.ports:
            if port.kind in ("grpc", "health"):
                channel = stack.enter_context(grpc.insecure_channel(port.address))
                found += [_call_way(port, channel, method, known) for method in _methods(port, channel)]
                found.append(Way(name=f"{port.process} {port.kind} bytes", run=_bytes_way(port)))
            elif port.kind == "metrics":
                found.append(Way(name=f"{port.process} metrics", run=_bytes_way(port)))
            else:
                control = stack.enter_context(target.channel(port.process))
                for address in (port.address, *target.data_names(port.process)):
                    found.append(Way(name=f"{port.process} link {address[0]}", run=_link_way(control, address, known)))
        yield found


def write(draw: random.Random, method: Method, known: Knowledge) -> bytes:
    """Draw the bytes of one request of a method."""
    made = message(draw, method.request, known.words)
    _make_it_fit(draw, made, known)
    raw = made.SerializeToString()
    return raw if draw.random() < 0.7 else broken(draw, raw)


def _methods(port: Port, channel: grpc.Channel) -> list[Method]:
    if port.kind == "grpc":
        return methods_of(channel)
    from grpc_health.v1 import health_pb2

    service = health_pb2.DESCRIPTOR.services_by_name["Health"]
    return [
        Method(
            path=f"/{service.full_name}/{verb.name}",
            request=verb.input_type,
            streams_requests=False,
            streams_responses=verb.server_streaming,
        )
        for verb in service.methods
    ]


def _make_it_fit(draw: random.Random, made: Message, known: Knowledge) -> None:
    """Give some requests what only a member knows: the model's shape, so that their other fields are looked at."""
    if isinstance(made, bpb.JoinRequest) and draw.random() < 0.5:
        made.model.CopyFrom(known.shape)
    if isinstance(made, bpb.ReportLoadRequest) and draw.random() < 0.7:
        del made.layers[:]
        for layer in known.shape.layers:
            is_wild = draw.random() < 0.3
            count = int(wild_number(draw, F.TYPE_UINT64)) if is_wild else draw.randrange(100)
            row = [count] * layer.num_experts
            made.layers.add(decode_tokens=row, prefill_tokens=row, activations=row)


def _call_way(port: Port, channel: grpc.Channel, method: Method, known: Knowledge) -> Way:
    timeout_s = STREAM_S if method.streams_responses else UNARY_S
    num_answers = 2 if method.streams_requests else 1  # the first one of a router comes before it has read anything

    def run(draw: random.Random) -> Ending:
        count = draw.randint(1, 3) if method.streams_requests else 1
        sent = [write(draw, method, known) for _ in range(count)]
        if method.path.endswith("/Join"):
            return _join(channel, method, sent, known)
        status, detail = status_of(channel, method, sent, timeout_s=timeout_s, num_answers=num_answers)
        return Ending(status=status, detail=detail, sent=sent)

    return Way(name=f"{port.process} {method.path}", run=run)


def _join(channel: grpc.Channel, method: Method, sent: Sequence[bytes], known: Knowledge) -> Ending:
    call = open_call(channel, method, sent, UNARY_S)
    try:
        for answer in call:
            with contextlib.suppress(DecodeError):
                known.ghosts.append(bpb.JoinResponse.FromString(answer).member_id)
    except grpc.RpcError as error:
        return Ending(status=error.code().name, detail=str(error.details()), sent=sent)  # type: ignore[attr-defined]
    return Ending(status=OK, sent=sent)


def _bytes_way(port: Port) -> Callable[[random.Random], Ending]:
    host, _, number = port.address.rpartition(":")

    def run(draw: random.Random) -> Ending:
        raw = draw.choice((*_REQUESTS, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)))
        raw = broken(draw, raw) if draw.random() < 0.8 else raw
        with contextlib.suppress(OSError), socket.create_connection((host, int(number)), timeout=UNARY_S) as one:
            one.settimeout(_LINK_S)
            one.sendall(raw)
            one.shutdown(socket.SHUT_WR)
            one.recv(4096)
        return Ending(status=OPEN, sent=[raw])

    return run


def _link_way(control: grpc.Channel, address: str, known: Knowledge) -> Callable[[random.Random], Ending]:
    stub: Any = expert_pb2_grpc.ExpertStub(control)
    d_model, layers = known.manifest.d_model, known.manifest.layers

    def run(draw: random.Random) -> Ending:
        request = expert_pb2.OpenLinkRequest(
            router_id="r", model_digest=known.manifest.digest, dtype="float32", transports=["tcp"], max_rows=8
        )
        promised: expert_pb2.OpenLinkResponse = stub.OpenLink(request, timeout=UNARY_S)
        shape = LinkShape(
            dtype=torch.float32,
            reply_dtype=torch.float32,
            d_model=d_model,
            max_rows=8,
            num_credits=promised.num_credits,
        )
        sent = [frames.hello(draw, promised.link_id, promised.secret, torch.float32, d_model)]
        sent += [frames.frame(draw, shape, len(layers), len(layers[0].experts)) for _ in range(draw.randint(0, 5))]
        with contextlib.suppress(OSError), _connected(address) as one:
            for raw in sent:
                one.sendall(raw)
                if draw.random() < 0.5:
                    one.settimeout(_LINK_S)
                    with contextlib.suppress(TimeoutError):
                        one.recv(HEADER_BYTES)
        return Ending(status=OPEN, sent=sent)

    return run


@contextmanager
def _connected(address: str) -> Iterator[socket.socket]:
    kind = socket.AF_UNIX if address.startswith(("@", "/")) else socket.AF_INET
    with socket.socket(kind, socket.SOCK_STREAM) as one:
        one.settimeout(UNARY_S)
        host, _, number = address.rpartition(":")
        one.connect(unix_address(address) if kind == socket.AF_UNIX else (host, int(number)))
        yield one
