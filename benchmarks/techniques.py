"""The three techniques of "Toward Efficient Inference for Mixture of Experts", each on and off: all eight together.

For each combination: tokens/s, time between tokens (p50, p99), bytes of expert memory and the process's peak memory.
Work: `--requests` at once, greedy, no early end, on two workers of one thread each, with generated routing that is
skewed (`--skew`) and the same for all. Each combination is a process of its own with router and workers in
it, over unix sockets; they take turns within every round and are stopped (SIGSTOP) in between.

- Dynamic gating off: static gating with a capacity. Each worker runs all experts that it is home to on as many rows as
  the capacity says, whatever was chosen, and on more where a token would be dropped: answers are the same.
- Expert buffering on: half of the experts fit into the slots of both workers, the others stand in memory behind them.
- Load balancing off: homes by number of experts. On: homes and copies (an eighth more slots) from the loads of the
  first, uncounted round. With static gating all experts cost the same, whatever is chosen: nothing can be balanced.

    python benchmarks/techniques.py [MODEL_DIR] [--requests 16] [--rounds 3] [--json] [--plot FILE.png]
"""

import argparse
import itertools
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.serving import ROOT, prompts_of
from benchmarks.ways import told_of_one

_SEED = 7
_NUM_WORKERS = 2
_SPARE = 8  # one slot more for each so many experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Medians over rounds of one combination."""

    dynamic_gating: bool
    expert_buffering: bool
    load_balancing: bool
    tokens_per_s: float
    over_none: float  # tokens/s over those with all three off, by round
    between_p50_ms: float
    between_p99_ms: float
    expert_memory_mb: float
    peak_memory_mb: float
    busiest: float  # rows through experts of each layer's busier worker over the mean of both, over layers


