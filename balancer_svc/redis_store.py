"""The store in Redis.

Owns the keys and their form, and nothing of the meaning. Commands of Redis 6.2 only. Every key of a member has a TTL,
so that nothing stays for ever; whether a lease has lapsed is the roster's to judge. What Redis holds is input: scripts
take a number that is none for 0, and a key of another type than ours is removed.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import redis.asyncio as redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from balancer_svc.load_windows import Counts, Window, write_layers
from balancer_svc.load_windows import to_message as window_to_message
from balancer_svc.messages import to_message, to_shape
from balancer_svc.model import Model
from balancer_svc.redis_records import KEY_TYPES, MAX_KEPT_EPOCH, MAX_WANTED, Command, Reading
from balancer_svc.roster import Member
from balancer_svc.store import NO_TOKEN, Remembered, StoreError, unless_fenced
from collegium.fabric import lifecycle, logs
from collegium.fabric.errors import FailedPrecondition, Unavailable
from collegium.fabric.views import to_proto
from collegium.model.placement import NO_PLACEMENT, Placement
from collegium.v1 import balancer_pb2 as pb

T = TypeVar("T")

_MEMBER_TTL_S = 600
_CALL_S = 1.0
_HISTORY = 100
_LONGEST_LEAD_MS = 3_600_000  # a lock that is held for longer, or for ever, is none of ours

# Before every script: a number of ours, 0 where there is none or something else. Beyond 2^53 none is exact.
_NUMBER = """
local function number(text)
  if not text or not string.match(text, '^%d+$') then return 0 end
  local value = tonumber(text)
  if value >= 9007199254740992 then return 0 end
  return value
end
"""
# The next epoch: above the remembered one and above every one that somebody has seen.
_NEXT_EPOCH = f"""{_NUMBER}
local kept = number(redis.call('GET', KEYS[1]))
if kept > {MAX_KEPT_EPOCH} then kept = 0 end
local epoch = math.max(kept, tonumber(ARGV[1])) + 1
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return epoch
"""
# Take or keep the lead: the lock's holder, or whoever comes when there is none, or one that would hold it for ever.
# Answers the fencing token, 0 to others. A token that is none is made anew from the time: above all that were counted.
_LEAD = f"""{_NUMBER}
local holder = redis.call('GET', KEYS[1])
local ttl_ms = redis.call('PTTL', KEYS[1])
if holder and holder ~= ARGV[1] and ttl_ms >= 0 and ttl_ms <= {_LONGEST_LEAD_MS} then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local text = redis.call('GET', KEYS[2])
local token = number(text)
if token == 0 and text and text ~= '0' then
  token = tonumber(redis.call('TIME')[1])
  redis.call('SET', KEYS[2], string.format('%.0f', token))
  return token
