"""Binding to the C kernels: linear maps and experts on packed weights, on a CPU, from one row to thousands.

Owns what tensors mean to the library (collegium.native); `library()` is None where it cannot be used on this machine,
and everything else then runs on torch's own kernels. Tensors here are contiguous and on the CPU; nothing
is checked that the caller can know. Weights are float32 or bfloat16, sums run in float32, over k in one order, that of
the instructions in use: a row's result never depends on the rows beside it. COLLEGIUM_ISA in the environment holds the
library to fewer instructions than the processor has.
R rows, K inputs, O outputs, D model, F ffn, P pairs, G experts that have rows.
"""

import ctypes
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from ctypes import c_double, c_float, c_int, c_int32, c_int64, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.model.architectures import Activation, ExpertForm
from collegium.native import declare
from collegium.native import library as raw_library

DTYPES = (torch.float32, torch.bfloat16)
ISA_NAMES = ("generic", "avx2", "avx512", "amx")

_ACTIVATIONS = (
    Activation.SILU,
    Activation.GELU,
    Activation.GELU_TANH,
    Activation.RELU,
    Activation.CLAMPED_SWIGLU,
)  # in the order of the enumeration in kernels.c
Function = Callable[..., int]  # of the library, once declared

_ALIGNED = 64
_loading = threading.Lock()
_log = logging.getLogger(__name__)


class _Shape(ctypes.Structure):
    _fields_ = (
        ("d_model", c_int64),
        ("d_ffn", c_int64),
        ("is_bf16", c_int32),
        ("has_bias", c_int32),
        ("activation", c_int32),
        ("is_gated", c_int32),
        ("clamp", c_float),
        ("alpha", c_float),
        ("up_at", c_int64),
        ("down_at", c_int64),
        ("gate_up_bias_at", c_int64),
        ("down_bias_at", c_int64),
    )


