"""The machinery is real, read off its counters: batching, prefix reuse, joined rows, cancellation, nothing left."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.one_process import OneProcess, Request
from collegium.buffering.traces import read_trace
from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import AsyncClient, Client
from collegium.model.manifest import ensure_manifest
from collegium.model.sampling import SamplingParams
from router_svc.news import Load, News
from router_svc.sequence import Finish, Sequence, StopRules
from tests.oracle import Oracle

LONG = 300
PREFIX = [20 + i * 7 % 280 for i in range(200)]
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def cluster(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two routers and two workers."""
    checkpoint = oracle.checkpoint("mixtral")
    manifest = ensure_manifest(checkpoint, out=tmp_path_factory.mktemp("machinery") / "manifest.json")
    spec = ClusterSpec(
        model=checkpoint,
        manifest=manifest,
        num_workers=2,
        num_routers=2,
        log_level="warning",
        can_restart=False,
        flags={"gateway": ("--max-requests", "128")},
    )
    with Cluster(spec) as running:
        yield running


def read_metrics(cluster: Cluster, role: str) -> dict[str, float]:
    """Sum every series of a role's members, read from their metrics pages."""
    with Client(cluster.targets) as client:
        urls = [m.metrics_url for m in client.get_cluster().members if m.role == role]
    totals: dict[str, float] = {}
    for url in urls:
        with urllib.request.urlopen(url, timeout=10) as page:
            for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", page.read().decode(), re.MULTILINE):
                totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll a counter that another process owns."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.1)):
        if condition():
            return
        pause.wait(0.1)
    raise AssertionError(f"not within {PATIENCE_S} s")


def test_a_request_beside_eight_that_decode_has_its_first_token_before_any_of_them_ends(cluster: Cluster) -> None:
    events: list[str] = []
    started = [threading.Event() for _ in range(8)]

    def grow(idx: int) -> None:
        for _ in client.generate(prompt_ids=[30 + idx, 40, 50], max_tokens=LONG, ignore_eos=True):
            started[idx].set()
        events.append("end")

    with Client(cluster.targets) as client, ThreadPoolExecutor(8) as pool:
        growing = [pool.submit(grow, idx) for idx in range(8)]
        assert all(event.wait(PATIENCE_S) for event in started)
        for _ in client.generate(prompt_ids=[60, 70], max_tokens=1):
            events.append("first token")
        for one in growing:
            one.result()
    assert events[0] == "first token"


def test_a_repeated_prefix_of_200_tokens_prefills_at_most_one_block_and_its_tail(cluster: Cluster) -> None:
    with Client(cluster.targets) as client:
        first = client.complete(prompt_ids=[*PREFIX, 11, 12, 13], max_tokens=2, ignore_eos=True)
        before = read_metrics(cluster, "router")["collegium_prefilled_tokens_total"]
        tail = [15, 16, 17, 18, 19]
        again = client.complete(prompt_ids=[*PREFIX, *tail], max_tokens=1, ignore_eos=True)
        prefilled = read_metrics(cluster, "router")["collegium_prefilled_tokens_total"] - before
    assert first.usage.cached_prompt_tokens == 0
    assert again.usage.cached_prompt_tokens >= len(PREFIX) - 16
    assert len(tail) <= prefilled <= 16 + len(tail)


def test_rows_of_two_routers_are_joined_in_one_expert_call(cluster: Cluster) -> None:
    def joined() -> bool:
        with Client(cluster.targets) as client, ThreadPoolExecutor(16) as pool:
            prompts = [[30 + idx, 41, 52] for idx in range(16)]
            list(pool.map(lambda ids: client.complete(prompt_ids=ids, max_tokens=64, ignore_eos=True), prompts))
        return read_metrics(cluster, "worker")["collegium_joined_dispatches_total"] > 0

    wait_until(joined)


def test_a_trace_of_the_cluster_holds_the_choices_of_every_router(cluster: Cluster, tmp_path: Path) -> None:
    out, target = tmp_path / "out.csv", ",".join(cluster.targets)
    argv = (sys.executable, "-m", "collegium", "trace", str(out), "--target", target, "--tokens", "400")
    prompts = [[60 + idx, 43, 54] for idx in range(8)]  # more than one router would take alone
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as tracing, Client(cluster.targets) as client:
        with ThreadPoolExecutor(len(prompts)) as pool:
            while tracing.poll() is None:
                list(pool.map(lambda ids: client.complete(prompt_ids=ids, max_tokens=16, ignore_eos=True), prompts))
        assert tracing.stderr is not None
        said = tracing.stderr.read()
    assert tracing.returncode == 0, said
    assert "what 2 router(s) choose" in said
    trace = read_trace(out)
    of_first_layer = (trace.layer == 0) & (trace.slot == 0)
    assert of_first_layer.sum() >= 400
    assert len(trace) == of_first_layer.sum() * 3 * 2
    tokens = set(zip(trace.turn[of_first_layer].tolist(), trace.step[of_first_layer].tolist(), strict=True))
    assert len(tokens) == of_first_layer.sum()  # sequences of different routers are different turns


