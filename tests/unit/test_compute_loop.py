"""The worker's data loop: what it answers when loads fail or take their time, and what it hears meanwhile."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from collegium.buffering.policies import ExpertId
from collegium.link.base import ExpectedLink, RouterLink
from collegium.link.connect import connect
from collegium.link.frame import SECRET_BYTES, Dispatch, Hint, Status
from collegium.link.tcp import SocketLink
from collegium.link.tcp_port import TcpPort
from collegium.model.experts import PackedExpert, run_experts
from collegium.model.weights import ExpertWeights
from collegium.native.worker_end import Span
from expert_svc.buffer import Visit
from expert_svc.compute import ComputeLoop
from expert_svc.residents import Residents
from tests.buffer_rig import MANIFEST, NUM_EXPERTS, NUM_LAYERS, Rig
from tests.link_rig import Other, pump

FAR_S = 60.0


class Worker:
    """A data loop over a rig's buffer, and routers that are linked to it. `start` it when dispatches wait."""

    def __init__(self, rig: Rig):
        self.rig, self.port = rig, TcpPort(worker_id="worker", unix="@")
        self.loop = ComputeLoop(
            self.port,
            rig.buffer,
            MANIFEST.form,
            torch.float32,
            d_model=MANIFEST.d_model,
            num_experts=[NUM_EXPERTS] * NUM_LAYERS,
            num_threads=1,
        )
        rig.buffer.on_load(self.port.wake)
        self.routers = [self._link(idx) for idx in (1, 2)]

    def _link(self, link_id: int) -> RouterLink:
        secret, d_model = secrets.token_bytes(SECRET_BYTES), MANIFEST.d_model
        until = time.monotonic() + FAR_S
        self.port.expect(
            ExpectedLink(
                link_id=link_id,
                secret=secret,
                router_id=f"router-{link_id}",
                dtype=torch.float32,
                reply_dtype=torch.float32,
                d_model=d_model,
                max_rows=64,
                num_credits=4,
                expires_s=until,
            )
        )
        (address,) = dict(self.port.addresses).values()
        opening = Other(
            lambda: connect(
                "unix", address, link_id=link_id, secret=secret, dtype=torch.float32, d_model=d_model, deadline_s=until
            )
        )
        pump(self.port, lambda: opening.is_done)
        link = opening.join()
        assert isinstance(link, SocketLink)
        return link

    def send(
        self,
        router: int,
        layer: int,
        experts: Sequence[int],
        seq: int = 1,
        num_prompt_rows: int = 0,
        traceparent: str = "",
    ) -> None:
        """Send one row that chose these experts."""
        num = len(experts)
        self.routers[router].send(
            Dispatch(
                seq=seq,
                layer=layer,
                deadline_s=time.monotonic() + FAR_S,
                experts=np.array(experts, np.uint16),
                counts=np.ones(num, np.uint16),
                pair_rows=np.zeros(num, np.uint32),
                pair_weights=np.ones(num, np.float32),
                x=torch.ones(1, MANIFEST.d_model),
                num_prompt_rows=num_prompt_rows,
                traceparent=traceparent,
            )
        )

    def answer(self, router: int, seq: int = 1) -> tuple[Status, list[int], str]:
        """Receive how a dispatch ended, which of its experts had to be loaded, and why it failed."""
        reply = self.routers[router].receive(seq, time.monotonic() + FAR_S)
        return reply.status, reply.missed.tolist(), reply.message

    def close(self) -> None:
        for router in self.routers:
            router.close()
        self.loop.stop()
        self.rig.buffer.close()


@pytest.fixture
def start() -> Iterator[Callable[[Rig], Worker]]:
    workers: list[Worker] = []

    def make(rig: Rig) -> Worker:
        workers.append(Worker(rig))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.mark.parametrize("error", [None, OSError("the disk is gone")])
