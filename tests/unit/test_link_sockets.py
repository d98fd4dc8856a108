"""What only sockets can do to each other: stop half way, send nonsense, read nothing, go away in the middle."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from collegium.link import header
from collegium.link.base import RouterLink
from collegium.link.caller import Caller
from collegium.link.connect import connect
from collegium.link.frame import HEADER_BYTES, FrameError, Kind, LinkClosed, LinkTimeout, Reply, Status
from collegium.link.hint import read_hint, write_hint
from collegium.link.stream import Buffers, PlainStream, rest_of, split_host_port, unix_address
from collegium.link.tcp import SocketLink
from collegium.link.tcp_port import MAX_CALLERS, TcpPort
from tests.link_rig import (
    SECRET,
    SOON_S,
    D,
    Other,
    Rig,
    dispatch,
    doubled,
    expected,
    gather,
    hint,
    make_rig,
    pump,
    soon,
)

SHAPE = expected().shape


@pytest.fixture(params=["tcp", "unix"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    rig = make_rig(request.param, tmp_path)
    yield rig
    rig.close()


@pytest.fixture
def raw(rig: Rig) -> Iterator[socket.socket]:
    """A connection to the port that has said nothing."""
    sock = call(rig)
    yield sock
    sock.close()


def call(rig: Rig) -> socket.socket:
    if rig.name == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(unix_address(rig.address))
    else:
        sock = socket.create_connection(split_host_port(rig.address))
    sock.settimeout(SOON_S)
    return sock


def frame(seq: int = 1, num_rows: int = 3, **changes: object) -> bytes:
    """A dispatch as it stands on the wire."""
    sent = dispatch(seq, num_rows, **changes)
    sizes = header.check_dispatch(sent, SHAPE)
    head = bytearray(HEADER_BYTES)
    header.write_dispatch(head, sent, sizes, len(sent.traceparent), SHAPE)
    arrays = (sent.experts, sent.counts, sent.pair_rows, sent.pair_weights, sent.x.numpy())
    return bytes(head) + b"".join(array.tobytes() for array in arrays) + sent.traceparent.encode()


def open_raw(rig: Rig, sock: socket.socket, link_id: int = 1, **changes: object) -> None:
    """Open a link by hand."""
    rig.port.expect(expected(link_id, **changes))
    sock.sendall(header.hello(link_id, SECRET, torch.float32, D))
    pump(rig.port, lambda: link_id in rig.port.links())
    read_frame(sock)


def read_frame(sock: socket.socket) -> tuple[header.Common, bytes]:
    head = read_exactly(sock, HEADER_BYTES)
    common = header.read_common(head)
    return common, head + read_exactly(sock, common.body_bytes)


def read_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    parts = b""
    while len(parts) < num_bytes:
        part = sock.recv(num_bytes - len(parts))
        assert part, "the peer closed the connection"
        parts += part
    return parts


def is_ended(sock: socket.socket) -> bool:
    """Whether the port has closed, after whatever it still said."""
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


# What a broken router does.


def test_the_wire_format_is_the_documented_one(rig: Rig, raw: socket.socket) -> None:
    open_raw(rig, raw)
    wire = frame(1, 3, traceparent="00-trace")
    assert len(wire) == 64 + 4 * 2 + 8 * 4 + 3 * D * 4 + 8
    raw.sendall(wire)
    (arrival,) = gather(rig.port, 1)
    assert torch.equal(arrival.dispatch.x, dispatch(1).x)
    rig.port.reply(1, doubled(arrival))
    common, whole = read_frame(raw)
    assert (common.kind, common.seq, len(whole)) == (Kind.REPLY, 1, 64 + 3 * D * 4)
    np.testing.assert_array_equal(np.frombuffer(whole[64:], np.float32).reshape(3, D), dispatch(1).x.numpy() * 2)


def test_a_dispatch_that_comes_byte_by_byte_arrives_whole(rig: Rig, raw: socket.socket) -> None:
    open_raw(rig, raw)
    wire = frame(1)
    for at in range(len(wire) - 1):
        raw.sendall(wire[at : at + 1])
        assert rig.port.poll(0.0) == []
    raw.sendall(wire[-1:])
    assert torch.equal(gather(rig.port, 1)[0].dispatch.x, dispatch(1).x)


def test_a_slow_sender_holds_up_nobody(rig: Rig, raw: socket.socket) -> None:
    open_raw(rig, raw, link_id=1)
    other = rig.link(2)
    for part in (frame(1)[:30], frame(1)[30:100]):  # within the header, then within the body
        raw.sendall(part)
        for seq in (1, 2, 3):
            other.send(dispatch(seq))
            (arrival,) = gather(rig.port, 1)
            assert arrival.link_id == 2
            rig.port.reply(2, doubled(arrival))
            assert other.receive(seq, soon()).status == Status.OK
    raw.sendall(frame(1)[100:])
    assert gather(rig.port, 1)[0].link_id == 1


def test_a_router_that_does_not_read_holds_up_nobody(rig: Rig, raw: socket.socket) -> None:
    width, num_rows = 4096, 256  # replies of 4 MiB: more than a socket's buffers hold
    rig.port.expect(expected(1, d_model=width, max_rows=num_rows, num_credits=4))
    raw.sendall(header.hello(1, SECRET, torch.float32, width))
    pump(rig.port, lambda: 1 in rig.port.links())
    read_frame(raw)
    sent = dispatch(1, 256, x=torch.ones(num_rows, width))
    sizes = (256, 257, 2)
    head = bytearray(HEADER_BYTES)
    body = b"".join(a.tobytes() for a in (sent.experts, sent.counts, sent.pair_rows, sent.pair_weights, sent.x.numpy()))
    arrivals = []
    for seq in range(1, 5):
        sent.seq = seq
        header.write_dispatch(head, sent, sizes, 0, expected(d_model=width, max_rows=num_rows).shape)
        sending = Other(lambda wire=bytes(head) + body: raw.sendall(wire))  # type: ignore[misc]
        arrivals += gather(rig.port, 1)
        sending.join()
    for arrival in arrivals:
        rig.port.reply(1, doubled(arrival))  # 16 MiB in all; returns at once
    other = rig.link(2)
    other.send(dispatch(1))
    rig.port.reply(2, doubled(gather(rig.port, 1)[0]))
    assert other.receive(1, soon()).status == Status.OK
    reading = Other(lambda: [read_frame(raw) for _ in arrivals])
    pump(rig.port, lambda: reading.is_done)
    frames = reading.join()
    assert isinstance(frames, list)
    for seq, (common, whole) in enumerate(frames, start=1):
        assert (common.seq, len(whole)) == (seq, 64 + num_rows * width * 4)
        assert whole[64:] == np.full(num_rows * width, 2.0, np.float32).tobytes()


@pytest.fixture
def impatient() -> Iterator[Rig]:
    """A port that waits a fifth of a second where others wait for half a minute, with room for a frame and a half."""
    port = TcpPort(
        worker_id="worker-a", unix="@", frame_within_s=0.2, reader_within_s=0.2, budget_bytes=LARGE_ROWS * WIDE * 6
    )
    rig = Rig("unix", port)
    yield rig
    rig.close()


WIDE, LARGE_ROWS = 4096, 128  # a frame of 2 MiB, more than a socket's buffers hold


@pytest.mark.parametrize("num_bytes", [1, HEADER_BYTES, -1], ids=["half a header", "a header", "all but a byte"])
def test_a_frame_that_does_not_come_whole_ends_its_link_and_its_memory_comes_back(
    num_bytes: int, impatient: Rig
) -> None:
    with call(impatient) as raw:
        open_raw(impatient, raw, link_id=1)
        other = impatient.link(2)
        raw.sendall(frame(1)[:num_bytes])
        pump(impatient.port, lambda: list(impatient.port.links()) == [2])
        common, whole = read_frame(raw)
        assert common.kind == Kind.GOODBYE
        assert "was not whole 0.2 s after it had begun" in whole[HEADER_BYTES:].decode()
    other.send(dispatch(1))
    impatient.port.reply(2, doubled(gather(impatient.port, 1)[0]))
    assert other.receive(1, soon()).status == Status.OK
    other.close()
    pump(impatient.port, lambda: not impatient.port.links())
    assert impatient.port.native.used_bytes == 0


def test_a_reply_of_which_nothing_is_read_ends_its_link_and_its_memory_comes_back(impatient: Rig) -> None:
    link = impatient.link(1, d_model=WIDE, max_rows=LARGE_ROWS)
    sending = Other(lambda: link.send(dispatch(1, LARGE_ROWS, x=torch.ones(LARGE_ROWS, WIDE))))
    (arrival,) = gather(impatient.port, 1)
    sending.join()
    impatient.port.reply(1, doubled(arrival))
    assert list(impatient.port.links()) == [1]
    pump(impatient.port, lambda: not impatient.port.links())
    assert impatient.port.native.used_bytes == 0


def test_beyond_the_budget_a_link_waits_until_others_memory_comes_back(impatient: Rig) -> None:
    links = [impatient.link(link_id, d_model=WIDE, max_rows=LARGE_ROWS) for link_id in (1, 2)]
    x = torch.ones(LARGE_ROWS, WIDE)
    sending = Other(lambda: links[0].send(dispatch(1, LARGE_ROWS, x=x)))
    (first,) = gather(impatient.port, 1)
    sending.join()
    waiting = Other(lambda: links[1].send(dispatch(1, LARGE_ROWS, x=x)))
    pump(impatient.port, lambda: impatient.port.native.totals.parked > 0)
    until = time.monotonic() + 1.5  # it is not its fault, however long that takes
    while time.monotonic() < until:
        assert impatient.port.poll(0.1) == []
    assert impatient.port.native.used_bytes <= LARGE_ROWS * WIDE * 6
    impatient.port.reply(1, Reply(seq=1, status=Status.FAILED, message="no"))
    (second,) = gather(impatient.port, 1)
    waiting.join()
    assert second.link_id == 2 and first.link_id == 1
    assert torch.equal(second.dispatch.x, x)


def damaged(at: int, value: bytes) -> bytes:
    wire = bytearray(frame(1))
    wire[at : at + len(value)] = value
    return bytes(wire)


def damaged_hint(at: int, value: bytes) -> bytes:
    wire = bytearray(write_hint(hint(6, 3)))
    wire[at : at + len(value)] = value
    return bytes(wire)


def sized(num_rows: int = 3, num_pairs: int = 4, num_groups: int = 2, body_bytes: int | None = None) -> bytes:
    """A dispatch's header that announces sizes of its own."""
    sent = dispatch(1)
    head = bytearray(HEADER_BYTES)
    header.write_dispatch(head, sent, (num_rows, num_pairs, num_groups), 0, SHAPE)
    if body_bytes is not None:
        head[16:20] = body_bytes.to_bytes(4, "little")
    return bytes(head)


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (damaged(0, b"\xff"), "magic is"),
        (damaged(2, b"\x09"), "version is 9, this end speaks 2"),
        (damaged(3, b"\x63"), "there is no kind 99"),
        (damaged(3, bytes([Kind.REPLY])), "a router sends dispatches and hints, not REPLY"),
        (damaged(5, b"\x02"), "rows have data type 2"),
        (sized(num_rows=65), "65 rows; the link carries 1 to 64"),
        (sized(num_rows=0), "0 rows"),
        (sized(num_pairs=SHAPE.max_pairs + 1), "2049 pairs; the link carries 1 to 2048"),
        (sized(num_groups=5), "5 groups for 4 pairs"),
        (sized(body_bytes=2**32 - 1), "a body of 4294967295 bytes"),
        (sized(body_bytes=10), "a body of 10 bytes"),
        (damaged(54, b"\x04"), "4 of 3 rows belong to prompts"),
        (damaged_hint(52, b"\x00"), "a hint of 0 groups"),
        (damaged_hint(53, b"\x10"), "a hint of 4099 groups; the link carries 1 to 2048"),
        (damaged_hint(52, b"\x02"), "a hint of 2 groups in 12 bytes"),
        (damaged_hint(19, b"\xff"), "a hint of 3 groups in 4278190092 bytes"),
        (damaged_hint(2, b"\x01"), "version is 1, this end speaks 2"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "wire",
)
def test_a_header_that_cannot_be_followed_ends_its_link_and_no_other(
    rig: Rig, raw: socket.socket, wire: bytes, reason: str
) -> None:
    open_raw(rig, raw, link_id=1)
    other = rig.link(2)
    raw.sendall(wire[:HEADER_BYTES])  # not a byte of the body is needed to refuse it
    pump(rig.port, lambda: list(rig.port.links()) == [2])
    common, whole = read_frame(raw)
    assert common.kind == Kind.GOODBYE
    assert f"bad frame: {reason}" in whole[HEADER_BYTES:].decode()
    assert is_ended(raw)
    other.send(dispatch(1))
    assert gather(rig.port, 1)[0].link_id == 2


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (HEADER_BYTES + 2, b"\x03\x00", "2 groups name 1 experts"),
        (HEADER_BYTES + 4, b"\x02\x00", "counts add up to 3"),
        (HEADER_BYTES + 6, b"\x00\x00", "the least 0"),
        (HEADER_BYTES + 8, b"\x03\x00\x00\x00", "a pair names row 3 of 3"),
    ],
)
def test_groups_that_cannot_be_are_answered_and_the_link_lives_on(
    rig: Rig, raw: socket.socket, at: int, value: bytes, message: str
) -> None:
    open_raw(rig, raw)
    raw.sendall(damaged(at, value) + frame(2))
    assert gather(rig.port, 1)[0].dispatch.seq == 2
    common, whole = read_frame(raw)
    assert (common.kind, common.seq) == (Kind.REPLY, 1)
    reply = header.read_reply(whole, SHAPE)
    assert reply is not None
    assert reply.status == Status.BAD_FRAME
    assert message in whole[HEADER_BYTES:].decode()


