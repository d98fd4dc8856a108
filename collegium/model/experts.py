"""Run experts on exactly the rows that they got, and sum what each row is owed.

Owns PackedExpert and the weighted sum. Knows nothing of who sent the rows. Dynamic gating: Huang et al., NeurIPS 2024,
section 4: no capacity, no padding, no drop. R rows, D model, F ffn, P (row, expert) pairs, G experts that have rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from collegium.model.architectures import Activation, ExpertForm
from collegium.model.kernels import PackedLinear
from collegium.model.weights import ExpertWeights

# Up to this many pairs a loop of row additions beats building an index (measured: about 1 us a row against 30 us).
_FEW_PAIRS = 32


class PackedExpert:
    """One expert's weights in the kernel's form; immutable."""

    __slots__ = ("down", "gate_up", "num_bytes")

    def __init__(self, weights: ExpertWeights):
        self.gate_up = PackedLinear(weights.gate_up, weights.gate_up_bias)
        self.down = PackedLinear(weights.down, weights.down_bias)
        self.num_bytes = self.gate_up.num_bytes + self.down.num_bytes


def gated(hidden: Tensor, form: ExpertForm) -> Tensor:
    """Apply the gated unit: [P, 2F], gate left and up right, to [P, F]."""
    gate, up = hidden.chunk(2, -1)
    match form.activation:
        case Activation.SILU:
            return F.silu(gate).mul_(up)
        case Activation.GELU:
            return F.gelu(gate).mul_(up)
        case Activation.GELU_TANH:
            return F.gelu(gate, approximate="tanh").mul_(up)
        case Activation.RELU:
            return F.relu(gate).mul_(up)
        case Activation.CLAMPED_SWIGLU:
            gate = gate.clamp(max=form.clamp)
            up = up.clamp(-form.clamp, form.clamp)
            return (up + 1) * (gate * torch.sigmoid(gate * form.alpha))


def run_experts(
    x: Tensor,
    experts: Sequence[PackedExpert],
    counts: Sequence[int],
    pair_rows: NDArray[np.int64],
    pair_weights: NDArray[np.float32],
    form: ExpertForm,
) -> Tensor:
    """Compute each row's weighted sum over the experts that it chose.

    x: [R, D]. experts, counts: [G]. pair_rows, pair_weights: [P], ordered by expert, sum(counts) = P. Returns [R, D] in
    x's dtype; sums run in float64 for float32 rows, in float32 for half-width ones.
    """
    rows = torch.from_numpy(pair_rows)
    gathered = x.index_select(0, rows)  # [P, D]
    spans = _spans(gathered, counts)
    hidden = _joined([e.gate_up(span) for e, span in zip(experts, spans, strict=True)])  # [P, 2F]
    spans = _spans(gated(hidden, form), counts)
    out = _joined([e.down(span) for e, span in zip(experts, spans, strict=True)])  # [P, D]
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    return weighted_sum(out, pair_rows, pair_weights, x.shape[0], wide).to(x.dtype)


def weighted_sum(
    values: Tensor, pair_rows: NDArray[np.int64], pair_weights: NDArray[np.float32], num_rows: int, wide: torch.dtype
) -> Tensor:
    """Sum values [P, D] times their weights into their rows: [num_rows, D] in dtype `wide`.

    Pairs of one row are added in the order given, whatever the path taken.
    """
    scaled = values.to(wide) * torch.from_numpy(pair_weights).to(wide)[:, None]
    if len(pair_rows) <= _FEW_PAIRS:
        return torch.zeros(num_rows, values.shape[1], dtype=wide).index_add_(0, torch.from_numpy(pair_rows), scaled)
    order = np.argsort(pair_rows, kind="stable")
    row_of = pair_rows[order]
    rank = np.arange(len(order)) - np.searchsorted(row_of, row_of)
    depth = int(rank.max()) + 1
    total = torch.zeros(num_rows, values.shape[1], dtype=wide)
    for level in range(depth):  # depth is at most top-k
        at = rank == level
        target = torch.from_numpy(row_of[at])
        part = scaled.index_select(0, torch.from_numpy(order[at]))
        if len(target) == num_rows:
            total += part
        else:
            total.index_copy_(0, target, total.index_select(0, target) + part)
    return total


def _spans(rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split(rows, list(counts))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
