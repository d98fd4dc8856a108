"""What the supervisor starts and ends so that there are as many workers as the balancer says are wanted.

Owns that decision. Pure: told the view and what runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from collegium.fabric.bounds import MAX_WORKERS
from collegium.v1 import balancer_pb2 as pb

MOST_AT_ONCE = 4  # processes that start: they import for seconds, and more would only wait for each other


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePlan:
    """Workers to start, and members' names to end."""

    num_to_start: int = 0
    to_end: tuple[str, ...] = ()


def plan_scale(view: pb.WatchPlacementResponse, addresses: Mapping[str, str], most: int = MAX_WORKERS) -> ScalePlan:
    """Say what is to be started and ended. addresses: control address by name, of the workers that run.

    most: workers that this machine may run, whatever is wanted: the number has come over the wire, or from Redis.

    A worker that retires is ended once neither the placement in force nor the planned one names it: then nobody needs
    what it holds. Workers that others run count as well; only a few are started at once.
    """
    if not view.wanted_workers:
        return ScalePlan()
    members = {member.address: member for member in view.members if member.role == pb.ROLE_WORKER}
    named = {*view.placement.worker_ids, *view.planned.worker_ids}
    retiring = [n for n, a in addresses.items() if a in members and members[a].state == pb.MEMBER_STATE_RETIRING]
    to_end = tuple(name for name in retiring if members[addresses[name]].member_id not in named)
    num_others = sum(
        address not in addresses.values() and member.state != pb.MEMBER_STATE_RETIRING
        for address, member in members.items()
    )
    num_lacking = min(view.wanted_workers, most) - (len(addresses) - len(retiring)) - num_others
    num_lacking = min(num_lacking, most - len(addresses))
    num_starting = sum(address not in members for address in addresses.values())
    return ScalePlan(num_to_start=max(0, min(num_lacking, MOST_AT_ONCE - num_starting)), to_end=to_end)
