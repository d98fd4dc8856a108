"""Binding to the C kernels of a decoder layer but for its routed experts: norms, attention, gate, dense parts.

Owns LayerWeights, what a layer computes, as data, and LayerBlock, which packs it and calls. Sums and the residual
stream are float32 whatever the model's type. The arithmetic is that of the modelling classes of transformers 5.23; the
order of sums is ours, and in bfloat16 less is rounded between them: neither the stream nor the gate's scores are.
T rows, B decode rows, D model, H query heads, G key-value heads, W head width, E experts, K top-k, F ffn, L cached
positions. Of latent attention (DeepSeek-AI, DeepSeek-V2, 2024): C its latents' width, P rotated and N other numbers of
a query's head, V a value's width, R rank of latent queries.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import Structure, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from collegium.model import native, packed_memory
from collegium.model.kernels import Kernel, PackedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from collegium.model.architectures import ExpertForm


class HeadNorms(IntEnum):
    """How queries and keys are normed, before they are rotated if nothing else is said."""

    NONE = 0
    PER_HEAD = 1  # each head, by one weight [W]
    TOGETHER = 2  # all heads as one row, by a weight [H * W], [G * W]
    PER_ROTATED_HEAD = 3  # each head, once it is rotated


class GateKind(IntEnum):
    """How a gate makes choices and weights of its scores."""

    SOFTMAX = 0  # the highest of a softmax over all experts
    CHOSEN_SOFTMAX = 1  # a softmax over the highest scores
    SIGMOID = 2  # the highest of sigmoid + correction, weights without the correction
    SPARSE_MIXER = 3  # two experts, each weighed by a softmax over those that score nearly as high


class _Attention(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("H", "G", "W", "rotary", "window", "block_tokens")),
        ("scaling", c_float),
        ("is_bf16", c_int32),
        *((name, c_void_p) for name in ("sinks", "by_distance")),
        ("num_distances", c_int64),
        *((name, c_void_p) for name in ("keys", "values")),
    )


class _Norm(Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("is_centred", c_int32))


class _Gate(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias", "correction")),
        *((name, c_int64) for name in ("num_groups", "kept_groups", "group_tops", "num_shared")),
        *((name, c_int32) for name in ("kind", "is_bf16")),
        *((name, c_float) for name in ("power", "scale", "jitter", "unused")),
    )


class _Mlp(Structure):
    _fields_ = (("shape", c_void_p), ("weights", c_void_p), ("gate", c_void_p))


class _Cross(Structure):
    _fields_ = (*((name, c_void_p) for name in ("query", "query_bias", "out", "out_bias")), ("norm", _Norm))


class _Layer(Structure):
    _fields_ = (
        ("attention", _Attention),
        *((name, c_int64) for name in ("D", "E", "K", "head_width", "value_width", "rotate_from", "rotated")),
        ("query_rank", c_int64),
        *((name, c_int32) for name in ("head_norms", "unused")),
        *((name, c_float) for name in ("clip", "residual")),
        *((name, _Norm) for name in ("input_norm", "output_norm", "query_norm", "key_norm")),
        *((name, c_void_p) for name in ("qkv", "qkv_bias", "query_up", "absorb", "value_up")),
        *((name, c_int64) for name in ("absorb_bytes", "value_up_bytes")),
        *((name, c_void_p) for name in ("up", "out", "out_bias")),
        ("gate", _Gate),
        ("mlp", _Mlp),
        ("cross", _Cross),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class NormWeights:
    """A norm of rows [D]: by the root of the mean square, or, `is_centred`, LayerNorm, which may have a bias."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    is_centred: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """A layer's attention. Heads' norms are [W], or as `head_norms` says."""

    qkv: Tensor  # [(H + 2G) * W, D], queries above keys above values
    qkv_bias: Tensor | None = None
    out: Tensor  # [D, H * W]
    out_bias: Tensor | None = None
    num_heads: int
    num_kv_heads: int
    head_width: int
    rotated: int  # a head's first numbers that are rotated, halves together
    scaling: float
    query_norm: NormWeights | None = None
    key_norm: NormWeights | None = None
    head_norms: HeadNorms = HeadNorms.NONE
    window: int = 0  # positions a row looks back at; 0: all
    clip: float = 0.0  # bound of queries, keys and values; 0: none
    sinks: Tensor | None = None  # [H], a score of each head's that takes its share and gives nothing
    by_distance: Tensor | None = None  # [H, distances], added to scores; farther positions have the last one's


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttentionWeights:
    """A layer's latent attention: what is cached of a position are its latent [C] and a rotated key [P]."""

    down: Tensor  # [R or H * (N + P), D] above [C + P, D]: queries or their latents, latents, rotated keys
    down_bias: Tensor | None = None
    query_up: Tensor | None = None  # [H * (N + P), R]; None: queries are not latent
    up: Tensor  # [H * (N + V), C]: each head's other part of keys, and values
    out: Tensor  # [D, H * V]
    out_bias: Tensor | None = None
    num_heads: int
    latent_width: int
    rotated: int  # P, the last numbers of a query's head, halves together
    head_width: int  # N + P
    value_width: int
    query_norm: NormWeights | None = None  # of latent queries [R]
    key_norm: NormWeights  # [C]
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GateWeights:
    """A layer's gate. Experts may lie in groups, of which some are kept by the sum of their `group_tops` highest."""

    weight: Tensor  # [E, D]; float32 ones of a bfloat16 model stay so
    bias: Tensor | None = None  # [E], of the same type
    correction: Tensor | None = None  # [E], added for the choice alone
    top_k: int
    kind: GateKind = GateKind.SOFTMAX
    norm_power: float = 0.0  # the chosen weights are divided by their norm of this power; 0: they are not
    scale: float = 1.0
    num_groups: int = 1
    kept_groups: int = 1
    group_tops: int = 1
    jitter: float = 0.0  # how near SPARSE_MIXER's experts are
    num_shared: int = 0  # experts E, E + 1 .. that every row has beside those, of weight 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossAttentionWeights:
    """Attention of a decoder's layer to a source's positions, with the heads of the layer's attention to itself."""

    norm: NormWeights
    query: Tensor  # [H * W, D]
    query_bias: Tensor | None = None
    key_value: Tensor  # [2 * G * W, D], keys above values: what is kept of a source's position
    key_value_bias: Tensor | None = None
    out: Tensor  # [D, H * W]
    out_bias: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    """An expert that every row has: gate, where there is one, and up [F, D], down [D, F], and the biases of each."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    biases: tuple[Tensor, ...] | None = None
    form: ExpertForm
    weigh: Tensor | None = None  # [1, D]: the sigmoid of its product is the result's weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """What a layer computes but for its routed experts; parameters as they are stored, in the model's type.

    Without a gate, `mlp` is what the layer has in the experts' place; beside one, it is the experts that rows share.
    """

    input_norm: NormWeights
    output_norm: NormWeights
    attention: AttentionWeights | LatentAttentionWeights
    gate: GateWeights | None
    mlp: MlpWeights | None = None
    residual: float = 1.0  # what the layer adds to the stream is multiplied by
    cross: CrossAttentionWeights | None = None


class Workspace:
    """One step's rows, used by every layer: h [T, D] float32, x [T, D], and scratch."""

    def __init__(self, blocks: Sequence[LayerBlock], num_rows: int):
        """Take it, wide enough for any of the layers; nothing is set."""
        first = blocks[0]
        self.h = torch.empty(num_rows, first.d_model)
        self.x = torch.empty(num_rows, first.d_model, dtype=first.dtype)
        self.q = torch.empty(num_rows, first.query_width)
        self.attended = torch.empty(num_rows, first.attended_width)
        self.scratch = torch.empty(num_rows, max(block.scratch_floats for block in blocks))


