"""What a peer does on a worker's data port, its secret shown and all: its own link may end, and nothing else.

Each function is one attack; ATTACKS is the table. Links are opened as a router opens them; the frames are made by hand.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from collegium.link import header
from collegium.link.frame import HEADER_BYTES, Dispatch, Kind, LinkShape
from collegium.link.hint import Hint, write_hint
from collegium.v1 import expert_pb2, expert_pb2_grpc
from tests.strangers.rigs.attack import SOON_S, Attack
from tests.strangers.rigs.target import Target

WORKER = "worker-0"
_ROWS = 512
_HOLD_S = 0.5


@dataclass
class Peer:
    """A link to a worker, and what both agreed on."""

    sock: socket.socket
    shape: LinkShape

    def frame(self, seq: int, num_rows: int = 2, *, experts: tuple[int, ...] = (0, 1), value: float = 0.1) -> bytes:
        """A dispatch of layer 0 whose rows each chose all of these experts."""
        num = len(experts)
        rows = np.tile(np.arange(num_rows, dtype=np.uint32), num)
        one = Dispatch(
            seq=seq,
            layer=0,
            deadline_s=time.monotonic() + 60.0,
            experts=np.array(experts, np.uint16),
            counts=np.full(num, num_rows, np.uint16),
            pair_rows=rows,
            pair_weights=np.full(len(rows), 0.5, np.float32),
            x=torch.full((num_rows, self.shape.d_model), value),
        )
        head = bytearray(HEADER_BYTES)
        header.write_dispatch(head, one, (num_rows, len(rows), num), 0, self.shape)
        parts = (one.experts, one.counts, one.pair_rows, one.pair_weights, one.x.numpy())
        return bytes(head) + b"".join(part.tobytes() for part in parts)

    def send(self, raw: bytes) -> None:
        """Send what the worker takes; that it ends the link is its right."""
        with contextlib.suppress(OSError):
            self.sock.sendall(raw)

    def read(self) -> header.Common | None:
        """Read a frame that is more than a sign of life; None where the link has ended."""
        while (raw := self._exactly(HEADER_BYTES)) is not None:
            common = header.read_common(raw)
            if common.body_bytes and self._exactly(common.body_bytes) is None:
                break
            if common.kind != Kind.PROGRESS:
                return common
        return None

    def vanish(self) -> None:
        """Be gone at once, as a process is that was killed."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _exactly(self, num_bytes: int) -> bytes | None:
        parts = b""
        while len(parts) < num_bytes:
            try:
                part = self.sock.recv(num_bytes - len(parts))
            except ConnectionError:
                part = b""
            if not part:
                return None
            parts += part
        return parts


@contextmanager
def peers(target: Target, count: int) -> Iterator[list[Peer]]:
    """Open so many links to a worker."""
    d_model = target.d_model
    with ExitStack() as stack:
        stub: Any = expert_pb2_grpc.ExpertStub(stack.enter_context(target.channel(WORKER)))
        found: list[Peer] = []
        for number in range(count):
            request = expert_pb2.OpenLinkRequest(
                router_id=f"peer-{number}",
                model_digest=target.shape.digest,
                dtype="float32",
                transports=["tcp"],
                max_rows=_ROWS,
            )
            promised = stub.OpenLink(request, timeout=SOON_S)
            host, _, port = promised.address.rpartition(":")
            sock = stack.enter_context(socket.create_connection((host, int(port)), timeout=SOON_S))
            sock.sendall(header.hello(promised.link_id, promised.secret, torch.float32, d_model))
            shape = LinkShape(
                dtype=torch.float32,
                reply_dtype=torch.float32,
                d_model=d_model,
                max_rows=_ROWS,
                num_credits=promised.num_credits,
            )
            found.append(Peer(sock, shape))
            welcome = found[-1].read()
            assert welcome is not None and welcome.kind == Kind.WELCOME
        yield found


def gone_amid_replies(target: Target, count: int) -> None:
    """Routers that are killed while large replies to them are queued."""
    for _ in range(count):
        with peers(target, 2) as found:
            for peer in found:
                for seq in range(peer.shape.num_credits):
                    peer.send(peer.frame(seq, _ROWS))
            time.sleep(0.05)
            for peer in found:
                peer.vanish()


