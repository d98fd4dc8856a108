"""Binding to the C half-layers around the experts: norm, query, key and value, rotation, paged attention, output, gate.

Owns AttentionBlock: one layer of the family that most MoE models belong to (RMS norms, grouped queries, rotation of
whole heads). Sums and the residual stream are float32 whatever the model's type. The arithmetic is that of the
modelling classes of transformers 5.23; the order of sums is ours, and in bfloat16 less is rounded between them: neither
the stream nor the gate's scores are.
T rows, B decode rows, D model, H query heads, G key-value heads, W head width, E experts, L cached positions.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.model import native
from collegium.model.kernels import Kernel, PackedLinear


class HeadNorms(IntEnum):
    """How queries and keys are normed before they are rotated."""

    NONE = 0
    PER_HEAD = 1  # each head, by one weight [W]
    TOGETHER = 2  # all heads as one row, by a weight [H * W], [G * W]


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("D", "H", "G", "W", "E", "K", "window", "block_tokens")),
        *((name, c_int32) for name in ("is_bf16", "head_norms", "is_normed")),
        *((name, c_float) for name in ("eps", "scaling", "clip")),
        *((name, c_void_p) for name in ("input_norm", "query_norm", "key_norm", "output_norm")),
        *((name, c_void_p) for name in ("qkv", "qkv_bias", "out", "out_bias", "gate")),
        *((name, c_void_p) for name in ("keys", "values")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """A layer's parameters as they are stored, in the model's type; norms are [D], or as `head_norms` says."""

    qkv: Tensor  # [(H + 2G) * W, D], queries above keys above values
    qkv_bias: Tensor | None
    out: Tensor  # [D, H * W]
    out_bias: Tensor | None
    gate: Tensor  # [E, D]
    top_k: int
    is_normed: bool  # whether the chosen weights are made to sum to one
    input_norm: Tensor
    output_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    head_norms: HeadNorms
    num_heads: int
    num_kv_heads: int
    head_width: int
    eps: float
    scaling: float
    window: int = 0  # positions a row looks back at; 0: all
    clip: float = 0.0  # bound of queries, keys and values; 0: none


class Workspace:
    """One step's rows, used by every layer: h [T, D] float32, x [T, D], and scratch."""

    def __init__(self, block: "AttentionBlock", num_rows: int):
        """Take it; nothing is set."""
        self.h = torch.empty(num_rows, block.d_model)
        self.x = torch.empty(num_rows, block.d_model, dtype=block.dtype)
        self.q = torch.empty(num_rows, block.query_width)
        self.attended = torch.empty(num_rows, block.query_width)
        width = max(block.query_width + 2 * block.kv_width, block.num_experts)
        self.scratch = torch.empty(num_rows, block.d_model + width)


