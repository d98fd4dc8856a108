"""Write and read the 64 bytes that open every frame, and the small bodies of the handshake.

Pure: bytes in, values out. Every frame begins alike (magic, version, kind, status, dtype, micro-batch, flags, sequence
number, body bytes, text bytes, layer) and ends with the sender's clock, from which the reader keeps its ClockOffset.
A dispatch adds deadline, epoch, step, rows, pairs, groups, prompt rows; a reply compute and wait time, misses, rows.
"""

import struct
import time
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from collegium.link.frame import (
    DTYPE_CODES,
    DTYPES,
    HEADER_BYTES,
    MAGIC,
    MAX_GROUPS,
    MAX_TEXT_BYTES,
    NO_EXPERTS,
    SECRET_BYTES,
    VERSION,
    Dispatch,
    FrameError,
    Kind,
    LinkShape,
    Reply,
    Status,
)

NO_HINTS: Final = 2  # the flags of a reply: hints are of no use to the worker now
_ROWS_APART: Final = 1  # the flags: the rows do not follow in the body, they travel beside the frames

_COMMON = struct.Struct("<HBBBBBBQIHH")
_DISPATCH = struct.Struct("<HBBBBBBQIHHQQIIIHHQ")
_REPLY = struct.Struct("<HBBBBBBQIHHIIII16xQ")
_PLAIN = struct.Struct("<HBBBBBBQIHH32xQ")
_HELLO = struct.Struct(f"<{SECRET_BYTES}sB3xI")  # secret, dtype, d_model
_WELCOME = struct.Struct("<IIIB3x")  # credits, max rows, max pairs, reply dtype; then the worker_id
assert _DISPATCH.size == _REPLY.size == _PLAIN.size == HEADER_BYTES

HELLO_BYTES: Final = _HELLO.size
WELCOME_BYTES: Final = _WELCOME.size + 256  # a worker_id has at most 256 bytes

_U16, _U32, _F32 = np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.float32)
_FEW: Final = 64  # up to here a Python loop over a list beats a numpy reduction (measured: 0.6 against 1.9 us at 8)
_STATUSES: Final = tuple(Status)
_DISPATCH_KIND: Final = int(Kind.DISPATCH)
_REPLY_KIND: Final = int(Kind.REPLY)


def now_us() -> int:
    """Microseconds of this host's monotonic clock."""
    return time.monotonic_ns() // 1000


class Common(NamedTuple):  # tuples: a frozen dataclass of twelve fields takes 3 us to make
    """What every header says."""

    kind: Kind
    seq: int
    body_bytes: int
    flags: int


class DispatchHeader(NamedTuple):
    """A dispatch's header, its sizes checked against the link's shape."""

    seq: int
    body_bytes: int
    text_bytes: int
    layer: int
    micro_batch: int
    deadline_us: int  # the sender's clock
    epoch: int
    step: int
    num_rows: int
    num_pairs: int
    num_groups: int
    num_prompt_rows: int
    sent_us: int  # the sender's clock


class ReplyHeader(NamedTuple):
    """A reply's header, its sizes checked against the link's shape."""

    seq: int
    status: Status
    body_bytes: int
    compute_us: int
    wait_us: int
    num_misses: int
    num_rows: int
    flags: int = 0


def read_common(buffer: bytes | bytearray | memoryview) -> Common:
    """Read what every header says. Raises FrameError for another magic or version, or a kind that there is not."""
    magic, version, kind, _, _, _, flags, seq, body_bytes, _, _ = _COMMON.unpack_from(buffer)
    if magic != MAGIC:
        raise FrameError(f"magic is {magic:#06x}, not {MAGIC:#06x}: the peer does not speak this protocol")
    if version != VERSION:
        raise FrameError(f"version is {version}, this end speaks {VERSION}")
    if not Kind.HELLO <= kind <= Kind.HINT:
        raise FrameError(f"there is no kind {kind}")
    return Common(Kind(kind), seq, body_bytes, flags)


