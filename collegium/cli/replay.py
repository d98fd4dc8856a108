"""`collegium replay`: what each eviction policy would make of a recorded trace, at several sizes of the buffer.

Owns the command's options and its output. The rules of a replay are in `collegium.buffering`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from collegium.buffering.belady import Min
from collegium.buffering.policies import POLICIES, Policy, make_policy
from collegium.buffering.replay import (
    Capacity,
    PrefillRule,
    Result,
    Scope,
    capacity_of_bytes,
    capacity_of_percent,
)
from collegium.buffering.replay import (
    replay as play,
)
from collegium.buffering.traces import Trace, TraceError, TraceHeader, read_trace
from collegium.buffering.visits import PREFILL_TOKENS, Visit, moe_layers, read_visits, side_by_side
from collegium.cli import target as t
from collegium.fabric.errors import InvalidArgument

_ALL = (*POLICIES, "min")
_PERCENTS = "6.25,12.5,25,50"
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Size:
    """One size of the buffer, as it was asked for."""

    percent: float | None
    mib: float | None
    capacity: Capacity

    @property
    def text(self) -> str:
        return f"{self.percent:g} %" if self.percent is not None else f"{self.mib:g} MiB"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """A policy at one size."""

    policy: str
    size: _Size
    result: Result
    min_hits: int  # of MIN in decode

    @property
    def min_ratio(self) -> float | None:
        return self.result.decode_hits / self.min_hits if self.min_hits else None


def replay(
    trace: Annotated[Path, typer.Argument(help="CSV file that `collegium trace` wrote.", show_default=False)],
    policies: Annotated[
        str, typer.Option("--policies", help=f"Any of {', '.join(_ALL)}; min is Belady's, which knows the future.")
    ] = "lru,lfu,ewma,lifo,fifo,min",
    slots_percent: Annotated[
        str | None,
        typer.Option(
            "--slots-percent",
            help="Sizes of the buffer in percent of each layer's experts (scope layer: rounded down, one slot at least)"
            f" or of all experts. Default: {_PERCENTS}.",
            show_default=False,
        ),
    ] = None,
    budget_mib: Annotated[
        str | None, typer.Option("--budget-mib", help="Sizes of the buffer in MiB, instead.", show_default=False)
    ] = None,
    scope: Annotated[
        Scope,
        typer.Option("--scope", help="Whether layers have even shares, one pool, or a pool with soft quotas by gain."),
    ] = Scope.LAYER,
    batch: Annotated[
        int,
        typer.Option("--batch", min=1, help="Cut the decode steps into so many windows that run side by side."),
    ] = 1,
    prefill: Annotated[
        PrefillRule, typer.Option("--prefill", help="Whether misses of prefill evict, or are streamed.")
    ] = PrefillRule.INSERT,
    prefill_tokens: Annotated[
        int, typer.Option("--prefill-tokens", min=0, help="Micro-batches of prefill; 0: as recorded.")
    ] = PREFILL_TOKENS,
    selective: Annotated[
        bool,
        typer.Option("--selective", help="Let ewma and min stream a miss that is worth less than what it would evict."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list on stdout.")] = False,
) -> None:
    """Replay a trace of routing: hit rate, hits over MIN's, and bytes read, per policy and size."""
    names = _read_names(policies)
    if slots_percent is not None and budget_mib is not None:
        raise InvalidArgument("give --slots-percent or --budget-mib, not both", reason="SIZES", field="--budget-mib")
    recorded = _read(trace)
    percents = None if budget_mib is not None else _read_numbers(slots_percent or _PERCENTS, "--slots-percent", 100)
    sizes = list(_sizes(recorded.header, moe_layers(recorded), scope, percents, budget_mib))
    try:
        visits = side_by_side(read_visits(recorded, prefill_tokens=prefill_tokens), batch)
    except ValueError as error:
        raise InvalidArgument(str(error), reason="BATCH", field="--batch") from error
    if not any(visit.is_decode for visit in visits):
        raise InvalidArgument(f"{trace}: no decode steps; record generated tokens too", reason="TRACE", field="TRACE")
    rows = list(_play_all(names, sizes, visits, prefill, selective))
    if json:
        t.print_json([_as_json(row, scope, batch, prefill, selective) for row in rows])
    else:
        _show(recorded, rows, scope, batch)


