"""`collegium status`: the services behind a gateway, their threads, and the placement in force."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from collegium.cli import target as t
from collegium.client import Balance, Cluster, Model

_CALL_S = 10.0


def status(
    target: t.Target = t.DEFAULT_TARGET,
    timeout_s: t.TimeoutS = _CALL_S,
    api_key: t.ApiKey = None,
    tls: t.Tls = False,
    tls_ca: t.TlsCa = None,
    json: t.AsJson = False,
) -> None:
    """Show services, workers, threads and the placement epoch."""
    with t.open_client(target, api_key, tls, tls_ca, timeout_s) as client:
        cluster = client.get_cluster()
        models = client.list_models() if any(_can_answer(cluster)) else ()
    if json:
        t.print_json(_as_json(cluster, models))
    else:
        _show(cluster, models)


def _can_answer(cluster: Cluster) -> list[bool]:
    return [member.role == "router" and member.state == "SERVING" for member in cluster.members]


def _as_json(cluster: Cluster, models: tuple[Model, ...]) -> t.Json:
    return {
        "members": [{**asdict(member), "counters": dict(member.counters)} for member in cluster.members],
        "placement_epoch": cluster.placement_epoch,
        "experts_per_worker": dict(cluster.experts_per_worker),
        "balance": asdict(cluster.balance),
        "wanted_workers": cluster.wanted_workers,
        "stale_ms": cluster.stale_ms,
        "models": [{**asdict(model), "eos_ids": list(model.eos_ids)} for model in models],
    }


def _show(cluster: Cluster, models: tuple[Model, ...]) -> None:
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    for model in models:
        console.print(
            f"{model.name} ({model.architecture}, {model.dtype}): {model.num_moe_layers} MoE layers of "
            f"{model.num_experts} experts, top {model.top_k}; up to {model.max_model_len} tokens"
        )
    table = Table()
    for column in ("service", "id", "address", "state"):
        table.add_column(column)
    for column in ("threads", "homes", "in slots", "expert memory", "hit rate"):
        table.add_column(column, justify="right")
    for member in cluster.members:
        experts = cluster.experts_per_worker.get(member.member_id)
        table.add_row(
            member.role,
            member.member_id,
            member.address,
            member.state,
            str(member.num_threads or ""),
            "" if experts is None else str(experts),
            *_buffer(member.counters),
        )
    console.print(table)
    wanted = f", {cluster.wanted_workers} workers wanted" if cluster.wanted_workers else ""
    console.print(f"placement epoch {cluster.placement_epoch}{wanted}")
    if cluster.stale_ms:
        console.print(f"the balancer has not answered for {cluster.stale_ms / 1e3:.1f} s; this is what it said before")
    for line in _balance_lines(cluster.balance):
        console.print(line, markup=False)


def _balance_lines(balance: Balance) -> list[str]:
    """Say how even the load is, what was moved, and why nothing is."""
    lines: list[str] = []
    if not balance.has_memory and balance.last_decision:
        lines.append("the balancer does not reach Redis; it goes on from memory")
    phases = [
        f"{name} {even.min:.2f} / {even.p50:.2f} / {even.mean:.2f}"
        for name, even in (("decode", balance.decode), ("prefill", balance.prefill))
        if even.mean
    ]
    if phases:
        lines.append(f"balancedness over layers, least / median / mean: {', '.join(phases)}")
    if balance.moves:
        lines.append(
            f"{balance.moves} experts moved, {balance.moved_bytes / 2**20:.1f} MiB, the last "
            f"{balance.since_plan_ms / 1e3:.0f} s ago"
        )
    if balance.last_decision:
        lines.append(f"last look at the load: {balance.last_decision}")
    return lines


def _buffer(counters: Mapping[str, float]) -> tuple[str, str, str]:
    """Say what a worker's expert buffer holds and may hold, and how often an expert was there; nothing of others."""
    if "collegium_resident_experts" not in counters:
        return "", "", ""
    budget = counters.get("collegium_expert_memory_bytes", 0.0)
    requests = counters.get("collegium_expert_requests_total", 0.0)
    hits = counters.get("collegium_expert_hits_total", 0.0)
    return (
        f"{counters['collegium_resident_experts']:.0f}",
        f"{budget / 2**20:.1f} MiB" if budget else "no limit",
        f"{100 * hits / requests:.1f} %" if requests else "-",
    )
