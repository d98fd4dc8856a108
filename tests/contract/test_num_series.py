"""How many series a cluster has for whoever scrapes it: few, whatever the number of layers, experts and workers.

The balancer is a real one, in which workers of a large model have joined and told everything that workers count. The
pages of gateways and routers know neither; theirs show every name that they have, with every label that a busy and
failing cluster gives them.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from collegium.fabric import rpc
from collegium.fabric.metrics import METRICS, MetricsRegistry, page, series
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc
from tests.balancers import running_balancer
from tests.memory_store import MemoryStore

NUM_LAYERS, NUM_WORKERS, NUM_EXPERTS = 61, 64, 16
LIMIT = 500
# What labels are given, of those that a service does not know from the start.
VALUES = {
    "finished_reason": ("stop", "length", "cancelled", "score"),
    "code": (
        *("CANCELLED", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED"),
        *("RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL"),
    ),
    "kind": ("decode", "prefill", "mixed"),
    "direction": ("out", "back"),
    "tier": ("host", "disk"),
    "way": ("native", "python"),
    "role": ("gateway", "router", "worker"),
    "phase": ("decode", "prefill"),
    "reason": (
        *("INVALID_SUBMISSION", "INVALID_FRAME", "SUBMISSION_FAILED", "DUPLICATE_REQUEST_ID"),
        *("QUEUE_FULL", "TOO_MANY_GATEWAYS", "TOO_MANY_TRACES"),
    ),
    "statistic": ("min", "p50", "mean", "max"),
}
# Of the gateways' gen_ai histograms: what is asked for, and by whose fault it fails.
OPERATIONS = tuple(itertools.product(("text_completion", "chat"), ("", "caller", "server")))


# What a balancer shows last: by then it shows all that it can.
LAST = {
    series("collegium_workers_busy_ratio", statistic="max"),
    series("collegium_workers_expert_hits_total"),
    series("collegium_expert_balancedness", phase="decode", statistic="mean"),
}


def counted(role: str) -> dict[str, float]:
    """Everything that a service of a role counts, by series."""
    return {
        series(metric.name, **dict(zip(metric.labels, values, strict=True))): 1.0
        for metric in METRICS.values()
        if metric.role == role and metric.kind != "histogram"
        for values in itertools.product(*(VALUES[label] for label in metric.labels))
    }


def busy(role: str) -> MetricsRegistry:
    """The registry of a service that has done everything that it can."""
    registry = MetricsRegistry()
    registry.expose(lambda: counted(role) | ({} if role == "balancer" else counted("member")))
    for metric in METRICS.values():
        if metric.kind != "histogram" or metric.role not in (role, "process"):
            continue
        if not metric.labels:
            registry.histogram(metric.name).observe(0.1)
            continue
        for operation, error in OPERATIONS:
            labels: dict[str, Any] = {"gen_ai_operation_name": operation, "gen_ai_provider_name": "collegium"}
            labels |= {"gen_ai_request_model": "moe"} | ({"error_type": error} if "error_type" in metric.labels else {})
            registry.histogram(metric.name).labels(**labels).observe(0.1)
    return registry


def num_series(shown: CollectorRegistry) -> int:
    return sum(not line.startswith(b"#") for line in generate_latest(shown).splitlines())


async def page_of_balancer(num_layers: int, num_workers: int) -> CollectorRegistry:
    """The page of a balancer that leads a cluster, once workers were heard of twice and a window was closed."""
    shape = pb.ModelShape(digest="m", layers=[pb.LayerShape(num_experts=NUM_EXPERTS, expert_bytes=100)] * num_layers)
    load = pb.LayerLoad(
        decode_tokens=range(1, NUM_EXPERTS + 1), prefill_tokens=[1] * NUM_EXPERTS, activations=[1] * NUM_EXPERTS
    )
    async with (
        running_balancer(MemoryStore(), expected_workers=num_workers) as running,
        rpc.channel(running.address) as channel,
    ):
        stub: Any = balancer_pb2_grpc.BalancerStub(channel)

        async def join(role: pb.Role, number: int, **more: Any) -> str:
            answer = await stub.Join(pb.JoinRequest(role=role, address=f"h{number}:{role}", **more))
            return str(answer.member_id)

        workers = [await join(pb.ROLE_WORKER, number, model=shape) for number in range(num_workers)]
        router = await join(pb.ROLE_ROUTER, 0)
        deadline_s, calls = time.monotonic() + 60, 0
        while not running.balancer.counters().keys() >= LAST:
            assert time.monotonic() < deadline_s, LAST - running.balancer.counters().keys()
            calls += 1
            for worker in workers:
                counters = {key: float(calls) for key in counted("worker")}
                plan = running.planner.planned.epoch if running.planner.planned else 0
                state = pb.MEMBER_STATE_SERVING
                await stub.Renew(pb.RenewRequest(member_id=worker, counters=counters, ready_plan=plan, state=state))
            load_now = pb.LayerLoad(
                decode_tokens=[calls * count for count in load.decode_tokens],
                prefill_tokens=[calls] * NUM_EXPERTS,
                activations=[calls] * NUM_EXPERTS,
            )
            await stub.ReportLoad(pb.ReportLoadRequest(member_id=router, layers=[load_now] * num_layers))
        registry = MetricsRegistry()
        registry.expose(running.balancer.counters)
        registry.histogram("collegium_event_loop_lag_seconds").observe(0.1)
        return page(registry)


async def test_a_cluster_of_61_layers_and_64_workers_has_fewer_than_500_series_and_no_more_than_a_small_one() -> None:
    balancer = num_series(await page_of_balancer(NUM_LAYERS, NUM_WORKERS))
    gateway, router = num_series(page(busy("gateway"))), num_series(page(busy("router")))
    assert balancer + gateway + router < LIMIT, (gateway, router, balancer)
    assert balancer == num_series(await page_of_balancer(2, 2))


def test_no_page_has_as_many_by_itself() -> None:
    for role in ("gateway", "router", "worker", "balancer"):
        for prefix in ("collegium", "vllm"):
            assert num_series(page(busy(role), prefix)) < LIMIT, role