def test_a_router_that_ignores_its_credits_loses_its_link(rig: Rig, raw: socket.socket) -> None:
    open_raw(rig, raw, num_credits=2)
    raw.sendall(frame(1) + frame(2) + frame(3))
    pump(rig.port, lambda: not rig.port.links())
    assert "more than the 2 dispatches" in read_frame(raw)[1][HEADER_BYTES:].decode()


def test_a_sequence_number_that_is_in_flight_already_ends_the_link(rig: Rig, raw: socket.socket) -> None:
    open_raw(rig, raw, num_credits=3)
    raw.sendall(frame(1) + frame(1))
    pump(rig.port, lambda: not rig.port.links())
    assert "seq 1 is in flight already" in read_frame(raw)[1][HEADER_BYTES:].decode()


@pytest.mark.parametrize("cut", [1, HEADER_BYTES, HEADER_BYTES + 5, -1], ids=["head", "border", "pairs", "rows"])
def test_a_truncated_dispatch_ends_its_link_and_no_other(rig: Rig, raw: socket.socket, cut: int) -> None:
    open_raw(rig, raw, link_id=1)
    other = rig.link(2)
    raw.sendall(frame(1)[:cut])
    raw.close()
    pump(rig.port, lambda: list(rig.port.links()) == [2])
    other.send(dispatch(1))
    assert gather(rig.port, 1)[0].link_id == 2