def test_an_expert_that_cannot_be_loaded_fails_its_own_dispatch_and_not_the_one_it_was_joined_with(
    error: Exception | None, start: Callable[[Rig], Worker]
) -> None:
    rig = Rig(8, num_threads=2)
    rig.source.error = error
    rig.source.during = lambda expert_id: rig.source.failing.add((0, 5))  # again and again

    worker = start(rig)
    rig.source.failing.add((0, 5))
    worker.send(0, 0, [1, 2])
    worker.send(1, 0, [2, 5])
    worker.loop.start()
    status, _, message = worker.answer(1)
    assert status == Status.FAILED
    assert "expert 5 of MoE layer 0" in message
    assert worker.answer(0)[0] == Status.OK
    rig.source.during = lambda expert_id: None
    rig.source.failing.clear()
    worker.send(1, 0, [2, 5], seq=2)
    assert worker.answer(1, seq=2) == (Status.OK, [5], "")
    assert worker.loop.is_alive
    assert worker.loop.counters.num_failed == 1


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate")])
def test_a_slot_that_cannot_be_had_fails_its_dispatch_and_leaves_the_buffer_as_it_was(
    error: Exception, start: Callable[[Rig], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(8, num_threads=1)
    worker = start(rig)
    worker.loop.start()
    with monkeypatch.context() as patch:
        patch.setattr(rig.buffer._slots, "take", raising(error))
        worker.send(0, 0, [1, 2])
        status, _, message = worker.answer(0)
        assert status == Status.FAILED and str(error) in message
    worker.send(0, 0, [1, 2], seq=2)
    assert worker.answer(0, seq=2) == (Status.OK, [1, 2], "")
    assert rig.buffer.num_resident == rig.buffer._num_given == 2


def raising(error: Exception) -> Callable[[], object]:
    def take() -> object:
        raise error

    return take


def test_a_reply_names_the_experts_of_its_own_dispatch_that_had_to_be_loaded(start: Callable[[Rig], Worker]) -> None:
    rig = Rig(8, num_threads=1)
    rig.buffer.warm([(0, 2)])
    worker = start(rig)
    worker.send(0, 0, [1, 2])
    worker.send(1, 0, [2, 3])
    worker.loop.start()
    assert worker.answer(0) == (Status.OK, [1], "")
    assert worker.answer(1) == (Status.OK, [3], "")
    assert worker.loop.counters.num_joined_dispatches == 2
    worker.send(0, 0, [1, 2, 3], seq=2)
    assert worker.answer(0, seq=2) == (Status.OK, [], "")
    worker.loop.stop()  # what the end has noted is told within a tenth of a second, or when it stops
    assert (rig.totals.hits, rig.totals.misses) == (4, 2)


def test_the_last_batch_before_a_stop_is_traced_as_any_other(start: Callable[[Rig], Worker]) -> None:
    rig = Rig(8)
    worker, spans = start(rig), list[Span]()
    worker.loop._on_traced = spans.extend
    rig.source.during = lambda expert_id: worker.loop._stopping.set()
    worker.send(0, 0, [1], traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01")
    worker.loop.start()
    assert worker.answer(0) == (Status.OK, [1], "")
    worker.loop.stop()
    assert [span.layer for span in spans] == [0]


def test_hints_are_heard_and_hits_are_computed_while_a_load_is_waited_for(start: Callable[[Rig], Worker]) -> None:
    rig = Rig(40, num_threads=2)
    rig.buffer.warm([(0, 1)])
    rig.loads.mean_s = 1.0  # known to be slow: the thread that waits does not load
    is_loading, may_land, is_hinted = threading.Event(), threading.Event(), threading.Event()

    def during(expert_id: ExpertId) -> None:
        if expert_id == (0, 2):
            is_loading.set()
            assert may_land.wait(FAR_S)
        if expert_id == (1, 7):
            is_hinted.set()

    rig.source.during = during
    worker = start(rig)
    worker.loop.start()
    worker.send(0, 0, [1, 2])
    assert is_loading.wait(FAR_S)
    worker.routers[0].hint(Hint(layer=1, experts=np.array([7, 200], np.uint16), counts=np.ones(2, np.uint16)))
    assert is_hinted.wait(FAR_S)
    may_land.set()
    assert worker.answer(0) == (Status.OK, [2], "")
    worker.send(0, 1, [7], seq=2)
    assert worker.answer(0, seq=2) == (Status.OK, [], "")
    assert (1, 200) not in rig.source.fills  # there is no such expert
    assert (rig.totals.prefetch_useful, worker.loop.counters.num_expert_calls) == (1, 3)


def test_rows_of_prompts_and_hints_for_layers_that_are_not_there_leave_residency_alone(
    start: Callable[[Rig], Worker],
) -> None:
    rig = Rig(5, num_threads=1)
    rig.buffer.warm((0, expert) for expert in range(NUM_EXPERTS))
    before = rig.residents()
    worker = start(rig)
    worker.loop.start()
    worker.routers[0].hint(Hint(layer=NUM_LAYERS, experts=np.array([1], np.uint16), counts=np.ones(1, np.uint16)))
    worker.send(0, 1, [1, 2, 3], num_prompt_rows=1)
    assert worker.answer(0) == (Status.OK, [1, 2, 3], "")
    assert rig.residents() == before
    worker.send(0, 1, [1], seq=2)
    assert worker.answer(0, seq=2)[0] == Status.OK
    worker.send(0, NUM_LAYERS, [1], seq=3)
    assert worker.answer(0, seq=3)[0] == Status.BAD_FRAME


class Unordered:
    """Stands for a buffer that has every expert, and gives the last group first."""

    is_prefetching = False

    def __init__(self, experts: Sequence[PackedExpert], residents: Residents):
        self._experts, self.residents = experts, residents

    def begin(self, layer: int, experts: Sequence[int], *_: object) -> Visit:
        slots: list[PackedExpert | None] = [self._experts[expert] for expert in experts]
        return Visit(layer=layer, experts=experts, slots=slots, ready=list(reversed(range(len(experts)))))

    def landed(self, visit: Visit) -> list[int]:
        ready, visit.ready = visit.ready, []
        return ready

    def finish(self, visit: Visit) -> None:
        """Nothing was leased."""

    def close(self) -> None:
        """Nothing was opened."""


def test_each_row_meets_its_own_expert_in_whatever_order_experts_are_found(start: Callable[[Rig], Worker]) -> None:
    generator = torch.Generator().manual_seed(0)
    d_model, d_ffn = MANIFEST.d_model, MANIFEST.d_ffn
    experts = [
        PackedExpert(
            ExpertWeights(
                gate_up=torch.randn(2 * d_ffn, d_model, generator=generator),
                down=torch.randn(d_model, d_ffn, generator=generator),
            )
        )
        for _ in range(3)
    ]
    worker = start(Rig(8))
    worker.loop._buffer = Unordered(experts, worker.rig.buffer.residents)  # type: ignore[assignment]
    worker.loop.start()
    counts, rows = [2, 1, 1], np.array([0, 1, 2, 0])
    x = torch.randn(3, d_model, generator=generator)
    worker.routers[0].send(
        Dispatch(
            seq=2,
            layer=0,
            deadline_s=time.monotonic() + FAR_S,
            experts=np.arange(3, dtype=np.uint16),
            counts=np.array(counts, np.uint16),
            pair_rows=rows.astype(np.uint32),
            pair_weights=np.ones(4, np.float32),
            x=x,
        )
    )
    reply = worker.routers[0].receive(2, time.monotonic() + FAR_S)
    expected = run_experts(x, experts, counts, rows, np.ones(4, np.float32), MANIFEST.form)
    assert reply.y is not None
    assert torch.equal(reply.y, expected)
