"""A loop that one exception would end: each goes on, says each kind of fault once, and recovers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from balancer_svc.store import Remembered
from collegium.fabric import logs, rpc
from collegium.fabric.faults import Faults
from collegium.fabric.leases import Membership
from collegium.fabric.views import check_view, from_proto, to_proto
from collegium.model.placement import Placement
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc, inference_pb2, router_pb2
from expert_svc.homes import HomeKeeper
from router_svc.links import LinkKeeper
from tests.balancers import SHAPE, running_balancer
from tests.fake_router import FakeRouter
from tests.gateway_rig import rig, until
from tests.memory_store import MemoryStore

LAYER = pb.LayerPlacement(offsets=[0, 1, 2], worker_idx=[0, 1])


def placed(epoch: int = 1, **changes: Any) -> pb.Placement:
    return pb.Placement(**({"epoch": epoch, "worker_ids": ["a", "b"], "layers": [LAYER]} | changes))


def view(epoch: int = 1, **changes: Any) -> pb.WatchPlacementResponse:
    return pb.WatchPlacementResponse(**({"placement": placed(epoch)} | changes))


def member(**changes: Any) -> pb.Member:
    return pb.Member(**({"member_id": "m", "role": pb.ROLE_WORKER, "address": "h:1"} | changes))


def layer(offsets: list[int], worker_idx: list[int]) -> pb.LayerPlacement:
    return pb.LayerPlacement(offsets=offsets, worker_idx=worker_idx)


BAD_PLACEMENTS = {
    "epoch": placed(2**64 - 1),
    "an index of no worker": placed(layers=[layer([0, 1, 2], [0, 2])]),
    "a wild index": placed(layers=[layer([0, 1, 2], [0, 2**32 - 1])]),
    "no offsets": placed(layers=[layer([], [0])]),
    "offsets that do not begin at 0": placed(layers=[layer([1, 2], [0, 1])]),
    "offsets that shrink": placed(layers=[layer([0, 2, 1, 2], [0, 1])]),
    "offsets beyond the indices": placed(layers=[layer([0, 3], [0, 1])]),
    "an expert without a home": placed(layers=[layer([0, 0, 2], [0, 1])]),
    "a worker twice": placed(worker_ids=["a", "a"]),
    "workers and no layers": placed(layers=[]),
    "a long id": placed(worker_ids=["a", "b" * 100_000]),
    "an empty id": placed(worker_ids=["a", ""]),
    "too many layers": placed(layers=[LAYER] * 2_000),
    "too many experts": placed(layers=[layer([0, *range(1, 5_001)], [0] * 5_000)]),
}
BAD_VIEWS = {
    **{f"in force: {name}": view(2, placement=one) for name, one in BAD_PLACEMENTS.items()},
    **{f"planned: {name}": view(2, planned=one) for name, one in BAD_PLACEMENTS.items()},
    "a member twice": view(2, members=[member(), member()]),
    "a member of no role": view(2, members=[member(role=77)]),
    "a member in no state": view(2, members=[member(state=9)]),
    "a member without an id": view(2, members=[member(member_id="")]),
    "an address that is none": view(2, members=[member(address="nowhere")]),
    "a long address": view(2, members=[member(address="x" * 100_000 + ":1")]),
    "a counter that is no number": view(2, members=[member(counters={"a": math.nan})]),
    "a wild epoch of a member": view(2, members=[member(seen_epoch=2**64 - 1)]),
    "a cost that is no number": view(2, balance=pb.Balance(row_ns=math.nan)),
    "an endless cost": view(2, balance=pb.Balance(row_ns=1.0, activation_ns=math.inf)),
    "a long decision": view(2, balance=pb.Balance(last_decision="x" * 100_000)),
}


@pytest.mark.parametrize("bad", BAD_VIEWS.values(), ids=BAD_VIEWS)
def test_a_view_that_is_wrong_anywhere_is_refused_whole(bad: pb.WatchPlacementResponse) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        check_view(bad)
    check_view(view(2, members=[member()]))
    check_view(pb.WatchPlacementResponse())


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 4_095, 4_096, 2**20, 2**31, 2**32 - 1])
LAYERS = st.builds(layer, st.lists(NUMBERS, max_size=6), st.lists(NUMBERS, max_size=6))


@given(
    st.builds(
        placed,
        st.sampled_from([0, 1, 2**52, 2**53, 2**53 + 1, 2**64 - 1]),
        worker_ids=st.lists(st.text(max_size=3), max_size=4),
        layers=st.lists(LAYERS, max_size=3),
    )
)
def test_whatever_placement_is_taken_has_a_home_for_each_expert(message: pb.Placement) -> None:
    try:
        taken = from_proto(message)
    except ValueError:
        return
    for homes in taken.homes:
        for expert in homes:
            assert expert
            assert all(0 <= w < len(taken.worker_ids) for w in expert)
    assert to_proto(taken) == message


def test_placements_survive_the_wire() -> None:
    placement = Placement(epoch=3, worker_ids=("a", "b"), homes=(((0,), (0, 1)), ((1,), (0,))))
    assert from_proto(to_proto(placement)) == placement


class Scripted(balancer_pb2_grpc.BalancerServicer):
    """Answers what it is told to."""

    def __init__(self) -> None:
        self.joined = [pb.JoinResponse(member_id="m", ttl_ms=60_000)]
        self.renewed = [pb.RenewResponse(ttl_ms=30)]
        self.views: asyncio.Queue[pb.WatchPlacementResponse] = asyncio.Queue()
        self.num_renewals = 0

    async def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinResponse:
        return self.joined.pop(0) if len(self.joined) > 1 else self.joined[0]

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        self.num_renewals += 1
        return self.renewed.pop(0) if len(self.renewed) > 1 else self.renewed[0]

    async def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveResponse:
        return pb.LeaveResponse()

    async def WatchPlacement(
        self, request: pb.WatchPlacementRequest, context: Any
    ) -> AsyncIterator[pb.WatchPlacementResponse]:
        while True:
            yield await self.views.get()


@asynccontextmanager
async def scripted() -> AsyncIterator[tuple[Scripted, str]]:
    balancer, server = Scripted(), rpc.Server("balancer", services=("collegium.v1.Balancer",))
    server.add(balancer_pb2_grpc.add_BalancerServicer_to_server, balancer)
    address = await server.start("127.0.0.1:0")
    try:
        yield balancer, address
    finally:
        await server.stop(0)


async def test_bad_views_of_every_kind_are_dropped_and_the_next_good_one_is_taken() -> None:
    async with scripted() as (balancer, address), Membership(address, pb.ROLE_ROUTER, "h:1") as membership:
        for epoch, bad in enumerate(BAD_VIEWS.values(), 1):
            balancer.views.put_nowait(bad)
            balancer.views.put_nowait(view(epoch))
            async with asyncio.timeout(20):
                async for seen in membership.views():
                    assert seen.placement.epoch <= epoch
                    assert seen.ByteSize() < 100
                    if seen.placement.epoch == epoch:
                        break


@pytest.mark.parametrize("ttl_ms", [0, 2**63, 2**64 - 1])
async def test_a_lease_of_no_sensible_length_is_no_answer(ttl_ms: int) -> None:
    async with scripted() as (balancer, address):
        balancer.joined = [
            pb.JoinResponse(member_id="m", ttl_ms=ttl_ms),
            pb.JoinResponse(member_id="x" * 100_000, ttl_ms=30),
            pb.JoinResponse(member_id="good", ttl_ms=30),
        ]
        balancer.renewed = [pb.RenewResponse(ttl_ms=ttl_ms), pb.RenewResponse(ttl_ms=30)]
        async with Membership(address, pb.ROLE_ROUTER, "h:1") as membership, asyncio.timeout(20):
            assert membership.member_id == "good"
            await until(lambda: balancer.num_renewals >= 4)


async def test_a_view_that_cannot_be_followed_is_given_again_and_newer_ones_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scripted() as (balancer, address), Membership(address, pb.ROLE_ROUTER, "h:1") as membership:
        taken: list[int] = []
        is_done = asyncio.Event()

        def take(seen: pb.WatchPlacementResponse) -> None:
            taken.append(seen.placement.epoch)
            if taken.count(1) < 3:
                raise ZeroDivisionError("a fault of ours")
            if seen.placement.epoch == 2:
                is_done.set()
            else:
                balancer.views.put_nowait(view(2))

        following = asyncio.create_task(membership.follow(take))
        balancer.views.put_nowait(view(1))
        async with asyncio.timeout(20):
            await is_done.wait()
        following.cancel()
        assert taken == [1, 1, 1, 2]
        assert caplog.text.count("following the cluster failed") == 1
        assert membership._own_counters()["collegium_loop_faults_total"] == 2  # pyright: ignore


def test_each_kind_of_fault_is_said_once_and_waits_grow_until_a_turn_goes_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now_s = 0.0
    faults = Faults(logs.get("test"), "a loop", clock=lambda: now_s)

    def turn(kind: type[Exception]) -> float:
        try:
            raise kind("why")
        except Exception as error:
            return faults.note(error)

    pauses = [turn(ValueError) for _ in range(10)] + [turn(KeyError)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.1, 5.0)
    # The same line raises both: the kinds differ by their type alone.
    assert caplog.text.count("a loop failed") == 2
    faults.clear()
    assert turn(ValueError) == 0.1
    assert caplog.text.count("a loop failed") == 2
    now_s = 3600.0
    turn(ValueError)
    assert caplog.text.count("a loop failed") == 3
    assert faults.num_faults == 13


class FaultyStore(MemoryStore):
    """Raises what no store is expected to, a few times."""

    num_left = 0

    async def load(self, *, with_windows: bool = True) -> Remembered:
        if FaultyStore.num_left:
            FaultyStore.num_left -= 1
            raise OverflowError("value too large to convert")
        return await super().load(with_windows=with_windows)


async def test_a_balancer_whose_ticks_fail_goes_on_and_plans_as_soon_as_they_do_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_balancer(FaultyStore(), num_faults=5) as running:
        FaultyStore.num_left = 2
        fails = iter([True, True, True])
        real = running.planner.wish

        def wish(*args: Any) -> Any:
            if next(fails, False):
                raise AssertionError("a plan needs a new epoch")
            return real(*args)

        monkeypatch.setattr(running.planner, "wish", wish)
        join = Membership(running.address, pb.ROLE_WORKER, "h:1", model=SHAPE)
        async with join as membership, asyncio.timeout(20):
            async for seen in membership.views():
                if membership.member_id in seen.planned.worker_ids:
                    break
            await until(lambda: running.balancer.num_faults == 5)
        assert running.balancer.counters()["collegium_loop_faults_total"] == 5
    assert caplog.text.count("leading failed") == 1
    assert caplog.text.count("sharing with other balancers failed") == 1


async def test_a_routers_stream_that_cannot_be_read_frees_its_requests_and_is_opened_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Sitter:
        """A request whose router says what it cannot take."""

        def __init__(self) -> None:
            self.lost = asyncio.Event()
            self.num_news = 0

        def submission(self, submission_id: str, *, deadline_ms: int, traceparent: str) -> router_pb2.Submission:
            choice = router_pb2.ChoiceStart(choice_index=0)
            stopping, sampling = inference_pb2.Stopping(max_tokens=2), inference_pb2.Sampling(seed=1)
            return router_pb2.Submission(
                request_id=submission_id, prompt_ids=[1], choices=[choice], stopping=stopping, sampling=sampling
            )

        def sit(self, seat: Any) -> None: ...

        def take_news(self, news: Any) -> None:
            self.num_news += 1
            raise OverflowError("a token beyond any vocabulary")

        def lose_router(self, why: Any) -> None:
            self.lost.set()

    router = FakeRouter()
    async with rig(router) as gateway, asyncio.timeout(30):
        (attachment,) = gateway.gateway.pool.attachments
        sitter: Any = Sitter()
        attachment.seat(sitter, "r", deadline_ms=0, traceparent="")
        await sitter.lost.wait()
        assert sitter.num_news == 1
        await until(lambda: attachment.is_attached)
    assert caplog.text.count("the stream to router") == 1


async def test_a_placement_of_another_shape_reaches_neither_rows_nor_weights() -> None:
    class Calls:
        epoch = 0
        activation_rows = 0.0
        worker_ids: tuple[str, ...] = ()

        def set_placement(self, placement: Placement) -> None:
            self.epoch = placement.epoch

    calls: Any = Calls()
    keeper = LinkKeeper(
        calls,
        dtype=torch.float32,
        digest="",
        parts={},
        max_rows=1,
        transport="auto",
        d_model=1,
        num_experts=[2],
        on_change=lambda: None,
    )
    keeper.take(view(5, placement=placed(5, layers=[LAYER, LAYER])))
    keeper.take(view(6, placement=placed(6, layers=[layer([0, 1], [0])])))
    assert calls.epoch == 0
    keeper.take(view(7))
    assert calls.epoch == 7

    nothing: Any = None
    homes = HomeKeeper(nothing, nothing, lambda: None, num_experts=[2, 2])
    membership: Any = type("Membership", (), {"member_id": "a"})()
    homes._membership = membership  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(ValueError, match="another model"):
        await homes.take(view(5))
