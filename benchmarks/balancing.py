"""Balancing while serving: what moves cost, what they gain, and what it costs to lose who plans them.

    python benchmarks/balancing.py moves|gain|outage|scale [MODEL_DIR] [--json]

moves   constant load, steady phases in turn with phases in which the hot set changes and experts move: time between
        tokens
gain    prompts whose choices fall on one worker's experts, each worker on a core of its own: throughput with homes as
        they were placed at first and with balancing, in turns, against what the times of router and workers predict
outage  balancer and Redis stopped for three lease times and going on, in turns: throughput
scale   one worker more and one less under load: how long until it serves, and time between tokens meanwhile

Routing of moves and gain is played (`--unsafe-routing`): its hot set can then be chosen. Real processes throughout.
"""

import argparse
import asyncio
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.conditions import conditions
from benchmarks.ways import told
from collegium.buffering.generator import RoutingShape, generate_trace
from collegium.buffering.traces import TraceWriter
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.show import worker_counters
from collegium.cli.threads import Allotment
from collegium.client import AsyncClient, Balance, Client
from collegium.model.manifest import Manifest, ensure_manifest, load_manifest
from collegium.model.placement import LayerSize, Worker, plan_homes
from router_svc.unsafe_routing import table_of

ROOT = Path(__file__).parents[1]
FIRST_PLAIN_ID = 10


@dataclass(slots=True)
class Stream:
    """Requests that follow each other without end in `num_lanes` lanes; every token is stamped."""

    targets: Sequence[str]
    vocab_size: int
    num_lanes: int
    max_tokens: int = 64
    prompt_tokens: int = 16
    next_id: Callable[[random.Random], str | None] = lambda draw: None
    stamps: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])  # (when, since the last one)
    num_failed: int = 0
    _stopping: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the requests at hand."""
        self._stopping.set()
        assert self._thread is not None
        self._thread.join(120)

    async def _run(self) -> None:
        async with AsyncClient(self.targets, timeout_s=120.0) as client:
            await asyncio.gather(*(self._lane(client, lane) for lane in range(self.num_lanes)))

    async def _lane(self, client: AsyncClient, lane: int) -> None:
        draw = random.Random(lane)
        while not self._stopping.is_set():
            prompt = [draw.randrange(FIRST_PLAIN_ID, self.vocab_size) for _ in range(self.prompt_tokens)]
            last_s = 0.0
            try:
                async for chunk in client.generate(
                    prompt_ids=prompt, max_tokens=self.max_tokens, ignore_eos=True, request_id=self.next_id(draw)
                ):
                    now_s = time.monotonic()
                    if chunk.token_ids:
                        if last_s:
                            self.stamps.append((now_s, now_s - last_s))
                        last_s = now_s
            except Exception as error:
                self.num_failed += 1
                sys.stderr.write(f"a request failed: {error}\n")

    def between(self, begin_s: float, end_s: float) -> list[float]:
        """Give the times between tokens that ended in a stretch of time, in s."""
        return [gap for at, gap in list(self.stamps) if begin_s <= at < end_s]


def percentile(values: Sequence[float], share: float) -> float:
    """Give a percentile, in ms."""
    return float(np.quantile(np.array(values), share)) * 1e3


def interval_of(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Give the mean and its 95 % interval."""
    mean = statistics.mean(ratios)
    half = 2.26 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.inf
    return round(mean, 4), round(mean - half, 4), round(mean + half, 4)


@contextmanager
def cluster(
    args: argparse.Namespace,
    *,
    balancer: Sequence[str],
    router: Sequence[str] = (),
    workers: int = 2,
    restart: bool = True,
) -> Iterator[Cluster]:
    """Run a cluster of the checkpoint."""
    spec = ClusterSpec(
        model=args.model,
        manifest=ensure_manifest(args.model),
        num_workers=workers,
        dtype=args.dtype,
        threads=Allotment(per_router=1, per_worker=1),
        log_level="error",
        can_restart=restart,
        flags={"gateway": ("--max-requests", "256"), "balancer": list(balancer), "router": list(router)},
    )
    with told(Cluster(spec)) as running:
        yield running


