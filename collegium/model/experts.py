"""Run experts on exactly the rows that they got, and sum what each row is owed.

Owns PackedExpert, ExpertRun and the weighted sum. Knows nothing of who sent the rows. Dynamic gating: Huang et al.,
NeurIPS 2024, section 4: no capacity, no padding, no drop. Where the native kernels pack the weights, all experts of a
call run in one call of the library; else in a few calls of torch for each. R rows, D model, F ffn, P (row, expert)
pairs, G experts that have rows.
"""

import ctypes
import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from collegium.model import native, packed_memory
from collegium.model.architectures import Activation, ExpertForm
from collegium.model.kernels import Kernel, PackedLinear, kernel_for
from collegium.model.weights import ExpertWeights

# Up to this many pairs a loop of row additions beats building an index (measured: about 1 us a row against 30 us).
_FEW_PAIRS = 32


class PackedExpert:
    """One expert's weights in the kernel's form. As a slot of the expert buffer it holds one expert after another."""

    __slots__ = ("_memory", "_parts", "address", "down", "gate_up", "layout", "num_bytes")

    def __init__(self, weights: ExpertWeights, kernel: Kernel | None = None):
        """Pack `weights`; they are copied, and may be used again."""
        if (kernel or kernel_for(weights.gate_up.dtype)) is Kernel.NATIVE:
            self._pack_natively(weights)
            return
        self.layout: native.ExpertLayout | None = None
        self.address = 0
        self.gate_up = PackedLinear(weights.gate_up, _copied(weights.gate_up_bias), kernel)
        self.down = PackedLinear(weights.down, _copied(weights.down_bias), kernel)
        self._memory: list[Tensor] = []
        self._parts = [
            (part.ctypes.data, part.nbytes) for linear in (self.gate_up, self.down) for part in linear.memory()
        ]
        self.num_bytes = sum(size for _, size in self._parts)

    def _pack_natively(self, weights: ExpertWeights) -> None:
        d_model, d_ffn = weights.down.shape
        layout = _layout(d_model, d_ffn, weights.down.dtype, weights.gate_up_bias is not None, weights.is_gated)
        memory = packed_memory.take(layout.num_bytes)
        self.layout, self._memory = layout, [memory]
        self.address, self.num_bytes = memory.data_ptr(), layout.num_bytes
        self._parts = [(self.address, self.num_bytes)]
        self._fill(weights, layout)

    def _fill(self, weights: ExpertWeights, layout: native.ExpertLayout) -> None:
        library = native.library()
        assert library is not None
        d_ffn = weights.down.shape[1]
        library.pack(self.address, weights.gate_up[:d_ffn])
        if layout.is_gated:
            library.pack(self.address + layout.up_at, weights.gate_up[d_ffn:])
        library.pack(self.address + layout.down_at, weights.down)
        if weights.gate_up_bias is not None and weights.down_bias is not None:
            for bias, at in (
                (weights.gate_up_bias, layout.gate_up_bias_at),
                (weights.down_bias, layout.down_bias_at),
            ):
                held = bias.contiguous()
                ctypes.memmove(self.address + at, held.data_ptr(), held.nbytes)

    def copy_to(self, address: int) -> None:
        """Write the packed bytes, `num_bytes` of them, to memory at `address`. Other threads may run meanwhile."""
        for source, size in self._parts:
            ctypes.memmove(address, source, size)
            address += size

    def copy_from(self, address: int) -> None:
        """Take the packed bytes of another expert of the same form from memory at `address`; as `copy_to`."""
        for target, size in self._parts:
            ctypes.memmove(target, address, size)
            address += size

    def load(self, weights: ExpertWeights) -> None:
        """Pack other weights of the same shape in the place of these."""
        if self.layout is not None:
            self._fill(weights, self.layout)
        else:
            self.take(PackedExpert(weights))

    def take(self, other: "PackedExpert") -> None:
        """Take the packed bytes of another expert of the same form."""
        for (target, size), (source, its_size) in zip(self._parts, other._parts, strict=True):
            assert size == its_size
            ctypes.memmove(target, source, size)


@functools.cache
def _layout(d_model: int, d_ffn: int, dtype: torch.dtype, has_bias: bool, is_gated: bool) -> native.ExpertLayout:
    library = native.library()
    assert library is not None
    return native.ExpertLayout(library, d_model, d_ffn, dtype, has_bias=has_bias, is_gated=is_gated)


