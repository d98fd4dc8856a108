"""The cost of a token as tokens, experts, workers and routers grow: measured on this machine, simulated beyond it.

Measured: real clusters of 1 or 2 routers and 1, 2 or 4 workers, one thread each, decoding 4, 16 and 64 requests at once
(tokens/s from each request's first token to its last). Costs for the simulator (benchmarks/simulator.py) are fitted to
the processor time and the counts of one router with one worker and with two; all other runs are predicted, and the
error is stated. Then the simulator, with a core for each process, goes on to hundreds of workers.

    python benchmarks/scaling.py [MODEL_DIR] [--rounds 3] [--json] [--plot FILE.png]
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.delay import HOST, free_port
from benchmarks.pages import read_page
from benchmarks.serving import ROOT, prompts_of, through_sdk
from benchmarks.simulator import Costs, Shape, simulate
from benchmarks.ways import told
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.show import worker_counters
from collegium.cli.threads import Allotment
from collegium.model.manifest import ensure_manifest, load_manifest

CLUSTERS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))  # routers, workers
CONCURRENCY = (4, 16, 64)
FITTED = {(1, workers, n) for workers in (1, 2) for n in CONCURRENCY}
_PROMPT_TOKENS = 4
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What one burst took and what was counted in it; processor seconds are those of all processes of a role."""

    tokens_per_s: float
    steps: float  # of the router, where there is one
    dispatches: float
    calls: float  # experts in them
    pairs: float
    router_s: float
    worker_s: float
    other_s: float  # gateway and client


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A run and its simulation."""

    routers: int
    workers: int
    requests: int
    measured_tokens_per_s: float
    simulated_tokens_per_s: float
    error_percent: float
    is_fitted: bool


class Running:
    """One cluster."""

    def __init__(self, stack: ExitStack, model: Path, dtype: str, num_routers: int, num_workers: int):
        self._num_routers = num_routers
        port = free_port()  # a router counts for all, they have like work
        self._metrics = f"http://{HOST}:{port}/metrics"
        # Both routers get the flag; the second one finds the port taken and would end: only one may have it.
        router_flags = ("--micro-batches", "1", "--prefetch", "off")
        if num_routers == 1:
            router_flags += ("--metrics-bind", f"{HOST}:{port}")
        self._cluster = stack.enter_context(
            told(
                Cluster(
                    ClusterSpec(
                        model=model,
                        manifest=ensure_manifest(model),
                        num_workers=num_workers,
                        num_routers=num_routers,
                        dtype=dtype,
                        threads=Allotment(per_router=1, per_worker=1),
                        log_level="warning",
                        flags={
                            "gateway": ("--max-requests", "256"),
                            "router": router_flags,
                            "worker": ("--prefetch", "off", "--join-wait", "off"),
                        },
                    )
                ),
                f"{num_routers} routers, {num_workers} workers",
            )
        )

    def burst(self, prompts: list[list[int]], max_tokens: int) -> Burst:
        """Decode prompts at once."""
        before = self._counted()
        served = asyncio.run(through_sdk(self._cluster.targets, prompts, max_tokens))
        after = self._counted()
        seen = {name: after[name] - before[name] for name in after}
        decoded_s = sum(served.between_s) / len(prompts)
        return Burst(
            tokens_per_s=len(prompts) * (max_tokens - 1) / decoded_s,
            steps=sum(value for name, value in seen.items() if name.startswith("collegium_steps_total")),
            dispatches=seen["worker/collegium_worker_dispatches_total"],
            calls=seen["worker/collegium_expert_calls_total"],
            pairs=seen["worker/collegium_worker_rows_total"],
            router_s=seen["router"],
            worker_s=seen["worker"],
            other_s=seen["other"],
        )

    def _counted(self) -> dict[str, float]:
        found: dict[str, float] = {}
        if self._num_routers == 1:
            for line in read_page(self._metrics).splitlines():
                if line.startswith("collegium_"):
                    name, _, value = line.rpartition(" ")
                    found[name] = float(value)
        workers = {m.name: m.address for m in self._cluster.members if m.role == "worker"}
        for counters in worker_counters(workers).values():
            for name, value in counters.items():
                found[f"worker/{name}"] = found.get(f"worker/{name}", 0.0) + value
        for role in ("router", "worker", "gateway"):
            found[role] = sum(_cpu_s(self._cluster.pid(m.name)) for m in self._cluster.members if m.role == role)
        found["other"] = time.process_time() + found["gateway"]
        return found


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def fit(bursts: dict[tuple[int, int, int], Burst], num_layers: int, max_tokens: int) -> Costs:
    """Fit costs to processor time: wall time would hold waits for each other's cores, and those are simulated."""
    runs = [(key[2], bursts[key]) for key in sorted(FITTED)]
    visits = [burst.steps * num_layers for _, burst in runs]  # layers that the router passed
    layer, layer_row, dispatch = _least_squares(
        np.array([[1.0, rows, burst.dispatches / all_] for (rows, burst), all_ in zip(runs, visits, strict=True)]),
        np.array([burst.router_s / all_ for (_, burst), all_ in zip(runs, visits, strict=True)]),
    )
    batch, expert, pair = _least_squares(
        np.array([[1.0, b.calls / b.dispatches, b.pairs / b.dispatches] for _, b in runs]),
        np.array([b.worker_s / b.dispatches for _, b in runs]),
    )
    # What a step takes and nobody computes: wake-ups, the socket, and the gaps between steps.
    alone = [(n, bursts[1, 1, n]) for n in CONCURRENCY]
    gaps = [
        n / burst.tokens_per_s / num_layers - (burst.router_s + burst.worker_s) / (burst.steps * num_layers)
        for n, burst in alone
    ]
    return Costs(
        layer=layer,
        layer_row=layer_row,
        dispatch=dispatch,
        batch=batch,
        expert=expert,
        pair=pair,
        link=max(0.0, statistics.median(gaps)),
        step=0.0,
        step_row=0.0,
        token=statistics.median(burst.other_s / (n * max_tokens) for n, burst in alone),
    )


