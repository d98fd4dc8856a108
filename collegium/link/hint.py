"""Write and read the frame of a hint, and check what it says.

Pure: bytes in, values out. A hint's header says, beside what every header does, how many groups follow; frame.py has
the body. G groups (distinct experts).
"""

import struct
import time
from typing import Final, NamedTuple

import numpy as np

from collegium.link import header
from collegium.link.frame import HEADER_BYTES, MAGIC, VERSION, FrameError, Hint, Kind, LinkShape

_HINT = struct.Struct("<HBBBBBBQIHH28xH2xQ")  # the groups stand where a dispatch has them
assert _HINT.size == HEADER_BYTES
_GROUP_BYTES: Final = 4
_HINT_KIND: Final = int(Kind.HINT)
_U16 = np.dtype(np.uint16)


class HintHeader(NamedTuple):
    """A hint's header, its sizes checked against the link's shape."""

    body_bytes: int
    layer: int
    num_groups: int
    sent_us: int  # the sender's clock


def check_hint(hint: Hint, shape: LinkShape) -> None:
    """Raise FrameError where the link cannot carry a hint, or an expert stands in it twice or for no token."""
    experts, counts = hint.experts, hint.counts
    if experts.dtype != _U16 or counts.dtype != _U16 or experts.ndim != 1 or counts.shape != experts.shape:
        raise FrameError(
            f"experts and counts of a hint are {experts.dtype} {experts.shape} and {counts.dtype} {counts.shape}; "
            f"they travel as {_U16} [G] each"
        )
    num_groups = len(experts)
    _check_groups(num_groups, shape)
    if len(set(experts.tolist())) != num_groups:
        raise FrameError("an expert stands in a hint twice")
    if min(counts.tolist()) < 1:
        raise FrameError("a hint names an expert for no token")


def write_hint(hint: Hint) -> bytes:
    """Return the whole frame of a hint that has been checked. Raises FrameError where its layer does not fit."""
    body = hint.experts.tobytes() + hint.counts.tobytes()
    try:
        head = _HINT.pack(
            MAGIC, VERSION, _HINT_KIND, 0, 0, 0, 0, 0, len(body), 0, hint.layer,
            len(hint.experts), time.monotonic_ns() // 1000,
        )  # fmt: skip
    except struct.error as error:
        raise FrameError(f"layer {hint.layer} of a hint does not fit its place in the header: {error}") from None
    return head + body


def is_hint(buffer: bytearray) -> bool:
    """Whether a header says that it opens a hint; `read_hint` looks closer."""
    return buffer[3] == _HINT_KIND


def read_hint(buffer: bytes | bytearray | memoryview, shape: LinkShape) -> HintHeader:
    """Read a hint's header and check the sizes in it. Raises FrameError."""
    magic, version, kind, _, _, _, _, _, body_bytes, _, layer, num_groups, sent_us = _HINT.unpack_from(buffer)
    if magic != MAGIC or version != VERSION or kind != _HINT_KIND:
        raise FrameError(f"this is no hint but {header.read_common(buffer).kind.name}")
    _check_groups(num_groups, shape)
    if body_bytes != _GROUP_BYTES * num_groups:
        raise FrameError(f"a hint of {num_groups} groups in {body_bytes} bytes")
    return HintHeader(body_bytes, layer, num_groups, sent_us)


def read_hint_body(head: HintHeader, body: bytes | bytearray | memoryview, shape: LinkShape) -> Hint:
    """Return the hint whose body has been read, as copies. Raises FrameError where what it says cannot be."""
    groups = np.frombuffer(body, _U16, 2 * head.num_groups).copy()  # [2 * G]
    hint = Hint(layer=head.layer, experts=groups[: head.num_groups], counts=groups[head.num_groups :])
    check_hint(hint, shape)
    return hint


def _check_groups(num_groups: int, shape: LinkShape) -> None:
    if not 1 <= num_groups <= shape.max_groups:
        raise FrameError(f"a hint of {num_groups} groups; the link carries 1 to {shape.max_groups}")
