"""The members that Redis remembers of a cluster's name, and which of them still live.

Owns the reading of their records and the questions to their addresses. A record outlives its process, and another
process may have its address by now: a member counts as alive only if it answers by its own id. Gateways have no id
that a stranger may ask for, and are left out: a cluster without routers and workers serves nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.exceptions import ResponseError

from collegium.fabric import bounds
from collegium.fabric.channels import blocking_channel
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import expert_pb2, expert_pb2_grpc, router_pb2, router_pb2_grpc

_MOST_ASKED = 64  # of those that were heard of last
_ASK_S = 1.0
_ROLES = {pb.ROLE_ROUTER: "router", pb.ROLE_WORKER: "worker"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Living:
    """A member that answered. is_serving: False also if it is about to end."""

    role: str
    member_id: str
    address: str
    is_serving: bool


def read_members(client: Any, prefix: str) -> list[pb.Member]:
    """Read the routers and workers that Redis remembers under a prefix, at most as many as are asked.

    What cannot be read is left out: it is the balancers' to remove. Raises RedisError, but for keys of another type.
    """
    try:
        ids: Sequence[bytes] = client.srandmember(f"{prefix}:members", bounds.MAX_MEMBERS)
        keys = [f"{prefix}:member:".encode() + member_id for member_id in ids]
        packed: Sequence[bytes | None] = client.mget(keys) if keys else ()
    except ResponseError:
        return []
    found: list[pb.Member] = []
    for one in filter(None, packed):
        with contextlib.suppress(ValueError, DecodeError):
            member = pb.Member.FromString(one)
            bounds.check(member)
            if member.role in _ROLES and member.address:
                found.append(member)
    found.sort(key=lambda member: max(member.counted_unix_ms, member.joined_unix_ms), reverse=True)
    return found[:_MOST_ASKED]


def ask_members(members: Sequence[pb.Member]) -> list[Living]:
    """Ask all members at once; returns those that answer by their ids, serving ones first. Takes a second at most."""
    with contextlib.ExitStack() as stack:
        asked: list[tuple[pb.Member, Any, Any]] = []
        for member in members:
            channel = stack.enter_context(blocking_channel(member.address))
            health: Any = health_pb2_grpc.HealthStub(channel)
            check = health.Check.future(health_pb2.HealthCheckRequest(), timeout=_ASK_S)
            asked.append((member, _ask_id(member, channel), check))
        living = [
            Living(
                role=_ROLES[member.role],
                member_id=member.member_id,
                address=member.address,
                is_serving=getattr(_answer(check), "status", None) == health_pb2.HealthCheckResponse.SERVING,
            )
            for member, call, check in asked
            if _id_of(_answer(call)) == member.member_id
        ]
    return sorted(living, key=lambda one: not one.is_serving)


def _ask_id(member: pb.Member, channel: grpc.Channel) -> Any:
    if member.role == pb.ROLE_WORKER:
        expert: Any = expert_pb2_grpc.ExpertStub(channel)
        return expert.GetWorker.future(expert_pb2.GetWorkerRequest(), timeout=_ASK_S)
    router: Any = router_pb2_grpc.RouterStub(channel)
    return router.Describe.future(router_pb2.DescribeRequest(), timeout=_ASK_S)


def _answer(call: Any) -> Any:
    """Wait for an answer; None if there is none."""
    try:
        return call.result()
    except grpc.RpcError:
        return None


def _id_of(answer: Any) -> str:
    return str(getattr(answer, "worker_id", "") or getattr(answer, "router_id", ""))
