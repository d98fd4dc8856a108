"""What every transport of collegium.link does alike with hints, and with the experts that a worker missed."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from collegium.link.base import MAX_HINTS
from collegium.link.frame import FrameError, LinkClosed, LinkTimeout, NoCredit, Reply, Status
from tests.link_rig import (
    TRANSPORTS,
    D,
    Other,
    Rig,
    dispatch,
    doubled,
    gather,
    gather_hints,
    hint,
    make_rig,
    pump,
    soon,
)


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


def u16(*values: int) -> npt.NDArray[np.uint16]:
    return np.array(values, dtype=np.uint16)


# Misses.


@pytest.mark.parametrize("reply_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 64])
def test_missed_experts_come_back_behind_the_rows(rig: Rig, reply_dtype: torch.dtype, num_rows: int) -> None:
    link = rig.link(reply_dtype=reply_dtype, d_model=13)
    x = torch.randn(num_rows, 13)
    for seq, missed in enumerate((u16(3, 9), u16(), u16(9))):
        link.send(dispatch(seq, num_rows, x=x))
        gather(rig.port, 1)
        rig.port.reply(1, Reply(seq=seq, y=x.to(reply_dtype), missed=missed))
        reply = link.receive(seq, soon())
        assert reply.y is not None
        assert torch.equal(reply.y, x.to(reply_dtype))
        assert (reply.missed.dtype, reply.missed.tolist(), reply.num_misses) == (
            np.uint16,
            missed.tolist(),
            len(missed),
        )


def test_every_expert_of_the_largest_dispatch_may_be_missed(rig: Rig) -> None:
    link = rig.link(max_pairs=2048)
    experts = np.arange(10_000, 12_048, dtype=np.uint16)
    groups = {"experts": experts, "counts": np.ones(2048, dtype=np.uint16)}
    pairs = {"pair_rows": np.arange(2048, dtype=np.uint32) % 64, "pair_weights": np.ones(2048, dtype=np.float32)}
    link.send(dispatch(1, num_rows=64, **groups, **pairs))
    (arrival,) = gather(rig.port, 1)
    rig.port.reply(1, doubled(arrival, missed=experts[::-1]))  # in an order and in memory of the worker's choosing
    reply = link.receive(1, soon())
    np.testing.assert_array_equal(reply.missed, experts[::-1])
    assert reply.y is not None
    assert torch.equal(reply.y, dispatch(1, 64).x * 2)


def test_missed_experts_stay_when_their_credit_is_used_again(rig: Rig) -> None:
    link = rig.link(num_credits=1)
    replies = []
    experts = u16(3, 9)
    for seq in (0, 1):
        link.send(dispatch(seq, experts=experts))
        (arrival,) = gather(rig.port, 1)
        rig.port.reply(1, doubled(arrival, missed=arrival.dispatch.experts[seq : seq + 1]))
        replies.append(link.receive(seq, soon()))
    experts[:] = 0
    assert [reply.missed.tolist() for reply in replies] == [[3], [9]]


@pytest.mark.parametrize(
    "missed",
    [u16(1, 2, 3), np.array([3], dtype=np.int64), u16(3, 9).reshape(2, 1)],
    ids=["many", "dtype", "shape"],
)
def test_a_worker_cannot_miss_what_was_not_asked_for(rig: Rig, missed: npt.NDArray[np.uint16]) -> None:
    link = rig.link()
    link.send(dispatch(1))
    (arrival,) = gather(rig.port, 1)
    with pytest.raises(FrameError, match=r"missed of seq 1 is .* at most the 2 experts of the dispatch"):
        rig.port.reply(1, doubled(arrival, missed=missed))
    rig.port.reply(1, doubled(arrival))
    assert link.receive(1, soon()).num_misses == 0


def test_a_reply_without_rows_says_nothing_of_misses(rig: Rig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    gather(rig.port, 1)
    rig.port.reply(1, Reply(seq=1, status=Status.FAILED, message="no", missed=u16(3)))
    reply = link.receive(1, soon())
    assert (reply.message, reply.missed.tolist()) == ("no", [])
    assert link.stats.bytes_back == rig.port.links()[1].bytes_back == 66


def test_a_late_reply_with_misses_is_thrown_away_whole(rig: Rig) -> None:
    link = rig.link(num_credits=2)
    link.send(dispatch(1))
    with pytest.raises(LinkTimeout):
        link.receive(1, past())
    link.send(dispatch(2))
    for arrival, missed in zip(gather(rig.port, 2), (u16(3, 9), u16(9)), strict=True):
        rig.port.reply(1, doubled(arrival, missed=missed))
    assert link.receive(2, soon()).missed.tolist() == [9]
    assert link.stats.late_replies == 1
    assert link.stats.bytes_back == rig.port.links()[1].bytes_back


# Hints.


def test_a_hint_arrives_as_it_was_sent(rig: Rig) -> None:
    links = [rig.link(link_id) for link_id in (1, 2)]
    sent = {1: hint(7, experts=u16(65_535, 0, 12), counts=u16(1, 65_535, 3)), 2: hint(65_535, num_groups=1)}
    for link in links:
        assert link.hint(sent[link.link_id])
    for arrival in gather_hints(rig.port, 2):
        assert arrival.router_id == f"router-{arrival.link_id}"
        assert arrival.hint.layer == sent[arrival.link_id].layer
        for name in ("experts", "counts"):
            got = getattr(arrival.hint, name)
            assert got.dtype == np.uint16
            np.testing.assert_array_equal(got, getattr(sent[arrival.link_id], name))
    assert rig.port.hints() == []


def test_a_hint_takes_no_credit_and_changes_nothing_for_dispatches(rig: Rig) -> None:
    link = rig.link(num_credits=1)
    link.hint(hint(1))
    link.send(dispatch(1))
    link.hint(hint(2))
    assert link.num_in_flight == 1
    with pytest.raises(NoCredit):
        link.send(dispatch(2))
    (arrival,) = gather(rig.port, 1)
    link.hint(hint(3))
    rig.port.reply(1, doubled(arrival))
    assert link.receive(1, soon()).status == Status.OK
    link.send(dispatch(2))
    assert gather(rig.port, 1)[0].dispatch.seq == 2
    pump(rig.port, lambda: rig.port.links()[1].hints == 3)
    assert [arrival.hint.layer for arrival in rig.port.hints()] == [1, 2, 3]


def test_a_hint_may_be_written_again_once_it_has_been_handed_over(rig: Rig) -> None:
    link = rig.link()
    sent = hint(6, num_groups=2)
    link.hint(sent)
    sent.experts[:] = 99
    sent.counts[:] = 99
    (arrival,) = gather_hints(rig.port, 1)
    assert (arrival.hint.experts.tolist(), arrival.hint.counts.tolist()) == ([0, 1], [1, 2])
    link.hint(hint(7, num_groups=3))
    gather_hints(rig.port, 1)
    assert (arrival.hint.experts.tolist(), arrival.hint.counts.tolist()) == ([0, 1], [1, 2])


def test_a_hint_makes_a_poll_return(rig: Rig) -> None:
    link = rig.link()
    polling = Other(lambda: rig.port.poll(2 * 60.0))  # longer than a test waits
    link.hint(hint())
    assert polling.join() == []
    assert len(rig.port.hints()) == 1


def test_only_the_newest_hints_are_kept_for_a_worker_that_does_not_ask(rig: Rig) -> None:
    link = rig.link()
    for layer in range(MAX_HINTS + 6):
        link.hint(hint(layer))
        pump(rig.port, lambda layer=layer: rig.port.links()[1].hints == layer + 1)  # type: ignore[misc]
    assert [arrival.hint.layer for arrival in rig.port.hints()] == list(range(6, MAX_HINTS + 6))


def test_hints_to_a_worker_that_does_not_read_are_dropped_and_the_link_lives_on(rig: Rig) -> None:
    link = rig.link()
    num_taken = 0
    while link.hint(hint(num_taken, num_groups=2048)):
        num_taken += 1
        assert num_taken < 65_536, "nothing bounds what waits for the worker"
    assert num_taken > 0
    assert not link.hint(hint(num_taken, num_groups=2048))
    assert (link.stats.hints, link.stats.bytes_out) == (num_taken, num_taken * (64 + 4 * 2048))
    sending = Other(lambda: link.send(dispatch(1)))  # takes the rest of a hint that had begun with it
    (arrival,) = gather(rig.port, 1)
    sending.join()
    assert rig.port.links()[1].hints == num_taken
    newest = [arrival.hint.layer for arrival in rig.port.hints()]
    assert newest == list(range(num_taken))[-MAX_HINTS:]
    rig.port.reply(1, doubled(arrival))
    assert link.receive(1, soon()).status == Status.OK
    assert link.hint(hint())
    gather_hints(rig.port, 1)
    assert link.stats.bytes_out == rig.port.links()[1].bytes_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": u16(), "counts": u16()}, "a hint of 0 groups; the link carries 1 to 9"),
        ({"num_groups": 10}, "a hint of 10 groups; the link carries 1 to 9"),
        ({"counts": u16(1, 2)}, r"uint16 \(3,\) and uint16 \(2,\)"),
        ({"experts": np.arange(3)}, r"int64 \(3,\)"),
        ({"counts": np.ones(3)}, "float64"),
        ({"experts": u16(1, 2, 3).reshape(3, 1), "counts": u16(1, 2, 3).reshape(3, 1)}, "travel as"),
        ({"experts": u16(4, 5, 4)}, "an expert stands in a hint twice"),
        ({"counts": u16(1, 0, 1)}, "names an expert for no token"),
        ({"layer": 65_536}, "layer 65536 of a hint does not fit"),
        ({"layer": -1}, "does not fit"),
    ],
    ids=["empty", "many", "lengths", "experts", "counts", "ndim", "twice", "no-token", "layer", "negative"],
)
def test_a_hint_that_breaks_the_agreed_sizes_never_leaves(rig: Rig, changes: dict[str, Any], message: str) -> None:
    link = rig.link(max_pairs=9)
    with pytest.raises(FrameError, match=message):
        link.hint(hint(**changes))
    assert (link.stats.hints, link.stats.bytes_out) == (0, 0)
    assert link.hint(hint(8))
    assert [arrival.hint.layer for arrival in gather_hints(rig.port, 1)] == [8]


def test_a_link_that_has_ended_takes_no_hints(rig: Rig) -> None:
    first, second = rig.link(1), rig.link(2)
    first.close()
    with pytest.raises(LinkClosed, match="this end closed the link"):
        first.hint(hint())
    rig.port.drop(2, "done")
    pump(rig.port, lambda: not rig.port.links())
    deadline_s = soon()
    with pytest.raises(LinkClosed):  # a network may need one to learn that the peer has gone
        while time.monotonic() < deadline_s:
            second.hint(hint())
    assert second.is_closed


def test_a_worker_may_poll_while_dispatches_that_it_took_are_unanswered(rig: Rig) -> None:
    link = rig.link(num_credits=4)
    taken = {}
    for seq in (1, 2, 3):  # the worker waits for weights, and looks at what has come meanwhile
        link.send(dispatch(seq, num_rows=seq, num_prompt_rows=1, traceparent=f"00-{seq}"))
        link.hint(hint(seq))
        taken[seq] = gather(rig.port, 1)[0]
        pump(rig.port, lambda seq=seq: rig.port.links()[1].hints == seq)  # type: ignore[misc]
        assert rig.port.poll(0.0) == []
    assert [arrival.hint.layer for arrival in rig.port.hints()] == [1, 2, 3]
    link.send(dispatch(4))
    rig.port.reply(1, doubled(gather(rig.port, 1)[0]))
    assert link.receive(4, soon()).status == Status.OK
    for seq, arrival in taken.items():
        sent, got = dispatch(seq, num_rows=seq), arrival.dispatch
        assert (got.seq, got.num_prompt_rows, got.traceparent) == (seq, 1, f"00-{seq}")
        for name in ("experts", "counts", "pair_rows", "pair_weights"):
            np.testing.assert_array_equal(getattr(got, name), getattr(sent, name))
        assert torch.equal(got.x, sent.x)
        rig.port.reply(1, doubled(arrival, missed=got.experts))
    for seq in (2, 3, 1):
        reply = link.receive(seq, soon())
        assert reply.y is not None
        assert torch.equal(reply.y, dispatch(seq, num_rows=seq).x * 2)
        assert reply.missed.tolist() == [3, 9]


# Both.


def test_hints_and_misses_are_counted_exactly_at_both_ends(rig: Rig) -> None:
    link = rig.link()
    for seq, num_groups in enumerate((1, 5), start=1):
        link.hint(hint(num_groups=num_groups))
        link.send(dispatch(seq))
        rig.port.reply(1, doubled(gather(rig.port, 1)[0], missed=u16(3, 9)[:seq]))
        link.receive(seq, soon())
    sent, rows = dispatch(1), 2 * 3 * D * 4
    bytes_out = 2 * (64 + 4 * len(sent.experts) + 8 * len(sent.pair_rows)) + rows + 2 * 64 + 4 * (1 + 5)
    for stats in (link.stats, rig.port.links()[1]):
        assert (stats.hints, stats.dispatches) == (2, 2)
        assert (stats.bytes_out, stats.bytes_back) == (bytes_out, 2 * 64 + rows + 2 * (1 + 2))