def supervise(running: Cluster, seconds: float) -> None:
    """Let time pass, looking after the processes."""
    until = time.monotonic() + seconds
    running.wait_until(lambda: time.monotonic() >= until, seconds + 30)


def vocab_of(model: Path) -> int:
    """Read the size of the vocabulary."""
    return int(json.loads((model / "config.json").read_text())["vocab_size"])


def write_trace(path: Path, choices: NDArray[np.int64], num_experts: int) -> None:
    """Write choices [N tokens, L, K] as one prompt's decode steps."""
    num_tokens, num_layers, top_k = choices.shape
    with path.open("w", encoding="utf-8") as file:
        writer = TraceWriter(
            file,
            model="played",
            arch="played",
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            expert_bytes=dict.fromkeys(range(num_layers), 1),
        )
        for token in range(num_tokens):
            for layer in range(num_layers):
                writer.write(
                    turn=0,
                    phase=1,
                    step=token,
                    layer=layer,
                    experts=choices[token, layer].tolist(),
                    weights=[1 / top_k] * top_k,
                    residency=[0] * top_k,
                    expert_bytes=[0] * top_k,
                )


def skewed_choices(manifest: Manifest, share: float, num_tokens: int, seed: int) -> NDArray[np.int64]:
    """Draw choices of which `share` falls on the experts that the first of two workers is given at first: [N, L, K]."""
    size = [LayerSize(num_experts=len(layer.experts), expert_bytes=1) for layer in manifest.layers]
    homes = plan_homes(size, [Worker(worker_id=name) for name in ("first", "second")]).homes
    draw = np.random.default_rng(seed)
    choices = np.empty((num_tokens, len(size), manifest.top_k), np.int64)
    for layer, row in enumerate(homes):
        first = np.array([expert for expert, home in enumerate(row) if home == (0,)])
        second = np.array([expert for expert, home in enumerate(row) if home != (0,)])
        for token in range(num_tokens):
            num_first = int(draw.binomial(manifest.top_k, share))
            num_first = min(max(num_first, manifest.top_k - len(second)), len(first))
            mine = draw.permutation(first)[:num_first]
            choices[token, layer] = [*mine, *draw.permutation(second)[: manifest.top_k - num_first]]
    return choices


def moves(args: argparse.Namespace, manifest: Manifest, folder: Path) -> dict[str, object]:
    """Measure the time between tokens while nothing moves and while experts move."""
    num_parts, tokens_each = 4, 256
    shape = RoutingShape(
        num_layers=len(manifest.layers),
        num_experts=len(manifest.layers[0].experts),
        top_k=manifest.top_k,
        num_prompts=num_parts,
        prompt_tokens=0,
        decode_tokens=tokens_each,
        drift=0.9,
    )
    choices = table_of(generate_trace(shape, seed=3), manifest.top_k).transpose(1, 0, 2)  # [N, L, K]
    write_trace(folder / "routing.csv", choices, shape.num_experts)
    num_tokens, part = num_parts * tokens_each, 0

    def next_id(draw: random.Random) -> str:
        """Make an id whose sequence plays the part of the trace that is hot now."""
        while True:
            name = f"{draw.getrandbits(64):x}"
            if zlib.crc32(name.encode()) % num_tokens // tokens_each == part:
                return name

    # Long leases: a balancer that is stopped for a phase must find everybody when it goes on.
    flags = ("--rebalance-s", "1", "--window-s", "1", "--target", "1", "--horizon-s", "1e6", "--lease-ttl-ms", "60000")
    phases: list[dict[str, object]] = []
    with cluster(args, balancer=flags, router=("--unsafe-routing", str(folder / "routing.csv"))) as running:
        stream = Stream(
            running.targets, vocab_of(args.model), args.concurrency, max_tokens=96, prompt_tokens=8, next_id=next_id
        )
        stream.start()
        supervise(running, 8)
        for number in range(2 * args.phases):
            is_moving = bool(number % 2)
            before = status(running) if is_moving else None
            if is_moving:
                part = (part + 1) % num_parts
            running.kill("balancer", signal.SIGCONT if is_moving else signal.SIGSTOP)
            began_s = time.monotonic()
            running.wait_until(
                lambda at=began_s: len(stream.between(at, math.inf)) >= args.intervals, 600, "a phase's tokens"
            )
            gaps = stream.between(began_s, time.monotonic())
            running.kill("balancer", signal.SIGCONT)
            done = status(running).moves - before.moves if before is not None else 0
            phases.append(
                {
                    "moving": is_moving,
                    "moves": done,
                    "intervals": len(gaps),
                    "p50_ms": round(percentile(gaps, 0.5), 2),
                    "p99_ms": round(percentile(gaps, 0.99), 2),
                }
            )
            sys.stderr.write(f"{phases[-1]}\n")
        stream.stop()
    pairs = list(zip(phases[0::2], phases[1::2], strict=True))
    ratios = [float(str(b["p99_ms"])) / float(str(a["p99_ms"])) for a, b in pairs]
    medians = [float(str(b["p50_ms"])) / float(str(a["p50_ms"])) for a, b in pairs]
    return {
        "phases": phases,
        "p99_ratio": round(statistics.median(ratios), 3),
        "p50_ratio": round(statistics.median(medians), 3),
        "p99_ratios": [round(ratio, 3) for ratio in ratios],
        "moves": sum(int(str(phase["moves"])) for phase in phases),
        "failed": stream.num_failed,
    }