class AttentionBlock:
    """One layer's half before its experts."""

    def __init__(self, weights: AttentionWeights, block_tokens: int):
        """Pack the weights; they are copied."""
        library = native.library()
        assert library is not None
        self._lib = library.raw
        _declare_once(library)
        self.dtype = weights.qkv.dtype
        self.d_model, self.num_experts = weights.out.shape[0], weights.gate.shape[0]
        self.top_k = weights.top_k
        self.scaling, self.window = weights.scaling, weights.window
        self.query_width = weights.num_heads * weights.head_width
        self.kv_width = weights.num_kv_heads * weights.head_width
        packed = [PackedLinear(one, kernel=Kernel.NATIVE) for one in (weights.qkv, weights.out, weights.gate)]
        norms = [
            None if norm is None else norm.float().contiguous()
            for norm in (weights.input_norm, weights.query_norm, weights.key_norm, weights.output_norm)
        ]
        biases = [None if bias is None else bias.contiguous().clone() for bias in (weights.qkv_bias, weights.out_bias)]
        self._kept = (packed, norms, biases)  # alive as long as the struct points to them
        qkv, out, gate = (one.memory()[0].ctypes.data for one in packed)
        input_norm, query_norm, key_norm, output_norm = map(_address, norms)
        qkv_bias, out_bias = map(_address, biases)
        self._struct = _Attention(
            D=self.d_model,
            H=weights.num_heads,
            G=weights.num_kv_heads,
            W=weights.head_width,
            E=self.num_experts,
            K=weights.top_k,
            is_normed=weights.is_normed,
            window=weights.window,
            block_tokens=block_tokens,
            is_bf16=int(self.dtype == torch.bfloat16),
            head_norms=weights.head_norms,
            eps=weights.eps,
            scaling=weights.scaling,
            clip=weights.clip,
            input_norm=input_norm,
            query_norm=query_norm,
            key_norm=key_norm,
            output_norm=output_norm,
            qkv=qkv,
            qkv_bias=qkv_bias,
            out=out,
            out_bias=out_bias,
            gate=gate,
        )
        self._at = ctypes.addressof(self._struct)

    @property
    def address(self) -> int:
        """Where the C struct lies."""
        return self._at

    def bind(self, keys: Tensor, values: Tensor) -> None:
        """Say where keys and values are kept: pools [slots, G * W] in the model's type, which must outlive this."""
        self._struct.keys, self._struct.values = keys.data_ptr(), values.data_ptr()

    def project(self, work: Workspace, cos: Tensor, sin: Tensor, slots: Tensor, num_threads: int) -> None:
        """Set work.q from work.h, and store keys and values. cos, sin [T, W] float32; slots [T] int64."""
        self._lib.collegium_qkv(
            self._at,
            work.h.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            work.h.shape[0],
            work.q.data_ptr(),
            work.scratch.data_ptr(),
            num_threads,
        )

    def attend(self, work: Workspace, tables: "DecodeTables", num_threads: int) -> None:
        """Set work.attended of the first B rows."""
        self._lib.collegium_attend(
            self._at,
            work.q.data_ptr(),
            tables.blocks.ctypes.data,
            tables.first_block.ctypes.data,
            tables.lengths.ctypes.data,
            len(tables.lengths),
            work.attended.data_ptr(),
            num_threads,
        )

    def attend_prompt(self, work: Workspace, first: int, num_rows: int, slots: Tensor, num_threads: int) -> bool:
        """Set work.attended of a prompt's rows from `first` on, the last ones of its positions, which lie in slots [L].

        False where attention over prompts is not computed here. Raises MemoryError.
        """
        found: int = self._lib.collegium_attend_prompt(
            self._at,
            work.q[first].data_ptr(),
            slots.data_ptr(),
            num_rows,
            len(slots),
            work.attended[first].data_ptr(),
            num_threads,
        )
        if found < 0:
            raise MemoryError(f"no memory for the attention of {num_rows} rows to {len(slots)} positions")
        return found == 0

    def finish(self, work: Workspace, num_threads: int) -> tuple[Tensor, Tensor]:
        """Add the attended rows to work.h; set work.x, rows for the experts; return the gate's ids and weights [T, K].

        Weights of a row whose scores are not finite are NaN.
        """
        ids = torch.empty(work.h.shape[0], self.top_k, dtype=torch.int64)
        weights = torch.empty(work.h.shape[0], self.top_k)
        self._lib.collegium_output(
            self._at,
            work.attended.data_ptr(),
            work.h.data_ptr(),
            work.h.shape[0],
            work.x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            work.scratch.data_ptr(),
            num_threads,
        )
        return ids, weights

    def add(self, work: Workspace, y: Tensor) -> None:
        """Add y [T, D], in the model's type, to work.h."""
        y = y.contiguous()  # held until the call is over
        self._lib.collegium_add(work.h.data_ptr(), y.data_ptr(), y.numel(), self._struct.is_bf16)


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """Which blocks hold the positions of each decode row: blocks [N], first_block [B] into them, lengths [B]."""

    blocks: NDArray[np.int64]
    first_block: NDArray[np.int64]
    lengths: NDArray[np.int64]


def norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of h [T, D] by weight [D], all float32."""
    library = native.library()
    assert library is not None
    _declare_once(library)
    out = torch.empty_like(h)
    library.raw.collegium_norm(out.data_ptr(), h.data_ptr(), weight.data_ptr(), h.shape[0], h.shape[1], eps)
    return out


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _declare_once(library: native.Library) -> None:
    pointer, size = c_void_p, c_int64
    native.declare(library.raw, "collegium_qkv", None, [*[pointer] * 5, size, pointer, pointer, c_int])
    native.declare(library.raw, "collegium_attend", None, [*[pointer] * 5, size, pointer, c_int])
    native.declare(library.raw, "collegium_output", None, [*[pointer] * 3, size, *[pointer] * 4, c_int])
    native.declare(
        library.raw, "collegium_attend_prompt", c_int, [pointer, pointer, pointer, size, size, pointer, c_int]
    )
    native.declare(library.raw, "collegium_norm", None, [*[pointer] * 3, size, size, c_float])
    native.declare(library.raw, "collegium_add", None, [pointer, pointer, size, c_int])
