"""What a smaller fast memory costs: decode speed, hit rate, stalls and bytes, against every expert in memory.

    python benchmarks/buffering.py [MODEL_DIR] [--shares 0.5,0.25] [--policies ewma,lru,lifo] [--json]

Two clusters of real processes run side by side: one without a limit, one whose workers together have slots for a share
of all experts. They take turns burst by burst, the same requests to both; the ratio is the median over pairs of
neighbouring bursts. Behind the slots lies an arena (`--backing host`), so that a miss is a copy in memory, or the disk,
whose pages are dropped all the while (`--backing disk`). A checkpoint with random weights routes near uniformly, where
every policy is alike: give it the generator's routing with `--routing generated`, or a recorded trace. Tokens are
sampled, because greedy text of a small model loops and flatters every cache.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.ways import told, told_of_one
from collegium.buffering.generator import RoutingShape, generate_trace
from collegium.buffering.policies import ExpertId
from collegium.buffering.traces import Trace, TraceWriter
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.show import worker_counters
from collegium.cli.threads import Allotment
from collegium.client import AsyncClient
from collegium.model.experts import PackedExpert
from collegium.model.manifest import Manifest, ensure_manifest, load_manifest
from expert_svc.tiers import Source, Tier

ROOT = Path(__file__).parents[1]
FIRST_PLAIN_ID = 10
OPENINGS = (
    "This package contains the shared libraries needed by",
    "The installer asks for the name of the host and",
    "Ce paquet contient les fichiers de développement",
    "Le système de fichiers est monté au démarrage",
    "Dieses Paket enthält die Dokumentation für",
    "Die Konfiguration des Netzwerks erfolgt in der Datei",
    "def read_header(self, file):\n    ",
    "class Connection:\n    def __init__(self, host, port",
)
_PAPER = (
    "paper: 1.47x less static memory with one expert per layer and device cached, 1.15x where it was evaluated (ten)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to use a small memory."""

    share: float  # of all experts, over all workers
    policy: str
    prefetch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Medians over rounds of a case, and what its workers counted."""

    share: float
    policy: str
    prefetch: str
    concurrency: int
    tokens_per_s: float
    ratio: float  # to all experts in memory, in the same run
    hit_rate: float
    stall_share: float  # of the time of the bursts, mean over workers
    read_mb_per_token: float
    prefetch_useful: float  # of the experts that were prefetched
    expert_memory_mb: float
    memory_factor: float  # all experts over the fast memory


@contextmanager
def cluster(args: argparse.Namespace, manifest: Manifest, case: Case | None, routing: Path | None) -> Iterator[Cluster]:
    """Start a cluster with a case's budgets, or (None) with everything in memory."""
    worker: list[str] = []
    router: list[str] = [] if routing is None else ["--unsafe-routing", str(routing)]
    if case is not None:
        per_worker = -int(-case.share * num_experts(manifest) // args.workers)
        worker += ["--expert-memory", str(per_worker * expert_bytes(manifest, args.dtype))]
        if args.backing == "host":
            worker += ["--host-memory", "100%"]
        worker += ["--eviction", case.policy, "--prefetch", case.prefetch]
        router += ["--prefetch", "off" if case.prefetch == "off" else "on"]
    else:
        router += ["--prefetch", "off"]
    spec = ClusterSpec(
        model=args.model,
        manifest=ensure_manifest(args.model),
        num_workers=args.workers,
        dtype=args.dtype,
        threads=Allotment(per_router=1, per_worker=1),
        log_level="error",
        flags={"gateway": ("--max-requests", "256"), "worker": worker, "router": router},
    )
    name = "everything in memory" if case is None else f"{case.share:.0%} in slots, {case.policy}"
    with told(Cluster(spec), name) as running:
        yield running


def num_experts(manifest: Manifest) -> int:
    """Count the experts of all layers."""
    return sum(len(layer.experts) for layer in manifest.layers)


def expert_bytes(manifest: Manifest, dtype: str) -> int:
    """Give the bytes of one slot."""
    import torch

    from expert_svc.memory import bytes_of

    return bytes_of(manifest, getattr(torch, dtype)).expert_bytes


async def burst(targets: Sequence[str], prompts: Sequence[str | list[int]], max_tokens: int, seed: int) -> float:
    """Run requests at once; gives decoded tokens per second, from the last first token to the first end."""
    async with AsyncClient(targets) as client:
        await client.list_models()

        async def one(number: int, prompt: str | list[int]) -> list[float]:
            stamps: list[float] = []
            text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
            stream = client.generate(
                text,
                prompt_ids=ids,
                max_tokens=max_tokens,
                temperature=0.8,
                top_k=40,
                seed=seed + number,
                ignore_eos=True,
            )
            async for chunk in stream:
                stamps += [time.perf_counter()] * len(chunk.token_ids)
            return stamps

        stamps = await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
    begin, end = max(s[0] for s in stamps), min(s[-1] for s in stamps)
    return sum(begin < t <= end for s in stamps for t in s) / (end - begin)


def prompts_of(args: argparse.Namespace, num_requests: int, round_number: int) -> list[str | list[int]]:
    """Draw a round's prompts: text where the checkpoint has a tokenizer, else random ids."""
    draw = random.Random(7919 * num_requests + round_number)
    if (args.model / "tokenizer.json").exists():
        return [OPENINGS[(round_number + i) % len(OPENINGS)] for i in range(num_requests)]
    vocab_size = int(json.loads((args.model / "config.json").read_text())["vocab_size"])
    return [[draw.randrange(FIRST_PLAIN_ID, vocab_size) for _ in range(16)] for _ in range(num_requests)]


def counters_of(running: Cluster) -> dict[str, float]:
    """Add up what all workers counted."""
    addresses = {member.name: member.address for member in running.members if member.role == "worker"}
    total: dict[str, float] = {}
    for counters in worker_counters(addresses).values():
        for name, value in counters.items():
            total[name] = total.get(name, 0.0) + value
    return total


def measure(
    args: argparse.Namespace, manifest: Manifest, base: Cluster, case: Case, routing: Path | None
) -> list[Result]:
    """Measure one case against the cluster that holds everything, in turns."""
    results: list[Result] = []
    with cluster(args, manifest, case, routing) as running:
        for concurrency in args.concurrency:
            warm = prompts_of(args, concurrency, 10_000)
            for one in (base, running):  # the policies learn, too
                asyncio.run(burst(one.targets, warm, args.max_tokens, 1))
            before, speeds = counters_of(running), {True: list[float](), False: list[float]()}
            spent_s = 0.0
            for number in range(args.rounds):
                prompts = prompts_of(args, concurrency, number)
                for is_case in ((False, True), (True, False))[number % 2]:
                    began_s = time.monotonic()
                    speed = asyncio.run(
                        burst((running if is_case else base).targets, prompts, args.max_tokens, 100 * number)
                    )
                    spent_s += (time.monotonic() - began_s) * is_case
                    speeds[is_case].append(speed)
            results.append(_result(args, manifest, case, concurrency, speeds, counters_of(running), before, spent_s))
            sys.stderr.write(f"{results[-1]}\n")
    return results


def _result(
    args: argparse.Namespace,
    manifest: Manifest,
    case: Case,
    concurrency: int,
    speeds: Mapping[bool, Sequence[float]],
    after: Mapping[str, float],
    before: Mapping[str, float],
    spent_s: float,
) -> Result:
    def gained(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    num_tokens = args.rounds * concurrency * args.max_tokens
    read = sum(gained(f'collegium_expert_load_bytes_total{{tier="{tier}"}}') for tier in ("host", "disk"))
    speed = statistics.median(speeds[True])
    total = num_experts(manifest) * expert_bytes(manifest, args.dtype)
    return Result(
        share=case.share,
        policy=case.policy,
        prefetch=case.prefetch,
        concurrency=concurrency,
        tokens_per_s=round(speed, 1),
        ratio=round(statistics.median(a / b for a, b in zip(speeds[True], speeds[False], strict=True)), 3),
        hit_rate=round(gained("collegium_expert_hits_total") / max(1, gained("collegium_expert_requests_total")), 4),
        stall_share=round(gained("collegium_expert_stall_seconds_total") / args.workers / spent_s, 4),
        read_mb_per_token=round(read / num_tokens / 1e6, 3),
        prefetch_useful=round(
            gained("collegium_prefetch_useful_total") / max(1, gained("collegium_prefetch_loads_total")), 3
        ),
        expert_memory_mb=round(after["collegium_expert_memory_bytes"] / 1e6, 2),
        memory_factor=round(total / after["collegium_expert_memory_bytes"], 2),
    )


@contextmanager
def cold_disk(args: argparse.Namespace) -> Iterator[None]:
    """Keep the checkpoint's files out of the page cache while this lasts."""
    if args.backing != "disk":
        yield
        return
    stop = threading.Event()

    def drop() -> None:
        while not stop.wait(0.02):
            for path in args.model.glob("*.safetensors"):
                with contextlib.suppress(OSError), path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class SlowSource:
    """A source whose every load takes longer by so much, as from a slow disk."""

    def __init__(self, source: Source, delay_s: float):
        self._source, self._delay_s = source, delay_s

    def fill(self, expert_id: ExpertId, slot: PackedExpert) -> Tier:
        """Wait, then load; see Source."""
        time.sleep(self._delay_s)
        return self._source.fill(expert_id, slot)


def measure_delayed(args: argparse.Namespace, manifest: Manifest, share: float) -> dict[str, float]:
    """Measure stalls with and without prefetching where every load takes `--delay-ms` longer, in turns."""
    import torch

    from benchmarks.one_process import OneProcess, Request
    from collegium.model.sampling import SamplingParams

    per_worker = -int(-share * num_experts(manifest) // args.workers)
    stalls: dict[bool, list[float]] = {True: [], False: []}
    speeds: dict[bool, list[float]] = {True: [], False: []}
    with ExitStack() as stack:
        ways = {
            can_prefetch: stack.enter_context(
                told_of_one(
                    OneProcess(
                        args.model,
                        num_workers=args.workers,
                        dtype=getattr(torch, args.dtype),
                        expert_memory=str(per_worker * expert_bytes(manifest, args.dtype)),
                        host_memory="100%",
                        num_load_threads=4,
                        can_prefetch=can_prefetch,
                        wrap_source=lambda source: SlowSource(source, args.delay_ms / 1e3),
                    ),
                    "prefetching" if can_prefetch else "no prefetching",
                )
            )
            for can_prefetch in (True, False)
        }
        for number in range(-1, args.rounds):
            prompts = prompts_of(args, args.concurrency[0], number + 1)
            sampling = [SamplingParams(temperature=0.8, top_k=40, seed=number + i + 1) for i in range(len(prompts))]
            for can_prefetch, way in sorted(ways.items(), reverse=bool(number % 2)):
                before = sum(worker.counters.stall_us for worker in way.workers)
                began_s = time.monotonic()
                way.run(
                    [
                        Request(prompt_ids=ids_of(args, prompt), max_tokens=args.max_tokens, sampling=one)
                        for prompt, one in zip(prompts, sampling, strict=True)
                    ]
                )
                took_s = time.monotonic() - began_s
                stall_s = (sum(worker.counters.stall_us for worker in way.workers) - before) / 1e6
                if number >= 0:
                    stalls[can_prefetch].append(stall_s / args.workers / took_s)
                    speeds[can_prefetch].append(len(prompts) * args.max_tokens / took_s)
        totals = [buffer.totals for buffer in ways[True].buffers]
    on, off = statistics.median(stalls[True]), statistics.median(stalls[False])
    return {
        "share": share,
        "delay_ms": args.delay_ms,
        "stall_share_without": round(off, 4),
        "stall_share_with": round(on, 4),
        "cut": round(1 - on / off, 3),
        "tokens_per_s_without": round(statistics.median(speeds[False]), 1),
        "tokens_per_s_with": round(statistics.median(speeds[True]), 1),
        "prefetch_useful": round(sum(t.prefetch_useful for t in totals) / max(1, sum(t.prefetched for t in totals)), 3),
        "prefetch_late": round(sum(t.prefetch_late for t in totals) / max(1, sum(t.prefetched for t in totals)), 3),
    }


def measure_memory(args: argparse.Namespace, manifest: Manifest, routing: Path | None) -> dict[str, float]:
    """Compare the anonymous memory of all workers between the first two shares with what their budgets differ by."""
    used: list[int] = []
    budgets: list[float] = []
    for share in args.shares[:2]:
        with cluster(args, manifest, Case(share=share, policy="ewma", prefetch="off"), routing) as running:
            for number in range(2):
                asyncio.run(burst(running.targets, prompts_of(args, 4, number), args.max_tokens, number))
            pids = [running.pid(member.name) for member in running.members if member.role == "worker"]
            used.append(sum(_anonymous_bytes(pid) for pid in pids))
            budgets.append(counters_of(running)["collegium_expert_memory_bytes"])
    grown, allowed = used[0] - used[1], budgets[0] - budgets[1]
    return {
        "budgets_differ_by_mb": round(allowed / 1e6, 2),
        "anonymous_memory_differs_by_mb": round(grown / 1e6, 2),
        "ratio": round(grown / allowed, 4),
    }


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} does not say what memory it uses")


def ids_of(args: argparse.Namespace, prompt: str | list[int]) -> list[int]:
    """Give a prompt's token ids."""
    if not isinstance(prompt, str):
        return prompt
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(args.model / "tokenizer.json")).encode(prompt).ids)


