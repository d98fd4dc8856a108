"""One MoE layer, from one token to thousands: dynamic gating against static gating, padding, and what transformers has.

    python benchmarks/gating.py [--quick] [--json] [--dtype float32|bfloat16] [--plot FILE.png]

Same tokens, gate and weights for all. Implementations take turns within every round, medians are compared; uniform
routing, and skewed (Zipf 0.8). Sweeps: tokens at one shape, the number of experts, top-k, and static gating at the
paper's two settings (experts, top-k and capacity as in the paper; widths scaled to fit, printed). Peak memory is the
process's high-water mark during one call above what it held before, plus the weights. What does not fit into weights +
2 GiB has no time (null). `--json` prints a list of objects and nothing else on stdout.
"""

import argparse
import ctypes
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Threads that spin between two small calls would take the core from whoever is measured next.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.conditions import conditions
from benchmarks.gating_layers import IMPLEMENTATIONS, Layer, Shape, Weights, layer_of, needed_bytes
from collegium.model.architectures import Activation, ExpertForm
from collegium.model.calibration import settle_kernel

ROOM_BYTES = 2 << 30
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096)
BASE = Shape(d_model=768, d_ffn=768, experts=32, top_k=4, capacity=2 * 4 / 32)
EXPERT_SWEEP = [Shape(d_model=512, d_ffn=256, experts=e, top_k=2, capacity=2 * 2 / e) for e in (8, 32, 128, 512)]
TOP_K_SWEEP = [Shape(d_model=512, d_ffn=256, experts=64, top_k=k, capacity=2 * k / 64) for k in (1, 2, 4, 8)]
PAPER = {
    "LM: E 512, k 2, C 0.05": Shape(d_model=256, d_ffn=256, experts=512, top_k=2, capacity=0.05),
    "MT: E 128, k 2, C 1": Shape(d_model=256, d_ffn=512, experts=128, top_k=2, capacity=1.0),
}
PAPER_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_POINT_S = 15.0  # a point's rounds end early after so long, but not before
_LEAST_ROUNDS = 3
_SHORT_S = 0.03  # a shorter call finds its caches emptied by the others: it is made twice, and the second counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One implementation at one point; milliseconds and peak_bytes are null where it does not fit."""

    sweep: str
    tokens: int
    experts: int
    top_k: int
    routing: str
    implementation: str
    milliseconds: float | None
    peak_bytes: int | None
    d_model: int
    d_ffn: int
    dtype: str


class Peak:
    """The process's high-water mark of resident memory above where it was."""

    def __init__(self) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

    def of(self, call: Callable[[], object]) -> int:
        """Bytes that one call takes at its peak."""
        gc.collect()
        if self._trim is not None:
            self._trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"the system does not tell {field}")


def measure(
    sweep: str, weights: Weights, tokens: Sequence[int], routings: Sequence[str], names: Sequence[str], rounds: int
) -> Iterator[Row]:
    """Measure every point of one shape."""
    shape, peak = weights.shape, Peak()
    layers = {name: layer_of(name, weights) for name in names}
    for count in tokens:
        x = torch.randn(count, shape.d_model, generator=torch.Generator().manual_seed(count)).to(weights.dtype)
        for routing in routings:
            bias = weights.bias(routing)
            fitting = [n for n in names if needed_bytes(n, weights.bank, count, shape.top_k) <= ROOM_BYTES]
            peaks = {name: peak.of(functools.partial(layers[name], x, bias)) for name in fitting}
            fitting = [name for name in fitting if peaks[name] <= ROOM_BYTES]
            seconds = _time({name: layers[name] for name in fitting}, x, bias, rounds)
            for name in names:
                fits = name in seconds
                yield Row(
                    sweep=sweep,
                    tokens=count,
                    experts=shape.experts,
                    top_k=shape.top_k,
                    routing=routing,
                    implementation=name,
                    milliseconds=round(1e3 * seconds[name], 4) if fits else None,
                    peak_bytes=weights.num_bytes + peaks[name] if fits else None,
                    d_model=shape.d_model,
                    d_ffn=shape.d_ffn,
                    dtype=str(weights.dtype).removeprefix("torch."),
                )
            sys.stderr.write(f"{sweep}: {count} tokens, {routing}\n")


