"""Two routers on shared workers against two clusters of their own: tokens/s, rows per expert call.

Real processes. `shared`: one cluster of two routers and one worker with two threads; `apart`: two clusters of one
router and one worker with one thread, so twice the experts' memory. Every router has one thread.
Work: `--concurrency` requests at once, half through each router, greedy, no early
end; the ways take turns within every round.

    python benchmarks/sharing.py [MODEL_DIR] [--concurrency 4,16,64] [--rounds 3] [--json]
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
from benchmarks.serving import ROOT, prompts_of, through_sdk
from benchmarks.ways import told
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.show import worker_counters
from collegium.cli.threads import Allotment
from collegium.model.manifest import ensure_manifest

# Number of clusters, routers of each, threads of its worker, flags of the worker.
WAYS = {
    "shared": (1, 2, 2, ()),
    "shared, always waiting": (1, 2, 2, ("--join-wait", "on")),
    "shared, never waiting": (1, 2, 2, ("--join-wait", "off")),
    "apart": (2, 1, 1, ()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Medians over rounds of one way at one concurrency."""

    way: str
    concurrency: int
    tokens_per_s: float
    ratio: float  # against `apart`, by round
    rows_per_call: float
    joined_percent: float  # of dispatches, those that shared their expert calls with the other router's
    between_p50_ms: float
    between_p99_ms: float


class Running:
    """The clusters of one way."""

    def __init__(self, stack: ExitStack, model: Path, dtype: str, way: str):
        num_clusters, num_routers, worker_threads, flags = WAYS[way]
        self._clusters = [
            stack.enter_context(
                told(
                    Cluster(
                        ClusterSpec(
                            model=model,
                            manifest=ensure_manifest(model),
                            num_workers=1,
                            num_routers=num_routers,
                            dtype=dtype,
                            threads=Allotment(per_router=1, per_worker=worker_threads),
                            log_level="warning",
                            flags={"gateway": ("--max-requests", "256"), "worker": flags},
                        )
                    ),
                    way,
                )
            )
            for _ in range(num_clusters)
        ]

    def burst(self, prompts: list[list[int]], max_tokens: int) -> tuple[float, list[float], dict[str, float]]:
        """Serve prompts: seconds, times between tokens, and what all workers counted meanwhile."""
        before = self._counters()

        async def serve() -> list[tuple[float, list[float]]]:
            shares = [prompts[i :: len(self._clusters)] for i in range(len(self._clusters))]
            bursts = await asyncio.gather(
                *(
                    through_sdk(cluster.targets, share, max_tokens)
                    for cluster, share in zip(self._clusters, shares, strict=True)
                )
            )
            return [(burst.seconds, burst.between_s) for burst in bursts]

        served = asyncio.run(serve())
        after = self._counters()
        between = [gap for _, gaps in served for gap in gaps]
        return max(s for s, _ in served), between, {name: after[name] - before[name] for name in after}

    def _counters(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for cluster in self._clusters:
            workers = {m.name: m.address for m in cluster.members if m.role == "worker"}
            for counters in worker_counters(workers).values():
                for name, value in counters.items():
                    total[name] = total.get(name, 0.0) + value
        return total


def measure(args: argparse.Namespace) -> list[Result]:
    """Run all rounds and take medians."""
    results: list[Result] = []
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    with ExitStack() as stack:
        running = {way: Running(stack, args.model, args.dtype, way) for way in args.ways}
        for count in args.concurrency:
            seconds: dict[str, list[float]] = {way: [] for way in running}
            between: dict[str, list[float]] = {way: [] for way in running}
            counted: dict[str, list[dict[str, float]]] = {way: [] for way in running}
            for number in range(-1, args.rounds):  # the first one is not counted
                prompts = prompts_of(count, args.prompt_tokens, vocab, number)
                for way, one in running.items():
                    took, gaps, seen = one.burst(prompts, args.max_tokens)
                    sys.stderr.write(f"{count} requests, round {number + 1}: {way} {took:.2f} s\n")
                    if number >= 0:
                        seconds[way].append(took)
                        between[way] += gaps
                        counted[way].append(seen)
            for way in running:
                calls = [c["collegium_worker_rows_total"] / c["collegium_expert_calls_total"] for c in counted[way]]
                joined = [
                    c["collegium_joined_dispatches_total"] / c["collegium_worker_dispatches_total"]
                    for c in counted[way]
                ]
                gaps = sorted(between[way])
                ratios = [a / b for a, b in zip(seconds[args.ways[-1]], seconds[way], strict=True)]
                results.append(
                    Result(
                        way=way,
                        concurrency=count,
                        tokens_per_s=round(count * args.max_tokens / statistics.median(seconds[way]), 1),
                        ratio=round(statistics.median(ratios), 3),
                        rows_per_call=round(statistics.median(calls), 2),
                        joined_percent=round(100 * statistics.median(joined), 1),
                        between_p50_ms=round(1e3 * gaps[len(gaps) // 2], 1),
                        between_p99_ms=round(1e3 * gaps[len(gaps) * 99 // 100], 1),
                    )
                )
    return results


def show(results: Sequence[Result], facts: dict[str, object]) -> None:
    """Print the table and the conditions."""
    table = Table(title="two routers; ratio of tokens/s against two clusters apart, in the same round")
    for name in asdict(results[0]):
        table.add_column(name.replace("_", " "), justify="left" if name == "way" else "right")
    for one in results:
        table.add_row(*map(str, asdict(one).values()))
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "demo-lm")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--ways", type=lambda text: tuple(text.split(";")), default=tuple(WAYS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    facts = conditions(
        model=args.model.name, dtype=args.dtype, threads="routers 1; worker 2 where it is shared, else 1"
    )
    results = measure(args)
    if args.json:
        print(json.dumps({"results": [asdict(r) for r in results], **facts}))
    else:
        show(results, facts)


if __name__ == "__main__":
    main()
