"""Binding to the C loop of a worker: dispatches of some links in, replies out, until there is anything else to do.

Owns the memory that the loop works in; knows descriptors and no connection. Constants of the frames are handed in.
L layers, E experts, D model.
"""

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_uint8, c_uint16, c_void_p
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from collegium.model import native
from collegium.model.architectures import ExpertForm
from collegium.model.native import ExpertLayout

_HEADER_BYTES = 64
_MAX_LOG = 4096
_VISITS = 1 << 16  # words that are kept of visits in a call


@dataclass(frozen=True, slots=True)
class Visited:
    """One batch: its experts rising, how many of its decoding rows chose each, and when it began."""

    layer: int
    began_ns: int
    num_decode_rows: int
    experts: list[int]
    decode_counts: list[int]


class Outcome(IntEnum):
    """Why the loop has ended."""

    OTHER = 0  # there is, or may be, something for the caller
    IDLE = 1  # the time was over


class LinkState(IntEnum):
    """What is to be done about a link after a call."""

    IDLE = 0
    HOLDS = 1  # never after a call
    LEFT = 2  # what it has sent was not taken
    OWES = 3  # the last reply did not go out whole
    BROKE = 4  # the connection has broken, or holds half a frame


class LentLink(ctypes.Structure):
    """One link, as exchange.c has it."""

    _fields_ = (
        ("front", c_void_p),
        ("x", c_void_p),
        ("weights", c_void_p),
        *((name, c_int64) for name in ("offset_us", "last_layer", "last_ns", "layer_ns")),
        *((name, c_int64) for name in ("rows", "pairs", "groups", "layer", "received_ns")),
        *(
            (name, c_int64)
            for name in ("least_sent_us", "least_received_us", "dispatches", "total_rows", "total_pairs")
        ),
        *((name, c_int64) for name in ("bytes_out", "bytes_back", "sent_bytes", "hints")),
        ("fd", c_int32),
        ("state", c_int32),
        ("head", c_uint8 * _HEADER_BYTES),
    )

    def rest(self, row_bytes: int) -> bytes:
        """Return what the socket did not take of the last reply."""
        rows = ctypes.string_at(self.x, self.rows * row_bytes)
        return (bytes(self.head) + rows)[self.sent_bytes :]


class _Answer(ctypes.Structure):
    _fields_ = (
        ("shape", c_void_p),
        ("weights", c_void_p),
        *((name, c_int64) for name in ("L", "E", "D", "item_bytes", "max_rows", "max_pairs", "max_groups")),
        ("until_ns", c_int64),
        ("links", c_void_p),
        ("num_links", c_int64),
        *((name, c_void_p) for name in ("x", "out", "pair_rows", "counts", "at", "pair_weights", "chosen", "found")),
        ("visits", c_void_p),
        ("max_visits", c_int64),
        ("num_visits", c_int64),
        ("of_decode", c_void_p),
        ("log", c_void_p),
        ("max_log", c_int64),
        ("num_log", c_int64),
        *((name, c_int32) for name in ("epoll_fd", "num_threads", "is_waiting", "unused")),
        ("magic", c_uint16),
        ("version", c_uint8),
        ("dtype", c_uint8),
        *((name, c_int64) for name in ("batches", "joined_batches", "joined_dispatches", "groups")),
        *((name, c_int64) for name in ("compute_ns", "wait_ns", "join_wait_ns")),
    )


class Answer:
    """The loop for some links of one shape. `call` and `links`: what it is told and what it says; see exchange.c."""

    def __init__(
        self,
        table: NDArray[np.int64],
        layout: ExpertLayout,
        form: ExpertForm,
        *,
        num_links: int,
        max_rows: int,
        max_pairs: int,
        max_groups: int,
        num_threads: int,
        frames: tuple[int, int, int],
        notes_visits: bool = False,
    ):
        """table [L, E]: addresses of packed experts, 0 where one is not there; read at every dispatch.

        `notes_visits`: keep what each batch visited, for `visits`.
        `frames`: magic, version and the code of the rows' type, which is the layout's.
        """
        width, dtype = layout.d_model, layout.dtype
        self.links = (LentLink * num_links)()
        self.row_bytes = width * dtype.itemsize
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
            links=ctypes.addressof(self.links),
            num_links=num_links,
        )
        self.call.magic, self.call.version, self.call.dtype = frames
        fronts = torch.empty(num_links, _HEADER_BYTES + 4 * max_groups + 8 * max_pairs, dtype=torch.uint8)
        own, joined = torch.empty(num_links, max_rows, width, dtype=dtype), max_rows * num_links
        together = torch.empty(2, joined, width, dtype=dtype)
        num_experts = table.shape[1]
        wide = torch.empty((max_pairs + max_groups) * num_links + 5 * num_experts, dtype=torch.int64)
        weights = torch.empty(max_pairs * num_links)
        self.log = np.zeros((_MAX_LOG, 4), np.int64)
        for idx, link in enumerate(self.links):
            link.front, link.x = fronts[idx].data_ptr(), own[idx].data_ptr()
        self.call.x, self.call.out = together[0].data_ptr(), together[1].data_ptr()
        self.call.pair_rows, self.call.pair_weights = wide.data_ptr(), weights.data_ptr()
        at = self.call.pair_rows + 8 * max_pairs * num_links
        for link in self.links:
            link.weights, at = at, at + 8 * max_groups
        self.call.counts, self.call.at, self.call.chosen, self.call.found, self.call.of_decode = (
            at + 8 * num_experts * part for part in range(5)
        )
        self._visits = np.zeros(max(_VISITS, num_links * (4 + 2 * num_experts)) if notes_visits else 0, np.int64)
        self.call.visits = self._visits.ctypes.data if notes_visits else None
        self.call.max_visits = len(self._visits)
        self.call.log = self.log.ctypes.data
        self._kept: Sequence[object] = (table, layout, fronts, own, together, wide, weights)
        self._address = ctypes.addressof(self.call)

    def visits(self) -> list[Visited]:
        """What the batches of the last call visited, in order."""
        words: list[int] = self._visits[: self.call.num_visits].tolist()
        found: list[Visited] = []
        at = 0
        while at < len(words):
            layer, began_ns, num_decode_rows, num_groups = words[at : at + 4]
            at, end = at + 4, at + 4 + 2 * num_groups
            found.append(Visited(layer, began_ns, num_decode_rows, words[at:end:2], words[at + 1 : end : 2]))
            at = end
        return found

    def run(self, *, until_ns: int, is_logged: bool, is_waiting: bool) -> Outcome:
        """Answer dispatches until a time of the monotonic clock, or until there is anything else to do.

        is_logged: note every dispatch in `log`; is_waiting: hold rows back for those of other routers. Both are for
        several routers. Lets go of the interpreter's lock.
        """
        call = self.call
        call.until_ns, call.is_waiting = until_ns, is_waiting and is_logged
        call.max_log, call.num_log = _MAX_LOG if is_logged else 0, 0
        call.num_visits = 0
        call.batches = call.joined_batches = call.joined_dispatches = call.groups = 0
        call.compute_ns = call.wait_ns = call.join_wait_ns = 0
        for link in self.links:
            link.state = LinkState.IDLE
            link.least_sent_us = link.least_received_us = link.dispatches = 0
            link.total_rows = link.total_pairs = link.bytes_out = link.bytes_back = link.hints = 0
        return Outcome(native.struct_function("collegium_answer")(self._address))
