"""Stands in for `triton_kernels` where slots lie in host memory, which is for tests alone: the same by plain torch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Form:
    """See triton_kernels.Form."""

    pairs: int


FORMS = (Form(1), Form(32))


def grouped_linear(
    x: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    blocks: Tensor,
    out: Tensor,
    *,
    form: Form,
    is_gated: bool = False,
) -> None:
    """See triton_kernels.grouped_linear."""
    gathered = x if rows is None else x.index_select(0, rows.long())
    for block in range(blocks.shape[1]):
        slot, first, end = (int(number) for number in blocks[:, block])
        assert end - first <= form.pairs
        part = gathered[first:end].float() @ weight[slot].float().T
        if bias is not None:
            part += bias[slot].float()
        if is_gated:
            gate, up = part.chunk(2, -1)
            part = F.silu(gate) * up
        out[first:end] = part


def weighted_sum(y: Tensor, pair_of: Tensor, weight_of: Tensor, out: Tensor) -> None:
    """See triton_kernels.weighted_sum."""
    wide = torch.float64 if out.dtype == torch.float32 else torch.float32
    total = torch.zeros(out.shape, dtype=wide)
    for column in range(pair_of.shape[1]):
        total += y.index_select(0, pair_of[:, column]).to(wide) * weight_of[:, column, None].to(wide)
    out.copy_(total)
