"""The experts of one MoE layer on a GPU: our kernels, which read slots in place, against torch's ways to do the same.

    python benchmarks/gpu.py [--device cuda:0] [--json]

Same weights, rows and choices for all, bf16. Every implementation is recorded as one CUDA graph and replayed, so that
what is compared is the GPU's time and not how fast Python launches; they take turns, medians are compared. `ours` runs
in the form that the calibration at start chooses; `grouped_mm` is torch's grouped matmul over gathered rows; `loop` is
two matmuls per expert that has rows; `padded` is a batched matmul over all experts with places for the busiest one.
The bound: each matrix of an expert that has rows read once, at the bandwidth of a large copy on the same device.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.conditions import conditions
from collegium.model.architectures import Activation, ExpertForm
from collegium.model.device_experts import DeviceRun, DeviceSlots, blocks_of, pairs_by_row
from collegium.model.weights import ExpertWeights

SHAPES = {  # d_model, d_ffn, experts, top_k
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "OLMoE-1B-7B": (2048, 1024, 64, 8),
    "Mixtral-8x7B": (4096, 14336, 8, 2),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_ROUNDS = 15
_COPY_BYTES = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One implementation at one point; null where it cannot be recorded or does not fit."""

    model: str
    tokens: int
    routing: str
    implementation: str
    microseconds: float | None
    of_bound: float | None  # the bound's time over this time
    error: float | None  # relative, against float64


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Rows x [T, D] and their choices, as pairs ordered by expert."""

    x: Tensor
    counts: list[int]
    pair_rows: Tensor
    pair_weights: Tensor

    @property
    def groups(self) -> list[int]:
        """Experts that have rows."""
        return [expert for expert, count in enumerate(self.counts) if count]


def draw(shape: tuple[int, int, int, int], num_tokens: int, routing: str, device: torch.device) -> Work:
    """Draw rows and choices: even, or skewed by Zipf's law (0.8) as in benchmarks/gating.py."""
    d_model, _, experts, top_k = shape
    generator = torch.Generator().manual_seed(num_tokens)
    scores = torch.randn(num_tokens, experts, generator=generator)
    if routing == "skewed":
        scores -= 0.8 * (torch.from_numpy(np.random.default_rng(1).permutation(experts)) + 1).float().log()
    weights, ids = scores.softmax(-1).topk(top_k, dim=-1)
    order = ids.flatten().argsort(stable=True)
    return Work(
        x=torch.randn(num_tokens, d_model, generator=generator).to(device, torch.bfloat16),
        counts=torch.bincount(ids.flatten(), minlength=experts).tolist(),
        pair_rows=(order // top_k).to(device),
        pair_weights=weights.flatten()[order].to(device),
    )


Layer = Callable[[], Tensor]


def ours(slab: DeviceSlots, work: Work) -> Layer:
    """What a worker queues: DeviceRun's kernels, with the transfers made before."""
    groups = work.groups
    counts = [work.counts[g] for g in groups]
    form = slab.form_for(counts)
    gate_up, down, *_ = slab.parts
    assert gate_up is not None and down is not None
    device = work.x.device
    blocks = blocks_of(groups, counts, form.pairs).to(device)
    rows = work.pair_rows.int()
    tables = pairs_by_row(work.pair_rows.cpu().numpy(), work.pair_weights.cpu().numpy(), len(work.x))
    pair_of, weight_of = (torch.from_numpy(table).to(device) for table in tables)

    def run() -> Tensor:
        hidden = work.x.new_empty(len(rows), down.shape[2])
        y = torch.empty(len(rows), down.shape[1], dtype=torch.float32, device=device)
        out = torch.empty_like(work.x)
        slab.kernels.grouped_linear(work.x, rows, gate_up, None, blocks, hidden, form=form, is_gated=True)
        slab.kernels.grouped_linear(hidden, None, down, None, blocks, y, form=form)
        slab.kernels.weighted_sum(y, pair_of, weight_of, out)
        return out

    return run


def _unit(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


def _summed(work: Work, y: Tensor) -> Tensor:
    total = torch.zeros(work.x.shape, dtype=torch.float32, device=y.device)
    return total.index_add_(0, work.pair_rows, y.float() * work.pair_weights[:, None]).to(work.x.dtype)


def grouped_mm(slab: DeviceSlots, work: Work) -> Layer:
    """Torch's grouped matmul, over all experts."""
    gate_up, down, *_ = slab.parts
    assert gate_up is not None and down is not None
    ends = torch.tensor(work.counts, device=work.x.device).cumsum(0, dtype=torch.int32)
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def run() -> Tensor:
        rows = work.x.index_select(0, work.pair_rows)
        hidden = _unit(multiply(rows, gate_up.transpose(-2, -1), offs=ends))
        return _summed(work, multiply(hidden, down.transpose(-2, -1), offs=ends))

    return run


def loop(slab: DeviceSlots, work: Work) -> Layer:
    """Two matmuls for each expert that has rows."""
    gate_up, down, *_ = slab.parts
    assert gate_up is not None and down is not None

    def run() -> Tensor:
        rows = work.x.index_select(0, work.pair_rows).split(work.counts)
        parts = [_unit(rows[g] @ gate_up[g].T) @ down[g].T for g in work.groups]
        return _summed(work, torch.cat(parts))

    return run


def padded(slab: DeviceSlots, work: Work) -> Layer:
    """A batched matmul over all experts, each with as many places as the busiest has rows."""
    gate_up, down, *_ = slab.parts
    assert gate_up is not None and down is not None
    places = max(work.counts)
    at = np.concatenate([g * places + np.arange(c) for g, c in enumerate(work.counts)])
    index = torch.from_numpy(at).to(work.x.device)

    def run() -> Tensor:
        rows = work.x.new_zeros(len(work.counts) * places, work.x.shape[1])
        rows.index_copy_(0, index, work.x.index_select(0, work.pair_rows))
        hidden = _unit(torch.bmm(rows.view(len(work.counts), places, -1), gate_up.transpose(1, 2)))
        y = torch.bmm(hidden, down.transpose(1, 2))
        return _summed(work, y.flatten(0, 1).index_select(0, index))

    return run


IMPLEMENTATIONS = {"ours": ours, "grouped_mm": grouped_mm, "loop": loop, "padded": padded}


def recorded(layer: Layer) -> tuple[Callable[[], None], Tensor]:
    """Record a layer: (replay, where the result lies)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()

    def replay(keep: Layer = layer) -> None:
        del keep  # what the graph reads lives as long as the layer does
        graph.replay()

    return replay, out


def reference(slab: DeviceSlots, work: Work) -> Tensor:
    """The layer in float64."""
    gate_up, down, *_ = slab.parts
    assert gate_up is not None and down is not None
    total = torch.zeros(work.x.shape, dtype=torch.float64, device=work.x.device)
    at = 0
    for group in work.groups:
        span = slice(at, at := at + work.counts[group])
        rows = work.pair_rows[span]
        y = _unit(work.x[rows].double() @ gate_up[group].double().T) @ down[group].double().T
        total.index_add_(0, rows, y * work.pair_weights[span, None])
    return total


def copy_gb_s(device: torch.device) -> float:
    """Bandwidth of a large copy, bytes read and written."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [_timed(lambda: target.copy_(source)) for _ in range(7)]
    return 2 * _COPY_BYTES / statistics.median(times[2:]) / 1e9


def _timed(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def compare(name: str, slab: DeviceSlots, num_tokens: int, routing: str, bytes_per_s: float) -> list[Row]:
    """Measure one point."""
    shape = SHAPES[name]
    work = draw(shape, num_tokens, routing, slab.device)
    expected = reference(slab, work)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=slab.device)  # larger than the L2 cache
    ways: dict[str, Callable[[], None]] = {}
    errors: dict[str, float] = {}
    for way, make in IMPLEMENTATIONS.items():
        try:
            ways[way], out = recorded(make(slab, work))
        except (RuntimeError, torch.OutOfMemoryError) as error:
            sys.stderr.write(f"{name}, {num_tokens} tokens: {way}: {str(error).splitlines()[0]}\n")
            torch.cuda.synchronize()
            continue
        out.fill_(torch.nan)
        ways[way]()
        errors[way] = float((out.double() - expected).norm() / expected.norm())
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_ROUNDS):
        for way, replay in ways.items():
            flush.zero_()  # weights come from memory, as they do when other layers have run between
            times[way].append(_timed(replay))
    bound_s = len(work.groups) * slab.slots[0].num_bytes / bytes_per_s
    rows: list[Row] = []
    for way in IMPLEMENTATIONS:
        found = statistics.median(times[way]) if way in times else None
        rows.append(
            Row(
                model=name,
                tokens=num_tokens,
                routing=routing,
                implementation=way,
                microseconds=None if found is None else round(found * 1e6, 1),
                of_bound=None if found is None else round(bound_s / found, 3),
                error=None if found is None else float(f"{errors[way]:.1e}"),
            )
        )
    return rows


def measure_run(name: str, slab: DeviceSlots, num_tokens: int) -> float:
    """Time what a worker does for one batch, transfers, launches and waiting included: median microseconds."""
    work = draw(SHAPES[name], num_tokens, "uniform", slab.device)
    x, pair_rows, weights = work.x.cpu(), work.pair_rows.cpu().numpy(), work.pair_weights.cpu().numpy()
    groups = work.groups
    counts = [work.counts[g] for g in groups]
    times: list[float] = []
    for _ in range(30):
        began = time.perf_counter()
        run = DeviceRun(x, counts, pair_rows, weights, ExpertForm(activation=Activation.SILU), slab)
        run.compute(range(len(groups)), [slab.slots[g] for g in groups])
        run.result()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times) * 1e6, 1)