def test_a_router_that_is_gone_when_its_answer_is_ready_harms_nobody(rig: Rig, raw: socket.socket) -> None:
    open_raw(rig, raw, link_id=1, num_credits=3)
    raw.sendall(frame(1) + frame(2) + frame(3))
    arrivals = gather(rig.port, 3)
    raw.close()
    for arrival in arrivals:
        rig.port.reply(1, doubled(arrival))
    pump(rig.port, lambda: not rig.port.links())


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (HEADER_BYTES + 2, b"\x00\x00", "an expert stands in a hint twice"),
        (HEADER_BYTES + 8, b"\x00\x00", "a hint names an expert for no token"),
    ],
)
def test_a_hint_that_makes_no_sense_ends_its_link_and_no_other(
    rig: Rig, raw: socket.socket, at: int, value: bytes, reason: str
) -> None:
    open_raw(rig, raw, link_id=1)
    other = rig.link(2)
    raw.sendall(write_hint(hint(5)) + damaged_hint(at, value))
    pump(rig.port, lambda: list(rig.port.links()) == [2])
    assert f"bad frame: {reason}" in read_frame(raw)[1][HEADER_BYTES:].decode()
    assert is_ended(raw)
    other.send(dispatch(1))
    assert gather(rig.port, 1)[0].link_id == 2
    assert [arrival.hint.layer for arrival in rig.port.hints()] == [5]  # the good one


