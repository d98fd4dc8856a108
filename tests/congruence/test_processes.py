"""Every architecture over real processes, worker counts in rotation: the SDK's answers equal transformers'."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TypeAlias

import pytest
import torch

from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.client import Client
from collegium.model.manifest import ensure_manifest
from router_svc.model_loader import load_router_model
from tests.checkpoints import DECODERS, Variant
from tests.oracle import Oracle, Reference

MAX_TOKENS = 16
NUM_PROMPTS = 6
MOST_ROUNDS = 20
WORKER_COUNTS = (1, 2, 1, 1, 2, 3, 2, 1, 1, 5, 1, 2, 1, 3, 2)  # a worker takes seconds of a core to start
ROUNDS = list(zip(DECODERS, WORKER_COUNTS, strict=True))
# Room for 7 blocks of 16 tokens: sequences of up to 56 tokens must take turns.
TIGHT = ("--max-batch-tokens", "24", "--max-model-len", "112")
# Workers that hold few of the model's experts at a time; the others hold all their homes.
MEMORY = {
    "dbrx": ("--expert-memory", "25%", "--host-memory", "100%", "--eviction", "lru"),
    "deepseek_v3": ("--expert-memory", "25%"),
    "gpt_oss": ("--expert-memory", "25%", "--host-memory", "40%", "--eviction", "lifo", "--prefetch", "off"),
    "olmoe": ("--expert-memory", "25%", "--prefetch", "on"),
}

SHARES = {"glm4_moe"}  # whose shared experts lie on workers

Served: TypeAlias = tuple[Cluster, list[Reference], bool]  # with the prompts to ask, and whether its slots are few


def kv_memory(checkpoint: Path, num_tokens: int) -> str:
    """Bytes of KV cache for so many tokens of a checkpoint."""
    model = load_router_model(checkpoint, torch.float32, torch.device("cpu"))
    return str(model.cache_bytes_per_token() * num_tokens)


# What these do over processes, others of their family do too; in one process all of them are in `make test`.
SOAKED = {"dots1", "ernie4_5_moe", "hunyuan_v1_moe", "mixtral", "olmoe", "phimoe", "qwen2_moe"}


@pytest.fixture(
    params=[
        pytest.param((arch, num), id=f"{arch}-{num}-workers", marks=[pytest.mark.soak] if arch in SOAKED else [])
        for arch, num in ROUNDS
    ]
)
def served(request: pytest.FixtureRequest, oracle: Oracle, tmp_path: Path) -> Iterator[Served]:
    arch, num_workers = request.param
    checkpoint = oracle.checkpoint(arch, Variant.SHARDED if num_workers % 2 else Variant.BASE)
    references = oracle.choose_prompts(checkpoint, NUM_PROMPTS, MAX_TOKENS)
    spec = ClusterSpec(
        model=checkpoint,
        manifest=ensure_manifest(checkpoint, out=tmp_path / "manifest.json", shares=arch in SHARES),
        num_workers=num_workers,
        num_routers=1,
        log_level="warning",
        can_restart=False,
        flags={"router": (*TIGHT, "--kv-memory", kv_memory(checkpoint, 112)), "worker": MEMORY.get(arch, ())},
    )
    with Cluster(spec) as cluster:
        yield cluster, references, arch in MEMORY


def test_the_cluster_answers_as_transformers_does(served: Served) -> None:
    cluster, references, has_few_slots = served
    started: list[Event] = []

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

    answers: list[list[tuple[list[int], list[float]]]] = []
    router: dict[str, float] = {}
    with Client(cluster.targets) as client, ThreadPoolExecutor(len(references)) as pool:
        # A model may be done with one before the next comes; whether they met in the cache, the router says.
        for round_number in range(1, MOST_ROUNDS + 1):
            started[:] = [Event() for _ in references]
            answers += pool.map(ask, range(len(references)))
            sampled = MAX_TOKENS * (NUM_PROMPTS + 1) * round_number
            router = _counters(client, "router", "collegium_sampled_tokens_total", sampled)
            if router["collegium_num_preemptions_total"]:
                break
        worker = _counters(client, "worker", "collegium_expert_misses_total", 1 if has_few_slots else 0)
    for reference, choices in zip(references * (len(answers) // len(references)), answers, strict=True):
        for token_ids, logprobs in choices:
            assert token_ids == reference.token_ids
            assert logprobs == pytest.approx(reference.logprobs, abs=1e-4)
    assert router["collegium_num_preemptions_total"] > 0
    assert router['collegium_steps_total{kind="mixed"}'] > 0
    assert not has_few_slots or worker["collegium_resident_bytes"] <= worker["collegium_expert_memory_bytes"]


def _counters(client: Client, role: str, name: str, least: int) -> dict[str, float]:
    """Counters of the first member of a role whose lease reports at least so much under a name."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for member in client.get_cluster().members:
            if member.role == role and member.counters.get(name, -1) >= least:
                return dict(member.counters)
        Event().wait(0.2)
    raise AssertionError(f"no {role} reported its counters")
