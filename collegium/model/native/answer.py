"""Binding to the C loop of a worker: dispatches of one link in, replies out, until there is anything else to do.

Owns the memory that the loop works in; knows descriptors and no connection. Constants of the frames are handed in.
L layers, E experts, D model.
"""

import ctypes
import functools
from ctypes import c_int, c_int32, c_int64, c_uint8, c_uint16, c_void_p
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from collegium.model import native
from collegium.model.architectures import ExpertForm
from collegium.model.native import ExpertLayout

_HEADER_BYTES = 64


class Outcome(IntEnum):
    """Why the loop has ended."""

    OTHER = 0  # what is there is for the caller; nothing of it was taken
    IDLE = 1  # the time was over
    UNSENT_REST = 2  # the last reply did not go out whole
    USELESS = 3  # the connection has broken, or holds half a frame


class _Answer(ctypes.Structure):
    _fields_ = (
        ("shape", c_void_p),
        ("weights", c_void_p),
        *((name, c_int64) for name in ("L", "E", "D", "item_bytes", "max_rows", "max_pairs", "max_groups")),
        ("until_ns", c_int64),
        ("offset_us", c_int64),
        *((name, c_void_p) for name in ("front", "x", "out", "pair_rows", "counts", "chosen")),
        *((name, c_int32) for name in ("fd", "epoll_fd", "num_threads")),
        ("magic", c_uint16),
        ("version", c_uint8),
        ("dtype", c_uint8),
        ("head", c_uint8 * _HEADER_BYTES),
        *((name, c_int64) for name in ("reply_bytes", "sent_bytes", "least_sent_us", "least_received_us")),
        *((name, c_int64) for name in ("batches", "rows", "pairs", "groups", "bytes_out", "bytes_back")),
        *((name, c_int64) for name in ("compute_ns", "wait_ns")),
    )


class Answer:
    """The loop for one link. `call` holds what it is told and what it says; see exchange.c."""

    def __init__(
        self,
        table: NDArray[np.int64],
        layout: ExpertLayout,
        form: ExpertForm,
        *,
        max_rows: int,
        max_pairs: int,
        max_groups: int,
        num_threads: int,
        frames: tuple[int, int, int],
    ):
        """table [L, E]: addresses of packed experts, 0 where one is not there; read at every dispatch.

        `frames`: magic, version and the code of the rows' type, which is the layout's.
        """
        width, dtype = layout.d_model, layout.dtype
        self.call = _Answer(
            shape=layout.shape_of(form),
            weights=table.ctypes.data,
            L=table.shape[0],
            E=table.shape[1],
            D=width,
            item_bytes=dtype.itemsize,
            max_rows=max_rows,
            max_pairs=max_pairs,
            max_groups=max_groups,
            num_threads=num_threads,
        )
        self.call.magic, self.call.version, self.call.dtype = frames
        self._front = torch.empty(_HEADER_BYTES + 4 * max_groups + 8 * max_pairs, dtype=torch.uint8)
        self._rows = torch.empty(2, max_rows, width, dtype=dtype)
        self._wide = torch.empty(max_pairs + 2 * max_groups, dtype=torch.int64)
        self.call.front = self._front.data_ptr()
        self.call.x, self.call.out = self._rows[0].data_ptr(), self._rows[1].data_ptr()
        self.call.pair_rows = self._wide.data_ptr()
        self.call.counts = self.call.pair_rows + 8 * max_pairs
        self.call.chosen = self.call.counts + 8 * max_groups
        self._kept = (table, layout)
        self._address = ctypes.addressof(self.call)

    def run(self) -> Outcome:
        """Answer dispatches until `call.until_ns`, or until there is anything else to do.

        Lets go of the interpreter's lock.
        """
        call = self.call
        call.least_sent_us = call.least_received_us = 0
        call.batches = call.rows = call.pairs = call.groups = call.bytes_out = call.bytes_back = 0
        call.compute_ns = call.wait_ns = 0
        return Outcome(_function()(self._address))

    def rest(self) -> bytes:
        """Return what the socket did not take of the last reply."""
        rows = ctypes.string_at(self.call.out, self.call.reply_bytes - _HEADER_BYTES)
        return (bytes(self.call.head) + rows)[self.call.sent_bytes :]


@functools.cache
def _function() -> "native.Function":
    library = native.library()
    assert library is not None
    native.declare(library.raw, "collegium_answer", c_int, [c_void_p])
    function: native.Function = library.raw.collegium_answer
    return function
