"""What every transport of collegium.link does alike: one suite, run over each of them."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from collegium.link.connect import connect
from collegium.link.frame import (
    MAX_ROWS,
    FrameError,
    LinkClosed,
    LinkError,
    LinkTimeout,
    NoCredit,
    Reply,
    Status,
)
from tests.link_rig import SECRET, TRANSPORTS, D, Other, Rig, dispatch, doubled, expected, gather, make_rig, pump, soon


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("link")


@pytest.fixture(params=TRANSPORTS)
def rig(request: pytest.FixtureRequest, folder: Path) -> Iterator[Rig]:
    rig = make_rig(request.param, folder)
    yield rig
    rig.close()


def past() -> float:
    return time.monotonic() - 1.0


# Opening a link.


def test_a_link_knows_what_both_ends_agreed_on(rig: Rig) -> None:
    link = rig.link(7, reply_dtype=torch.bfloat16, max_rows=33, num_credits=3, max_pairs=99)
    assert (link.link_id, link.worker_id, link.transport, link.num_credits) == (7, "worker-a", rig.name, 3)
    assert (link.shape.dtype, link.shape.reply_dtype, link.shape.d_model) == (torch.float32, torch.bfloat16, D)
    assert (link.shape.max_rows, link.shape.max_pairs) == (33, 99)
    assert not link.is_closed
    assert list(rig.port.links()) == [7]


def test_a_wrong_secret_opens_nothing_and_spoils_nothing(rig: Rig) -> None:
    rig.port.expect(expected(1))
    with pytest.raises(LinkClosed, match="no such link, or its secret is wrong, used or expired"):
        rig.connect(1, secret=b"x" * 16)
    assert rig.port.links() == {}
    assert rig.connect(1).link_id == 1


def test_a_link_that_nobody_promised_is_refused_in_the_same_words(rig: Rig) -> None:
    with pytest.raises(LinkClosed, match="no such link, or its secret is wrong, used or expired"):
        rig.connect(5, secret=bytes(16))


def test_a_secret_opens_one_link_once(rig: Rig) -> None:
    first = rig.link(1)
    with pytest.raises(LinkClosed, match="wrong, used or expired"):
        rig.connect(1)
    first.send(dispatch(1))
    assert gather(rig.port, 1)[0].link_id == 1


def test_a_secret_is_worth_nothing_after_its_time(rig: Rig) -> None:
    rig.port.expect(expected(1, expires_s=past()))
    with pytest.raises(LinkClosed, match="wrong, used or expired"):
        rig.connect(1)


@pytest.mark.parametrize("changes", [{"dtype": torch.bfloat16}, {"d_model": D + 1}], ids=["dtype", "d_model"])
def test_ends_that_disagree_open_nothing(rig: Rig, changes: dict[str, object]) -> None:
    rig.port.expect(expected(1))
    with pytest.raises(LinkClosed, match=r"the link is torch.float32 of 8"):
        rig.connect(1, **changes)


def test_a_promise_that_no_frame_could_keep_is_refused(rig: Rig) -> None:
    for changes in (
        {"max_rows": MAX_ROWS + 1},
        {"max_rows": 0},
        {"num_credits": 0},
        {"dtype": torch.float64},
        {"d_model": 2**20, "max_rows": 2**15},
        {"secret": b"short"},
    ):
        with pytest.raises(ValueError, match=r"link|secret|travel|carry"):
            rig.port.expect(expected(1, **changes))


def test_a_link_is_promised_once(rig: Rig) -> None:
    rig.port.expect(expected(1))
    with pytest.raises(ValueError, match="link 1 is expected already"):
        rig.port.expect(expected(1))
    rig.connect(1)
    with pytest.raises(ValueError, match="link 1 is open already"):
        rig.port.expect(expected(1))


def test_connecting_where_nobody_listens_says_where(rig: Rig) -> None:
    address = rig.address
    rig.port.close()
    with pytest.raises(LinkClosed, match="no connection to"):
        connect(rig.name, address, link_id=1, secret=SECRET, dtype=torch.float32, d_model=D, deadline_s=soon())


# What arrives.


def test_a_dispatch_arrives_as_it_was_sent(rig: Rig) -> None:
    link = rig.link()
    sent = dispatch(41, 5, num_prompt_rows=4, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    link.send(sent)
    (arrival,) = gather(rig.port, 1)
    got = arrival.dispatch
    assert (arrival.link_id, arrival.router_id) == (1, "router-1")
    assert (got.seq, got.layer, got.step, got.epoch, got.micro_batch) == (41, 5, 6, 7, 2)
    for name in ("experts", "counts", "pair_rows", "pair_weights"):
        assert getattr(got, name).dtype == getattr(sent, name).dtype
        np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))
    assert torch.equal(got.x, sent.x)
    assert got.num_prompt_rows == 4
    assert got.traceparent == sent.traceparent
    assert sent.deadline_s - 1e-3 <= got.deadline_s <= sent.deadline_s + 5.0  # later by the transit at most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 64])
def test_rows_come_back_bit_for_bit(rig: Rig, dtype: torch.dtype, num_rows: int) -> None:
    link = rig.link(dtype=dtype, reply_dtype=dtype, d_model=13)
    x = torch.randn(num_rows, 13, generator=torch.Generator().manual_seed(num_rows)).to(dtype)
    link.send(dispatch(1, num_rows, x=x))
    (arrival,) = gather(rig.port, 1)
    rig.port.reply(
        1, Reply(seq=1, y=arrival.dispatch.x.clone(), compute_us=11, wait_us=12, missed=np.array([9], np.uint16))
    )
    reply = link.receive(1, soon())
    assert (reply.status, reply.compute_us, reply.wait_us, reply.num_misses) == (Status.OK, 11, 12, 1)
    assert reply.y is not None
    assert reply.y.dtype is dtype
    assert torch.equal(reply.y, x)


def test_a_reply_may_have_another_type_than_the_rows(rig: Rig) -> None:
    link = rig.link(reply_dtype=torch.bfloat16)
    link.send(dispatch(1))
    (arrival,) = gather(rig.port, 1)
    rig.port.reply(1, doubled(arrival, y=arrival.dispatch.x.bfloat16()))
    reply = link.receive(1, soon())
    assert reply.y is not None
    assert reply.y.dtype is torch.bfloat16


def test_dispatches_arrive_in_the_order_in_which_they_were_sent(rig: Rig) -> None:
    link = rig.link(num_credits=8)
    for seq in (5, 3, 8, 1):
        link.send(dispatch(seq))
    assert [arrival.dispatch.seq for arrival in gather(rig.port, 4)] == [5, 3, 8, 1]


def test_dispatches_in_flight_do_not_share_memory(rig: Rig) -> None:
    link = rig.link(num_credits=3)
    for seq in (1, 2, 3):
        link.send(dispatch(seq))
    for arrival in gather(rig.port, 3):
        assert torch.equal(arrival.dispatch.x, dispatch(arrival.dispatch.seq).x)


def test_replies_may_come_in_any_order(rig: Rig) -> None:
    link = rig.link(num_credits=3)
    for seq in (1, 2, 3):
        link.send(dispatch(seq, num_rows=seq))
    arrivals = {arrival.dispatch.seq: arrival for arrival in gather(rig.port, 3)}
    for seq in (3, 1, 2):
        rig.port.reply(1, doubled(arrivals[seq]))
    replies = [link.receive(seq, soon()) for seq in (1, 2, 3)]
    for seq, reply in zip((1, 2, 3), replies, strict=True):
        assert reply.y is not None
        assert torch.equal(reply.y, dispatch(seq, num_rows=seq).x * 2)


def test_links_of_several_routers_do_not_mix(rig: Rig) -> None:
    links = [rig.link(link_id) for link_id in (1, 2, 3)]
    for link in links:
        link.send(dispatch(9, num_rows=link.link_id))  # the same sequence number on each
    for arrival in gather(rig.port, 3):
        rig.port.reply(arrival.link_id, doubled(arrival))
    for link in links:
        reply = link.receive(9, soon())
        assert reply.y is not None
        assert reply.y.shape == (link.link_id, D)


def test_a_sign_of_life_moves_the_deadline_of_who_is_patient(rig: Rig) -> None:
    link = rig.link(num_credits=2)
    for seq in (1, 2):
        link.send(dispatch(seq))
    first, second = gather(rig.port, 2)
    rig.port.progress(1)
    late = threading.Timer(0.3, lambda: rig.port.reply(1, doubled(first)))
    late.start()
    assert link.receive(1, time.monotonic() + 0.05, patience_s=20.0).status is Status.OK
    late.join()
    rig.port.progress(1)
    with pytest.raises(LinkTimeout):
        link.receive(2, time.monotonic() + 0.05)
    rig.port.reply(1, doubled(second))


def test_a_failed_dispatch_says_why(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    gather(rig.port, 1)
    rig.port.reply(1, Reply(seq=1, status=Status.FAILED, message="expert 9: Prüfsumme falsch " + "é" * 2000))
    reply = link.receive(1, soon())
    assert (reply.status, reply.y) == (Status.FAILED, None)
    assert reply.message.startswith("expert 9: Prüfsumme falsch éé")
    assert len(reply.message.encode()) <= 1024


@pytest.mark.parametrize("num_prompt_rows", [0, 1, 3])
def test_any_share_of_the_rows_may_belong_to_prompts(rig: Rig, num_prompt_rows: int) -> None:
    link = rig.link()
    link.send(dispatch(1, num_rows=3, num_prompt_rows=num_prompt_rows))
    assert gather(rig.port, 1)[0].dispatch.num_prompt_rows == num_prompt_rows


# Credits.


def test_no_more_dispatches_are_in_flight_than_there_are_credits(rig: Rig) -> None:
    link = rig.link(num_credits=2)
    link.send(dispatch(1))
    link.send(dispatch(2))
    assert link.num_in_flight == 2
    with pytest.raises(NoCredit):
        link.send(dispatch(3))
    for arrival in gather(rig.port, 2):
        rig.port.reply(1, doubled(arrival))
    with pytest.raises(NoCredit):  # a reply gives back its credit when it is received, not when it arrives
        link.send(dispatch(3))
    link.receive(1, soon())
    link.send(dispatch(3))
    assert link.num_in_flight == 2


def test_a_reply_stays_valid_until_its_credit_is_used_again(rig: Rig) -> None:
    link = rig.link(num_credits=2)
    link.send(dispatch(1))
    rig.port.reply(1, doubled(gather(rig.port, 1)[0]))
    first = link.receive(1, soon())
    link.send(dispatch(2))  # takes the other credit
    rig.port.reply(1, doubled(gather(rig.port, 1)[0]))
    link.receive(2, soon())
    assert first.y is not None
    assert torch.equal(first.y, dispatch(1).x * 2)


def test_a_sequence_number_is_in_flight_once(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    with pytest.raises(FrameError, match="seq 1 is in flight already"):
        link.send(dispatch(1))
    rig.port.reply(1, doubled(gather(rig.port, 1)[0]))
    link.receive(1, soon())
    with pytest.raises(KeyError):
        link.receive(1, soon())
    link.send(dispatch(1))


def test_a_worker_answers_each_dispatch_once(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    (arrival,) = gather(rig.port, 1)
    rig.port.reply(1, doubled(arrival))
    with pytest.raises(KeyError):
        rig.port.reply(1, Reply(seq=1, y=dispatch(1).x))


# Sizes.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(65, D)}, "65 rows; the link carries 1 to 64"),
        ({"x": torch.zeros(0, D)}, "0 rows"),
        ({"x": torch.zeros(3, D + 1)}, r"x is torch.float32 \[3, 9\]"),
        ({"x": torch.zeros(3, D, dtype=torch.bfloat16)}, "x is torch.bfloat16"),
        ({"x": torch.zeros(D, 3).T}, "contiguous"),
        ({"x": torch.zeros(3 * D)}, "x is"),
        ({"counts": np.array([3, 2], dtype=np.uint16)}, "counts add up to 5 with the least 2; there are 4 pairs"),
        ({"counts": np.array([4, 0], dtype=np.uint16)}, "the least 0"),
        ({"counts": np.array([4], dtype=np.uint16)}, "2,.* experts but .*1,.* counts"),
        ({"experts": np.array([3, 9], dtype=np.int64)}, "experts, counts, pair_rows, pair_weights are int64"),
        ({"pair_rows": np.array([0, 1, 2, 3], dtype=np.uint32)}, "a pair names row 3 of 3"),
        ({"pair_weights": np.ones(3, dtype=np.float32)}, "pair_rows but"),
        ({"pair_rows": np.zeros((2, 2), dtype=np.uint32)}, "pair_rows"),
        ({"num_prompt_rows": 4}, "4 of 3 rows belong to prompts"),
        ({"num_prompt_rows": -1}, "-1 of 3 rows belong to prompts"),
        ({"traceparent": "0" * 1025}, "traceparent"),
        ({"layer": 70_000}, "does not fit"),
        ({"deadline_s": float("inf")}, "does not fit"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_a_dispatch_that_breaks_the_agreed_sizes_never_leaves(
    rig: Rig, changes: dict[str, object], message: str
) -> None:
    link = rig.link()
    with pytest.raises(FrameError, match=message) as caught:
        link.send(dispatch(1, **changes))
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, LinkError)
    assert (link.num_in_flight, link.stats.bytes_out) == (0, 0)
    link.send(dispatch(2))
    assert gather(rig.port, 1)[0].dispatch.seq == 2


def test_more_pairs_than_agreed_never_leave(rig: Rig) -> None:
    link = rig.link(max_pairs=3)
    with pytest.raises(FrameError, match="4 pairs; the link carries 1 to 3"):
        link.send(dispatch(1, num_rows=3))


@pytest.mark.parametrize(
    "y",
    [None, torch.zeros(2, D), torch.zeros(3, D, dtype=torch.float64), torch.zeros(D, 3).T],
    ids=["none", "rows", "dtype", "strides"],
)
def test_a_worker_cannot_answer_with_other_rows_than_were_asked_for(rig: Rig, y: torch.Tensor | None) -> None:
    link = rig.link()
    link.send(dispatch(1))
    (arrival,) = gather(rig.port, 1)
    with pytest.raises(FrameError, match="y of seq 1"):
        rig.port.reply(1, Reply(seq=1, y=y))
    rig.port.reply(1, doubled(arrival))
    assert link.receive(1, soon()).status == Status.OK


def test_a_large_dispatch_and_its_reply_travel_whole(rig: Rig) -> None:
    width, num_rows = 4096, 512  # 8 MiB, more than a socket's buffers hold
    link = rig.link(d_model=width, max_rows=num_rows)
    x = torch.randn(num_rows, width)
    sending = Other(lambda: link.send(dispatch(1, num_rows, x=x)))
    (arrival,) = gather(rig.port, 1)
    sending.join()
    assert torch.equal(arrival.dispatch.x, x)
    rig.port.reply(1, Reply(seq=1, y=arrival.dispatch.x + 1))
    receiving = Other(lambda: link.receive(1, soon()))
    pump(rig.port, lambda: receiving.is_done)
    reply = receiving.join()
    assert isinstance(reply, Reply)
    assert reply.y is not None
    assert torch.equal(reply.y, x + 1)


# Counting.


def test_bytes_are_counted_exactly_at_both_ends(rig: Rig) -> None:
    link = rig.link(reply_dtype=torch.bfloat16, num_credits=4)
    bytes_out = bytes_back = rows = 0
    for seq, num_rows in enumerate((1, 3, 64), start=1):
        sent = dispatch(seq, num_rows)
        num_groups, num_pairs = len(sent.experts), len(sent.pair_rows)
        bytes_out += 64 + 4 * num_groups + 8 * num_pairs + num_rows * D * 4
        bytes_back += 64 + num_rows * D * 2
        rows += num_rows
        link.send(sent)
        (arrival,) = gather(rig.port, 1)
        rig.port.reply(1, doubled(arrival, y=arrival.dispatch.x.bfloat16()))
        link.receive(seq, soon())
    for stats in (link.stats, rig.port.links()[1]):
        assert (stats.dispatches, stats.rows_out, stats.rows_back, stats.pairs_out) == (3, rows, rows, rows + 3)
        assert (stats.bytes_out, stats.bytes_back) == (bytes_out, bytes_back)
        assert (stats.late_replies, stats.expired) == (0, 0)


def test_a_failed_reply_counts_its_message(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    gather(rig.port, 1)
    rig.port.reply(1, Reply(seq=1, status=Status.FAILED, message="no"))
    link.receive(1, soon())
    assert (link.stats.bytes_back, link.stats.rows_back) == (66, 0)
    assert (rig.port.links()[1].bytes_back, rig.port.links()[1].rows_back) == (66, 0)


# Deadlines.


def test_a_dispatch_past_its_deadline_is_answered_and_not_computed(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1, deadline_s=past()))
    link.send(dispatch(2))
    assert [arrival.dispatch.seq for arrival in gather(rig.port, 1)] == [2]
    reply = link.receive(1, soon())
    assert (reply.status, reply.y) == (Status.EXPIRED, None)
    assert "past its deadline" in reply.message
    assert rig.port.links()[1].expired == 1


def test_a_receive_ends_at_its_deadline_and_the_link_lives_on(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    with pytest.raises(LinkTimeout):
        link.receive(1, past())
    assert not link.is_closed
    link.send(dispatch(2))
    for arrival in gather(rig.port, 2):
        rig.port.reply(1, doubled(arrival))
    reply = link.receive(2, soon())
    assert reply.y is not None
    assert torch.equal(reply.y, dispatch(2).x * 2)


def test_a_reply_that_is_here_already_is_returned_even_past_the_deadline(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    link.send(dispatch(2))
    arrivals = gather(rig.port, 2)
    rig.port.reply(1, doubled(arrivals[0]))
    rig.port.reply(1, doubled(arrivals[1]))
    link.receive(2, soon())  # which reads the other on its way
    assert link.receive(1, past()).status == Status.OK


def test_a_late_reply_is_counted_thrown_away_and_gives_back_its_credit(rig: Rig) -> None:
    link = rig.link(num_credits=1)
    link.send(dispatch(1))
    with pytest.raises(LinkTimeout):
        link.receive(1, past())
    with pytest.raises(KeyError):
        link.receive(1, soon())
    with pytest.raises(NoCredit):
        link.send(dispatch(2))
    rig.port.reply(1, doubled(gather(rig.port, 1)[0]))
    assert link.stats.late_replies == 0
    until_s = soon()
    while not link.stats.late_replies:
        with contextlib.suppress(NoCredit):  # over TLS the reply is on its way for a moment
            link.send(dispatch(2))  # finds the late reply when it looks for a credit
        assert time.monotonic() < until_s
    assert (link.stats.late_replies, link.num_in_flight) == (1, 1)
    rig.port.reply(1, doubled(gather(rig.port, 1)[0]))
    reply = link.receive(2, soon())
    assert reply.y is not None
    assert torch.equal(reply.y, dispatch(2).x * 2)


def test_an_abandoned_sequence_number_cannot_be_taken_for_a_new_one(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    with pytest.raises(LinkTimeout):
        link.receive(1, past())
    with pytest.raises(FrameError, match="in flight already"):
        link.send(dispatch(1))


def test_a_sign_of_progress_is_heard_and_ends_no_wait(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    (arrival,) = gather(rig.port, 1)
    rig.port.progress(1)
    with pytest.raises(LinkTimeout):
        link.receive(1, past())
    before_s = link.last_heard_s
    link.send(dispatch(2))
    rig.port.progress(1)
    rig.port.reply(1, doubled(arrival))
    rig.port.reply(1, doubled(gather(rig.port, 1)[0]))
    assert link.receive(2, soon()).status == Status.OK
    assert link.last_heard_s > before_s
    assert rig.port.links()[1].bytes_back == link.stats.bytes_back
    rig.port.progress(99)  # a link that is gone


# The end.


def test_closing_the_routers_end_ends_its_own_wait(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    is_waiting = threading.Event()

    def wait() -> Reply:
        is_waiting.set()
        return link.receive(1, soon())

    waiting = Other(wait)
    is_waiting.wait(10)
    link.close()
    with pytest.raises(LinkClosed, match="this end closed the link"):
        waiting.join()
    link.close()
    assert link.is_closed
    with pytest.raises(LinkClosed):
        link.send(dispatch(2))
    with pytest.raises(LinkClosed):
        link.receive(1, soon())


def test_closing_the_port_ends_every_wait_at_both_ends(rig: Rig) -> None:
    links = [rig.link(link_id) for link_id in (1, 2)]
    for link in links:
        link.send(dispatch(1))
    gather(rig.port, 2)
    receiving = [Other(lambda link=link: link.receive(1, soon())) for link in links]  # type: ignore[misc]
    polling = Other(lambda: rig.port.poll(60.0))
    rig.port.close()
    rig.port.close()
    for waiting in (*receiving, polling):
        with pytest.raises(LinkClosed):
            waiting.join()
    with pytest.raises(LinkClosed):
        rig.port.poll(0.0)
    assert rig.port.links() == {}
    rig.port.reply(1, Reply(seq=1, y=dispatch(1).x))  # the link is gone: dropped
    rig.port.wake()


def test_a_worker_drops_one_link_with_a_reason_and_keeps_the_others(rig: Rig) -> None:
    first, second = rig.link(1), rig.link(2)
    first.send(dispatch(1))
    gather(rig.port, 1)
    rig.port.drop(1, "the worker is draining")
    rig.port.drop(77, "never heard of it")
    pump(rig.port, lambda: list(rig.port.links()) == [2])
    with pytest.raises(LinkClosed, match="worker-a ended the link: the worker is draining"):
        first.receive(1, soon())
    rig.port.reply(1, Reply(seq=1, y=dispatch(1).x))
    second.send(dispatch(1))
    rig.port.reply(2, doubled(gather(rig.port, 1)[0]))
    assert second.receive(1, soon()).status == Status.OK


def test_replies_sent_before_the_end_can_still_be_received(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    link.send(dispatch(2))
    for arrival in gather(rig.port, 2):
        rig.port.reply(1, doubled(arrival))
    rig.port.drop(1, "done")
    pump(rig.port, lambda: not rig.port.links())
    assert link.receive(1, soon()).status == Status.OK
    assert link.receive(2, soon()).status == Status.OK
    with pytest.raises(LinkClosed):
        link.send(dispatch(3))
        link.receive(3, soon())


def test_the_worker_forgets_a_link_whose_router_closed(rig: Rig) -> None:
    first, second = rig.link(1), rig.link(2)
    first.close()
    pump(rig.port, lambda: list(rig.port.links()) == [2])
    second.send(dispatch(4))
    assert gather(rig.port, 1)[0].link_id == 2
    rig.port.expect(expected(1))
    assert rig.connect(1).link_id == 1  # the id is free again


def test_wake_makes_a_poll_return(rig: Rig) -> None:
    rig.port.wake()
    assert rig.port.poll(60.0) == []
    polling = Other(lambda: rig.port.poll(60.0))
    rig.port.wake()
    assert polling.join() == []


def test_a_thousand_round_trips_leave_every_credit_free(rig: Rig) -> None:
    link = rig.link(num_credits=2)
    for seq in range(1000):
        link.send(dispatch(seq, num_rows=1 + seq % 64))
        for arrival in gather(rig.port, 1):
            rig.port.reply(1, doubled(arrival))
        reply = link.receive(seq, soon())
        assert reply.y is not None
        assert reply.y[0, 0] == 2000 * seq
    assert link.num_in_flight == 0
