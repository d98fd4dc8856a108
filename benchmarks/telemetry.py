"""What telemetry costs: the same cluster with it and without it, in interleaved rounds.

`off` logs warnings and exports nothing. `on` is what an operator has: lines of JSON at level info, traces of one
request in a hundred and metrics by OTLP, and every page scraped every five seconds. `all` traces every request besides.
The collector and the callers are this process: on few cores, what the collector takes is counted as telemetry's cost.

    python -m benchmarks.telemetry [MODEL_DIR] [--ways off,on,all] [--requests 16] [--rounds 10] [--bursts 12] [--json]

A round is some bursts of each way, burst by burst in turn, so that a machine whose speed drifts is the same for all. A
ratio is of two ways in one round; its interval is that of Student's t over rounds, of the ratios' logarithms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.pages import read_page
from benchmarks.serving import ROOT, Burst, otlp_sink, prompts_of, through_sdk
from benchmarks.ways import told
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.threads import Allotment
from collegium.client import Client
from collegium.model.manifest import ensure_manifest

SCRAPE_S = 5.0
WAYS: Mapping[str, str] = {"off": "", "on": "0.01", "all": "1"}  # the share of requests that is traced
VOCABULARY = 256
# Student's t for two-sided intervals of 95 %, by the number of rounds.
_T = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262, 12: 2.201, 15: 2.145, 20: 2.093}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Tokens a second at the median, and what is left of the throughput without telemetry: mean and 95 % interval."""

    way: str
    tokens_per_s: float
    ratio: float
    least: float
    most: float


@contextmanager
def running(model: Path, way: str, endpoint: str) -> Iterator[Cluster]:
    """A cluster; its pages are scraped all the while where its way says so."""
    is_on = way != "off"
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "COLLEGIUM_TRACE_RATIO": WAYS[way]} if is_on else {}
    spec = ClusterSpec(
        model=model,
        manifest=ensure_manifest(model),
        num_workers=1,
        dtype="bfloat16",
        threads=Allotment(per_router=2, per_worker=2),
        log_level="info" if is_on else "warning",
        log_format="json",
        env=env,
    )
    stopping = threading.Event()
    with told(Cluster(spec, relay=lambda name, line: None)) as cluster, Client(cluster.targets) as client:
        pages = [member.metrics_url for member in client.get_cluster().members if member.metrics_url]

        def scrape() -> None:
            while not stopping.wait(SCRAPE_S):
                for url in pages:
                    with suppress(OSError):
                        read_page(url, SCRAPE_S)

        scraper = threading.Thread(target=scrape, name="scraper")
        if is_on:
            scraper.start()
        try:
            yield cluster
        finally:
            stopping.set()
            if is_on:
                scraper.join()


def measure(args: argparse.Namespace) -> list[Result]:
    """Run all rounds."""
    ways = ["off", *(way for way in WAYS if way in args.ways and way != "off")]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with ExitStack() as stack:
        endpoint = stack.enter_context(otlp_sink())
        clusters = {way: stack.enter_context(running(args.model, way, endpoint)) for way in ways}

        def burst(way: str, round_number: int) -> Burst:
            prompts = prompts_of(args.requests, args.prompt_tokens, VOCABULARY, round_number)
            return asyncio.run(through_sdk(clusters[way].targets, prompts, args.max_tokens))

        for way in ways:
            burst(way, -1)  # not counted
        for round_number in range(args.rounds):
            took_s = dict.fromkeys(ways, 0.0)
            for i in range(args.bursts):
                for way in ways if i % 2 else ways[::-1]:
                    took_s[way] += burst(way, round_number * args.bursts + i).seconds
            for way in ways:
                seconds[way].append(took_s[way])
            told = ", ".join(f"{way} {took_s[way]:.2f} s" for way in ways)
            sys.stderr.write(f"round {round_number + 1} of {args.rounds}: {told}\n")
    return results_of(seconds, args.requests * args.max_tokens * args.bursts)


def results_of(seconds: Mapping[str, Sequence[float]], num_tokens: int) -> list[Result]:
    """Compare each way with `off`, round by round."""
    results: list[Result] = []
    for way, took in seconds.items():
        logs = [math.log(off / own) for off, own in zip(seconds["off"], took, strict=True)]
        mean = statistics.fmean(logs)
        half = _T[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
        results.append(
            Result(
                way=way,
                tokens_per_s=round(num_tokens / statistics.median(took), 1),
                ratio=round(math.exp(mean), 4),
                least=round(math.exp(mean - half), 4),
                most=round(math.exp(mean + half), 4),
            )
        )
    return results


def show(results: Sequence[Result], facts: Mapping[str, object]) -> None:
    """Print the table."""
    table = Table()
    for column in ("telemetry", "tokens/s", "of the throughput without", "95 % interval"):
        table.add_column(column, justify="left" if column == "telemetry" else "right")
    for one in results:
        interval = "" if one.way == "off" else f"{one.least:.3f} to {one.most:.3f}"
        table.add_row(one.way, f"{one.tokens_per_s:,.1f}", f"{one.ratio:.3f}", interval)
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "demo-lm")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS), help="of off, on and all")
    parser.add_argument("--requests", type=int, default=16, help="requests at once")
    parser.add_argument("--rounds", type=int, default=10, choices=sorted(_T))
    parser.add_argument("--bursts", type=int, default=12, help="bursts of each way in a round")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = measure(args)
    facts = conditions(model=args.model.name, requests=args.requests, threads="router 2, worker 2", rounds=args.rounds)
    if args.json:
        print(json.dumps({"conditions": facts, "results": [asdict(one) for one in results]}, default=str))
    else:
        show(results, facts)


if __name__ == "__main__":
    main()
