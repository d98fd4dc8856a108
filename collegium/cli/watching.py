"""A cluster watched over time: from one answer of GetCluster to the next, what is, how fast, and what happened.

Owns the meters, the log of events and the course of tokens/s. Pure: told the time, no I/O.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from collegium.cli.rates import Meter, Reading
from collegium.cli.rows import (
    Gateway,
    Link,
    Router,
    Service,
    Totals,
    Worker,
    gateway_of,
    links_of,
    router_of,
    service_of,
    totals_of,
    worker_of,
)
from collegium.client import Balance, Cluster, Member, Model

_NUM_EVENTS = 200
_NUM_COURSE = 120  # intervals of tokens/s that are kept
_SILENCE_S = 2.0  # beyond an interval, until a call that has not ended is told
_NO_METER = Meter(Reading(heard_s=0.0, counters={}), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. unix_s: when it was seen."""

    unix_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A cluster at one time. Events are oldest first, members and links by id, tokens_out_course oldest first."""

    unix_s: float
    models: tuple[Model, ...]
    placement_epoch: int
    wanted_workers: int
    stale_s: float  # how long the balancer has not answered; 0: it did
    balance: Balance
    totals: Totals
    services: tuple[Service, ...]
    gateways: tuple[Gateway, ...]
    routers: tuple[Router, ...]
    workers: tuple[Worker, ...]
    links: tuple[Link, ...]
    events: tuple[Event, ...]
    new_events: tuple[Event, ...]  # since the frame before
    tokens_out_course: tuple[float, ...]
    is_settled: bool  # every process that counts has been heard twice


class Watch:
    """Takes answers as they come and makes a frame of each. One thread owns it."""

    def __init__(self) -> None:
        self._meters: dict[str, Meter] = {}
        self._members: dict[str, Member] = {}
        self._before: Cluster | None = None
        self._placed: Cluster | None = None  # the newest answer that came from the balancer itself
        self._events: deque[Event] = deque(maxlen=_NUM_EVENTS)
        self._new_events: list[Event] = []
        self._course: deque[float] = deque(maxlen=_NUM_COURSE)
        self._models: tuple[Model, ...] = ()
        self._answered_s: float | None = None
        self._lost_s: float | None = None  # when the gateway was first seen not to answer
        self._why = ""

    def take(self, cluster: Cluster, models: Sequence[Model], *, now_s: float, unix_s: float) -> Frame:
        """Take an answer. now_s: of a clock that never jumps, any origin; unix_s: the time of day."""
        self._models = tuple(models) or self._models
        if self._lost_s is not None:
            self._say(unix_s, f"the gateway answers again after {now_s - self._lost_s:.0f} s")
        self._answered_s, self._lost_s = now_s, None
        self._compare(cluster, unix_s)
        for member_id in self._read(cluster, now_s):
            self._say(unix_s, f"{member_id} started anew")
        self._before = cluster
        return self._frame(cluster, unix_s)

    def miss(self, why: str, *, now_s: float, unix_s: float) -> None:
        """Note that a call failed. why: in words."""
        self._why = why
        if self._lost_s is None:
            self._lost_s = now_s if self._answered_s is None else self._answered_s
            self._say(unix_s, f"no answer from the gateway: {why}")

    def silence(self, where: str, interval_s: float, *, now_s: float) -> str:
        """Say in one line that nothing is heard, and for how long; empty where all is well."""
        since_s = 0.0 if self._answered_s is None else now_s - self._answered_s
        if self._lost_s is not None:
            return f"no answer from {where} for {now_s - self._lost_s:.0f} s: {self._why}"
        if since_s > interval_s + _SILENCE_S:
            return f"no answer from {where} for {since_s:.0f} s: still waiting"
        return ""

    def told(self, frame: Frame) -> Frame:
        """Give a frame with what happened since it was made."""
        return replace(frame, events=tuple(self._events), new_events=tuple(self._new_events))

    def _say(self, unix_s: float, text: str) -> None:
        event = Event(unix_s=unix_s, text=text)
        self._events.append(event)
        self._new_events.append(event)

    def _compare(self, cluster: Cluster, unix_s: float) -> None:
        before = self._before
        if before is None:
            num = len(cluster.members)
            self._say(unix_s, f"watching {count(num, 'service')}, placement epoch {cluster.placement_epoch}")
        for text in _balancer_news(before, cluster):
            self._say(unix_s, text)
        members = {member.member_id: member for member in cluster.members}
        if cluster.stale_ms and before is not None:
            members = self._members | members  # what a balancer does not say now, it does not take back
        for text in _member_news(self._members, members) if before is not None else ():
            self._say(unix_s, text)
        self._members = members
        if not cluster.stale_ms:
            for text in _placement_news(self._placed, cluster):
                self._say(unix_s, text)
            self._placed = cluster

    def _read(self, cluster: Cluster, now_s: float) -> list[str]:
        """Read all meters; gives who started anew."""
        anew: list[str] = []
        here = {member.member_id for member in cluster.members}
        if not cluster.stale_ms:
            self._meters = {member_id: meter for member_id, meter in self._meters.items() if member_id in here}
        for member in cluster.members:
            if not member.counters:
                continue
            heard_s = member.counted_unix_ms / 1e3 if member.counted_unix_ms else now_s
            reading = Reading(heard_s=heard_s, counters=member.counters)
            meter = self._meters.get(member.member_id)
            if meter is None:
                self._meters[member.member_id] = Meter(reading, now_s)
            elif meter.take(reading, now_s):
                anew.append(member.member_id)
        return anew

    def _frame(self, cluster: Cluster, unix_s: float) -> Frame:
        services = [service_of(member, unix_s) for member in cluster.members]
        meters: Mapping[str, Meter] = self._meters

        def of(role: str) -> list[tuple[Service, Meter]]:
            return [(one, meters.get(one.member_id, _NO_METER)) for one in services if one.role == role]

        gateways = [gateway_of(service, meter) for service, meter in of("gateway")]
        routers = [router_of(service, meter) for service, meter in of("router")]
        homes = cluster.experts_per_worker
        workers = [worker_of(service, meter, homes.get(service.member_id, 0)) for service, meter in of("worker")]
        links = [link for service, meter in of("router") for link in links_of(service.member_id, meter)]
        totals = totals_of(gateways, routers, workers)
        if totals.tokens_out_per_s is not None:
            self._course.append(totals.tokens_out_per_s)
        new_events, self._new_events = tuple(self._new_events), []
        return Frame(
            unix_s=unix_s,
            models=self._models,
            placement_epoch=cluster.placement_epoch,
            wanted_workers=cluster.wanted_workers,
            stale_s=cluster.stale_ms / 1e3,
            balance=cluster.balance,
            totals=totals,
            services=tuple(services),
            gateways=tuple(gateways),
            routers=tuple(routers),
            workers=tuple(workers),
            links=tuple(links),
            events=tuple(self._events),
            new_events=new_events,
            tokens_out_course=tuple(self._course),
            is_settled=all(meter.has_rates for meter in meters.values()),
        )


def count(number: int, what: str) -> str:
    """Write a number of things."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _balancer_news(before: Cluster | None, after: Cluster) -> list[str]:
    news: list[str] = []
    was_s = 0.0 if before is None else before.stale_ms / 1e3
    if after.stale_ms and not was_s:
        news.append("balancer lost; all goes on as placed")
    if was_s and not after.stale_ms:
        news.append(f"balancer back after {was_s:.0f} s")
    if before is None or after.stale_ms or before.stale_ms:
        return news
    if before.balance.has_memory and not after.balance.has_memory and after.balance.last_decision:
        news.append("the balancer does not reach Redis; it goes on from memory")
    if after.balance.has_memory and not before.balance.has_memory and before.balance.last_decision:
        news.append("the balancer reaches Redis again")
    if after.wanted_workers != before.wanted_workers and after.wanted_workers:
        news.append(f"{count(after.wanted_workers, 'worker')} wanted")
    return news


def _placement_news(before: Cluster | None, after: Cluster) -> list[str]:
    if before is None:
        return []
    text = ""
    if after.placement_epoch != before.placement_epoch:
        text = f"epoch {before.placement_epoch} -> {after.placement_epoch}"
    # A balancer that started anew counts from nothing.
    is_counting_on = after.balance.moves >= before.balance.moves
    moves = after.balance.moves - before.balance.moves if is_counting_on else after.balance.moves
    num_bytes = after.balance.moved_bytes - (before.balance.moved_bytes if is_counting_on else 0)
    if moves:
        text += f"{': ' if text else ''}{count(moves, 'expert')} moved, {max(0, num_bytes) / 2**20:.1f} MiB"
    return [text] if text else []


def _member_news(before: Mapping[str, Member], after: Mapping[str, Member]) -> list[str]:
    news: list[str] = []
    for member_id, member in after.items():
        old = before.get(member_id)
        if old is None:
            news.append(f"{member_id} joined, {member.state}, at {member.address}")
        elif old.state != member.state and member.role != "balancer":  # which is told of by itself
            news.append(f"{member_id} {old.state} -> {member.state}")
    news += [f"{member_id} left" for member_id in before if member_id not in after]
    return news
