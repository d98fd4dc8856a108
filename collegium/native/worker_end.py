"""Binding to a worker's end of its links (worker_end.c).

Owns the C end and copies of what it tells; hands addresses of rows on without looking at them. One thread owns an end.
R rows, P (row, expert) pairs, G groups (distinct experts), L layers, E experts, D model.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from collegium import native

_HEADER_BYTES = 64
_BATCH_WORDS = 13
_TAKEN_WORDS = 21
_NOTED_WORDS = 8
_NUM_TOTALS = 15
_SPAN = struct.Struct("@8q")
NUM_STATS = 9  # in the order of LinkStats


class Why(IntFlag):
    """What there is for the caller after a call; 0: its time is over."""

    CONTROL = 1  # the control descriptor is readable
    ENDED = 2  # links have ended, and are to be removed
    HINTS = 4
    BATCH = 8  # a batch is at hand that is to be answered, failed or split
    ARRIVED = 16  # a dispatch waits for `take` that cannot be served as it is
    FULL = 32  # what was noted is to be fetched


class Reason(IntEnum):
    """Why a link has ended."""

    OPEN = 0
    CLOSED_BY_PEER = 1
    BROKE = 2
    BAD_HEADER = 3
    NO_CREDIT = 4
    TWICE = 5  # a sequence number that is in flight
    BAD_HINT = 6
    SLOW_FRAME = 7
    SLOW_READER = 8
    NO_MEMORY = 9


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that is the caller's to compute: addresses of memory that stays until it is answered.

    x [R, D] rows; experts, counts, decode_counts [G]; pair_rows [P] int64 and pair_weights [P] float32, by expert.
    """

    num_dispatches: int
    layer: int
    num_rows: int
    num_decode_rows: int
    x: int
    experts: list[int]
    counts: list[int]
    decode_counts: list[int]
    pair_rows: NDArray[np.int64]
    pair_weights: NDArray[np.float32]


class Taken(NamedTuple):
    """A dispatch in the caller's hands: what its header says, and addresses of its body until it is answered."""

    handle: int
    link_id: int
    seq: int
    layer: int
    step: int
    epoch: int
    micro_batch: int
    deadline_us: int
    num_rows: int
    num_pairs: int
    num_groups: int
    num_prompt_rows: int
    text_bytes: int
    received_ns: int
    is_odd: int
    experts: int
    counts: int
    pair_rows: int
    pair_weights: int
    x: int
    text: int
    row_bytes: int


@dataclass(frozen=True, slots=True)
class Visited:
    """One batch: its experts rising, how many of its decoding rows chose each, and when it began."""

    layer: int
    began_ns: int
    num_decode_rows: int
    experts: list[int]
    decode_counts: list[int]


@dataclass(frozen=True, slots=True)
class StepBegun:
    """A router's dispatch of a step's first layer, while there are several links: which were active then."""

    link_id: int
    num_decode_rows: int
    at_ns: int
    active: list[int]


class Span(NamedTuple):
    """A traced dispatch that was answered; times are of the monotonic clock."""

    layer: int
    num_pairs: int
    num_groups: int
    num_joined: int
    wait_ns: int
    began_ns: int
    ended_ns: int
    text: bytes


@dataclass(slots=True)
class Totals:
    """Counted since the end was made."""

    dispatches: int = 0
    rows: int = 0
    pairs: int = 0
    batches: int = 0
    joined_batches: int = 0
    joined_dispatches: int = 0
    groups: int = 0
    compute_ns: int = 0
    wait_ns: int = 0
    join_wait_ns: int = 0
    answers: int = 0  # but for dispatches that were taken
    failed: int = 0
    hits: int = 0  # experts of batches that were computed without coming back
    whole: int = 0  # dispatches of such batches
    parked: int = 0  # times that a link was not read for want of memory


