"""One broken value in Redis, of any key: that record is lost, said once by name, and everything else goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import redis.asyncio as redis
from hypothesis import given
from hypothesis import strategies as st

from balancer_svc.load_windows import Window
from balancer_svc.messages import from_shape, to_message
from balancer_svc.redis_records import MAX_KEPT_EPOCH, Reading
from balancer_svc.redis_store import RedisStore
from balancer_svc.roster import Member
from balancer_svc.store import Remembered
from collegium.fabric.leases import Membership
from collegium.fabric.views import to_proto
from collegium.model.placement import Placement
from collegium.v1 import balancer_pb2 as pb
from tests.balancers import SHAPE, first_view, running_balancer, stay_ready
from tests.gateway_rig import until
from tests.redis_server import RedisServer

MODEL = from_shape(SHAPE)
HOMES = (((0,), (0,), (0,), (0,)),) * 2
PLACEMENT = Placement(epoch=7, worker_ids=("worker-1",), homes=HOMES)
PLANNED = replace(PLACEMENT, epoch=8)
COUNTS = np.ones((3, 2, 4), np.int64)
WINDOW = Window(unix_ms=1, length_s=1.0, decode=COUNTS[0], prefill=COUNTS[1], activations=COUNTS[2])
MEMBERS = [
    Member(member_id="worker-1", role=pb.ROLE_WORKER, address="w:1", seen_epoch=7),
    Member(member_id="router-1", role=pb.ROLE_ROUTER, address="r:1"),
]
PREFIX = "collegium:{cluster}"
Break = Callable[[Any], Awaitable[Any]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.kill()


@asynccontextmanager
async def opened(server: RedisServer) -> AsyncIterator[tuple[RedisStore, Any]]:
    """An empty memory: as a store, and bare."""
    store, bare = RedisStore(server.url, "cluster"), redis.Redis.from_url(server.url)
    try:
        await bare.flushall()
        yield store, bare
    finally:
        await store.close()
        await bare.aclose()


async def fill(store: RedisStore) -> Remembered:
    token = await store.lead("b", 60.0)
    await store.save_members(MEMBERS, ())
    assert await store.next_epoch(6) == 7
    await store.publish(PLACEMENT, MODEL, token)
    assert await store.next_epoch(7) == 8
    await store.save_plan(PLANNED, token)
    await store.save_balance(pb.Balance(last_decision="none"), token)
    await store.save_windows([WINDOW, WINDOW], 12, anew=False)
    await store.save_report("router-1", COUNTS)
    await store.save_wanted(3)
    return await store.load()


@dataclass(frozen=True)
class Key:
    """A record: where it is, how to break it, and what a memory without it lacks."""

    name: str  # as it is said
    put: Callable[[Any, bytes], Awaitable[Any]]
    lacks: frozenset[str]
    label: str
    is_number: bool = False
    of_its_type: tuple[bytes, ...] = ()


def text(key: str) -> Callable[[Any, bytes], Awaitable[Any]]:
    return lambda bare, value: bare.set(f"{PREFIX}:{key}", value)


def hashed(key: str, name: str) -> Callable[[Any, bytes], Awaitable[Any]]:
    return lambda bare, value: bare.hset(f"{PREFIX}:{key}", name, value)


def packed(message: Any) -> bytes:
    return message.SerializeToString()


def placement(**changes: Any) -> bytes:
    message = to_proto(PLACEMENT)
    for name, value in changes.items():
        if name == "worker_idx":
            message.layers[0].worker_idx[0] = value
        elif name == "worker_ids":
            message.worker_ids[:] = value
        else:
            setattr(message, name, value)
    return packed(message)


def member(**changes: Any) -> bytes:
    message = to_message(MEMBERS[0])
    for name, value in changes.items():
        if name == "counters":
            message.counters.update(value)
        else:
            setattr(message, name, value)
    return packed(message)


def loads(*layers: pb.LayerLoad) -> bytes:
    return packed(pb.LoadWindow(unix_ms=1, length_ms=1, layers=layers))


def model(*layers: pb.LayerShape) -> bytes:
    return packed(pb.ModelShape(digest="m1", layers=layers))


NOT_OURS = (b"", b"many", b"\xff\xfe", b"\x0a\xff\xff\xff\xff\x0f", b"\x00", b"{}" * 1000, b"-1", b"1e30", b"nan")
WILD = (
    b"many",
    b"-1",
    b"\xff\xfe",
    b"1e30",
    b"nan",
    b"inf",
    b"0x10",
    b"1.5",
    b"9" * 400,
    b"%d" % (2**53),
    b"%d" % 2**64,
)
ONE = pb.LayerLoad(decode_tokens=[1], prefill_tokens=[1], activations=[1])
HUGE = pb.LayerLoad(decode_tokens=[2**64 - 1], prefill_tokens=[1], activations=[1])
RAGGED = pb.LayerLoad(decode_tokens=[1, 2], prefill_tokens=[1], activations=[1])
BAD_PLACEMENTS = (
    placement(epoch=2**64 - 1),
    placement(epoch=2**53),
    placement(epoch=0),
    placement(worker_idx=2**32 - 1),
    placement(worker_ids=["x" * 100_000]),
    placement(worker_ids=["a", "a"]),
    placement()[:-3],
)
KEYS = (
    Key(
        "member:worker-1",
        text("member:worker-1"),
        frozenset({"members"}),
        "a member",
        of_its_type=(
            member()[:-1],
            member(member_id="worker-2"),
            member(role=0),
            member(role=9),
            member(address=""),
            member(seen_epoch=2**64 - 1),
            member(ready_plan=2**63),
            member(num_renewals=2**64 - 1),
            member(counters={"a": float("nan")}),
            member(metrics_url="x" * 100_000),
        ),
    ),
    Key("members", lambda bare, value: bare.sadd(f"{PREFIX}:members", value), frozenset(), "members"),
    Key(
        "placement",
        hashed("placement", "placement"),
        frozenset({"placement"}),
        "the placement",
        of_its_type=BAD_PLACEMENTS,
    ),
    Key(
        "placement",
        hashed("placement", "epoch"),
        frozenset({"placement"}),
        "its epoch",
        of_its_type=(b"8", b"6", *WILD),
    ),
    Key(
        "placement, planned",
        hashed("placement", "planned"),
        frozenset({"planned"}),
        "the plan",
        of_its_type=BAD_PLACEMENTS,
    ),
    Key(
        "placement, model",
        hashed("placement", "model"),
        frozenset({"model"}),
        "the model",
        of_its_type=(
            model(),
            model(pb.LayerShape(num_experts=0, expert_bytes=1)),
            model(pb.LayerShape(num_experts=2**32 - 1, expert_bytes=1)),
            model(*[pb.LayerShape(num_experts=4096, expert_bytes=2**40)] * 1_000),
            packed(pb.ModelShape(layers=SHAPE.layers)),
        ),
    ),
    Key(
        "placement, balance",
        hashed("placement", "balance"),
        frozenset({"balance"}),
        "the account",
        of_its_type=(packed(pb.Balance(row_ns=float("nan"))), packed(pb.Balance(retiring=["x" * 100_000]))),
    ),
    Key("wanted", text("wanted"), frozenset({"wanted_workers"}), "wanted", is_number=True),
    Key("epoch", text("epoch"), frozenset({"newest_epoch"}), "epoch", is_number=True),
    Key(
        "loads",
        lambda bare, value: bare.lpush(f"{PREFIX}:loads", value),
        frozenset(),
        "loads",
        of_its_type=(loads(), loads(HUGE), loads(RAGGED), loads(ONE, RAGGED), loads(ONE)[:-1]),
    ),
    Key(
        "reports, b'router-1'",
        hashed("reports", "router-1"),
        frozenset({"reports"}),
        "a report",
        of_its_type=(packed(pb.ReportLoadRequest(layers=[HUGE])), packed(pb.ReportLoadRequest(layers=[RAGGED]))),
    ),
    Key("reports", lambda bare, value: bare.hset(f"{PREFIX}:reports", b"\xff" + value, b""), frozenset(), "reports"),
)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        str(getattr(record, "collegium_fields")["key"])  # noqa: B009 - which records of logging lack
        for record in caplog.records
        if "dropped" in record.getMessage()
    ]


def parts(memory: Remembered) -> dict[str, str]:
    return {
        "members": repr([m.member_id for m in memory.members]),
        "model": repr(memory.model),
        "placement": repr(memory.placement),
        "planned": repr(memory.planned),
        "newest_epoch": repr(memory.newest_epoch),
        "wanted_workers": repr(memory.wanted_workers),
        "balance": repr(memory.balance),
        "windows": repr(memory.windows),
        "reports": repr(memory.reports),
    }


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.label)
async def test_a_broken_value_costs_its_own_record_is_said_once_and_written_over(
    key: Key, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(server) as (store, bare):
        values = WILD if key.is_number else (*NOT_OURS, *key.of_its_type)
        num_lost = 0
        whole = parts(await fill(store))
        for value in values:
            caplog.clear()
            await key.put(bare, value)
            broken = await store.load()
            if not broken.has_lost and not said(caplog):  # bytes that happen to be a message, such as none at all
                assert value in (b"", b"many", b"-1", b"1e30", b"nan", b"\x00", b"\xff\xfe", b"{}" * 1000), (
                    key.name,
                    value,
                )
                await key.put(bare, b"")
                assert parts(await fill_again(store, bare)) == whole, value
                continue
            num_lost += 1
            assert [line for line in said(caplog) if key.name in line], (value, said(caplog))
            assert len(said(caplog)) == 1
            differing = {name for name, shown in parts(broken).items() if shown != whole[name]}
            assert differing <= key.lacks, (key.name, value)
            again = await store.load()
            assert not again.has_lost
            assert len(said(caplog)) == 1
            assert parts(await fill_again(store, bare)) == whole, value
        assert num_lost >= len(values) / 2


async def fill_again(store: RedisStore, bare: Any) -> Remembered:
    """Write everything as a balancer does that knows better."""
    assert 8 < await store.next_epoch(8) < 20
    await bare.set(f"{PREFIX}:epoch", 8)
    token = await store.lead("b", 60.0)
    assert token > 0
    await store.save_members(MEMBERS, ())
    await store.publish(PLACEMENT, MODEL, token)
    await store.save_model(MODEL)
    await store.save_plan(PLANNED, token)
    await store.save_balance(pb.Balance(last_decision="none"), token)
    await store.save_windows([WINDOW, WINDOW], 12, anew=True)
    await store.save_report("router-1", COUNTS)
    await store.save_wanted(3)
    return await store.load()


GARBLED = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda whole, at, value: whole[:at] + bytes([value]) + whole[at + 1 :],
        st.sampled_from([placement(), member(), loads(ONE), model(*SHAPE.layers), packed(pb.Balance(moves=3))]),
        st.integers(0, 40),
        st.integers(0, 255),
    ),
)


@given(st.dictionaries(st.sampled_from([b"placement", b"planned", b"model", b"balance", b"epoch"]), GARBLED), GARBLED)
def test_no_bytes_of_any_record_raise(fields: dict[bytes, bytes], value: bytes) -> None:
    reading = Reading(PREFIX)
    kept = reading.placement(fields), reading.planned(fields)
    for one in kept:
        assert one is None or 0 < one.epoch <= MAX_KEPT_EPOCH
    reading.model(fields)
    reading.balance(fields)
    reading.ids([value])
    reading.member("worker-1", value)
    reading.windows([value, value])
    reading.reports({value: value, b"router-1": value})
    assert 0 <= reading.number("wanted", value, 100) <= 100


TYPES: dict[str, Break] = {
    "zset": lambda bare: bare.zadd(bare.broken, {"x": 1.0}),
    "string": lambda bare: bare.set(bare.broken, "x"),
    "list": lambda bare: bare.lpush(bare.broken, "x"),
    "set": lambda bare: bare.sadd(bare.broken, "x"),
    "hash": lambda bare: bare.hset(bare.broken, "x", "y"),
    "stream": lambda bare: bare.xadd(bare.broken, {"x": "y"}),
}
NAMES = (
    "members",
    "member:worker-1",
    "placement",
    "placements",
    "epoch",
    "wanted",
    "loads",
    "reports",
    "leader",
    "token",
)


@pytest.mark.parametrize("name", NAMES)
async def test_a_key_of_another_type_is_removed_and_everything_can_be_written(name: str, server: RedisServer) -> None:
    async with opened(server) as (store, bare):
        bare.broken = f"{PREFIX}:{name}"
        await fill(store)
        right = (await bare.type(bare.broken)).decode()
        for kind, make in [(kind, make) for kind, make in TYPES.items() if kind != right][:2]:
            # Written before it is read: as where the memory came back with it.
            for reads_first in (False, True):
                await bare.delete(bare.broken)
                await make(bare)
                if reads_first:
                    await store.load()
                if name == "placements":  # which is written at a new placement alone
                    await bare.delete(f"{PREFIX}:placement")
                memory = await fill_again(store, bare)
                assert (await bare.type(bare.broken)).decode() == right, kind
                assert {one.member_id for one in memory.members} == {"worker-1", "router-1"}
                assert (memory.placement.epoch, memory.model, memory.wanted_workers) == (7, MODEL, 3)


@pytest.mark.parametrize("value", WILD)
async def test_a_broken_token_is_made_anew_and_only_grows(value: bytes, server: RedisServer) -> None:
    async with opened(server) as (store, bare):
        before = await store.lead("b", 60.0)
        await bare.set(f"{PREFIX}:token", value)
        token = await store.lead("b", 60.0)
        assert before < token < 2**53
        await store.save_plan(PLANNED, token)
        await store.resign("b")
        assert await store.lead("c", 60.0) > token


@pytest.mark.parametrize("ttl_ms", [None, 10**12])
async def test_a_lead_that_would_be_held_for_ever_is_taken(ttl_ms: int | None, server: RedisServer) -> None:
    async with opened(server) as (store, bare):
        await bare.set(f"{PREFIX}:leader", b"\xff nobody", px=ttl_ms)
        assert await store.lead("b", 60.0) > 0
        assert await store.lead("c", 60.0) == 0


async def test_a_running_balancer_goes_on_whatever_is_broken_and_the_memory_is_whole_again(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(server) as (store, bare), running_balancer(store) as running:
        lease = Membership(running.address, pb.ROLE_WORKER, "w:1", model=SHAPE)
        async with lease as worker, asyncio.timeout(60):
            ready = asyncio.create_task(stay_ready(worker))
            await first_view(worker, lambda view: worker.member_id in view.placement.worker_ids)
            await until(lambda: running.balancer.memory.backlog.is_empty)
            running.planner.wanted_workers = 3
            await store.save_wanted(3)
            broken = [
                lambda bare: bare.set(f"{PREFIX}:wanted", "many"),
                lambda bare: bare.set(f"{PREFIX}:wanted", 2**32 - 1),
                lambda bare: bare.set(f"{PREFIX}:epoch", b"\xff"),
                lambda bare: bare.set(f"{PREFIX}:epoch", 2**64 - 1),
                lambda bare: bare.hset(f"{PREFIX}:placement", "placement", placement(epoch=2**64 - 1)),
                lambda bare: bare.hset(f"{PREFIX}:placement", "model", b"\xff\xff"),
                lambda bare: bare.set(f"{PREFIX}:placement", "x"),
                lambda bare: bare.set(f"{PREFIX}:member:{worker.member_id}", b"\xff"),
                lambda bare: bare.hset(f"{PREFIX}:members", "x", "y"),
                lambda bare: bare.set(f"{PREFIX}:token", "x"),
                lambda bare: bare.set(f"{PREFIX}:leader", "x"),
            ]
            for make in broken:
                async with bare.pipeline() as pipeline:
                    for name in ("placement", "members"):
                        if make in (broken[6], broken[8]):
                            pipeline.delete(f"{PREFIX}:{name}")
                    await pipeline.execute()
                await make(bare)
                running.balancer.shared_s = 0.0
                running.balancer.news.kick.set()
                began_s = time.monotonic()
                while True:
                    memory = await store.load()
                    is_whole = (
                        memory.wanted_workers == 3
                        and memory.model == MODEL
                        and memory.placement == running.planner.in_force
                        and worker.member_id in {one.member_id for one in memory.members}
                        and running.balancer.leadership.is_leader
                    )
                    if is_whole:
                        break
                    assert time.monotonic() - began_s < 20, memory
                    worker._kick.set()  # pyright: ignore[reportPrivateUsage] - a renewal writes a member again
                    await asyncio.sleep(0.01)
            ready.cancel()
        assert running.balancer.num_faults == 0


async def test_a_balancer_starts_on_a_memory_that_is_broken_throughout(server: RedisServer) -> None:
    async with opened(server) as (store, bare):
        await fill(store)
        await bare.delete(f"{PREFIX}:leader")
        await bare.hset(f"{PREFIX}:placement", mapping={"placement": b"\xff", "model": b"\xff", "planned": b"\xff"})
        await bare.set(f"{PREFIX}:wanted", "many")
        await bare.set(f"{PREFIX}:member:worker-1", b"\xff")
        async with (
            running_balancer(store) as running,
            asyncio.timeout(60),
            Membership(running.address, pb.ROLE_WORKER, "w:1", model=SHAPE) as worker,
        ):
            ready = asyncio.create_task(stay_ready(worker))
            seen = await first_view(worker, lambda view: worker.member_id in view.placement.worker_ids)
            assert seen.placement.epoch > 8  # above the epoch that was reserved
            ready.cancel()


async def test_a_remembered_placement_of_another_shape_is_planned_anew(server: RedisServer) -> None:
    async with opened(server) as (store, bare):
        token = await store.lead("a", 60.0)
        await store.save_members([MEMBERS[0]], ())
        await store.next_epoch(6)
        await store.publish(replace(PLACEMENT, homes=HOMES[:1]), MODEL, token)
        await bare.delete(f"{PREFIX}:leader")
        async with running_balancer(store) as running, asyncio.timeout(60):
            member = running.roster.get("worker-1")
            assert member is not None
            running.roster.renew("worker-1", time.monotonic())
            await until(lambda: running.planner.planned is not None)
            assert running.planner.planned is not None
            assert running.planner.planned.has_shape(MODEL.layers)


@pytest.mark.parametrize("digest", ["zzz", SHAPE.digest])
async def test_a_foreign_model_in_redis_does_not_replace_the_one_that_workers_serve(
    server: RedisServer, digest: str
) -> None:
    foreign = pb.ModelShape(digest=digest, layers=[pb.LayerShape(num_experts=1, expert_bytes=1)]).SerializeToString()
    async with opened(server) as (store, bare), asyncio.timeout(60):
        async with (
            running_balancer(store) as running,
            Membership(running.address, pb.ROLE_WORKER, "w:1", model=SHAPE) as worker,
        ):
            await until(lambda: running.planner.planned is not None)
            worker.set_state(pb.MEMBER_STATE_SERVING)
            worker.set_ready_plan(running.planner.newest_epoch)
            await until(lambda: running.planner.in_force.epoch > 0)
            ours = await bare.hget(f"{PREFIX}:placement", "model")
            await bare.hset(f"{PREFIX}:placement", "model", foreign)
            while await bare.hget(f"{PREFIX}:placement", "model") != ours:
                assert running.planner.model == MODEL
                await asyncio.sleep(0.01)
            assert running.planner.planned is None
        await bare.hset(f"{PREFIX}:placement", "model", foreign)
        async with running_balancer(store) as again:  # which asks the workers
            assert again.planner.model is None


async def test_workers_tell_the_model_again_where_the_memory_lost_it(server: RedisServer) -> None:
    async with (
        opened(server) as (store, _),
        running_balancer(store) as running,
        asyncio.timeout(60),
        Membership(running.address, pb.ROLE_WORKER, "w:1", model=SHAPE) as worker,
    ):
        running.planner.model = None
        before = worker.member_id
        worker._kick.set()  # pyright: ignore[reportPrivateUsage]
        await until(lambda: worker.member_id != before)
        assert running.planner.model == MODEL