class LayerBlock:
    """One layer but for its routed experts."""

    def __init__(self, weights: LayerWeights, block_tokens: int):
        """Pack the weights; they are copied."""
        library = native.library()
        assert library is not None
        self._lib = library.raw
        _declare_once(library)
        attention, gate = weights.attention, weights.gate
        self.dtype = attention.out.dtype
        self.d_model, self.residual = attention.out.shape[0], weights.residual
        self.num_experts = self.top_k = 0
        if gate is not None:
            self.num_experts, self.top_k = gate.weight.shape[0], gate.top_k + gate.num_shared
        self.has_mlp = weights.mlp is not None
        self._kept: list[object] = []  # alive as long as the struct points to them
        self._struct = _Layer(
            D=self.d_model, E=self.num_experts, K=self.top_k, residual=weights.residual, rotated=attention.rotated
        )
        self._struct.input_norm = self._norm(weights.input_norm)
        self._struct.output_norm = self._norm(weights.output_norm)
        self._struct.out = self._pack(attention.out)
        self._struct.out_bias = self._keep(attention.out_bias)
        self.up: PackedLinear | None = None
        if isinstance(attention, AttentionWeights):
            self._take_plain(attention)
        else:
            self._take_latent(attention)
        self._struct.attention.H = attention.num_heads
        self._struct.attention.scaling = self.scaling = attention.scaling
        self._struct.attention.block_tokens = block_tokens
        self._struct.attention.is_bf16 = int(self.dtype == torch.bfloat16)
        self.num_heads, self.head_width = attention.num_heads, attention.head_width
        self.query_width = attention.num_heads * attention.head_width
        if gate is not None:
            self._take_gate(gate)
        if weights.mlp is not None:
            self._take_mlp(weights.mlp)
        self._key_value: PackedLinear | None = None
        if weights.cross is not None:
            self._take_cross(weights.cross)
        self._at = ctypes.addressof(self._struct)
        self.scratch_floats: int = self._lib.collegium_scratch_floats(self._at)

    def _take_plain(self, weights: AttentionWeights) -> None:
        struct, width = self._struct, weights.head_width
        self.window, self.sinks, self.is_latent = weights.window, weights.sinks, False
        self.attended_width = weights.num_heads * width
        struct.attention.G, struct.attention.W, struct.attention.window = weights.num_kv_heads, width, weights.window
        struct.attention.sinks = self._keep(weights.sinks, torch.float32)
        if weights.by_distance is not None:
            struct.attention.by_distance = self._keep(weights.by_distance, torch.float32)
            struct.attention.num_distances = weights.by_distance.shape[1]
        struct.head_width = struct.value_width = width
        struct.head_norms, struct.clip = weights.head_norms, weights.clip
        struct.qkv, struct.qkv_bias = self._pack(weights.qkv), self._keep(weights.qkv_bias)
        if weights.query_norm is not None and weights.key_norm is not None:
            struct.query_norm, struct.key_norm = self._norm(weights.query_norm), self._norm(weights.key_norm)

    def _take_latent(self, weights: LatentAttentionWeights) -> None:
        struct, num_heads, latent = self._struct, weights.num_heads, weights.latent_width
        self.window, self.sinks, self.is_latent = 0, None, True
        self.value_width, self.latent_width = weights.value_width, latent
        self.attended_width = num_heads * weights.value_width
        struct.attention.G, struct.attention.W, struct.attention.rotary = 1, latent, weights.rotated
        struct.head_width, struct.value_width = weights.head_width, weights.value_width
        struct.rotate_from = plain = weights.head_width - weights.rotated
        struct.qkv, struct.qkv_bias = self._pack(weights.down), self._keep(weights.down_bias)
        struct.key_norm = self._norm(weights.key_norm)
        if weights.query_up is not None and weights.query_norm is not None:
            struct.query_rank = weights.query_up.shape[1]
            struct.query_up, struct.query_norm = self._pack(weights.query_up), self._norm(weights.query_norm)
        heads = weights.up.view(num_heads, plain + weights.value_width, latent)
        struct.absorb, struct.absorb_bytes = self._pack_heads(heads[:, :plain].transpose(1, 2))  # [H, C, N]
        struct.value_up, struct.value_up_bytes = self._pack_heads(heads[:, plain:])  # [H, V, C]
        self.up = PackedLinear(weights.up, kernel=Kernel.NATIVE)
        struct.up = self.up.memory()[0].ctypes.data

    def _take_gate(self, gate: GateWeights) -> None:
        self._struct.gate = _Gate(
            weight=self._pack(gate.weight),
            bias=self._keep(gate.bias),
            correction=self._keep(gate.correction, torch.float32),
            num_groups=gate.num_groups,
            kept_groups=gate.kept_groups,
            group_tops=gate.group_tops,
            num_shared=gate.num_shared,
            kind=gate.kind,
            is_bf16=int(gate.weight.dtype == torch.bfloat16),
            power=gate.norm_power,
            scale=gate.scale,
            jitter=gate.jitter,
        )

    def _take_mlp(self, mlp: MlpWeights) -> None:
        library = native.library()
        assert library is not None
        layout = native.ExpertLayout(
            library,
            self.d_model,
            mlp.up.shape[0],
            self.dtype,
            has_bias=mlp.biases is not None,
            is_gated=mlp.gate is not None,
        )
        memory = packed_memory.take(layout.num_bytes)
        maps = [(mlp.up, 0)] if mlp.gate is None else [(mlp.gate, 0), (mlp.up, layout.up_at)]
        for part, at in (*maps, (mlp.down, layout.down_at)):
            library.pack(memory.data_ptr() + at, part.detach())
        if mlp.biases is not None:
            *above, down = mlp.biases
            for part, at in ((torch.cat(above), layout.gate_up_bias_at), (down, layout.down_bias_at)):
                part = part.detach().contiguous()
                ctypes.memmove(memory.data_ptr() + at, part.data_ptr(), part.nbytes)
        self._kept += (layout, memory)
        weigh = None if mlp.weigh is None else self._pack(mlp.weigh)
        self._struct.mlp = _Mlp(shape=layout.shape_of(mlp.form), weights=memory.data_ptr(), gate=weigh)

    def _take_cross(self, cross: CrossAttentionWeights) -> None:
        self._key_value = PackedLinear(cross.key_value.detach(), cross.key_value_bias, kernel=Kernel.NATIVE)
        self._struct.cross = _Cross(
            query=self._pack(cross.query),
            query_bias=self._keep(cross.query_bias),
            out=self._pack(cross.out),
            out_bias=self._keep(cross.out_bias),
            norm=self._norm(cross.norm),
        )

    def _pack(self, weight: Tensor) -> int:
        packed = PackedLinear(weight.detach(), kernel=Kernel.NATIVE)
        self._kept.append(packed)
        return packed.memory()[0].ctypes.data

    def _pack_heads(self, weights: Tensor) -> tuple[int, int]:
        """Pack a weight [O, I] for each head: where the first lies, and from one to the next so many bytes."""
        library = native.library()
        assert library is not None
        num_heads, outputs, inputs = weights.shape
        size = library.packed_bytes(outputs, inputs, weights.dtype)
        memory = packed_memory.take(num_heads * size)
        for head in range(num_heads):
            library.pack(memory.data_ptr() + head * size, weights[head].detach())
        self._kept.append(memory)
        return memory.data_ptr(), size

    def _keep(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        if tensor is None:
            return None
        own = tensor.detach().to(dtype or tensor.dtype, copy=True).contiguous()
        self._kept.append(own)
        return own.data_ptr()

    def _norm(self, norm: NormWeights) -> _Norm:
        return _Norm(
            weight=self._keep(norm.weight, torch.float32),
            bias=self._keep(norm.bias, torch.float32),
            eps=norm.eps,
            is_centred=norm.is_centred,
        )

    @property
    def address(self) -> int:
        """Where the C struct lies."""
        return self._at

    def bind(self, keys: Tensor, values: Tensor) -> None:
        """Say where keys and values are kept, in the model's type: pools [slots, G * W] each, or [slots, C] and
        [slots, P], which must outlive this.
        """
        self._struct.attention.keys, self._struct.attention.values = keys.data_ptr(), values.data_ptr()

    def project(self, work: Workspace, cos: Tensor, sin: Tensor, slots: Tensor, num_threads: int) -> None:
        """Set work.q from work.h, and store keys and values. cos, sin [T, rotated] float32; slots [T] int64."""
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

    def attend(self, work: Workspace, tables: DecodeTables, num_threads: int) -> None:
        """Set work.attended of the first B rows. Raises MemoryError."""
        if self._lib.collegium_attend(
            self._at,
            work.q.data_ptr(),
            tables.blocks.ctypes.data,
            tables.first_block.ctypes.data,
            tables.lengths.ctypes.data,
            len(tables.lengths),
            work.attended.data_ptr(),
            num_threads,
        ):
            raise MemoryError(f"no memory for the latent attention of {len(tables.lengths)} rows")

    def keys_and_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of a source's positions [S, D], in the model's type: two tensors [S, G * W]."""
        assert self._key_value is not None
        keys, values = self._key_value(source).chunk(2, -1)
        return keys, values

    def attend_source(self, work: Workspace, tables: DecodeTables, num_threads: int) -> None:
        """Add what the rows have attended to in their own sequence, and set work.attended of their sources."""
        self._lib.collegium_query_source(
            self._at,
            work.attended.data_ptr(),
            work.h.data_ptr(),
            work.h.shape[0],
            work.q.data_ptr(),
            work.scratch.data_ptr(),
            num_threads,
        )
        self._lib.collegium_attend_source(
            self._at,
            work.q.data_ptr(),
            tables.blocks.ctypes.data,
            tables.first_block.ctypes.data,
            tables.lengths.ctypes.data,
            len(tables.lengths),
            work.attended.data_ptr(),
            num_threads,
        )

    def attend_around(
        self, work: Workspace, lengths: NDArray[np.int64], by_distance: Tensor | None, num_threads: int
    ) -> None:
        """Set work.attended of the rows of sources that lie one after another, each of which looks at all of its own.

        lengths [N], at least 1 each; the layer is bound to their keys and values [S, H * W], S rows in all.
        by_distance: float32 [H, 2 * farthest + 1], added to scores by how far ahead a position is, or None. A row
        doesn't depend on the other sources. Raises MemoryError.
        """
        if self._lib.collegium_attend_around(
            self._at,
            work.q.data_ptr(),
            lengths.ctypes.data,
            len(lengths),
            None if by_distance is None else by_distance.data_ptr(),
            0 if by_distance is None else by_distance.shape[1] // 2,
            work.attended.data_ptr(),
            num_threads,
        ):
            raise MemoryError(f"no memory for the attention of {len(lengths)} sources")

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

        Weights of a row whose scores are not finite are NaN. Without a gate, K is 0.
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

    def add_mlp(self, work: Workspace, num_threads: int) -> None:
        """Add to work.h what the dense part, or the experts that rows share, make of work.x. Raises MemoryError."""
        num_rows = work.h.shape[0]
        if self._lib.collegium_mlp(self._at, work.x.data_ptr(), num_rows, work.h.data_ptr(), num_threads):
            raise MemoryError(f"no memory for a dense layer of {num_rows} rows")

    def add(self, work: Workspace, y: Tensor) -> None:
        """Add the experts' sums y [T, D], in the model's type, to work.h. Raises ValueError for others."""
        if y.shape != work.h.shape or y.dtype != self.dtype:
            raise ValueError(f"sums are {y.dtype} {list(y.shape)}, rows {self.dtype} {list(work.h.shape)}")
        y = y.contiguous()  # held until the call is over
        is_bf16 = self._struct.attention.is_bf16
        self._lib.collegium_add(work.h.data_ptr(), y.data_ptr(), y.numel(), self.residual, is_bf16)


@dataclass(frozen=True, slots=True)
class DecodeTables:
    """Which blocks hold the positions of each decode row: blocks [N], first_block [B] into them, lengths [B]."""

    blocks: NDArray[np.int64]
    first_block: NDArray[np.int64]
    lengths: NDArray[np.int64]


class FinalNorm:
    """The norm behind the last layer."""

    def __init__(self, weights: NormWeights):
        """Copy the weights."""
        library = native.library()
        assert library is not None
        _declare_once(library)
        self._lib = library.raw
        self._kept = [
            None if one is None else one.detach().float().contiguous() for one in (weights.weight, weights.bias)
        ]
        weight, bias = (None if one is None else one.data_ptr() for one in self._kept)
        self._struct = _Norm(weight=weight, bias=bias, eps=weights.eps, is_centred=weights.is_centred)

    @property
    def address(self) -> int:
        """Where the C struct lies."""
        return ctypes.addressof(self._struct)

    def apply(self, h: Tensor) -> Tensor:
        """Norm h [T, D], float32."""
        out = torch.empty_like(h)
        self._lib.collegium_norm(out.data_ptr(), h.data_ptr(), self.address, h.shape[0], h.shape[1])
        return out


@functools.cache
def _declare_once(library: native.Library) -> None:
    pointer, size = c_void_p, c_int64
    native.declare(library.raw, "collegium_scratch_floats", size, [pointer])
    native.declare(library.raw, "collegium_qkv", None, [*[pointer] * 5, size, pointer, pointer, c_int])
    native.declare(library.raw, "collegium_attend", c_int, [*[pointer] * 5, size, pointer, c_int])
    native.declare(library.raw, "collegium_query_source", None, [*[pointer] * 3, size, *[pointer] * 2, c_int])
    native.declare(library.raw, "collegium_attend_source", None, [*[pointer] * 5, size, pointer, c_int])
    native.declare(library.raw, "collegium_output", None, [*[pointer] * 3, size, *[pointer] * 4, c_int])
    native.declare(library.raw, "collegium_mlp", c_int, [pointer, pointer, size, pointer, c_int])
    native.declare(library.raw, "collegium_attend_around", c_int, [*[pointer] * 3, size, pointer, size, pointer, c_int])
    native.declare(
        library.raw, "collegium_attend_prompt", c_int, [pointer, pointer, pointer, size, size, pointer, c_int]
    )
    native.declare(library.raw, "collegium_norm", None, [*[pointer] * 3, size, size])
    native.declare(library.raw, "collegium_add", None, [pointer, pointer, size, c_float, c_int])