class WorkerEnd:
    """A worker's end of all its links."""

    def __init__(self, control_fd: int, *, budget_bytes: int, frame_within_s: float, reader_within_s: float):
        """`control_fd` makes a call return when it is readable. `budget_bytes`: of all links' dispatches together.

        A frame that takes longer than `frame_within_s` from its first byte to its last ends its link, as does a reply
        of which the router takes nothing for `reader_within_s`. Raises MemoryError.
        """
        self._lib = _declared()
        self._totals = np.zeros(_NUM_TOTALS, np.int64)
        self._end: int | None = self._lib.collegium_end_new(
            control_fd, budget_bytes, int(frame_within_s * 1e9), int(reader_within_s * 1e9), self._totals.ctypes.data
        )
        if not self._end:
            raise MemoryError("no memory or descriptor for a worker's end of its links")
        self._noted = np.zeros(_NOTED_WORDS, np.int64)
        self._words = np.zeros(_TAKEN_WORDS, np.int64)
        self._head = bytearray(_HEADER_BYTES)
        self._head_at = ctypes.addressof((ctypes.c_char * _HEADER_BYTES).from_buffer(self._head))
        self._kept: tuple[object, ...] = ()
        self.num_waiting = 0  # dispatches that had arrived and were not answered when notes were last fetched

    def close(self) -> None:
        """Free everything; descriptors are the caller's."""
        if self._end:
            self._lib.collegium_end_free(self._end)
            self._end = None

    def serve(
        self,
        table: NDArray[np.int64],
        leases: NDArray[np.uint8],
        num_experts: Sequence[int],
        *,
        shape: int | None,
        d_model: int,
        dtype_code: int,
        num_threads: int,
        notes_visits: bool,
    ) -> None:
        """Say what experts there are, and with a `shape` (of packed experts) that batches are computed in `run`.

        table [L, E]: addresses of packed experts, 0 where one is not there. leases [L, E]: not 0 while one is computed
        from; who takes an expert out of the table waits until it is 0 again. notes_visits: for `visits`.
        """
        bounds = np.array(num_experts, np.int64)
        self._kept = (table, leases)
        num_layers, most = table.shape
        if self._lib.collegium_end_serve(
            self._end, shape, table.ctypes.data, leases.ctypes.data, bounds.ctypes.data, num_layers, most, d_model,
            dtype_code, num_threads, notes_visits,
        ):  # fmt: skip
            raise MemoryError(f"no memory for a table of {num_layers} x {most} experts, or too many of them")

    def add(
        self, fd: int, link_id: int, agreed: Sequence[int], sent_us: int, received_us: int, stats: NDArray[np.int64]
    ) -> int:
        """Take over a connected socket, but for its closing; returns the link's handle. Raises MemoryError.

        agreed: D, bytes of an item of rows and of replies, the codes of both types, most rows, pairs and groups,
        credits, whether rows travel apart. sent_us, received_us: of its first frame. stats [9]: counted up.
        """
        words = np.array(agreed, np.int64)
        link: int | None = self._lib.collegium_end_add(
            self._end, fd, link_id, words.ctypes.data, sent_us, received_us, stats.ctypes.data
        )
        if not link:
            raise MemoryError(f"no memory for link {link_id}")
        return link

    def remove(self, link: int) -> None:
        """Forget a link, before its descriptor is closed; what is taken of it is still to be answered."""
        self._lib.collegium_end_remove(self._end, link)

    def post(self, link: int, frame: bytes) -> None:
        """Send a small frame before any reply, now or when the router reads; not while replies wait."""
        self._lib.collegium_end_post(self._end, link, frame, len(frame))

    def say(self, link: int, frame: bytes) -> None:
        """Send a small frame where all of it can go out at once."""
        self._lib.collegium_end_say(link, frame, len(frame))

    def why(self, link: int) -> tuple[Reason, int, bytes]:
        """Why a link has ended, with errno, and the header of the frame that was being read."""
        error = c_int64()
        reason = self._lib.collegium_end_reason(link, ctypes.addressof(error), self._head_at)
        return Reason(reason), error.value, bytes(self._head)

    def hint_body(self, link: int) -> bytes:
        """The body of the hint that ended a link."""
        at = c_void_p()
        size = self._lib.collegium_end_hint_body(link, ctypes.addressof(at))
        return ctypes.string_at(at.value, size) if at.value else b""

    def move(self, wait_s: float) -> Why:
        """Move bytes, waiting so long at most for anything to do; compute nothing."""
        return Why(self._lib.collegium_end_move(self._end, int(wait_s * 1e9)))

    def run(self, until_ns: int, *, is_waiting: bool) -> Why:
        """Read, compute and answer until a time of the monotonic clock, or until there is something for the caller.

        is_waiting: hold rows back for those of other routers. Lets go of the interpreter's lock.
        """
        return Why(self._lib.collegium_end_run(self._end, until_ns, is_waiting))

    def batch(self) -> Batch:
        """The batch at hand."""
        self._lib.collegium_end_batch(self._end, self._words.ctypes.data)
        words: list[int] = self._words[:_BATCH_WORDS].tolist()
        num_pairs, num_groups = words[3], words[4]
        return Batch(
            num_dispatches=words[0],
            layer=words[1],
            num_rows=words[2],
            num_decode_rows=words[5],
            x=words[7],
            experts=_int64s(words[8], num_groups).tolist(),
            counts=_int64s(words[9], num_groups).tolist(),
            decode_counts=_int64s(words[10], num_groups).tolist(),
            pair_rows=_int64s(words[11], num_pairs),
            pair_weights=np.ctypeslib.as_array((ctypes.c_float * num_pairs).from_address(words[12])),
        )

    def answer(self, y: int, missed: NDArray[np.uint16], began_ns: int, ended_ns: int) -> None:
        """Answer the batch at hand with rows at `y` [R, D], in the links' reply type; missed: what had to be loaded."""
        self._lib.collegium_end_answer(self._end, y, missed.ctypes.data, len(missed), began_ns, ended_ns)

    def fail(self, status: int, text: bytes) -> None:
        """Answer the batch at hand by saying why not."""
        self._lib.collegium_end_fail(self._end, status, text, len(text))

    def split(self) -> None:
        """Give the batch at hand back; each of its dispatches will be one by itself."""
        self._lib.collegium_end_split(self._end)

    def progress(self) -> None:
        """Tell the routers of the batch at hand that it is slow and not lost."""
        self._lib.collegium_end_progress(self._end)

    def take(self, *, only_odd: bool = False) -> Taken | None:
        """Take the oldest dispatch that waits; with `only_odd` one that cannot be served as it is."""
        handle: int | None = self._lib.collegium_end_take(self._end, only_odd, self._words.ctypes.data)
        if not handle:
            return None
        words: list[int] = self._words.tolist()
        return Taken._make((handle, *words))

    def reply(
        self,
        handle: int,
        status: int,
        y: int | None,
        missed: NDArray[np.uint16] | None,
        compute_us: int,
        wait_us: int,
        text: bytes,
    ) -> None:
        """Answer what was taken: with rows at `y`, or where status is not 0 with a text."""
        num_missed = 0 if missed is None else len(missed)
        at = None if missed is None else missed.ctypes.data
        self._lib.collegium_end_reply(
            self._end, handle, status, y, at, num_missed, compute_us, wait_us, text, len(text)
        )

    def hints(self) -> list[tuple[int, int, NDArray[np.uint16], NDArray[np.uint16]]]:
        """Hints of what is not all here since the last call: link, layer, experts [G], counts [G]; oldest first."""
        found: list[tuple[int, int, NDArray[np.uint16], NDArray[np.uint16]]] = []
        while self._lib.collegium_end_hint(self._end, self._words.ctypes.data):
            link_id, layer, num_groups, at = self._words[:4].tolist()
            both = np.frombuffer(ctypes.string_at(at, 4 * num_groups), np.uint16)
            found.append((link_id, layer, both[:num_groups], both[num_groups:]))
        return found

    def keep_hints(self, *, keeps: bool) -> None:
        """Say whether hints are of any use."""
        self._lib.collegium_end_keep_hints(self._end, keeps)

    def noted(self) -> tuple[list[Visited], list[StepBegun], list[Span]]:
        """Fetch what calls have noted since the last time."""
        self._lib.collegium_end_noted(self._end, self._noted.ctypes.data)
        visits, num_visits, log, num_log, spans, num_spans, span_bytes, self.num_waiting = self._noted.tolist()
        if not (num_visits or num_log or num_spans):
            return [], [], []
        found = (
            _visits(_int64s(visits, num_visits).tolist()),
            _steps(_int64s(log, num_log).tolist()),
            [_span(ctypes.string_at(spans + at * span_bytes, span_bytes)) for at in range(num_spans)],
        )
        self._lib.collegium_end_drained(self._end)
        return found

    @property
    def used_bytes(self) -> int:
        """Memory that dispatches and replies take."""
        used: int = self._lib.collegium_end_used(self._end) if self._end else 0
        return used

    @property
    def totals(self) -> Totals:
        """A copy of what was counted. From any thread."""
        return Totals(*self._totals.tolist())


