"""Packed attention over a paged KV cache, for unmodified modelling classes of transformers.

Owns the pools of keys and values and the attention function that is registered under ATTENTION_NAME. A step's rows are
packed as [1, T]: decode rows first, then chunks. The model calls `update` with the step's keys and values, then
attention, which
gathers each sequence's positions from the pools. Idea of paging: Kwon et al., PagedAttention, SOSP 2023.
T rows, B decode rows, L cached positions, H query heads, G key-value heads, D head width.
Latent caches (DeepSeek's MLA) keep one narrow latent per position: the model expands what `update` returns, so `update`
gathers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from collegium.model.native.layer import DecodeTables
from router_svc.cache_shapes import CacheShape, window_of
from router_svc.failures import UnusableRowsError
from router_svc.kv_blocks import BLOCK_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The name must not contain "sdpa" or "flash": transformers checks capabilities by such names.
ATTENTION_NAME = "collegium_paged"

_SHORT_TOKENS = 64  # below this, padding costs less than another call


class Cached(Protocol):
    """A run of a sequence's positions that a step computes: those from `begin` to `end`, stored in `blocks`.

    Where the sequence has a source, its `num_source` positions are stored in `source_blocks`.
    """

    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def blocks(self) -> Seq[int]: ...
    @property
    def source_blocks(self) -> Seq[int]: ...
    @property
    def num_source(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRun:
    """A source that is to be encoded, and where what is kept of each of its tokens goes."""

    token_ids: Seq[int]
    slots: Seq[int]


class ProbeCache:
    """Learns the shapes of a model's cache from one forward pass of one token, and what it attends to then."""

    def __init__(self) -> None:
        self.shapes: dict[int, CacheShape] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing is cached."""
        return 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Note the shapes of key and value [1, heads, T, width]."""
        self.shapes[layer_idx] = CacheShape(key=(key.shape[1], key.shape[3]), value=(value.shape[1], value.shape[3]))
        return key, value

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        """Return zeros of the output's shape [1, T, H, Dv]. Another key than `update` got is one the model expanded."""
        shape = self.shapes[layer_idx]
        is_latent = (key.shape[1], key.shape[3]) != shape.key
        self.shapes[layer_idx] = CacheShape(key=shape.key, value=shape.value, is_latent=is_latent)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Decode rows of like length, computed together.

    rows: [b] indices among the step's decode rows, None for all; slots: [b, L]; lengths: [b, 1].
    """

    rows: Tensor | None
    slots: Tensor
    lengths: Tensor


def group_lengths(lengths: Seq[int]) -> list[list[int]]:
    """Split rows into groups whose longest is at most twice the shortest, or short anyway: indices into `lengths`.

    One row of thousands beside many of tens would otherwise make each of them as long as itself.
    """
    groups: list[list[int]] = []
    shortest = 0
    for idx in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not groups or lengths[idx] > 2 * shortest:
            groups.append([])
            shortest = max(lengths[idx], _SHORT_TOKENS)
        groups[-1].append(idx)
    if len(groups) == 1:
        groups[0].sort()
    return groups


class StepIndex:
    """Where a step's rows go and what they attend to; built once per step, used by every layer."""

    def __init__(self, decodes: Seq[Cached], chunks: Seq[Cached], device: torch.device):
        """Lay out a step: runs of one position each that decode, then chunks of prompts."""
        positions: list[int] = []
        slots: list[int] = []
        for row in (*decodes, *chunks):
            positions += range(row.begin, row.end)
            slots += _slots_of_run(row)
        self.device = device
        self.positions = torch.tensor(positions, device=device)[None]  # [1, T]
        self.slots = torch.tensor(slots, device=device)  # [T]
        self.num_decodes = len(decodes)
        self._decodes, self._runs = decodes, (*decodes, *chunks)
        self.chunks = [(row.end - row.begin, row.end) for row in chunks]  # rows, and the position after the last
        self.chunk_slots = [self._slots_of([row.blocks], row.end)[0, : row.end] for row in chunks]
        self._masks: dict[tuple[str, int, int | None], Tensor] = {}
        self._flat_slots: Tensor | None = None

    @functools.cached_property
    def decode_groups(self) -> list[DecodeGroup]:
        """The decode rows by length, with the slots that each looks at."""
        return [self._group(members) for members in group_lengths([row.end for row in self._decodes])]

    @functools.cached_property
    def decode_tables(self) -> DecodeTables:
        """The blocks that each decode row looks at."""
        tables = [row.blocks for row in self._decodes]
        sizes = [len(table) for table in tables]
        return DecodeTables(
            blocks=np.fromiter(itertools.chain.from_iterable(tables), np.int64, sum(sizes)),
            first_block=np.cumsum([0, *sizes[:-1]], dtype=np.int64),
            lengths=np.array([row.end for row in self._decodes], dtype=np.int64),
        )

    @functools.cached_property
    def row_tables(self) -> DecodeTables:
        """The blocks that each row of the step looks at, those of chunks too: of its own sequence up to itself."""
        return self._tables((row.blocks, position + 1) for row in self._runs for position in range(row.begin, row.end))

    @functools.cached_property
    def source_tables(self) -> DecodeTables:
        """The blocks of the source that each row of the step looks at."""
        return self._tables(
            (row.source_blocks, row.num_source) for row in self._runs for _ in range(row.begin, row.end)
        )

    def _tables(self, rows: Iterable[tuple[Seq[int], int]]) -> DecodeTables:
        first: dict[int, int] = {}  # of each table, where it begins
        blocks: list[int] = []
        starts: list[int] = []
        lengths: list[int] = []
        for table, length in rows:
            if id(table) not in first:
                first[id(table)] = len(blocks)
                blocks += table
            starts.append(first[id(table)])
            lengths.append(length)
        return DecodeTables(*(np.array(one, np.int64) for one in (blocks, starts, lengths)))

    def _group(self, members: list[int]) -> DecodeGroup:
        rows = [self._decodes[i] for i in members]
        longest = max(row.end for row in rows)
        slots = self._slots_of([row.blocks for row in rows], longest)[:, :longest]
        lengths = torch.tensor([row.end for row in rows], device=self.device)[:, None]
        # Filled up with the row's own first position: what is masked must still be a number of its own sequence.
        slots = torch.where(torch.arange(longest, device=self.device) < lengths, slots, slots[:, :1])
        return DecodeGroup(
            rows=None if len(members) == len(self._decodes) else torch.tensor(members, device=self.device),
            slots=slots.contiguous(),
            lengths=lengths,
        )

    def _slots_of(self, tables: Seq[Seq[int]], num_tokens: int) -> Tensor:
        """Slot ids by position, [sequences, at least num_tokens]; short tables are filled up with block 0, to be
        masked.
        """
        width = -(-num_tokens // BLOCK_TOKENS)
        padded = torch.tensor([[*t[:width], *([0] * (width - len(t)))] for t in tables], device=self.device)
        return (padded[:, :, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device=self.device)).flatten(1)

    @property
    def all_slots(self) -> Tensor:
        """Slots of all that the step attends to, packed: decode groups, then chunks."""
        if self._flat_slots is None:
            self._flat_slots = torch.cat([*(g.slots.flatten() for g in self.decode_groups), *self.chunk_slots])
        return self._flat_slots

    def decode_mask(self, idx: int, window: int | None) -> Tensor:
        """[b, 1, 1, L] bool of decode group `idx`, true where a row may look."""
        key = ("decode", idx, window)
        if key not in self._masks:
            group = self.decode_groups[idx]
            at = torch.arange(group.slots.shape[1], device=self.device)
            mask = at < group.lengths
            if window:
                mask &= at >= group.lengths - window
            self._masks[key] = mask[:, None, None, :]
        return self._masks[key]

    def chunk_mask(self, idx: int, window: int | None, share: int) -> Tensor:
        """[share * n, L] bool of chunk `idx`, its rows repeated for the query heads that share a key head."""
        key = ("chunk", idx, window)
        if key not in self._masks:
            num_rows, end = self.chunks[idx]
            row = torch.arange(end - num_rows, end, device=self.device)[:, None]
            at = torch.arange(end, device=self.device)
            mask = at <= row
            if window:
                mask &= at > row - window
            self._masks[key] = mask.repeat(share, 1)
        return self._masks[key]


class PagedCache:
    """Pools of keys and values, [slots, heads * width] per layer. Zero at first: padding is read and then masked."""

    def __init__(self, shapes: dict[int, CacheShape], num_blocks: int, dtype: torch.dtype, device: torch.device):
        self.shapes = shapes
        self.spare_slot = num_blocks * BLOCK_TOKENS  # no sequence's: for rows that only fill up a shape
        slots = self.spare_slot + 1
        self._pools = {
            layer: tuple(
                torch.zeros(slots, heads * width, dtype=dtype, device=device) for heads, width in (s.key, s.value)
            )
            for layer, s in shapes.items()
        }
        self._index: StepIndex | None = None

    def begin(self, index: StepIndex) -> None:
        """Set the step that the next forward pass computes."""
        self._index = index

    @property
    def index(self) -> StepIndex:
        """The step at hand."""
        assert self._index is not None
        return self._index

    def pools(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, [slots, heads * width] each."""
        keys, values = self._pools[layer_idx]
        return keys, values

    def copy_blocks(self, copies: Seq[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, in every layer."""
        if not copies:
            return
        slots = torch.tensor(copies)[..., None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS)  # [copies, 2, tokens]
        sources, targets = slots[:, 0].flatten(), slots[:, 1].flatten()
        for pools in self._pools.values():
            for pool in pools:
                pool.index_copy_(0, targets.to(pool.device), pool.index_select(0, sources.to(pool.device)))

    def check(self, run: Cached) -> None:
        """Look at what a step has stored for a run of positions, before others may share it.

        The last layer tells of all: what is no number in a row at any layer is in the stream from there on. Raises
        UnusableRowsError.
        """
        pools = self._pools[max(self._pools)]
        slots = torch.tensor(_slots_of_run(run), device=pools[0].device)
        ends = [end for pool in pools for end in pool.index_select(0, slots).aminmax()]  # NaN if there is any
        if not all(math.isfinite(float(end)) for end in ends):
            raise UnusableRowsError(f"positions {run.begin} to {run.end - 1} have keys or values that are not finite")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Zero: positions are given explicitly."""
        return 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Store the step's keys and values [1, heads, T, width]. Latent caches get back all positions, packed."""
        assert self._index is not None
        keys, values = self._pools[layer_idx]
        keys.index_copy_(0, self._index.slots, key[0].transpose(0, 1).flatten(1))
        values.index_copy_(0, self._index.slots, value[0].transpose(0, 1).flatten(1))
        if not self.shapes[layer_idx].is_latent:
            return key, value
        at = self._index.all_slots
        return keys.index_select(0, at)[None, None], values.index_select(0, at)[None, None]

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        window: int | None,
        sinks: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend with query [1, H, T, D]; returns [1, T, H, Dv]."""
        index = self._index
        assert index is not None
        rules = {"scaling": scaling, "sinks": sinks, "softcap": softcap}
        shape = self.shapes[layer_idx]
        out: list[Tensor] = []
        num_decodes = index.num_decodes
        packed_at = 0
        decoded: list[Tensor] = []
        for idx, group in enumerate(index.decode_groups):
            count, length = group.slots.shape
            if shape.is_latent:
                span = slice(packed_at, packed_at + count * length)
                packed_at += count * length
                k, v = (x[0, :, span].unflatten(1, (count, length)).transpose(0, 1) for x in (key, value))
            else:
                k, v = self._gather(layer_idx, group.slots.flatten(), count)
            q = query[0, :, :num_decodes] if group.rows is None else query[0].index_select(1, group.rows)
            q = q.transpose(0, 1)[:, :, None]  # [b, H, 1, D]
            decoded.append(attention(q, k, v, index.decode_mask(idx, window), **rules)[:, :, 0])  # [b, H, Dv]
        if len(decoded) > 1:
            order = torch.cat([group.rows for group in index.decode_groups if group.rows is not None]).argsort()
            decoded = [torch.cat(decoded).index_select(0, order)]
        out += decoded
        at = num_decodes
        for idx, (num_rows, end) in enumerate(index.chunks):
            if shape.is_latent:
                k, v = key[:, :, packed_at : packed_at + end], value[:, :, packed_at : packed_at + end]
                packed_at += end
            else:
                k, v = self._gather(layer_idx, index.chunk_slots[idx], 1)
            q = query[:, :, at : at + num_rows]
            at += num_rows
            mask = index.chunk_mask(idx, window, q.shape[1] // k.shape[1])
            out.append(attention(q, k, v, mask, **rules)[0].transpose(0, 1))  # [n, H, Dv]
        return (out[0] if len(out) == 1 else torch.cat(out))[None]

    def attend_stored(self, layer_idx: int, query: Tensor, *, scaling: float, window: int | None) -> Tensor:
        """Attend with all rows of the step, query [T, H, D]; returns [T, H * Dv]. Not for latent caches."""
        rows = query.transpose(0, 1)[None]
        out = self.attend(layer_idx, rows, rows, rows, scaling=scaling, window=window, sinks=None, softcap=None)
        return out[0].flatten(1)

    def attend_chunk(
        self,
        layer_idx: int,
        idx: int,
        query: Tensor,
        *,
        scaling: float,
        window: int | None,
        sinks: Tensor | None = None,
        expand: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Attend with the rows of chunk `idx` alone, [1, H, n, D]; returns [n, H, Dv].

        expand: makes of latents [L, C] what they stand for, [L, H * (plain part of a key + value)].
        """
        key, value = self._gather(layer_idx, self.index.chunk_slots[idx], 1)
        if expand is not None:
            num_heads, rotated = query.shape[1], value.shape[3]
            heads = expand(key[0, 0]).unflatten(-1, (num_heads, -1)).transpose(0, 1)[None]  # [1, H, L, ...]
            plain = query.shape[3] - rotated
            key = torch.cat((heads[..., :plain], value.expand(-1, num_heads, -1, -1)), -1)
            value = heads[..., plain:]
        mask = self.index.chunk_mask(idx, window, query.shape[1] // key.shape[1])
        return attention(query, key, value, mask, scaling=scaling, sinks=sinks, softcap=None)[0].transpose(0, 1)

    def _gather(self, layer_idx: int, slots: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        """Copy out positions: two tensors [sequences, heads, L, width]."""
        shape = self.shapes[layer_idx]
        return tuple(
            pool.index_select(0, slots).view(num_sequences, -1, heads, width).transpose(1, 2)
            for pool, (heads, width) in zip(self._pools[layer_idx], (shape.key, shape.value), strict=True)
        )


def _slots_of_run(run: Cached) -> list[int]:
    """Where a run's positions lie in the pools."""
    blocks = run.blocks
    return [blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for p in range(run.begin, run.end)]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Scaled dot-product attention with shared key-value heads.

    query [B, H, n, D], key and value [B, G, L, D], mask broadcastable to [B, 1, H/G * n, L]. sinks [H]: a logit learnt
    per head, which takes probability and gives nothing (gpt_oss). Returns [B, H, n, Dv].
    """
    batch, heads, rows, width = query.shape
    groups = key.shape[1]
    share = heads // groups
    # The query heads of a group look at the same keys: they become further rows of one head, and no key is repeated.
    folded = query.reshape(batch, groups, share * rows, width)
    if sinks is None and not softcap:
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = (folded @ key.transpose(2, 3)) * scaling
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(1, groups, share, 1, 1).expand(batch, -1, -1, rows, 1)
            scores = torch.cat([scores, sink.reshape(batch, groups, share * rows, 1)], -1)
        out = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype) @ value
    return out.reshape(batch, heads, rows, -1)


def attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The function that modelling code calls; `paged` travels through the forward pass's keyword arguments."""
    cache = kwargs["paged"]
    assert isinstance(cache, PagedCache | ProbeCache)
    layer_idx = module.layer_idx
    assert isinstance(layer_idx, int)
    out = cache.attend(
        layer_idx,
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window_of(cast("PreTrainedConfig", module.config), layer_idx),
        sinks=s_aux,
        softcap=softcap,
    )
    return out, None