class Combination:
    """One combination's process, stopped while it is not in turn."""

    def __init__(self, switches: tuple[bool, bool, bool], args: argparse.Namespace):
        argv = [sys.executable, "-m", "benchmarks.techniques", str(args.model), "--dtype", args.dtype]
        argv += ["--child", "".join("01"[switch] for switch in switches), "--capacity", str(args.capacity)]
        argv += ["--skew", str(args.skew), "--shared-experts", args.shared_experts]
        env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )
        self._read()
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> "Combination":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()

    def burst(self, prompts: list[list[int]], max_tokens: int) -> dict[str, object]:
        """Serve prompts and say what that took."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self._process.send_signal(signal.SIGSTOP)
        return answer

    def _read(self) -> dict[str, object]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a combination ended with status {self._process.wait()}")
        answer: dict[str, object] = json.loads(line)
        return answer


def serve(args: argparse.Namespace) -> None:
    """Be one combination: read bursts from stdin, answer on stdout."""
    import torch

    from benchmarks.one_process import OneProcess, Request
    from collegium.buffering.generator import RoutingShape, generate_trace
    from collegium.model.manifest import build_manifest
    from router_svc.unsafe_routing import UnsafeRouting, table_of

    is_dynamic, is_buffered, is_balanced = (switch == "1" for switch in args.child)
    shares = args.shared_experts == "worker"
    manifest = build_manifest(args.model, shares=shares)
    num_experts, num_shared = len(manifest.layers[0].experts), manifest.num_shared
    shape = RoutingShape(
        num_layers=len(manifest.layers),
        num_experts=num_experts - num_shared,
        top_k=manifest.top_k - num_shared,
        num_prompts=8,
        prompt_tokens=0,
        decode_tokens=256,
        static_scale=args.skew,
    )
    table = table_of(generate_trace(shape, seed=_SEED), shape.top_k)
    shared = np.broadcast_to(np.arange(num_experts - num_shared, num_experts), (*table.shape[:2], num_shared))
    routing = UnsafeRouting(np.concatenate((table, shared), axis=2), num_experts=num_experts)
    memory = {"expert_memory": "25%", "host_memory": "50%"} if is_buffered else {}
    running = OneProcess(
        args.model,
        num_workers=_NUM_WORKERS,
        dtype=getattr(torch, args.dtype),
        unsafe_routing=routing,
        can_prefetch=False,
        shares=shares,
        **memory,
    )
    with told_of_one(running, "one process"):
        padding = Padding(running, 0.0 if is_dynamic else args.capacity)
        _say({})
        is_first = True
        for line in sys.stdin:
            asked = json.loads(line)
            padding.pairs[:] = 0
            began = time.monotonic()
            answers = running.run([Request(prompt_ids=p, max_tokens=asked["max_tokens"]) for p in asked["prompts"]])
            seconds = time.monotonic() - began
            if not padding.pairs.any():
                raise RuntimeError("no batch came back to the interpreter: nothing was counted, and nothing padded")
            stamps = [choice.arrived_s for (choice,) in answers]
            _say(
                {
                    "seconds": seconds,
                    "between_s": [b - a for one in stamps for a, b in itertools.pairwise(one)],
                    "tokens": [choice.token_ids for (choice,) in answers],
                    "busiest": float(padding.pairs.max(1).sum() / padding.pairs.mean(1).sum()),
                    "expert_bytes": sum(buffer.budget_bytes or buffer.resident_bytes for buffer in running.buffers),
                    "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                }
            )
            if is_first and is_balanced:
                balance(running)
            is_first = False


def _say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


class Padding:
    """Stands between a worker's end and its computing: counts rows, and pads to a capacity where gating is static.

    Every batch comes back to the interpreter, with static gating and without, so that both pay the same for that.
    """

    def __init__(self, running: Any, capacity: float):
        """`capacity`: of the rows of a batch, the share that each expert is given; 0: what it was chosen for."""
        self._capacity, self._running = capacity, running
        self.pairs = np.zeros((len(running.manifest.layers), _NUM_WORKERS), np.int64)
        for worker, loop in enumerate(running.workers):
            compute = loop._compute
            loop._compute = lambda batch, worker=worker, compute=compute: compute(self._padded(batch, worker))
            loop._tell_end = lambda loop=loop: _hand_over(loop)
            loop._is_native = False  # so that its thread tells the end anew

    def _padded(self, batch: Any, worker: int) -> object:
        """Pad with rows that count for nothing."""
        from dataclasses import replace

        self.pairs[batch.layer, worker] += len(batch.pair_rows)
        if not self._capacity:
            return batch
        name = self._running.placement.worker_ids[worker]
        experts = [expert for layer, expert in self._running.placement.experts_of(name) if layer == batch.layer]
        given = dict(zip(batch.experts, batch.counts, strict=True))
        starts = dict(zip(batch.experts, itertools.accumulate([0, *batch.counts[:-1]]), strict=True))
        least = max(1, -(-int(1000 * self._capacity * batch.num_rows) // 1000))
        rows, weights, counts = [], [], []
        for expert in experts:
            count, at = given.get(expert, 0), starts.get(expert, 0)
            padding = max(0, least - count)
            rows += [batch.pair_rows[at : at + count], np.zeros(padding, np.int64)]
            weights += [batch.pair_weights[at : at + count], np.zeros(padding, np.float32)]
            counts.append(count + padding)
        return replace(
            batch,
            experts=experts,
            counts=counts,
            decode_counts=counts if batch.num_decode_rows else [0] * len(counts),
            pair_rows=np.concatenate(rows),
            pair_weights=np.concatenate(weights),
        )


def _hand_over(loop: Any) -> None:
    """Have a worker's end hand every batch over; in the loop's own thread."""
    residents = loop._buffer.residents
    loop._port.serve(
        (residents.table, residents.leases),
        loop._num_experts,
        shape=None,
        d_model=loop._d_model,
        dtype=loop._dtype,
        num_threads=1,
        notes_visits=False,
    )
    loop._is_native = True  # as far as the loop is concerned: it has been told


def balance(running: Any) -> None:
    """Plan homes and copies from what was chosen until now, and put them into force."""
    from collegium.balancing.fleet import EMPTY, make_fleet
    from collegium.balancing.policies import POLICIES
    from collegium.model.placement import Placement

    loads = (running.calls.loads.decode + running.calls.loads.prefill).astype(np.float64)
    num_layers, num_experts = loads.shape
    fleet = make_fleet(num_layers, _NUM_WORKERS, num_experts + num_experts // _SPARE)
    seats = POLICIES["replicated"](loads[None], fleet)
    homes = tuple(
        tuple(
            tuple(w for w in range(_NUM_WORKERS) if (seats[layer, w] == expert).any()) for expert in range(num_experts)
        )
        for layer in range(num_layers)
    )
    assert all(home for layer in homes for home in layer) and EMPTY < 0
    placement = Placement(epoch=running.placement.epoch + 1, worker_ids=running.placement.worker_ids, homes=homes)
    for name, buffer in zip(placement.worker_ids, running.buffers, strict=True):
        buffer.set_homes(placement.experts_of(name))
        buffer.warm(placement.experts_of(name))
        buffer.release_others(placement.experts_of(name))
    running.placement = placement
    running.calls.set_placement(placement)


def measure(args: argparse.Namespace) -> list[Result]:
    """Run all rounds and take medians."""
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    switches = list(itertools.product((False, True), repeat=3))
    bursts: dict[tuple[bool, bool, bool], list[dict]] = {one: [] for one in switches}
    with ExitStack() as stack:
        running = {one: stack.enter_context(Combination(one, args)) for one in switches}
        for number in range(-1, args.rounds):
            prompts = prompts_of(args.requests, args.prompt_tokens, vocab, number)
            tokens = None
            for one, process in running.items():
                burst = process.burst(prompts, args.max_tokens)
                sys.stderr.write(f"round {number + 1}: {_name(one)} {burst['seconds']:.2f} s\n")
                if args.dtype == "float32" and tokens not in (None, burst["tokens"]):
                    raise RuntimeError(f"{_name(one)} answered other tokens than the combination before it")
                tokens = burst["tokens"]
                if number >= 0:
                    bursts[one].append(burst)
    work = args.requests * args.max_tokens
    results: list[Result] = []
    for one in switches:
        gaps = sorted(gap for burst in bursts[one] for gap in burst["between_s"])
        over = [a["seconds"] / b["seconds"] for a, b in zip(bursts[switches[0]], bursts[one], strict=True)]
        results.append(
            Result(
                dynamic_gating=one[0],
                expert_buffering=one[1],
                load_balancing=one[2],
                tokens_per_s=round(work / statistics.median(b["seconds"] for b in bursts[one]), 1),
                over_none=round(statistics.median(over), 2),
                between_p50_ms=round(1e3 * gaps[len(gaps) // 2], 1),
                between_p99_ms=round(1e3 * gaps[len(gaps) * 99 // 100], 1),
                expert_memory_mb=round(max(b["expert_bytes"] for b in bursts[one]) / 1e6, 1),
                peak_memory_mb=round(max(b["peak_bytes"] for b in bursts[one]) / 1e6),
                busiest=round(statistics.median(b["busiest"] for b in bursts[one]), 2),
            )
        )
    return results


def _name(switches: tuple[bool, bool, bool]) -> str:
    names = [n for n, is_on in zip(("dynamic", "buffered", "balanced"), switches, strict=True) if is_on]
    return ", ".join(names) or "none"


def show(results: Sequence[Result], facts: dict[str, object]) -> None:
    """Print the table and the conditions."""
    table = Table(title="the three techniques on and off; over none: tokens/s over those of all three off")
    for name in asdict(results[0]):
        table.add_column(name.replace("_", " "), justify="right")
    for one in results:
        table.add_row(
            *({True: "on", False: "-"}.get(v, str(v)) if isinstance(v, bool) else str(v) for v in asdict(one).values())
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "demo-lm")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--capacity", type=float, default=0.5, help="of a batch's rows, the share of each expert")
    parser.add_argument("--skew", type=float, default=1.5, help="spread of experts' popularity; a trained gate's is 1")
    parser.add_argument("--shared-experts", default="router", choices=("router", "worker"), help="who computes them")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.child:
        serve(args)
        return
    facts = conditions(
        model=args.model.name, dtype=args.dtype, requests=args.requests, capacity=args.capacity, threads="1 each"
    )
    results = measure(args)
    if args.json:
        print(json.dumps({"results": [asdict(r) for r in results], **facts}))
    else:
        show(results, facts)
    if args.plot:
        from benchmarks.plots import plot_techniques

        plot_techniques([asdict(r) for r in results], args.plot)


if __name__ == "__main__":
    main()
