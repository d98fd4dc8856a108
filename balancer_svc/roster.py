"""Who is in the cluster: members under leases, judged by a clock that is passed in.

Owns the one copy of membership. Pure: no I/O, no tasks, no Redis.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from collegium.v1 import balancer_pb2 as pb


@dataclass(slots=True, kw_only=True)
class Member:
    """One process under a lease. Owned by the roster; expires_s is on the roster's clock.

    is_confirmed: heard of since this balancer started and since its watch last broke. What is not confirmed is neither
    given homes nor taken for dead. is_remote: another balancer hears its renewals, the shared memory tells of them.
    """

    member_id: str
    role: pb.Role
    address: str
    metrics_url: str = ""
    num_threads: int = 0
    capacity_bytes: int = 0
    state: pb.MemberState = pb.MEMBER_STATE_JOINING
    ready_plan: int = 0
    counters: Mapping[str, float] = field(default_factory=dict[str, float])
    failure_domain: str = ""
    seen_epoch: int = 0
    num_renewals: int = 0
    joined_unix_ms: int = 0
    counted_unix_ms: int = 0
    expires_s: float = 0.0
    is_confirmed: bool = True
    is_remote: bool = False

    @property
    def is_leaving(self) -> bool:
        """Whether it is to have no homes: it ends by itself, or is no longer wanted."""
        return self.state in (pb.MEMBER_STATE_DRAINING, pb.MEMBER_STATE_RETIRING)


class Roster:
    """Members by id, in the order in which they joined."""

    def __init__(self, ttl_s: float, *, stall_s: float = math.inf) -> None:
        """Grant leases of ttl_s; a time longer than stall_s in which nothing was asked of us counts for nobody.

        A balancer that was stopped or starved could not hear anybody: that is no reason to lose them.
        """
        self.ttl_s = ttl_s
        self._stall_s = stall_s
        self._now_s = -math.inf
        self._members: dict[str, Member] = {}

    def __len__(self) -> int:
        """Count the members."""
        return len(self._members)

    def members(self, role: pb.Role | None = None) -> list[Member]:
        """List members, of one role where given."""
        return [member for member in list(self._members.values()) if role in (None, member.role)]

    def get(self, member_id: str) -> Member | None:
        """Give a member by its id."""
        return self._members.get(member_id)

    def restore(self, members: Iterable[Member], now_s: float) -> None:
        """Take up remembered members; each has one full lease from now on to be heard of."""
        for member in members:
            member.expires_s = now_s + self.ttl_s
            member.is_confirmed = False
            self._members[member.member_id] = member

    def join(self, member: Member, now_s: float) -> Member | None:
        """Add a member, and give the one that it replaces: an address has room for one process."""
        twin = next(
            (old for old in self._members.values() if old.address == member.address and old.role == member.role), None
        )
        if twin is not None:
            del self._members[twin.member_id]
        member.expires_s = now_s + self.ttl_s
        self._members[member.member_id] = member
        return twin

    def renew(self, member_id: str, now_s: float) -> Member | None:
        """Extend a lease and give its member; None where the lease has lapsed."""
        self._pass_time(now_s)
        member = self._members.get(member_id)
        if member is None or member.expires_s <= now_s:
            return None
        member.expires_s = now_s + self.ttl_s
        member.is_confirmed = True
        member.is_remote = False
        member.num_renewals += 1
        return member

    def merge(self, remembered: Iterable[Member], now_s: float, *, unsaved: Collection[str] = ()) -> bool:
        """Take what other balancers have written of members; gives whether who is there, or how far, has changed.

        A record with more renewals than ours is news, and its lease begins now. Members that are remembered no more are
        gone, but for those that we hear ourselves. unsaved: ids of which we know better than the memory does.
        """
        changed = False
        records = {record.member_id: record for record in remembered}
        for record in records.values():
            if record.member_id in unsaved:
                continue
            mine = self._members.get(record.member_id)
            if mine is None:
                record.expires_s, record.is_remote = now_s + self.ttl_s, True
                record.state = _merged_state(pb.MEMBER_STATE_JOINING, record.state)
                self._members[record.member_id] = record
                changed = True
            elif record.num_renewals > mine.num_renewals:
                news = (_merged_state(mine.state, record.state), record.ready_plan, record.seen_epoch)
                changed |= news != (mine.state, mine.ready_plan, mine.seen_epoch)
                mine.state, mine.ready_plan, mine.seen_epoch = news
                mine.counters, mine.counted_unix_ms = record.counters, record.counted_unix_ms
                mine.num_renewals = record.num_renewals
                mine.expires_s, mine.is_remote, mine.is_confirmed = now_s + self.ttl_s, True, True
        gone = [m for m in self._members.values() if m.is_remote and m.member_id not in {*records, *unsaved}]
        for member in gone:
            del self._members[member.member_id]
            changed = True
        return changed

    def set_retiring(self, ids: Collection[str]) -> list[Member]:
        """Have these workers retire and no others; gives those whose state that changed."""
        changed: list[Member] = []
        for member in self.members(pb.ROLE_WORKER):
            retires, is_said_to = member.state == pb.MEMBER_STATE_RETIRING, member.member_id in ids
            if retires != is_said_to and member.state != pb.MEMBER_STATE_DRAINING:
                member.state = pb.MEMBER_STATE_RETIRING if is_said_to else pb.MEMBER_STATE_SERVING
                changed.append(member)
        return changed

    def hand_over(self, now_s: float) -> None:
        """Leave it to the memory whether members that we hear no more are still there: another balancer judges."""
        for member in self._members.values():
            if member.expires_s <= now_s:
                member.is_remote = True

    def excuse_remote(self, now_s: float) -> None:
        """Note that nothing can be heard of members at other balancers: that is no reason to lose them."""
        for member in self._members.values():
            if member.is_remote:
                member.expires_s = max(member.expires_s, now_s + self.ttl_s)

    def doubt(self, member_id: str, now_s: float) -> None:
        """Note that a member's watch broke: unless heard of again, its lease ends after half its time."""
        member = self._members.get(member_id)
        if member is not None:
            member.is_confirmed = False
            member.expires_s = min(member.expires_s, now_s + self.ttl_s / 2)

    def leave(self, member_id: str) -> Member | None:
        """Remove a member that gives its lease back."""
        return self._members.pop(member_id, None)

    def expire(self, now_s: float) -> list[Member]:
        """Remove and give the members whose leases have lapsed."""
        self._pass_time(now_s)
        lapsed = [member for member in self._members.values() if member.expires_s <= now_s]
        for member in lapsed:
            del self._members[member.member_id]
        return lapsed

    def _pass_time(self, now_s: float) -> None:
        gap_s, self._now_s = now_s - self._now_s, now_s
        if self._stall_s < gap_s < math.inf:
            for member in self._members.values():
                member.expires_s += gap_s


def _merged_state(mine: pb.MemberState, recorded: pb.MemberState) -> pb.MemberState:
    """Take a state from a record: whether a worker retires is not the record's to say, but the leader's."""
    serving = pb.MEMBER_STATE_SERVING if recorded == pb.MEMBER_STATE_RETIRING else recorded
    return mine if mine == pb.MEMBER_STATE_RETIRING and serving != pb.MEMBER_STATE_DRAINING else serving
