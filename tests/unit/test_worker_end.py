"""A worker's native end: what it reads, joins, computes and answers, and what it comes back for."""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collegium.buffering.policies import POLICIES, ExpertId, make_policy
from collegium.buffering.quotas import Quotas
from collegium.link.base import ExpectedLink, RouterLink
from collegium.link.connect import connect
from collegium.link.frame import SECRET_BYTES, Dispatch, FrameError, Hint, LinkClosed, Reply, Status
from collegium.link.hint import write_hint
from collegium.link.memory import rows_at
from collegium.link.tcp_port import TcpPort
from collegium.model.experts import PackedExpert, run_experts
from collegium.model.weights import ExpertWeights
from collegium.native.worker_end import Batch, Why
from expert_svc.buffer import ExpertBuffer
from expert_svc.compute import ComputeLoop
from expert_svc.join_wait import JoinTrial
from expert_svc.loading import Loads
from expert_svc.prefetch_trial import PrefetchTrial
from expert_svc.slots import Slots
from expert_svc.tiers import Tier
from tests.buffer_rig import ALL, MANIFEST, NUM_EXPERTS, NUM_LAYERS
from tests.link_rig import D, Other, Rig, make_rig

FAR_S = 60.0


def weights_of(expert_id: ExpertId) -> ExpertWeights:
    generator = torch.Generator().manual_seed(expert_id[0] * NUM_EXPERTS + expert_id[1])
    d_model, d_ffn = MANIFEST.d_model, MANIFEST.d_ffn
    return ExpertWeights(
        gate_up=torch.randn(2 * d_ffn, d_model, generator=generator),
        down=torch.randn(d_model, d_ffn, generator=generator),
    )


class Source:
    def fill(self, expert_id: ExpertId, slot: PackedExpert) -> Tier:
        slot.load(weights_of(expert_id))
        return Tier.HOST


class Worker:
    """A data loop over sockets."""

    def __init__(
        self,
        *,
        num_slots: int | None = None,
        transport: str = "unix",
        join_trial: JoinTrial | None = None,
        policy: str = "lru",
        trial: PrefetchTrial | None = None,
    ):
        self.port = TcpPort(worker_id="worker", bind="127.0.0.1:0", unix="@")
        self.transport = transport
        self.buffer = ExpertBuffer(
            Slots(MANIFEST, torch.float32, num_slots=num_slots),
            Loads(Source(), num_threads=1),
            make_policy(policy),
            Quotas(NUM_LAYERS, NUM_EXPERTS, num_slots or NUM_LAYERS * NUM_EXPERTS),
            num_experts=[NUM_EXPERTS] * NUM_LAYERS,
        )
        self.buffer.on_load(self.port.wake)
        self.loop = ComputeLoop(
            self.port,
            self.buffer,
            MANIFEST.form,
            torch.float32,
            d_model=MANIFEST.d_model,
            num_experts=[NUM_EXPERTS] * NUM_LAYERS,
            num_threads=1,
            join_trial=join_trial,
            trial=trial,
        )
        self.visits: list[tuple[int, list[int], int]] = []  # of decoding rows: layer, experts, hits
        self.buffer.on_visit = lambda layer, experts, hits: self.visits.append((layer, list(experts), hits))
        self.links: list[RouterLink] = []

    def link(self, *, num_credits: int = 8, max_rows: int = 512) -> RouterLink:
        link_id = len(self.links) + 1
        secret, until = secrets.token_bytes(SECRET_BYTES), time.monotonic() + FAR_S
        self.port.expect(
            ExpectedLink(
                link_id=link_id,
                secret=secret,
                router_id=f"router-{link_id}",
                dtype=torch.float32,
                reply_dtype=torch.float32,
                d_model=MANIFEST.d_model,
                max_rows=max_rows,
                num_credits=num_credits,
                expires_s=until,
            )
        )
        self.links.append(
            connect(
                self.transport,
                dict(self.port.addresses)[self.transport],
                link_id=link_id,
                secret=secret,
                dtype=torch.float32,
                d_model=MANIFEST.d_model,
                deadline_s=until,
            )
        )
        return self.links[-1]

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.loop.stop()
        self.buffer.close()


Start = Callable[..., Worker]