class Library:
    """The loaded library, set to the widest instructions of this processor."""

    def __init__(self, raw: ctypes.CDLL):
        """Set it up. Raises RuntimeError where it computes wrongly on this machine."""
        self.raw = self._lib = raw
        declare(self._lib, "collegium_choose", c_int, [c_int])
        declare(self._lib, "collegium_packed_bytes", c_int64, [c_int64, c_int64, c_int])
        declare(self._lib, "collegium_pack", None, [c_void_p, c_void_p, c_int64, c_int64, c_int])
        declare(self._lib, "collegium_widen", None, [c_void_p, c_void_p, c_int64])
        declare(self._lib, "collegium_linear", None, [c_void_p, c_int64, *[c_void_p] * 3, *[c_int64] * 3, *[c_int] * 3])
        declare(self._lib, "collegium_experts", c_int, [*[c_void_p] * 6, c_int64, c_void_p, c_void_p, c_int])
        declare(self._lib, "collegium_sum", c_int, [*[c_void_p] * 3, c_int64, c_void_p, c_int64, c_int64, c_int, c_int])
        declare(
            self._lib,
            "collegium_serve",
            c_int,
            [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int],
        )
        most = os.environ.get("COLLEGIUM_ISA", ISA_NAMES[-1])
        if most not in ISA_NAMES:
            raise ValueError(f"COLLEGIUM_ISA is {most!r}; it can be {', '.join(ISA_NAMES)}")
        self.isa: str = ISA_NAMES[self._lib.collegium_choose(ISA_NAMES.index(most))]
        self._check()

    def packed_bytes(self, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int:
        """Bytes of a packed weight [O, K], a multiple of 64."""
        size: int = self._lib.collegium_packed_bytes(num_outputs, num_inputs, _is_bf16(dtype))
        return aligned(size)

    def pack(self, address: int, weight: Tensor) -> None:
        """Pack `weight` [O, K] into memory at `address`."""
        num_outputs, num_inputs = weight.shape
        weight = weight.contiguous()  # held until the call is over
        self._lib.collegium_pack(address, weight.data_ptr(), num_outputs, num_inputs, _is_bf16(weight.dtype))

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None, num_outputs: int, num_threads: int) -> Tensor:
        """rows [R, K] @ weight.T + bias: [R, O] in the rows' dtype, which is that of the packed weight and the bias."""
        wide = self.widened(rows)
        out = torch.empty(rows.shape[0], num_outputs, dtype=rows.dtype)
        is_bf16 = _is_bf16(rows.dtype)
        self._lib.collegium_linear(
            wide.data_ptr(),
            wide.shape[1],
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            rows.shape[0],
            num_outputs,
            rows.shape[1],
            is_bf16,
            is_bf16,
            num_threads,
        )
        return out

    def widened(self, rows: Tensor) -> Tensor:
        """rows, contiguous, in float32; themselves where they are that."""
        if rows.dtype == torch.float32:
            return rows.contiguous()
        rows = rows.contiguous()  # held until the call is over
        wide = torch.empty(rows.shape, dtype=torch.float32)
        self._lib.collegium_widen(wide.data_ptr(), rows.data_ptr(), rows.numel())
        return wide

    def experts(
        self,
        shape: int,
        x: Tensor,
        pair_rows: NDArray[np.int64],
        starts: Sequence[int],
        counts: Sequence[int],
        weights: Sequence[int],
        hidden: Tensor,
        y: Tensor,
        num_threads: int,
    ) -> None:
        """Write y [P, D] of the pairs of some groups: group g computes pairs starts[g] .. + counts[g] with the expert
        at address weights[g]. shape: of `ExpertLayout.shape_of`. x [R, D], hidden [P, F] (scratch) and y are float32;
        pair_rows [P] index into x. Raises MemoryError.
        """
        num_groups = len(starts)
        table = (c_int64 * (3 * num_groups))(*starts, *counts, *weights)
        at = ctypes.addressof(table)
        step = 8 * num_groups
        if self._lib.collegium_experts(
            shape,
            x.data_ptr(),
            pair_rows.ctypes.data,
            at,
            at + step,
            at + 2 * step,
            num_groups,
            hidden.data_ptr(),
            y.data_ptr(),
            num_threads,
        ):
            raise MemoryError(f"no memory for the rows of {len(pair_rows)} pairs")

    def serve(
        self,
        shape: int,
        x: Tensor,
        counts: Sequence[int],
        weights: Sequence[int],
        pair_rows: NDArray[np.int64],
        pair_weights: NDArray[np.float32],
        num_threads: int,
    ) -> Tensor:
        """Run all experts of a batch and sum, in one call: x [R, D] to [R, D], as `experts` and `weighted_sum`."""
        out = torch.empty_like(x)
        num_groups = len(counts)
        table = (c_int64 * (2 * num_groups))(*counts, *weights)
        at = ctypes.addressof(table)
        if self._lib.collegium_serve(
            shape,
            x.data_ptr(),
            x.shape[0],
            pair_rows.ctypes.data,
            pair_weights.ctypes.data,
            len(pair_rows),
            at,
            at + 8 * num_groups,
            num_groups,
            out.data_ptr(),
            num_threads,
        ):
            raise MemoryError(f"no memory for the activations of {len(pair_rows)} pairs")
        return out

    def weighted_sum(
        self,
        y: Tensor,
        pair_rows: NDArray[np.int64],
        pair_weights: NDArray[np.float32],
        num_rows: int,
        dtype: torch.dtype,
        num_threads: int,
    ) -> Tensor:
        """Sum y [P, D] times their weights into their rows: [num_rows, D] in `dtype`, pairs of a row in their order.

        float64 sums for float32, float32 sums for bfloat16.
        """
        out = torch.empty(num_rows, y.shape[1], dtype=dtype)
        if self._lib.collegium_sum(
            y.data_ptr(),
            pair_rows.ctypes.data,
            pair_weights.ctypes.data,
            len(pair_rows),
            out.data_ptr(),
            num_rows,
            y.shape[1],
            _is_bf16(dtype),
            num_threads,
        ):
            raise MemoryError(f"no memory to sort {len(pair_rows)} pairs by row")
        return out

    def peak_flops(self, dtype: torch.dtype, num_threads: int) -> float:
        """Measure the operations a second that the units in use do at most for a type, without memory."""
        declare(self._lib, "collegium_peak", c_double, [c_int64, c_int, c_int])
        best = 0.0
        for _ in range(5):
            began = time.perf_counter()
            done: float = self._lib.collegium_peak(1_000_000, _is_bf16(dtype), min(num_threads, 64))
            best = max(best, done / (time.perf_counter() - began))
        return best

    def _check(self) -> None:
        """Compute something small in every way and compare, so that a miscompiled library is never used."""
        generator = torch.Generator().manual_seed(1)
        for dtype in DTYPES:
            weight = torch.randn(37, 24, generator=generator).to(dtype)
            rows = torch.randn(13, 24, generator=generator).to(dtype)
            packed = torch.empty(self.packed_bytes(37, 24, dtype), dtype=torch.uint8)
            self.pack(packed.data_ptr(), weight)
            expected = rows.double() @ weight.double().T
            if not torch.allclose(self.linear(rows, packed, None, 37, 1).double(), expected, rtol=1e-2, atol=1e-2):
                raise RuntimeError(f"the native kernels compute {dtype} products wrongly with {self.isa} instructions")


