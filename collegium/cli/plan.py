"""`collegium plan`: which worker should be home to which experts, for loads that are given; plans a cluster on paper.

Owns the command's options, the files that it reads, and its output. The planning is in `collegium.balancing`.
"""

from __future__ import annotations

import json as json_format
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from collegium.balancing.fleet import Fleet, Floats, Ints, Plan, count_moves, from_lists, make_fleet, max_over_mean
from collegium.balancing.moves import Terms, rebalance
from collegium.balancing.policies import DEFAULT, POLICIES
from collegium.cli import target as t
from collegium.fabric.errors import InvalidArgument

_LARGEST_LOAD = 1e300  # of all loads together: beyond, they do not add up to a number


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """What is to be planned."""

    history: Floats  # [T, L, E]
    fleet: Fleet
    policy: str
    base: Ints | None  # [L, W, R]
    target: float
    terms: Terms

    @property
    def loads(self) -> Floats:
        return self.history.mean(0)


def plan(
    loads: Annotated[
        Path,
        typer.Option(
            "--loads",
            help="JSON file: a list of layers, each a list of a load per expert; or several of those, one a window.",
            show_default=False,
        ),
    ],
    workers: Annotated[int, typer.Option("--workers", min=1, help="Workers to plan for.", show_default=False)],
    slots: Annotated[
        int,
        typer.Option(
            "--slots", min=1, help="Experts of a layer that all workers together are home to.", show_default=False
        ),
    ],
    policy: Annotated[str, typer.Option("--policy", help=f"One of {', '.join(POLICIES)}.")] = DEFAULT,
    base: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Former plan (JSON, its `placement`): move from there, as little as it goes (replicated)."
        ),
    ] = None,
    target: Annotated[
        float, typer.Option("--target", min=1.0, help="With --from: move until no worker is above this, of the mean.")
    ] = 1.02,
    speeds: Annotated[
        str | None, typer.Option("--speeds", help="Work per time of each worker, a,b,...: any unit.")
    ] = None,
    domains: Annotated[
        str | None,
        typer.Option("--domains", help="Failure domain of each worker, a,b,...: copies go to more than one."),
    ] = None,
    max_moves: Annotated[
        int | None, typer.Option("--max-moves", min=0, help="With --from: experts that may be loaded, over all layers.")
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Plan so many times; the median time is told.")] = 1,
    explain: Annotated[bool, typer.Option("--explain", help="Say why each move, or why none.")] = False,
    json: t.AsJson = False,
) -> None:
    """Plan homes for loads: max/mean per layer, moves, and the placement itself."""
    if policy not in POLICIES:
        raise InvalidArgument(
            f"no policy {policy!r}", reason="POLICY", field="--policy", remedy=f"one of {', '.join(POLICIES)}"
        )
    history = _read_loads(loads)
    num_layers, num_experts = history.shape[1:]
    if slots < num_experts:
        raise InvalidArgument(
            f"{slots} slots for {num_experts} experts",
            reason="TOO_FEW_SLOTS",
            field="--slots",
            remedy=f"give at least {num_experts}: every expert needs a home",
        )
    fleet = _make_fleet(num_layers, workers, slots, speeds, domains)
    if int(np.minimum(fleet.num_slots, num_experts).sum(1).min()) < num_experts:
        raise InvalidArgument("a worker cannot be home to an expert twice", field="--slots", reason="TOO_FEW_SLOTS")
    job = _Job(
        history=history,
        fleet=fleet,
        policy=policy,
        base=None if base is None else _read_base(base, num_layers, workers, num_experts),
        target=target,
        terms=Terms(expert_bytes=np.ones(int(num_layers), np.int64), byte_budget=max_moves),
    )
    taken_ms: list[float] = []
    plans: list[Plan] = []
    for _ in range(repeat):
        began_s = time.perf_counter()
        plans = [_plan(job)]
        taken_ms.append((time.perf_counter() - began_s) * 1e3)
    _tell(job, plans[0], statistics.median(taken_ms), explain=explain, as_json=json)


def _plan(job: _Job) -> Plan:
    if job.base is not None and job.policy == DEFAULT:
        outcome = rebalance(job.base, job.loads, job.fleet, target=job.target, terms=job.terms)
        return Plan(experts=outcome.experts, reasons=tuple(outcome.reasons))
    return Plan(experts=POLICIES[job.policy](job.history, job.fleet))


