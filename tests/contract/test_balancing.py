"""Balancing over real gRPC, Redis behind it: reports, moves, leaders and followers, how many workers there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from grpc import aio

from balancer_svc.rebalancing import Rules
from balancer_svc.redis_store import RedisStore
from balancer_svc.store import FencedError
from collegium.fabric import rpc
from collegium.fabric.errors import from_rpc_error
from collegium.fabric.leases import Membership
from collegium.model.placement import Worker, plan_homes
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc
from tests.balancers import SHAPE, first_view, running_balancer, stay_ready
from tests.memory_store import MemoryStore
from tests.redis_server import RedisServer

SKEWED = (400, 300, 20, 10)
FREELY = Rules(target=1.05, horizon_s=1e9)
LIMIT_S = 20.0


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.kill()


@asynccontextmanager
async def store_of(server: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(server.url, "test")
    try:
        await store.connect(5)
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def member(address: str, name: str, role: pb.Role = pb.ROLE_WORKER) -> AsyncIterator[Membership]:
    shape = SHAPE if role == pb.ROLE_WORKER else None
    async with Membership(address, role, name, model=shape) as membership:
        ready = asyncio.create_task(stay_ready(membership))
        try:
            yield membership
        finally:
            ready.cancel()


def report(*counts: int, times: int = 1) -> pb.ReportLoadRequest:
    row = [count * times for count in counts]
    layer = pb.LayerLoad(decode_tokens=row, prefill_tokens=[0] * len(row), activations=row)
    return pb.ReportLoadRequest(layers=[layer] * len(SHAPE.layers))


async def report_until(
    router: Membership, counts: Sequence[int], task: asyncio.Task[pb.WatchPlacementResponse]
) -> None:
    """Report ever more of the same load until a view came."""
    times = 0
    async with asyncio.timeout(LIMIT_S):
        while not task.done():
            times += 1
            assert await router.report_load(report(*counts, times=times))
            await asyncio.wait([task], timeout=0.05)


def homes(view: pb.WatchPlacementResponse, layer: int) -> list[set[str]]:
    row = view.placement.layers[layer]
    ids = view.placement.worker_ids
    return [{ids[w] for w in row.worker_idx[row.offsets[e] : row.offsets[e + 1]]} for e in range(len(row.offsets) - 1)]


async def test_experts_move_when_the_load_asks_for_it_and_the_account_says_so(redis_server: RedisServer) -> None:
    async with (
        store_of(redis_server) as store,
        running_balancer(store, expected_workers=2, rebalance_s=0.2, rules=FREELY) as balancer,
        member(balancer.address, "h:1") as one,
        member(balancer.address, "h:2"),
        member(balancer.address, "h:3", pb.ROLE_ROUTER) as router,
    ):
        before = await first_view(one, lambda view: len(view.placement.worker_ids) == 2)
        hot = homes(before, 0)
        # The two hottest of the layer get a worker each only if they shared one: make them share it.
        counts = [400 if hot[e] == hot[0] else 10 for e in range(4)]
        moved = asyncio.create_task(first_view(one, lambda view: view.balance.moves > 0))
        await report_until(router, counts, moved)
        view = moved.result()
        assert view.placement.epoch > before.placement.epoch
        assert "moves" in view.balance.last_decision
        assert view.balance.moved_bytes == 100 * view.balance.moves
        assert view.balance.since_plan_ms >= 0
        assert 0 < view.balance.decode.min <= view.balance.decode.mean <= 1
        assert view.balance.prefill.mean == 0
        assert view.balance.is_leader and view.balance.has_memory
        assert {one.share for one in view.balance.hottest} and view.balance.hottest[0].share > 0.4
        counters = balancer.balancer.counters()
        assert counters["collegium_moves_total"] == view.balance.moves
        assert 0 < counters['collegium_expert_balancedness{phase="decode",statistic="min"}'] <= 1
        assert counters["collegium_balancer_is_leader"] == 1
        for layer in range(2):
            assert len(set.union(*homes(view, layer))) == 2


async def test_a_balancer_that_starts_again_knows_the_load_from_redis(redis_server: RedisServer) -> None:
    async with store_of(redis_server) as store:
        async with (
            running_balancer(store) as balancer,
            member(balancer.address, "h:1") as one,
            member(balancer.address, "h:3", pb.ROLE_ROUTER) as router,
        ):
            seen = asyncio.create_task(first_view(one, lambda view: view.balance.num_windows >= 2))
            await report_until(router, SKEWED, seen)
            address = balancer.address
        async with running_balancer(store, bind=address) as again:
            counters = again.balancer.counters()
            assert counters['collegium_expert_balancedness{phase="decode",statistic="mean"}'] > 0
            async with rpc.channel(again.address) as channel:
                stub = balancer_pb2_grpc.BalancerStub(channel)
                view = (await stub.GetPlacement(pb.GetPlacementRequest())).view
            assert view.balance.num_windows >= 2


async def test_of_two_balancers_one_publishes_and_both_hear_members(redis_server: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        leader = await stack.enter_async_context(
            running_balancer(await stack.enter_async_context(store_of(redis_server)), expected_workers=2)
        )
        follower = await stack.enter_async_context(
            running_balancer(await stack.enter_async_context(store_of(redis_server)), expected_workers=2)
        )
        assert leader.balancer.leadership.is_leader and not follower.balancer.leadership.is_leader
        here = await stack.enter_async_context(member(leader.address, "h:1"))
        there = await stack.enter_async_context(member(follower.address, "h:2"))
        ids = {here.member_id, there.member_id}
        views = [await first_view(m, lambda view: set(view.placement.worker_ids) == ids) for m in (here, there)]
        assert views[0].placement == views[1].placement
        assert views[0].balance.is_leader and not views[1].balance.is_leader


async def test_when_the_leader_dies_the_other_goes_on_above_its_epochs_and_the_dead_one_is_fenced(
    redis_server: RedisServer,
) -> None:
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(store_of(redis_server)) for _ in range(2)]
        leading = AsyncExitStack()
        first = await leading.enter_async_context(running_balancer(stores[0], lead_ttl_s=0.5))
        second = await stack.enter_async_context(running_balancer(stores[1], lead_ttl_s=0.5))
        one = await stack.enter_async_context(member(f"{second.address},{first.address}", "h:1"))
        before = await first_view(one, lambda view: view.placement.epoch > 0)
        model = first.planner.model
        token = await stores[0].lead(first.balancer.leadership.balancer_id, 0.5)
        assert model is not None and token > 0

        async def stay_silent() -> None:
            pass

        first.balancer.tick = stay_silent  # type: ignore[method-assign]  # it hangs, and does not know
        two = await stack.enter_async_context(member(second.address, "h:2"))
        after = await first_view(two, lambda view: two.member_id in view.placement.worker_ids)
        assert after.placement.epoch > before.placement.epoch
        assert second.balancer.leadership.is_leader
        stale = plan_homes(model.layers, [Worker(worker_id="stale")], epoch=after.placement.epoch + 10)
        with pytest.raises(FencedError):
            await stores[0].publish(stale, model, token)
        with pytest.raises(FencedError):
            await stores[0].save_plan(stale, token)
        await leading.aclose()
        assert (await stores[1].load()).placement.epoch == after.placement.epoch


async def test_load_that_a_follower_hears_reaches_the_leader(redis_server: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(store_of(redis_server)) for _ in range(2)]
        leader = await stack.enter_async_context(running_balancer(stores[0], window_s=0.5))
        follower = await stack.enter_async_context(running_balancer(stores[1], window_s=0.5))
        one = await stack.enter_async_context(member(leader.address, "h:1"))
        await first_view(one, lambda view: view.placement.epoch > 0)
        router = await stack.enter_async_context(member(follower.address, "h:3", pb.ROLE_ROUTER))
        seen = asyncio.create_task(first_view(one, lambda view: view.balance.num_windows > 0))
        await report_until(router, SKEWED, seen)
        told = await first_view(router, lambda view: view.balance.num_windows > 0)  # and the follower says what it says
        assert told.balance.decode.mean > 0 and not told.balance.is_leader


async def test_a_fencing_token_only_grows_and_the_lead_can_be_given_back(redis_server: RedisServer) -> None:
    async with store_of(redis_server) as store:
        first = await store.lead("a", 30)
        assert await store.lead("a", 30) == first
        assert await store.lead("b", 30) == 0
        await store.resign("b")
        assert await store.lead("b", 30) == 0
        await store.resign("a")
        assert await store.lead("b", 30) > first


async def test_a_report_of_another_shape_or_of_nobody_is_refused() -> None:
    async with (
        running_balancer(MemoryStore()) as balancer,
        member(balancer.address, "h:1"),
        rpc.channel(balancer.address) as channel,
    ):
        stub = balancer_pb2_grpc.BalancerStub(channel)
        joined = await stub.Join(pb.JoinRequest(role=pb.ROLE_ROUTER, address="h:3"))
        for request, code, field in (
            (report(*SKEWED), grpc.StatusCode.NOT_FOUND, "member_id"),
            (pb.ReportLoadRequest(member_id=joined.member_id), grpc.StatusCode.INVALID_ARGUMENT, "layers"),
            (report(1, 2, 3), grpc.StatusCode.INVALID_ARGUMENT, "layers"),
        ):
            if code is grpc.StatusCode.INVALID_ARGUMENT:
                request.member_id = joined.member_id
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.ReportLoad(request)
            error = from_rpc_error(caught.value)
            assert (error.code, error.field) == (code, field)


async def test_scaling_down_empties_the_newest_worker_before_it_may_end_and_up_again_keeps_it() -> None:
    async with (
        running_balancer(MemoryStore(), expected_workers=2) as balancer,
        rpc.channel(balancer.address) as channel,
        member(balancer.address, "h:1") as one,
        member(balancer.address, "h:2") as two,
    ):
        stub = balancer_pb2_grpc.BalancerStub(channel)
        await first_view(one, lambda view: len(view.placement.worker_ids) == 2)
        answer = await stub.Scale(pb.ScaleRequest(num_workers=1))
        assert (answer.num_workers, list(answer.retiring)) == (2, [two.member_id])
        empty = await first_view(one, lambda view: list(view.placement.worker_ids) == [one.member_id])
        states = {m.member_id: m.state for m in empty.members}
        assert states[two.member_id] == pb.MEMBER_STATE_RETIRING
        assert empty.wanted_workers == 1
        two.set_ready_plan(0)  # it renews, and does not know that it retires
        again = await stub.Scale(pb.ScaleRequest(num_workers=2))
        assert not again.retiring
        back = await first_view(one, lambda view: len(view.placement.worker_ids) == 2)
        assert {m.state for m in back.members} == {pb.MEMBER_STATE_SERVING}


async def test_no_workers_are_not_scaled_to_and_without_a_model_nothing_is() -> None:
    async with running_balancer(MemoryStore()) as balancer, rpc.channel(balancer.address) as channel:
        stub = balancer_pb2_grpc.BalancerStub(channel)
        for number, code in ((0, grpc.StatusCode.INVALID_ARGUMENT), (2, grpc.StatusCode.UNAVAILABLE)):
            with pytest.raises(aio.AioRpcError) as caught:
                await stub.Scale(pb.ScaleRequest(num_workers=number))
            assert caught.value.code() is code


async def test_how_many_workers_are_wanted_is_remembered(redis_server: RedisServer) -> None:
    async with store_of(redis_server) as store:
        async with running_balancer(store) as balancer, member(balancer.address, "h:1") as one:
            async with rpc.channel(balancer.address) as channel:
                await balancer_pb2_grpc.BalancerStub(channel).Scale(pb.ScaleRequest(num_workers=3))
            await first_view(one, lambda view: view.wanted_workers == 3)
            await until_wanted(store, 3)
        async with running_balancer(store) as again:
            assert again.planner.wanted_workers == 3


async def until_wanted(store: RedisStore, number: int) -> None:
    for _ in range(1000):
        if (await store.load(with_windows=False)).wanted_workers == number:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{number} workers are not remembered as wanted")


async def test_a_redis_that_comes_back_empty_without_a_word_is_told_everything_again(redis_server: RedisServer) -> None:
    async with (
        store_of(redis_server) as store,
        store_of(redis_server) as reader,
        running_balancer(store) as balancer,
        member(balancer.address, "h:1") as one,
        rpc.channel(balancer.address) as channel,
    ):
        view = await first_view(one, lambda view: view.placement.epoch > 0)
        await balancer_pb2_grpc.BalancerStub(channel).Scale(pb.ScaleRequest(num_workers=1))
        await until_wanted(reader, 1)
        await reader._redis.flushall()
        await until_wanted(reader, 1)
        memory = await reader.load()
        assert memory.placement.epoch == view.placement.epoch
        assert memory.model is not None
        assert [record.member_id for record in memory.members] == [one.member_id]
        assert balancer.planner.wanted_workers == 1


async def test_a_worker_that_another_balancer_hears_retires_as_well(redis_server: RedisServer) -> None:
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(store_of(redis_server)) for _ in range(2)]
        leader = await stack.enter_async_context(running_balancer(stores[0], expected_workers=2))
        follower = await stack.enter_async_context(running_balancer(stores[1], expected_workers=2))
        one = await stack.enter_async_context(member(leader.address, "h:1"))
        two = await stack.enter_async_context(member(follower.address, "h:2"))
        await first_view(one, lambda view: len(view.placement.worker_ids) == 2)
        async with rpc.channel(leader.address) as channel:
            await balancer_pb2_grpc.BalancerStub(channel).Scale(pb.ScaleRequest(num_workers=1))

        async def renew_often() -> None:
            for number in range(10_000):
                two.set_ready_plan(1000 + number)
                await asyncio.sleep(0.02)

        renewing = asyncio.create_task(renew_often())
        try:
            for membership in (one, two):  # whatever it reports, both balancers show that it retires
                await first_view(
                    membership,
                    lambda view: (
                        {m.member_id: m.state for m in view.members}.get(two.member_id) == pb.MEMBER_STATE_RETIRING
                    ),
                )
        finally:
            renewing.cancel()
        empty = await first_view(two, lambda view: list(view.placement.worker_ids) == [one.member_id])
        assert empty.wanted_workers == 1


async def test_every_member_tells_which_epoch_it_has_seen_and_how_old_its_view_is() -> None:
    async with running_balancer(MemoryStore()) as balancer, member(balancer.address, "h:1") as membership:
        view = await first_view(membership, lambda view: view.placement.epoch > 0)
        shown = membership._own_counters()
        assert shown["collegium_seen_epoch"] == view.placement.epoch
        assert shown["collegium_view_age_seconds"] >= 0
