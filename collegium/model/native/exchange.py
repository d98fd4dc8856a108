"""Binding to the C exchange: a layer's dispatches out and replies in, in one call.

Owns the memory that a call works in; knows descriptors and no connection. Constants of the frames are handed in.
T tokens, K top-k, E experts, W workers, D model, P (row, expert) pairs.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_char_p, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.model import native
from collegium.model.native.dispatch import Planned

MAX_PAIRS = 65_535  # of a call: a count has 16 bits


class State(IntEnum):
    """How far a worker's dispatch has come."""

    UNSENT = 0
    SENT = 1
    DONE = 2
    BROKEN = 3  # a part of a frame has gone one way or the other: the connection is of no use
    SUSPECT = 4  # its rows are not all numbers, though what it was sent is


class _Exchange(ctypes.Structure):
    _fields_ = (
        ("fds", c_void_p),
        *((name, c_int64) for name in ("W", "E", "K", "D", "item_bytes", "T", "num_decode")),
        *((name, c_void_p) for name in ("ids", "worker_of", "workers", "weights", "x", "out")),
        *((name, c_void_p) for name in ("decode", "prefill", "activations")),
        *((name, c_uint64) for name in ("seq", "deadline_us", "epoch")),
        ("patience_us", c_int64),
        ("step", c_uint32),
        ("layer", c_uint16),
        ("dtype", c_uint8),
        ("text_bytes", c_uint8),
        ("text", c_char_p),
        *((name, c_void_p) for name in ("sizes", "tokens", "scratch")),
        *((name, c_void_p) for name in ("experts", "counts", "pair_rows", "pair_weights")),
        *((name, c_void_p) for name in ("gathered", "replies", "sums", "states", "no_hints", "totals")),
        ("blocked_ns", c_int64),
        ("away_ns", c_int64),
        ("began_ns", c_int64),
    )


class Exchange:
    """One router's calls to a fixed set of workers. `call` holds what a call is told; see router_end.c."""

    def __init__(
        self,
        *,
        no_hints: Sequence[NDArray[np.uint8]],
        num_experts: int,
        top_k: int,
        d_model: int,
        dtype: torch.dtype,
        dtype_code: int,
    ):
        """`no_hints`: of each worker's link, one byte that each reply sets: the worker has no use for hints now.

        `dtype_code`: of the rows' type, as frames have it.
        """
        num_workers = len(no_hints)
        self._no_hints = np.array([one.ctypes.data for one in no_hints], np.int64), list(no_hints)
        self.call = _Exchange(W=num_workers, E=num_experts, K=top_k, D=d_model, item_bytes=dtype.itemsize)
        self.call.dtype = dtype_code
        self.fds = np.full(num_workers, -1, np.int32)
        self.states = np.zeros(num_workers, np.int32)
        self.totals = np.zeros((num_workers, 6), np.int64)  # dispatches, rows, pairs, bytes out; rows, bytes back
        self.call.fds, self.call.states = self.fds.ctypes.data, self.states.ctypes.data
        self.call.totals, self.call.no_hints = self.totals.ctypes.data, self._no_hints[0].ctypes.data
        self._dtype, self._address = dtype, ctypes.addressof(self.call)
        self._num_tokens = 0
        self.planned: Planned | None = None
        self.replies = torch.empty(0, d_model, dtype=dtype)

    def fit(self, num_tokens: int) -> None:
        """Have memory for calls of so many tokens."""
        if num_tokens <= self._num_tokens:
            return
        call, workers = self.call, int(self.call.W)
        num_pairs = num_tokens * call.K
        num_rows = min(num_pairs, num_tokens * workers)
        self.planned = planned = Planned(num_pairs, workers, workers * call.E + num_tokens + 1)
        (
            call.sizes, call.tokens, call.pair_weights, call.pair_rows, call.experts, call.counts, call.scratch,
        ) = planned.addresses  # fmt: skip
        self._gathered = torch.empty(num_rows, call.D, dtype=self._dtype)
        self.replies = torch.empty(num_rows, call.D, dtype=self._dtype)
        self._sums = torch.empty(num_tokens, call.D, dtype=torch.float64)
        call.gathered, call.replies, call.sums = (
            memory.data_ptr() for memory in (self._gathered, self.replies, self._sums)
        )
        self._num_tokens = num_tokens

    def run(self) -> bool:
        """Send and receive; True where the sums are written, False where `states` say what is to be done.

        Lets go of the interpreter's lock. IndexError where an id or a worker is out of range.
        """
        return self._call("collegium_exchange")

    def send(self) -> bool:
        """Send alone; True where all is on its way. As `run`."""
        return self._call("collegium_send")

    def receive(self) -> bool:
        """Receive what is on its way from workers whose descriptors are not -1, and sum. As `run`."""
        return self._call("collegium_receive")

    def _call(self, name: str) -> bool:
        done = native.struct_function(name)(self._address)
        if done < 0:
            raise IndexError(f"a choice names an expert or a worker that is not among {self.call.E} and {self.call.W}")
        return done == 0

    @property
    def sent(self) -> list[tuple[int, int, int]]:
        """Of the last call, the workers that were asked, each with its rows and its groups."""
        assert self.planned is not None
        sizes: list[int] = self.planned.sizes.tolist()
        return [(at // 3, sizes[at], sizes[at + 1]) for at in range(0, len(sizes), 3) if sizes[at]]

    def rows_of(self, worker: int) -> Tensor:
        """Return the rows that a worker has sent back, as a view."""
        assert self.planned is not None
        counts: Sequence[int] = self.planned.sizes[::3].tolist()
        begin = sum(counts[:worker])
        return self.replies[begin : begin + counts[worker]]


__all__ = ["MAX_PAIRS", "Exchange", "State"]
