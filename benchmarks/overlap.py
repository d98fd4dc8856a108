"""What micro-batches gain where rows are long on their way: measured against what attention, experts and link predict.

Real processes: gateway, router and one worker, whose link runs over TCP through a relay that holds back every byte for
`--delay-ms` each way. One cluster for each number of micro-batches m, and one that chooses by itself; they take turns
within every round. Work: prompts of 32 random tokens, computed in steps of R rows.

The prediction is made of what clusters of m = 1 show at steps of R, R/2, R/3 and R/4 rows, per step: A, the router's
own time; E, the worker's; D, the rest of what the router waits; S, sampling and what else is no forward pass. With m
parts a step takes S and the longest of m * A', m * E' (each side computes all parts, one after the other) and
A' + E' + D' (a part's own way round), where A', E' and D' are those of R/m rows. Gains are of the time that the
router spent in steps: client and gateway run on the same cores.

    python benchmarks/overlap.py [MODEL_DIR] [--delay-ms 6] [--rows 512] [--rounds 3] [--json]
"""

import argparse
import asyncio
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.delay import HOST, DelayRelay, free_port
from benchmarks.pages import read_page
from benchmarks.serving import ROOT, prompts_of, through_sdk
from benchmarks.ways import told
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.show import worker_counters
from collegium.cli.threads import Allotment
from collegium.model.manifest import ensure_manifest

WAYS = ("1", "2", "3", "4", "auto")
_PROMPT_TOKENS = 32
_STEPS_PER_BURST = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of one step, in milliseconds, summed over its layers."""

    rows: int
    router_ms: float
    worker_ms: float
    link_ms: float
    rest_ms: float

    def step_ms(self, num_parts: int) -> float:
        """Predict a step of `num_parts` times as many rows, in so many parts."""
        round_ms = self.router_ms + self.worker_ms + self.link_ms
        return max(num_parts * self.router_ms, num_parts * self.worker_ms, round_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One number of micro-batches: medians over rounds."""

    micro_batches: str
    tokens_per_s: float  # prompt tokens over time in steps
    gain: float
    predicted_gain: float | None
    reached: float | None  # the gain over the predicted one
    overlap: float  # of the time that rows were away, the share in which the router computed


class Running:
    """One cluster with its relay."""

    def __init__(self, stack: ExitStack, model: Path, dtype: str, batches: str, rows: int, delay_s: float):
        worker_port, metrics_port = free_port(), free_port()
        relay = stack.enter_context(DelayRelay(worker_port, delay_s))
        self._metrics = f"http://{HOST}:{metrics_port}/metrics"
        self._cluster = stack.enter_context(
            told(
                Cluster(
                    ClusterSpec(
                        model=model,
                        manifest=ensure_manifest(model),
                        num_workers=1,
                        dtype=dtype,
                        threads=Allotment(per_router=1, per_worker=1),
                        log_level="warning",
                        flags={
                            "gateway": ("--max-requests", "1024"),
                            "router": (
                                *("--micro-batches", batches, "--link-transport", "tcp", "--prefetch", "off"),
                                *("--max-num-seqs", "512", "--max-batch-tokens", str(rows)),
                                *("--metrics-bind", f"{HOST}:{metrics_port}"),
                            ),
                            "worker": (
                                *("--data-bind", f"{HOST}:{worker_port}", "--data-advertise", f"{HOST}:{relay.port}"),
                                *("--prefetch", "off"),
                            ),
                        },
                    )
                ),
                f"{batches} micro-batches",
            )
        )

    def burst(self, prompts: list[list[int]]) -> tuple[float, dict[str, float]]:
        """Have prompts computed and one token drawn after each: the seconds, and what was counted."""
        before = self._counters()
        burst = asyncio.run(through_sdk(self._cluster.targets, prompts, 1))
        after = self._counters()
        return burst.seconds, {name: value - before.get(name, 0.0) for name, value in after.items()}

    def _counters(self) -> dict[str, float]:
        workers = {m.name: m.address for m in self._cluster.members if m.role == "worker"}
        (found,) = worker_counters(workers).values()
        found = {f"worker/{name}": value for name, value in found.items()}
        for line in read_page(self._metrics).splitlines():
            if line.startswith("collegium_"):
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found


