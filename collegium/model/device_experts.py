"""Experts on a device: slots in its memory, filled from the host, and the kernels that read them where they lie.

Owns DeviceSlots, DeviceExpert (a slot) and DeviceRun. A loading thread copies into a slot on a stream of its own and
returns when the copy has ended, so what has landed may be computed with on any stream; the computing thread waits for
its own stream before it gives slots back. On a CUDA device the kernels are Triton's; on a CPU, where this stands in for
tests alone, plain matmuls.
R rows, D model, F ffn, P (row, expert) pairs, G experts that have rows, S slots, T pairs of a row.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.model.architectures import Activation, ExpertForm
from collegium.model.experts import PackedExpert, gated
from collegium.model.weights import ExpertWeights

_ROW_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of an expert at which the kernels' forms are compared
_TIMED_GROUPS = 16
_LARGEST_FLOAT32 = 32  # pairs of a form that is tried for float32
_TIMED_RUNS = 5


def has_triton() -> bool:
    """Say whether the kernels for a GPU can be used."""
    return importlib.util.find_spec("triton") is not None


class DeviceSlots:
    """The memory of all slots of one device: a tensor for each matrix of an expert, so that kernels find any slot."""

    def __init__(self, like: ExpertWeights, *, num_slots: int, device: torch.device):
        """Take the memory for `num_slots` experts of the shape of `like`."""
        self.device, self.like = device, like
        self.parts = [
            None if part is None else torch.zeros(num_slots, *part.shape, dtype=part.dtype, device=device)
            for part in (like.gate_up, like.down, like.gate_up_bias, like.down_bias)
        ]
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            from collegium.model import triton_kernels as kernels
        else:
            from collegium.model import host_kernels as kernels
        self.kernels: Any = kernels
        self.is_gated = like.is_gated
        self.slots = [DeviceExpert(self, index) for index in range(num_slots)]
        self._forms = [kernels.FORMS[0]] * len(_ROW_COUNTS)  # the fastest at each of _ROW_COUNTS; see `calibrate`

    def form_for(self, counts: Sequence[int]) -> Any:
        """Choose the kernels' form for experts of so many rows, by the number that the expert of a typical pair has."""
        typical = sum(count * count for count in counts) / sum(counts)
        return self._forms[int(np.searchsorted(_ROW_COUNTS[1:], typical, side="right"))]

    def calibrate(self) -> dict[int, Any]:
        """Measure which form is the fastest at how many rows of an expert. Milliseconds on a GPU, and seconds for the
        first time on a machine, when Triton compiles. Returns the choice by number of rows.
        """
        num_groups = min(_TIMED_GROUPS, len(self.slots))
        gate_up = self.parts[0]
        assert gate_up is not None
        # Without tensor cores large tiles gain nothing, and take Triton ten seconds to compile.
        most = _LARGEST_FLOAT32 if gate_up.dtype == torch.float32 else max(form.pairs for form in self.kernels.FORMS)
        forms = [form for form in self.kernels.FORMS if form.pairs <= most]
        for idx, count in enumerate(_ROW_COUNTS):
            times = {form: self._time(form, num_groups, count) for form in forms}
            self._forms[idx] = min(times, key=times.__getitem__)
        return dict(zip(_ROW_COUNTS, self._forms, strict=True))

    def _time(self, form: Any, num_groups: int, count: int) -> float:
        """Time both multiplications of a batch: median seconds."""
        gate_up, down = self.parts[:2]
        assert gate_up is not None and down is not None
        num_pairs = num_groups * count
        x = torch.randn(num_pairs, gate_up.shape[2], device=self.device).to(gate_up.dtype)
        hidden, y = x.new_empty(num_pairs, down.shape[2]), x.new_empty(num_pairs, down.shape[1])
        blocks = blocks_of(range(num_groups), [count] * num_groups, form.pairs).to(self.device)
        times: list[float] = []
        for _ in range(_TIMED_RUNS + 1):  # the first one compiles
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self.kernels.grouped_linear(x, None, gate_up, None, blocks, hidden, form=form, is_gated=self.is_gated)
            self.kernels.grouped_linear(hidden, None, down, None, blocks, y, form=form)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return sorted(times[1:])[_TIMED_RUNS // 2]


class DeviceExpert(PackedExpert):
    """One slot. Its packed form, which the arena keeps, is its matrices and biases one after another."""

    __slots__ = ("_stream", "index", "slab")

    def __init__(self, slab: DeviceSlots, index: int):
        """Be slot `index` of the slab."""
        self.slab, self.index = slab, index
        self.layout, self.address = None, 0
        self.num_bytes = sum(part[index].nbytes for part in slab.parts if part is not None)
        self._stream: Any = None

    def copy_to(self, address: int) -> None:
        """Write the packed bytes to host memory at `address`."""
        with self._copying():
            for part, host in zip(self._parts_here(), self._host_parts(address), strict=True):
                host.copy_(part, non_blocking=True)
        self._wait()

    def copy_from(self, address: int) -> None:
        """Take the packed bytes of another expert from host memory at `address`, page-locked where it can be."""
        with self._copying():
            for part, host in zip(self._parts_here(), self._host_parts(address), strict=True):
                part.copy_(host, non_blocking=True)
        self._wait()

    def take(self, other: PackedExpert) -> None:
        """Not for a slot on a device, which takes weights as they are read: `load`."""
        raise TypeError("a slot on a device is filled by load or copy_from")

    def load(self, weights: ExpertWeights) -> None:
        """Take weights as they were read."""
        given = [weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias]
        with self._copying():
            for part, host in zip(self._parts_here(), [one for one in given if one is not None], strict=True):
                part.copy_(host, non_blocking=True)
        self._wait()

    def _parts_here(self) -> list[Tensor]:
        return [part[self.index] for part in self.slab.parts if part is not None]

    def _host_parts(self, address: int) -> list[Tensor]:
        parts: list[Tensor] = []
        for part in self._parts_here():
            memory = (ctypes.c_uint8 * part.nbytes).from_address(address)
            parts.append(torch.frombuffer(memory, dtype=part.dtype).view(part.shape))
            address += part.nbytes
        return parts

    def _copying(self) -> "AbstractContextManager[object]":
        if not self.slab.is_cuda:
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.slab.device)
        return torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class DeviceRun:
    """The experts of one batch on a device, in any order and any number of parts; each part is two multiplications."""

    def __init__(
        self,
        x: Tensor,
        counts: Sequence[int],
        pair_rows: NDArray[np.int64],
        pair_weights: NDArray[np.float32],
        form: ExpertForm,
        slab: DeviceSlots,
    ):
        """Begin with x [R, D], anywhere; pair_rows, pair_weights [P], ordered by expert: counts [G], sum P."""
        self._slab, self._form = slab, form
        self._counts, self._starts = list(counts), [0, *accumulate(counts)]
        self._num_rows, self._dtype = x.shape[0], x.dtype
        self._x = x.to(slab.device, non_blocking=True)
        pair_of, weight_of = pairs_by_row(pair_rows, pair_weights, self._num_rows)
        depth = pair_of.shape[1]
        numbers = np.concatenate(
            [pair_rows.astype(np.int32), pair_of.ravel(), weight_of.view(np.int32).ravel()], dtype=np.int32
        )
        index = self._send(torch.from_numpy(numbers))  # one transfer for all that is known at the start
        num_pairs, size = len(pair_rows), self._num_rows * depth
        self._rows = index[:num_pairs]
        self._pair_of = index[num_pairs : num_pairs + size].view(-1, depth)
        self._weight_of = index[num_pairs + size :].view(torch.float32).view(-1, depth)
        self._y = torch.empty(num_pairs, x.shape[1], dtype=torch.float32, device=slab.device)

    def compute(self, groups: Sequence[int], experts: Sequence[PackedExpert]) -> None:
        """Queue the experts of some groups (indices into counts); each group is to be run once."""
        slab, num_pairs = self._slab, len(self._rows)
        gate_up, down, gate_up_bias, down_bias = slab.parts
        assert gate_up is not None and down is not None
        slots = [expert.index for expert in experts if isinstance(expert, DeviceExpert)]
        counts = [self._counts[group] for group in groups]
        form = slab.form_for(counts)
        blocks = self._send(blocks_of(slots, counts, form.pairs, [self._starts[group] for group in groups]))
        linear, is_fused = slab.kernels.grouped_linear, is_fused_form(self._form)
        hidden = self._x.new_empty(num_pairs, down.shape[2] if is_fused else gate_up.shape[1])
        linear(self._x, self._rows, gate_up, gate_up_bias, blocks, hidden, form=form, is_gated=is_fused)
        if not is_fused:  # pairs of other parts hold anything: they are computed for nothing, and not read
            hidden = gated(hidden, self._form).contiguous()
        linear(hidden, None, down, down_bias, blocks, self._y, form=form)

    def wait(self) -> None:
        """Wait until what was queued has been computed: the slots are read no more."""
        if self._slab.is_cuda:
            torch.cuda.current_stream(self._slab.device).synchronize()

    def result(self) -> Tensor:
        """Sum once every group has run, and wait for it: [R, D] in x's dtype, in host memory; sums run in float64 for
        float32 rows, else in float32.
        """
        out = torch.empty(self._num_rows, self._y.shape[1], dtype=self._dtype, device=self._slab.device)
        self._slab.kernels.weighted_sum(self._y, self._pair_of, self._weight_of, out)
        return out.cpu()

    def _send(self, numbers: Tensor) -> Tensor:
        return numbers.pin_memory().to(self._slab.device, non_blocking=True) if self._slab.is_cuda else numbers