def _least_squares(terms: np.ndarray, values: np.ndarray) -> list[float]:
    """Solve for coefficients that are not negative: terms that would be are left out, the most negative first."""
    kept = list(range(terms.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(terms[:, kept] / values[:, None], np.ones(len(values)), rcond=None)
        if (found >= 0).all() or len(kept) == 1:
            break
        kept.pop(int(found.argmin()))
    full = np.zeros(terms.shape[1])
    full[kept] = np.maximum(found, 0.0)
    return full.tolist()


def measure(args: argparse.Namespace) -> dict[tuple[int, int, int], Burst]:
    """Run all clusters by turns and take medians, field by field."""
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    bursts: dict[tuple[int, int, int], list[Burst]] = {}
    with ExitStack() as stack:
        running = {one: Running(stack, args.model, args.dtype, *one) for one in CLUSTERS}
        for number in range(-1, args.rounds):
            for count in CONCURRENCY:
                prompts = prompts_of(count, _PROMPT_TOKENS, vocab, number)
                for (routers, workers), cluster in running.items():
                    burst = cluster.burst(prompts, args.max_tokens)
                    sys.stderr.write(
                        f"round {number + 1}: {routers} routers, {workers} workers, {count} requests: "
                        f"{burst.tokens_per_s:.0f} tokens/s\n"
                    )
                    if number >= 0:
                        bursts.setdefault((routers, workers, count), []).append(burst)
    return {
        key: Burst(**{f.name: statistics.median(getattr(one, f.name) for one in all_) for f in fields(Burst)})
        for key, all_ in bursts.items()
    }


def compare(bursts: dict[tuple[int, int, int], Burst], costs: Costs, base: dict[str, int]) -> list[Compared]:
    """Simulate every run on as many cores as this machine has."""
    cores = os.cpu_count() or 1
    found: list[Compared] = []
    for (routers, workers, count), burst in bursts.items():
        shape = Shape(routers=routers, workers=workers, rows=count // routers, cores=cores, **base)
        simulated = simulate(costs, shape, num_steps=40).tokens_per_s
        found.append(
            Compared(
                routers=routers,
                workers=workers,
                requests=count,
                measured_tokens_per_s=round(burst.tokens_per_s, 1),
                simulated_tokens_per_s=round(simulated, 1),
                error_percent=round(100 * (simulated / burst.tokens_per_s - 1), 1),
                is_fitted=(routers, workers, count) in FITTED,
            )
        )
    return found


def sweeps(costs: Costs, base: dict[str, int]) -> list[dict[str, object]]:
    """Go on where this machine ends, each process on a core of its own: one dimension after another."""
    rows: list[dict[str, object]] = []

    def add(sweep: str, **shape: int) -> None:
        one = Shape(**{"routers": 1, "workers": 1, "rows": 64, "skew": 1.0, **base, **shape})  # type: ignore[arg-type]
        outcome = simulate(costs, one, num_steps=6)
        rows.append(
            {
                "sweep": sweep,
                "routers": one.routers,
                "workers": one.workers,
                "rows of a router": one.rows,
                "experts": one.experts,
                "step ms": round(outcome.step_ms, 2),
                "tokens/s": round(outcome.tokens_per_s),
                "process ms a token": round(outcome.process_ms(one), 3),
                "rows a call": round(outcome.rows_per_call, 1),
                "busiest worker": round(outcome.busiest, 2),
                "mean worker": round(outcome.mean_busy, 2),
            }
        )

    for count in (1, 4, 16, 64, 256, 1024):
        add("tokens", rows=count, workers=4)
    for count in (8, 32, 128, 512):
        add("experts", experts=count, workers=4, routers=4)
    for count in (1, 4, 16, 64, 256):
        add("workers", workers=count, routers=16, experts=256)
    for count in (1, 4, 16, 64, 128):
        add("routers", routers=count, workers=32, experts=256)
    for count in (1, 4, 16, 64):
        add("both", routers=count, workers=4 * count, experts=256)
    return rows


def show(
    compared: Sequence[Compared], costs: Costs, swept: Sequence[dict[str, object]], facts: dict[str, object]
) -> None:
    """Print the tables and the conditions."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title="measured and simulated on this machine's cores")
    for name in asdict(compared[0]):
        table.add_column(name.replace("_", " "), justify="right")
    for one in compared:
        table.add_row(*(str(value) for value in asdict(one).values()))
    console.print(table)
    console.print(error_line(compared), highlight=False)
    console.print(
        "costs in us: " + ", ".join(f"{name} {1e6 * value:.1f}" for name, value in asdict(costs).items()),
        highlight=False,
    )
    table = Table(title="simulated, each process on a core of its own")
    for name in swept[0]:
        table.add_column(name, justify="left" if name == "sweep" else "right")
    for row in swept:
        table.add_row(*map(str, row.values()))
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def error_line(compared: Sequence[Compared]) -> str:
    """State how far simulations are from the runs that they were not fitted to."""
    errors = sorted(abs(one.error_percent) for one in compared if not one.is_fitted)
    return (
        f"runs that were not fitted: simulated within {errors[-1]:.0f} %, "
        f"{statistics.mean(errors):.0f} % on average, over {len(errors)} runs"
    )


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "demo-lm")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    manifest = load_manifest(ensure_manifest(args.model))
    base = {"layers": len(manifest.layers), "experts": len(manifest.layers[0].experts), "top_k": manifest.top_k}
    facts = conditions(model=args.model.name, dtype=args.dtype, threads="1 each")
    bursts = measure(args)
    costs = fit(bursts, base["layers"], args.max_tokens)
    compared, swept = compare(bursts, costs, base), sweeps(costs, base)
    if args.json:
        runs = [asdict(one) for one in compared]
        print(json.dumps({"measured": runs, "costs_s": asdict(costs), "simulated": swept, **facts}))
    else:
        show(compared, costs, swept, facts)
    if args.plot:
        from benchmarks.plots import plot_scaling

        plot_scaling(swept, args.plot)


if __name__ == "__main__":
    main()
