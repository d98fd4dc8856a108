"""What callers see when routers die, when they themselves do not read, and when the gateway is asked to end."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from collegium.fabric import rpc
from collegium.fabric.errors import SettingsError
from collegium.fabric.leases import Membership
from collegium.v1 import balancer_pb2, inference_pb2_grpc, router_pb2
from collegium.v1 import inference_pb2 as pb
from gateway.relay import MAX_FRUITLESS_REPLAYS
from gateway.tokenizer import Tokenizer
from tests.balancers import running_balancer
from tests.fake_router import FakeRouter, expected, model, score_of, scripted
from tests.gateway_rig import (
    DEMO,
    Rig,
    certificate,
    endings,
    error_of,
    gather,
    ids_request,
    rig,
    text,
    token_ids,
    until,
)
from tests.memory_store import MemoryStore

HANDED_OVER = router_pb2.Failure(code=14, message="draining", reason="DRAINING")
UNAVAILABLE = router_pb2.Failure(code=14, message="no worker", reason="NO_EXPERT_WORKER")


def pair() -> tuple[FakeRouter, FakeRouter]:
    routers = FakeRouter(), FakeRouter()
    for router in routers:
        router.hold()
    return routers


async def holder_of(routers: tuple[FakeRouter, FakeRouter]) -> tuple[FakeRouter, FakeRouter]:
    """Wait until one router has the request; gives it and the other one."""
    await until(lambda: any(router.sequences for router in routers))
    return routers if routers[0].sequences else (routers[1], routers[0])


async def both_attached(served: Rig) -> None:
    await until(lambda: all(attachment.can_serve for attachment in served.gateway.pool.attachments))


# Routers that die.


async def test_a_request_goes_on_at_another_router_without_a_lost_or_repeated_token() -> None:
    routers = pair()
    async with rig(*routers) as served:
        await both_attached(served)
        sampling = pb.Sampling(temperature=1.0, seed=3)
        request = ids_request(5, 6, max_tokens=20, num_choices=2, num_logprobs=1, sampling=sampling)
        reading = asyncio.create_task(gather(served.stub.Generate(request)))
        first, second = await holder_of(routers)
        first.step(7)
        await first.until(lambda: first.num_steps == 7)
        await first.stop()
        await second.until(lambda: bool(second.submissions))
        second.release()
        responses = await reading
        for choice_index in range(2):
            wanted = expected([5, 6], 20, choice_index, temperature=1.0, seed=3)
            assert token_ids(responses, choice_index) == wanted
        chunks = [chunk for response in responses for chunk in response.chunks]
        assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
        (replay,) = second.submissions
        for start in replay.choices:
            assert 0 < len(start.output_ids) <= 7
            assert list(replay.prompt_ids) == [5, 6]
        assert served.gateway.counts.replays == 1
        assert responses[-1].usage.output_tokens == 40


async def test_a_choice_that_had_ended_is_not_replayed() -> None:
    routers = pair()
    for router in routers:
        router.next_token = lambda _, output, choice, __: 0 if choice == 0 and len(output) == 2 else 5
    async with rig(*routers) as served:
        await both_attached(served)
        reading = asyncio.create_task(gather(served.stub.Generate(ids_request(5, max_tokens=9, num_choices=2))))
        first, second = await holder_of(routers)
        first.step(4)
        await first.until(lambda: first.num_steps == 4)
        await until(lambda: served.gateway.admission.queued_tokens == 0)
        await first.stop()
        await second.until(lambda: bool(second.submissions))
        second.release()
        responses = await reading
        assert token_ids(responses, 0) == [5, 5, 0]
        assert token_ids(responses, 1) == [5] * 9


async def test_a_stop_string_is_found_across_the_death_of_a_router() -> None:
    tokenizer = Tokenizer.load(DEMO)
    assert tokenizer is not None
    script = tokenizer.encode(" one two three STOPPING HERE four")
    whole = tokenizer.decode(script)
    routers = pair()
    for router in routers:
        router.next_token = scripted(script)
    async with rig(*routers) as served:
        await both_attached(served)
        stopping = pb.Stopping(max_tokens=50, stop_strings=[b"STOPPING HERE"])
        reading = asyncio.create_task(gather(served.stub.Generate(ids_request(1, stopping=stopping))))
        first, second = await holder_of(routers)
        inside = next(n for n in range(len(script)) if "STOP" in tokenizer.decode(script[:n]))
        first.step(inside)
        await first.until(lambda: first.num_steps == inside)
        await first.stop()
        await second.until(lambda: bool(second.submissions))
        second.release()
        responses = await reading
        assert text(responses) == whole[: whole.index("STOPPING")]
        assert endings(responses) == {0: ("FINISH_REASON_STOP", "STOPPING HERE")}


async def test_the_only_router_may_die_and_come_back_under_the_same_address() -> None:
    router = FakeRouter()
    router.hold()
    async with rig(router) as served:
        reading = asyncio.create_task(gather(served.stub.Generate(ids_request(8, max_tokens=12))))
        await router.until(lambda: bool(router.sequences))
        router.step(5)
        await router.until(lambda: router.num_steps == 5)
        await router.stop()
        await until(lambda: not served.gateway.server.health.is_serving())
        router.release()
        await router.start(served.router_addresses[0])
        assert token_ids(await reading) == expected([8], 12)
        await rpc.wait_until_serving(served.address)


async def test_what_a_router_can_not_go_on_with_is_replayed_on_another_one() -> None:
    routers = pair()
    async with rig(*routers) as served:
        await both_attached(served)
        reading = asyncio.create_task(gather(served.stub.Generate(ids_request(8, max_tokens=12))))
        first, second = await holder_of(routers)
        first.step(3)
        await first.until(lambda: first.num_steps == 3)
        second.release()
        first.failure = UNAVAILABLE
        first.step()
        assert token_ids(await reading) == expected([8], 12)
        assert len(second.submissions) == 1
        assert served.gateway.counts.replays == 1


async def test_what_a_draining_router_has_not_begun_goes_to_another_one_and_is_no_replay() -> None:
    routers = pair()
    async with rig(*routers) as served:
        await both_attached(served)
        first, second = routers
        first.failure = HANDED_OVER
        for router in routers:
            router.tokens_per_step = 0 if router is first else 1
            router.release()
        answers = [await gather(served.stub.Generate(ids_request(i, max_tokens=5))) for i in range(1, 9)]
        assert [token_ids(answer) for answer in answers] == [expected([i], 5) for i in range(1, 9)]
        assert len(first.submissions) <= 1  # from then on it gets nothing, whatever its health says
        assert len(second.submissions) == 8
        assert served.gateway.counts.replays == 0


async def test_a_score_starts_again_on_another_router() -> None:
    routers = pair()
    async with rig(*routers) as served:
        await both_attached(served)
        scored = list(range(1, 50))
        asking = asyncio.ensure_future(served.stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=scored))))
        first, second = await holder_of(routers)
        first.step()
        await first.until(lambda: first.num_steps == 1)
        await first.stop()
        await second.until(lambda: bool(second.submissions))
        second.release()
        assert list((await asking).logprobs) == [0.0, *(score_of(token_id) for token_id in scored[1:])]


async def test_a_hundred_streams_survive_their_router() -> None:
    routers = pair()
    async with rig(*routers) as served:
        await both_attached(served)
        readings = [
            asyncio.create_task(gather(served.stub.Generate(ids_request(i, max_tokens=10)))) for i in range(1, 101)
        ]
        await until(lambda: sum(len(router.sequences) for router in routers) == 100)
        assert all(len(router.sequences) > 20 for router in routers)  # both had their share
        routers[0].step(4)
        await routers[0].until(lambda: routers[0].num_steps == 4)
        await routers[0].stop()
        routers[1].release()
        for i, reading in enumerate(readings, start=1):
            assert token_ids(await reading) == expected([i], 10)


async def test_a_request_that_no_router_survives_is_given_up() -> None:
    router = FakeRouter()
    router.failure = UNAVAILABLE
    async with rig(router) as served:
        error = await error_of(served.stub.Generate(ids_request(1)))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "REPLAY_LIMIT")
        assert len(router.submissions) == MAX_FRUITLESS_REPLAYS + 1


async def test_a_request_waits_for_a_router_only_so_long() -> None:
    router = FakeRouter()
    router.hold()
    async with rig(router, router_wait_s=0.1) as served:
        reading = asyncio.create_task(error_of(served.stub.Generate(ids_request(1))))
        await router.until(lambda: bool(router.sequences))
        await router.stop()
        error = await reading
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ROUTER")
        assert error.retry_after_s
        late = await error_of(served.stub.Generate(ids_request(1), timeout=0.05))
        assert late.code == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: served.gateway.admission.num_requests == 0)


async def test_a_request_that_waits_for_a_router_can_be_cancelled() -> None:
    router = FakeRouter()
    router.hold()
    async with rig(router) as served:
        request = ids_request(1, request_id="waits", max_tokens=10)
        reading = asyncio.create_task(gather(served.stub.Generate(request)))
        await router.until(lambda: bool(router.sequences))
        router.step(2)
        await router.until(lambda: router.num_steps == 2)
        await router.stop()
        await until(lambda: not served.gateway.pool.can_serve)
        assert (await served.stub.Cancel(pb.CancelRequest(request_id="waits"))).was_running
        responses = await reading
        assert endings(responses) == {0: ("FINISH_REASON_CANCELLED", "")}
        assert token_ids(responses) == expected([1], len(token_ids(responses)))


async def test_a_router_that_loads_is_attached_once_it_can() -> None:
    router = FakeRouter()
    router.is_loading = True
    async with rig(router, is_waiting=False) as served:
        assert (await error_of(served.stub.Generate(ids_request(1)))).code == grpc.StatusCode.UNAVAILABLE
        router.is_loading = False
        await rpc.wait_until_serving(served.address)
        assert token_ids(await gather(served.stub.Generate(ids_request(1)))) == expected([1], 8)


async def test_a_router_that_left_the_list_is_used_until_its_stream_ends() -> None:
    router = FakeRouter()
    async with rig(router) as served:
        served.gateway.pool.set_addresses([])  # as a balancer shows it that has just started
        assert token_ids(await gather(served.stub.Generate(ids_request(1)))) == expected([1], 8)
        await router.stop()
        await until(lambda: not served.gateway.pool.attachments)


# With a balancer.


async def test_routers_are_found_through_the_balancer_and_the_cluster_is_its_view() -> None:
    router = FakeRouter()
    async with running_balancer(MemoryStore()) as balancer:
        address = await router.start()
        async with (
            rig(is_waiting=False, routers=(), balancer=balancer.address) as served,
            Membership(balancer.address, balancer_pb2.ROLE_ROUTER, address, num_threads=3) as lease,
        ):
            lease.set_state(balancer_pb2.MEMBER_STATE_SERVING)
            await rpc.wait_until_serving(served.address)
            assert token_ids(await gather(served.stub.Generate(ids_request(1)))) == expected([1], 8)
            serving: list[str] = []
            while serving != ["SERVING"] * 3:  # its own lease says so a moment later
                cluster = await served.stub.GetCluster(pb.GetClusterRequest())
                serving = [member.state for member in cluster.members]
            assert [member.role for member in cluster.members] == ["balancer", "gateway", "router"]
            by_role = {member.role: member for member in cluster.members}
            assert by_role["router"].num_threads == 3
            assert by_role["router"].member_id == lease.member_id
            assert by_role["gateway"].address == served.address
            early = await error_of(served.stub.ScaleWorkers(pb.ScaleWorkersRequest(num_workers=2)))
            assert (early.code, early.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_MODEL")
            assert cluster.balance.is_leader and not cluster.stale_ms
        await router.stop()


async def test_without_its_balancer_a_gateway_goes_on() -> None:
    router = FakeRouter()
    address = await router.start()
    async with AsyncExitStack() as stack:
        balancer = await stack.enter_async_context(running_balancer(MemoryStore()))
        lease = Membership(balancer.address, balancer_pb2.ROLE_ROUTER, address)
        lease.set_state(balancer_pb2.MEMBER_STATE_SERVING)
        await stack.enter_async_context(lease)
        async with rig(is_waiting=False, routers=(), balancer=balancer.address) as served:
            await rpc.wait_until_serving(served.address)
            await stack.aclose()
            assert token_ids(await gather(served.stub.Generate(ids_request(1)))) == expected([1], 8)
            cluster = await served.stub.GetCluster(pb.GetClusterRequest())
            assert {member.state for member in cluster.members if member.role == "balancer"} == {"LOST"}
            assert cluster.stale_ms > 0
    await router.stop()


# Callers who do not read.


def counting(_: Any, output_ids: Any, __: int, ___: Any) -> int:
    return 1 + len(output_ids) % 4000


def long_router() -> FakeRouter:
    router = FakeRouter(model(max_model_len=100_000), counting)
    router.tokens_per_step = 20
    return router


async def test_a_caller_who_does_not_read_is_paused_and_harms_nobody() -> None:
    router = long_router()
    async with rig(router) as served, aio.insecure_channel(served.address, [("grpc.http2.bdp_probe", 0)]) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        slow = aiter(stub.Generate(ids_request(1, max_tokens=20_000, num_logprobs=20)))
        got = [await anext(slow)]
        await router.until(lambda: bool(router.pauses))
        held = router.sequences[next(iter(router.sequences))]
        assert held.is_paused
        assert len(held.output_ids) < 20_000
        (generation,) = served.gateway.service.running("")
        assert generation.num_pending < 2 * 256
        others = await asyncio.gather(*(gather(served.stub.Generate(ids_request(i))) for i in range(20)))
        assert all(len(token_ids(responses)) == 8 for responses in others)
        assert held.is_paused
        got.extend([response async for response in slow])
        assert token_ids(got) == [counting(None, range(n), 0, None) for n in range(20_000)]
        assert router.unpauses


async def test_a_caller_who_never_reads_is_cancelled_in_the_end() -> None:
    router = long_router()
    async with (
        rig(router, stall_timeout_s=0.2) as served,
        aio.insecure_channel(served.address, [("grpc.http2.bdp_probe", 0)]) as channel,
    ):
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        slow = aiter(stub.Generate(ids_request(1, max_tokens=50_000, num_logprobs=20)))
        await anext(slow)
        await router.until(lambda: bool(router.sequences))
        await router.until(lambda: not router.sequences)
        error = await error_of(slow)
        assert (error.code, error.reason) == (grpc.StatusCode.CANCELLED, "CALLER_STALLED")
        await until(lambda: served.gateway.admission.num_requests == 0)


# The end of a gateway.


async def test_a_gateway_that_drains_finishes_what_runs_and_takes_nothing_new() -> None:
    router = FakeRouter()
    router.hold()
    async with rig(router) as served:
        reading = asyncio.create_task(gather(served.stub.Generate(ids_request(1))))
        await router.until(lambda: bool(router.sequences))
        draining = asyncio.create_task(served.gateway.drain(30.0))
        await until(lambda: not served.gateway.server.health.is_serving())
        async with aio.insecure_channel(served.address) as channel:
            refused = await error_of(inference_pb2_grpc.InferenceStub(channel).Generate(ids_request(1)))
            # CANCELLED: it came in the moment of the stop, and gRPC's core ended it; the SDK tries both elsewhere
            assert refused.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
            assert len(router.sequences) == 1
        router.release()
        assert token_ids(await reading) == expected([1], 8)
        await draining


async def test_a_gateway_that_ends_leaves_no_task_and_no_sequence() -> None:
    before = len(asyncio.all_tasks())
    router = FakeRouter()
    router.hold()
    async with rig(router) as served:
        reading = asyncio.create_task(error_of(served.stub.Generate(ids_request(1))))
        await router.until(lambda: bool(router.sequences))
        await served.gateway.drain(0.0)
        assert (await reading).code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        await router.until(lambda: not router.sequences)
    await until(lambda: len(asyncio.all_tasks()) <= before)


# Keys and TLS.


async def test_without_a_known_key_nothing_is_answered_but_health(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# team a\nsecret\n")
    router = FakeRouter()
    async with rig(router, api_keys=keys) as served:  # which waits by health checks, without a key
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "secret"),)):
            for call in (
                served.stub.Generate(ids_request(1), metadata=metadata),
                served.stub.Resume(pb.ResumeRequest(request=ids_request(1)), metadata=metadata),
                served.stub.Score(pb.ScoreRequest(), metadata=metadata),
                served.stub.Cancel(pb.CancelRequest(request_id="x"), metadata=metadata),
                served.stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
                served.stub.GetModel(pb.GetModelRequest(), metadata=metadata),
                served.stub.GetCluster(pb.GetClusterRequest(), metadata=metadata),
            ):
                error = await error_of(call)
                assert error.code == grpc.StatusCode.UNAUTHENTICATED
                assert error.field == "authorization"
                assert error.remedy
        assert not router.submissions
        good = await gather(served.stub.Generate(ids_request(1), metadata=(("authorization", "Bearer secret"),)))
        assert token_ids(good) == expected([1], 8)


async def test_tls_is_spoken_where_asked_for(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    async with rig(FakeRouter(), is_waiting=False, tls_cert=cert, tls_key=key) as served:
        await rpc.wait_until_serving(served.address, tls=rpc.TlsTrust(ca=cert))
        async with rpc.channel(served.address, tls=rpc.TlsTrust(ca=cert)) as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            assert token_ids(await gather(stub.Generate(ids_request(1)))) == expected([1], 8)
        assert (await error_of(served.stub.Generate(ids_request(1)))).code == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("broken", ["tls_cert", "tls_key"])
async def test_tls_files_that_cannot_be_read_stop_the_start(tmp_path: Path, broken: str) -> None:
    cert, key = certificate(tmp_path)
    files = {"tls_cert": cert, "tls_key": key} | {broken: tmp_path / "missing.pem"}
    with pytest.raises(SettingsError, match=broken.replace("_", "-")):
        async with rig(FakeRouter(), is_waiting=False, **files):
            pass
