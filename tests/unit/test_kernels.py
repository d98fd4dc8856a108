"""Kernels: each computes what the formula says, and a row never depends on its company, its thread or its slot."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import collegium.native
from collegium.model import native
from collegium.model.architectures import Activation, ExpertForm
from collegium.model.experts import PackedExpert, expert_run, run_experts
from collegium.model.kernels import Kernel, KernelUnavailableError, PackedLinear, available, kernel_for, use_kernel
from collegium.model.weights import ExpertWeights

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16]
PACKING = [(kernel, dtype) for dtype in DTYPES for kernel in available(dtype) if kernel is not Kernel.TORCH]
EVERY = [(kernel, dtype) for dtype in [*DTYPES, torch.float16] for kernel in available(dtype)]
FORMS = [ExpertForm(activation=a, clamp=1.5, alpha=1.7) for a in Activation]


def names(pairs: list[tuple[Kernel, torch.dtype]]) -> list[str]:
    """Ids of parameters."""
    return [f"{kernel}-{str(dtype).removeprefix('torch.')}" for kernel, dtype in pairs]


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """The dtype of a (kernel, dtype) parameter, with that kernel in use."""
    kernel, dtype = request.param
    before = kernel_for(dtype)
    use_kernel(kernel, dtype)
    yield dtype
    use_kernel(before, dtype)


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal numbers of about the size of a model's."""
    return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)


def make_expert(generator: torch.Generator, dtype: torch.dtype, d_model: int, d_ffn: int, bias: bool) -> ExpertWeights:
    """One random expert."""
    return ExpertWeights(
        gate_up=random(generator, dtype, 2 * d_ffn, d_model),
        down=random(generator, dtype, d_model, d_ffn),
        gate_up_bias=random(generator, dtype, 2 * d_ffn) if bias else None,
        down_bias=random(generator, dtype, d_model) if bias else None,
    )


def formula(rows: Tensor, weights: ExpertWeights, form: ExpertForm) -> Tensor:
    """An expert in float64, written down once more."""
    x = rows.double() @ weights.gate_up.double().T
    if weights.gate_up_bias is not None:
        x = x + weights.gate_up_bias.double()
    gate, up = x.chunk(2, -1)
    match form.activation:
        case Activation.SILU:
            hidden = F.silu(gate) * up
        case Activation.GELU:
            hidden = F.gelu(gate) * up
        case Activation.GELU_TANH:
            hidden = F.gelu(gate, approximate="tanh") * up
        case Activation.RELU:
            hidden = F.relu(gate) * up
        case Activation.CLAMPED_SWIGLU:
            gate, up = gate.clamp(max=form.clamp), up.clamp(-form.clamp, form.clamp)
            hidden = (up + 1) * gate * torch.sigmoid(form.alpha * gate)
    out = hidden @ weights.down.double().T
    return out if weights.down_bias is None else out + weights.down_bias.double()


@pytest.mark.skipif(native.library() is None, reason="the native kernels were not built: is there a C compiler?")
def test_the_native_kernels_are_used_where_they_were_built() -> None:
    assert available(torch.float32)[0] is available(torch.bfloat16)[0] is Kernel.NATIVE


def test_an_unknown_combination_is_refused_with_what_to_do() -> None:
    with pytest.raises(KernelUnavailableError, match=r"native cannot compute torch\.float16.*make setup"):
        use_kernel(Kernel.NATIVE, torch.float16)


