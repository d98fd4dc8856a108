"""The evaluation of "Toward Efficient Inference for Mixture of Experts" redone: theirs beside ours.

    python -m benchmarks.paper [--only gating,caches,placement] [--workloads NAME,..] [--quick] [--json FILE [--keep]]

Three workloads, scaled down to this machine (benchmarks/paper_models.py): language modelling, and the two stacks of
translation. `gating`: time, tokens/s and memory of a whole model's pass over T tokens under four policies: static
gating at the paper's capacities, padding to the busiest expert (as Tutel), padding to blocks (as MegaBlocks), dynamic
gating; and, beside them, the same checkpoint as Collegium serves it. They take turns within every round; what does not
fit into the weights + 2 GiB has no time. `caches`: hit rates of a buffer by its size and policy, and `placement`: Max
Load and Avg Max Load of placements, both on routing that `collegium trace` records of the trained demo models.
With --keep, what the file has and this run doesn't measure stays in it. benchmarks/paper_page.py makes docs/paper.md
of the JSON.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Threads that spin between two small calls would take the core from whoever is measured next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.gating import ROOM_BYTES, Peak
from benchmarks.gating_layers import needed_bytes
from benchmarks.paper_models import DECODER, POLICIES, WORKLOADS, Served, Whole, Workload, powers, write_checkpoint
from benchmarks.paper_routing import caches, idle, placements, record
from collegium.model.architectures import ExpertForm
from collegium.model.calibration import settle_kernel

SERVED = "served"
MOST_TOKENS = 4096  # of a step that is served, and of a decoder's
LARGEST = 16384  # of a pass
_SHORT_S = 0.03  # a shorter pass finds its caches emptied by the others: it is made twice, and the second counts
_POINT_S = 20.0  # a point's rounds end early after so long, but not before so many:
_LEAST_ROUNDS = 3
_WARMED_TOKENS = 512  # larger batches are long enough to warm up by themselves
_TOP_K = 2
_TITLES = {
    "claims": "ours beside theirs",
    "idle": "recorded routing: the share of experts that a batch leaves idle, and of its choices on the busiest one",
    "caches": "hit rates of a buffer with slots for a share of each layer's experts",
    "placement": "share of the busiest of 8 workers in windows of 64 tokens: the largest, and the mean",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A policy at a batch; None where it does not fit."""

    workload: str
    tokens: int
    policy: str
    milliseconds: float | None
    tokens_per_s: float | None
    activation_bytes: int | None  # at the peak of a pass, beside the weights; not told of what is served
    weight_bytes: int
    gigaflops: float | None  # of what a token's matmuls need, a second


def gating(workload: Workload, folder: Path, most_tokens: int, rounds: int) -> Iterator[Point]:
    """Measure a workload at every batch."""
    whole, peak = Whole(workload, folder), Peak()
    bank = whole.bank
    form = ExpertForm(activation=bank.activation, is_gated=bank.is_gated)
    settle_kernel("auto", bank.up.shape[2], bank.down.shape[2], torch.float32, form)
    served = Served(workload, folder, most_tokens=most_tokens, num_threads=torch.get_num_threads())
    try:
        for tokens in powers(most_tokens if workload is DECODER or most_tokens < MOST_TOKENS else LARGEST):
            yield from _point(workload, whole, served, peak, tokens, rounds)
    finally:
        served.close()


def _point(workload: Workload, whole: Whole, served: Served, peak: Peak, tokens: int, rounds: int) -> Iterator[Point]:
    call = whole.call(tokens)
    peaks: dict[str, int] = {}
    for policy, manner in POLICIES.items():
        if needed_bytes(manner, whole.bank, tokens, _TOP_K) <= ROOM_BYTES:
            whole.use(policy)
            call()
            peaks[policy] = peak.of(call)
    fitting = [policy for policy, taken in peaks.items() if taken <= ROOM_BYTES]
    times: dict[str, list[float]] = {policy: [] for policy in (*fitting, SERVED)}
    if tokens <= _WARMED_TOKENS:
        served.seconds(tokens)
    began_s = time.perf_counter()
    for number in range(rounds):
        if number >= _LEAST_ROUNDS and time.perf_counter() - began_s > _POINT_S:
            break
        for policy in fitting:
            whole.use(policy)
            times[policy].append(_timed(lambda: _seconds(call)))
        times[SERVED].append(_timed(lambda: served.seconds(tokens)))
    for policy in (*POLICIES, SERVED):
        seconds = statistics.median(times[policy]) if policy in times else None
        point = Point(
            workload=workload.name,
            tokens=tokens,
            policy=policy,
            milliseconds=None if seconds is None else round(1e3 * seconds, 3),
            tokens_per_s=None if seconds is None else round(tokens / seconds, 1),
            activation_bytes=peaks[policy] if policy in fitting else None,
            weight_bytes=whole.num_bytes,
            gigaflops=None if seconds is None else round(whole.flops * tokens / seconds / 1e9, 1),
        )
        sys.stderr.write(f"{workload.name}, {tokens} tokens, {policy}: {point.milliseconds or '-'} ms\n")
        yield point


def _timed(once: Callable[[], float]) -> float:
    """Seconds of a pass: of the second one where the first was short."""
    took_s = once()
    return took_s if took_s > _SHORT_S else once()


