"""Triton kernels of one batch of experts, whose matrices they read where those lie: in slots, in any order, uncopied.

Owns two kernels: rows times experts' matrices, with the gated unit in the same pass where it is SiLU's, and the sum of
each row's weighted pairs in their order, without atomics, whose order would be another every time. The first comes in
the forms of FORMS: a GEMV for few rows of an expert, which needs no tensor cores, and blocks on tensor cores for more;
which one is faster at how many rows is for the caller to measure. Needs triton, which comes with torch for CUDA.
R rows, P (row, expert) pairs ordered by expert, S slots, N outputs, K inputs, B blocks, D model, T pairs of a row.
"""

# pyright: basic
# Triton reads the source of its kernels: what looks like parameters without types are theirs.

from dataclasses import dataclass
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One way to cut the work: pairs, outputs and inputs that one program takes at once."""

    pairs: int
    outputs: int
    inputs: int
    is_gemv: bool = False
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        """What it is, in short."""
        return f"{'gemv' if self.is_gemv else 'dot'} {self.pairs}x{self.outputs}x{self.inputs}"


FORMS = (
    Form(pairs=1, outputs=16, inputs=512, is_gemv=True),
    Form(pairs=4, outputs=16, inputs=256, is_gemv=True),
    Form(pairs=16, outputs=32, inputs=128, num_stages=4),
    Form(pairs=32, outputs=64, inputs=64, num_stages=4),
    Form(pairs=64, outputs=64, inputs=64, num_stages=4),
    Form(pairs=128, outputs=128, inputs=64, num_warps=8),
)
_COLUMNS = 1024  # of a row that one program sums


@triton.jit
def _grouped_linear(
    x, rows, weight, bias, out, slots, firsts, ends, N, K,
    GATHER: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GATED: tl.constexpr, IS_GEMV: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    slot = tl.load(slots + block).to(tl.int64)
    pair = tl.load(firsts + block) + tl.arange(0, BLOCK_M)
    is_pair = pair < tl.load(ends + block)
    row = pair
    if GATHER:
        row = tl.load(rows + pair, mask=is_pair, other=0)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_n = n < N
    k = tl.arange(0, BLOCK_K)
    num_rows = N
    if IS_GATED:
        num_rows = 2 * N
    a_at = x + row.to(tl.int64)[:, None] * K + k[None, :]
    w_at = weight + slot * num_rows * K + n[:, None] * K + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, K, BLOCK_K):
        is_a, is_w = is_pair[:, None], is_n[:, None]
        if not EVEN_K:
            is_a, is_w = is_a & (k < K - begin)[None, :], is_w & (k < K - begin)[None, :]
        a = tl.load(a_at + begin, mask=is_a, other=0.0)
        w = tl.load(w_at + begin, mask=is_w, other=0.0)
        if IS_GEMV:
            total += tl.sum(a.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], axis=2)
        else:
            total += tl.dot(a, tl.trans(w), input_precision="ieee")
        if IS_GATED:
            v = tl.load(w_at + begin + N * K, mask=is_w, other=0.0)
            if IS_GEMV:
                up += tl.sum(a.to(tl.float32)[:, None, :] * v.to(tl.float32)[None, :, :], axis=2)
            else:
                up += tl.dot(a, tl.trans(v), input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + slot * num_rows + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            up += tl.load(bias + slot * num_rows + N + n, mask=is_n, other=0.0).to(tl.float32)[None, :]
    if IS_GATED:
        total = total / (1.0 + tl.exp(-total)) * up
    tl.store(out + pair.to(tl.int64)[:, None] * N + n[None, :], total, mask=is_pair[:, None] & is_n[None, :])


@triton.jit
def _weighted_sum(y, pair_of, weight_of, out, D, T, WIDE: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_d = d < D
    total = tl.zeros((COLUMNS,), dtype=WIDE)
    for t in range(T):
        pair = tl.load(pair_of + row * T + t).to(tl.int64)
        weight = tl.load(weight_of + row * T + t)
        total += tl.load(y + pair * D + d, mask=is_d, other=0.0).to(WIDE) * weight.to(WIDE)
    tl.store(out + row.to(tl.int64) * D + d, total, mask=is_d)


def grouped_linear(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, blocks: Tensor, out: Tensor, *,
    form: Form, is_gated: bool = False,
) -> None:  # fmt: skip
    """Multiply each block's pairs with its slot's matrix, sums in float32, and write the pairs' rows of out [P, N].

    x: [R, K], of which pair p takes row rows[p], or without `rows` [P, K], row p. weight: [S, N, K]; bias: [S, N].
    blocks: [3, B] int32: slot, first pair, pair after the last; at most `form.pairs` pairs each. All on one device.
    With `is_gated`, weight is [S, 2N, K], gate above up, and what is written is silu(gate) * up.
    """
    num_out, num_in = out.shape[1], weight.shape[2]
    kernel: Any = _grouped_linear
    kernel[(triton.cdiv(num_out, form.outputs), blocks.shape[1])](
        x,
        x if rows is None else rows,
        weight,
        weight if bias is None else bias,
        out,
        *blocks,
        num_out,
        num_in,
        GATHER=rows is not None,
        HAS_BIAS=bias is not None,
        IS_GATED=is_gated,
        IS_GEMV=form.is_gemv,
        EVEN_K=num_in % form.inputs == 0,
        BLOCK_M=form.pairs,
        BLOCK_N=form.outputs,
        BLOCK_K=form.inputs,
        num_warps=form.num_warps,
        num_stages=form.num_stages,
    )


def weighted_sum(y: Tensor, pair_of: Tensor, weight_of: Tensor, out: Tensor) -> None:
    """Write each row's sum over its pairs of weight times y [P, D] to out [R, D], in float64 where out is float32.

    pair_of: [R, T] int32; weight_of: [R, T] float32, zero where a row has fewer than T pairs.
    """
    kernel: Any = _weighted_sum
    num_rows, width = out.shape
    wide = tl.float64 if out.dtype == torch.float32 else tl.float32
    grid = (num_rows, triton.cdiv(width, _COLUMNS))
    kernel[grid](y, pair_of, weight_of, out, width, pair_of.shape[1], WIDE=wide, COLUMNS=_COLUMNS)
