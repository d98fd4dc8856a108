"""The forward pass of the commonest family of models on a GPU: decode steps replay CUDA graphs, one for each layer.

Owns DeviceModel. A layer up to its experts is some forty small operations, and launching them one by one takes longer
than computing them; a graph launches them all at once. Graphs have fixed shapes, so there is a set for each number of
rows and of cached positions, both rounded up to powers of two, recorded when a step first needs it. Steps with prompts,
and those that are too large for launches to matter, are computed operation by operation, by the same code. The stream
of rows stays float32, as in the C kernels (see lean). Without CUDA, which is for tests alone, nothing is recorded and
what would have been is computed.
T rows, D model, H query heads, G key-value heads, W head width, K top-k, L cached positions, V vocabulary.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collegium.fabric import logs
from collegium.model.native.layer import AttentionWeights, HeadNorms, LayerWeights, NormWeights
from router_svc import programs
from router_svc.cache_shapes import CacheShape
from router_svc.kv_blocks import BLOCK_TOKENS
from router_svc.paged_attention import PagedCache, StepIndex, attention

_log = logs.get("model")

_MOST_POSITIONS = 1 << 18  # rows times positions of a recorded step: beyond, launches are little beside the work
_FEWEST_POSITIONS = 256
_MOST_SETS = 16


class DeviceModel:
    """Computes a model's packed steps from its weights."""

    def __init__(self, model: nn.Module):
        """Take the attention of a model for which `programs.why_not` found nothing; its layers are emptied of it."""
        inner: Any = model.model
        # It compiles for every length that it meets, which takes tens of milliseconds (seen on an H200).
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._embed, self._rotary, self._head = inner.embed_tokens, inner.rotary_emb, cast(Any, model)
        self._final, self._eps = inner.norm.weight.detach().float(), float(inner.norm.variance_epsilon)
        self.dtype: torch.dtype = inner.norm.weight.dtype
        self.device: torch.device = inner.norm.weight.device
        self.halves: list[HalfLayer] = []
        self.experts: list[nn.Module] = []  # the stand-ins
        self.cache_shapes: dict[int, CacheShape] = {}
        parts = programs.outside(model)
        for idx, layer in enumerate(inner.layers):
            weights = programs.weights_of(parts, layer)
            self.cache_shapes[idx] = programs.cache_shape(weights)
            self.halves.append(HalfLayer(weights))
            self.experts.append(layer.mlp.experts)
            programs.drop_packed(parts, layer)  # kept once: queries, keys and values in one matrix
        self._sets: OrderedDict[tuple[int, int, int], list[DecodeGraphs]] = OrderedDict()  # idle ones, oldest use first

    def set_step_call(self, call: object) -> None:
        """Take no notice: on a device, experts are computed layer by layer."""

    def forward(self, input_ids: Tensor, positions: Tensor, cache: PagedCache, keep: Tensor) -> Tensor:
        """Compute one packed pass: input_ids, positions [1, T]; returns logits [len(keep), V]."""
        index = cache.index
        if index.chunks or (size := _set_size(index)) is None:
            h = self.embed(input_ids)
            cos, sin = self.rotation(h, positions)
            for idx, half in enumerate(self.halves):
                query = half.project(h, cos, sin, index.slots, *cache.pools(idx))
                attended = cache.attend_stored(idx, query, scaling=half.scaling, window=half.window or None)
                x, ids, weights = half.finish(h, attended)
                h += self.call(idx, x, ids, weights)
            return self.logits(h.index_select(0, keep))
        with self._borrowed(cache, *size) as graphs:
            return graphs.run(input_ids, positions, index).index_select(0, keep)

    def embed(self, input_ids: Tensor) -> Tensor:
        """The rows of tokens [1, T]: [T, D] float32."""
        return cast(Tensor, self._embed(input_ids))[0].float()

    def rotation(self, h: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [1, T]: two tensors [T, W] float32."""
        cos, sin = self._rotary(h[None], positions)
        return cos[0], sin[0]

    def call(self, idx: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Have a layer's experts computed."""
        return cast(Any, self.experts[idx]).call(idx, x, ids, weights)

    def logits(self, h: Tensor) -> Tensor:
        """Score rows h [T, D]: [T, V]."""
        return cast(Tensor, self._head.lm_head(_norm(h, self._final, self._eps).to(self.dtype)))

    @contextmanager
    def _borrowed(self, cache: PagedCache, num_rows: int, num_positions: int) -> "Iterator[DecodeGraphs]":
        """Lend a set of graphs; micro-batches of the same size, which take turns, each get one of their own."""
        key = (id(cache), num_rows, num_positions)
        idle = self._sets.setdefault(key, [])
        self._sets.move_to_end(key)
        graphs = idle.pop() if idle else DecodeGraphs(self, cache, num_rows, num_positions)
        try:
            yield graphs
        finally:
            idle.append(graphs)
            while len(self._sets) > _MOST_SETS:
                self._sets.popitem(last=False)


class HalfLayer:
    """One layer up to its experts: norm, query, key and value, rotation, attention's output, norm, gate."""

    def __init__(self, weights: LayerWeights):
        """Use the weights where they are."""
        assert isinstance(weights.attention, AttentionWeights) and weights.gate is not None
        self._w = attention = weights.attention
        self.scaling, self.window = attention.scaling, attention.window
        self.top_k, self._is_normed = weights.gate.top_k, weights.gate.norm_power == 1.0
        self.sizes = (attention.out.shape[0], attention.head_width, self.top_k)
        self._gate = weights.gate.weight.float()
        self._norms: dict[str, tuple[NormWeights, Tensor]] = {
            name: (norm, norm.weight.float())
            for name, norm in (
                ("input", weights.input_norm),
                ("output", weights.output_norm),
                ("query", attention.query_norm),
                ("key", attention.key_norm),
            )
            if norm is not None
        }

    def project(self, h: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the keys and values of rows h [T, D] in the pools [slots, G * W]; returns queries [T, H, W]."""
        w, dtype = self._w, self._w.qkv.dtype
        x = self._normed(h, "input").to(dtype)
        qkv = F.linear(x, w.qkv, w.qkv_bias)
        query_width, kv_width = w.num_heads * w.head_width, w.num_kv_heads * w.head_width
        q, k, v = qkv.split([query_width, kv_width, kv_width], dim=-1)
        values.index_copy_(0, slots, self._clipped(v).contiguous())
        q, k = self._rotated(q, "query", cos, sin), self._rotated(k, "key", cos, sin)
        keys.index_copy_(0, slots, k.to(dtype).flatten(1))
        return q.to(dtype)

    def finish(self, h: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add attended rows [T, H * W] to h; returns (rows for the experts [T, D], ids and weights [T, K] of the gate).

        Weights of a row whose scores are not finite are NaN.
        """
        w = self._w
        h += F.linear(attended, w.out, w.out_bias)
        x = self._normed(h, "output").to(w.out.dtype)
        weights, ids = F.linear(x.float(), self._gate).softmax(-1).topk(self.top_k, dim=-1)
        if self._is_normed:
            weights = weights / weights.sum(-1, keepdim=True)
        return x, ids, weights

    def _normed(self, rows: Tensor, name: str) -> Tensor:
        norm, weight = self._norms[name]
        return _norm(rows, weight, norm.eps)

    def _clipped(self, rows: Tensor) -> Tensor:
        return rows.clamp(-self._w.clip, self._w.clip) if self._w.clip else rows

    def _rotated(self, rows: Tensor, name: str, cos: Tensor, sin: Tensor) -> Tensor:
        """Norm, clip and rotate [T, heads * W]: [T, heads, W] float32."""
        rows, width = rows.float(), self._w.head_width
        if self._w.head_norms is HeadNorms.TOGETHER:
            rows = self._normed(rows, name)
        heads = rows.unflatten(-1, (-1, width))
        if self._w.head_norms is HeadNorms.PER_HEAD:
            heads = self._normed(heads, name)
        heads = self._clipped(heads)
        left, right = heads.chunk(2, -1)
        return heads * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]


class DecodeGraphs:
    """Everything of a decode step of one size but its experts, recorded; not for two steps at the same time."""

    def __init__(self, model: DeviceModel, cache: PagedCache, num_rows: int, num_positions: int):
        """Record for up to `num_rows` rows that look at up to `num_positions` positions each."""
        began_s = time.monotonic()
        self._model, self._cache = model, cache
        self._num_rows, self._num_positions = num_rows, num_positions
        device = model.device
        d_model, width, top_k = model.halves[0].sizes
        is_cuda = device.type == "cuda"

        def on_host(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, pin_memory=is_cuda)

        self._numbers_host = on_host(num_rows * (2 + num_positions), dtype=torch.int64)
        self._numbers = torch.zeros_like(self._numbers_host, device=device)
        self._write, self._lengths = self._numbers[:num_rows], self._numbers[num_rows : 2 * num_rows]
        self._read = self._numbers[2 * num_rows :]
        self._h = torch.zeros(num_rows, d_model, device=device)
        self._cos, self._sin = torch.zeros(2, num_rows, width, device=device)
        self._x_host = on_host(num_rows, d_model, dtype=model.dtype)
        self._y_host = on_host(num_rows, d_model, dtype=model.dtype)
        self._y = torch.zeros(num_rows, d_model, dtype=model.dtype, device=device)
        self._ids_host = on_host(num_rows, top_k, dtype=torch.int64)
        self._weights_host = on_host(num_rows, top_k, dtype=torch.float32)
        self._at = torch.arange(num_positions, device=device)
        self._logits = torch.zeros(0)
        self._write.fill_(cache.spare_slot)
        self._read.fill_(cache.spare_slot)
        self._lengths.fill_(1)
        parts: list[Callable[[], None]] = [lambda idx=idx: self._layer(idx) for idx in range(len(model.halves))]
        parts.append(self._tail)
        if is_cuda:
            for part in (parts[0], parts[-1]):  # libraries set themselves up at a first call, which cannot be recorded
                part()
            torch.cuda.synchronize(device)
            pool: Any = torch.cuda.graph_pool_handle()
            parts = [_recorded(part, pool) for part in parts]
        self._parts = parts
        _log.info(
            "decode steps recorded",
            rows=num_rows,
            positions=num_positions,
            milliseconds=round((time.monotonic() - began_s) * 1000),
        )

    def run(self, input_ids: Tensor, positions: Tensor, index: StepIndex) -> Tensor:
        """Compute a step of decode rows: logits [T, V], which the next one overwrites."""
        model, num_rows = self._model, input_ids.shape[1]
        self._fill(index)
        self._numbers.copy_(self._numbers_host, non_blocking=True)
        h = model.embed(input_ids)
        cos, sin = model.rotation(h, positions)
        for ours, given in ((self._h, h), (self._cos, cos), (self._sin, sin)):
            ours[:num_rows].copy_(given)
        for idx, part in enumerate(self._parts[:-1]):
            part()
            self._wait()
            # Who listens may keep ids and weights; rows are nobody's once they are answered.
            ids, weights = self._ids_host[:num_rows].clone(), self._weights_host[:num_rows].clone()
            self._y_host[:num_rows] = model.call(idx, self._x_host[:num_rows], ids, weights)
        self._parts[-1]()
        return self._logits[:num_rows]

    def _fill(self, index: StepIndex) -> None:
        """Say where rows go and what they look at; rows that are not there look at the spare slot, and write to it."""
        numbers, num_rows = self._numbers_host.numpy(), self._num_rows
        numbers[:] = self._cache.spare_slot
        numbers[num_rows : 2 * num_rows] = 1
        read = numbers[2 * num_rows :].reshape(num_rows, self._num_positions)
        tables = index.decode_tables
        ends = [*tables.first_block[1:].tolist(), len(tables.blocks)]
        within = np.arange(BLOCK_TOKENS)
        spans = zip(tables.first_block.tolist(), ends, tables.lengths.tolist(), strict=True)
        for row, (first, end, length) in enumerate(spans):
            slots = (tables.blocks[first:end, None] * BLOCK_TOKENS + within).ravel()[:length]
            numbers[row], numbers[num_rows + row] = slots[-1], length
            read[row, :length] = slots
            read[row, length:] = slots[0]  # masked, but a number of its own sequence

    def _layer(self, idx: int) -> None:
        half = self._model.halves[idx]
        if idx:
            self._add()
        query = half.project(self._h, self._cos, self._sin, self._write, *self._cache.pools(idx))
        shape = self._model.cache_shapes[idx]
        keys, values = (
            pool.index_select(0, self._read).view(self._num_rows, -1, *size).transpose(1, 2)
            for pool, size in zip(self._cache.pools(idx), (shape.key, shape.value), strict=True)
        )
        mask = self._at < self._lengths[:, None]
        if half.window:
            mask &= self._at >= self._lengths[:, None] - half.window
        rules = {"scaling": half.scaling, "sinks": None, "softcap": None}
        attended = attention(query[:, :, None], keys, values, mask[:, None, None], **rules)
        x, ids, weights = half.finish(self._h, attended.flatten(1))
        for host, found in ((self._x_host, x), (self._ids_host, ids), (self._weights_host, weights)):
            host.copy_(found, non_blocking=True)

    def _tail(self) -> None:
        self._add()
        self._logits = self._model.logits(self._h)

    def _add(self) -> None:
        self._y.copy_(self._y_host, non_blocking=True)
        self._h.add_(self._y)

    def _wait(self) -> None:
        if self._h.is_cuda:
            torch.cuda.current_stream(self._h.device).synchronize()


def _recorded(part: Callable[[], None], pool: Any) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads go on as they like
        part()
    return graph.replay


def _set_size(index: StepIndex) -> tuple[int, int] | None:
    """Say which set of graphs a step of decode rows takes: (rows, positions); None where it is too large."""
    num_rows = 1 << (index.num_decodes - 1).bit_length()
    longest = int(index.decode_tables.lengths.max())
    num_positions = max(_FEWEST_POSITIONS, 1 << (longest - 1).bit_length())
    return (num_rows, num_positions) if num_rows * num_positions <= _MOST_POSITIONS else None


def _norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, in float32."""
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight
