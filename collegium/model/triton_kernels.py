"""Triton kernels that multiply rows with experts' matrices where those lie: in the slots, in any order, uncopied.

Owns one kernel in two forms: for many rows of an expert, by blocks on tensor cores, and as a GEMV for few, which reads
each weight once and multiplies without them. Needs triton, which comes with torch for CUDA. Not run on a
GPU yet: tested with triton's interpreter (`TRITON_INTERPRET=1`), which runs them on a CPU.
P (row, expert) pairs ordered by expert, S slots, N outputs, K inputs, B blocks.
"""

# pyright: basic
# Triton reads the source of its kernels: what looks like parameters without types are theirs.

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

GEMV_ROWS = 4  # of one expert that the GEMV takes at once
_BLOCK_M, _BLOCK_N, _BLOCK_K = 32, 64, 32
_GEMV_BLOCK_N, _GEMV_BLOCK_K = 32, 128


@triton.jit
def _grouped_linear(
    x, rows, weight, bias, out, slots, firsts, ends, N, K,
    GATHER: tl.constexpr, HAS_BIAS: tl.constexpr, IS_GEMV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot = tl.load(slots + block).to(tl.int64)
    pair = tl.load(firsts + block) + tl.arange(0, BLOCK_M)
    is_pair = pair < tl.load(ends + block)
    row = pair
    if GATHER:
        row = tl.load(rows + pair, mask=is_pair, other=0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        a = tl.load(x + row[:, None] * K + k[None, :], mask=is_pair[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(
            weight + slot * N * K + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0
        )
        if IS_GEMV:
            total += tl.sum(a.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], axis=2)
        else:
            total += tl.dot(a, tl.trans(w), input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + slot * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + pair[:, None] * N + n[None, :], total, mask=is_pair[:, None] & (n < N)[None, :])


def grouped_linear(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, blocks: Tensor, *, num_pairs: int, is_few: bool
) -> Tensor:
    """Multiply each block's pairs with its slot's matrix: [P, N] in x's dtype, sums in float32.

    x: [R, K], of which pair p takes row rows[p], or without `rows` [P, K], row p. weight: [S, N, K]; bias: [S, N].
    blocks: [3, B] int32: slot, first pair, pair after the last; at most `block_rows(is_few)` pairs each. All on one
    device.
    """
    num_out, num_in = weight.shape[1:]
    out = torch.empty(num_pairs, num_out, dtype=x.dtype, device=x.device)
    kernel: Any = _grouped_linear
    block_n = _GEMV_BLOCK_N if is_few else _BLOCK_N
    kernel[(blocks.shape[1], triton.cdiv(num_out, block_n))](
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
        IS_GEMV=is_few,
        BLOCK_M=block_rows(is_few),
        BLOCK_N=block_n,
        BLOCK_K=_GEMV_BLOCK_K if is_few else _BLOCK_K,
    )
    return out


def block_rows(is_few: bool) -> int:
    """Pairs that one block holds at most."""
    return GEMV_ROWS if is_few else _BLOCK_M
