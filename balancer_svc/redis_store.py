"""The store in Redis.

Owns the keys and their form, and nothing of the meaning. Commands of Redis 6.2 only. Every key of a member has a TTL,
so that nothing stays for ever; whether a lease has lapsed is the roster's to judge.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis.asyncio as redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from balancer_svc.load_windows import Counts, Window, read_layers, write_layers
from balancer_svc.load_windows import from_message as window_from_message
from balancer_svc.load_windows import to_message as window_to_message
from balancer_svc.messages import from_message, from_shape, to_message, to_shape
from balancer_svc.planner import Model
from balancer_svc.roster import Member
from balancer_svc.store import NO_TOKEN, Memory, StoreError, unless_fenced
from collegium.fabric import lifecycle, logs
from collegium.fabric.errors import FailedPrecondition, Unavailable
from collegium.fabric.views import from_proto, to_proto
from collegium.model.placement import NO_PLACEMENT, Placement
from collegium.v1 import balancer_pb2 as pb

_MEMBER_TTL_S = 600
_CALL_S = 1.0
_HISTORY = 100

# The next epoch: above the remembered one and above every one that somebody has seen.
_NEXT_EPOCH = """
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return epoch
"""
# Take or keep the lead: the lock's holder, or whoever comes when there is none. Answers the fencing token, 0 to others.
_LEAD = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local token = tonumber(redis.call('GET', KEYS[2]) or '0')
if holder and token > 0 then return token end
return redis.call('INCR', KEYS[2])
"""
_RESIGN = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
# Keep what a leader says, unless somebody else has come to lead.
_SAVE_FIELD = """
if tonumber(ARGV[1]) < tonumber(redis.call('GET', KEYS[2]) or '0') then return -1 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
return 0
"""
# Publish unless a newer epoch is in force, whose number is the answer, or somebody else has come to lead: -1.
_PUBLISH = """
if tonumber(ARGV[6]) < tonumber(redis.call('GET', KEYS[3]) or '0') then return -1 end
local current = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0')
if current >= tonumber(ARGV[1]) then return current end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'placement', ARGV[2], 'model', ARGV[3], 'planned', '')
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'epoch', ARGV[1], 'placement', ARGV[2], 'unix_ms', ARGV[5])
return tonumber(ARGV[1])
"""

_log = logs.get("store")


