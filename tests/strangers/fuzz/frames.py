"""Frames and handshakes of links, well made, and made wrong: what a peer can put on a data port.

Pure: chance in, bytes out. The places of the header's fields are those of collegium/link/header.py, so that a mutation
changes one field and leaves the others right.
"""

from __future__ import annotations

import random
import struct
import time

import numpy as np
import torch

from collegium.link import header
from collegium.link.frame import HEADER_BYTES, Dispatch, Hint, Kind, LinkShape, Reply, Status
from collegium.link.hint import write_hint
from tests.strangers.fuzz.grammar import broken

# (offset, width) of the header's fields, in order; see the module's own structs.
_FIELDS = (
    *((0, 2), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 8), (16, 4), (20, 2), (22, 2)),
    *((24, 8), (32, 8), (40, 4), (44, 4), (48, 4), (52, 2), (54, 2), (56, 8)),
)
_WIDE = 2**64


def hello(draw: random.Random, link_id: int, secret: bytes, dtype: torch.dtype, d_model: int) -> bytes:
    """Make a handshake, right or wrong."""
    good = header.hello(link_id, secret, dtype, d_model, are_rows_apart=draw.random() < 0.1)
    return good if draw.random() < 0.3 else _spoilt(draw, good)


def frame(draw: random.Random, shape: LinkShape, num_layers: int, num_experts: int) -> bytes:
    """Make what a router sends, right or wrong: a dispatch, a hint, another kind, or bytes that are none."""
    how = draw.randrange(10)
    if how < 6:
        good = dispatch(draw, shape, num_layers, num_experts)
    elif how < 8:
        good = hint(draw, num_layers, num_experts)
    elif how == 8:
        good = header.plain(draw.choice(list(Kind)), draw.randrange(4), draw.randbytes(draw.randrange(40)))
    else:
        return draw.randbytes(draw.randrange(200))
    return good if draw.random() < 0.35 else _spoilt(draw, good)


def dispatch(draw: random.Random, shape: LinkShape, num_layers: int, num_experts: int) -> bytes:
    """Make a dispatch whose sizes add up; at times with experts, layers, weights and rows that are none."""
    is_wild = draw.random() < 0.4
    num_rows = draw.randint(1, min(4, shape.max_rows))
    groups = draw.sample(range(num_experts), draw.randint(1, 3))
    if is_wild:
        groups = [draw.choice((*groups, num_experts, 65_535, groups[0])) for _ in groups]
    counts = [draw.randint(1, 2) for _ in groups]
    pair_rows = [draw.randrange(num_rows) for _ in range(sum(counts))]
    weights = [draw.choice((0.5, 1.0, -1.0, float("nan"), float("inf"))) if is_wild else 0.5 for _ in pair_rows]
    one = Dispatch(
        seq=draw.randrange(1, 1000),
        layer=draw.choice((num_layers, 65_535)) if is_wild and draw.random() < 0.3 else draw.randrange(num_layers),
        epoch=draw.choice((0, 1, 2**63, 2**64 - 1)) if is_wild else 1,
        micro_batch=draw.choice((0, 255)) if is_wild else 0,
        deadline_s=time.monotonic() + draw.choice((5.0, 5.0, -1.0, 1e9)),
        experts=np.asarray(groups, np.uint16),
        counts=np.asarray(counts, np.uint16),
        pair_rows=np.asarray(pair_rows, np.uint32),
        pair_weights=np.asarray(weights, np.float32),
        x=torch.full((num_rows, shape.d_model), draw.choice((0.0, 0.1, float("nan"), 3e38)), dtype=shape.dtype),
        num_prompt_rows=draw.randint(0, num_rows),
        traceparent=draw.choice(("", "", "x" * 1000, "00-" + "f" * 32 + "-" + "f" * 16 + "-01")),
    )
    sizes = (num_rows, len(pair_rows), len(groups))
    head, text = bytearray(HEADER_BYTES), one.traceparent.encode()
    header.write_dispatch(head, one, sizes, len(text), shape)
    parts = (one.experts, one.counts, one.pair_rows, one.pair_weights)
    rows = one.x.contiguous().view(torch.uint8).numpy().tobytes()
    return bytes(head) + b"".join(part.tobytes() for part in parts) + rows + text


def hint(draw: random.Random, num_layers: int, num_experts: int) -> bytes:
    """Make a hint; at times of layers and experts that are none."""
    experts = [draw.choice((draw.randrange(num_experts), 65_535)) for _ in range(draw.randint(1, 4))]
    counts = [draw.choice((0, 1, 2, 65_535)) for _ in experts]
    layer = draw.choice((draw.randrange(num_layers), num_layers, 65_535))
    return write_hint(Hint(layer=layer, experts=np.asarray(experts, np.uint16), counts=np.asarray(counts, np.uint16)))


def reply(draw: random.Random, shape: LinkShape, seq: int, num_rows: int) -> bytes:
    """Make what a worker sends, right or wrong: a reply to a dispatch, or to none."""
    status = draw.choice((Status.OK, Status.OK, *Status))
    y = torch.zeros((num_rows, shape.d_model), dtype=shape.reply_dtype)
    missed = np.asarray([0] * draw.choice((0, 0, 1, 2)), np.uint16)
    one = Reply(seq=draw.choice((seq, seq, seq + 1, 2**64 - 1)), status=status, y=y, missed=missed)
    head = bytearray(HEADER_BYTES)
    body = y.view(torch.uint8).numpy().tobytes() + missed.tobytes() if status is Status.OK else b"why not"
    header.write_reply(head, one, num_rows if status is Status.OK else 0, len(body))
    good = bytes(head) + body
    return good if draw.random() < 0.3 else _spoilt(draw, good)


def answer(one: Dispatch) -> Reply:
    """Answer a dispatch well."""
    return Reply(seq=one.seq, y=torch.zeros_like(one.x))


def _spoilt(draw: random.Random, good: bytes) -> bytes:
    """Change one field of the header, or break the bytes anywhere."""
    if draw.random() < 0.4:
        return broken(draw, good)
    offset, width = draw.choice(_FIELDS)
    most = _WIDE if width == 8 else 1 << (8 * width)
    value = draw.choice((0, 1, 2, 3, 64, most // 2, most - 1, draw.randrange(most))) % most
    return good[:offset] + value.to_bytes(width, "little") + good[offset + width :]


assert struct.calcsize("<HBBBBBBQIHHQQIIIHHQ") == HEADER_BYTES
