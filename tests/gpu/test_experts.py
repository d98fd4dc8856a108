"""Experts on a GPU give what they give on a CPU. Skipped where there is none."""

import numpy as np
import pytest
import torch

from collegium.model.architectures import Activation, ExpertForm
from collegium.model.device_experts import DeviceRun, DeviceSlots, blocks_of, has_triton
from collegium.model.experts import PackedExpert, run_experts
from collegium.model.weights import ExpertWeights

pytestmark = pytest.mark.skipif(not (torch.cuda.is_available() and has_triton()), reason="needs a CUDA device")

D, F = 192, 80


def draw(seed: int, dtype: torch.dtype, *, has_bias: bool) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    return ExpertWeights(
        gate_up=tensor(2 * F, D),
        down=tensor(D, F),
        gate_up_bias=tensor(2 * F) if has_bias else None,
        down_bias=tensor(D) if has_bias else None,
    )


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH, Activation.CLAMPED_SWIGLU])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_the_kernels_computes_what_a_cpu_does(
    dtype: torch.dtype, has_bias: bool, activation: Activation
) -> None:
    form = ExpertForm(activation=activation, clamp=7.0, alpha=1.7)
    experts = [draw(seed, dtype, has_bias=has_bias) for seed in range(5)]
    slab = DeviceSlots(experts[0], num_slots=9, device=torch.device("cuda", 0))
    slots = [slab.slots[i] for i in (8, 0, 3, 2, 5)]
    for slot, one in zip(slots, experts, strict=True):
        slot.load(one)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(150, D, generator=generator).to(dtype)
    counts = [150, 1, 7, 33, 2]
    draws = np.random.default_rng(5)
    pair_rows = np.concatenate([np.sort(draws.permutation(150)[:n]) for n in counts])
    pair_weights = draws.random(len(pair_rows), dtype=np.float32)
    expected = run_experts(x, [PackedExpert(one) for one in experts], counts, pair_rows, pair_weights, form).double()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    results: list[torch.Tensor] = []
    for kernel in slab.kernels.FORMS:
        slab.form_for = lambda counts, kernel=kernel: kernel
        run = DeviceRun(x, counts, pair_rows, pair_weights, form, slab)
        run.compute([3, 1], [slots[3], slots[1]])
        run.compute([0, 2, 4], [slots[0], slots[2], slots[4]])
        y = run.result()
        assert y.dtype == dtype and y.device.type == "cpu"
        assert float((y.double() - expected).norm() / expected.norm()) < tolerance, kernel
        results.append(y)
    again = DeviceRun(x, counts, pair_rows, pair_weights, form, slab)
    again.compute(range(5), slots)
    assert torch.equal(again.result(), results[-1])  # in one part or in two, the same bits


def test_calibration_chooses_a_form_for_every_number_of_rows() -> None:
    slab = DeviceSlots(draw(0, torch.bfloat16, has_bias=False), num_slots=4, device=torch.device("cuda", 0))
    chosen = slab.calibrate()
    assert set(chosen.values()) <= set(slab.kernels.FORMS)
    assert slab.form_for([1, 1, 1]) is chosen[1]
    assert slab.form_for([300]) is chosen[256]
    assert blocks_of([0], [3], chosen[1].pairs).shape[0] == 3


def test_an_expert_goes_through_page_locked_memory_and_back_bit_for_bit() -> None:
    slab = DeviceSlots(draw(0, torch.bfloat16, has_bias=True), num_slots=2, device=torch.device("cuda", 0))
    slab.slots[0].load(draw(3, torch.bfloat16, has_bias=True))
    host = torch.empty(slab.slots[0].num_bytes, dtype=torch.uint8, pin_memory=True)
    slab.slots[0].copy_to(host.data_ptr())
    slab.slots[1].copy_from(host.data_ptr())
    for part in slab.parts:
        assert part is not None and torch.equal(part[0], part[1]) and part[0].any()