def check_dispatch(dispatch: Dispatch, shape: LinkShape) -> tuple[int, int, int]:
    """Return (rows, pairs, groups) of a dispatch that the link can carry; raise FrameError for any other."""
    x, experts, counts = dispatch.x, dispatch.experts, dispatch.counts
    pair_rows, pair_weights = dispatch.pair_rows, dispatch.pair_weights
    if x.ndim != 2 or x.shape[1] != shape.d_model or x.dtype is not shape.dtype or not x.is_contiguous():
        raise FrameError(
            f"x is {x.dtype} {list(x.shape)}; the link carries contiguous {shape.dtype} [R, {shape.d_model}]"
        )
    if experts.dtype != _U16 or counts.dtype != _U16 or pair_rows.dtype != _U32 or pair_weights.dtype != _F32:
        raise FrameError(
            f"experts, counts, pair_rows, pair_weights are {experts.dtype}, {counts.dtype}, {pair_rows.dtype}, "
            f"{pair_weights.dtype}; they travel as {_U16}, {_U16}, {_U32}, {_F32}"
        )
    num_rows, num_pairs, num_groups = x.shape[0], len(pair_rows), len(experts)
    if pair_weights.size != num_pairs or pair_rows.size != num_pairs:
        raise FrameError(f"{pair_rows.shape} pair_rows but {pair_weights.shape} pair_weights")
    if counts.size != num_groups or experts.size != num_groups:
        raise FrameError(f"{experts.shape} experts but {counts.shape} counts")
    check_sizes(num_rows, num_pairs, num_groups, shape)
    if not 0 <= dispatch.num_prompt_rows <= num_rows:
        raise FrameError(f"{dispatch.num_prompt_rows} of {num_rows} rows belong to prompts")
    if len(dispatch.traceparent) > MAX_TEXT_BYTES:
        raise FrameError(f"traceparent has {len(dispatch.traceparent)} characters, at most {MAX_TEXT_BYTES} travel")
    check_counts(counts, pair_rows, num_rows)
    return num_rows, num_pairs, num_groups


def check_sizes(num_rows: int, num_pairs: int, num_groups: int, shape: LinkShape) -> None:
    """Raise FrameError where the three sizes cannot belong to one dispatch of this link."""
    if not 1 <= num_rows <= shape.max_rows:
        raise FrameError(f"{num_rows} rows; the link carries 1 to {shape.max_rows}")
    if not 1 <= num_pairs <= shape.max_pairs:
        raise FrameError(f"{num_pairs} pairs; the link carries 1 to {shape.max_pairs}")
    if not 1 <= num_groups <= min(num_pairs, MAX_GROUPS):
        raise FrameError(f"{num_groups} groups for {num_pairs} pairs; there are 1 to {min(num_pairs, MAX_GROUPS)}")


def check_counts(counts: npt.NDArray[np.uint16], pair_rows: npt.NDArray[np.uint32], num_rows: int) -> None:
    """Raise FrameError unless each count is at least 1, they add up to the pairs, and every pair's row is there."""
    num_pairs = len(pair_rows)
    if num_pairs <= _FEW:
        few = counts.tolist()
        total, least, last_row = sum(few), min(few), max(pair_rows.tolist())
    else:
        total, least = int(np.add.reduce(counts, dtype=np.int64)), int(np.minimum.reduce(counts))
        last_row = int(np.maximum.reduce(pair_rows))
    if total != num_pairs or least < 1:
        raise FrameError(f"counts add up to {total} with the least {least}; there are {num_pairs} pairs")
    if last_row >= num_rows:
        raise FrameError(f"a pair names row {last_row} of {num_rows}")


def check_distinct(experts: npt.NDArray[np.uint16]) -> None:
    """Raise FrameError where an expert stands in a dispatch twice: a worker's visit to its buffer names each once."""
    num_groups = len(experts)
    few = num_groups <= _FEW
    num_distinct = len(set(experts.tolist())) if few else np.count_nonzero(np.bincount(experts))
    if num_distinct != num_groups:
        raise FrameError(f"{num_groups} groups name {num_distinct} experts; each expert has one group")


def write_dispatch(
    buffer: bytearray, dispatch: Dispatch, sizes: tuple[int, int, int], text_bytes: int, shape: LinkShape
) -> int:
    """Write a dispatch's header; return its body's bytes. `sizes` are those of `check_dispatch`."""
    num_rows, num_pairs, num_groups = sizes
    body_bytes = 4 * num_groups + 8 * num_pairs + num_rows * shape.framed_row_bytes + text_bytes
    try:
        _DISPATCH.pack_into(
            buffer, 0, MAGIC, VERSION, _DISPATCH_KIND, 0, DTYPE_CODES[dispatch.x.dtype], dispatch.micro_batch,
            shape.are_rows_apart,
            dispatch.seq, body_bytes, text_bytes, dispatch.layer,
            int(dispatch.deadline_s * 1e6), dispatch.epoch, dispatch.step,
            num_rows, num_pairs, num_groups, dispatch.num_prompt_rows, time.monotonic_ns() // 1000,
        )  # fmt: skip
    except (struct.error, OverflowError, ValueError) as error:  # the last two: a deadline that is infinite or NaN
        raise FrameError(f"a field of the dispatch does not fit its place in the header: {error}") from None
    return body_bytes