def test_a_hint_that_comes_byte_by_byte_arrives_whole(rig: Rig, raw: socket.socket) -> None:
    open_raw(rig, raw)
    wire = write_hint(hint(6, 3))
    assert len(wire) == 64 + 4 * 3
    for at in range(len(wire) - 1):
        raw.sendall(wire[at : at + 1])
        assert rig.port.poll(0.0) == []
        assert rig.port.hints() == []
    raw.sendall(wire[-1:] + frame(1))
    assert gather(rig.port, 1)[0].dispatch.seq == 1
    (arrival,) = rig.port.hints()
    assert (arrival.hint.layer, arrival.hint.experts.tolist(), arrival.hint.counts.tolist()) == (
        6,
        [0, 1, 2],
        [1, 2, 3],
    )


def test_a_truncated_hint_is_never_seen(rig: Rig, raw: socket.socket) -> None:
    open_raw(rig, raw)
    raw.sendall(write_hint(hint())[:-1])
    raw.close()
    pump(rig.port, lambda: not rig.port.links())
    assert rig.port.hints() == []


def test_a_flood_of_hints_holds_up_nobody(rig: Rig, raw: socket.socket) -> None:
    open_raw(rig, raw, link_id=1)
    other = rig.link(2)
    raw.sendall(write_hint(hint()) * 200)
    for seq in range(10):
        num_read = rig.port.links()[1].hints
        rig.port.poll(0.0)
        assert rig.port.links()[1].hints <= num_read + 32  # then it is the others' turn
        other.send(dispatch(seq))
        (arrival,) = gather(rig.port, 1)
        rig.port.reply(2, doubled(arrival))
        assert other.receive(seq, soon()).status == Status.OK
    pump(rig.port, lambda: rig.port.links()[1].hints == 200)