class ExpertLayout:
    """Where the parts of one expert lie in its packed bytes, gate, up, down, then biases; the arithmetic between.

    An expert that is not gated has no up: what comes first is then the one map into its hidden rows.
    """

    def __init__(
        self,
        library: Library,
        d_model: int,
        d_ffn: int,
        dtype: torch.dtype,
        *,
        has_bias: bool,
        is_gated: bool = True,
    ):
        """Lay out an expert of that shape."""
        num_maps = 1 + is_gated
        gate, down = library.packed_bytes(d_ffn, d_model, dtype), library.packed_bytes(d_model, d_ffn, dtype)
        biases = (aligned(num_maps * d_ffn * dtype.itemsize), aligned(d_model * dtype.itemsize)) if has_bias else (0, 0)
        self.up_at, self.down_at = gate, num_maps * gate
        self.gate_up_bias_at = self.down_at + down
        self.down_bias_at = self.gate_up_bias_at + biases[0]
        self.num_bytes = self.down_bias_at + biases[1]
        self.d_model, self.d_ffn, self.dtype, self.has_bias = d_model, d_ffn, dtype, has_bias
        self.is_gated = is_gated
        self._shapes: dict[ExpertForm, _Shape] = {}

    def shape_of(self, form: ExpertForm) -> int:
        """Return the address of this layout with the arithmetic that lies between the two maps; it stays valid."""
        shape = self._shapes.get(form)
        if shape is None:
            made = _Shape(
                d_model=self.d_model,
                d_ffn=self.d_ffn,
                is_bf16=_is_bf16(self.dtype),
                has_bias=self.has_bias,
                activation=_ACTIVATIONS.index(form.activation),
                is_gated=self.is_gated,
                clamp=form.clamp,
                alpha=form.alpha,
                up_at=self.up_at,
                down_at=self.down_at,
                gate_up_bias_at=self.gate_up_bias_at,
                down_bias_at=self.down_bias_at,
            )
            shape = self._shapes.setdefault(form, made)  # another thread may have been faster
        return ctypes.addressof(shape)


def library() -> Library | None:
    """The library, or None where it was not built or cannot be used; why is logged once."""
    with _loading:  # it chooses its instructions while it is loaded
        return _load()


@functools.cache
def _load() -> Library | None:
    try:
        return Library(raw_library())
    except (RuntimeError, AttributeError) as error:
        _log.warning("native kernels are not used: %s", error)
        return None


def aligned(num_bytes: int) -> int:
    """Round up to a cache line."""
    return -(-num_bytes // _ALIGNED) * _ALIGNED


@functools.cache
def struct_function(name: str) -> Function:
    """Return a function of the library that takes the address of one struct and returns an int."""
    found = library()
    assert found is not None
    declare(found.raw, name, c_int, [c_void_p])
    function: Function = getattr(found.raw, name)
    return function


def _is_bf16(dtype: torch.dtype) -> int:
    return int(dtype == torch.bfloat16)