def join_until(links: Sequence[tuple[int, int, int, bool]], num_layers: int, layer: int, arrived_ns: int) -> int:
    """Until when a layer's rows that arrived at `arrived_ns` wait for those of other routers.

    links: of each its last layer, when that was, ns from layer to layer, whether its rows are among those that wait.
    """
    words = np.array(links, np.int64).reshape(-1, 4)
    until: int = _declared().collegium_join_until(words.ctypes.data, len(words), num_layers, layer, arrived_ns)
    return until


def _visits(words: list[int]) -> list[Visited]:
    found: list[Visited] = []
    at = 0
    while at < len(words):
        layer, began_ns, num_decode_rows, num_groups = words[at : at + 4]
        at, end = at + 4, at + 4 + 2 * num_groups
        found.append(Visited(layer, began_ns, num_decode_rows, words[at:end:2], words[at + 1 : end : 2]))
        at = end
    return found


def _steps(words: list[int]) -> list[StepBegun]:
    found: list[StepBegun] = []
    at = 0
    while at < len(words):
        link_id, num_rows, at_ns, num_active = words[at : at + 4]
        at += 4 + num_active
        found.append(StepBegun(link_id, num_rows, at_ns, words[at - num_active : at]))
    return found


def _span(raw: bytes) -> Span:
    layer, num_pairs, num_groups, num_joined, wait_ns, began_ns, ended_ns, text_bytes = _SPAN.unpack_from(raw)
    text = raw[_SPAN.size : _SPAN.size + text_bytes]
    return Span(layer, num_pairs, num_groups, num_joined, wait_ns, began_ns, ended_ns, text)