def _seconds(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def claims(workload: Workload, points: Sequence[Point]) -> dict[str, object]:
    """What the points of a workload say, theirs beside ours."""
    rates = {(p.policy, p.tokens): p.tokens_per_s for p in points if p.tokens_per_s is not None}
    best = {policy: max(rate for (one, _), rate in rates.items() if one == policy) for policy in (*POLICIES, SERVED)}

    def least(ours: str, *others: str) -> tuple[float, int, str]:
        """The least ratio at equal batch, where, and to whom."""
        return min(
            (rates[ours, tokens] / rate, tokens, policy)
            for (policy, tokens), rate in rates.items()
            if policy in others and (ours, tokens) in rates and tokens <= MOST_TOKENS
        )

    rows = {(p.policy, p.tokens): p.gigaflops or 0.0 for p in points}
    every = [policy for policy in POLICIES if policy != "dynamic"]
    largest = max(tokens for policy, tokens in rates if policy == "static")
    at = {p.policy: p for p in points if p.tokens == largest}
    static, dynamic = (at[policy].activation_bytes or 0 for policy in ("static", "dynamic"))
    weights = at["static"].weight_bytes
    return {
        "workload": workload.name,
        "theirs over static": workload.theirs,
        "dynamic over static": round(best["dynamic"] / best["static"], 2),
        "served over static": round(best[SERVED] / best["static"], 2),
        "theirs over Tutel": workload.theirs_tutel,
        "dynamic over padded": round(best["dynamic"] / best["padded"], 2),
        "least at equal batch": _told(least("dynamic", *every)),
        "least at equal batch, served": _told(least(SERVED, *every)),
        "memory at static's largest batch": round((weights + static) / (weights + dynamic), 2),
        "activations less by": round(1 - dynamic / static, 3) if static else None,
        "static's largest batch": largest,
        "served, GFLOP/s": max(rate for (policy, _), rate in rows.items() if policy == SERVED),
    }


def _told(found: tuple[float, int, str]) -> str:
    ratio, tokens, policy = found
    return f"{ratio:.2f}x ({policy}, {tokens} token{'s' * (tokens > 1)})"


def show(result: dict[str, object], points: Sequence[Point]) -> None:
    """Print the tables."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    for workload in WORKLOADS:
        mine = [point for point in points if point.workload == workload.name]
        if not mine:
            continue
        table = Table("tokens", *POLICIES, SERVED, title=f"{workload.name}: milliseconds of a pass")
        for tokens in sorted({point.tokens for point in mine}):
            row = {p.policy: p.milliseconds for p in mine if p.tokens == tokens}
            table.add_row(str(tokens), *("-" if row[n] is None else f"{row[n]:.2f}" for n in (*POLICIES, SERVED)))
        console.print(table)
    for name in ("claims", "idle", "caches", "placement"):
        rows = result.get(name)
        if isinstance(rows, list) and rows:
            table = Table(*rows[0], title=_TITLES[name])
            for row in rows:
                table.add_row(*(str(value) for value in row.values()))
            console.print(table)
    facts = result["conditions"]
    assert isinstance(facts, dict)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="gating,caches,placement", help="parts: gating, caches, placement")
    parser.add_argument(
        "--workloads", default=",".join(one.name for one in WORKLOADS), help="workloads of the part gating"
    )
    parser.add_argument("--keep", action="store_true", help="keep what the JSON file has beside what is measured")
    parser.add_argument("--quick", action="store_true", help="batches up to 64 and one round")
    parser.add_argument("--rounds", type=int, default=15, help="of each batch; fewer where a pass is long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there, too")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    most_tokens, rounds = (64, 1) if args.quick else (MOST_TOKENS, args.rounds)
    kept = json.loads(args.json.read_text()) if args.keep else {}
    wanted = [one for one in WORKLOADS if one.name in args.workloads.split(",") and "gating" in args.only]
    names = {one.name for one in wanted}
    points = [Point(**one) for one in kept.get("points", ()) if one["workload"] not in names]
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        for workload in wanted:
            folder = Path(name) / workload.folder
            if not folder.exists():
                write_checkpoint(workload, folder)
            points += gating(workload, folder, most_tokens, rounds)
            if args.json:  # so that what follows may fail
                args.json.write_text(json.dumps(kept | {"points": [asdict(point) for point in points]}))
    result: dict[str, object] = kept | {
        "conditions": conditions(dtype="float32", threads=torch.get_num_threads()),
        "points": [asdict(point) for point in points],
    }
    if points:
        measured = [(one, [p for p in points if p.workload == one.name]) for one in WORKLOADS]
        result["claims"] = [claims(one, each) for one, each in measured if each]
    if "caches" in args.only or "placement" in args.only:
        with tempfile.TemporaryDirectory() as name:
            recorded = record(Path(name), 16 if args.quick else 128)
        result["idle"] = list(idle(recorded))
        if "caches" in args.only:
            result["caches"] = list(caches(recorded))
        if "placement" in args.only:
            result["placement"] = list(placements(recorded))
    if args.json:
        args.json.write_text(json.dumps(result))
    show(result, points)


if __name__ == "__main__":
    main()