def status(running: Cluster) -> Balance:
    """Ask for the account of balancing."""
    with Client(running.targets, timeout_s=20.0) as client:
        return client.get_cluster().balance


def pin(running: Cluster) -> None:
    """Give each worker a core of its own, in turn; everything else may run anywhere."""
    cores = sorted(os.sched_getaffinity(0))
    for number, member in enumerate(m for m in running.members if m.role == "worker"):
        for task in Path(f"/proc/{running.pid(member.name)}/task").iterdir():
            os.sched_setaffinity(int(task.name), {cores[number % len(cores)]})


async def prefill(targets: Sequence[str], prompts: Sequence[Sequence[int]]) -> float:
    """Prefill prompts at once, one token each; gives prompt tokens per second."""
    async with AsyncClient(targets, timeout_s=300.0) as client:
        await client.list_models()
        began_s = time.monotonic()
        await asyncio.gather(*(client.complete(prompt_ids=p, max_tokens=1, ignore_eos=True) for p in prompts))
        return sum(map(len, prompts)) / (time.monotonic() - began_s)


def text_ids(model: Path) -> list[int]:
    """Tokenise running text that the demo model knows the kind of: this project's own pages and sources."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    files = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "collegium" / "model").glob("*.py"))]
    return [token for path in files for token in tokenizer.encode(path.read_text(encoding="utf-8")).ids]


def busy_of(running: Cluster) -> tuple[float, ...]:
    """Read each worker's busy time since its start, in s."""
    addresses = {member.name: member.address for member in running.members if member.role == "worker"}
    return tuple(c["collegium_busy_seconds_total"] for c in worker_counters(addresses).values())


