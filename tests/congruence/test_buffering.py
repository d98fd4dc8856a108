"""Workers that hold few of their experts answer as those that hold all: policies, budgets, tiers, hints and faults."""

import functools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.one_process import Answer, OneProcess, Request
from collegium.buffering.policies import ExpertId
from collegium.fabric.byte_size import MemoryBudget
from collegium.model.experts import PackedExpert
from collegium.model.manifest import build_manifest
from expert_svc.budget import plan_memory
from expert_svc.buffer import BufferTotals, ExpertBuffer, Visit
from expert_svc.memory import bytes_of
from expert_svc.tiers import Source, Tier
from router_svc.model_loader import load_router_model
from router_svc.router_model import RouterModel
from tests.checkpoints import MAX_LENGTH
from tests.oracle import Oracle

MAX_TOKENS = 16
NUM_PROMPTS = 6
DEMO = Path(__file__).parents[2] / "models" / "demo-lm"


@functools.lru_cache(maxsize=2)
def loaded(checkpoint: Path) -> RouterModel:
    """Load a router's model once for several clusters."""
    return load_router_model(checkpoint, torch.float32, torch.device("cpu"))


def floor_of(checkpoint: Path, *, has_arena: bool) -> str:
    """The smallest budget that a worker takes, in bytes."""
    model, host = bytes_of(build_manifest(checkpoint), torch.float32), MemoryBudget(share=1.0 if has_arena else 0.0)
    return str(plan_memory(model, MemoryBudget(), host, num_staging_sets=2).least_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How the workers of a cluster are set up."""

    arch: str
    policy: str = "ewma"
    expert_memory: str = "floor"
    host_memory: str = ""
    can_prefetch: bool = True
    num_workers: int = 1
    num_load_threads: int = 2
    slow_s: float = 0.0  # added to each load

    def __str__(self) -> str:
        """Name the case."""
        prefetch = "prefetch" if self.can_prefetch else "no-prefetch"
        memories = f"{self.expert_memory or 'all'}-over-{self.host_memory or 'disk'}"
        return f"{self.arch}-{self.policy}-{memories}-{prefetch}-{self.num_workers}{'-slow' if self.slow_s else ''}"


class Between:
    """Stands between slots and tiers: delays loads, and fails them where it is told to."""

    def __init__(self, inner: Source, slow_s: float = 0.0):
        self._inner, self._slow_s = inner, slow_s
        self.fills: list[ExpertId] = []
        self.failing: set[ExpertId] = set()  # once each
        self._lock = threading.Lock()

    def fill(self, expert_id: ExpertId, slot: PackedExpert) -> Tier:
        if self._slow_s:
            time.sleep(self._slow_s)
        with self._lock:
            self.fills.append(expert_id)
            if expert_id in self.failing:
                self.failing.remove(expert_id)
                raise OSError("the disk did not answer")
        return self._inner.fill(expert_id, slot)


SETUPS = [
    Setup(arch="mixtral", policy="lifo"),
    Setup(arch="mixtral", policy="fifo", expert_memory="12.5%", host_memory="40%", num_workers=3),
    Setup(arch="mixtral", policy="ewma", expert_memory="12.5%", host_memory="100%", num_load_threads=1),
    Setup(arch="olmoe", policy="ewma", expert_memory="12.5%", num_workers=3),
    Setup(arch="olmoe", policy="lru", expert_memory="50%", host_memory="100%"),
    Setup(arch="olmoe", policy="lfu", expert_memory="50%", can_prefetch=False, slow_s=0.001),
    Setup(arch="gpt_oss", policy="lifo", expert_memory="12.5%", host_memory="100%", num_workers=3),
    Setup(arch="gpt_oss", policy="ewma", expert_memory="50%", slow_s=0.001),
    Setup(arch="dbrx", policy="lru", expert_memory="floor", host_memory="40%", can_prefetch=False, num_workers=3),
    Setup(arch="dbrx", policy="lfu", expert_memory="50%", host_memory="100%"),
    Setup(arch="granitemoe", policy="fifo", expert_memory="floor", can_prefetch=False),
    Setup(arch="granitemoe", policy="ewma", expert_memory="100%", num_workers=3),
    Setup(arch="granitemoe", policy="lfu", expert_memory="", host_memory="40%"),
]


def cluster_of(checkpoint: Path, setup: Setup, wrap: Callable[[Source], Source] | None = None) -> OneProcess:
    """Start a cluster; all that use one checkpoint share the router's model, so one at a time."""
    memory = setup.expert_memory
    if memory == "floor":
        memory = floor_of(checkpoint, has_arena=bool(setup.host_memory))
    return OneProcess(
        checkpoint,
        model=loaded(checkpoint),
        num_workers=setup.num_workers,
        max_batch_tokens=24,
        expert_memory=memory,
        host_memory=setup.host_memory,
        policy=setup.policy,
        num_load_threads=setup.num_load_threads,
        can_prefetch=setup.can_prefetch,
        wrap_source=wrap or (lambda source: Between(source, setup.slow_s)),
    )


def totals_of(cluster: OneProcess) -> list[BufferTotals]:
    """What each worker's buffer counted."""
    return [buffer.totals for buffer in cluster.buffers]


def test_the_setups_cover_what_they_should() -> None:
    assert {setup.policy for setup in SETUPS} == {"lifo", "fifo", "lru", "lfu", "ewma"}
    assert {setup.expert_memory for setup in SETUPS} == {"floor", "12.5%", "50%", "100%", ""}
    assert {setup.host_memory for setup in SETUPS} == {"", "40%", "100%"}
    assert {(setup.can_prefetch, setup.num_workers) for setup in SETUPS} == {
        (p, n) for p in (True, False) for n in (1, 3)
    }


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_tokens_and_logprobs_equal_transformers(setup: Setup, oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint(setup.arch)
    references = oracle.choose_prompts(checkpoint, NUM_PROMPTS, MAX_TOKENS)[:3]
    requests = [
        Request(prompt_ids=reference.prompt_ids, max_tokens=MAX_TOKENS, num_logprobs=0, after_tokens=6 * idx)
        for idx, reference in enumerate(references)
    ]
    with cluster_of(checkpoint, setup) as cluster:
        answers = cluster.run(requests)
        totals, loops = totals_of(cluster), [worker.counters for worker in cluster.workers]
        fit = [buffer.max_resident or 99 for buffer in cluster.buffers]
        homes = [len(list(cluster.placement.experts_of(f"worker-{idx}"))) for idx in range(setup.num_workers)]
        held = [(buffer.resident_bytes, buffer.budget_bytes) for buffer in cluster.buffers]
        calls = cluster.calls.totals
    assert calls.native_exchanges >= 99 * calls.python_exchanges  # whatever the budget, the policy, and hints
    assert all(loop.num_native_answers > 0 == loop.num_python_answers for loop in loops)
    for reference, (answer,) in zip(references, answers, strict=True):
        assert answer.failure == ""
        assert answer.token_ids == reference.token_ids
        assert [p.chosen for p in answer.logprobs] == pytest.approx(reference.logprobs, abs=1e-4)
    assert sum(one.requests for one in totals) == sum(loop.num_expert_calls for loop in loops) > 0
    assert all(resident <= budget for resident, budget in held) or not setup.expert_memory
    for one, num_homes, num_fit in zip(totals, homes, fit, strict=True):
        assert (one.misses > 0) == (one.evictions + one.streamed > 0) == (num_homes > num_fit)
    if not setup.can_prefetch:
        assert sum(one.prefetched for one in totals) == 0


def failures_of(answers: Sequence[Sequence[Answer]]) -> list[str]:
    """What each answer says of its failure."""
    return [answer.failure for (answer,) in answers]


def test_a_read_that_fails_once_costs_at_most_the_request_that_needed_it(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("olmoe")
    references = oracle.choose_prompts(checkpoint, NUM_PROMPTS, MAX_TOKENS)[:4]
    requests = [Request(prompt_ids=reference.prompt_ids, max_tokens=MAX_TOKENS) for reference in references]
    between: list[Between] = []

    def wrap(source: Source) -> Source:
        between.append(Between(source))
        return between[-1]

    with cluster_of(checkpoint, Setup(arch="olmoe", expert_memory="12.5%", num_workers=2), wrap) as cluster:
        for one in between:
            one.failing = {(1, expert) for expert in range(16)}
        alone = cluster.run(requests[:1])
        for one in between:
            one.failing = {(0, 5), (2, 5)}
        together = cluster.run(requests)
        for one in between:
            one.failing.clear()
        after = cluster.run(requests)
        loops = [worker.counters for worker in cluster.workers]
        are_alive = [worker.is_alive for worker in cluster.workers]
    assert "of MoE layer 1 cannot be loaded: the disk did not answer" in alone[0][0].failure
    for (answer,), reference in zip(together, references, strict=True):
        assert answer.failure or answer.token_ids == reference.token_ids
        assert answer.token_ids == reference.token_ids[: len(answer.token_ids)]
        assert not answer.failure or "cannot be loaded" in answer.failure
    assert not all(failures_of(together))
    assert [answer.token_ids for (answer,) in after] == [reference.token_ids for reference in references]
    assert sum(loop.num_failed for loop in loops) > 1
    assert all(are_alive)


def test_a_tensor_that_is_damaged_on_the_disk_fails_by_name_whoever_needs_it_and_no_others(
    oracle: Oracle, tmp_path: Path
) -> None:
    source = oracle.checkpoint("mixtral")
    checkpoint = tmp_path / "damaged"
    checkpoint.mkdir()
    for file in source.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    requests = [Request(prompt_ids=[9 + 3 * i, 40 + i], max_tokens=2) for i in range(16)]
    setup = Setup(arch="mixtral", expert_memory="25%", num_workers=2)
    with cluster_of(source, setup) as cluster:
        whole = cluster.run(requests)
    with cluster_of(checkpoint, setup) as cluster:
        damaged = next((1, e) for e in range(8) if not any(b.is_resident((1, e)) for b in cluster.buffers))
        ref = cluster.manifest.layers[1].experts[damaged[1]].tensors[0]
        with (checkpoint / ref.file).open("r+b") as file:
            file.seek(ref.offset)
            file.write(b"\x55" * 64)
        answers = [cluster.run([request])[0] for request in requests[:8]] + cluster.run(requests[8:])
    failures = failures_of(answers)
    assert any(failures) and not all(failures)
    for (answer,), (expected,) in zip(answers, whole, strict=True):
        assert answer.failure or answer.token_ids == expected.token_ids
        assert answer.token_ids == expected.token_ids[: len(answer.token_ids)]
        assert not answer.failure or f"expert {damaged[1]} of MoE layer 1 does not match its checksum" in answer.failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What one visit did to residency."""

    layer: int
    of_decode: set[int]
    num_missed: int  # of those
    came: set[ExpertId]
    gone: set[ExpertId]


def watch(buffer: ExpertBuffer) -> list[Change]:
    """Note what each visit does to residency from now on."""
    changes: list[Change] = []
    begin, finish = buffer.begin, buffer.finish
    before: set[ExpertId] = set()
    of_decode: set[int] = set()

    def residents() -> set[ExpertId]:
        return {(layer, expert) for layer, experts in buffer.residency().items() for expert in experts}

    def begun(layer: int, experts: Sequence[int], decode_counts: Sequence[int], num_decode_rows: int) -> Visit:
        nonlocal before, of_decode
        before = residents()
        of_decode = {expert for expert, count in zip(experts, decode_counts, strict=True) if count}
        return begin(layer, experts, decode_counts, num_decode_rows)

    def finished(visit: Visit) -> None:
        finish(visit)
        after, missed = residents(), len(of_decode.intersection(visit.missed))
        layer, came, gone = visit.layer, after - before, before - after
        changes.append(Change(layer=layer, of_decode=of_decode, num_missed=missed, came=came, gone=gone))

    buffer.begin, buffer.finish = begun, finished  # type: ignore[method-assign]
    return changes


def test_a_prompt_of_full_length_displaces_nothing_that_decoding_uses(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("olmoe")
    references = oracle.choose_prompts(checkpoint, NUM_PROMPTS, MAX_TOKENS)[:2]
    decoding = [Request(prompt_ids=one.prompt_ids, max_tokens=50) for one in references]
    longest = Request(prompt_ids=[8 + 7 * i % 300 for i in range(MAX_LENGTH - 1)], max_tokens=1, after_tokens=10)
    setup = Setup(arch="olmoe", expert_memory="50%", host_memory="100%", can_prefetch=False)
    answers: list[list[list[Answer]]] = []
    hits: list[float] = []
    for requests in (decoding, [*decoding, longest]):
        with cluster_of(checkpoint, setup) as cluster:
            (buffer,) = cluster.buffers
            num_full = buffer.num_resident
            changes = watch(buffer)
            answers.append(cluster.run(requests))
            assert num_full == buffer.num_resident == buffer.max_resident
            assert cluster.engine.totals.prefilled_tokens >= sum(len(request.prompt_ids) for request in requests)
        of_decode = [change for change in changes if change.of_decode]
        hits.append(1 - sum(c.num_missed for c in of_decode) / sum(len(c.of_decode) for c in of_decode))
        assert len(of_decode) >= 3 * 45
        for change in changes:
            asked = {(change.layer, expert) for expert in change.of_decode}
            assert change.came <= asked  # what prompts alone asked for did not stay
            assert len(change.gone) == len(change.came) <= change.num_missed
            assert not change.gone & asked
    assert [a.token_ids for (a,) in answers[1][:-1]] == [a.token_ids for (a,) in answers[0]]
    assert hits[1] > hits[0] - 0.02


def test_hints_make_slow_loads_begin_before_rows_wait_for_them() -> None:
    requests = [Request(prompt_ids=[100 + 7 * i for i in range(8)], max_tokens=24)]
    found: list[BufferTotals] = []
    tokens: list[list[int]] = []
    for can_prefetch in (False, True):
        setup = Setup(arch="", expert_memory="50%", host_memory="100%", can_prefetch=can_prefetch, slow_s=0.005)
        with cluster_of(DEMO, setup) as cluster:
            ((answer,),) = cluster.run(requests)
            tokens.append(answer.token_ids)
            found += totals_of(cluster)
            hinted = cluster.calls.totals
    without, with_hints = found
    assert tokens[0] == tokens[1]
    assert hinted.hinted_right > 0.5 * hinted.hinted > 0
    assert with_hints.prefetch_useful > with_hints.prefetch_late > 0
    assert with_hints.misses - with_hints.prefetch_late < 0.85 * without.misses  # what rows wait for from the start
