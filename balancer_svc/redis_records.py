"""What the values in Redis mean, and which of them mean nothing: those are lost, one by one.

Owns the reading of every record and the commands that remove what cannot be read. A broken value, of whatever origin,
costs its own record and no other: it is said once by name, removed, and written again by whoever knows better. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import DecodeError, Message
from redis.exceptions import ResponseError

from balancer_svc import validation
from balancer_svc.load_windows import MAX_IN_WINDOW, Counts, Window, read_layers
from balancer_svc.load_windows import from_message as window_from_message
from balancer_svc.messages import from_message, from_shape
from balancer_svc.model import Model
from balancer_svc.roster import Member
from collegium.fabric import bounds, logs
from collegium.fabric.views import from_proto
from collegium.model.placement import Placement
from collegium.v1 import balancer_pb2 as pb

T = TypeVar("T")
M = TypeVar("M", bound=Message)

# An epoch that is remembered may have been counted up from the highest that a peer may tell, but not by much: below
# 2^53, where Redis ceases to count exactly, there is always room for the next ones.
MAX_KEPT_EPOCH = validation.MAX_COUNTED_EPOCH
MAX_WANTED = 2**32 - 1

# The type of each key, by the name after the cluster's prefix.
KEY_TYPES: Mapping[str, bytes] = {
    "members": b"set",
    "placement": b"hash",
    "placements": b"stream",
    "epoch": b"string",
    "wanted": b"string",
    "loads": b"list",
    "reports": b"hash",
    "leader": b"string",
    "token": b"string",
}

_log = logs.get("store")
Command = tuple[str | bytes | int, ...]


@dataclass(slots=True)
class Reading:
    """One reading of the memory. prefix: of the cluster's keys. removals: Redis commands for what was lost."""

    prefix: str
    removals: list[Command] = field(default_factory=list[Command])

    def lose(self, name: str, why: object, *removals: Command) -> None:
        """Give a record up."""
        _log.warning("a record in Redis cannot be read and is dropped", key=name, why=str(why)[:200])
        self.removals.extend(removals)

    def typed(self, name: str, answer: object, empty: T) -> T:
        """Return what a command answered; a key of another type than the command's is lost whole.

        answer: a value, None, or the error that Redis answered with. Raises any other error.
        """
        if isinstance(answer, ResponseError) and "WRONGTYPE" in str(answer):
            self.lose(name, "it is of another type", ("DEL", f"{self.prefix}:{name}"))
            return empty
        if isinstance(answer, Exception):
            raise answer
        return empty if answer is None else answer  # type: ignore[return-value]

    def ids(self, packed: Iterable[bytes]) -> list[str]:
        """Read the members' ids, in order."""
        found: list[str] = []
        for one in sorted(packed):
            try:
                member_id = one.decode()
                bounds.ID.check("member_id", member_id)
            except ValueError as error:
                self.lose(f"members, {one[:40]!r}", error, ("SREM", f"{self.prefix}:members", one))
            else:
                found.append(member_id)
        return found

    def member(self, member_id: str, packed: bytes) -> Member | None:
        """Read a member."""

        def read() -> Member:
            message = _parse(pb.Member, packed)
            if message.member_id != member_id:
                raise ValueError("it is of another member")
            if not message.role or not message.address:
                raise ValueError("it has no role or no address")
            if max(message.seen_epoch, message.ready_plan) > MAX_KEPT_EPOCH:
                raise ValueError("its epoch is beyond every one that was counted")
            return from_message(message)

        key = f"{self.prefix}:member:{member_id}"
        return self._or_lose(f"member:{member_id}", read, ("DEL", key), ("SREM", f"{self.prefix}:members", member_id))

    def placement(self, fields: Mapping[bytes, bytes]) -> Placement | None:
        """Read the placement in force, whose epoch is kept beside it for Redis to compare."""
        if b"placement" not in fields and b"epoch" not in fields:
            return None

        def read() -> Placement:
            placement = _placement(fields.get(b"placement", b""))
            if fields.get(b"epoch") != b"%d" % placement.epoch:
                raise ValueError(f"its epoch is {placement.epoch}, and {fields.get(b'epoch')!r} beside it")
            return placement

        return self._or_lose("placement", read, ("HDEL", f"{self.prefix}:placement", "placement", "epoch"))

    def planned(self, fields: Mapping[bytes, bytes]) -> Placement | None:
        """Read the plan, if there is one."""
        packed = fields.get(b"planned")
        return self._field("planned", lambda: _placement(packed or b"")) if packed else None

    def model(self, fields: Mapping[bytes, bytes]) -> Model | None:
        """Read what the workers serve."""
        packed = fields.get(b"model")
        if packed is None:
            return None

        def read() -> Model:
            shape = _parse(pb.ModelShape, packed)
            problem = validation.problem_of(shape)
            if problem:
                raise ValueError(problem)
            return from_shape(shape)

        return self._field("model", read)

    def balance(self, fields: Mapping[bytes, bytes]) -> pb.Balance:
        """Read the leader's account; an empty one if there is none."""
        packed = fields.get(b"balance", b"")
        return self._field("balance", lambda: _parse(pb.Balance, packed)) or pb.Balance()

    def number(self, name: str, packed: bytes | None, most: int) -> int:
        """Read a number; 0 if there is none."""
        if packed is None:
            return 0

        def read() -> int:
            if not packed.isdigit() or len(packed) > 20 or int(packed) > most:
                raise ValueError(f"{packed[:40]!r} is no number of at most {most}")
            return int(packed)

        return self._or_lose(name, read, ("DEL", f"{self.prefix}:{name}")) or 0

    def windows(self, packed: Sequence[bytes]) -> tuple[Window, ...]:
        """Read windows of load, which are kept newest first; returns them oldest first."""
        found: list[Window] = []
        for one in reversed(packed):

            def read(one: bytes = one) -> Window:
                window = window_from_message(_parse(pb.LoadWindow, one))
                if max(window.decode.max(), window.prefill.max(), window.activations.max()) > MAX_IN_WINDOW:
                    raise ValueError(f"it counts more than {MAX_IN_WINDOW} choices")
                return window

            window = self._or_lose("loads", read, ("LREM", f"{self.prefix}:loads", 0, one))
            if window is not None:
                found.append(window)
        return tuple(found)

    def reports(self, packed: Mapping[bytes, bytes]) -> dict[str, Counts]:
        """Read the routers' counts."""
        found: dict[str, Counts] = {}
        for name, value in packed.items():

            def read(name: bytes = name, value: bytes = value) -> tuple[str, Counts]:
                router_id = name.decode()
                bounds.ID.check("router_id", router_id)
                return router_id, read_layers(_parse(pb.ReportLoadRequest, value).layers)

            report = self._or_lose(f"reports, {name[:40]!r}", read, ("HDEL", f"{self.prefix}:reports", name))
            if report is not None:
                found[report[0]] = report[1]
        return found

    def _field(self, name: str, read: Callable[[], T]) -> T | None:
        return self._or_lose(f"placement, {name}", read, ("HDEL", f"{self.prefix}:placement", name))

    def _or_lose(self, name: str, read: Callable[[], T], *removals: Command) -> T | None:
        try:
            return read()
        except (ValueError, DecodeError) as error:
            self.lose(name, error, *removals)
            return None


def _parse(kind: type[M], packed: bytes) -> M:
    message = kind.FromString(packed)
    bounds.check(message)
    return message


def _placement(packed: bytes) -> Placement:
    placement = from_proto(pb.Placement.FromString(packed))
    if not 0 < placement.epoch <= MAX_KEPT_EPOCH:
        raise ValueError(f"its epoch is {placement.epoch}")
    return placement
