"""Long runs under faults: one process after another dies while requests stream; nothing is lost, no token changes."""

import os
import random
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
BETWEEN_DEATHS_S = 15.0
VICTIMS = ("worker-0", "worker-1", "router-0", "router-1", "gateway-0", "gateway-1", "balancer", "redis")


@pytest.mark.soak
def test_requests_survive_every_single_death_token_for_token(oracle: Oracle, tmp_path: Path) -> None:
    limit_s = float(os.environ.get("COLLEGIUM_SOAK_S", "600"))
    checkpoint = oracle.checkpoint("qwen3_moe")
    references = oracle.choose_prompts(checkpoint, 8, MAX_TOKENS)
    spec = ClusterSpec(
        model=checkpoint,
        manifest=ensure_manifest(checkpoint, out=tmp_path / "manifest.json"),
        num_workers=2,
        num_routers=2,
        num_gateways=2,
        log_level="warning",
    )
    stopping = threading.Event()
    num_done = [0] * 4

    def ask(lane: int) -> None:
        with Client(cluster.targets, timeout_s=120.0) as client:
            while not stopping.is_set():
                reference = references[(num_done[lane] + lane) % len(references)]
                answer = client.complete(prompt_ids=reference.prompt_ids, max_tokens=MAX_TOKENS, ignore_eos=True)
                assert list(answer.token_ids) == reference.token_ids
                num_done[lane] += 1

    draw = random.Random(0)
    with Cluster(spec) as cluster, ThreadPoolExecutor(len(num_done)) as pool:
        lanes = [pool.submit(ask, lane) for lane in range(len(num_done))]
        try:
            until = time.monotonic() + limit_s
            while time.monotonic() < until and not any(lane.done() for lane in lanes):
                victim = draw.choice(VICTIMS)
                starts = cluster.num_starts(victim)
                cluster.kill(victim)
                cluster.wait_until(lambda name=victim, before=starts: cluster.num_starts(name) > before, 60.0)
                cluster.wait_until_serving(limit_s=90.0)
                pause = time.monotonic() + BETWEEN_DEATHS_S
                cluster.wait_until(lambda at=pause: time.monotonic() > at, BETWEEN_DEATHS_S + 5)
        finally:
            stopping.set()
        for lane in lanes:
            lane.result(timeout=180)
    assert min(num_done) > 0
