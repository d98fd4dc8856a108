"""Every architecture over real processes, worker counts in rotation: the SDK's answers equal transformers'."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch

from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import Client
from collegium.model.architectures import ARCHITECTURES
from collegium.model.manifest import ensure_manifest
from router_svc.model_loader import load_router_model
from tests.checkpoints import Variant
from tests.oracle import Oracle, Reference

MAX_TOKENS = 16
NUM_PROMPTS = 6
WORKER_COUNTS = (1, 2, 3, 5)
ROUNDS = [(arch, WORKER_COUNTS[idx % 4]) for idx, arch in enumerate(sorted(ARCHITECTURES))]
# Room for 7 blocks of 16 tokens: sequences of up to 56 tokens must take turns.
TIGHT = ("--max-batch-tokens", "24", "--max-model-len", "112")


def kv_memory(checkpoint: Path, num_tokens: int) -> str:
    """Bytes of KV cache for so many tokens of a checkpoint."""
    model = load_router_model(checkpoint, torch.float32, torch.device("cpu"))
    return str(model.cache_bytes_per_token() * num_tokens)


@pytest.fixture(params=ROUNDS, ids=[f"{arch}-{num}-workers" for arch, num in ROUNDS])
def served(request: pytest.FixtureRequest, oracle: Oracle, tmp_path: Path) -> Iterator[tuple[Cluster, list[Reference]]]:
    arch, num_workers = request.param
    checkpoint = oracle.checkpoint(arch, Variant.SHARDED if num_workers % 2 else Variant.BASE)
    references = oracle.choose_prompts(checkpoint, NUM_PROMPTS, MAX_TOKENS)
    spec = ClusterSpec(
        model=checkpoint,
        manifest=ensure_manifest(checkpoint, out=tmp_path / "manifest.json"),
        num_workers=num_workers,
        num_routers=1,
        log_level="warning",
        can_restart=False,
        flags={"router": (*TIGHT, "--kv-memory", kv_memory(checkpoint, 112))},
    )
    with Cluster(spec) as cluster:
        yield cluster, references


def test_the_cluster_answers_as_transformers_does(served: tuple[Cluster, list[Reference]]) -> None:
    cluster, references = served
    started = [Event() for _ in references]

    def ask(idx: int) -> list[tuple[list[int], list[float]]]:
        if idx:
            assert started[idx - 1].wait(60)  # staggered: each begins once the one before has its first token
        answers: list[tuple[list[int], list[float]]] = [([], []) for _ in range(2 if idx == 2 else 1)]
        stream = client.generate(
            prompt_ids=references[idx].prompt_ids,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            logprobs=0,
            n=len(answers),
        )
        for chunk in stream:
            started[idx].set()
            answers[chunk.choice_index][0].extend(chunk.token_ids)
            answers[chunk.choice_index][1].extend(p.chosen for p in chunk.logprobs)
        return answers

    with Client(cluster.targets) as client, ThreadPoolExecutor(len(references)) as pool:
        answers = list(pool.map(ask, range(len(references))))
        router = _counters(client, "router")
    for reference, choices in zip(references, answers, strict=True):
        for token_ids, logprobs in choices:
            assert token_ids == reference.token_ids
            assert logprobs == pytest.approx(reference.logprobs, abs=1e-4)
    assert router["collegium_preemptions_total"] > 0
    assert router['collegium_steps_total{kind="mixed"}'] > 0


def _counters(client: Client, role: str) -> dict[str, float]:
    """Counters of the first member of a role, once its lease has reported them."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for member in client.get_cluster().members:
            has_all = member.counters.get("collegium_generation_tokens_total") == MAX_TOKENS * (NUM_PROMPTS + 1)
            if member.role == role and has_all:
                return dict(member.counters)
        Event().wait(0.2)
    raise AssertionError(f"no {role} reported its counters")