def odd_dispatches(target: Target, count: int) -> None:
    """An expert twice, counts that do not add up, rows, layers and experts that there are not: each is refused."""
    with peers(target, 1) as (peer,):
        good = peer.frame(1)
        changes = [
            (HEADER_BYTES + 2, b"\x00\x00"),  # expert 0 twice
            (HEADER_BYTES + 4, b"\x09\x00"),  # a count
            (HEADER_BYTES + 4, b"\x00\x00"),
            (HEADER_BYTES + 8, b"\xff\xff\xff\xff"),  # a row
            (22, b"\xff\xff"),  # the layer
            (HEADER_BYTES + 2, b"\xff\xff"),  # an expert
        ]
        for seq in range(count):
            for at, value in changes:
                wire = bytearray(good)
                wire[8:16] = seq.to_bytes(8, "little")
                wire[at : at + len(value)] = value
                peer.send(bytes(wire))
                answer = peer.read()
                assert answer is not None and answer.kind == Kind.REPLY, f"{at}, {value!r}: {answer}"
        peer.send(peer.frame(9))
        answer = peer.read()
        assert answer is not None and answer.kind == Kind.REPLY


def readers_of_nothing(target: Target, count: int) -> None:
    """Links that ask as much as they may and read nothing; then more than they may, which ends them."""
    with peers(target, count) as found:
        for peer in found:
            for seq in range(peer.shape.num_credits):
                peer.send(peer.frame(seq, _ROWS))
        time.sleep(_HOLD_S)
        for peer in found:
            peer.sock.settimeout(_HOLD_S)
            for seq in range(100, 100 + 20 * peer.shape.num_credits):
                with contextlib.suppress(OSError):
                    peer.sock.sendall(peer.frame(seq, _ROWS))


def unfinished_frames(target: Target, count: int) -> None:
    """Links with half a header, with a header alone, with all but the last byte of a large frame."""
    with peers(target, count) as found:
        for number, peer in enumerate(found):
            whole = peer.frame(1, _ROWS)
            peer.send(whole[: (30, HEADER_BYTES, -1)[number % 3]])
        time.sleep(_HOLD_S)


def byte_by_byte(target: Target, count: int) -> None:
    """A frame that comes byte by byte is read as any other."""
    with peers(target, 1) as (peer,):
        for seq in range(count):
            for byte in peer.frame(seq, 1):
                peer.send(bytes([byte]))
            answer = peer.read()
            assert answer is not None and answer.kind == Kind.REPLY


def floods_of_hints(target: Target, count: int) -> None:
    """Hints without end, of every expert that there could be."""
    with peers(target, 2) as found:
        few = Hint(layer=0, experts=np.arange(4, dtype=np.uint16), counts=np.ones(4, np.uint16))
        many = Hint(layer=1, experts=np.arange(2048, dtype=np.uint16), counts=np.ones(2048, np.uint16))
        for _ in range(count):
            for peer in found:
                peer.send(write_hint(few) * 200 + write_hint(many) * 20)
        for peer in found:
            peer.send(peer.frame(1))
            answer = peer.read()
            assert answer is not None and answer.kind == Kind.REPLY


def rows_of_no_numbers(target: Target, count: int) -> None:
    """Rows that are no numbers, beside those of others in one batch."""
    with peers(target, 2) as found:
        for seq in range(count):
            for peer, value in zip(found, (float("nan"), float("inf")), strict=True):
                peer.send(peer.frame(seq, 8, value=value))
            for peer in found:
                answer = peer.read()
                assert answer is not None and answer.kind == Kind.REPLY


ATTACKS = (
    Attack(name="gone amid replies", run=gone_amid_replies, few=5, many=100, peak_mb={WORKER: 100.0}),
    Attack(name="odd dispatches", run=odd_dispatches, few=5, many=500),
    Attack(name="readers of nothing", run=readers_of_nothing, few=4, many=40, peak_mb={WORKER: 400.0}),
    Attack(name="unfinished frames", run=unfinished_frames, few=12, many=40, peak_mb={WORKER: 400.0}),
    Attack(name="byte by byte", run=byte_by_byte, few=1, many=20),
    Attack(name="floods of hints", run=floods_of_hints, few=20, many=500, peak_mb={WORKER: 50.0}),
    Attack(name="rows of no numbers", run=rows_of_no_numbers, few=50, many=2000),
)
