"""The frame format of links: a 64-byte header, then exactly the pairs and rows that it announces.

Owns sizes, codes, the checks on them and the LinkError tree. Does no I/O and knows no transport.
R rows, P (row, weight) pairs, G groups (distinct experts), M misses, D model width. Little endian throughout.
Dispatch body: experts [G] u16, counts [G] u16, pair rows [P] u32, pair weights [P] f32, rows [R, D], traceparent.
Reply body: rows [R, D] in the reply dtype, missed [M] u16; of a reply that failed, a message in UTF-8.
Hint body: experts [G] u16, counts [G] u16.
"""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

MAGIC: Final = 0xC011
VERSION: Final = 2
HEADER_BYTES: Final = 64
SECRET_BYTES: Final = 16
MAX_GROUPS: Final = 65_535  # the width of an expert's index on the wire
MAX_ROWS: Final = 65_535  # a group's count is a u16, and a group may hold every row
MAX_BODY_BYTES: Final = 2**32 - 1
MAX_TEXT_BYTES: Final = 1_024  # a traceparent has 55; a failure's message is cut to this
PAIRS_PER_ROW: Final = 32  # twice the largest top-k of a supported architecture, where nothing else is said
NO_EXPERTS: Final[npt.NDArray[np.uint16]] = np.empty(0, np.uint16)  # [0]; nothing in it can be written


class LinkError(Exception):
    """Anything that a link can raise."""


class LinkClosed(LinkError):
    """The link has ended, at this end or the other; the message says why where that is known."""


class LinkTimeout(LinkError):
    """The deadline passed. The link itself lives on."""


class NoCredit(LinkError):
    """As many dispatches are in flight as the link allows."""


class FrameError(LinkError, ValueError):
    """Sizes, codes or counts of a frame do not add up, or are larger than was agreed."""


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    DISPATCH = 3
    REPLY = 4
    PROGRESS = 5
    GOODBYE = 6
    HINT = 7


class Status(IntEnum):
    """How a dispatch ended."""

    OK = 0
    FAILED = 1
    EXPIRED = 2
    BAD_FRAME = 3


@dataclass(slots=True, kw_only=True)
class Dispatch:
    """Rows of one layer for one worker, each with the experts that it chose there.

    `seq` is unique among the dispatches in flight on a link. Pairs stand in the order of the groups: the first
    counts[0] of them belong to experts[0]. At the worker the arrays are views of the link's memory, valid until the
    reply to this dispatch is handed in.
    """

    seq: int
    layer: int
    step: int = 0
    epoch: int = 0
    micro_batch: int = 0
    deadline_s: float  # this process's monotonic clock
    experts: npt.NDArray[np.uint16]  # [G], distinct
    counts: npt.NDArray[np.uint16]  # [G], each at least 1, sum P
    pair_rows: npt.NDArray[np.uint32]  # [P], below R
    pair_weights: npt.NDArray[np.float32]  # [P]
    x: torch.Tensor  # [R, D], contiguous
    num_prompt_rows: int = 0  # the last so many rows belong to prompts, those before them to decoding sequences
    traceparent: str = ""


@dataclass(slots=True, kw_only=True)
class Reply:
    """The answer to one dispatch: a weighted-sum row for each of its rows, or why there is none.

    `missed` names those of the dispatch's experts that had to be loaded for it.
    """

    seq: int
    status: Status = Status.OK
    y: torch.Tensor | None = None  # [R, D] in the link's reply dtype, contiguous; None unless OK
    compute_us: int = 0
    wait_us: int = 0
    missed: npt.NDArray[np.uint16] = field(default_factory=lambda: NO_EXPERTS)  # [M]; empty unless OK
    message: str = ""

    @property
    def num_misses(self) -> int:
        """How many of the dispatch's experts had to be loaded for it."""
        return len(self.missed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """Advice to a worker: the experts of a layer that rows are expected to choose soon."""

    layer: int
    experts: npt.NDArray[np.uint16]  # [G], distinct
    counts: npt.NDArray[np.uint16]  # [G], tokens expected, each at least 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkShape:
    """What both ends of a link agree on before the first dispatch."""

    dtype: torch.dtype
    reply_dtype: torch.dtype
    d_model: int
    max_rows: int
    num_credits: int
    max_pairs: int = 0  # 0: PAIRS_PER_ROW * max_rows
    are_rows_apart: bool = False  # frames hold headers, counts and pairs; the rows travel beside them
    max_groups: int = field(init=False)
    row_bytes: int = field(init=False)
    reply_row_bytes: int = field(init=False)
    framed_row_bytes: int = field(init=False)  # of `row_bytes`, what a frame holds: all or nothing
    framed_reply_row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Refuse what no frame could carry."""
        for name in ("dtype", "reply_dtype"):
            if getattr(self, name) not in DTYPE_CODES:
                raise ValueError(f"{name} {getattr(self, name)} cannot travel; use one of {list(DTYPE_CODES)}")
        for name, low, high in (("d_model", 1, 2**31), ("max_rows", 1, MAX_ROWS), ("num_credits", 1, 1024)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; a link takes {low} to {high}")
        if self.max_pairs == 0:
            object.__setattr__(self, "max_pairs", PAIRS_PER_ROW * self.max_rows)
        object.__setattr__(self, "max_groups", min(self.max_pairs, MAX_GROUPS))
        object.__setattr__(self, "row_bytes", self.d_model * self.dtype.itemsize)
        object.__setattr__(self, "reply_row_bytes", self.d_model * self.reply_dtype.itemsize)
        object.__setattr__(self, "framed_row_bytes", 0 if self.are_rows_apart else self.row_bytes)
        object.__setattr__(self, "framed_reply_row_bytes", 0 if self.are_rows_apart else self.reply_row_bytes)
        largest = 4 * MAX_GROUPS + 8 * self.max_pairs + MAX_TEXT_BYTES
        if largest + self.max_rows * max(self.row_bytes, self.reply_row_bytes) > MAX_BODY_BYTES:
            raise ValueError(f"max_rows {self.max_rows} of width {self.d_model} is more than a frame can carry (4 GiB)")


DTYPE_CODES: Final = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
DTYPES: Final = {code: dtype for dtype, code in DTYPE_CODES.items()}