def _time(layers: dict[str, Layer], x: Tensor, bias: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of a call over rounds in which all take turns; all have been called before."""
    times: dict[str, list[float]] = {name: [] for name in layers}
    began_s = time.perf_counter()
    for turn in range(rounds):
        if turn >= _LEAST_ROUNDS and time.perf_counter() - began_s > _POINT_S:
            break
        for name, layer in layers.items():
            for warm in (True, False):
                if warm and times[name] and min(times[name]) > _SHORT_S:
                    continue
                began = time.perf_counter()
                layer(x, bias)
                took = time.perf_counter() - began
                if not warm or took > _SHORT_S:
                    times[name].append(took)
                if took > _SHORT_S:
                    break
    return {name: statistics.median(taken) for name, taken in times.items()}


def run(dtype: torch.dtype, *, quick: bool, only: str) -> Iterator[Row]:
    """All sweeps, or the quick ones: every kind of point in less than a minute."""
    routings = ("uniform", "skewed")
    everyone = list(IMPLEMENTATIONS)
    rounds = 2 if quick else 9
    if "tokens" in only:
        tokens = (1, 16, 64, 256) if quick else TOKENS
        yield from measure("tokens", Weights(BASE, dtype), tokens, routings, everyone, rounds)
    for sweep, shapes in (("experts", EXPERT_SWEEP), ("top_k", TOP_K_SWEEP)):
        if sweep in only:
            for shape in shapes[1:2] if quick else shapes:
                counts = (16,) if quick else (1, 16, 256, 2048)
                yield from measure(sweep, Weights(shape, dtype), counts, routings[:1], everyone, rounds)
    if "paper" in only:
        names = ["static_gshard", "static_fairseq", "ours"]
        for name, shape in PAPER.items():
            counts = (64, 256) if quick else PAPER_TOKENS
            yield from measure(name, Weights(shape, dtype), counts, routings[:1], names, 1 if quick else 3)


def show(rows: Sequence[Row], facts: dict[str, object], console: Console) -> None:
    """Print a table for each sweep, then the claims."""
    for sweep in dict.fromkeys(row.sweep for row in rows):
        mine = [row for row in rows if row.sweep == sweep]
        names = list(dict.fromkeys(row.implementation for row in mine))
        s = mine[0]
        table = Table(title=f"{sweep}: milliseconds of a layer, d {s.d_model}, d_ff {s.d_ffn}, {s.dtype}")
        for column in ("experts", "top-k", "tokens", "routing", *names, "best other / ours"):
            table.add_column(column, justify="right")
        for (experts, top_k, tokens, routing), point in _points(mine).items():
            cells = ["-" if point[n].milliseconds is None else f"{point[n].milliseconds:.2f}" for n in names]
            ratio = ratio_to_best(point)
            table.add_row(str(experts), str(top_k), str(tokens), routing, *cells, f"{ratio:.2f}x" if ratio else "-")
        console.print(table)
    for line in claims(rows):
        console.print(line, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def _points(rows: Sequence[Row]) -> dict[tuple[int, int, int, str], dict[str, Row]]:
    points: dict[tuple[int, int, int, str], dict[str, Row]] = {}
    for row in rows:
        points.setdefault((row.experts, row.top_k, row.tokens, row.routing), {})[row.implementation] = row
    return points


def ratio_to_best(point: dict[str, Row]) -> float | None:
    """The best other's time over ours: above one, ours is faster."""
    others = [r.milliseconds for n, r in point.items() if n != "ours" and r.milliseconds is not None]
    mine = point["ours"].milliseconds
    return min(others) / mine if others and mine is not None else None


def claims(rows: Sequence[Row]) -> Iterator[str]:
    """What the figures say: the least and the mean ratio to the best other, and ours against static gating."""
    for sweep in ("tokens", "experts", "top_k"):
        ratios = {
            point: ratio
            for point, names in _points([r for r in rows if r.sweep == sweep]).items()
            if (ratio := ratio_to_best(names)) is not None
        }
        if ratios:
            worst = min(ratios, key=ratios.__getitem__)
            mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
            yield (
                f"{sweep}: ours over the best other {min(ratios.values()):.2f}x at least "
                f"({worst[2]} tokens, {worst[0]} experts, top-{worst[1]}, {worst[3]}), {mean:.2f}x in geometric mean"
            )
    for sweep in PAPER:
        mine = [r for r in rows if r.sweep == sweep and r.milliseconds is not None]
        for name in ("static_gshard", "static_fairseq"):
            theirs = {r.tokens: r for r in mine if r.implementation == name}
            own = {r.tokens: r for r in mine if r.implementation == "ours"}
            if not theirs or not own:
                continue
            best, largest = (max(t / (r.milliseconds or 1) for t, r in one.items()) for one in (own, theirs))
            equal = {t: (theirs[t].milliseconds or 0) / (own[t].milliseconds or 1) for t in theirs if t in own}
            last = max(theirs)
            memory = (theirs[last].peak_bytes or 0) / (own[last].peak_bytes or 1)
            at = ", ".join(f"{t}: {ratio:.1f}x" for t, ratio in equal.items())
            yield (
                f"{sweep}: ours over {name} {best / largest:.2f}x in maximum throughput within weights + 2 GiB; at "
                f"equal tokens {at}; peak memory at {last} tokens {memory:.2f}x lower"
            )


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer points and rounds: less than a minute")
    parser.add_argument("--json", action="store_true", help="a list of objects on stdout instead of tables")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", default="tokens,experts,top_k,paper", help="which sweeps")
    parser.add_argument("--plot", type=Path, help="write a picture of the token sweep (needs matplotlib)")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    kernel = settle_kernel("auto", BASE.d_model, BASE.d_ffn, dtype, ExpertForm(activation=Activation.SILU)).kernel
    facts = conditions(dtype=args.dtype, threads=torch.get_num_threads(), kernel=kernel.value)
    with torch.inference_mode():
        rows = list(run(dtype, quick=args.quick, only=args.only))
    if args.json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows]) + "\n")
        show(rows, facts, Console(stderr=True, width=None if sys.stderr.isatty() else 160))
    else:
        show(rows, facts, Console(width=None if sys.stdout.isatty() else 160))
    if args.plot:
        from benchmarks.plots import plot_gating

        plot_gating([asdict(row) for row in rows], args.plot)


if __name__ == "__main__":
    main()
