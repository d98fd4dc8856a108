"""Routers and workers on a GPU answer as transformers on a CPU. Skipped where there is none."""

import pytest
import torch

from benchmarks.one_process import OneProcess, Request
from collegium.model.device_experts import has_triton
from router_svc.device_model import DeviceModel
from router_svc.model_loader import load_router_model
from tests.checkpoints import Variant
from tests.oracle import Oracle

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and has_triton()), reason="needs a CUDA device")

GPU = torch.device("cuda", 0)
FAMILY = ("mixtral", "olmoe", "qwen3_moe")


@pytest.mark.parametrize("variant", [Variant.BASE, Variant.OTHER])
@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("arch", FAMILY)
def test_a_router_that_replays_graphs_answers_as_transformers(
    arch: str, num_micro_batches: int, variant: Variant, oracle: Oracle
) -> None:
    checkpoint = oracle.checkpoint(arch, variant)
    references = oracle.choose_prompts(checkpoint, 6, 16)
    requests = [Request(prompt_ids=one.prompt_ids, max_tokens=16, num_logprobs=0) for one in references]
    model = load_router_model(checkpoint, torch.float32, GPU)
    assert isinstance(model.lean, DeviceModel)
    with OneProcess(
        checkpoint,
        model=model,
        num_workers=2,
        expert_memory="100%",
        device=GPU,
        max_batch_tokens=24,
        num_micro_batches=num_micro_batches,
    ) as cluster:
        answers = cluster.run(requests)
    for reference, (answer,) in zip(references, answers, strict=True):
        assert answer.token_ids == reference.token_ids
        assert [p.chosen for p in answer.logprobs] == pytest.approx(reference.logprobs, abs=1e-3)


@pytest.mark.parametrize("memory", ["100%", "30%"])
@pytest.mark.parametrize("arch", ["gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_experts_in_a_gpus_slots_answer_as_transformers(arch: str, memory: str, oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint(arch)
    references = oracle.choose_prompts(checkpoint, 6, 16)
    model = load_router_model(checkpoint, torch.float32, GPU)
    with OneProcess(
        checkpoint, model=model, num_workers=2, expert_memory=memory, host_memory="100%", device=GPU
    ) as cluster:
        answers = cluster.run([Request(prompt_ids=one.prompt_ids, max_tokens=16) for one in references])
        misses = sum(buffer.totals.misses for buffer in cluster.buffers)
    assert [choice.token_ids for (choice,) in answers] == [one.token_ids for one in references]
    assert bool(misses) == (memory != "100%")
