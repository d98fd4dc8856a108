"""Binding to the C loop over a step's layers: attention and gate, exchange with the workers, and on, in one call.

Owns what the loop is told of a model's layers; the exchange is the caller's.
L layers that have routed experts, T tokens, K top-k, E experts, D model, V vocabulary, W rotated numbers of a head.
"""

import ctypes
import itertools
from collections.abc import Mapping, Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.model import native
from collegium.model.native.dispatch import Copies
from collegium.model.native.exchange import Exchange
from collegium.model.native.layer import DecodeTables, FinalNorm, LayerBlock, Workspace

_NO_MEMORY = -2


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("exchange", "blocks", "layers", "worker_of")),
        *((name, c_int64) for name in ("num_blocks", "L", "timeout_us")),
        *((name, c_void_p) for name in ("decode", "prefill", "activations")),
        *((name, c_void_p) for name in ("embedding", "cos_table", "sin_table", "tokens", "positions", "final_norm")),
        *((name, c_void_p) for name in ("h", "cos", "sin")),
        *((name, c_void_p) for name in ("slots", "kv_blocks", "first_block", "lengths")),
        *((name, c_void_p) for name in ("source_blocks", "source_first", "source_lengths", "position_table")),
        *((name, c_void_p) for name in ("q", "attended", "scratch")),
        *((name, c_int64) for name in ("block", "layer", "blocked_ns", "away_ns", "num_threads", "W")),
        ("embedding_scale", c_double),
        ("copies", c_void_p),
        ("activation_rows", c_double),
        *((name, c_void_p) for name in ("workers", "counts", "order", "work", "visits", "given")),
        *((name, c_void_p) for name in ("foretell", "texts")),
        ("text_bytes", c_int64),
        ("stamps", c_void_p),
    )


class _Foretell(ctypes.Structure):
    _fields_ = (
        ("num_ahead", c_int64),
        ("num_known", c_int64),
        *((name, c_void_p) for name in ("wants", "known", "foretold", "chosen", "expected", "frame", "told")),
        ("hinted", c_int64),
        ("right", c_int64),
    )


class Foretelling:
    """What steps foretell of the layers ahead, by their gates, for workers that have a use for hints.

    Owns the memory for that; `open` readies it for one step. hinted, right: choices that were foretold, and of them
    those that were made, counted up.
    """

    def __init__(self, wants: Sequence[bool], *, num_layers: int, num_experts: int, top_k: int, num_ahead: int):
        """`wants`: whether each worker is told at all. `num_ahead`: layers that are foretold at each."""
        self._wants = np.array(wants, np.uint8)
        self.told = np.zeros((len(wants), 2), np.int64)  # hints and their bytes, counted up
        self._expected = np.zeros(num_experts, np.int64)
        self._frame = np.zeros(64 + 4 * num_experts, np.uint8)
        self._shape = (num_layers, top_k)
        self.call = _Foretell(
            num_ahead=num_ahead,
            wants=self._wants.ctypes.data,
            told=self.told.ctypes.data,
            expected=self._expected.ctypes.data,
            frame=self._frame.ctypes.data,
        )
        self._foretold = np.empty((0, 0, 0), np.int32)
        self._known = np.empty((0, 0), np.uint8)
        self.chosen = np.empty((0, 0, 0), np.int64)

    def open(self, num_rows: int, known: Mapping[int, Mapping[int, Sequence[int]]], num_known: int) -> None:
        """Begin a step of so many rows. known: by layer, of the first `num_known`, and row, choices told already."""
        num_layers, top_k = self._shape
        if self._foretold.shape[1] != num_rows or len(self._known) != num_known:
            self._foretold = np.empty((num_layers, num_rows, top_k), np.int32)
            self._known = np.empty((num_known, num_rows), np.uint8)
            self.chosen = np.empty((num_known, num_rows, top_k), np.int64)
            self.call.foretold, self.call.known = self._foretold.ctypes.data, self._known.ctypes.data
            self.call.chosen, self.call.num_known = self.chosen.ctypes.data, num_known
        self._foretold.fill(-1)
        self._known.fill(0)
        for layer, rows in known.items():
            for row, choices in rows.items():
                self._foretold[layer, row] = choices
                self._known[layer, row] = 1