def _tell(job: _Job, planned: Plan, milliseconds: float, *, explain: bool, as_json: bool) -> None:
    ratios = max_over_mean(planned.experts, job.loads, job.fleet.speeds)
    moves = 0 if job.base is None else count_moves(job.base, planned.experts, job.loads.shape[1])
    reasons = planned.reasons or (_reason_for_none(job, moves),)
    if as_json:
        facts: dict[str, Any] = {
            "policy": job.policy,
            "max_over_mean": ratios.tolist(),
            "milliseconds": milliseconds,
            "moves": moves,
            "placement": planned.to_lists(),
        }
        if explain:
            facts["reasons"] = list(reasons)
        t.print_json(facts)
        return
    table = Table(title=f"{job.policy}: {job.fleet.num_workers} workers")
    for name in ("layer", "max/mean before", "max/mean", "copies of the hottest", "moves"):
        table.add_column(name, justify="right")
    before = None if job.base is None else max_over_mean(job.base, job.loads, job.fleet.speeds)
    for layer, ratio in enumerate(ratios.tolist()):
        hottest = int(job.loads[layer].argmax())
        one = slice(layer, layer + 1)
        table.add_row(
            str(layer),
            "" if before is None else f"{before[layer]:.4f}",
            f"{ratio:.4f}",
            str(int((planned.experts[layer] == hottest).sum())),
            "" if job.base is None else str(count_moves(job.base[one], planned.experts[one], job.loads.shape[1])),
        )
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(table)
    console.print(
        f"worst {ratios.max():.4f}, mean {ratios.mean():.4f}, {moves} moves, planned in {milliseconds:.1f} ms"
    )
    if explain:
        for reason in reasons:
            console.print(reason, markup=False)


def _reason_for_none(job: _Job, moves: int) -> str:
    if job.base is None:
        return f"planned from nothing by {job.policy}: nothing is moved"
    if job.policy == DEFAULT:
        return f"no move: every layer is at {job.target:g} of the mean or below"
    return f"{job.policy} plans from nothing whatever there was: {moves} moves follow"


def _read_loads(path: Path) -> Floats:
    """Read [L][E] or [T][L][E] as [T, L, E]."""
    history = _as_array(_read_json(path, "--loads"))
    if history is None or history.ndim not in (2, 3) or 0 in history.shape:
        raise InvalidArgument(
            f"{path} does not hold [[load per expert] per layer], every layer with as many experts",
            reason="LOADS",
            field="--loads",
        )
    if not np.isfinite(history).all() or (history < 0).any():
        at = np.argwhere(~(np.isfinite(history) & (history >= 0)))[0].tolist()
        raise InvalidArgument(f"{path}: a load is negative or no number at {at}", reason="LOADS", field="--loads")
    if float(history.max()) > _LARGEST_LOAD / history.size:
        raise InvalidArgument(f"{path}: the loads are too large to be added up", reason="LOADS", field="--loads")
    return history if history.ndim == 3 else history[None]


def _read_base(path: Path, num_layers: int, num_workers: int, num_experts: int) -> Ints:
    read: Any = _read_json(path, "--from")
    placement: Any = cast("dict[str, Any]", read).get("placement") if isinstance(read, dict) else read
    try:
        if len(placement) != num_layers:
            raise ValueError(f"it has {len(placement)} layers, the loads {num_layers}")
        rows = [[list(dict.fromkeys(int(e) for e in row)) for row in layer] for layer in placement]
        return from_lists(rows, num_workers, num_experts)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidArgument(
            f"{path}: {error}",
            reason="PLACEMENT",
            field="--from",
            remedy="give what `collegium plan --json` printed for loads of the same shape",
        ) from error


def _make_fleet(num_layers: int, workers: int, slots: int, speeds: str | None, domains: str | None) -> Fleet:
    names = None if domains is None else [name.strip() for name in domains.split(",")]
    if names is not None and len(names) != workers:
        raise InvalidArgument(f"{len(names)} domains for {workers} workers", reason="DOMAINS", field="--domains")
    numbers = None if names is None else [sorted(set(names)).index(name) for name in names]
    try:
        values = None if speeds is None else [float(part) for part in speeds.split(",")]
        if values is not None and not all(math.isfinite(value) for value in values):
            raise ValueError("speeds: numbers above 0 are needed")
        return make_fleet(num_layers, workers, slots, speeds=values, domains=numbers)
    except ValueError as error:
        raise InvalidArgument(str(error), reason="SPEEDS", field="--speeds") from error


def _read_json(path: Path, field: str) -> object:
    try:
        return json_format.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{path} cannot be read: {error}", reason="FILE", field=field) from error


def _as_array(value: object) -> Floats | None:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
