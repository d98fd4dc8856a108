"""What gateway and SDK add to a token's way: the same cluster through the SDK, and straight to its router.

Closed-loop clients, each asking one request after another with a pause of random length before it, so that requests
meet the router's steps at any moment; rounds of both ways take turns. Times of all rounds are put together.

    python benchmarks/gateway_price.py [MODEL_DIR] [--clients 1,4,16] [--rounds 4] [--json]
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.serving import FIRST_PLAIN_ID, ROOT
from benchmarks.ways import told
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.cli.threads import Allotment
from collegium.client import AsyncClient
from collegium.fabric.channels import channel as channel_to
from collegium.model.manifest import ensure_manifest
from collegium.v1 import inference_pb2, router_pb2, router_pb2_grpc

# Serves one request: its prompt's ids and the number of tokens, to the times at which they came.
Serve = Callable[[list[int], int], AsyncIterator[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Milliseconds at the median, and at the 99th percentile."""

    way: str
    clients: int
    first_p50_ms: float
    first_p99_ms: float
    between_p50_ms: float
    between_p99_ms: float


@asynccontextmanager
async def through_gateway(cluster: Cluster) -> AsyncIterator[Serve]:
    """The SDK, as its users have it."""
    async with AsyncClient(cluster.targets) as client:
        await client.list_models()

        async def serve(prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
            async for chunk in client.generate(prompt_ids=prompt, max_tokens=max_tokens, ignore_eos=True):
                yield len(chunk.token_ids)

        yield serve


@asynccontextmanager
async def straight_to_router(cluster: Cluster) -> AsyncIterator[Serve]:
    """One stream to the router for all, as a gateway has."""
    waiting: dict[str, asyncio.Queue[int]] = {}
    async with channel_to(cluster.addresses("router")[0]) as channel:
        stub: Any = router_pb2_grpc.RouterStub(channel)
        stream = stub.Attach()
        await stream.write(router_pb2.AttachRequest(gateway_id="benchmark"))
        await stream.read()

        async def read() -> None:
            while True:
                frame = await stream.read()
                for news in frame.news:
                    waiting[news.request_id].put_nowait(len(news.token_ids))

        reader = asyncio.create_task(read())
        number, writing = 0, asyncio.Lock()

        async def serve(prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
            nonlocal number
            number += 1
            request_id, queue = str(number), asyncio.Queue[int]()
            waiting[request_id] = queue
            submission = router_pb2.Submission(
                request_id=request_id,
                prompt_ids=prompt,
                sampling=inference_pb2.Sampling(seed=1),
                stopping=inference_pb2.Stopping(max_tokens=max_tokens, ignore_eos=True),
                choices=[router_pb2.ChoiceStart(choice_index=0)],
            )
            async with writing:
                await stream.write(router_pb2.AttachRequest(submissions=[submission]))
            left = max_tokens
            while left > 0:
                count = await queue.get()
                left -= count
                yield count

        try:
            yield serve
        finally:
            reader.cancel()
            stream.cancel()


WAYS: dict[str, Callable[[Cluster], AbstractAsyncContextManager[Serve]]] = {
    "gateway": through_gateway,
    "router": straight_to_router,
}


async def play(
    cluster: Cluster, way: str, num_clients: int, args: argparse.Namespace, seed: int
) -> tuple[list[float], list[float]]:
    """Let clients ask for a while: seconds to first tokens, and between tokens."""
    first: list[float] = []
    between: list[float] = []

    async def ask(serve: Serve, draw: random.Random) -> None:
        for _ in range(args.requests):
            await asyncio.sleep(draw.uniform(0.0, 0.05))
            prompt = [draw.randrange(FIRST_PLAIN_ID, args.vocab) for _ in range(args.prompt_tokens)]
            last = time.perf_counter()
            is_first = True
            async for count in serve(prompt, args.max_tokens):
                now = time.perf_counter()
                if count:
                    (first if is_first else between).append(now - last)
                    last, is_first = now, False

    async with WAYS[way](cluster) as serve:
        await asyncio.gather(*(ask(serve, random.Random(seed * 1000 + client)) for client in range(num_clients)))
    return first, between


def measure(args: argparse.Namespace) -> list[Result]:
    """Run all rounds."""
    spec = ClusterSpec(
        model=args.model,
        manifest=ensure_manifest(args.model),
        num_workers=1,
        dtype=args.dtype,
        threads=Allotment(per_router=1, per_worker=1),
        log_level="warning",
    )
    results: list[Result] = []
    with told(Cluster(spec)) as cluster:
        for num_clients in args.clients:
            times: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
            for number in range(-1, args.rounds):
                for way in WAYS:
                    first, between = asyncio.run(play(cluster, way, num_clients, args, number + 2))
                    if number >= 0:
                        times[way][0].extend(first)
                        times[way][1].extend(between)
                    sys.stderr.write(f"{num_clients} clients, round {number + 1}: {way}, {len(first)} requests\n")
            for way, (first, between) in times.items():
                first, between = sorted(first), sorted(between)
                results.append(
                    Result(
                        way=way,
                        clients=num_clients,
                        first_p50_ms=_ms(first, 50),
                        first_p99_ms=_ms(first, 99),
                        between_p50_ms=_ms(between, 50),
                        between_p99_ms=_ms(between, 99),
                    )
                )
    return results


def _ms(ordered: Sequence[float], percent: int) -> float:
    return round(1e3 * ordered[len(ordered) * percent // 100], 2)


def show(results: Sequence[Result], facts: dict[str, object]) -> None:
    """Print the table, the price, and the conditions."""
    table = Table(title="through the gateway and straight to the router, ms")
    for name in asdict(results[0]):
        table.add_column(name.replace("_", " "), justify="left" if name == "way" else "right")
    for one in results:
        table.add_row(*map(str, asdict(one).values()))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for line in prices(results):
        console.print(line, highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


def prices(results: Sequence[Result]) -> list[str]:
    """Say what SDK and gateway add at the median."""
    lines: list[str] = []
    for count in dict.fromkeys(r.clients for r in results):
        found = {r.way: r for r in results if r.clients == count}
        first = found["gateway"].first_p50_ms - found["router"].first_p50_ms
        between = found["gateway"].between_p50_ms - found["router"].between_p50_ms
        lines.append(f"{count} clients: SDK and gateway add {first:.2f} ms to first tokens, {between:.2f} ms to others")
    return lines


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "models" / "demo-lm")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--clients", type=lambda text: [int(n) for n in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=8, help="of each client in a round")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    facts = conditions(model=args.model.name, dtype=args.dtype, threads="1 each")
    results = measure(args)
    if args.json:
        print(json.dumps({"results": [asdict(r) for r in results], **facts}))
    else:
        show(results, facts)


if __name__ == "__main__":
    main()