def read_dispatch(buffer: bytes | bytearray | memoryview, shape: LinkShape) -> DispatchHeader:
    """Read a dispatch's header and check every size in it. Raises FrameError."""
    (
        magic, version, kind, _, dtype, micro_batch, flags, seq, body_bytes, text_bytes, layer,
        deadline_us, epoch, step, num_rows, num_pairs, num_groups, num_prompt_rows, sent_us,
    ) = _DISPATCH.unpack_from(buffer)  # fmt: skip
    if magic != MAGIC or version != VERSION or kind != _DISPATCH_KIND:
        read_common(buffer)
        raise FrameError(f"a router sends dispatches and hints, not {Kind(kind).name}")
    if DTYPES.get(dtype) is not shape.dtype:
        raise FrameError(f"rows have data type {dtype}; the link carries {shape.dtype}")
    check_sizes(num_rows, num_pairs, num_groups, shape)
    if num_prompt_rows > num_rows:
        raise FrameError(f"{num_prompt_rows} of {num_rows} rows belong to prompts")
    if flags != (_ROWS_APART if shape.are_rows_apart else 0):
        raise FrameError(f"flags are {flags}, but rows apart is {shape.are_rows_apart} on this link")
    rows_bytes = num_rows * shape.framed_row_bytes
    if text_bytes > MAX_TEXT_BYTES or body_bytes != 4 * num_groups + 8 * num_pairs + rows_bytes + text_bytes:
        raise FrameError(f"a body of {body_bytes} bytes does not hold what the header announces")
    return DispatchHeader(
        seq, body_bytes, text_bytes, layer, micro_batch, deadline_us, epoch, step,
        num_rows, num_pairs, num_groups, num_prompt_rows, sent_us,
    )  # fmt: skip


def check_reply(reply: Reply, num_rows: int, num_groups: int, shape: LinkShape) -> None:
    """Raise FrameError unless a reply that is OK holds exactly the rows that the dispatch asked for,
    and misses no more experts than the dispatch named.
    """
    y = reply.y
    if reply.status != 0:
        return
    if y is None or y.dtype is not shape.reply_dtype or y.shape != (num_rows, shape.d_model) or not y.is_contiguous():
        got = "None" if y is None else f"{y.dtype} {list(y.shape)}"
        raise FrameError(
            f"y of seq {reply.seq} is {got}; the answer is contiguous {shape.reply_dtype} [{num_rows}, {shape.d_model}]"
        )
    missed = reply.missed
    if missed is not NO_EXPERTS and (missed.dtype != _U16 or missed.ndim != 1 or len(missed) > num_groups):
        raise FrameError(
            f"missed of seq {reply.seq} is {missed.dtype} {list(missed.shape)}; it travels as {_U16} [M], and M is at "
            f"most the {num_groups} experts of the dispatch"
        )


def write_reply(buffer: bytearray, reply: Reply, num_rows: int, body_bytes: int) -> None:
    """Write a reply's header. Raises FrameError where a field does not fit."""
    dtype = num_misses = 0
    if reply.y is not None and reply.status == 0:
        dtype, num_misses = DTYPE_CODES[reply.y.dtype], len(reply.missed)
    try:
        _REPLY.pack_into(
            buffer, 0, MAGIC, VERSION, _REPLY_KIND, reply.status, dtype, 0, 0,
            reply.seq, body_bytes, 0, 0,
            reply.compute_us, reply.wait_us, num_misses, num_rows, time.monotonic_ns() // 1000,
        )  # fmt: skip
    except struct.error as error:
        raise FrameError(f"a field of the reply does not fit its place in the header: {error}") from None


