"""The name of a cluster in a Redis that several share: one `collegium up` has it at a time.

Owns the key that says who has it. A second cluster of the same name would find the first one's members, serve through
them, and end with them; it is refused before it starts anything, also if nobody holds the key and members of that name
live.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import redis
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from collegium.cli.remembered import Living, ask_members, read_members
from collegium.fabric.errors import Cancelled, FailedPrecondition, Unavailable

_TTL_S = 10.0  # how long a killed `up` of another machine keeps the name; one of this machine is seen to be gone
_RENEW_S = 2.5
_POLL_S = 0.1
_CALL_S = 2.0
_ENDING_S = 1.0  # within which a member whose `up` was killed says that it serves no more,
_DRAINING_S = 10.0  # and within which it ends, if it has nothing to finish
_KEEP = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
_DROP = """
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
"""


class Claim:
    """A cluster's name, taken on entry and given back on exit; a thread keeps it meanwhile.

    Entering raises FailedPrecondition if another cluster has the name or Redis refuses us, Unavailable if Redis does
    not answer within wait_s, and Cancelled if is_interrupted says so.
    """

    def __init__(
        self,
        url: str,
        cluster: str,
        *,
        say: Callable[[str], None] = lambda _: None,
        is_interrupted: Callable[[], bool] = lambda: False,
        wait_s: float = 30.0,
    ) -> None:
        # `Any`: redis-py's answers depend on options that its types do not follow.
        self._redis: Any = redis.Redis.from_url(url, socket_timeout=_CALL_S, socket_connect_timeout=_CALL_S)
        self._cluster, self._say, self._is_interrupted, self._wait_s = cluster, say, is_interrupted, wait_s
        self._prefix = f"collegium:{{{cluster}}}"
        self._key, self._leader = f"{self._prefix}:up", f"{self._prefix}:leader"
        self._value = json.dumps({**_this_process(), "run": uuid.uuid4().hex}).encode()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)

    def __enter__(self) -> Claim:
        """Take the name."""
        self._reach()
        with self._told_errors():
            self._take()
            self._thread.start()  # the waits that follow may outlast what is taken
            try:
                self._wait_for_leader()
                self._wait_for_members()
            except BaseException:
                self._give_back()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the name back, if Redis can be told."""
        self._give_back()

    def _give_back(self) -> None:
        self._stopping.set()
        self._thread.join(2 * _CALL_S)
        with contextlib.suppress(RedisError, OSError):
            self._drop(self._value)
        self._redis.close()

    def _reach(self) -> None:
        deadline_s, is_told = time.monotonic() + self._wait_s, False
        while True:
            try:
                self._redis.ping()
                return
            except (AuthenticationError, ResponseError) as error:
                raise FailedPrecondition(
                    f"Redis refuses: {error}", field="REDIS_URL", remedy="check user and password"
                ) from error
            except (RedisError, OSError) as error:
                if time.monotonic() > deadline_s:
                    raise Unavailable(
                        f"Redis did not answer within {self._wait_s:g} s: {error}",
                        field="REDIS_URL",
                        remedy="check the URL and that the server runs",
                    ) from error
                if not is_told:
                    is_told = True
                    self._say(f"waiting for Redis: {error}")
            self._pause()

    def _take(self) -> None:
        while not self._redis.set(self._key, self._value, nx=True, px=round(_TTL_S * 1e3)):
            held = cast("bytes | None", self._redis.get(self._key))
            if held is None:
                continue  # it lapsed just now
            holder = _read(held)
            is_foreign = not holder and self._redis.pttl(self._key) == -1  # ours always lapse
            if not is_foreign and not _is_gone(holder):
                who = f"`collegium up`, process {holder.get('pid', '?')} on {holder.get('host', '?')}"
                raise self._taken(f"{who}; if that was killed, the name is free after {_TTL_S:g} s")
            self._drop(held)

    def _wait_for_leader(self) -> None:
        """Tell balancers that live from the trace of one that was killed: that one's lead is not renewed."""
        left_ms = int(self._redis.pttl(self._leader))
        is_told = False
        while left_ms != -2:  # Redis's word for a key that is not there
            if not is_told and left_ms > 500:
                is_told = True
                self._say("waiting to see whether a balancer still leads under this name")
            self._pause()
            now_ms = int(self._redis.pttl(self._leader))
            if now_ms > left_ms or now_ms == -1:
                raise self._taken("a balancer that `collegium up` here did not start")
            left_ms = now_ms

    def _wait_for_members(self) -> None:
        """Tell a cluster whose balancer is silent from the traces of one that has ended or is about to."""
        members = read_members(self._redis, self._prefix)
        began_s, is_told = time.monotonic(), False
        while members and (living := ask_members(members)):
            waited_s = time.monotonic() - began_s
            if waited_s > (_ENDING_S if living[0].is_serving else _DRAINING_S):
                raise self._taken(_told(living))
            if not is_told and waited_s > _ENDING_S:
                is_told = True
                self._say(f"waiting to see whether members of the cluster {self._cluster!r} end: {_told(living)}")
            self._pause()

    def _taken(self, by: str) -> FailedPrecondition:
        return FailedPrecondition(
            f"the cluster name {self._cluster!r} is taken in this Redis by {by}",
            reason="CLUSTER_NAME_TAKEN",
            field="REDIS_URL",
            remedy="end that one, or give this cluster a name of its own with --cluster NAME, or another database in "
            "REDIS_URL",
        )

    def _keep(self) -> None:
        keep, is_told = self._redis.register_script(_KEEP), False
        while not self._stopping.wait(_RENEW_S):
            with contextlib.suppress(RedisError, OSError):  # the cluster goes on without Redis, and so do we
                is_ours = keep(keys=[self._key], args=[self._value, round(_TTL_S * 1e3)])
                if not is_ours and not is_told:
                    is_told = True
                    self._say(
                        f"another `collegium up` took the cluster name {self._cluster!r} in REDIS_URL while this one "
                        "stood still: end one of them"
                    )

    def _drop(self, value: bytes) -> None:
        self._redis.register_script(_DROP)(keys=[self._key], args=[value])

    def _pause(self) -> None:
        if self._is_interrupted():
            raise Cancelled("asked to stop")
        time.sleep(_POLL_S)

    @contextlib.contextmanager
    def _told_errors(self) -> Generator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise Unavailable(f"Redis went away at the start: {error}", field="REDIS_URL") from error


def _told(living: Sequence[Living]) -> str:
    first, others = living[0], len(living) - 1
    return f"{first.role} {first.member_id}, which answers at {first.address}" + (
        f", and {others} more of its members" if others else ""
    )


def _this_process() -> dict[str, object]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _started(pid)}


def _machine() -> str:
    """Name this boot of this machine and the process ids that are seen here; empty where that cannot be told."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(pid: int) -> str:
    """Return when a process began, in ticks since the boot; empty where it is gone."""
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    return ""


def _is_gone(holder: dict[str, object]) -> bool:
    machine, pid = holder.get("machine"), holder.get("pid")
    if not machine or machine != _machine() or not isinstance(pid, int):
        return False  # of another machine: its lease says when it is gone
    return _started(pid) != holder.get("started")


def _read(held: bytes) -> dict[str, object]:
    with contextlib.suppress(ValueError):
        value: object = json.loads(held)
        if isinstance(value, dict):
            return cast("dict[str, object]", value)
    return {}