def make_routing(args: argparse.Namespace, manifest: Manifest, folder: Path) -> Path | None:
    """Give the file of routing to play: a recorded one, or one from the generator in the model's shape."""
    if args.routing == "own":
        return None
    if args.routing != "generated":
        return Path(args.routing)
    shape = RoutingShape(
        num_layers=len(manifest.layers),
        num_experts=len(manifest.layers[0].experts),
        top_k=manifest.top_k,
        num_prompts=4,
        prompt_tokens=16,
        decode_tokens=512,
        drift=0.3,
    )
    path = folder / "routing.csv"
    with path.open("w", encoding="utf-8") as file:
        _write(generate_trace(shape, seed=7), file)
    return path


def _write(trace: Trace, file: TextIO) -> None:
    head = trace.header
    writer = TraceWriter(
        file,
        model=head.model,
        arch=head.arch,
        num_layers=head.num_layers,
        num_experts=head.num_experts,
        top_k=head.top_k,
        expert_bytes=head.expert_bytes,
    )
    for first in range(0, len(trace), head.top_k):
        rows = slice(first, first + head.top_k)
        writer.write(
            turn=int(trace.turn[first]),
            phase=int(trace.phase[first]),
            step=int(trace.step[first]),
            layer=int(trace.layer[first]),
            experts=trace.expert[rows].tolist(),
            weights=trace.weight[rows].tolist(),
            residency=trace.residency[rows].tolist(),
            expert_bytes=trace.expert_bytes[rows].tolist(),
        )


