"""Rows that travel beside the frames: the protocol over a carrier of this process, the meeting of two process groups
over one connection, and NCCL itself where two ranks can be had.
"""

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from collegium.link import nccl
from collegium.link.frame import FrameError, LinkClosed, LinkError, Reply, Status
from collegium.link.rows_apart import Landing
from collegium.link.stream import PlainStream, Stream
from collegium.link.tcp import SocketLink
from collegium.link.tcp_port import TcpPort
from tests.link_rig import SECRET, D, Other, dispatch, doubled, expected, gather, gather_hints, hint, pump, soon

REPOSITORY = Path(__file__).parents[2]


class Basket:
    """Rows on their way to one end."""

    def __init__(self) -> None:
        self.rows: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self.is_held_back = threading.Event()


class BasketLanding:
    def __init__(self, basket: Basket, into: torch.Tensor) -> None:
        self._basket, self._into, self.is_done = basket, into, False

    def is_complete(self) -> bool:
        if not self.is_done and not self._basket.is_held_back.is_set() and not self._basket.rows.empty():
            self._into.copy_(self._basket.rows.get_nowait())
            self.is_done = True
        return self.is_done


class BasketCarrier:
    """The twin of NcclCarrier: carries rows between two threads."""

    device = torch.device("cpu")

    def __init__(self, mine: Basket, theirs: Basket) -> None:
        self.mine, self.theirs, self.num_aborts = mine, theirs, 0

    def send(self, rows: torch.Tensor) -> None:
        if self.num_aborts:
            raise OSError("aborted")
        self.theirs.rows.put(rows.clone())

    def receive(self, rows: torch.Tensor) -> Landing:
        return BasketLanding(self.mine, rows)

    def abort(self) -> None:
        self.num_aborts += 1


class ApartRig:
    """A port that offers rows apart, and links to it."""

    def __init__(self) -> None:
        self.to_router, self.to_worker = Basket(), Basket()
        self.worker_carriers: list[BasketCarrier] = []
        self.router_carriers: list[BasketCarrier] = []
        self.port = TcpPort(worker_id="worker-a", bind="127.0.0.1:0", open_carrier=self._open_worker)
        self.links: list[SocketLink] = []

    def _open_worker(self, stream: Stream, deadline_s: float) -> BasketCarrier:
        self.worker_carriers.append(BasketCarrier(self.to_worker, self.to_router))
        return self.worker_carriers[-1]

    def _open_router(self, stream: Stream, deadline_s: float) -> BasketCarrier:
        self.router_carriers.append(BasketCarrier(self.to_router, self.to_worker))
        return self.router_carriers[-1]

    def link(self, *, are_rows_apart: bool = True) -> SocketLink:
        self.port.expect(expected(1, are_rows_apart=are_rows_apart))
        address = dict(self.port.addresses)["nccl"]

        def connect() -> SocketLink:
            return nccl.connect_apart(address, 1, SECRET, torch.float32, D, soon(), self._open_router, transport="nccl")

        opening = Other(connect)
        pump(self.port, lambda: opening.is_done)
        link = opening.join()
        assert isinstance(link, SocketLink)
        self.links.append(link)
        pump(self.port, lambda: 1 in self.port.links())
        return link

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.port.close()


@pytest.fixture
def rig() -> Iterator[ApartRig]:
    rig = ApartRig()
    yield rig
    rig.close()


def test_rows_travel_apart_and_counts_in_the_frames(rig: ApartRig) -> None:
    link = rig.link()
    for seq, num_rows in ((1, 3), (2, 64), (3, 1)):
        sent = dispatch(seq, num_rows, num_prompt_rows=num_rows, traceparent="00-trace")
        link.send(sent)
        link.hint(hint(seq))
        (arrival,) = gather(rig.port, 1)
        assert torch.equal(arrival.dispatch.x, sent.x)
        assert (arrival.dispatch.num_prompt_rows, arrival.dispatch.traceparent) == (num_rows, "00-trace")
        rig.port.reply(1, doubled(arrival, missed=arrival.dispatch.experts[:seq]))
        reply = link.receive(seq, soon())
        assert reply.y is not None
        assert torch.equal(reply.y, sent.x * 2)
        assert reply.missed.tolist() == [3, 9][:seq]
        assert [arrival.hint.layer for arrival in gather_hints(rig.port, 1)] == [seq]
    rows = 3 + 64 + 1
    bytes_out = 3 * (64 + 4 * 2 + 8) + 8 * (rows + 3) + rows * D * 4 + 3 * (64 + 4 * 3)
    for stats in (link.stats, rig.port.links()[1]):
        assert (stats.bytes_out, stats.bytes_back) == (bytes_out, 3 * 64 + rows * D * 4 + 2 * (1 + 2 + 2))


def test_a_dispatch_arrives_when_its_rows_have_landed_and_not_before(rig: ApartRig) -> None:
    link = rig.link()
    rig.to_worker.is_held_back.set()
    link.send(dispatch(1))
    for _ in range(50):
        assert rig.port.poll(0.01) == []
    rig.to_worker.is_held_back.clear()
    assert torch.equal(gather(rig.port, 1)[0].dispatch.x, dispatch(1).x)


def test_a_hint_does_not_wait_for_rows_that_were_announced_before_it(rig: ApartRig) -> None:
    link = rig.link()
    rig.to_worker.is_held_back.set()
    link.send(dispatch(1))
    link.hint(hint())
    assert len(gather_hints(rig.port, 1)) == 1
    assert rig.port.poll(0.0) == []
    rig.to_worker.is_held_back.clear()
    assert torch.equal(gather(rig.port, 1)[0].dispatch.x, dispatch(1).x)


