"""Experts on a device: slots in its memory, filled from the host, and the kernels that read them where they lie.

Owns DeviceSlots, DeviceExpert (a slot) and DeviceRun. A loading thread copies into a slot on a stream of its own and
returns when the copy has ended, so what has landed may be computed with on any stream; the computing thread waits for
its own stream before it gives slots back. On a CUDA device the kernels are Triton's; on a CPU, where this stands in for
tests alone, plain matmuls. Not run on a GPU yet.
R rows, D model, F ffn, P (row, expert) pairs, G experts that have rows, S slots.
"""

import ctypes
import importlib.util
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.model.architectures import ExpertForm
from collegium.model.experts import PackedExpert, gated
from collegium.model.weights import ExpertWeights

_FEW_ROWS = (1, 2, 4, 8, 16, 32)  # of each expert, at which the two kernels are compared
_TIMED_RUNS = 5


class GroupedLinear(Protocol):
    """How pairs are multiplied; `triton_kernels.grouped_linear` says what is what."""

    def __call__(
        self, x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, blocks: Tensor, *, num_pairs: int,
        is_few: bool,
    ) -> Tensor: ...  # fmt: skip


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
            from collegium.model import triton_kernels

            self.linear: GroupedLinear = triton_kernels.grouped_linear
            self.block_rows = triton_kernels.block_rows
        else:
            self.linear, self.block_rows = _linear_on_host, _block_rows_on_host
        self.slots = [DeviceExpert(self, index) for index in range(num_slots)]
        self.few_rows = 0  # up to so many rows of the busiest expert the GEMV is the faster form; see `calibrate`

    def calibrate(self) -> None:
        """Measure up to how many rows of an expert the kernel for few is the faster one. Milliseconds on a GPU."""
        weight = self.parts[0]
        assert weight is not None and self.is_cuda
        num_groups = min(8, len(self.slots))
        for count in _FEW_ROWS:
            x = torch.zeros(num_groups * count, weight.shape[2], dtype=weight.dtype, device=self.device)
            times = {is_few: self._time(x, weight, num_groups, count, is_few=is_few) for is_few in (True, False)}
            if times[True] > times[False]:
                break
            self.few_rows = count

    def _time(self, x: Tensor, weight: Tensor, num_groups: int, count: int, *, is_few: bool) -> float:
        blocks = blocks_of(range(num_groups), [count] * num_groups, self.block_rows(is_few)).to(self.device)
        times: list[float] = []
        for _ in range(_TIMED_RUNS + 1):  # the first one compiles
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            self.linear(x, None, weight, None, blocks, num_pairs=len(x), is_few=is_few)
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
    """An ExpertRun over slots of a device. Groups may come in parts; each part is two multiplications."""

    def __init__(self, x: Tensor, counts: Sequence[int], pair_rows: NDArray[np.int64], form: ExpertForm):
        """Begin with x [R, D] on the slots' device."""
        self._x, self._counts, self._form = x, list(counts), form
        self._starts = [0, *accumulate(counts)]
        self._rows = torch.from_numpy(pair_rows)
        self._y = torch.empty(len(pair_rows), x.shape[1], dtype=torch.float32, device=x.device)

    def compute(self, groups: Sequence[int], experts: Sequence[PackedExpert]) -> None:
        """Run the experts of some groups."""
        slots = [expert for expert in experts if isinstance(expert, DeviceExpert)]
        slab = slots[0].slab
        gate_up, down, gate_up_bias, down_bias = slab.parts
        assert gate_up is not None and down is not None
        counts = [self._counts[g] for g in groups]
        pairs = np.concatenate([np.arange(self._starts[g], self._starts[g + 1]) for g in groups])
        is_few = max(counts) <= slab.few_rows
        blocks = blocks_of([slot.index for slot in slots], counts, slab.block_rows(is_few))
        # One transfer for all that the kernels have to know.
        index = torch.cat([blocks.flatten(), self._rows[pairs].int()])
        if slab.is_cuda:
            index = index.pin_memory().to(slab.device, non_blocking=True)
        blocks, rows = index[: blocks.numel()].view(3, -1), index[blocks.numel() :]
        hidden = slab.linear(self._x, rows, gate_up, gate_up_bias, blocks, num_pairs=len(pairs), is_few=is_few)
        active = gated(hidden, self._form).contiguous()
        out = slab.linear(active, None, down, down_bias, blocks, num_pairs=len(pairs), is_few=is_few)
        self._y[torch.from_numpy(pairs).to(self._y.device)] = out.float()

    def result(self, pair_rows: NDArray[np.int64], pair_weights: NDArray[np.float32]) -> Tensor:
        """Sum each row's pairs in their order: no atomics, whose order would be another every time."""
        order = np.argsort(pair_rows, kind="stable")
        row_of = pair_rows[order]
        rank = np.arange(len(order)) - np.searchsorted(row_of, row_of)
        depth = int(rank.max(initial=0)) + 1
        pair_of = np.zeros((len(self._x), depth), np.int64)  # [R, most pairs of a row], filled up with pair 0
        weight_of = np.zeros((len(self._x), depth), np.float32)  # at weight 0
        pair_of[row_of, rank], weight_of[row_of, rank] = order, pair_weights[order]
        device = self._y.device
        wide = torch.float64 if self._x.dtype == torch.float32 else torch.float32
        pairs, weights = torch.from_numpy(pair_of).to(device), torch.from_numpy(weight_of).to(device)
        total = torch.zeros(len(self._x), self._y.shape[1], dtype=wide, device=device)
        for column in range(depth):
            total += self._y.index_select(0, pairs[:, column]).to(wide) * weights[:, column, None].to(wide)
        return total.to(self._x.dtype)


def blocks_of(slots: Sequence[int], counts: Sequence[int], most: int) -> Tensor:
    """Cut groups into blocks of at most `most` pairs: [3, B] int32 of slot, first pair, pair after the last."""
    found: list[tuple[int, int, int]] = []
    for slot, (begin, end) in zip(slots, pairwise([0, *accumulate(counts)]), strict=True):
        found += [(slot, first, min(end, first + most)) for first in range(begin, end, most)]
    return torch.tensor(found, dtype=torch.int32).T.contiguous()


def _block_rows_on_host(is_few: bool) -> int:
    return 1 if is_few else 32


def _linear_on_host(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, blocks: Tensor, *, num_pairs: int, is_few: bool
) -> Tensor:
    """Stand in for the kernels on a CPU."""
    gathered = x if rows is None else x.index_select(0, rows.long())
    out = torch.empty(num_pairs, weight.shape[1], dtype=x.dtype, device=x.device)
    for block in range(blocks.shape[1]):
        slot, first, end = (int(number) for number in blocks[:, block])
        part = gathered[first:end].float() @ weight[slot].float().T
        out[first:end] = part if bias is None else part + bias[slot].float()
    return out
