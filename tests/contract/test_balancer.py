"""The Balancer service over real gRPC: every RPC, every status, with Redis behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from balancer_svc.messages import from_shape
from balancer_svc.model import Model
from balancer_svc.redis_store import RedisStore
from balancer_svc.store import NO_TOKEN, StoreError
from collegium.fabric import rpc
from collegium.fabric.errors import from_rpc_error
from collegium.fabric.leases import Membership
from collegium.model.placement import Placement, Worker, plan_homes
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc
from tests.balancers import SHAPE, RunningBalancer, first_view, running_balancer, stay_ready
from tests.memory_store import MemoryStore
from tests.redis_server import RedisServer


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.kill()


class TellingStore(RedisStore):
    """Says which epochs Redis has taken."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "test")
        self.remembered: asyncio.Queue[int] = asyncio.Queue()

    async def publish(self, placement: Placement, model: Model, token: int = NO_TOKEN) -> int:
        epoch = await super().publish(placement, model, token)
        self.remembered.put_nowait(epoch)
        return epoch


@asynccontextmanager
async def redis_store(server: RedisServer) -> AsyncIterator[TellingStore]:
    store = TellingStore(server.url)
    try:
        await store.connect(5)
        yield store
    finally:
        await store.close()


@asynccontextmanager
async def stub_of(address: str) -> AsyncIterator[balancer_pb2_grpc.BalancerStub]:
    async with rpc.channel(address) as channel:
        yield balancer_pb2_grpc.BalancerStub(channel)


@asynccontextmanager
async def worker(balancer: RunningBalancer, address: str) -> AsyncIterator[Membership]:
    async with Membership(balancer.address, pb.ROLE_WORKER, address, model=SHAPE) as membership:
        ready = asyncio.create_task(stay_ready(membership))
        try:
            yield membership
        finally:
            ready.cancel()


def worker_join(address: str = "h:1", digest: str = "m1") -> pb.JoinRequest:
    shape = pb.ModelShape(digest=digest, layers=SHAPE.layers)
    return pb.JoinRequest(role=pb.ROLE_WORKER, address=address, model=shape)


async def test_workers_join_load_their_plan_and_only_then_is_it_in_force(redis_server: RedisServer) -> None:
    async with (
        redis_store(redis_server) as store,
        running_balancer(store, expected_workers=2) as balancer,
        Membership(balancer.address, pb.ROLE_WORKER, "h:1", model=SHAPE) as slow,
        worker(balancer, "h:2") as quick,
    ):
        view = await first_view(slow, lambda view: view.planned.epoch > 0)
        assert view.placement.epoch == 0
        assert sorted(view.planned.worker_ids) == sorted([slow.member_id, quick.member_id])
        slow.set_ready_plan(view.planned.epoch)
        published = await first_view(slow, lambda view: view.placement.epoch > 0)
        assert published.placement == view.planned
        assert not published.planned.worker_ids


async def test_a_worker_that_leaves_has_its_homes_loaded_elsewhere(redis_server: RedisServer) -> None:
    async with (
        redis_store(redis_server) as store,
        running_balancer(store, expected_workers=2) as balancer,
        worker(balancer, "h:1") as stays,
    ):
        async with worker(balancer, "h:2"):
            before = await first_view(stays, lambda view: len(view.placement.worker_ids) == 2)
        after = await first_view(stays, lambda view: list(view.placement.worker_ids) == [stays.member_id])
        assert after.placement.epoch > before.placement.epoch
        assert all(set(layer.worker_idx) == {0} for layer in after.placement.layers)


async def test_a_draining_worker_is_planned_around_while_it_is_still_there(redis_server: RedisServer) -> None:
    async with (
        redis_store(redis_server) as store,
        running_balancer(store, expected_workers=2) as balancer,
        worker(balancer, "h:1") as stays,
        worker(balancer, "h:2") as leaves,
    ):
        await first_view(stays, lambda view: len(view.placement.worker_ids) == 2)
        leaves.set_state(pb.MEMBER_STATE_DRAINING)
        view = await first_view(stays, lambda view: list(view.placement.worker_ids) == [stays.member_id])
        assert leaves.member_id in [member.member_id for member in view.members]