def gain(args: argparse.Namespace, manifest: Manifest, folder: Path) -> dict[str, object]:
    """Measure prompts through skewed routing with homes as first placed, and with balancing."""
    router: tuple[str, ...] = ()
    if not args.own:
        choices = skewed_choices(manifest, args.share, 2048, 5)
        write_trace(folder / "routing.csv", choices, len(manifest.layers[0].experts))
        router = ("--unsafe-routing", str(folder / "routing.csv"))
    draw = random.Random(0)
    vocabulary = text_ids(args.model) if args.own else list(range(FIRST_PLAIN_ID, vocab_of(args.model)))

    def prompts() -> list[list[int]]:
        length = args.prompt_tokens
        if args.own:  # running text, from anywhere in it
            starts = [draw.randrange(len(vocabulary) - length) for _ in range(4)]
            return [vocabulary[start : start + length] for start in starts]
        return [draw.choices(vocabulary, k=length) for _ in range(4)]

    with ExitStack() as stack:
        first = stack.enter_context(cluster(args, balancer=("--rebalance-s", "0"), router=router))
        balanced = stack.enter_context(
            cluster(args, balancer=("--rebalance-s", "1", "--window-s", "2", "--target", "1.02"), router=router)
        )
        for running in (first, balanced):
            pin(running)
        for _ in range(12):  # until the balancer has seen enough
            asyncio.run(prefill(balanced.targets, prompts()))
            supervise(balanced, 0.5)
        asyncio.run(prefill(first.targets, prompts()))
        os.kill(balanced.pid("balancer"), signal.SIGSTOP)  # what is in force is what is measured
        speeds: dict[bool, list[float]] = {True: [], False: []}
        shares: list[float] = []
        predicted: list[float] = []
        for number in range(args.rounds):
            asked = prompts()
            for is_balanced in ((False, True), (True, False))[number % 2]:
                running = balanced if is_balanced else first
                before, began_s = busy_of(running), time.monotonic()
                speeds[is_balanced].append(asyncio.run(prefill(running.targets, asked)))
                took_s = sum(map(len, asked)) / speeds[is_balanced][-1]
                busy = [b - a for a, b in zip(before, busy_of(running), strict=True)]
                if not is_balanced:
                    shares.append(max(busy) / sum(busy))
                    # The router's own part and the busiest worker follow each other; even halves would be the best.
                    predicted.append(took_s / (took_s - max(busy) + sum(busy) / 2))
                assert time.monotonic() > began_s
        os.kill(balanced.pid("balancer"), signal.SIGCONT)
        account = status(balanced)
    ratio = statistics.median(b / a for a, b in zip(speeds[False], speeds[True], strict=True))
    expected = statistics.median(predicted)
    return {
        "share_of_the_busier_worker": round(statistics.median(shares), 3),
        "prompt_tokens_per_s": round(statistics.median(speeds[False]), 1),
        "prompt_tokens_per_s_balanced": round(statistics.median(speeds[True]), 1),
        "ratio": round(ratio, 3),
        "predicted": round(expected, 3),
        "ratio_over_predicted": round(ratio / expected, 3),
        "moves": account.moves,
        "decision": account.last_decision,
    }


def outage(args: argparse.Namespace, manifest: Manifest, folder: Path) -> dict[str, object]:
    """Measure throughput with balancer and Redis stopped for three lease times, against both at work, in turns."""
    ttl_s = 1.0
    flags = ("--lease-ttl-ms", str(round(ttl_s * 1e3)), "--rebalance-s", "0")
    rates: dict[bool, list[float]] = {True: [], False: []}
    with cluster(args, balancer=flags) as running:
        stream = Stream(running.targets, vocab_of(args.model), args.concurrency, max_tokens=64)
        stream.start()
        supervise(running, 5)
        for number in range(args.pairs):
            for is_out in ((False, True), (True, False))[number % 2]:
                for name in ("balancer", "redis"):
                    running.kill(name, signal.SIGSTOP if is_out else signal.SIGCONT)
                time.sleep(0.2)
                began_s = time.monotonic()
                time.sleep(3 * ttl_s)
                took_s = time.monotonic() - began_s
                rates[is_out].append(len(stream.between(began_s, began_s + took_s)) / took_s)
            for name in ("balancer", "redis"):
                running.kill(name, signal.SIGCONT)
            sys.stderr.write(f"pair {number + 1}: {rates[False][-1]:.1f} / {rates[True][-1]:.1f} tokens/s\n")
        stream.stop()
        supervise(running, 3)
        has_healed = all(running.is_serving(member.name) for member in running.members)
    mean, low, high = interval_of([b / a for a, b in zip(rates[False], rates[True], strict=True)])
    return {
        "pairs": args.pairs,
        "tokens_per_s": round(statistics.median(rates[False]), 1),
        "tokens_per_s_out": round(statistics.median(rates[True]), 1),
        "ratio": mean,
        "ratio_95": [low, high],
        "failed": stream.num_failed,
        "all_serve_again": has_healed,
    }


