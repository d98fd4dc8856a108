"""The balancer's values as messages and back.

Owns nothing but the correspondence of fields.
"""

from __future__ import annotations

from balancer_svc.model import Model
from balancer_svc.planner import Planner
from balancer_svc.roster import Member, Roster
from collegium.fabric.channels import MAX_MESSAGE_BYTES
from collegium.fabric.views import to_proto
from collegium.model.placement import LayerSize
from collegium.v1 import balancer_pb2 as pb

_MAX_VIEW_BYTES = MAX_MESSAGE_BYTES // 2  # beyond, a view goes without counters: only status pages miss them


def to_message(member: Member) -> pb.Member:
    """Write a member."""
    return pb.Member(
        member_id=member.member_id,
        role=member.role,
        address=member.address,
        state=member.state,
        metrics_url=member.metrics_url,
        num_threads=member.num_threads,
        counters=member.counters,
        capacity_bytes=member.capacity_bytes,
        ready_plan=member.ready_plan,
        failure_domain=member.failure_domain,
        seen_epoch=member.seen_epoch,
        num_renewals=member.num_renewals,
        joined_unix_ms=member.joined_unix_ms,
        counted_unix_ms=member.counted_unix_ms,
    )


def from_message(message: pb.Member) -> Member:
    """Read a member; its lease is the roster's to set."""
    return Member(
        member_id=message.member_id,
        role=message.role,
        address=message.address,
        metrics_url=message.metrics_url,
        num_threads=message.num_threads,
        capacity_bytes=message.capacity_bytes,
        state=message.state,
        ready_plan=message.ready_plan,
        counters=dict(message.counters),
        failure_domain=message.failure_domain,
        seen_epoch=message.seen_epoch,
        num_renewals=message.num_renewals,
        joined_unix_ms=message.joined_unix_ms,
        counted_unix_ms=message.counted_unix_ms,
    )


def to_shape(model: Model) -> pb.ModelShape:
    """Write a model's shape."""
    layers = [pb.LayerShape(num_experts=layer.num_experts, expert_bytes=layer.expert_bytes) for layer in model.layers]
    return pb.ModelShape(digest=model.digest, layers=layers, parts=model.parts)


def from_shape(shape: pb.ModelShape) -> Model:
    """Read a model's shape."""
    layers = tuple(LayerSize(num_experts=layer.num_experts, expert_bytes=layer.expert_bytes) for layer in shape.layers)
    return Model(digest=shape.digest, layers=layers, parts=dict(shape.parts))


def to_view(roster: Roster, planner: Planner, balance: pb.Balance | None = None) -> pb.WatchPlacementResponse:
    """Write the cluster's view as it is now."""
    view = pb.WatchPlacementResponse(
        placement=to_proto(planner.in_force),
        members=[to_message(member) for member in roster.members()],
        wanted_workers=planner.wanted_workers,
        balance=balance,
    )
    if planner.planned is not None:
        view.planned.CopyFrom(to_proto(planner.planned))
    if view.ByteSize() > _MAX_VIEW_BYTES:
        for member in view.members:
            member.ClearField("counters")
    return view