def is_fused_form(form: ExpertForm) -> bool:
    """Say whether the kernel of the first multiplication applies the gated unit as well."""
    return form.is_gated and form.activation is Activation.SILU


def pairs_by_row(
    pair_rows: NDArray[np.int64], pair_weights: NDArray[np.float32], num_rows: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Give each row's pairs in their order, and their weights: two [R, T], filled up with pair 0 at weight 0."""
    order = np.argsort(pair_rows, kind="stable")
    row_of = pair_rows[order]
    rank = np.arange(len(order)) - np.searchsorted(row_of, row_of)
    depth = int(rank.max(initial=0)) + 1
    pair_of, weight_of = np.zeros((num_rows, depth), np.int32), np.zeros((num_rows, depth), np.float32)
    pair_of[row_of, rank], weight_of[row_of, rank] = order, pair_weights[order]
    return pair_of, weight_of


def blocks_of(slots: Sequence[int], counts: Sequence[int], most: int, starts: Sequence[int] | None = None) -> Tensor:
    """Cut groups into blocks of at most `most` pairs: [3, B] int32 of slot, first pair, pair after the last.

    starts: first pair of each group; without it one group follows the other.
    """
    first_of = [0, *accumulate(counts)][: len(counts)] if starts is None else starts
    found: list[tuple[int, int, int]] = []
    for slot, begin, count in zip(slots, first_of, counts, strict=True):
        end = begin + count
        found += [(slot, first, min(end, first + most)) for first in range(begin, end, most)]
    return torch.tensor(found, dtype=torch.int32).T.contiguous()