def _copied(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.clone()


def gated(hidden: Tensor, form: ExpertForm) -> Tensor:
    """Apply the gated unit: [P, 2F], gate left and up right, to [P, F]; [P, F] to [P, F] where there is no gate."""
    gate, up = hidden.chunk(2, -1) if form.is_gated else (hidden, hidden.new_ones(()))
    match form.activation:
        case Activation.SILU:
            return F.silu(gate).mul_(up)
        case Activation.GELU:
            return F.gelu(gate.contiguous()).mul_(up)  # a single row is: others must take the same path
        case Activation.GELU_TANH:
            return F.gelu(gate, approximate="tanh").mul_(up)
        case Activation.RELU:
            return F.relu(gate).mul_(up)
        case Activation.CLAMPED_SWIGLU:
            gate = gate.clamp(max=form.clamp)
            up = up.clamp(-form.clamp, form.clamp)
            return (up + 1) * (gate * torch.sigmoid(gate * form.alpha))


class ExpertRun(Protocol):
    """The experts of one batch, run in any order and in any number of parts; the result does not depend on either."""

    def compute(self, groups: Sequence[int], experts: Sequence[PackedExpert]) -> None:
        """Run the experts of some groups (indices into counts); each group is to be run once."""
        ...

    def result(self, pair_rows: NDArray[np.int64], pair_weights: NDArray[np.float32]) -> Tensor:
        """Sum once every group has run: [R, D] in x's dtype; sums run in float64 for float32 rows, else in float32."""
        ...


def expert_run(x: Tensor, counts: Sequence[int], pair_rows: NDArray[np.int64], form: ExpertForm) -> ExpertRun:
    """Begin with x [R, D], pair_rows [P], which are ordered by expert: counts [G], sum P. x is read here alone."""
    if kernel_for(x.dtype) is Kernel.NATIVE:
        return _NativeRun(x, counts, pair_rows, form)
    return _TorchRun(x, counts, pair_rows, form)


class _NativeRun:
    __slots__ = (
        "_counts",
        "_dtype",
        "_form",
        "_library",
        "_num_left",
        "_num_rows",
        "_pair_rows",
        "_starts",
        "_x",
        "_y",
    )

    def __init__(self, x: Tensor, counts: Sequence[int], pair_rows: NDArray[np.int64], form: ExpertForm):
        library = native.library()
        assert library is not None
        self._library, self._form, self._dtype, self._num_rows = library, form, x.dtype, x.shape[0]
        self._x = library.widened(x)
        if self._x is x:
            self._x = x.clone()
        self._counts, self._pair_rows = counts, pair_rows
        self._starts = [0, *accumulate(counts)]
        self._y = torch.empty(len(pair_rows), x.shape[1])
        self._num_left = len(counts)

    def compute(self, groups: Sequence[int], experts: Sequence[PackedExpert]) -> None:
        layout = experts[0].layout
        assert layout is not None
        self._library.experts(
            layout.shape_of(self._form),
            self._x,
            self._pair_rows,
            [self._starts[g] for g in groups],
            [self._counts[g] for g in groups],
            [expert.address for expert in experts],
            torch.empty(len(self._pair_rows), layout.d_ffn),
            self._y,
            torch.get_num_threads(),
        )
        self._num_left -= len(groups)

    def result(self, pair_rows: NDArray[np.int64], pair_weights: NDArray[np.float32]) -> Tensor:
        assert self._num_left == 0
        return self._library.weighted_sum(
            self._y, pair_rows, pair_weights, self._num_rows, self._dtype, torch.get_num_threads()
        )


class _TorchRun:
    __slots__ = ("_form", "_num_rows", "_out", "_spans", "_wide", "dtype")

    def __init__(self, x: Tensor, counts: Sequence[int], pair_rows: NDArray[np.int64], form: ExpertForm):
        gathered = x.index_select(0, torch.from_numpy(pair_rows))  # [P, D]
        self._spans = torch.split(gathered, list(counts))  # G of [count, D]
        self._out: list[Tensor | None] = [None] * len(counts)
        self._form, self._num_rows, self.dtype = form, x.shape[0], x.dtype
        self._wide = torch.float64 if x.dtype == torch.float32 else torch.float32

    def compute(self, groups: Sequence[int], experts: Sequence[PackedExpert]) -> None:
        hidden = _joined([e.gate_up(self._spans[g]) for g, e in zip(groups, experts, strict=True)])  # [.., 2F]
        active = torch.split(gated(hidden, self._form), [len(self._spans[g]) for g in groups])
        for g, expert, rows in zip(groups, experts, active, strict=True):
            self._out[g] = expert.down(rows)

    def result(self, pair_rows: NDArray[np.int64], pair_weights: NDArray[np.float32]) -> Tensor:
        done = [rows for rows in self._out if rows is not None]
        assert len(done) == len(self._out)
        out = _joined(done)  # [P, D]
        return weighted_sum(out, pair_rows, pair_weights, self._num_rows, self._wide).to(self.dtype)


def run_experts(
    x: Tensor,
    experts: Sequence[PackedExpert],
    counts: Sequence[int],
    pair_rows: NDArray[np.int64],
    pair_weights: NDArray[np.float32],
    form: ExpertForm,
) -> Tensor:
    """Compute each row's weighted sum over the experts that it chose, all at once.

    x: [R, D]. experts, counts: [G]. pair_rows, pair_weights: [P], ordered by expert, sum(counts) = P. Returns [R, D] in
    x's dtype, as `ExpertRun.result`.
    """
    library = native.library()
    layout = experts[0].layout if experts else None
    if layout is not None and library is not None:
        if x.dtype != layout.dtype or x.shape[1] != layout.d_model:
            raise ValueError(f"rows are {x.dtype} of width {x.shape[1]}, experts {layout.dtype} of {layout.d_model}")
        addresses = [expert.address for expert in experts]
        return library.serve(
            layout.shape_of(form), x.contiguous(), counts, addresses, pair_rows, pair_weights, torch.get_num_threads()
        )
    run = expert_run(x, counts, pair_rows, form)
    run.compute(range(len(experts)), experts)
    return run.result(pair_rows, pair_weights)


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


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