def show(rows: Sequence[Row], runs: Sequence[dict[str, object]], facts: dict[str, object]) -> None:
    """Print what was found."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table(title="microseconds of one MoE layer's experts on the GPU (share of the bandwidth's bound)")
    for name in ("model", "routing", "tokens", *IMPLEMENTATIONS, "ours over the best other"):
        table.add_column(name, justify="right")
    points = dict.fromkeys((r.model, r.routing, r.tokens) for r in rows)
    for point in points:
        found = {r.implementation: r for r in rows if (r.model, r.routing, r.tokens) == point}
        cells = [f"{r.microseconds} ({r.of_bound:.0%})" if r.of_bound else "-" for r in found.values()]
        best = min(r.microseconds for r in found.values() if r.microseconds and r.implementation != "ours")
        table.add_row(point[0], point[1], str(point[2]), *cells, f"{best / (found['ours'].microseconds or 1):.2f}x")
    console.print(table)
    for run in runs:
        console.print(run, highlight=False)
    console.print(facts, highlight=False)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--models", default=",".join(SHAPES))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this process sees no CUDA device: there is nothing to measure")
    torch.cuda.set_device(args.device)
    bytes_per_s = copy_gb_s(args.device) * 1e9
    facts = conditions(
        dtype="bfloat16",
        gpu=torch.cuda.get_device_name(args.device),
        torch=torch.__version__,
        copy_gb_s=round(bytes_per_s / 1e9),
    )
    rows: list[Row] = []
    runs: list[dict[str, object]] = []
    with torch.inference_mode():
        for name in args.models.split(","):
            d_model, d_ffn, experts, _ = SHAPES[name]
            blank = ExpertWeights(
                gate_up=torch.zeros(2 * d_ffn, d_model, dtype=torch.bfloat16),
                down=torch.zeros(d_model, d_ffn, dtype=torch.bfloat16),
                gate_up_bias=None,
                down_bias=None,
            )
            slab = DeviceSlots(blank, num_slots=experts, device=args.device)
            for part, width in zip(slab.parts[:2], (d_model, d_ffn), strict=True):
                assert part is not None
                part.normal_(std=width**-0.5)
            began = time.perf_counter()
            forms = {rows_: form.name for rows_, form in slab.calibrate().items()}
            facts[f"{name} forms"] = forms
            facts[f"{name} calibration s"] = [round(time.perf_counter() - began, 2)]
            began = time.perf_counter()
            slab.calibrate()
            facts[f"{name} calibration s"].append(round(time.perf_counter() - began, 2))
            for num_tokens in TOKENS:
                for routing in ("uniform", "skewed"):
                    rows += compare(name, slab, num_tokens, routing, bytes_per_s)
                sys.stderr.write(f"{name}: {num_tokens} tokens\n")
            runs.append(
                {"model": name, "a worker's batch, us": {n: measure_run(name, slab, n) for n in (1, 16, 64, 512)}}
            )
            del slab
            torch.cuda.empty_cache()
    if args.json:
        sys.stdout.write(
            json.dumps({"conditions": facts, "results": [asdict(r) for r in rows], "batches": runs}) + "\n"
        )
    else:
        show(rows, runs, facts)


if __name__ == "__main__":
    main()