def costs_of(rows: int, counted: Sequence[dict[str, float]]) -> Costs:
    """Take the medians of bursts of m = 1."""

    def per_step(one: dict[str, float], *names: str) -> float:
        steps = sum(value for name, value in one.items() if name.startswith("collegium_steps_total"))
        return 1e3 * sum(one[name] for name in names) / steps

    forward = [per_step(one, "collegium_forward_seconds_total") for one in counted]
    blocked = [per_step(one, "collegium_rows_blocked_seconds_total") for one in counted]
    worker = [per_step(one, "worker/collegium_busy_seconds_total") for one in counted]
    whole = [per_step(one, "collegium_step_seconds_total") for one in counted]
    return Costs(
        rows=rows,
        router_ms=round(statistics.median(f - b for f, b in zip(forward, blocked, strict=True)), 3),
        worker_ms=round(statistics.median(worker), 3),
        link_ms=round(statistics.median(b - w for b, w in zip(blocked, worker, strict=True)), 3),
        rest_ms=round(statistics.median(w - f for w, f in zip(whole, forward, strict=True)), 3),
    )


def measure(model: Path, args: argparse.Namespace) -> tuple[list[Costs], list[Result]]:
    """Run all rounds and take medians."""
    sizes = [args.rows // m for m in range(1, 5)]
    counted: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    seconds: dict[str, list[float]] = {way: [] for way in args.ways}
    overlap: dict[str, list[float]] = {way: [] for way in args.ways}
    delay_s = args.delay_ms / 1e3
    with ExitStack() as stack:
        running = {
            way: Running(stack, model, args.dtype, "0" if way == "auto" else way, args.rows, delay_s)
            for way in args.ways
        }
        smaller = {size: Running(stack, model, args.dtype, "1", size, delay_s) for size in sizes[1:]}
        for number in range(-4, args.rounds):  # the first four are not counted: what chooses by itself learns in them
            prompts = prompts_of(_STEPS_PER_BURST * args.rows // _PROMPT_TOKENS, _PROMPT_TOKENS, args.vocab, number)
            for way, one in running.items():
                took, seen = one.burst(prompts)
                steps_s = seen["collegium_step_seconds_total"]
                sys.stderr.write(f"round {number + 1}: {way} micro-batches {took:.2f} s, {steps_s:.2f} s in steps\n")
                if number >= 0:
                    seconds[way].append(steps_s)
                    away = seen["collegium_rows_away_seconds_total"]
                    overlap[way].append(1.0 - seen["collegium_rows_blocked_seconds_total"] / away)
                    if way == "1":
                        counted[args.rows].append(seen)
            for size, one in smaller.items():
                _, seen = one.burst(prompts)
                if number >= 0:
                    counted[size].append(seen)
    costs = [costs_of(size, counted[size]) for size in sizes]
    work = _STEPS_PER_BURST * args.rows
    whole = costs[0].step_ms(1) + costs[0].rest_ms
    results: list[Result] = []
    for way in args.ways:
        parts = 0 if way == "auto" else int(way)
        gain = statistics.median(one / other for one, other in zip(seconds["1"], seconds[way], strict=True))
        predicted = whole / (costs[parts - 1].step_ms(parts) + costs[0].rest_ms) if parts else None
        results.append(
            Result(
                micro_batches=way,
                tokens_per_s=round(work / statistics.median(seconds[way]), 1),
                gain=round(gain, 3),
                predicted_gain=predicted and round(predicted, 3),
                reached=predicted and round(gain / predicted, 3),
                overlap=round(statistics.median(overlap[way]), 3),
            )
        )
    return costs, results


def show(costs: Sequence[Costs], results: Sequence[Result], facts: dict[str, object]) -> None:
    """Print both tables and the conditions."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for title, rows in (("a step of m = 1, ms", costs), ("micro-batches; gain against m = 1", results)):
        table = Table(title=title)
        for name in asdict(rows[0]):
            table.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            table.add_row(*("-" if value is None else str(value) for value in asdict(row).values()))
        console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "demo-lm")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--delay-ms", type=float, default=6.0, help="held back each way, at every layer")
    parser.add_argument("--rows", type=int, default=512, help="of a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", type=lambda text: tuple(text.split(",")), default=WAYS)
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    facts = conditions(
        model=args.model.name, dtype=args.dtype, threads="1 and 1", delay_ms=args.delay_ms, rows=args.rows
    )
    costs, results = measure(args.model, args)
    if args.json:
        print(json.dumps({"costs": [asdict(c) for c in costs], "results": [asdict(r) for r in results], **facts}))
    else:
        show(costs, results, facts)
    if args.plot:
        from benchmarks.plots import plot_overlap

        plot_overlap([asdict(c) for c in costs], [asdict(r) for r in results], args.plot)


if __name__ == "__main__":
    main()