end
if holder == ARGV[1] and token > 0 then return token end
return redis.call('INCR', KEYS[2])
"""
_RESIGN = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""
# Keep what a leader says, unless somebody else has come to lead.
_SAVE_FIELD = f"""{_NUMBER}
if tonumber(ARGV[1]) < number(redis.call('GET', KEYS[2])) then return -1 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
return 0
"""
# Publish unless a newer epoch is in force, whose number is the answer, or somebody else has come to lead: -1.
_PUBLISH = f"""{_NUMBER}
if tonumber(ARGV[6]) < number(redis.call('GET', KEYS[3])) then return -1 end
local current = number(redis.call('HGET', KEYS[1], 'epoch'))
if current >= tonumber(ARGV[1]) and current <= {MAX_KEPT_EPOCH} then return current end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'epoch', ARGV[1], 'placement', ARGV[2], 'unix_ms', ARGV[5])
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'placement', ARGV[2], 'model', ARGV[3], 'planned', '')
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
        self._placements: dict[str, tuple[tuple[bytes | None, bytes | None], Placement]] = {}
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

    async def load(self, *, with_windows: bool = True) -> Remembered:
        """Give all that is remembered; the load windows, which are large, only where they are wanted."""
        reading = Reading(self._prefix)
        with _store_errors():
            members = await self._load_members(reading)
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.hgetall(f"{self._prefix}:placement")
                pipeline.get(f"{self._prefix}:epoch")
                pipeline.get(f"{self._prefix}:wanted")
                pipeline.lrange(f"{self._prefix}:loads", 0 if with_windows else 1, -1 if with_windows else 0)
                pipeline.hgetall(f"{self._prefix}:reports")
                answers: list[Any] = await pipeline.execute(raise_on_error=False)
            fields = reading.typed("placement", answers[0], dict[bytes, bytes]())
            placement = self._once("placement", fields, reading.placement)
            memory = Remembered(
                members=members,
                model=reading.model(fields),
                placement=placement or NO_PLACEMENT,
                planned=self._once("planned", fields, reading.planned),
                newest_epoch=max(
                    reading.number("epoch", reading.typed("epoch", answers[1], None), MAX_KEPT_EPOCH),
                    placement.epoch if placement is not None else 0,
                ),
                wanted_workers=reading.number("wanted", reading.typed("wanted", answers[2], None), MAX_WANTED),
                balance=reading.balance(fields),
                windows=reading.windows(reading.typed("loads", answers[3], list[bytes]())),
                reports=reading.reports(reading.typed("reports", answers[4], dict[bytes, bytes]())),
                has_lost=bool(reading.removals),
            )
            await self._remove(reading.removals)
        return memory

    async def _load_members(self, reading: Reading) -> tuple[Member, ...]:
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.smembers(f"{self._prefix}:members")
            (answer,) = await pipeline.execute(raise_on_error=False)
        ids = reading.ids(reading.typed("members", answer, set[bytes]()))
        values = await self._redis.mget([self._member_key(one) for one in ids]) if ids else []
        lapsed = [one for one, value in zip(ids, values, strict=True) if value is None]
        if lapsed:  # or of another type, which a member's next record overwrites
            await self._redis.srem(f"{self._prefix}:members", *lapsed)
        found = (reading.member(one, value) for one, value in zip(ids, values, strict=True) if value is not None)
        return tuple(member for member in found if member is not None)

    async def _remove(self, removals: Sequence[Command]) -> None:
        if not removals:
            return
        async with self._redis.pipeline(transaction=False) as pipeline:
            for command in removals:
                pipeline.execute_command(*command)
            await pipeline.execute(raise_on_error=False)

    async def _write(self, write: Callable[[], Awaitable[T]]) -> T:
        """Write; if Redis refuses because a key is of another type than ours, remove that key and write again."""
        with _store_errors():
            try:
                return await write()
            except ResponseError:
                if not await self._remove_foreign():
                    raise
                return await write()

    async def _remove_foreign(self) -> bool:
        names = list(KEY_TYPES)
        async with self._redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.type(f"{self._prefix}:{name}")
            types: list[bytes] = await pipeline.execute()
        reading = Reading(self._prefix)
        for name, found in zip(names, types, strict=True):
            if found not in (b"none", KEY_TYPES[name]):
                reading.lose(name, f"it is a {found.decode()}", ("DEL", f"{self._prefix}:{name}"))
        await self._remove(reading.removals)
        return bool(reading.removals)

    async def save_members(self, members: Iterable[Member], gone: Iterable[str]) -> None:
        """Remember members and forget those that are gone, in one round trip."""
        kept, lost = list(members), list(gone)

        async def write() -> None:
            async with self._redis.pipeline(transaction=False) as pipeline:
                for member in kept:
                    pipeline.set(self._member_key(member.member_id), _pack(member), ex=_MEMBER_TTL_S)
                    pipeline.sadd(f"{self._prefix}:members", member.member_id)
                for member_id in lost:
                    pipeline.delete(self._member_key(member_id))
                    pipeline.srem(f"{self._prefix}:members", member_id)
                    pipeline.hdel(f"{self._prefix}:reports", member_id)
                await pipeline.execute()

        await self._write(write)

    async def next_epoch(self, floor: int) -> int:
        """Reserve an epoch above the floor and above all that were reserved."""
        return int(await self._write(lambda: self._next_epoch(keys=[f"{self._prefix}:epoch"], args=[floor])))

    async def publish(self, placement: Placement, model: Model, token: int = NO_TOKEN) -> int:
        """Remember a placement unless a newer one is remembered; gives the newest epoch. FencedError."""
        keys = [f"{self._prefix}:placement", f"{self._prefix}:placements", f"{self._prefix}:token"]
        packed = to_proto(placement).SerializeToString()
        shape = to_shape(model).SerializeToString()
        args = [placement.epoch, packed, shape, _HISTORY, time.time_ns() // 10**6, token]
        epoch = int(await self._write(lambda: self._publish(keys=keys, args=args)))
        return unless_fenced(epoch)

    async def save_plan(self, planned: Placement | None, token: int) -> None:
        """Remember what is planned. FencedError."""
        await self._save("planned", b"" if planned is None else to_proto(planned).SerializeToString(), token)

    async def save_model(self, model: Model) -> None:
        """Remember what the workers serve."""
        packed = to_shape(model).SerializeToString()
        await self._write(lambda: self._redis.hset(f"{self._prefix}:placement", "model", packed))

    async def save_windows(self, windows: Sequence[Window], num_kept: int, *, anew: bool) -> None:
        """Remember more windows of load, oldest first, and no more than so many; `anew`: none of those before."""
        key = f"{self._prefix}:loads"

        async def write() -> None:
            async with self._redis.pipeline(transaction=True) as pipeline:
                if anew:
                    pipeline.delete(key)
                for window in windows:
                    pipeline.lpush(key, window_to_message(window).SerializeToString())
                pipeline.ltrim(key, 0, num_kept - 1)
                await pipeline.execute()

        await self._write(write)

    async def save_balance(self, balance: pb.Balance, token: int) -> None:
        """Remember the account of the balancer that leads. FencedError."""
        await self._save("balance", balance.SerializeToString(), token)

    async def _save(self, name: str, packed: bytes, token: int) -> None:
        keys = [f"{self._prefix}:placement", f"{self._prefix}:token"]
        unless_fenced(int(await self._write(lambda: self._save_field(keys=keys, args=[token, name, packed]))))

    async def save_report(self, router_id: str, counts: Counts) -> None:
        """Pass a router's counts on to the balancer that leads."""
        message = pb.ReportLoadRequest(member_id=router_id, layers=write_layers(counts))
        packed = message.SerializeToString()
        await self._write(lambda: self._redis.hset(f"{self._prefix}:reports", router_id, packed))

    async def save_wanted(self, num_workers: int) -> None:
        """Remember how many workers there should be."""
        await self._write(lambda: self._redis.set(f"{self._prefix}:wanted", num_workers))

    async def lead(self, balancer_id: str, ttl_s: float) -> int:
        """Take the lead or keep it; gives the fencing token, or NO_TOKEN where another balancer leads."""
        keys = [f"{self._prefix}:leader", f"{self._prefix}:token"]
        return int(await self._write(lambda: self._lead(keys=keys, args=[balancer_id, round(ttl_s * 1e3)])))

    async def resign(self, balancer_id: str) -> None:
        """Give the lead back, where it is ours."""
        await self._write(lambda: self._resign(keys=[f"{self._prefix}:leader"], args=[balancer_id]))

    async def close(self) -> None:
        """Give back connections."""
        await self._redis.aclose()

    def _member_key(self, member_id: str) -> str:
        return f"{self._prefix}:member:{member_id}"

    def _once(
        self, name: str, fields: dict[bytes, bytes], read: Callable[[dict[bytes, bytes]], Placement | None]
    ) -> Placement | None:
        # Placements are large and seldom change: what was read the last time is kept.
        packed = (fields.get(name.encode()), fields.get(b"epoch") if name == "placement" else None)
        known = self._placements.get(name)
        if known is None or known[0] != packed:
            placement = read(fields)
            if placement is None:
                return None
            known = self._placements[name] = (packed, placement)
        return known[1]


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreError(str(error)) from error


def _pack(member: Member) -> bytes:
    return to_message(member).SerializeToString()
