"""A long time without balancer and Redis: nothing is lost, no token changes, both heal."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import Client
from collegium.model.manifest import ensure_manifest
from tests.oracle import Oracle

MAX_TOKENS = 40
OUTAGE_S = 60.0


@pytest.mark.soak
@pytest.mark.parametrize("away", [("redis",), ("balancer",), ("balancer", "redis")], ids=" and ".join)
def test_a_minute_without_them_loses_no_request(oracle: Oracle, tmp_path: Path, away: tuple[str, ...]) -> None:
    checkpoint = oracle.checkpoint("qwen3_moe")
    references = oracle.choose_prompts(checkpoint, 8, MAX_TOKENS)
    spec = ClusterSpec(
        model=checkpoint,
        manifest=ensure_manifest(checkpoint, out=tmp_path / "manifest.json"),
        log_level="warning",
        flags={"balancer": ("--rebalance-s", "2", "--window-s", "1")},
    )
    stopping = threading.Event()
    num_done = [0] * 3

    def ask(lane: int) -> None:
        with Client(cluster.targets, timeout_s=120.0) as client:
            while not stopping.is_set():
                reference = references[(num_done[lane] + lane) % len(references)]
                answer = client.complete(prompt_ids=reference.prompt_ids, max_tokens=MAX_TOKENS, ignore_eos=True)
                assert list(answer.token_ids) == reference.token_ids
                num_done[lane] += 1

    def pause(seconds: float) -> None:
        until = time.monotonic() + seconds
        cluster.wait_until(lambda: time.monotonic() > until, seconds + 10)

    with Cluster(spec) as cluster, ThreadPoolExecutor(len(num_done)) as pool:
        lanes = [pool.submit(ask, lane) for lane in range(len(num_done))]
        try:
            pause(3)
            for name in away:
                cluster.kill(name, signal.SIGSTOP)
            before = sum(num_done)
            pause(OUTAGE_S)
            assert sum(num_done) > before
            with Client(cluster.targets, timeout_s=10.0) as client:
                assert bool(client.get_cluster().stale_ms) == ("balancer" in away)
            for name in away:
                cluster.kill(name, signal.SIGCONT)
            cluster.wait_until_serving(limit_s=60.0)
            with Client(cluster.targets, timeout_s=10.0) as client:
                cluster.wait_until(
                    lambda: not client.get_cluster().stale_ms and client.get_cluster().balance.has_memory,
                    60.0,
                    "healing",
                )
        finally:
            stopping.set()
        for lane in lanes:
            lane.result(timeout=180)
