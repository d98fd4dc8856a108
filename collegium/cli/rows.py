"""What `collegium top` says of each member and of all: plain values made from a member and its meter.

Owns which counters make which number. A number that is not known is None. Rates are per second between the last two
hearings of a process, shares are in [0, 1], sizes in bytes. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from collegium.cli import rates as r
from collegium.cli.rates import Meter, add, ratio
from collegium.client import Member
from collegium.fabric.metric_names import series

SERVING = "SERVING"


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A process, whatever it does. age_s: since it took its lease."""

    role: str
    member_id: str
    address: str
    state: str
    age_s: float | None
    num_threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What went over links: out to workers, back to routers."""

    rows_out_per_s: float | None
    rows_back_per_s: float | None
    bytes_out_per_s: float | None
    bytes_back_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Requests that ended, and tokens of accepted prompts and of answers."""

    service: Service
    requests_per_s: float | None
    failures_per_s: float | None
    shed_per_s: float | None
    tokens_in_per_s: float | None
    tokens_out_per_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Sequences and steps. tokens in: of prompts, computed; out: sampled. kv_share: of KV blocks, in use."""

    service: Service
    num_running: float | None
    num_waiting: float | None
    kv_share: float | None
    num_kv_blocks: float | None
    tokens_in_per_s: float | None
    tokens_out_per_s: float | None
    steps_per_s: float | None
    preemptions_per_s: float | None
    retries_per_s: float | None
    traffic: Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """Experts. busy_share: of the time, computing; stall_share: of the time, waiting for loads with rows in hand.

    hit_share: of the experts that were asked for between the last two hearings; hit_share_ever: since the start.
    """

    service: Service
    busy_share: float | None
    stall_share: float | None
    num_queued: float | None
    dispatches_per_s: float | None
    num_requests: float | None  # of experts, between the last two hearings
    num_hits: float | None
    hit_share: float | None
    num_requests_ever: float | None
    num_hits_ever: float | None
    hit_share_ever: float | None
    host_bytes_per_s: float | None
    disk_bytes_per_s: float | None
    num_homes: int
    num_resident: float | None
    memory_bytes: float | None
    traffic: Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What went between one router and one worker."""

    router_id: str
    worker_id: str
    dispatches_per_s: float | None
    traffic: Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """All members together. Tokens are the routers'; where those are not told, the gateways'."""

    tokens_in_per_s: float | None
    tokens_out_per_s: float | None
    steps_per_s: float | None
    requests_per_s: float | None
    failures_per_s: float | None
    shed_per_s: float | None
    num_running: float | None
    num_waiting: float | None
    num_queued: float | None
    kv_share: float | None
    preemptions_per_s: float | None
    retries_per_s: float | None
    busy_share: float | None  # mean over workers
    busiest_share: float | None
    hit_share: float | None
    hit_share_ever: float | None
    host_bytes_per_s: float | None
    disk_bytes_per_s: float | None
    traffic: Traffic  # the routers'


def service_of(member: Member, unix_s: float) -> Service:
    """Read what every process has. unix_s: the time of day."""
    return Service(
        role=member.role,
        member_id=member.member_id,
        address=member.address,
        state=member.state,
        age_s=max(0.0, unix_s - member.joined_unix_ms / 1e3) if member.joined_unix_ms else None,
        num_threads=member.num_threads,
    )


def gateway_of(service: Service, meter: Meter) -> Gateway:
    """Say what a gateway does."""
    return Gateway(
        service=service,
        requests_per_s=_labelled(meter, r.REQUESTS),
        failures_per_s=_labelled(meter, r.FAILURES),
        shed_per_s=meter.rate(r.SHED),
        tokens_in_per_s=meter.rate(r.PROMPT_TOKENS),
        tokens_out_per_s=meter.rate(r.GENERATED_TOKENS),
    )


def router_of(service: Service, meter: Meter) -> Router:
    """Say what a router does."""
    return Router(
        service=service,
        num_running=meter.level(r.RUNNING),
        num_waiting=meter.level(r.WAITING),
        kv_share=meter.level(r.KV_USE),
        num_kv_blocks=meter.level(r.KV_BLOCKS),
        tokens_in_per_s=meter.rate(r.PREFILLED_TOKENS),
        tokens_out_per_s=meter.rate(r.SAMPLED_TOKENS),
        steps_per_s=meter.rate(r.STEPS),
        preemptions_per_s=meter.rate(r.PREEMPTIONS),
        retries_per_s=meter.rate(r.RETRIES),
        traffic=_traffic(meter, r.ROUTER_ROWS, r.ROUTER_BYTES),
    )


def worker_of(service: Service, meter: Meter, num_homes: int) -> Worker:
    """Say what a worker does."""
    requests, hits = meter.gain(r.EXPERT_REQUESTS), meter.gain(r.EXPERT_HITS)
    requests_ever, hits_ever = meter.level(r.EXPERT_REQUESTS), meter.level(r.EXPERT_HITS)
    return Worker(
        service=service,
        busy_share=_at_most_1(meter.rate(r.BUSY_S)),
        stall_share=_at_most_1(meter.rate(r.STALL_S)),
        num_queued=meter.level(r.QUEUED),
        dispatches_per_s=meter.rate(r.DISPATCHES),
        num_requests=requests,
        num_hits=hits,
        hit_share=ratio(hits, requests),
        num_requests_ever=requests_ever,
        num_hits_ever=hits_ever,
        hit_share_ever=ratio(hits_ever, requests_ever),
        host_bytes_per_s=meter.rate(series(r.LOAD_BYTES, tier="host")),
        disk_bytes_per_s=meter.rate(series(r.LOAD_BYTES, tier="disk")),
        num_homes=num_homes,
        num_resident=meter.level(r.RESIDENT),
        memory_bytes=meter.level(r.MEMORY_BYTES),
        traffic=_traffic(meter, r.WORKER_ROWS, r.WORKER_BYTES),
    )