def read_reply(buffer: bytes | bytearray | memoryview, shape: LinkShape) -> ReplyHeader | None:
    """Read a reply's header and check its sizes; None where the frame is of another kind. Raises FrameError."""
    (
        magic, version, kind, status, dtype, _, flags, seq, body_bytes, _, _,
        compute_us, wait_us, num_misses, num_rows, _,
    ) = _REPLY.unpack_from(buffer)  # fmt: skip
    if magic != MAGIC or version != VERSION or kind != _REPLY_KIND:
        return None
    if status >= len(_STATUSES):
        raise FrameError(f"there is no status {status}")
    if status == 0:  # Status.OK; an enum's attribute takes as long as the comparison
        announced = num_rows * shape.framed_reply_row_bytes + 2 * num_misses
        if DTYPES.get(dtype) is not shape.reply_dtype or num_rows > shape.max_rows or body_bytes != announced:
            raise FrameError(
                f"a reply of {num_rows} rows of data type {dtype} and {num_misses} misses in {body_bytes} bytes"
            )
        if num_misses > shape.max_groups:
            raise FrameError(f"a reply of {num_misses} misses; the link carries at most {shape.max_groups}")
    elif num_misses:
        raise FrameError(f"a reply that failed announces {num_misses} misses")
    elif body_bytes > MAX_TEXT_BYTES:
        raise FrameError(f"a message of {body_bytes} bytes; at most {MAX_TEXT_BYTES} travel")
    return ReplyHeader(seq, _STATUSES[status], body_bytes, compute_us, wait_us, num_misses, num_rows, flags)


def plain(kind: Kind, seq: int, body: bytes = b"", flags: int = 0) -> bytes:
    """Return a whole frame that carries no rows: HELLO, WELCOME, PROGRESS or GOODBYE."""
    return _PLAIN.pack(MAGIC, VERSION, kind, 0, 0, 0, flags, seq, len(body), 0, 0, now_us()) + body


def sent_us(buffer: bytes | bytearray | memoryview) -> int:
    """Return when a frame was sent, by its sender's clock."""
    return int.from_bytes(buffer[56:64], "little")


def goodbye(reason: str) -> bytes:
    """Return the frame that ends a link, with a reason for the other end's log."""
    return plain(Kind.GOODBYE, 0, clip(reason))


def hello(link_id: int, secret: bytes, dtype: torch.dtype, d_model: int, *, are_rows_apart: bool = False) -> bytes:
    """Return the frame with which a router opens a link."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    return plain(Kind.HELLO, link_id, _HELLO.pack(secret, DTYPE_CODES[dtype], d_model), are_rows_apart)


def read_hello(body: bytes | bytearray | memoryview) -> tuple[bytes, torch.dtype, int]:
    """Return (secret, dtype, d_model) of a HELLO's body of HELLO_BYTES. Raises FrameError."""
    secret, dtype, d_model = _HELLO.unpack(body)
    if dtype not in DTYPES:
        raise FrameError(f"there is no data type {dtype}")
    return secret, DTYPES[dtype], d_model


def welcome(link_id: int, shape: LinkShape, worker_id: str) -> bytes:
    """Return the frame with which a worker accepts a link."""
    body = _WELCOME.pack(shape.num_credits, shape.max_rows, shape.max_pairs, DTYPE_CODES[shape.reply_dtype])
    return plain(Kind.WELCOME, link_id, body + worker_id.encode())


def read_welcome(
    body: bytes | bytearray | memoryview, dtype: torch.dtype, d_model: int, *, are_rows_apart: bool = False
) -> tuple[LinkShape, str]:
    """Return the link's shape and the worker_id from a WELCOME's body. Raises FrameError."""
    if not _WELCOME.size <= len(body) <= WELCOME_BYTES:
        raise FrameError(f"a welcome of {len(body)} bytes")
    num_credits, max_rows, max_pairs, reply_code = _WELCOME.unpack_from(body)
    try:
        shape = LinkShape(
            dtype=dtype, reply_dtype=DTYPES[reply_code], d_model=d_model, max_rows=max_rows, num_credits=num_credits,
            max_pairs=max_pairs, are_rows_apart=are_rows_apart,
        )  # fmt: skip
        return shape, bytes(body[_WELCOME.size :]).decode()
    except (KeyError, ValueError) as error:
        raise FrameError(f"a welcome that cannot be: {error}") from None


def clip(message: str) -> bytes:
    """Return a message as UTF-8 of at most MAX_TEXT_BYTES, cut between characters."""
    raw = message.encode(errors="replace")[:MAX_TEXT_BYTES]
    return raw.decode(errors="ignore").encode()