def test_a_thousand_cancelled_requests_leave_no_block_thread_file_or_task(cluster: Cluster) -> None:
    names = [member.name for member in cluster.members if member.role in ("gateway", "router", "worker")]

    def held() -> dict[str, tuple[int, int]]:
        return {name: (_count(cluster.pid(name), "fd"), _count(cluster.pid(name), "task")) for name in names}

    async def cancel_many(num_requests: int) -> None:
        async with AsyncClient(cluster.targets) as client:
            gate = asyncio.Semaphore(50)

            async def one(idx: int) -> None:
                async with gate:
                    stream = client.generate(prompt_ids=[30 + idx % 200, 41], max_tokens=LONG, ignore_eos=True)
                    async with stream:
                        first = asyncio.ensure_future(anext(stream))
                        if idx % 2:
                            await first  # cancelled while it grows
                        else:
                            await asyncio.sleep(0.002)  # cancelled on its way, wherever that is
                            first.cancel()
                            await asyncio.gather(first, return_exceptions=True)

            await asyncio.gather(*(one(idx) for idx in range(num_requests)))

    asyncio.run(cancel_many(100))  # what is made once and kept is there now
    wait_until(lambda: _is_idle(cluster))
    before = held()
    asyncio.run(cancel_many(1000))
    wait_until(lambda: _is_idle(cluster))
    wait_until(lambda: all(held()[n][0] <= before[n][0] + 2 and held()[n][1] <= before[n][1] + 2 for n in names))


def _is_idle(cluster: Cluster) -> bool:
    router, gateway = read_metrics(cluster, "router"), read_metrics(cluster, "gateway")
    running = router["collegium_num_requests_running"] + router["collegium_num_requests_waiting"]
    return running == 0 and router["collegium_kv_cache_usage_perc"] == 0 and gateway["collegium_queued_tokens"] == 0


def _count(pid: int, what: str) -> int:
    return len(os.listdir(f"/proc/{pid}/{what}"))


def test_a_cancelled_sequence_gives_its_blocks_back_within_one_step(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("mixtral")
    seen: list[tuple[int, bool, Load]] = []
    done = threading.Event()
    with OneProcess(checkpoint, num_workers=1) as cluster:
        engine = cluster.engine

        def deliver(owner: int, news: list[News], load: Load, step: int) -> None:
            for item in news:
                ended = item.sequence.finish is Finish.CANCELLED
                seen.append((step, ended, load))
                if len(seen) == 3:
                    engine.commands.cancel(7, [("doomed", None)])
                if ended:
                    done.set()

        engine._news.deliver = deliver  # the engine's thread has nothing to report yet
        engine.commands.attach(7)
        sampling, rules = SamplingParams(), StopRules(max_tokens=LONG)
        engine.commands.submit(
            [Sequence(owner=7, request_id="doomed", choice_index=0, prompt_ids=[9, 10], sampling=sampling, rules=rules)]
        )
        assert done.wait(PATIENCE_S)
    (cancelled_at, _, _), (ended_at, _, load) = seen[2], seen[-1]
    assert ended_at <= cancelled_at + 1
    assert load.free_blocks == load.total_blocks


def test_every_choice_of_a_request_shares_the_prompt_that_the_first_one_computed(oracle: Oracle) -> None:
    checkpoint: Path = oracle.checkpoint("mixtral")
    with OneProcess(checkpoint, num_workers=1) as cluster:
        cluster.run([Request(prompt_ids=PREFIX, max_tokens=4, num_choices=8)])
        assert cluster.engine.totals.prefilled_tokens <= len(PREFIX) + 7 * 16


def test_a_router_is_idle_only_when_the_end_of_every_sequence_was_delivered(oracle: Oracle) -> None:
    idle: list[bool] = []
    done = threading.Event()
    with OneProcess(oracle.checkpoint("mixtral"), num_workers=1) as cluster:
        engine = cluster.engine

        def deliver(owner: int, news: list[News], load: Load, step: int) -> None:
            if news:
                idle.append(engine.commands.wait_idle(0.0))
                if news[0].sequence.has_ended:
                    done.set()

        engine._news.deliver = deliver  # the engine's thread has nothing to report yet
        engine.commands.attach(7)
        assert engine.commands.wait_idle(PATIENCE_S)
        rules = StopRules(max_tokens=3)
        engine.commands.submit(
            [Sequence(owner=7, request_id="r", choice_index=0, prompt_ids=[9], sampling=SamplingParams(), rules=rules)]
        )
        assert not engine.commands.wait_idle(0.0) or done.is_set()  # what waits to be taken counts as well
        assert done.wait(PATIENCE_S)
        assert engine.commands.wait_idle(PATIENCE_S)
    assert idle == [False] * 3