def links_of(router_id: str, meter: Meter) -> list[Link]:
    """Say what went over each of a router's links."""
    return [
        Link(
            router_id=router_id,
            worker_id=worker_id,
            dispatches_per_s=meter.rate(f"{r.LINK_DISPATCHES}/{worker_id}"),
            traffic=Traffic(
                rows_out_per_s=meter.rate(f"{r.LINK_ROWS_OUT}/{worker_id}"),
                rows_back_per_s=meter.rate(f"{r.LINK_ROWS_BACK}/{worker_id}"),
                bytes_out_per_s=meter.rate(f"{r.LINK_BYTES_OUT}/{worker_id}"),
                bytes_back_per_s=meter.rate(f"{r.LINK_BYTES_BACK}/{worker_id}"),
            ),
        )
        for worker_id in meter.peers(r.LINK_ROWS_OUT)
    ]


def totals_of(gateways: Sequence[Gateway], routers: Sequence[Router], workers: Sequence[Worker]) -> Totals:
    """Add all members up."""
    busy = [worker.busy_share for worker in workers if worker.busy_share is not None]
    tokens_in = [row.tokens_in_per_s for row in routers], [row.tokens_in_per_s for row in gateways]
    tokens_out = [row.tokens_out_per_s for row in routers], [row.tokens_out_per_s for row in gateways]
    return Totals(
        tokens_in_per_s=_first(*map(_sum, tokens_in)),
        tokens_out_per_s=_first(*map(_sum, tokens_out)),
        steps_per_s=_sum(router.steps_per_s for router in routers),
        requests_per_s=_sum(gateway.requests_per_s for gateway in gateways),
        failures_per_s=_sum(gateway.failures_per_s for gateway in gateways),
        shed_per_s=_sum(gateway.shed_per_s for gateway in gateways),
        num_running=_sum(router.num_running for router in routers),
        num_waiting=_sum(router.num_waiting for router in routers),
        num_queued=_sum(worker.num_queued for worker in workers),
        kv_share=_kv_share(routers),
        preemptions_per_s=_sum(router.preemptions_per_s for router in routers),
        retries_per_s=_sum(router.retries_per_s for router in routers),
        busy_share=sum(busy) / len(busy) if busy else None,
        busiest_share=max(busy, default=None),
        hit_share=ratio(_sum(row.num_hits for row in workers), _sum(row.num_requests for row in workers)),
        hit_share_ever=ratio(
            _sum(row.num_hits_ever for row in workers), _sum(row.num_requests_ever for row in workers)
        ),
        host_bytes_per_s=_sum(worker.host_bytes_per_s for worker in workers),
        disk_bytes_per_s=_sum(worker.disk_bytes_per_s for worker in workers),
        traffic=Traffic(
            rows_out_per_s=_sum(router.traffic.rows_out_per_s for router in routers),
            rows_back_per_s=_sum(router.traffic.rows_back_per_s for router in routers),
            bytes_out_per_s=_sum(router.traffic.bytes_out_per_s for router in routers),
            bytes_back_per_s=_sum(router.traffic.bytes_back_per_s for router in routers),
        ),
    )


def busiest_routers(routers: Iterable[Router]) -> list[Router]:
    """Put those that do not serve first, then those with the most sequences."""

    def rank(row: Router) -> tuple[bool, float, float, str]:
        sequences = (row.num_running or 0.0) + (row.num_waiting or 0.0)
        return row.service.state == SERVING, -sequences, -(row.tokens_out_per_s or 0.0), row.service.member_id

    return sorted(routers, key=rank)


def busiest_workers(workers: Iterable[Worker]) -> list[Worker]:
    """Put those that do not serve first, then the busiest, of these those with the longest queue."""

    def rank(row: Worker) -> tuple[bool, float, float, str]:
        is_serving = row.service.state == SERVING
        return is_serving, -(row.busy_share or 0.0), -(row.num_queued or 0.0), row.service.member_id

    return sorted(workers, key=rank)


def busiest_links(links: Iterable[Link]) -> list[Link]:
    """Put those with the most bytes first."""

    def rank(row: Link) -> tuple[float, str, str]:
        num_bytes = add(row.traffic.bytes_out_per_s, row.traffic.bytes_back_per_s) or 0.0
        return -num_bytes, row.router_id, row.worker_id

    return sorted(links, key=rank)


def _kv_share(routers: Sequence[Router]) -> float | None:
    """Add routers up by their blocks; a router that does not tell them counts as one block."""
    known = [(row.kv_share, row.num_kv_blocks or 1.0) for row in routers if row.kv_share is not None]
    return ratio(_sum(share * blocks for share, blocks in known), _sum(blocks for _, blocks in known))


def _traffic(meter: Meter, rows: str, num_bytes: str) -> Traffic:
    return Traffic(
        rows_out_per_s=meter.rate(series(rows, direction="out")),
        rows_back_per_s=meter.rate(series(rows, direction="back")),
        bytes_out_per_s=meter.rate(series(num_bytes, direction="out")),
        bytes_back_per_s=meter.rate(series(num_bytes, direction="back")),
    )


def _labelled(meter: Meter, name: str) -> float | None:
    """Give the rate of a family whose series appear when they are first counted."""
    return (meter.rate(name) or 0.0) if meter.has_rates else None


def _at_most_1(share: float | None) -> float | None:
    return None if share is None else min(share, 1.0)


def _sum(values: Iterable[float | None]) -> float | None:
    return add(*values)


def _first(value: float | None, other: float | None) -> float | None:
    return other if value is None else value