def scale(args: argparse.Namespace, manifest: Manifest, folder: Path) -> dict[str, object]:
    """Add a worker under load and retire it, some times over."""
    results: list[dict[str, float]] = []
    steady: list[float] = []
    with cluster(args, balancer=("--rebalance-s", "0")) as running:
        stream = Stream(running.targets, vocab_of(args.model), args.concurrency, max_tokens=64)
        stream.start()
        supervise(running, 5)
        with Client(running.targets, timeout_s=20.0) as client:
            for _ in range(args.rounds):
                began_s = time.monotonic()
                supervise(running, args.steady_s)
                quiet = stream.between(began_s, time.monotonic())
                steady += quiet
                results.append(_grow_and_shrink(running, client, stream))
                results[-1]["steady_p99_ms"] = round(percentile(quiet, 0.99), 2)
                sys.stderr.write(f"{results[-1]}\n")
        stream.stop()
    ratios = [one["p99_ms"] / one["steady_p99_ms"] for one in results]
    return {
        "rounds": results,
        "join_to_homes_s": round(statistics.median(one["join_to_homes_s"] for one in results), 2),
        "load_s": round(statistics.median(one["load_s"] for one in results), 2),
        "retire_s": round(statistics.median(one["retire_s"] for one in results), 2),
        "p99_ratio": round(statistics.median(ratios), 3),
        "failed": stream.num_failed,
    }


def _grow_and_shrink(running: Cluster, client: Client, stream: Stream) -> dict[str, float]:
    num_before = len(running.addresses("worker"))
    client.scale_workers(num_before + 1)
    joined_s = [0.0]

    def is_placed() -> bool:
        cluster = client.get_cluster()
        workers = [member for member in cluster.members if member.role == "worker"]
        if len(workers) > num_before and not joined_s[0]:
            joined_s[0] = time.monotonic()
        return sum(bool(homes) for homes in cluster.experts_per_worker.values()) > num_before

    began_s = time.monotonic()
    running.wait_until(is_placed, 120, "homes for the new worker")
    placed_s = time.monotonic()
    newest = [member for member in running.members if member.role == "worker"][-1]
    load_s = worker_counters({newest.name: newest.address})[newest.name]["collegium_expert_load_seconds_total"]
    supervise(running, 2)
    retired_s = time.monotonic()
    client.scale_workers(num_before)
    running.wait_until(lambda: len(running.addresses("worker")) == num_before, 120, "the end of the new worker")
    ended_s = time.monotonic()
    supervise(running, 1)
    gaps = [*stream.between(began_s, placed_s + 2), *stream.between(retired_s, ended_s + 1)]
    return {
        "process_to_join_s": round(joined_s[0] - began_s, 2),
        "join_to_homes_s": round(placed_s - joined_s[0], 2),
        "load_s": round(load_s, 2),
        "retire_s": round(ended_s - retired_s, 2),
        "intervals": len(gaps),
        "p99_ms": round(percentile(gaps, 0.99), 2),
    }


WHAT: Mapping[str, Callable[[argparse.Namespace, Manifest, Path], dict[str, object]]] = {
    "moves": moves,
    "gain": gain,
    "outage": outage,
    "scale": scale,
}


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(WHAT))
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "demo-lm")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--phases", type=int, default=5, help="moves: pairs of a steady and a moving phase")
    parser.add_argument("--intervals", type=int, default=2000, help="moves: times between tokens in a phase, at least")
    parser.add_argument("--share", type=float, default=0.73, help="gain: of the choices that fall on one worker")
    parser.add_argument("--own", action="store_true", help="gain: text and the model's own routing instead")
    parser.add_argument("--prompt-tokens", type=int, default=448, help="gain: length of a prompt")
    parser.add_argument("--rounds", type=int, default=8, help="gain and scale")
    parser.add_argument("--pairs", type=int, default=10, help="outage")
    parser.add_argument("--steady-s", type=float, default=15.0, help="scale: time between two changes")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    manifest = load_manifest(ensure_manifest(args.model))
    facts = conditions(model=args.model.name, dtype=args.dtype, workers=2, threads="router 1, worker 1")
    with tempfile.TemporaryDirectory() as folder:
        result = WHAT[args.what](args, manifest, Path(folder))
    if args.json:
        sys.stdout.write(json.dumps({"conditions": facts, **result}) + "\n")
        return
    for name, value in {**result, **facts}.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            sys.stdout.write(f"{name}:\n")
            for row in value:
                sys.stdout.write("  " + ", ".join(f"{key} {one}" for key, one in row.items()) + "\n")
        else:
            sys.stdout.write(f"{name}: {value}\n")


if __name__ == "__main__":
    main()