# Callers.


@pytest.mark.parametrize(
    "noise",
    [b"GET / HTTP/1.1\r\n\r\n" + b" " * 80, header.plain(Kind.HELLO, 1, b"x"), frame(1)],
    ids=["http", "short", "dispatch"],
)
def test_a_caller_that_does_not_say_hello_is_turned_away(rig: Rig, raw: socket.socket, noise: bytes) -> None:
    other = rig.link(2)
    raw.sendall(noise)
    turned_away = Other(lambda: is_ended(raw))
    pump(rig.port, lambda: turned_away.is_done)
    other.send(dispatch(1))
    assert gather(rig.port, 1)[0].link_id == 2


def test_a_caller_that_says_nothing_is_forgotten_in_time(
    rig: Rig, raw: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers: list[Caller] = []
    read = Caller.read

    def note(caller: Caller) -> bool:
        callers.append(caller)
        return read(caller)

    monkeypatch.setattr(Caller, "read", note)
    raw.sendall(header.hello(1, SECRET, torch.float32, D)[:10])
    pump(rig.port, lambda: bool(callers))
    callers[0].expires_s = 0.0
    ended = Other(lambda: is_ended(raw))
    pump(rig.port, lambda: ended.is_done)


def test_silent_callers_cannot_keep_others_out(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collegium.link.caller.HELLO_WITHIN_S", 3600.0)
    silent = [call(rig) for _ in range(MAX_CALLERS)]
    assert rig.link(1).link_id == 1  # at the cost of the one who has been silent longest
    ended = Other(lambda: is_ended(silent[0]))
    pump(rig.port, lambda: ended.is_done)
    for sock in silent:
        sock.close()
    rig.port.poll(0.0)


# What a broken worker does.


@pytest.fixture
def pair() -> Iterator[tuple[SocketLink, socket.socket]]:
    """A router's end, and the socket of a worker that the test plays by hand."""
    ours, theirs = socket.socketpair()
    link = SocketLink(
        PlainStream(ours, is_blocking=True), transport="unix", link_id=1, worker_id="worker-a", shape=SHAPE
    )
    yield link, theirs
    link.close()
    theirs.close()


def answer(
    seq: int = 1, num_rows: int = 3, status: Status = Status.OK, body: bytes | None = None, num_misses: int = 0
) -> bytes:
    y, head = torch.zeros(num_rows, D), bytearray(HEADER_BYTES)
    if body is None:
        body = y.numpy().tobytes() + np.arange(num_misses, dtype=np.uint16).tobytes()
    header.write_reply(head, Reply(seq=seq, status=status, y=y), num_rows, len(body))
    head[32:36] = num_misses.to_bytes(4, "little")
    return bytes(head) + body


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (b"\0" * HEADER_BYTES, "magic is"),
        (answer(seq=2), "a reply to seq 2, which waits for none"),
        (answer(num_rows=2), "2 rows for the 3 of seq 1"),
        (answer(num_rows=65), "a reply of 65 rows"),
        (answer(body=b"abc"), "in 3 bytes"),
        (answer(status=Status.FAILED, body=b"x" * 1025), "a message of 1025 bytes"),
        (answer(num_misses=3)[:HEADER_BYTES], "3 misses of the 2 experts of seq 1"),
        (answer(num_misses=2049)[:HEADER_BYTES], "a reply of 2049 misses; the link carries at most 2048"),
        (answer(num_misses=1, body=bytes(3 * D * 4)), "and 1 misses in 96 bytes"),
        (answer(num_misses=2**32 - 1, body=b"")[:HEADER_BYTES], "4294967295 misses in 0 bytes"),
        (answer(status=Status.FAILED, num_misses=1, body=b"no"), "a reply that failed announces 1 misses"),
        (write_hint(hint()), "a worker does not send HINT"),
        (frame(1), "a worker does not send DISPATCH"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "wire",
)
def test_a_reply_that_cannot_be_ends_the_link(pair: tuple[SocketLink, socket.socket], wire: bytes, reason: str) -> None:
    link, worker = pair
    link.send(dispatch(1))
    worker.sendall(wire)
    with pytest.raises(LinkClosed, match=reason) as caught:
        link.receive(1, soon())
    assert isinstance(caught.value.__cause__, FrameError)
    assert link.is_closed


def test_a_second_reply_to_one_dispatch_ends_the_link(pair: tuple[SocketLink, socket.socket]) -> None:
    link, worker = pair
    link.send(dispatch(1))
    worker.sendall(answer(1) + answer(1))
    link.receive(1, soon())
    link.send(dispatch(2))
    with pytest.raises(LinkClosed, match="a reply to seq 1, which waits for none"):
        link.receive(2, soon())


@pytest.mark.parametrize("cut", [0, 1, HEADER_BYTES, HEADER_BYTES + 5])
def test_a_worker_that_goes_away_in_the_middle_ends_the_wait(pair: tuple[SocketLink, socket.socket], cut: int) -> None:
    link, worker = pair
    link.send(dispatch(1))
    worker.recv(4096)  # else the unread dispatch makes this a reset
    worker.sendall(answer(1)[:cut])
    worker.close()
    with pytest.raises(LinkClosed, match="worker-a closed the connection"):
        link.receive(1, soon())


def test_a_reply_that_is_interrupted_by_a_deadline_is_read_on_and_thrown_away(
    pair: tuple[SocketLink, socket.socket],
) -> None:
    link, worker = pair
    for cut in (10, HEADER_BYTES, HEADER_BYTES + 40):
        link.send(dispatch(1))
        link.send(dispatch(2))
        worker.sendall(answer(1)[:cut])
        with pytest.raises(LinkTimeout):
            link.receive(1, 0.0)
        worker.sendall(answer(1)[cut:] + answer(2))
        assert link.receive(2, soon()).status == Status.OK
    assert (link.stats.late_replies, link.num_in_flight) == (3, 0)


@pytest.mark.parametrize("cut", [10, HEADER_BYTES, HEADER_BYTES + 3 * D * 4 + 1], ids=["head", "rows", "misses"])
def test_misses_that_are_interrupted_by_a_deadline_leave_the_stream_whole(
    pair: tuple[SocketLink, socket.socket], cut: int
) -> None:
    link, worker = pair
    link.send(dispatch(1))
    link.send(dispatch(2))
    worker.sendall(answer(1, num_misses=2)[:cut])
    with pytest.raises(LinkTimeout):
        link.receive(1, 0.0)
    worker.sendall(answer(1, num_misses=2)[cut:] + answer(2, num_misses=1))
    assert link.receive(2, soon()).missed.tolist() == [0]
    assert (link.stats.late_replies, link.num_in_flight) == (1, 0)


class Narrow(PlainStream):
    """A stream that takes few bytes at once, as a full one does."""

    room = 0  # what it takes before it is full
    num_waits = 0

    def send_now(self, buffers: Buffers) -> int:
        taken = super().send_now((rest_of(buffers, 0)[: self.room],)) if self.room else 0
        self.room -= taken
        return taken

    def send_wait(self, buffer: memoryview, timeout_s: float) -> int:
        self.num_waits += 1
        if self.room:
            return super().send_wait(buffer, timeout_s)
        assert timeout_s < 1.0, "a hint waits for a peer that does not read"
        return 0


@pytest.fixture
def narrow() -> Iterator[tuple[SocketLink, Narrow, socket.socket]]:
    ours, theirs = socket.socketpair()
    stream = Narrow(ours, is_blocking=True)
    link = SocketLink(stream, transport="unix", link_id=1, worker_id="worker-a", shape=SHAPE)
    yield link, stream, theirs
    link.close()
    theirs.close()


def test_a_hint_for_which_there_is_no_room_is_forgotten_at_once(
    narrow: tuple[SocketLink, Narrow, socket.socket],
) -> None:
    link, stream, worker = narrow
    assert not link.hint(hint(1))
    assert (stream.num_waits, link.stats.hints, link.stats.bytes_out) == (0, 0, 0)
    stream.room = 10_000
    link.send(dispatch(1))
    assert read_frame(worker)[0].kind == Kind.DISPATCH


@pytest.mark.parametrize("room", [1, HEADER_BYTES, HEADER_BYTES + 5], ids=["head", "border", "groups"])
def test_a_hint_that_has_begun_is_finished_before_anything_else_leaves(
    narrow: tuple[SocketLink, Narrow, socket.socket], room: int
) -> None:
    link, stream, worker = narrow
    stream.room = room
    assert link.hint(hint(1))
    assert stream.num_waits > 0
    num_waits = stream.num_waits
    assert not link.hint(hint(2))  # the rest of the first is still here
    assert stream.num_waits == num_waits
    with pytest.raises(LinkTimeout, match="bytes wait for worker-a to read"):
        link.send(dispatch(1, deadline_s=0.0))
    assert (link.stats.hints, link.num_in_flight) == (1, 0)
    stream.room = 10_000
    assert link.hint(hint(3))
    link.send(dispatch(2))
    wires = [read_frame(worker)[1] for _ in range(3)]
    assert [header.read_common(wire).kind for wire in wires] == [Kind.HINT, Kind.HINT, Kind.DISPATCH]
    assert [read_hint(wire, SHAPE).layer for wire in wires[:2]] == [1, 3]
    assert link.stats.bytes_out == sum(map(len, wires))


def test_a_hint_to_a_worker_that_has_gone_ends_the_link(pair: tuple[SocketLink, socket.socket]) -> None:
    link, worker = pair
    worker.close()
    with pytest.raises(LinkClosed, match="the worker's connection broke"):
        link.hint(hint())
    assert link.is_closed


def big(seq: int) -> tuple[dict[str, object], torch.Tensor]:
    x = torch.full((512, 4096), float(seq))  # 8 MiB
    return {"x": x}, x


@pytest.fixture
def big_pair() -> Iterator[tuple[RouterLink, socket.socket]]:
    shape = expected(d_model=4096, max_rows=512).shape
    ours, theirs = socket.socketpair()
    link = SocketLink(
        PlainStream(ours, is_blocking=True), transport="unix", link_id=1, worker_id="worker-a", shape=shape
    )
    yield link, theirs
    link.close()
    theirs.close()


def test_a_dispatch_cut_short_by_its_deadline_leaves_the_stream_whole(
    big_pair: tuple[RouterLink, socket.socket],
) -> None:
    link, worker = big_pair
    with pytest.raises(LinkTimeout, match="while dispatch 1 was sent"):
        link.send(dispatch(1, 512, **big(1)[0], deadline_s=0.0))  # the kernel takes a part of it
    assert link.num_in_flight == 1
    with pytest.raises(KeyError):
        link.receive(1, soon())
    with pytest.raises(LinkTimeout, match="bytes wait for worker-a to read"):
        link.send(dispatch(2, 512, **big(2)[0], deadline_s=0.0))  # not a byte of it leaves
    assert link.num_in_flight == 1
    sizes = 64 + 8 + 8 * 513 + 512 * 4096 * 4
    reading = Other(lambda: (read_exactly_into(worker, sizes), read_exactly_into(worker, sizes)))
    link.send(dispatch(3, 512, **big(3)[0]))
    frames = reading.join()
    assert isinstance(frames, tuple)
    assert [header.read_common(one).seq for one in frames] == [1, 3]
    assert frames[0][-4:] == np.float32(1).tobytes()
    assert frames[1][-4:] == np.float32(3).tobytes()


def read_exactly_into(sock: socket.socket, num_bytes: int) -> bytes:
    buffer = memoryview(bytearray(num_bytes))
    got = 0
    while got < num_bytes:
        got += sock.recv_into(buffer[got:])
    return bytes(buffer)


def test_closing_ends_a_send_that_waits(big_pair: tuple[RouterLink, socket.socket]) -> None:
    link, worker = big_pair
    is_sending = threading.Event()

    def send() -> None:
        is_sending.set()
        link.send(dispatch(1, 512, **big(1)[0]))

    sending = Other(send)
    is_sending.wait(SOON_S)
    worker.recv(1)
    link.close()
    with pytest.raises(LinkClosed):
        sending.join()


def test_a_hundred_links_opened_and_closed_leave_no_descriptor_behind(rig: Rig) -> None:
    rig.link(0).close()
    pump(rig.port, lambda: not rig.port.links())
    before = num_descriptors()
    for link_id in range(1, 101):
        rig.link(link_id).close()
    pump(rig.port, lambda: not rig.port.links())
    assert num_descriptors() == before


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# Ports.


def test_a_port_may_listen_on_tcp_and_on_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "worker.sock")
    port = TcpPort(worker_id="worker-a", bind="127.0.0.1:0", unix=path)
    try:
        assert [transport for transport, _ in port.addresses] == ["tcp", "unix"]
        for link_id, (transport, address) in enumerate(port.addresses):
            port.expect(expected(link_id))
            opening = Other(lambda link_id=link_id, way=(transport, address): dial(*way, link_id))  # type: ignore[misc]
            pump(port, lambda opening=opening: opening.is_done)  # type: ignore[misc]
            link = opening.join()
            assert isinstance(link, SocketLink)
            assert link.transport == transport
            link.close()
    finally:
        port.close()
    assert not Path(path).exists()


def test_a_port_in_use_says_so() -> None:
    first = TcpPort(worker_id="worker-a", bind="127.0.0.1:0")
    try:
        with pytest.raises(OSError, match=r"[Aa]ddress already in use"):
            TcpPort(worker_id="worker-b", bind=first.addresses[0][1])
    finally:
        first.close()
    with pytest.raises(ValueError, match="HOST:PORT"):
        TcpPort(worker_id="worker-a", bind="nonsense")
    with pytest.raises(ValueError, match="listens on"):
        TcpPort(worker_id="worker-a")


def test_connecting_to_a_port_that_nobody_polls_ends_at_the_deadline(rig: Rig) -> None:
    rig.port.expect(expected(1))
    with pytest.raises(LinkTimeout):
        dial(rig.name, rig.address, deadline_s=0.0)


def dial(transport: str, address: str, link_id: int = 1, **changes: float) -> RouterLink:
    deadline_s = changes.get("deadline_s", soon())
    return connect(
        transport, address, link_id=link_id, secret=SECRET, dtype=torch.float32, d_model=D, deadline_s=deadline_s
    )


def test_a_listener_that_is_no_worker_is_recognised() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer_http() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n" + b" " * 80)
                sock.recv(4096)

        answering = Other(answer_http)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(LinkClosed, match="no worker of this protocol"):
            dial("tcp", address)
        answering.join()