@pytest.mark.parametrize(("kernel", "dtype"), EVERY, ids=names(EVERY))
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (37, 24), (64, 129), (200, 96)])
def test_a_linear_map_is_the_formula(kernel: Kernel, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = random(generator, dtype, *shape), random(generator, dtype, shape[0])
    for is_biased in (False, True):
        linear = PackedLinear(weight, bias if is_biased else None, kernel)
        for num_rows in (0, 1, 2, 5, 6, 7, 13, 40):
            rows = random(generator, dtype, num_rows, shape[1])
            expected = rows.double() @ weight.double().T + (bias.double() if is_biased else 0.0)
            found = linear(rows)
            assert found.dtype == dtype
            assert found.shape == (num_rows, shape[0])
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_a_linear_map_keeps_the_leading_shape_and_reads_rows_that_do_not_lie_together(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = PackedLinear(random(generator, dtype, 16, 24).t())
    rows = random(generator, dtype, 3, 16, 5).transpose(1, 2)
    assert linear(rows).shape == (3, 5, 24)
    assert torch.equal(linear(rows)[2], linear(rows[2].contiguous()))


@pytest.mark.parametrize(("kernel", "dtype"), PACKING, ids=names(PACKING))
def test_a_row_of_a_linear_map_does_not_depend_on_the_number_of_rows(kernel: Kernel, dtype: torch.dtype) -> None:
    if (kernel, dtype) == (Kernel.ONEDNN, torch.bfloat16):
        pytest.skip("oneDNN promises it for float32 alone")
    generator = torch.Generator().manual_seed(0)
    linear = PackedLinear(random(generator, dtype, 96, 64), None, kernel)
    rows = random(generator, dtype, 33, 64)
    together = linear(rows)
    for count in (1, 2, 3, 6, 8, 13, 32):
        for first in range(0, 33 - count, count):
            assert torch.equal(linear(rows[first : first + count]), together[first : first + count])


@pytest.mark.parametrize("chosen", EVERY, ids=names(EVERY), indirect=True)
@pytest.mark.parametrize("form", FORMS, ids=[f.activation for f in FORMS])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_experts_are_the_formula_summed_by_weight(chosen: torch.dtype, form: ExpertForm, bias: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    d_model, d_ffn, counts, num_rows = 40, 56, [1, 7, 13, 2], 14
    weights = [make_expert(generator, chosen, d_model, d_ffn, bias) for _ in counts]
    x = random(generator, chosen, num_rows, d_model) * 6
    rng = np.random.default_rng(0)
    pair_rows = np.concatenate([rng.permutation(num_rows)[:count] for count in counts])
    pair_weights = rng.random(len(pair_rows), dtype=np.float32)
    found = run_experts(x, [PackedExpert(w) for w in weights], counts, pair_rows, pair_weights, form)
    expected = torch.zeros(num_rows, d_model, dtype=torch.float64)
    at = 0
    for expert, count in zip(weights, counts, strict=True):
        for row, weight in zip(pair_rows[at : at + count], pair_weights[at : at + count], strict=True):
            expected[row] += formula(x[row][None], expert, form)[0] * float(weight)
        at += count
    assert found.dtype == chosen
    tolerance = 2e-5 if chosen == torch.float32 else 3e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chosen", [p for p in EVERY if p[1] == torch.float32], ids=lambda p: str(p[0]), indirect=True)
def test_activations_are_right_far_out(chosen: torch.dtype) -> None:
    ends = torch.tensor([-1e30, -200.0, -90.0, -20.0, -1e-4, 0.0, 1e-4, 20.0, 90.0, 200.0])
    for form in FORMS:
        expert = ExpertWeights(gate_up=torch.tensor([[1.0, 0.0], [0.0, 1.0]]), down=torch.tensor([[1.0], [0.0]]))
        rows = torch.stack([ends, torch.ones_like(ends)], 1)
        found = run_experts(
            rows, [PackedExpert(expert)], [len(rows)], np.arange(len(rows)), np.ones(len(rows), np.float32), form
        )
        torch.testing.assert_close(found.double(), formula(rows, expert, form), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chosen", PACKING, ids=names(PACKING), indirect=True)
def test_what_is_not_a_number_stays_in_its_row(chosen: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    expert = PackedExpert(make_expert(generator, chosen, 32, 48, False))
    rows = random(generator, chosen, 9, 32)
    form, ones = FORMS[0], np.ones(9, np.float32)
    clean = run_experts(rows, [expert], [9], np.arange(9), ones, form)
    rows[4, 3], rows[7, 0] = float("nan"), float("inf")
    found = run_experts(rows, [expert], [9], np.arange(9), ones, form)
    assert found[4].isnan().all()
    assert not found[7].isfinite().any()
    others = [0, 1, 2, 3, 5, 6, 8]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("chosen", PACKING, ids=names(PACKING), indirect=True)
def test_the_number_of_threads_changes_no_bit_and_x_is_free_once_the_run_has_begun(chosen: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    experts = [PackedExpert(make_expert(generator, chosen, 256, 320, False)) for _ in range(5)]
    x = random(generator, chosen, 31, 256)
    rng = np.random.default_rng(1)
    counts = [31, 1, 9, 16, 3]
    pair_rows = np.concatenate([rng.permutation(31)[:count] for count in counts])
    weights = rng.random(len(pair_rows), dtype=np.float32)
    answers: list[Tensor] = []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            for _ in range(20):
                rows = x.clone()
                run = expert_run(rows, counts, pair_rows, FORMS[0])
                rows.zero_()
                run.compute(range(5), experts)
                answers.append(run.result(pair_rows, weights))
    finally:
        torch.set_num_threads(threads)
    assert answers[0].any()
    if kernel_for(chosen) is Kernel.NATIVE:
        assert all(torch.equal(answer, answers[0]) for answer in answers)
    else:
        for answer in answers:
            torch.testing.assert_close(answer, answers[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("chosen", PACKING, ids=names(PACKING), indirect=True)
def test_many_experts_of_many_rows_are_divided_among_threads_and_no_bit_changes(chosen: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    experts = [PackedExpert(make_expert(generator, chosen, 96, 70, True)) for _ in range(13)]
    x = random(generator, chosen, 90, 96)
    rng = np.random.default_rng(2)
    counts = [30, 90, 1, 24, 55, 31, 32, 33, 64, 17, 2, 40, 45]
    pair_rows = np.concatenate([rng.permutation(90)[:count] for count in counts])
    weights = rng.random(len(pair_rows), dtype=np.float32)
    answers: list[Tensor] = []
    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 3, 2):
            torch.set_num_threads(num_threads)
            answers.append(run_experts(x, experts, counts, pair_rows, weights, FORMS[0]))
    finally:
        torch.set_num_threads(threads)
    assert answers[0].any()
    for answer in answers:
        if kernel_for(chosen) is Kernel.NATIVE:
            assert torch.equal(answer, answers[0])
        else:
            torch.testing.assert_close(answer, answers[0], rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collegium.native, "ABI", collegium.native.ABI + 1)
    with pytest.raises(collegium.native.LibraryMissingError, match="make setup"):
        collegium.native.library.__wrapped__()


@pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")
@pytest.mark.parametrize("isa", native.ISA_NAMES)
def test_every_other_instruction_set_of_this_machine_passes(isa: str) -> None:
    script = "from collegium.model import native; print(native.library().isa)"
    env = os.environ | {"COLLEGIUM_ISA": isa}
    used = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    if used.stdout.strip() != isa:
        pytest.skip(f"this processor has no {isa} instructions")
    library = native.library()
    if library is not None and library.isa == isa:
        pytest.skip("it is the one under test")
    chosen = (
        "formula or company or number_of_rows or threads or far_out or not_a_number or decode_rows or latent or share"
    )
    files = [__file__, str(Path(__file__).with_name("test_layers.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout[-3000:]
