"""Slots on a device and what computes from them, on a CPU: matmuls stand in for the kernels, and where triton is
installed its interpreter runs the kernels themselves. On a GPU they are tried by tests/gpu.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.one_process import OneProcess, Request
from collegium.fabric.byte_size import MemoryBudget
from collegium.fabric.errors import FailedPrecondition
from collegium.model import host_kernels
from collegium.model.architectures import Activation, ExpertForm
from collegium.model.device_experts import DeviceRun, DeviceSlots, blocks_of
from collegium.model.experts import PackedExpert, run_experts
from collegium.model.manifest import build_manifest, ensure_manifest, load_manifest
from collegium.model.weights import ExpertWeights
from expert_svc.app import choose_device
from expert_svc.memory import make_buffer
from expert_svc.settings import Settings
from tests.oracle import Oracle

CPU = torch.device("cpu")


def weights(seed: int, *, has_bias: bool, dtype: torch.dtype = torch.float32, is_gated: bool = True) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / 8).to(dtype)

    return ExpertWeights(
        gate_up=draw(wide := 48 * (1 + is_gated), 64),
        down=draw(64, 48),
        gate_up_bias=draw(wide) if has_bias else None,
        down_bias=draw(64) if has_bias else None,
    )


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_on_a_device_give_what_packed_experts_give(
    dtype: torch.dtype, has_bias: bool, activation: Activation, is_gated: bool
) -> None:
    form = ExpertForm(activation=activation, is_gated=is_gated)
    experts = [weights(seed, has_bias=has_bias, dtype=dtype, is_gated=is_gated) for seed in range(5)]
    slab = DeviceSlots(experts[0], num_slots=7, device=CPU)
    slots = [slab.slots[i] for i in (6, 0, 3, 2, 5)]  # in no order
    for slot, one in zip(slots, experts, strict=True):
        slot.load(one)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(40, 64, generator=generator).to(dtype)
    counts = [40, 1, 7, 33, 2]
    pair_rows = np.concatenate([np.sort(np.random.default_rng(i).permutation(40)[:n]) for i, n in enumerate(counts)])
    pair_weights = np.random.default_rng(7).random(len(pair_rows), dtype=np.float32)
    expected = run_experts(x, [PackedExpert(one) for one in experts], counts, pair_rows, pair_weights, form)
    run = DeviceRun(x, counts, pair_rows, pair_weights, form, slab)
    run.compute([3, 1], [slots[3], slots[1]])  # in parts, in any order
    run.compute([0, 2, 4], [slots[0], slots[2], slots[4]])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(run.result(), expected, rtol=tolerance, atol=tolerance)


def test_an_expert_goes_through_host_memory_and_back_bit_for_bit() -> None:
    slab = DeviceSlots(weights(0, has_bias=True), num_slots=2, device=CPU)
    slab.slots[0].load(weights(3, has_bias=True))
    host = torch.empty(slab.slots[0].num_bytes, dtype=torch.uint8)
    slab.slots[0].copy_to(host.data_ptr())
    slab.slots[1].copy_from(host.data_ptr())
    for part in slab.parts:
        assert part is not None and torch.equal(part[0], part[1]) and part[0].any()
    with pytest.raises(TypeError, match="load or copy_from"):
        slab.slots[0].take(PackedExpert(weights(1, has_bias=True)))


def test_groups_are_cut_into_blocks_and_no_pair_is_left_out() -> None:
    blocks = blocks_of([4, 0, 9], [5, 1, 8], 4)
    assert blocks.T.tolist() == [[4, 0, 4], [4, 4, 5], [0, 5, 6], [9, 6, 10], [9, 10, 14]]
    assert blocks_of([4, 9], [5, 2], 4, [7, 30]).T.tolist() == [[4, 7, 11], [4, 11, 12], [9, 30, 32]]


def test_slots_on_a_device_need_to_be_told_how_many(oracle: Oracle) -> None:
    manifest = build_manifest(oracle.checkpoint("mixtral"))
    with pytest.raises(FailedPrecondition, match="their number must be known") as caught:
        make_buffer(
            manifest,
            torch.float32,
            expert_memory=MemoryBudget(),
            host_memory=MemoryBudget(),
            device=torch.device("cpu"),
        )
    assert caught.value.field == "--expert-memory"


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nowhere"])
def test_a_device_that_cannot_compute_experts_is_refused_by_its_flag(device: str, tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        choose_device(Settings(balancer="127.0.0.1:1", manifest=tmp_path, device=device))
    assert caught.value.field == "--device"


@pytest.mark.parametrize(("arch", "memory"), [("mixtral", "100%"), ("gpt_oss", "30%"), ("qwen3_moe", "25%")])
def test_a_cluster_with_slots_on_a_device_answers_as_transformers(arch: str, memory: str, oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint(arch)
    references = oracle.choose_prompts(checkpoint, 6, 16)
    host = "" if memory == "100%" else "100%"
    with OneProcess(
        checkpoint, num_workers=2, expert_memory=memory, host_memory=host, device=CPU, max_batch_tokens=24
    ) as cluster:
        answers = cluster.run([Request(prompt_ids=one.prompt_ids, max_tokens=16) for one in references])
        misses = sum(buffer.totals.misses for buffer in cluster.buffers)
    assert [choice.token_ids for (choice,) in answers] == [one.token_ids for one in references]
    assert bool(misses) == (memory != "100%")


def test_a_device_that_holds_every_expert_loads_each_once_and_takes_no_hints(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("qwen3_moe")
    (reference,) = oracle.choose_prompts(checkpoint, 1, 8)
    with OneProcess(checkpoint, expert_memory="100%", device=CPU) as cluster:  # staging sets are not in its memory
        cluster.run([Request(prompt_ids=reference.prompt_ids, max_tokens=8)])
        (buffer,) = cluster.buffers
        assert buffer.is_roomy and not buffer.can_prefetch
        assert buffer.totals.misses == 0


def test_the_gated_unit_is_computed_with_the_first_multiplication(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = load_manifest(ensure_manifest(oracle.checkpoint("qwen3_moe"))).form  # as a worker gets it
    experts = [weights(seed, has_bias=False) for seed in range(2)]
    slab = DeviceSlots(experts[0], num_slots=2, device=CPU)
    calls: list[bool] = []
    linear = host_kernels.grouped_linear

    def noted(*args: object, is_gated: bool = False, **others: object) -> None:
        calls.append(is_gated)
        linear(*args, is_gated=is_gated, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(host_kernels, "grouped_linear", noted)
    run = DeviceRun(torch.randn(3, 64), [3, 1], np.array([0, 1, 2, 1]), np.ones(4, np.float32), form, slab)
    run.compute([0, 1], slab.slots)
    assert calls == [True, False]


_INTERPRETED = """
import torch
from collegium.model import host_kernels
from collegium.model.device_experts import blocks_of
from collegium.model.triton_kernels import FORMS, grouped_linear, weighted_sum

