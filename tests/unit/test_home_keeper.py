"""A worker says that it is ready when its homes are warm, and not before any plan has named it."""

from __future__ import annotations

from typing import Any

import pytest

from collegium.v1 import balancer_pb2 as pb
from expert_svc.homes import HomeKeeper


class Buffer:
    """Holds what it was told to load."""

    def __init__(self) -> None:
        self.resident: set[Any] = set()

    def set_homes(self, homes: list[Any]) -> None:
        self.homes = homes

    def is_resident(self, expert_id: Any) -> bool:
        return expert_id in self.resident

    def warm(self, wanted: list[Any], progress: Any) -> None:
        self.resident |= set(wanted)

    def holds_others(self, homes: list[Any]) -> bool:
        return False


class Membership:
    """A lease of worker "b", whose readiness is noted."""

    member_id = "b"

    def __init__(self) -> None:
        self.ready_plans: list[int] = []

    def set_ready_plan(self, epoch: int) -> None:
        self.ready_plans.append(epoch)


def placed(epoch: int, *names: str) -> pb.Placement:
    """One layer of two experts, both of which are at home everywhere."""
    homes = list(range(len(names)))
    layer = pb.LayerPlacement(offsets=[0, len(homes), 2 * len(homes)], worker_idx=homes * 2)
    return pb.Placement(epoch=epoch, worker_ids=names, layers=[layer])


@pytest.mark.parametrize("others", [pb.Placement(), placed(3, "a")], ids=["nothing is placed", "others have homes"])
async def test_a_worker_that_no_plan_has_named_is_not_ready_and_one_that_has_loaded_its_homes_is(
    others: pb.Placement,
) -> None:
    buffer: Any = Buffer()
    membership: Any = Membership()
    ready: list[int] = []
    keeper = HomeKeeper(buffer, membership, lambda: ready.append(len(buffer.resident)))
    await keeper.take(pb.WatchPlacementResponse(placement=others))
    assert not ready
    await keeper.take(pb.WatchPlacementResponse(placement=others, planned=placed(4, "a", "b")))
    assert ready == [2]
    assert membership.ready_plans == [4]


async def test_a_worker_that_placement_names_already_is_ready_once_it_is_warm() -> None:
    buffer: Any = Buffer()
    membership: Any = Membership()
    ready: list[int] = []
    keeper = HomeKeeper(buffer, membership, lambda: ready.append(len(buffer.resident)))
    await keeper.take(pb.WatchPlacementResponse(placement=placed(3, "a", "b")))
    assert ready == [2]