@pytest.fixture
def start() -> Iterator[Start]:
    workers: list[Worker] = []

    def make(**options: object) -> Worker:
        workers.append(Worker(**options))  # type: ignore[arg-type]
        workers[-1].loop.start()
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


def dispatch_of(
    seq: int, layer: int, num_rows: int, *, seed: int = 0, among: Sequence[int] = range(NUM_EXPERTS), **changed: object
) -> Dispatch:
    """Rows that chose three experts each, of some."""
    draw = np.random.default_rng(seed)
    chosen = np.array([draw.permutation(among)[:3] for _ in range(num_rows)])
    order = np.argsort(chosen.ravel(), kind="stable")
    experts, counts = np.unique(chosen, return_counts=True)
    fields: dict[str, object] = {
        "seq": seq,
        "layer": layer,
        "deadline_s": time.monotonic() + FAR_S,
        "experts": experts.astype(np.uint16),
        "counts": counts.astype(np.uint16),
        "pair_rows": (order // 3).astype(np.uint32),
        "pair_weights": draw.random(len(order), dtype=np.float32),
        "x": torch.from_numpy(draw.standard_normal((num_rows, MANIFEST.d_model), dtype=np.float32)),
    }
    return Dispatch(**(fields | changed))  # type: ignore[arg-type]


def expected_of(dispatch: Dispatch) -> torch.Tensor:
    experts = [PackedExpert(weights_of((dispatch.layer, int(expert)))) for expert in dispatch.experts]
    pair_rows = dispatch.pair_rows.astype(np.int64)
    return run_experts(dispatch.x, experts, dispatch.counts.tolist(), pair_rows, dispatch.pair_weights, MANIFEST.form)


def ask(link: RouterLink, dispatches: Sequence[Dispatch]) -> list[Reply]:
    for dispatch in dispatches:
        link.send(dispatch)
    return [link.receive(dispatch.seq, time.monotonic() + FAR_S) for dispatch in dispatches]


@pytest.mark.parametrize("transport", ["unix", "tcp"])
@pytest.mark.parametrize("num_slots", [None, NUM_LAYERS * NUM_EXPERTS])
def test_dispatches_of_a_lone_router_are_answered_without_the_interpreter_and_alike(
    num_slots: int | None, transport: str, start: Start
) -> None:
    worker = start(num_slots=num_slots, transport=transport)
    worker.buffer.warm(ALL)
    link = worker.link()
    for seq, num_rows in enumerate((1, 2, 16, 200), 1):
        dispatch = dispatch_of(seq, seq % NUM_LAYERS, num_rows, seed=seq)
        (reply,) = ask(link, [dispatch])
        assert reply.status is Status.OK and reply.num_misses == 0
        assert reply.y is not None and torch.equal(reply.y, expected_of(dispatch))
    several = [dispatch_of(10 + n, n % NUM_LAYERS, 3, seed=n) for n in range(8)]
    for dispatch, reply in zip(several, ask(link, several), strict=True):
        assert reply.y is not None and torch.equal(reply.y, expected_of(dispatch))
    worker.loop.stop()
    counters = worker.loop.counters
    assert counters.num_dispatches == counters.num_native_answers == counters.num_whole_answers == 12
    assert counters.num_batches <= 12  # those of a link that wait for the same layer are joined
    assert counters.num_rows == 219 + 24
    assert counters.num_pairs == 3 * counters.num_rows
    assert worker.buffer.totals.hits == counters.num_expert_calls
    assert link.stats.rows_back == counters.num_rows


def test_links_that_were_there_before_any_expert_are_served_in_the_call_once_there_are_some(start: Start) -> None:
    worker = start()
    link = worker.link()
    ask(link, [dispatch_of(1, 0, 2)])  # loads what it asks for
    worker.buffer.warm(ALL)
    seq, until = 1, time.monotonic() + FAR_S
    while not worker.loop.counters.num_whole_answers and time.monotonic() < until:
        seq += 1
        ask(link, [dispatch_of(seq, seq % NUM_LAYERS, 2)])
    assert worker.loop.counters.num_whole_answers


def test_what_cannot_be_served_is_refused_and_what_is_absent_is_loaded(start: Start) -> None:
    worker = start()
    worker.buffer.warm([expert_id for expert_id in ALL if expert_id[0] != 2])
    link = worker.link()
    ask(link, [dispatch_of(1, 0, 2)])
    traced = dispatch_of(2, 1, 2, traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01")
    late = dispatch_of(3, 1, 2, deadline_s=time.monotonic() - 1)
    beyond = dispatch_of(4, NUM_LAYERS, 2)
    unknown = dispatch_of(5, 1, 1, experts=np.array([0, 1, NUM_EXPERTS + 3], np.uint16))
    absent = dispatch_of(6, 2, 2)
    twice = dispatch_of(9, 1, 1, experts=np.array([0, 2, 2], np.uint16))
    sent = (traced, late, beyond, unknown, twice, absent)
    statuses = [reply.status for one in sent for reply in ask(link, [one])]
    assert statuses == [Status.OK, Status.EXPIRED, *[Status.BAD_FRAME] * 3, Status.OK]
    assert worker.loop.counters.num_whole_answers == 2  # the first and the traced one
    assert worker.buffer.totals.misses
    link.hint(Hint(layer=1, experts=np.array([1], np.uint16), counts=np.array([1], np.uint16)))
    plain = dispatch_of(7, 2, 2)  # its experts are there now
    (reply,) = ask(link, [plain])
    assert reply.y is not None and torch.equal(reply.y, expected_of(plain))
    (link_stats,) = worker.port.links().values()
    worker.loop.stop()
    counters = worker.loop.counters
    assert (counters.num_native_answers, counters.num_python_answers, link_stats.expired) == (4, 3, 1)
    with pytest.raises(FrameError, match="counts add up"):  # a link refuses to send what the call would refuse to take
        link.send(dispatch_of(8, 1, 2, counts=np.array([9, 1], np.uint16), experts=np.array([1, 2], np.uint16)))


@pytest.mark.parametrize("is_waiting", [False, True])
def test_dispatches_of_several_routers_are_joined_in_the_call_and_each_gets_its_own_rows(
    is_waiting: bool, start: Start
) -> None:
    worker = start(join_trial=JoinTrial(is_on=is_waiting, is_fixed=True))
    worker.buffer.warm(ALL)
    links = [worker.link(num_credits=4) for _ in range(3)]
    turn, num_sent, until = 0, 0, time.monotonic() + FAR_S
    # Who comes together is the scheduler's choice: it goes on until some did.
    while turn < 60 or (not worker.loop.counters.num_joined_batches and time.monotonic() < until):
        layer = turn % NUM_LAYERS
        sent = [dispatch_of(2 * turn + 1, layer, 1 + turn % 5, seed=3 * turn + n) for n in range(3)]
        for link, dispatch in zip(links, sent, strict=True):
            link.send(dispatch)
        if turn % 7 == 0:  # one router is ahead of the others
            sent.append(dispatch_of(2 * turn + 2, (layer + 1) % NUM_LAYERS, 2, seed=turn))
            links[0].send(sent[3])
        for link, dispatch in zip([*links, links[0]], sent, strict=False):
            reply = link.receive(dispatch.seq, time.monotonic() + FAR_S)
            assert reply.y is not None and torch.equal(reply.y, expected_of(dispatch))
        turn, num_sent = turn + 1, num_sent + len(sent)
    worker.loop.stop()
    counters = worker.loop.counters
    assert counters.num_dispatches == num_sent
    assert counters.num_whole_answers == num_sent
    assert 0 < counters.num_joined_batches < counters.num_batches < counters.num_dispatches
    assert counters.num_joined_dispatches >= 2 * counters.num_joined_batches
    assert worker.buffer.totals.hits == counters.num_expert_calls


def test_what_one_router_sends_that_is_unusual_keeps_nobody_waiting(start: Start) -> None:
    worker = start()
    worker.buffer.warm([expert_id for expert_id in ALL if expert_id[0] != 2])
    first, second = worker.link(), worker.link()
    for seq in range(1, 60, 2):
        plain, absent = dispatch_of(seq, 1, 2, seed=seq), dispatch_of(seq, 2, 2, seed=seq)
        first.send(absent)
        second.send(plain)
        for link, dispatch in ((second, plain), (first, absent)):
            reply = link.receive(seq, time.monotonic() + FAR_S)
            assert reply.y is not None and torch.equal(reply.y, expected_of(dispatch))
        worker.buffer.release_others([expert_id for expert_id in ALL if expert_id[0] != 2])
    second.close()
    (reply,) = ask(first, [dispatch_of(99, 0, 3)])
    assert reply.status is Status.OK


def test_a_reply_that_the_socket_does_not_take_whole_goes_out_when_the_router_reads(start: Start) -> None:
    worker = start(transport="tcp")
    worker.buffer.warm(ALL)
    link = worker.link(num_credits=256)
    ask(link, [dispatch_of(1, 0, 1)])
    several = [dispatch_of(10 + n, n % NUM_LAYERS, 512, seed=n) for n in range(200)]  # 6.5 MB that nobody reads
    sender = threading.Thread(target=lambda: [link.send(one) for one in several])
    sender.start()
    sender.join(FAR_S)
    replies = [link.receive(one.seq, time.monotonic() + FAR_S) for one in several]
    for dispatch, reply in zip(several, replies, strict=True):
        assert reply.y is not None and torch.equal(reply.y, expected_of(dispatch))


def test_experts_are_let_go_of_only_when_nobody_computes_from_them(start: Start) -> None:
    worker = start()
    worker.buffer.warm(ALL)
    link = worker.link()
    is_over = threading.Event()
    released: list[int] = []

    def churn() -> None:
        while not is_over.is_set():
            released.append(worker.buffer.release_others([(0, 0)]))
            worker.buffer.warm(ALL)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        seq, until = 0, time.monotonic() + FAR_S
        while seq < 150 or (len(released) < 5 and time.monotonic() < until):  # a busy worker keeps nobody waiting
            seq += 1
            dispatch = dispatch_of(seq, seq % NUM_LAYERS, 4, seed=seq)
            (reply,) = ask(link, [dispatch])
            assert reply.y is not None and torch.equal(reply.y, expected_of(dispatch))
    finally:
        is_over.set()
        thread.join()
    assert len(released) >= 5 and sum(released) > 0


def rows_of(layer: int, num_rows: int, mark: float, num_prompt_rows: int = 0) -> Dispatch:
    """Two experts: 1 takes every row, 3 the first; row values are `mark`."""
    return Dispatch(
        seq=1,
        layer=layer,
        deadline_s=time.monotonic() + FAR_S,
        experts=np.array([1, 3], np.uint16),
        counts=np.array([num_rows, 1], np.uint16),
        pair_rows=np.array([*range(num_rows), 0], np.uint32),
        pair_weights=np.full(num_rows + 1, 0.5, np.float32),
        x=torch.full((num_rows, D), mark),
        num_prompt_rows=num_prompt_rows,
    )


@pytest.fixture
def bare() -> Iterator[Rig]:
    """A port whose end knows experts and hands every batch over."""
    rig = make_rig("unix", Path())
    rig.port.serve(
        (np.zeros((9, 16), np.int64), np.zeros((9, 16), np.uint8)),
        [16] * 9,
        shape=None,
        d_model=D,
        dtype=torch.float32,
        num_threads=1,
        notes_visits=False,
    )
    yield rig
    rig.close()


def batch_of(rig: Rig) -> Batch:
    until = time.monotonic() + FAR_S
    while time.monotonic() < until:
        if rig.port.run(1.0, is_waiting=False) & Why.BATCH:
            return rig.port.native.batch()
    raise AssertionError("no batch came")


def answer(rig: Rig, batch: Batch) -> None:
    y = 2 * rows_at(batch.x, batch.num_rows, D, torch.float32)
    rig.port.native.answer(y.data_ptr(), np.empty(0, np.uint16), 0, 1)


def test_all_that_wait_for_the_layer_whose_turn_it_is_are_joined_up_to_a_bound(bare: Rig) -> None:
    links = [bare.link(link_id, max_rows=16_000) for link_id in (1, 2, 3)]
    for link, dispatch in zip(links, (rows_of(5, 2, 1.0), rows_of(6, 4, 2.0), rows_of(5, 3, 3.0)), strict=True):
        link.send(dispatch)
    time.sleep(0.01)  # unix sockets: they are all there
    first = batch_of(bare)
    assert (first.layer, first.num_dispatches, first.experts, first.counts) == (5, 2, [1, 3], [5, 2])
    x = rows_at(first.x, 5, D, torch.float32)[:, 0].tolist()
    assert x == [1, 1, 3, 3, 3]
    assert first.pair_rows.tolist() == [0, 1, 2, 3, 4, 0, 2]
    answer(bare, first)
    second = batch_of(bare)
    assert (second.layer, second.num_dispatches) == (6, 1)
    answer(bare, second)
    for link, rows in zip(links, ([1.0] * 2, [2.0] * 4, [3.0] * 3), strict=True):
        reply = link.receive(1, time.monotonic() + FAR_S)
        assert reply.y is not None and reply.y[:, 0].tolist() == [2 * row for row in rows]
    large = [threading.Thread(target=link.send, args=(rows_of(5, 10_000, 4.0),)) for link in links[:2]]
    for thread in large:
        thread.start()
    assert [batch_of(bare).num_rows, answer(bare, bare.port.native.batch())] == [10_000, None]
    assert batch_of(bare).num_rows == 10_000  # the first always goes; the other would have been too much
    answer(bare, bare.port.native.batch())
    for thread, link in zip(large, links[:2], strict=True):
        thread.join()
        receiving = Other(lambda link=link: link.receive(1, time.monotonic() + FAR_S))
        while not receiving.is_done:  # the rest of a large reply goes out when the router reads
            bare.port.run(0.01, is_waiting=False)
        receiving.join()


def test_a_link_that_asks_for_little_waits_for_none_that_asks_for_much(bare: Rig) -> None:
    greedy, small = bare.link(1, max_rows=100), bare.link(2, max_rows=100)
    for layer in (1, 2):
        greedy.send(replace(rows_of(layer, 100, 1.0), seq=layer))
    served: list[int] = []
    for layer in (4, 5, 6, 7):  # one after another, as a router's layers are
        small.send(replace(rows_of(layer, 1, 2.0), seq=layer))
        time.sleep(0.01)
        batch = batch_of(bare)
        served.append(batch.layer)
        answer(bare, batch)
        if batch.layer == layer:
            assert small.receive(layer, time.monotonic() + FAR_S).y is not None
    assert served == [4, 5, 6, 7]
    assert [serve(bare) for _ in range(2)] == [1, 2]


def test_nobody_waits_for_ever_however_little_others_ask_for(bare: Rig) -> None:
    greedy, small = bare.link(1, max_rows=100), bare.link(2, max_rows=100)
    greedy.send(rows_of(1, 30, 1.0))
    served: list[int] = []
    for seq in range(1, 40):
        small.send(replace(rows_of(2, 1, 2.0), seq=seq))
        time.sleep(0.002)
        served.append(serve(bare))
        if served[-1] == 1:
            break
        assert small.receive(seq, time.monotonic() + FAR_S).y is not None
    assert served[-1] == 1 and len(served) < 20


def serve(rig: Rig) -> int:
    """Answer the next batch; returns its layer."""
    batch = batch_of(rig)
    answer(rig, batch)
    return batch.layer


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=3), seed=st.integers(0, 99)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
def test_a_batch_says_how_many_decoding_rows_chose_each_expert(
    shapes: list[tuple[int, int]], seed: int, bare: Rig
) -> None:
    expected: dict[int, list[int]] = {}  # expert -> pairs, and of them those of decoding rows
    link_ids = [1 + len(bare.opened) + idx for idx in range(len(shapes))]
    links = [bare.link(link_id, d_model=D) for link_id in link_ids]
    for idx, (num_rows, num_prompt_rows) in enumerate(shapes):
        of_prompts = min(num_prompt_rows, num_rows)
        dispatch = dispatch_of(1, 0, num_rows, seed=seed + idx, among=range(6), num_prompt_rows=of_prompts)
        dispatch.x = torch.zeros(num_rows, D)
        links[idx].send(dispatch)
        experts = np.repeat(dispatch.experts, dispatch.counts).tolist()
        for expert, row in zip(experts, dispatch.pair_rows.tolist(), strict=True):
            pairs = expected.setdefault(expert, [0, 0])
            pairs[0] += 1
            pairs[1] += row < num_rows - of_prompts
    found: dict[int, list[int]] = {}
    num_decode_rows = num_dispatches = 0
    while num_dispatches < len(shapes):
        batch = batch_of(bare)
        num_dispatches += batch.num_dispatches
        num_decode_rows += batch.num_decode_rows
        for expert, count, decoding in zip(batch.experts, batch.counts, batch.decode_counts, strict=True):
            pairs = found.setdefault(expert, [0, 0])
            pairs[0] += count
            pairs[1] += decoding
        answer(bare, batch)
    assert found == expected
    assert num_decode_rows == sum(num_rows - min(prompts, num_rows) for num_rows, prompts in shapes)
    for link in links:
        link.receive(1, time.monotonic() + FAR_S)


def hint_of(layer: int, experts: Sequence[int], counts: Sequence[int] | None = None) -> Hint:
    counts = [1] * len(experts) if counts is None else counts
    return Hint(layer=layer, experts=np.array(experts, np.uint16), counts=np.array(counts, np.uint16))


def test_hints_of_what_is_there_are_passed_over_in_the_call_and_others_reach_the_buffer(start: Start) -> None:
    worker = start(num_slots=40)
    worker.buffer.warm([one for one in ALL if one[0] != 2])
    link = worker.link()
    ask(link, [dispatch_of(1, 0, 2)])
    time.sleep(0.05)  # until it is in the call
    for seq in range(2, 60):
        link.send(dispatch_of(seq, 0, 2, seed=seq))
        assert link.hint(hint_of(1, range(1 + seq % NUM_EXPERTS)))
        assert link.hint(hint_of(3, [seq % NUM_EXPERTS]))
        assert link.receive(seq, time.monotonic() + FAR_S).status is Status.OK
    assert link.hint(hint_of(2, [5]))
    until = time.monotonic() + FAR_S
    while not worker.buffer.totals.prefetched and time.monotonic() < until:
        time.sleep(0.001)
    assert worker.buffer.totals.prefetched == 1
    (stats,) = worker.port.links().values()
    worker.loop.stop()
    assert worker.loop.counters.num_whole_answers > 50
    assert stats.hints == 2 * 58 + 1
    assert stats.bytes_out == link.stats.bytes_out


@pytest.mark.timeout(30)  # it takes a second; where hints are passed over without end, each dispatch waits for a gap
@pytest.mark.parametrize("layer", [1, NUM_LAYERS], ids=["of what is here", "of a layer that there is not"])
def test_hints_without_end_hold_up_neither_another_router_nor_the_end(layer: int, start: Start) -> None:
    worker = start()
    worker.buffer.warm(ALL)
    noisy, other = worker.link(), worker.link()
    is_over = threading.Event()

    frames = write_hint(hint_of(layer, [3])) * 2000

    def hint() -> None:  # as fast as they can be read
        with contextlib.suppress(OSError):
            while not is_over.is_set():
                noisy._stream._sock.settimeout(1.0)
                noisy._stream._sock.sendall(frames)

    thread = threading.Thread(target=hint)
    thread.start()
    try:
        for seq in range(1, 400):
            dispatch = dispatch_of(seq, seq % NUM_LAYERS, 2, seed=seq)
            (reply,) = ask(other, [dispatch])
            assert reply.y is not None and torch.equal(reply.y, expected_of(dispatch))
        until = time.monotonic() + FAR_S
        while not sum(stats.hints for stats in worker.port.links().values()) and time.monotonic() < until:
            time.sleep(0.01)
        assert sum(stats.hints for stats in worker.port.links().values()) > 0
        worker.loop._stopping.set()
        worker.port.wake()
        worker.loop._thread.join(FAR_S)
        assert not worker.loop.is_alive
    finally:
        is_over.set()
        noisy.close()
        thread.join()


@pytest.mark.parametrize("hint", [hint_of(1, [3, 3]), hint_of(1, [3], [0])], ids=["an expert twice", "for no token"])
def test_a_hint_that_is_wrong_ends_its_link_whether_its_experts_are_there_or_not(
    hint: Hint, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start()
    worker.buffer.warm(ALL)
    link, other = worker.link(), worker.link()
    ask(link, [dispatch_of(1, 0, 2)])
    monkeypatch.setattr("collegium.link.tcp.check_hint", lambda *_: None)
    link.hint(hint)
    with pytest.raises(LinkClosed):
        ask(link, [dispatch_of(2, 0, 2)])
    (reply,) = ask(other, [dispatch_of(3, 0, 2)])
    assert reply.status is Status.OK


@pytest.mark.parametrize("policy", POLICIES)
def test_a_buffer_that_evicts_learns_of_what_the_call_computed_as_if_it_had_been_asked(
    policy: str, start: Start
) -> None:
    ways = [start(num_slots=20, policy=policy), start(num_slots=20, policy=policy)]
    ways[1].loop._is_native = True  # so it never learns how to compute: every batch comes back
    draw = np.random.default_rng(5)
    dispatches: list[Dispatch] = []
    for seq in range(1, 400):  # few experts at a time are hot, so that many dispatches find all of theirs
        num_rows = int(draw.integers(1, 4))
        hot = [(seq // 90 + n) % NUM_EXPERTS for n in range(4)]
        among = hot if draw.integers(12) else range(NUM_EXPERTS)
        num_prompt_rows = 0 if draw.integers(4) else int(draw.integers(num_rows + 1))
        dispatches.append(
            dispatch_of(seq, seq % NUM_LAYERS, num_rows, seed=seq, among=among, num_prompt_rows=num_prompt_rows)
        )
    links = [worker.link() for worker in ways]
    for dispatch in dispatches:
        expected = expected_of(dispatch)
        for link in links:
            (reply,) = ask(link, [dispatch])
            assert reply.y is not None and torch.equal(reply.y, expected)
    for worker in ways:
        worker.loop.stop()
    native, plain = ways
    assert native.loop.counters.num_whole_answers > 100 and not plain.loop.counters.num_whole_answers
    assert native.visits == plain.visits and native.visits
    assert native.buffer.residency() == plain.buffer.residency()
    totals = [worker.buffer.totals for worker in ways]
    assert totals[0].misses > 20
    for name in ("hits", "misses", "evictions", "streamed"):
        assert getattr(totals[0], name) == getattr(totals[1], name), name


def test_experts_without_a_home_go_only_when_nobody_computes_from_them(start: Start) -> None:
    num_slots = NUM_LAYERS * NUM_EXPERTS // 2
    worker = start(num_slots=num_slots)
    halves = [[one for one in ALL if one[1] % 2 == rest] for rest in (0, 1)]
    link = worker.link()
    is_over, num_turns = threading.Event(), 0

    def churn() -> None:
        nonlocal num_turns
        while not is_over.is_set():
            worker.buffer.set_homes(halves[num_turns % 2])
            worker.buffer.warm(halves[num_turns % 2])
            num_turns += 1

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        seq, until = 0, time.monotonic() + FAR_S
        while seq < 150 or (num_turns < 5 and time.monotonic() < until):
            seq += 1
            dispatch = dispatch_of(seq, seq % NUM_LAYERS, 1, seed=seq)
            (reply,) = ask(link, [dispatch])
            assert reply.y is not None and torch.equal(reply.y, expected_of(dispatch))
    finally:
        is_over.set()
        thread.join()
    assert num_turns >= 5


def test_a_trial_of_prefetching_hears_of_batches_that_the_call_computed(start: Start) -> None:
    trial = PrefetchTrial()
    worker = start(num_slots=20, trial=trial)
    link = worker.link()
    for seq in range(1, 400):
        ask(link, [dispatch_of(seq, seq % 2, 1, seed=0)])  # the same experts, which fit
    worker.loop.stop()
    assert worker.loop.counters.num_whole_answers > 300
    assert trial.num_trials == 1


def test_a_loop_that_is_busy_in_the_call_can_be_stopped_and_its_port_closed(start: Start) -> None:
    worker = start()
    worker.buffer.warm(ALL)
    link = worker.link()
    ask(link, [dispatch_of(1, 0, 2)])
    began_s = time.monotonic()
    worker.loop.stop()
    assert not worker.loop.is_alive
    assert time.monotonic() - began_s < FAR_S