# The interpreter's dot takes the bits of bfloat16 for integers, so the forms that have one are tried in float16.
for form in (FORMS[0], FORMS[1], FORMS[2], FORMS[3]):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16 if form.is_gemv else torch.float16, 3e-2)):
        for has_bias, is_gated in ((False, False), (True, False), (True, True)):
            counts = [1, 9, 40] if form.pairs > 4 else [1, 4, 7]
            generator = torch.Generator().manual_seed(1)
            weight = torch.randn(5, 140 if is_gated else 70, 50, generator=generator).to(dtype) / 4
            bias = torch.randn(5, len(weight[0]), generator=generator).to(dtype) if has_bias else None
            x = torch.randn(90, 50, generator=generator).to(dtype)
            rows = torch.randperm(90, generator=generator)[: sum(counts)].int()
            blocks = blocks_of([4, 0, 2], counts, form.pairs)
            for given, index in ((x, rows), (x[: sum(counts)], None)):
                ours, plain = torch.full((2, sum(counts), 70), torch.nan, dtype=dtype)
                for kernel, out in ((grouped_linear, ours), (host_kernels.grouped_linear, plain)):
                    kernel(given, index, weight, bias, blocks, out, form=form, is_gated=is_gated)
                assert torch.allclose(ours.float(), plain.float(), rtol=tolerance, atol=tolerance), (dtype, form)
y, pair_of, weight_of = torch.randn(9, 70), torch.randint(9, (5, 3)).int(), torch.rand(5, 3)
for dtype in (torch.float32, torch.bfloat16):
    ours, plain = torch.full((2, 5, 70), torch.nan, dtype=dtype)
    weighted_sum(y, pair_of, weight_of, ours)
    host_kernels.weighted_sum(y, pair_of, weight_of, plain)
    assert torch.equal(ours, plain) or torch.allclose(ours.float(), plain.float(), rtol=1e-2)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_kernels_in_tritons_interpreter_compute_what_plain_torch_does() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "equal\n", done.stderr