async def test_a_restarted_balancer_goes_on_from_redis(redis_server: RedisServer) -> None:
    async with redis_store(redis_server) as store:
        async with running_balancer(store) as balancer, worker(balancer, "h:1") as membership:
            first = await first_view(membership, lambda view: view.placement.epoch > 0)
            address = balancer.address
        async with (
            redis_store(redis_server) as again,
            running_balancer(again, bind=address) as balancer,
            worker(balancer, "h:2") as membership,
        ):
            view = await first_view(membership, lambda view: membership.member_id in view.placement.worker_ids)
            assert view.placement.epoch > first.placement.epoch


async def test_members_keep_their_ids_and_placement_its_epoch_over_a_balancer_restart(
    redis_server: RedisServer,
) -> None:
    async with redis_store(redis_server) as store:
        async with running_balancer(store) as balancer:
            address = balancer.address
            membership = Membership(address, pb.ROLE_WORKER, "h:1", model=SHAPE)
            await membership.__aenter__()
            ready = asyncio.create_task(stay_ready(membership))
            first = await first_view(membership, lambda view: view.placement.epoch > 0)
            old_id = membership.member_id
        async with redis_store(redis_server) as again, running_balancer(again, bind=address) as balancer:
            async with stub_of(address) as stub:
                renewal = pb.RenewRequest(member_id=old_id, ready_plan=first.placement.epoch)
                await stub.Renew(renewal, wait_for_ready=True)
                answer = await stub.GetPlacement(pb.GetPlacementRequest())
            assert answer.view.placement == first.placement
            assert [member.member_id for member in answer.view.members] == [old_id]
            ready.cancel()
            await membership.__aexit__(None, None, None)


async def test_a_redis_that_dies_stops_nothing_and_is_filled_again(redis_server: RedisServer) -> None:
    async with (
        redis_store(redis_server) as store,
        running_balancer(store) as balancer,
        worker(balancer, "h:1") as first,
    ):
        before = await first_view(first, lambda view: view.placement.epoch > 0)
        redis_server.kill()
        redis_server.wipe()
        async with worker(balancer, "h:2") as second:
            view = await first_view(first, lambda view: second.member_id in view.placement.worker_ids)
            assert view.placement.epoch > before.placement.epoch
            redis_server.start()
            while await store.remembered.get() != view.placement.epoch:
                pass
            memory = await store.load()
            assert {member.member_id for member in memory.members} == {first.member_id, second.member_id}


async def test_a_redis_that_comes_back_empty_is_told_what_is_in_force(redis_server: RedisServer) -> None:
    async with (
        redis_store(redis_server) as store,
        running_balancer(store) as balancer,
        worker(balancer, "h:1") as first,
    ):
        before = await first_view(first, lambda view: view.placement.epoch > 0)
        assert await store.remembered.get() == before.placement.epoch
        redis_server.kill()
        redis_server.wipe()
        redis_server.start()
        # Nothing changes in the cluster; the balancer learns of the loss because a call of its own fails.
        balancer.balancer.memory.lose(StoreError("told by the test"))
        first.set_state(pb.MEMBER_STATE_JOINING)
        assert await store.remembered.get() == before.placement.epoch
        assert (await store.load()).placement.epoch == before.placement.epoch


async def test_redis_never_goes_back_to_an_older_epoch(redis_server: RedisServer) -> None:
    model = from_shape(SHAPE)
    async with redis_store(redis_server) as store:
        new = plan_homes(model.layers, [Worker(worker_id="a")], epoch=5)
        old = plan_homes(model.layers, [Worker(worker_id="b")], epoch=4)
        assert await store.publish(new, model) == 5
        assert await store.publish(old, model) == 5
        memory = await store.load()
        assert (memory.placement, memory.model, memory.newest_epoch) == (new, model, 5)
        assert [await store.next_epoch(floor) for floor in (0, 9, 3)] == [1, 10, 11]


async def test_a_balancer_that_lost_its_memory_goes_on_above_every_epoch_that_was_seen() -> None:
    async with running_balancer(MemoryStore()) as balancer, stub_of(balancer.address) as stub:
        joined = await stub.Join(pb.JoinRequest(role=pb.ROLE_ROUTER, address="h:9", seen_epoch=41))
        async with worker(balancer, "h:1") as membership:
            view = await first_view(membership, lambda view: view.placement.epoch > 0)
        assert view.placement.epoch == 42
        assert joined.ttl_ms == 30_000