def _int64s(address: int, num: int) -> NDArray[np.int64]:
    return np.ctypeslib.as_array((c_int64 * num).from_address(address))


@functools.cache
def _declared() -> ctypes.CDLL:
    lib, at, word = native.library(), c_void_p, c_int64
    for name, result, arguments in (
        ("new", at, [c_int, word, word, word, at]),
        ("free", None, [at]),
        ("serve", c_int, [at, at, at, at, at, *[word] * 3, c_int, c_int, c_int]),
        ("add", at, [at, c_int, word, at, word, word, at]),
        ("remove", None, [at, at]),
        ("post", None, [at, at, c_char_p, word]),
        ("say", None, [at, c_char_p, word]),
        ("reason", c_int, [at, at, at]),
        ("hint_body", word, [at, at]),
        ("move", c_int, [at, word]),
        ("run", c_int, [at, word, c_int]),
        ("batch", None, [at, at]),
        ("answer", None, [at, at, at, word, word, word]),
        ("fail", None, [at, c_int, c_char_p, word]),
        ("split", None, [at]),
        ("progress", None, [at]),
        ("take", at, [at, c_int, at]),
        ("reply", None, [at, at, c_int, at, at, word, word, word, c_char_p, word]),
        ("hint", c_int, [at, at]),
        ("keep_hints", None, [at, c_int]),
        ("noted", None, [at, at]),
        ("drained", None, [at]),
        ("used", word, [at]),
    ):
        native.declare(lib, f"collegium_end_{name}", result, arguments)
    native.declare(lib, "collegium_join_until", word, [at, word, word, word, word])
    return lib
