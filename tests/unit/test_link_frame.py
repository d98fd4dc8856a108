"""The frame format: what is written can be read, what cannot be is refused, and never with another exception."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collegium.link import header
from collegium.link.clock import ClockOffset
from collegium.link.frame import (
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Dispatch,
    FrameError,
    Hint,
    Kind,
    LinkClosed,
    LinkError,
    LinkShape,
    LinkTimeout,
    NoCredit,
    Reply,
    Status,
)
from collegium.link.hint import check_hint, read_hint, read_hint_body, write_hint
from collegium.link.stream import rest_of, split_host_port, unix_address
from tests.link_rig import dispatch, hint

SHAPE = LinkShape(dtype=torch.float32, reply_dtype=torch.bfloat16, d_model=8, max_rows=64, num_credits=2)


def written(sent: Dispatch) -> bytearray:
    buffer = bytearray(HEADER_BYTES)
    sizes = header.check_dispatch(sent, SHAPE)
    header.write_dispatch(buffer, sent, sizes, len(sent.traceparent), SHAPE)
    return buffer


def test_every_link_error_is_one_tree_and_a_frame_error_is_the_callers_fault() -> None:
    for error in (LinkClosed, LinkTimeout, NoCredit, FrameError):
        assert issubclass(error, LinkError)
    assert issubclass(FrameError, ValueError)


def test_a_header_has_64_bytes_at_any_size() -> None:
    for num_rows in (1, 64):
        assert len(written(dispatch(1, num_rows))) == HEADER_BYTES == 64


@given(
    seq=st.integers(0, 2**64 - 1),
    layer=st.integers(0, 2**16 - 1),
    step=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 2**64 - 1),
    micro_batch=st.integers(0, 255),
    deadline_s=st.floats(0, 1e9),
    num_rows=st.integers(1, 64),
    traceparent=st.text("0123456789abcdef-", max_size=60),
    prompt_share=st.floats(0, 1),
)
def test_a_dispatch_header_reads_back_as_it_was_written(
    seq: int,
    layer: int,
    step: int,
    epoch: int,
    micro_batch: int,
    deadline_s: float,
    num_rows: int,
    traceparent: str,
    prompt_share: float,
) -> None:
    sent = dispatch(
        seq,
        num_rows,
        layer=layer,
        step=step,
        epoch=epoch,
        micro_batch=micro_batch,
        deadline_s=deadline_s,
        traceparent=traceparent,
        num_prompt_rows=int(prompt_share * num_rows),
    )
    got = header.read_dispatch(written(sent), SHAPE)
    assert (got.seq, got.layer, got.step, got.epoch, got.micro_batch) == (seq, layer, step, epoch, micro_batch)
    assert got.deadline_us == int(deadline_s * 1e6)
    assert (got.num_rows, got.num_pairs, got.num_groups) == (num_rows, num_rows + 1, 2)
    assert got.body_bytes == 4 * 2 + 8 * (num_rows + 1) + num_rows * 32 + len(traceparent)
    assert got.text_bytes == len(traceparent)
    assert got.num_prompt_rows == int(prompt_share * num_rows)


@given(
    seq=st.integers(0, 2**64 - 1),
    compute_us=st.integers(0, 2**32 - 1),
    wait_us=st.integers(0, 2**32 - 1),
    missed=st.lists(st.integers(0, 2**16 - 1), max_size=50),
    num_rows=st.integers(1, 64),
)
def test_a_reply_header_reads_back_as_it_was_written(
    seq: int, compute_us: int, wait_us: int, missed: list[int], num_rows: int
) -> None:
    y = torch.zeros(num_rows, 8, dtype=torch.bfloat16)
    reply = Reply(seq=seq, y=y, compute_us=compute_us, wait_us=wait_us, missed=np.array(missed, dtype=np.uint16))
    header.check_reply(reply, num_rows, 50, SHAPE)
    buffer = bytearray(HEADER_BYTES)
    body_bytes = num_rows * 16 + 2 * len(missed)
    header.write_reply(buffer, reply, num_rows, body_bytes)
    assert header.read_reply(buffer, SHAPE) == (
        seq,
        Status.OK,
        body_bytes,
        compute_us,
        wait_us,
        len(missed),
        num_rows,
        0,
    )


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_refused_as_a_frame_error(noise: bytes) -> None:
    with pytest.raises(FrameError):
        header.read_common(b"\0\0" + noise[2:])
    for read in (header.read_common, lambda raw: header.read_dispatch(raw, SHAPE), lambda raw: read_hint(raw, SHAPE)):
        with pytest.raises(FrameError):
            read(b"\0" + noise[1:])
    assert header.read_reply(b"\0" + noise[1:], SHAPE) is None


@given(at=st.integers(0, HEADER_BYTES - 1), value=st.integers(0, 255))
def test_a_damaged_dispatch_header_never_announces_more_than_was_agreed(at: int, value: int) -> None:
    buffer = written(dispatch(1))
    buffer[at] = value
    try:
        got = header.read_dispatch(buffer, SHAPE)
    except FrameError:
        return
    assert 1 <= got.num_rows <= SHAPE.max_rows
    assert 1 <= got.num_groups <= got.num_pairs <= SHAPE.max_pairs
    assert 0 <= got.num_prompt_rows <= got.num_rows
    assert got.body_bytes <= 4 * got.num_groups + 8 * got.num_pairs + got.num_rows * SHAPE.row_bytes + 1024


@given(at=st.integers(0, HEADER_BYTES - 1), value=st.integers(0, 255))
def test_a_damaged_reply_header_never_announces_more_than_was_agreed(at: int, value: int) -> None:
    buffer = bytearray(HEADER_BYTES)
    y, missed = torch.zeros(3, 8, dtype=torch.bfloat16), np.array([3], dtype=np.uint16)
    header.write_reply(buffer, Reply(seq=1, y=y, missed=missed), 3, 50)
    buffer[at] = value
    try:
        got = header.read_reply(buffer, SHAPE)
    except FrameError:
        return
    if got is not None:
        assert got.num_misses <= SHAPE.max_groups
        assert got.body_bytes <= max(SHAPE.max_rows * SHAPE.reply_row_bytes + 2 * SHAPE.max_groups, 1024)


@given(layer=st.integers(0, 2**16 - 1), groups=st.dictionaries(st.integers(0, 65_535), st.integers(1, 65_535)))
def test_a_hint_reads_back_as_it_was_written(layer: int, groups: dict[int, int]) -> None:
    sent = Hint(
        layer=layer, experts=np.array(list(groups), np.uint16), counts=np.array(list(groups.values()), np.uint16)
    )
    if not groups:
        with pytest.raises(FrameError, match="a hint of 0 groups"):
            check_hint(sent, SHAPE)
        return
    check_hint(sent, SHAPE)
    frame = write_hint(sent)
    assert header.read_common(frame) == (Kind.HINT, 0, len(frame) - HEADER_BYTES, 0)
    head = read_hint(frame, SHAPE)
    assert (head.layer, head.num_groups, head.sent_us) == (layer, len(groups), header.sent_us(frame))
    got = read_hint_body(head, frame[HEADER_BYTES:], SHAPE)
    assert (got.layer, dict(zip(got.experts.tolist(), got.counts.tolist(), strict=True))) == (layer, groups)


@given(at=st.integers(0, HEADER_BYTES + 11), value=st.integers(0, 255))
def test_a_damaged_hint_is_refused_or_still_makes_sense(at: int, value: int) -> None:
    frame = bytearray(write_hint(hint(6, 3)))
    frame[at] = value
    try:
        head = read_hint(frame, SHAPE)
        assert (head.num_groups, head.body_bytes) == (3, 12)  # one byte cannot change both, and they must agree
        got = read_hint_body(head, frame[HEADER_BYTES:], SHAPE)
    except FrameError:
        return
    assert len(set(got.experts.tolist())) == 3
    assert got.counts.min() >= 1


@given(noise=st.binary(min_size=4, max_size=64).filter(lambda noise: len(noise) % 4 == 0))
def test_noise_in_a_hints_body_is_refused_as_a_frame_error_or_makes_sense(noise: bytes) -> None:
    num_groups = len(noise) // 4
    head = read_hint(write_hint(hint(6, num_groups)), SHAPE)
    try:
        got = read_hint_body(head, noise, SHAPE)
    except FrameError:
        words = np.frombuffer(noise, np.uint16)
        assert len(set(words[:num_groups].tolist())) < num_groups or words[num_groups:].min() == 0
    else:
        assert got.experts.tobytes() + got.counts.tobytes() == noise


def test_the_magic_the_version_and_the_kind_are_checked_in_that_order() -> None:
    good = header.plain(Kind.PROGRESS, 3)
    assert header.read_common(good) == (Kind.PROGRESS, 3, 0, 0)
    assert MAGIC.to_bytes(2, "little") == good[:2]
    for at, value, message in ((0, 0, "magic"), (2, VERSION + 1, f"version is {VERSION + 1}"), (3, 9, "no kind 9")):
        bad = bytearray(good)
        bad[at] = value
        with pytest.raises(FrameError, match=message):
            header.read_common(bad)


def test_a_router_may_send_nothing_but_dispatches_and_hints() -> None:
    with pytest.raises(FrameError, match="a router sends dispatches and hints, not PROGRESS"):
        header.read_dispatch(header.plain(Kind.PROGRESS, 3), SHAPE)
    with pytest.raises(FrameError, match="this is no hint but GOODBYE"):
        read_hint(header.goodbye("no"), SHAPE)


def test_the_handshake_reads_back_as_it_was_written() -> None:
    hello = header.hello(77, b"0123456789abcdef", torch.bfloat16, 4096)
    assert header.read_common(hello).seq == 77
    assert header.read_hello(hello[HEADER_BYTES:]) == (b"0123456789abcdef", torch.bfloat16, 4096)
    welcome = header.welcome(77, SHAPE, "worker-ü")
    assert header.read_welcome(welcome[HEADER_BYTES:], torch.float32, 8) == (SHAPE, "worker-ü")
    with pytest.raises(FrameError, match="a welcome of 3 bytes"):
        header.read_welcome(b"abc", torch.float32, 8)
    with pytest.raises(FrameError, match="cannot be"):
        header.read_welcome(bytes(20), torch.float32, 8)
    with pytest.raises(ValueError, match="16 bytes"):
        header.hello(1, b"short", torch.float32, 8)


@given(st.text(max_size=2000))
def test_a_message_is_cut_between_characters(message: str) -> None:
    clipped = header.clip(message)
    assert len(clipped) <= 1024
    assert message.encode(errors="replace").decode().startswith(clipped.decode())


@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=90),
    last_row=st.integers(0, 6),
    extra=st.integers(-1, 1),
)
def test_counts_are_good_when_each_is_positive_and_they_add_up(counts: list[int], last_row: int, extra: int) -> None:
    num_pairs = max(1, sum(counts) + extra)
    pair_rows = np.zeros(num_pairs, dtype=np.uint32)
    pair_rows[-1] = last_row
    is_good = min(counts) >= 1 and sum(counts) == num_pairs and last_row < 4
    try:
        header.check_counts(np.array(counts, dtype=np.uint16), pair_rows, 4)
    except FrameError:
        assert not is_good
    else:
        assert is_good


def test_counts_that_overflow_their_own_width_do_not_add_up_by_wrapping() -> None:
    counts = np.full(100, 65_535, dtype=np.uint16)
    pair_rows = np.zeros(100 * 65_535 % 65_536 + 65_536, dtype=np.uint32)
    with pytest.raises(FrameError, match="add up to 6553500"):
        header.check_counts(counts, pair_rows, 1)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=150))
def test_an_expert_has_one_group_of_a_dispatch(experts: list[int]) -> None:
    try:
        header.check_distinct(np.array(experts, dtype=np.uint16))
    except FrameError:
        assert len(set(experts)) < len(experts)
    else:
        assert len(set(experts)) == len(experts)


@given(st.lists(st.binary(max_size=9), max_size=6), st.integers(0, 60))
def test_the_rest_of_a_send_is_what_was_not_taken(buffers: list[bytes], taken: int) -> None:
    assert rest_of(buffers, taken) == b"".join(buffers)[taken:]


def test_addresses_are_taken_apart() -> None:
    assert split_host_port("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_host_port("[::1]:0") == ("::1", 0)
    for bad in ("127.0.0.1", "host:", "host:port", "host:70000", ""):
        with pytest.raises(ValueError, match=r"is not HOST:PORT"):
            split_host_port(bad)
    assert unix_address("@name") == "\0name"
    assert unix_address("/run/worker.sock") == "/run/worker.sock"


# The clock.


def test_a_deadline_means_the_same_at_both_ends_whatever_the_clocks_say() -> None:
    clock = ClockOffset(sent_us=1_000, received_us=9_000_100)
    assert clock.to_local_us(2_000) == 9_001_100


def test_one_slow_frame_does_not_make_later_deadlines_late() -> None:
    clock = ClockOffset(sent_us=0, received_us=500_000)  # the HELLO waited half a second to be read
    clock.heard(sent_us=600_000, received_us=600_050)
    assert clock.to_local_us(0) == 50
    clock.heard(sent_us=700_000, received_us=900_000)  # a frame that waited 200 ms
    assert clock.to_local_us(0) == 50 + 299  # no more than clocks drift in the 300 ms since


@given(
    offset_us=st.integers(-(10**9), 10**9),
    transits_us=st.lists(st.integers(20, 10**7), min_size=1, max_size=50),
    gap_us=st.integers(1, 10**5),
)
def test_the_offset_is_never_less_than_the_truth(offset_us: int, transits_us: list[int], gap_us: int) -> None:
    clock = ClockOffset(0, offset_us + transits_us[0])
    received_us = offset_us + transits_us[0]
    for transit_us in transits_us:
        received_us += gap_us
        clock.heard(received_us - offset_us - transit_us, received_us)
    assert clock.to_local_us(0) >= offset_us
    clock.heard(received_us - offset_us - 20, received_us)
    assert clock.to_local_us(0) <= offset_us + 20  # one good frame is enough


def test_a_clock_that_runs_away_is_followed() -> None:
    clock = ClockOffset(0, 0)
    for sent_us in range(0, 3600 * 10**6, 10**6):  # an hour of frames; the reader's clock gains 100 us a second
        clock.heard(sent_us, sent_us + sent_us // 10_000 + 30)
    assert clock.to_local_us(0) == pytest.approx(3599 * 100, abs=200)


def test_now_is_the_monotonic_clock() -> None:
    before_us = int(time.monotonic() * 1e6)
    assert before_us - 1 <= header.now_us() <= time.monotonic() * 1e6 + 1
