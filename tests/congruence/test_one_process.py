"""The data path in one process answers as plain transformers does: every architecture at every worker count."""

import functools
import itertools
from pathlib import Path

import pytest
import torch

from benchmarks.one_process import OneProcess, Request
from collegium.model.sampling import SamplingParams
from router_svc.expert_calls import ExpertsUnavailableError
from router_svc.model_loader import load_router_model
from router_svc.router_model import RouterModel
from tests.checkpoints import DECODERS, Variant
from tests.oracle import Oracle
from tests.poison import poisoned

MAX_TOKENS = 16
NUM_PROMPTS = 6


@functools.lru_cache(maxsize=2)
def loaded(checkpoint: Path) -> RouterModel:
    """Load a router's model once for all worker counts."""
    return load_router_model(checkpoint, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
@pytest.mark.parametrize("arch", DECODERS)
def test_tokens_and_logprobs_equal_transformers_under_preemption_and_staggered_arrivals(
    arch: str, num_workers: int, oracle: Oracle
) -> None:
    checkpoint = oracle.checkpoint(arch, Variant.OTHER if num_workers % 2 == 0 else Variant.BASE)
    references = oracle.choose_prompts(checkpoint, NUM_PROMPTS, MAX_TOKENS)
    requests = [
        Request(
            prompt_ids=reference.prompt_ids,
            max_tokens=MAX_TOKENS,
            num_choices=2 if idx == 2 else 1,
            num_logprobs=0,
            after_tokens=4 * idx,
        )
        for idx, reference in enumerate(references)
    ]
    model = loaded(checkpoint)
    with OneProcess(checkpoint, num_workers=num_workers, kv_tokens=128, max_batch_tokens=24, model=model) as cluster:
        answers = cluster.run(requests)
        num_preemptions, steps = cluster.engine.scheduler.num_preemptions, cluster.engine.totals.steps
        load = cluster.engine.scheduler.load()
        check_all_went_natively(cluster)
    for reference, choices in zip(references, answers, strict=True):
        for answer in choices:
            assert answer.failure == ""
            assert answer.token_ids == reference.token_ids
            assert [p.chosen for p in answer.logprobs] == pytest.approx(reference.logprobs, abs=1e-4)
    assert num_preemptions > 0
    assert steps["mixed"] > 0
    assert load.free_blocks == load.total_blocks


def check_all_went_natively(cluster: OneProcess) -> None:
    """What is proven in bulk is what serves: prompts, mixed steps and decode, whatever the architecture."""
    totals = cluster.calls.totals
    assert totals.native_exchanges > 100 and totals.python_exchanges == 0
    for worker in cluster.workers:
        assert worker.counters.num_native_answers > 0 and worker.counters.num_python_answers == 0


def test_a_score_equals_the_reference_and_is_the_same_in_small_chunks(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("qwen3_moe")
    prompts = [one.prompt_ids for one in oracle.choose_prompts(checkpoint, NUM_PROMPTS, MAX_TOKENS)]
    expected = oracle.score(checkpoint, prompts)
    with OneProcess(checkpoint, num_workers=2, max_batch_tokens=7, kv_tokens=64) as cluster:
        answers = cluster.run([Request(prompt_ids=p, max_tokens=1, is_score=True, num_logprobs=0) for p in prompts])
    for logprobs, (answer,) in zip(expected, answers, strict=True):
        assert [p.chosen for p in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)


def test_seeded_sampling_gives_the_same_tokens_alone_and_in_a_batch_of_32(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("olmoe")
    prompts = [one.prompt_ids for one in oracle.choose_prompts(checkpoint, 8, MAX_TOKENS)]

    def request(idx: int) -> Request:
        params = SamplingParams(
            temperature=0.5 + idx / 16, top_k=idx % 3 * 20, top_p=1 - idx % 4 / 10, repetition_penalty=1.1, seed=idx
        )
        return Request(prompt_ids=prompts[idx % len(prompts)], max_tokens=24, sampling=params)

    with OneProcess(checkpoint, num_workers=2, max_batch_tokens=64) as cluster:
        together = cluster.run([request(idx) for idx in range(32)])
        alone = [cluster.run([request(idx)])[0] for idx in range(32)]
    assert [a[0].token_ids for a in together] == [a[0].token_ids for a in alone]
    assert len({tuple(a[0].token_ids) for a in alone}) > 16  # the seeds matter


def test_the_links_carry_what_the_routing_needs_and_no_more(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("mixtral")
    prompt = [7 + i % 200 for i in range(96)]
    with OneProcess(checkpoint, num_workers=2, max_batch_tokens=96) as cluster:
        chosen = _record_routing(cluster)
        cluster.run([Request(prompt_ids=prompt, max_tokens=1)])
        stats = cluster.calls.link_stats()
    needed = rows = 0
    for layer, ids in chosen:
        for worker in ("worker-0", "worker-1"):
            mine = [[worker in cluster.placement.workers_of(layer, e) for e in token] for token in ids]
            rows += sum(any(token) for token in mine)
            needed += sum(2 * 64 * 4 * any(token) + 8 * sum(token) for token in mine)
    sent = sum(s.bytes_out + s.bytes_back for s in stats.values())
    assert sum(s.rows_out for s in stats.values()) == sum(s.rows_back for s in stats.values()) == rows
    assert needed < sent <= 1.02 * needed


def test_a_worker_without_rows_gets_no_message(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("mixtral")
    with OneProcess(checkpoint, num_workers=5) as cluster:
        chosen = _record_routing(cluster)
        cluster.run([Request(prompt_ids=[11], max_tokens=1)])
        stats = cluster.calls.link_stats()
    for worker, link in stats.items():
        visits = sum(any(worker in cluster.placement.workers_of(layer, e) for e in ids[0]) for layer, ids in chosen)
        assert link.dispatches == visits
    assert sum(link.dispatches for link in stats.values()) < 5 * len(chosen)


def _record_routing(cluster: OneProcess) -> list[tuple[int, list[list[int]]]]:
    chosen: list[tuple[int, list[list[int]]]] = []
    compute = cluster.calls.compute

    def recorded(layer, x, ids, weights):  # type: ignore[no-untyped-def]
        chosen.append((layer, ids.tolist()))
        return compute(layer, x, ids, weights)

    cluster.model.set_expert_call(recorded)
    return chosen


def test_the_router_holds_no_expert_and_a_worker_holds_nothing_else(oracle: Oracle) -> None:
    for arch in ("mixtral", "gpt_oss", "dbrx"):
        checkpoint = oracle.checkpoint(arch)
        with OneProcess(checkpoint, num_workers=2) as cluster:
            names = [name for name, _ in cluster.model.model.named_parameters()]
            held = sum(buffer.resident_bytes for buffer in cluster.buffers)
            experts = 4 * cluster.manifest.num_params * sum(len(x.experts) for x in cluster.manifest.layers)
        assert names
        assert not [name for name in names if "expert" in name]
        assert held == experts


def test_a_corrupt_expert_fails_its_requests_by_name_and_no_others(oracle: Oracle, tmp_path: Path) -> None:
    source = oracle.checkpoint("mixtral")
    checkpoint = tmp_path / "damaged"
    checkpoint.mkdir()
    for file in source.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    reference = oracle.choose_prompts(source, 2, MAX_TOKENS)
    with OneProcess(checkpoint, num_workers=2) as cluster:
        ref = cluster.manifest.layers[1].experts[3].tensors[0]
        with (checkpoint / ref.file).open("r+b") as file:
            file.seek(ref.offset)
            file.write(b"\x55" * 64)
        for buffer in cluster.buffers:
            buffer.release_others([])
        chosen = _record_routing(cluster)
        answers = cluster.run(
            [Request(prompt_ids=reference[0].prompt_ids, max_tokens=MAX_TOKENS)]
            + [Request(prompt_ids=[9 + i], max_tokens=1) for i in range(24)]
        )
        visits_damaged = {layer == 1 and any(3 in token for token in ids) for layer, ids in chosen}
    failures = [choice.failure for choices in answers for choice in choices]
    assert visits_damaged == {True, False}
    assert any(failures) and not all(failures)
    assert all("expert 3 of MoE layer 1" in failure for failure in failures if failure)


@pytest.mark.parametrize(("arch", "num_micro_batches"), [("mixtral", 0), ("mixtral", 4), ("qwen2_moe", 4)])
def test_rows_of_a_worker_that_dies_are_computed_by_another(arch: str, num_micro_batches: int, oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint(arch)
    references = oracle.choose_prompts(checkpoint, 4, MAX_TOKENS)
    with OneProcess(checkpoint, num_workers=3, num_micro_batches=num_micro_batches) as cluster:
        compute, num_calls = cluster.calls.compute, 0

        def dying(layer, x, ids, weights):  # type: ignore[no-untyped-def]
            nonlocal num_calls
            num_calls += 1
            if num_calls in (10, 25):
                cluster.workers[num_calls // 20].stop()
            return compute(layer, x, ids, weights)

        cluster.model.set_expert_call(dying)
        answers = cluster.run([Request(prompt_ids=r.prompt_ids, max_tokens=MAX_TOKENS) for r in references])
        assert cluster.calls.worker_ids == ["worker-2"]
        assert cluster.calls.totals.retries >= 1
    assert [choice.token_ids for (choice,) in answers] == [r.token_ids for r in references]


@pytest.mark.parametrize(("arch", "num_micro_batches"), [("mixtral", 1), ("mixtral", 4), ("deepseek_v2", 1)])
def test_rows_of_a_worker_that_answers_no_numbers_are_computed_by_another(
    arch: str, num_micro_batches: int, oracle: Oracle
) -> None:
    checkpoint = oracle.checkpoint(arch)
    references = oracle.choose_prompts(checkpoint, 4, MAX_TOKENS)
    requests = [Request(prompt_ids=r.prompt_ids, max_tokens=MAX_TOKENS) for r in references]
    with OneProcess(checkpoint, num_workers=3, num_micro_batches=num_micro_batches) as cluster:
        poison = poisoned(cluster.workers[1], cluster.buffers[1], 1)
        poison.extend([1] * 1_000_000)  # again and again
        answers = cluster.run(requests)
        assert cluster.calls.totals.suspect_answers > MAX_TOKENS // 2
        assert len(cluster.calls.worker_ids) == 3
        assert not any(choice.failure for (choice,) in answers)
    assert [choice.token_ids for (choice,) in answers] == [r.token_ids for r in references]


def test_where_nobody_answers_numbers_the_request_fails_and_what_begins_alike_does_not(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("mixtral")
    (reference,) = oracle.choose_prompts(checkpoint, 1, MAX_TOKENS, lengths=(70,))
    request = Request(prompt_ids=reference.prompt_ids, max_tokens=MAX_TOKENS)
    with OneProcess(checkpoint, num_workers=1) as cluster:
        poison = poisoned(cluster.workers[0], cluster.buffers[0], 1)
        poison.extend([1] * 1_000)
        ((failed,),) = cluster.run([request])
        poison.clear()
        ((answer,),) = cluster.run([request])
    assert "no numbers" in failed.failure
    assert answer.token_ids == reference.token_ids


def test_one_long_request_beside_many_short_ones_changes_nothing(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("deepseek_v2")
    lengths = (230, 9, 12, 70)
    references = oracle.choose_prompts(checkpoint, 4, MAX_TOKENS, lengths=lengths)
    with OneProcess(checkpoint, num_workers=2) as cluster:
        answers = cluster.run([Request(prompt_ids=r.prompt_ids, max_tokens=MAX_TOKENS) for r in references])
    assert [choice.token_ids for (choice,) in answers] == [r.token_ids for r in references]


@pytest.mark.parametrize(("arch", "num_micro_batches"), [*zip(DECODERS, itertools.cycle([2, 3, 4]))])
def test_micro_batches_change_no_token(arch: str, num_micro_batches: int, oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint(arch, Variant.OTHER if num_micro_batches == 3 else Variant.BASE)
    references = oracle.choose_prompts(checkpoint, NUM_PROMPTS, MAX_TOKENS)
    requests = [
        Request(prompt_ids=one.prompt_ids, max_tokens=MAX_TOKENS, num_logprobs=0, after_tokens=4 * idx)
        for idx, one in enumerate(references)
    ]
    scores = oracle.score(checkpoint, [one.prompt_ids for one in references])
    requests += [Request(prompt_ids=one.prompt_ids, max_tokens=1, is_score=True, num_logprobs=0) for one in references]
    with OneProcess(
        checkpoint,
        num_workers=2,
        kv_tokens=160,
        max_batch_tokens=24,
        model=loaded(checkpoint),
        num_micro_batches=num_micro_batches,
    ) as cluster:
        answers = cluster.run(requests)
        totals, calls = cluster.engine.totals, cluster.calls.totals
    for reference, (answer,) in zip(references, answers, strict=False):
        assert answer.failure == ""
        assert answer.token_ids == reference.token_ids
        assert [p.chosen for p in answer.logprobs] == pytest.approx(reference.logprobs, abs=1e-4)
    for logprobs, (answer,) in zip(scores, answers[NUM_PROMPTS:], strict=True):
        assert [p.chosen for p in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)
    num_steps = sum(totals.steps.values())
    assert num_steps < totals.micro_batches <= num_micro_batches * num_steps
    assert 0.0 < calls.blocked_s < calls.away_s


def test_a_micro_batch_that_fails_ends_the_step_and_leaves_nothing_in_flight(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("qwen2_moe")
    references = oracle.choose_prompts(checkpoint, 4, MAX_TOKENS)
    with OneProcess(checkpoint, num_workers=2, num_micro_batches=4) as cluster:
        compute, num_calls = cluster.calls.compute, 0

        def failing(layer, x, ids, weights):  # type: ignore[no-untyped-def]
            nonlocal num_calls
            num_calls += 1
            if 20 < num_calls < 40 and num_calls % 2:
                raise ExpertsUnavailableError("none, for this test")
            return compute(layer, x, ids, weights)

        cluster.model.set_expert_call(failing)
        answers = cluster.run([Request(prompt_ids=r.prompt_ids, max_tokens=MAX_TOKENS) for r in references])
        in_flight = [link.num_in_flight for _, link in cluster.calls._live]
    assert [choice.token_ids for (choice,) in answers] == [r.token_ids for r in references]
    assert in_flight == [0, 0]