class RedisStore:
    """A Store in Redis."""

    def __init__(self, url: str, cluster: str) -> None:
        # `Any`: redis-py's answers depend on options that its types do not follow.
        self._redis: Any = redis.Redis.from_url(
            url, socket_timeout=_CALL_S, socket_connect_timeout=_CALL_S, decode_responses=False
        )
        self._prefix = f"collegium:{{{cluster}}}"
        self._placements: dict[str, tuple[bytes, Placement]] = {}
        self._next_epoch = self._redis.register_script(_NEXT_EPOCH)
        self._publish = self._redis.register_script(_PUBLISH)
        self._save_field = self._redis.register_script(_SAVE_FIELD)
        self._lead = self._redis.register_script(_LEAD)
        self._resign = self._redis.register_script(_RESIGN)

    async def connect(self, limit_s: float) -> None:
        """Reach Redis, trying in sight; Unavailable when the limit is over, FailedPrecondition where it refuses us."""
        start_s, pause_s, said_s = time.monotonic(), 0.05, time.monotonic()
        while True:
            try:
                await self._redis.ping()
                return
            except (AuthenticationError, ResponseError) as error:
                raise FailedPrecondition(
                    f"Redis refuses this balancer: {error}", field="REDIS_URL", remedy="check user and password"
                ) from error
            except (RedisError, OSError, TimeoutError) as error:
                now_s = time.monotonic()
                if now_s - start_s + pause_s > limit_s:
                    raise Unavailable(
                        f"Redis did not answer within {limit_s:g} s: {error}",
                        field="REDIS_URL",
                        remedy="check the URL and that the server runs; --redis-wait-s says how long to wait",
                    ) from error
                if now_s - said_s > 2.0:
                    said_s = now_s
                    _log.warning("waiting for Redis", why=str(error))
            await lifecycle.sleep_unless_stopping(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    async def load(self, *, with_windows: bool = True) -> Memory:
        """Give all that is remembered; the load windows, which are large, only where they are wanted."""
        with _store_errors():
            ids: list[bytes] = sorted(await self._redis.smembers(f"{self._prefix}:members"))
            values = await self._redis.mget([self._member_key(one.decode()) for one in ids]) if ids else []
            lapsed = [one for one, value in zip(ids, values, strict=True) if value is None]
            if lapsed:
                await self._redis.srem(f"{self._prefix}:members", *lapsed)
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.hgetall(f"{self._prefix}:placement")
                pipeline.get(f"{self._prefix}:epoch")
                pipeline.get(f"{self._prefix}:wanted")
                pipeline.lrange(f"{self._prefix}:loads", 0 if with_windows else 1, -1 if with_windows else 0)
                pipeline.hgetall(f"{self._prefix}:reports")
                fields, epoch, wanted, loads, reports = await pipeline.execute()
        members = tuple(_unpack(value) for value in values if value is not None)
        placement, planned, model = NO_PLACEMENT, None, None
        if b"placement" in fields:
            placement = self._read_placement("placement", fields[b"placement"])
        if b"model" in fields:
            model = from_shape(pb.ModelShape.FromString(fields[b"model"]))
        if fields.get(b"planned"):
            planned = self._read_placement("planned", fields[b"planned"])
        return Memory(
            members=members,
            model=model,
            placement=placement,
            planned=planned,
            newest_epoch=max(int(epoch or 0), placement.epoch),
            wanted_workers=int(wanted or 0),
            balance=pb.Balance.FromString(fields.get(b"balance", b"")),
            windows=tuple(window_from_message(pb.LoadWindow.FromString(packed)) for packed in reversed(loads)),
            reports={
                router_id.decode(): read_layers(pb.ReportLoadRequest.FromString(packed).layers)
                for router_id, packed in reports.items()
            },
        )

    async def save_members(self, members: Iterable[Member], gone: Iterable[str]) -> None:
        """Remember members and forget those that are gone, in one round trip."""
        with _store_errors():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for member in members:
                    pipeline.set(self._member_key(member.member_id), _pack(member), ex=_MEMBER_TTL_S)
                    pipeline.sadd(f"{self._prefix}:members", member.member_id)
                for member_id in gone:
                    pipeline.delete(self._member_key(member_id))
                    pipeline.srem(f"{self._prefix}:members", member_id)
                    pipeline.hdel(f"{self._prefix}:reports", member_id)
                await pipeline.execute()

    async def next_epoch(self, floor: int) -> int:
        """Reserve an epoch above the floor and above all that were reserved."""
        with _store_errors():
            return int(await self._next_epoch(keys=[f"{self._prefix}:epoch"], args=[floor]))

    async def publish(self, placement: Placement, model: Model, token: int = NO_TOKEN) -> int:
        """Remember a placement unless a newer one is remembered; gives the newest epoch. FencedError."""
        with _store_errors():
            packed = to_proto(placement).SerializeToString()
            epoch = int(
                await self._publish(
                    keys=[f"{self._prefix}:placement", f"{self._prefix}:placements", f"{self._prefix}:token"],
                    args=[
                        placement.epoch,
                        packed,
                        to_shape(model).SerializeToString(),
                        _HISTORY,
                        time.time_ns() // 10**6,
                        token,
                    ],
                )
            )
        return unless_fenced(epoch)

    async def save_plan(self, planned: Placement | None, token: int) -> None:
        """Remember what is planned. FencedError."""
        packed = b"" if planned is None else to_proto(planned).SerializeToString()
        with _store_errors():
            keys = [f"{self._prefix}:placement", f"{self._prefix}:token"]
            answer = int(await self._save_field(keys=keys, args=[token, "planned", packed]))
        unless_fenced(answer)

    async def save_model(self, model: Model) -> None:
        """Remember what the workers serve."""
        with _store_errors():
            await self._redis.hset(f"{self._prefix}:placement", "model", to_shape(model).SerializeToString())

    async def save_windows(self, windows: Sequence[Window], num_kept: int, *, anew: bool) -> None:
        """Remember more windows of load, oldest first, and no more than so many; `anew`: none of those before."""
        key = f"{self._prefix}:loads"
        with _store_errors():
            async with self._redis.pipeline(transaction=True) as pipeline:
                if anew:
                    pipeline.delete(key)
                for window in windows:
                    pipeline.lpush(key, window_to_message(window).SerializeToString())
                pipeline.ltrim(key, 0, num_kept - 1)
                await pipeline.execute()

    async def save_balance(self, balance: pb.Balance, token: int) -> None:
        """Remember the account of the balancer that leads. FencedError."""
        with _store_errors():
            keys = [f"{self._prefix}:placement", f"{self._prefix}:token"]
            answer = int(await self._save_field(keys=keys, args=[token, "balance", balance.SerializeToString()]))
        unless_fenced(answer)

    async def save_report(self, router_id: str, counts: Counts) -> None:
        """Pass a router's counts on to the balancer that leads."""
        message = pb.ReportLoadRequest(member_id=router_id, layers=write_layers(counts))
        with _store_errors():
            await self._redis.hset(f"{self._prefix}:reports", router_id, message.SerializeToString())

    async def save_wanted(self, num_workers: int) -> None:
        """Remember how many workers there should be."""
        with _store_errors():
            await self._redis.set(f"{self._prefix}:wanted", num_workers)

    async def lead(self, balancer_id: str, ttl_s: float) -> int:
        """Take the lead or keep it; gives the fencing token, or NO_TOKEN where another balancer leads."""
        keys = [f"{self._prefix}:leader", f"{self._prefix}:token"]
        with _store_errors():
            return int(await self._lead(keys=keys, args=[balancer_id, round(ttl_s * 1e3)]))

    async def resign(self, balancer_id: str) -> None:
        """Give the lead back, where it is ours."""
        with _store_errors():
            await self._resign(keys=[f"{self._prefix}:leader"], args=[balancer_id])

    async def close(self) -> None:
        """Give back connections."""
        await self._redis.aclose()

    def _member_key(self, member_id: str) -> str:
        return f"{self._prefix}:member:{member_id}"

    def _read_placement(self, field_name: str, packed: bytes) -> Placement:
        # They are large and seldom change: what was read the last time is kept.
        known = self._placements.get(field_name)
        if known is None or known[0] != packed:
            known = self._placements[field_name] = (packed, from_proto(pb.Placement.FromString(packed)))
        return known[1]


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreError(str(error)) from error


def _pack(member: Member) -> bytes:
    return to_message(member).SerializeToString()


def _unpack(packed: bytes) -> Member:
    return from_message(pb.Member.FromString(packed))