class CopyTable:
    """The copied experts of all layers, as a step reads them. Keeps what it points to."""

    def __init__(self, layers: Sequence[Copies]):
        """Tell of each layer in turn."""
        self._kept = list(layers)
        self.table = np.array([(*one.addresses, len(one.experts)) for one in layers], np.int64)  # [L, 4]
        self.most = max((len(one.experts) for one in layers), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWeights:
    """What a step needs of a model beside its layers: embedding [V, D] in the model's type.

    positions: [positions, D] float32, added to embeddings; None: nothing is. first_layer: MoE layers before these, of
    an encoder.
    """

    embedding: Tensor
    embedding_scale: float
    final_norm: FinalNorm
    rotated: int
    positions: Tensor | None = None
    first_layer: int = 0


class DecodeStep:
    """Steps of so many decode rows, one after another, on their way through the layers.

    `block` is the model's next layer that is to be computed, `layer` the next that has routed experts, as everyone else
    counts layers. Memory is kept from step to step.
    """

    def __init__(self, blocks: Sequence[LayerBlock], weights: StepWeights, num_rows: int):
        """Take memory for `num_rows` rows."""
        self.work = work = Workspace(blocks, num_rows)
        sparse = [block for block in blocks if block.num_experts]
        self.first_layer = first = weights.first_layer
        self.num_layers, self.num_rows, self.top_k = first + len(sparse), num_rows, sparse[0].top_k
        self.cos, self.sin = torch.empty(2, num_rows, weights.rotated)
        self.ids = np.empty((num_rows, self.top_k), np.int64)
        self.weights = np.empty((num_rows, self.top_k), np.float32)
        self._y = torch.empty_like(work.x)
        self._addresses = [
            np.array([0] * skipped + [block.address for block in some], np.int64)
            for some, skipped in ((blocks, 0), (sparse, first))
        ]
        self._told = (work.x.data_ptr(), self._y.data_ptr(), self.ids.ctypes.data, self.weights.ctypes.data)
        self._kept: tuple[object, ...] = ()
        self._choosing: tuple[object, ...] = ()
        self._fits = (0, 0, 0)  # workers, experts and copies
        self._blocks, self._weights = blocks, weights
        self._call = _Step(
            blocks=self._addresses[0].ctypes.data,
            layers=self._addresses[1].ctypes.data,
            num_blocks=len(blocks),
            L=self.num_layers,
            embedding=weights.embedding.data_ptr(),
            embedding_scale=weights.embedding_scale,
            final_norm=weights.final_norm.address,
            position_table=None if weights.positions is None else weights.positions.data_ptr(),
            W=weights.rotated,
            h=work.h.data_ptr(),
            cos=self.cos.data_ptr(),
            sin=self.sin.data_ptr(),
            q=work.q.data_ptr(),
            attended=work.attended.data_ptr(),
            scratch=work.scratch.data_ptr(),
        )

    def begin(
        self,
        tokens: Tensor,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor],
        slots: Tensor,
        tables: DecodeTables,
        num_threads: int,
        sources: DecodeTables | None = None,
    ) -> None:
        """Open a step of tokens [T] at positions [T], both int64; rotation: cosines and sines [positions, W] float32.

        slots, tables, sources: as LayerBlock.project, attend and attend_source take them.
        """
        call = self._call
        self._kept = (tokens, positions, rotation, slots, tables, sources)
        call.block, call.layer, call.num_threads = 0, self.first_layer, num_threads
        call.tokens, call.positions, call.slots = tokens.data_ptr(), positions.data_ptr(), slots.data_ptr()
        call.cos_table, call.sin_table = rotation[0].data_ptr(), rotation[1].data_ptr()
        call.kv_blocks, call.first_block = tables.blocks.ctypes.data, tables.first_block.ctypes.data
        call.lengths = tables.lengths.ctypes.data
        if sources is not None:
            call.source_blocks, call.source_first = sources.blocks.ctypes.data, sources.first_block.ctypes.data
            call.source_lengths = sources.lengths.ctypes.data

    @property
    def layer(self) -> int:
        """The next layer with experts to be computed, or after a call that was disturbed the one that lacks theirs."""
        return self._call.layer

    @property
    def block(self) -> int:
        """The same among all of the model's layers."""
        return self._call.block

    @property
    def is_done(self) -> bool:
        """Whether no layer is left."""
        return self._call.block == self._call.num_blocks

    def add(self, y: Tensor) -> None:
        """Add the sums [T, D] of the layer whose experts were missing, and go on behind it."""
        self._blocks[self.block].add(self.work, y)
        self._call.block += 1
        self._call.layer += 1

    def run(
        self,
        exchange: Exchange,
        worker_of: NDArray[np.int64],
        counts: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
        timeout_s: float,
        copies: CopyTable | None = None,
        activation_rows: float = 0.0,
        foretelling: Foretelling | None = None,
        traced: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None,
    ) -> bool:
        """Compute layers until all are done, and work.x holds the rows for the head (True), or until an exchange is
        disturbed: `layer` and `exchange` say how.

        worker_of: [L] addresses of each layer's [E] workers. counts: choices by layer and expert, [L, E] of decode rows
        and of prompts' and the times an expert was read: counted up. copies: experts with several homes, among which
        each layer chooses as `dispatch.choose` does. foretelling: opened for this step. traced: texts [L, bytes] that
        go with each layer's dispatches, those that begin with 0 do not, and stamps [L, 2] that are written: when its
        rows were sent and were back, in ns of the monotonic clock. The exchange is set but for what a layer sets. Lets
        go of the interpreter's lock. Raises IndexError where a choice is out of range, and MemoryError.
        """
        call, told = self._call, exchange.call
        told.T, told.num_decode, told.workers = self.num_rows, self.num_rows, None
        told.x, told.out, told.ids, told.weights = self._told
        call.exchange, call.worker_of = ctypes.addressof(told), worker_of.ctypes.data
        call.decode, call.prefill, call.activations = (one.ctypes.data for one in counts)
        call.timeout_us = int(timeout_s * 1e6)
        call.texts, call.stamps = (None, None) if traced is None else (one.ctypes.data for one in traced)
        call.text_bytes = 0 if traced is None else traced[0].shape[1]
        call.copies = None
        call.foretell = None if foretelling is None else ctypes.addressof(foretelling.call)
        if copies is not None and copies.most:
            self._fit(told.W, told.E, copies.most)
            call.copies, call.activation_rows = copies.table.ctypes.data, activation_rows
        done = native.struct_function("collegium_step")(ctypes.addressof(call))
        if done == _NO_MEMORY:
            raise MemoryError(f"no memory for a step of {self.num_rows} rows")
        if done < 0:
            raise IndexError(f"a choice names an expert or a worker that is not among {told.E} and {told.W}")
        return done == 0

    def _fit(self, num_workers: int, num_experts: int, most_copies: int) -> None:
        """Have memory to choose among copies in."""
        if self._fits == (num_workers, num_experts, most_copies):
            return
        call, num_tokens = self._call, self.num_rows
        sizes = (num_tokens * self.top_k, num_experts, most_copies + num_workers, num_workers)
        words = np.empty(sum(sizes), np.int64)  # and doubles
        flags = np.empty(num_tokens * num_workers + num_experts, np.uint8)
        start: int = words.ctypes.data
        call.workers, call.counts, call.order, call.work = (
            start + 8 * at for at in itertools.accumulate(sizes[:-1], initial=0)
        )
        call.visits = flags.ctypes.data
        call.given = flags.ctypes.data + num_tokens * num_workers
        self._choosing, self._fits = (words, flags), (num_workers, num_experts, most_copies)

    @property
    def waited_s(self) -> tuple[float, float]:
        """Of the last call: time that rows were away, and of that the time that went by waiting."""
        return self._call.away_ns * 1e-9, self._call.blocked_ns * 1e-9
