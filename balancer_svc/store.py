"""What the balancer remembers, in Redis: members, the placement in force, its history, the newest epoch.

Owns the keys and their form, and nothing of the meaning. Commands of Redis 6.2 only. Every key of a member has a TTL,
so that nothing stays for ever; whether a lease has lapsed is the roster's to judge.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import redis.asyncio as redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from balancer_svc.messages import from_message, from_shape, to_message, to_shape
from balancer_svc.planner import Model
from balancer_svc.roster import Member
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
# Publish unless a newer epoch is in force; answers the epoch that is.
_PUBLISH = """
local current = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0')
if current >= tonumber(ARGV[1]) then return current end
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'placement', ARGV[2], 'model', ARGV[3])
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'epoch', ARGV[1], 'placement', ARGV[2], 'unix_ms', ARGV[5])
return tonumber(ARGV[1])
"""

_log = logs.get("store")


class StoreError(Exception):
    """The memory cannot be reached now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What was remembered."""

    members: tuple[Member, ...] = ()
    model: Model | None = None
    placement: Placement = NO_PLACEMENT
    newest_epoch: int = 0


class Store(Protocol):
    """The balancer's memory. Every call raises StoreError within a second or two where it cannot be reached."""

    async def load(self) -> Memory:
        """Give all that is remembered."""
        ...

    async def save_members(self, members: Iterable[Member], gone: Iterable[str]) -> None:
        """Remember members and forget those that are gone."""
        ...

    async def next_epoch(self, floor: int) -> int:
        """Reserve an epoch above the floor and above all that were reserved."""
        ...

    async def publish(self, placement: Placement, model: Model) -> int:
        """Remember a placement unless a newer one is remembered; gives the newest epoch."""
        ...

    async def close(self) -> None:
        """Give back connections."""
        ...


class RedisStore:
    """A Store in Redis."""

    def __init__(self, url: str, cluster: str) -> None:
        # `Any`: redis-py's answers depend on options that its types do not follow.
        self._redis: Any = redis.Redis.from_url(
            url, socket_timeout=_CALL_S, socket_connect_timeout=_CALL_S, decode_responses=False
        )
        self._prefix = f"collegium:{{{cluster}}}"
        self._next_epoch = self._redis.register_script(_NEXT_EPOCH)
        self._publish = self._redis.register_script(_PUBLISH)

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
                        f"Redis did not answer within {limit_s:.0f} s: {error}",
                        field="REDIS_URL",
                        remedy="check the URL and that the server runs",
                    ) from error
                if now_s - said_s > 2.0:
                    said_s = now_s
                    _log.warning("waiting for Redis", why=str(error))
            await lifecycle.sleep_unless_stopping(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    async def load(self) -> Memory:
        """Give all that is remembered."""
        with _store_errors():
            keys = [key async for key in self._redis.scan_iter(match=f"{self._prefix}:member:*", count=200)]
            values = await self._redis.mget(sorted(keys)) if keys else []
            fields: dict[bytes, bytes] = await self._redis.hgetall(f"{self._prefix}:placement")
            epoch = int(await self._redis.get(f"{self._prefix}:epoch") or 0)
        members = tuple(_unpack(value) for value in values if value is not None)
        if not fields:
            return Memory(members=members, newest_epoch=epoch)
        placement = from_proto(pb.Placement.FromString(fields[b"placement"]))
        model = from_shape(pb.ModelShape.FromString(fields[b"model"]))
        return Memory(members=members, model=model, placement=placement, newest_epoch=max(epoch, placement.epoch))

    async def save_members(self, members: Iterable[Member], gone: Iterable[str]) -> None:
        """Remember members and forget those that are gone, in one round trip."""
        with _store_errors():
            async with self._redis.pipeline(transaction=False) as pipeline:
                for member in members:
                    key = f"{self._prefix}:member:{member.member_id}"
                    pipeline.set(key, _pack(member), ex=_MEMBER_TTL_S)
                for member_id in gone:
                    pipeline.delete(f"{self._prefix}:member:{member_id}")
                await pipeline.execute()

    async def next_epoch(self, floor: int) -> int:
        """Reserve an epoch above the floor and above all that were reserved."""
        with _store_errors():
            return int(await self._next_epoch(keys=[f"{self._prefix}:epoch"], args=[floor]))

    async def publish(self, placement: Placement, model: Model) -> int:
        """Remember a placement unless a newer one is remembered; gives the newest epoch."""
        with _store_errors():
            packed = to_proto(placement).SerializeToString()
            return int(
                await self._publish(
                    keys=[f"{self._prefix}:placement", f"{self._prefix}:placements"],
                    args=[
                        placement.epoch,
                        packed,
                        to_shape(model).SerializeToString(),
                        _HISTORY,
                        time.time_ns() // 10**6,
                    ],
                )
            )

    async def close(self) -> None:
        """Give back connections."""
        await self._redis.aclose()


@dataclass(slots=True, kw_only=True)
class MemoryStore:
    """A Store in memory, for tests; can be told to fail."""

    members: dict[str, bytes] = field(default_factory=dict[str, bytes])
    placement: Placement = NO_PLACEMENT
    model: Model | None = None
    epoch: int = 0
    is_away: bool = False

    async def load(self) -> Memory:
        """Give all that is remembered."""
        self._reach()
        members = tuple(_unpack(value) for _, value in sorted(self.members.items()))
        newest = max(self.epoch, self.placement.epoch)
        return Memory(members=members, model=self.model, placement=self.placement, newest_epoch=newest)

    async def save_members(self, members: Iterable[Member], gone: Iterable[str]) -> None:
        """Remember members and forget those that are gone."""
        self._reach()
        self.members |= {member.member_id: _pack(member) for member in members}
        for member_id in gone:
            self.members.pop(member_id, None)

    async def next_epoch(self, floor: int) -> int:
        """Reserve an epoch above the floor and above all that were reserved."""
        self._reach()
        self.epoch = max(self.epoch, floor) + 1
        return self.epoch

    async def publish(self, placement: Placement, model: Model) -> int:
        """Remember a placement unless a newer one is remembered; gives the newest epoch."""
        self._reach()
        if placement.epoch > self.placement.epoch:
            self.placement, self.model = placement, model
        return self.placement.epoch

    async def close(self) -> None:
        """Give nothing back: there is nothing."""

    def _reach(self) -> None:
        if self.is_away:
            raise StoreError("told to be away")


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreError(str(error)) from error


def _pack(member: Member) -> bytes:
    message = to_message(member)
    message.counters.clear()  # news, not memory
    return message.SerializeToString()


def _unpack(packed: bytes) -> Member:
    return from_message(pb.Member.FromString(packed))