def test_a_failed_dispatch_brings_a_message_and_no_rows(rig: ApartRig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    gather(rig.port, 1)
    rig.port.reply(1, Reply(seq=1, status=Status.FAILED, message="no"))
    reply = link.receive(1, soon())
    assert (reply.status, reply.message, reply.y) == (Status.FAILED, "no", None)
    assert rig.to_router.rows.empty()


def test_rows_on_another_device_never_leave(rig: ApartRig) -> None:
    link = rig.link()
    with pytest.raises(FrameError, match="x is on meta; the link carries rows of cpu"):
        link.send(dispatch(1, x=torch.empty(3, D, device="meta")))


def test_a_late_replys_rows_are_taken_off_the_carrier(rig: ApartRig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    with pytest.raises(LinkError):
        link.receive(1, 0.0)
    link.send(dispatch(2))
    for _ in range(2):
        rig.port.reply(1, doubled(gather(rig.port, 1)[0]))
    reply = link.receive(2, soon())
    assert reply.y is not None
    assert torch.equal(reply.y, dispatch(2).x * 2)
    assert link.stats.late_replies == 1


def test_the_end_of_a_link_aborts_its_carrier_at_both_ends(rig: ApartRig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    (arrival,) = gather(rig.port, 1)
    link.close()
    assert rig.router_carriers[0].num_aborts > 0
    rig.port.reply(1, doubled(arrival))
    pump(rig.port, lambda: not rig.port.links())
    assert rig.worker_carriers[0].num_aborts > 0


def test_a_worker_whose_carrier_cannot_send_ends_that_link(rig: ApartRig) -> None:
    link = rig.link()
    link.send(dispatch(1))
    (arrival,) = gather(rig.port, 1)
    rig.worker_carriers[0].abort()
    rig.port.reply(1, doubled(arrival))
    pump(rig.port, lambda: not rig.port.links())
    with pytest.raises(LinkClosed):  # its header may have come, its rows never will
        link.receive(1, soon())


def test_ends_that_disagree_about_where_rows_travel_open_nothing(rig: ApartRig) -> None:
    with pytest.raises(LinkClosed, match="the link's rows do not travel apart"):
        rig.link(are_rows_apart=False)


def test_a_port_without_a_carrier_refuses_rows_apart() -> None:
    port = TcpPort(worker_id="worker-a", bind="127.0.0.1:0")
    try:
        port.expect(expected(1, are_rows_apart=True))
        address = port.addresses[0][1]
        opening = Other(
            lambda: nccl.connect_apart(
                address, 1, SECRET, torch.float32, D, soon(), lambda *_: pytest.fail("opened"), transport="nccl"
            )
        )
        pump(port, lambda: opening.is_done)
        with pytest.raises(LinkClosed, match="this worker's rows travel in frames only"):
            opening.join()
    finally:
        port.close()


# The meeting.


def test_two_process_groups_meet_over_one_connection() -> None:
    ours, theirs = socket.socketpair()
    streams = [PlainStream(ours, is_blocking=True), PlainStream(theirs, is_blocking=False)]
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=30)

    def meet(rank: int) -> torch.Tensor:
        store = nccl.MeetingStore(streams[rank], soon())
        group = dist.ProcessGroupGloo(dist.PrefixStore("out", store), rank, 2, options)
        rows = torch.full((4,), float(rank))
        (group.send([rows], 1, 0) if rank == 0 else group.recv([rows], 0, 0)).wait()
        store.end()
        return rows

    meetings = [Other(lambda rank=rank: meet(rank)) for rank in (0, 1)]  # type: ignore[misc]
    for meeting in meetings:
        assert torch.equal(meeting.join(), torch.zeros(4))  # type: ignore[arg-type]
    for stream in streams:
        stream.close()


def test_a_peer_that_goes_away_ends_the_meeting() -> None:
    ours, theirs = socket.socketpair()
    store = nccl.MeetingStore(PlainStream(ours, is_blocking=True), soon())
    theirs.close()
    with pytest.raises(OSError, match=r"closed|reset|Broken"):
        store.get("0:1")
    store.end()
    with pytest.raises(LinkClosed):
        store.get("0:1")
    ours.close()


# NCCL itself.


def test_nccl_can_be_imported_anywhere_and_says_why_it_cannot_be_used() -> None:
    reason = nccl.why_not()
    if not reason:
        pytest.skip("this process can use NCCL")
    with pytest.raises(LinkError, match=f"transport nccl cannot be used: {reason}"):
        nccl.connect("127.0.0.1:1", link_id=1, secret=SECRET, dtype=torch.float32, d_model=D, deadline_s=soon())
    with pytest.raises(LinkError, match="transport nccl cannot be used"):
        nccl.opener(nccl.WORKER_RANK, torch.device("cuda", 0))


def test_rows_go_from_gpu_to_gpu_and_back() -> None:
    reason = nccl.why_not()
    if reason:
        pytest.skip(f"needs two NCCL ranks: {reason}")
    environment = dict(os.environ)
    if torch.cuda.device_count() < 2:
        if torch.cuda.nccl.version() < (2, 30):
            pytest.skip(f"needs two GPUs, or NCCL 2.30 for two ranks on one; this is {torch.cuda.nccl.version()}")
        environment["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    worker = subprocess.run(
        [sys.executable, "-m", "tests.nccl_pair"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr[-4000:]
    assert "exchanged" in worker.stdout