def show(results: Sequence[Result], facts: Mapping[str, object]) -> None:
    """Print the table, the conditions and the paper's figures."""
    table = Table(title="decode with a share of the experts in slots, against all of them in memory")
    names = ("in slots", "policy", "prefetch", "requests", "tokens/s", "ratio", "hits", "stalled", "MB/token", "useful")
    for name in (*names, "expert memory", "less"):
        table.add_column(name, justify="left" if name in ("policy", "prefetch") else "right")
    for r in results:
        table.add_row(
            f"{100 * r.share:g} %",
            r.policy,
            r.prefetch,
            str(r.concurrency),
            f"{r.tokens_per_s:.1f}",
            f"{r.ratio:.3f}",
            f"{100 * r.hit_rate:.1f} %",
            f"{100 * r.stall_share:.1f} %",
            f"{r.read_mb_per_token:.2f}",
            f"{100 * r.prefetch_useful:.0f} %" if r.prefetch != "off" else "",
            f"{r.expert_memory_mb:.1f} MB",
            f"{r.memory_factor:.1f}x",
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(_PAPER, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "demo-lm")
    parser.add_argument(
        "--shares", type=_numbers, default=[0.5, 0.25], help="of all experts in slots, over all workers"
    )
    parser.add_argument("--policies", type=lambda text: text.split(","), default=["ewma", "lru", "lifo"])
    parser.add_argument("--prefetch", type=lambda text: text.split(","), default=["off"], help="off, on, auto")
    parser.add_argument("--backing", choices=("host", "disk"), default="host")
    parser.add_argument("--routing", default="own", help="own, generated, or a trace's path")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1])
    parser.add_argument("--delay-ms", type=float, default=0.0, help="only: what prefetching does where loads are slow")
    parser.add_argument("--memory", action="store_true", help="only: what the first two shares take in memory")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    args = parser.parse_args()
    manifest = load_manifest(ensure_manifest(args.model))
    facts = conditions(
        model=args.model.name,
        dtype=args.dtype,
        workers=args.workers,
        threads="router 1, worker 1",
        backing=args.backing,
        routing=args.routing,
    )
    if args.delay_ms:
        for share in args.shares:
            sys.stdout.write(json.dumps({"conditions": facts, **measure_delayed(args, manifest, share)}) + "\n")
        return
    results: list[Result] = []
    with ExitStack() as stack:
        routing = make_routing(args, manifest, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        if args.memory:
            sys.stdout.write(json.dumps({"conditions": facts, **measure_memory(args, manifest, routing)}) + "\n")
            return
        base = stack.enter_context(cluster(args, manifest, None, routing))
        stack.enter_context(cold_disk(args))
        for share in args.shares:
            for policy in args.policies:
                for prefetch in args.prefetch:
                    case = Case(share=share, policy=policy, prefetch=prefetch)
                    results += measure(args, manifest, base, case, routing)
    if args.json:
        sys.stdout.write(json.dumps({"conditions": facts, "results": [asdict(r) for r in results]}) + "\n")
    else:
        show(results, facts)


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