async def test_a_lapsed_lease_is_replaced_by_a_new_one_and_homes_stay_where_they_are() -> None:
    async with (
        running_balancer(MemoryStore(), expected_workers=2) as balancer,
        worker(balancer, "h:1") as one,
        worker(balancer, "h:2"),
    ):
        view = await first_view(one, lambda view: view.placement.epoch > 0)
        old_id = one.member_id
        balancer.roster.leave(old_id)
        one.set_ready_plan(0)  # makes it renew now
        after = await first_view(one, lambda view: one.member_id != old_id and bool(view.placement.epoch))
        after = await first_view(one, lambda view: one.member_id in view.placement.worker_ids)
        assert old_id not in after.placement.worker_ids
        assert after.placement.epoch > view.placement.epoch


async def test_a_worker_that_starts_again_at_its_address_takes_over_its_homes() -> None:
    async with (
        running_balancer(MemoryStore(), expected_workers=2) as balancer,
        stub_of(balancer.address) as stub,
        worker(balancer, "h:1") as one,
    ):
        first = await stub.Join(worker_join("h:2"))
        await stub.Renew(pb.RenewRequest(member_id=first.member_id, ready_plan=99))
        before = await first_view(one, lambda view: first.member_id in view.placement.worker_ids)
        async with worker(balancer, "h:2") as again:
            after = await first_view(one, lambda view: again.member_id in view.placement.worker_ids)
            assert first.member_id not in [member.member_id for member in after.members]
            index = [list(view.placement.worker_ids).index(one.member_id) for view in (before, after)]
            homes = [
                [[w == index[i] for w in layer.worker_idx] for layer in view.placement.layers]
                for i, view in enumerate((before, after))
            ]
            assert homes[0] == homes[1]


async def test_a_worker_of_another_model_is_refused() -> None:
    async with running_balancer(MemoryStore()) as balancer, stub_of(balancer.address) as stub:
        await stub.Join(worker_join("h:1"))
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Join(worker_join("h:2", digest="m2"))
        error = from_rpc_error(caught.value)
        assert (error.code, error.reason, error.field) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "OTHER_MODEL",
            "model.digest",
        )


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.JoinRequest(address="h:1"), "role"),
        (pb.JoinRequest(role=pb.ROLE_ROUTER), "address"),
        (pb.JoinRequest(role=pb.ROLE_WORKER, address="h:1"), "model"),
        (pb.JoinRequest(role=77, address="h:1"), "role"),  # type: ignore[arg-type]
    ],
    ids=["no role", "no address", "no model", "a role that is not known"],
)
async def test_a_join_that_lacks_something_names_the_field(request_: pb.JoinRequest, field: str) -> None:
    async with running_balancer(MemoryStore()) as balancer, stub_of(balancer.address) as stub:
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Join(request_)
        error = from_rpc_error(caught.value)
        assert (error.code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


async def test_renewing_an_unknown_lease_is_not_found_and_leaving_twice_is_fine() -> None:
    async with running_balancer(MemoryStore()) as balancer, stub_of(balancer.address) as stub:
        joined = await stub.Join(pb.JoinRequest(role=pb.ROLE_GATEWAY, address="h:1"))
        await stub.Leave(pb.LeaveRequest(member_id=joined.member_id))
        await stub.Leave(pb.LeaveRequest(member_id=joined.member_id))
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.Renew(pb.RenewRequest(member_id=joined.member_id))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        assert "join again" in (caught.value.details() or "")


async def test_counters_and_threads_of_members_are_in_the_view() -> None:
    async with running_balancer(MemoryStore()) as balancer, stub_of(balancer.address) as stub:
        joined = await stub.Join(pb.JoinRequest(role=pb.ROLE_ROUTER, address="h:1", num_threads=3, metrics_url="u"))
        await stub.Renew(
            pb.RenewRequest(member_id=joined.member_id, state=pb.MEMBER_STATE_SERVING, counters={"steps": 5.0})
        )
        answer = await stub.GetPlacement(pb.GetPlacementRequest())
        (member,) = answer.view.members
        assert (member.num_threads, member.metrics_url, member.counters["steps"]) == (3, "u", 5.0)
        assert member.counted_unix_ms >= member.joined_unix_ms > 0
        assert member.state == pb.MEMBER_STATE_SERVING


async def test_the_health_watch_streams_and_ends_with_the_server() -> None:
    async with running_balancer(MemoryStore()) as balancer:
        channel = rpc.channel(balancer.address)
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        statuses = [(await watch.read()).status]
    while (response := await watch.read()) is not aio.EOF:
        statuses.append(response.status)
    await channel.close()
    assert statuses == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]