def _play_all(
    names: Sequence[str], sizes: Sequence[_Size], visits: Sequence[Visit], prefill: PrefillRule, selective: bool
) -> Iterator[_Row]:
    """Replay MIN at each size, whether it is asked for or not, and each policy beside it."""
    online = [name for name in names if name != "min"]
    columns = (TextColumn("replay {task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=len(sizes) * (len(online) + 1) * len(visits))
        done = 0

        def run(policy: Policy, size: _Size) -> Result:
            nonlocal done
            progress.update(task, description=f"{policy.name} at {size.text}", completed=done)
            begun = done
            result = play(
                visits,
                policy,
                size.capacity,
                prefill=prefill,
                progress=lambda at: progress.update(task, completed=begun + at),
            )
            done += len(visits)
            return result

        for size in sizes:
            best = run(Min(visits, is_selective=selective), size)
            for name in names:
                result = best if name == "min" else run(make_policy(name, is_selective=selective), size)
                yield _Row(policy=name, size=size, result=result, min_hits=best.decode_hits)


def _read(path: Path) -> Trace:
    try:
        return read_trace(path)
    except FileNotFoundError as error:
        raise InvalidArgument(
            f"there is no file {path}", reason="TRACE", field="TRACE", remedy="record one with `collegium trace`"
        ) from error
    except (TraceError, OSError) as error:
        raise InvalidArgument(str(error), reason="TRACE", field="TRACE") from error


def _read_names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in _ALL:
            raise InvalidArgument(
                f"there is no policy {name!r}", reason="POLICY", field="--policies", remedy=f"give {', '.join(_ALL)}"
            )
    if not names:
        raise InvalidArgument("no policy", reason="POLICY", field="--policies", remedy=f"give any of {', '.join(_ALL)}")
    return names


def _read_numbers(text: str, field: str, most: float) -> list[float]:
    try:
        numbers = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number <= most for number in numbers):
        raise InvalidArgument(
            f"{text!r} are no sizes", reason="SIZES", field=field, remedy="give positive numbers, such as 12.5,25"
        )
    return numbers


def _sizes(
    header: TraceHeader, layers: Sequence[int], scope: Scope, percents: Sequence[float] | None, budget_mib: str | None
) -> Iterator[_Size]:
    sizes = [header.expert_bytes[layer] for layer in layers]
    for percent in percents or ():
        capacity = capacity_of_percent(scope, sizes, header.num_experts, percent)
        yield _Size(percent=percent, mib=None, capacity=capacity)
    for mib in _read_numbers(budget_mib, "--budget-mib", 2**40) if budget_mib is not None else ():
        try:
            capacity = capacity_of_bytes(scope, sizes, header.num_experts, int(mib * _MIB))
        except ValueError as error:
            raise InvalidArgument(str(error), reason="SIZES", field="--budget-mib") from error
        yield _Size(percent=None, mib=mib, capacity=capacity)


def _as_json(row: _Row, scope: Scope, batch: int, prefill: PrefillRule, selective: bool) -> t.Json:
    size, result = row.size, row.result
    return {
        "policy": row.policy,
        "scope": str(scope),
        **({"slots_percent": size.percent} if size.percent is not None else {"budget_mib": size.mib}),
        "batch": batch,
        "prefill": str(prefill),
        "selective": selective,
        "hit_rate_decode": result.hit_rate_decode,
        "min_ratio": row.min_ratio,
        "bytes_read": result.bytes_read,
        "requests_decode": result.decode_requests,
        "hits_decode": result.decode_hits,
    }


def _show(trace: Trace, rows: Sequence[_Row], scope: Scope, batch: int) -> None:
    header = trace.header
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(
        f"{header.model}: {len(moe_layers(trace))} MoE layers of {header.num_experts} experts, top {header.top_k};"
        f" {rows[0].result.decode_requests} decode requests; scope {scope}, batch {batch}"
    )
    table = Table()
    for column in ("size", "policy", "decode hits", "of MIN's", "MiB read"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    before: _Size | None = None
    for row in rows:
        if before is not None and row.size is not before:
            table.add_section()
        table.add_row(
            "" if row.size is before else row.size.text,
            row.policy,
            f"{100 * row.result.hit_rate_decode:.1f} %",
            "" if row.min_ratio is None else f"{row.min_ratio:.3f}",
            f"{row.result.bytes_read / _MIB:,.0f}",
        )
        before = row.size
    console.print(table)
