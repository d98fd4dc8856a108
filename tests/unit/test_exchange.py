"""A layer's exchange in one call: it gives what the long way gives, and whatever goes wrong in it ends there too."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from collegium.link.base import Arrival, ExpectedLink
from collegium.link.connect import connect
from collegium.link.frame import Reply, Status
from collegium.link.header import goodbye
from collegium.link.tcp_port import TcpPort
from collegium.model import native
from router_svc.expert_calls import ExpertCalls, ExpertFailedError, ExpertsUnavailableError
from tests.link_rig import SECRET, soon

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")

NUM_EXPERTS, D, TOP_K = 9, 16, 2
Answer = Callable[[TcpPort, Arrival], None]


def computed(arrival: Arrival) -> torch.Tensor:
    """Experts of this test: expert e multiplies a row by e + 1, and the last one's rows also differ by column."""
    dispatch = arrival.dispatch
    scale = np.repeat(dispatch.experts.astype(np.float32) + 1, dispatch.counts)
    y = torch.zeros_like(dispatch.x, dtype=torch.float32)
    rows = torch.from_numpy(dispatch.pair_rows.astype(np.int64))
    factors = torch.from_numpy(scale * dispatch.pair_weights)[:, None] * torch.linspace(1, 2, D)
    y.index_add_(0, rows, dispatch.x.float()[rows] * factors)
    return y.to(dispatch.x.dtype)


def plainly(port: TcpPort, arrival: Arrival) -> None:
    port.reply(arrival.link_id, Reply(seq=arrival.dispatch.seq, y=computed(arrival), compute_us=1, wait_us=1))


def after_progress(port: TcpPort, arrival: Arrival) -> None:
    port.progress(arrival.link_id)
    plainly(port, arrival)


def late(port: TcpPort, arrival: Arrival) -> None:
    time.sleep(0.12)  # longer than the slices in which links wait
    plainly(port, arrival)


def with_misses(port: TcpPort, arrival: Arrival) -> None:
    missed = arrival.dispatch.experts[:1].copy()
    port.reply(arrival.link_id, Reply(seq=arrival.dispatch.seq, y=computed(arrival), missed=missed))


def in_pieces(port: TcpPort, arrival: Arrival) -> None:
    """Send half a frame, and the rest later."""
    link = port._by_id[arrival.link_id]
    send = link.stream.send_now

    def half(buffers: Any) -> int:
        whole = b"".join(bytes(memoryview(b).cast("B")) for b in buffers)
        return send((whole[: len(whole) // 2],))

    link.stream.send_now = half  # type: ignore[method-assign]
    plainly(port, arrival)
    link.stream.send_now = send  # type: ignore[method-assign]
    time.sleep(0.02)


def expired(port: TcpPort, arrival: Arrival) -> None:
    port.reply(arrival.link_id, Reply(seq=arrival.dispatch.seq, status=Status.EXPIRED))


def failed(port: TcpPort, arrival: Arrival) -> None:
    port.reply(arrival.link_id, Reply(seq=arrival.dispatch.seq, status=Status.FAILED, message="no such weights"))


def gone(port: TcpPort, arrival: Arrival) -> None:
    port.drop(arrival.link_id, "the worker leaves")


def gone_in_the_middle(port: TcpPort, arrival: Arrival) -> None:
    port._by_id[arrival.link_id].stream.send_now((goodbye("x")[:30],))
    port.drop(arrival.link_id, "broken")


@pytest.fixture(params=["one call", "two calls"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Send and receive in one call, or, as where there is work while rows are away, in one each."""
    if request.param == "two calls":
        monkeypatch.setattr(ExpertCalls, "_has_other_work", lambda self, layer: True)
    return request.param


@dataclass
class Workers:
    """Two workers behind unix sockets, whose next answers can be chosen."""

    calls: ExpertCalls
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def compute(self, ids: Sequence[Sequence[int]], x: torch.Tensor, *, num_decode_rows: int = 0) -> torch.Tensor:
        self.calls.begin(1, [([], num_decode_rows)])
        table = torch.tensor(ids)
        weights = torch.linspace(0.1, 1.0, table.numel()).view(table.shape)
        return self.calls.compute(0, x, table, weights)


@contextmanager
def workers(*, is_whole: bool = True, dtype: torch.dtype = torch.float32) -> Iterator[Workers]:
    lost: list[str] = []
    calls = ExpertCalls(
        num_layers=1, num_experts=NUM_EXPERTS, timeout_s=5.0, on_lost=lambda worker_id, why: lost.append(worker_id)
    )
    made = Workers(calls=calls, lost=lost)
    stopping = threading.Event()
    ports: list[TcpPort] = []
    threads: list[threading.Thread] = []

    def serve(port: TcpPort, answers: list[Answer]) -> None:
        while not stopping.is_set():
            for arrival in port.poll(0.02):
                (answers.pop(0) if answers else plainly)(port, arrival)

    for link_id, name in enumerate(("a", "b"), 1):
        port = TcpPort(worker_id=name, unix="@")
        made.answers[name] = []
        thread = threading.Thread(target=serve, args=(port, made.answers[name]), daemon=True)
        thread.start()
        port.expect(
            ExpectedLink(
                link_id=link_id,
                secret=SECRET,
                router_id="router",
                dtype=dtype,
                reply_dtype=dtype,
                d_model=D,
                max_rows=64,
                num_credits=4,
                expires_s=soon(),
            )
        )
        address = dict(port.addresses)["unix"]
        link = connect("unix", address, link_id=link_id, secret=SECRET, dtype=dtype, d_model=D, deadline_s=soon())
        calls.add_link(name, link, wants_hints=False)
        ports.append(port)
        threads.append(thread)
    if not is_whole:
        calls._whole_for = lambda *_: None  # type: ignore[method-assign]
    try:
        yield made
    finally:
        stopping.set()
        calls.close()
        for thread, port in zip(threads, ports, strict=True):
            thread.join(5)
            port.close()


def drawn(num_rows: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[list[list[int]], torch.Tensor]:
    rng = np.random.default_rng(seed)
    ids = [rng.permutation(NUM_EXPERTS)[:TOP_K].tolist() for _ in range(num_rows)]
    return ids, torch.from_numpy(rng.standard_normal((num_rows, D), dtype=np.float32)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_gives_what_the_long_way_gives_and_counts_alike(dtype: torch.dtype) -> None:
    with workers(dtype=dtype) as fast, workers(is_whole=False, dtype=dtype) as slow:
        for num_rows in (1, 2, 7, 40, 3):
            ids, x = drawn(num_rows, num_rows, dtype)
            decoding = num_rows // 2
            assert torch.equal(
                fast.compute(ids, x, num_decode_rows=decoding), slow.compute(ids, x, num_decode_rows=decoding)
            )
        assert fast.calls.totals.native_exchanges == 5 and not fast.calls.totals.python_exchanges
        stats = [{name: asdict(s) for name, s in one.calls.link_stats().items()} for one in (fast, slow)]
        assert stats[0] == stats[1]
        assert fast.calls.totals.needed_bytes == slow.calls.totals.needed_bytes > 0
        for name in ("decode", "prefill", "activations"):
            assert np.array_equal(getattr(fast.calls.loads, name), getattr(slow.calls.loads, name))
        assert 0 < fast.calls.totals.blocked_s <= fast.calls.totals.away_s


@pytest.mark.parametrize("answer", [after_progress, late, with_misses, in_pieces])
@pytest.mark.parametrize("disturbed", ["a", "b"])
def test_what_is_unusual_but_right_is_read_the_long_way(answer: Answer, disturbed: str) -> None:
    ids, x = drawn(12, 1)
    with workers() as made:
        expected = made.compute(ids, x)
        made.answers[disturbed].append(answer)
        assert torch.equal(made.compute(ids, x), expected)
        assert torch.equal(made.compute(ids, x), expected)  # and the links are as before
        assert not made.lost
        assert made.calls.totals.retries == 0
        assert all(link.num_in_flight == 0 for _, link in made.calls._live)
        stats = made.calls.link_stats()
        assert stats["a"].dispatches == stats["b"].dispatches == 3
        assert stats["a"].rows_back == stats["a"].rows_out


@pytest.mark.parametrize("answer", [expired, gone, gone_in_the_middle])
def test_rows_of_a_worker_that_is_lost_in_a_call_are_computed_by_the_other(answer: Answer) -> None:
    ids, x = drawn(12, 2)
    with workers() as made:
        expected = made.compute(ids, x)
        made.answers["a"].append(answer)
        assert torch.allclose(made.compute(ids, x), expected, rtol=1e-6, atol=1e-6)
        assert made.lost == ["a"]
        assert made.calls.worker_ids == ["b"]
        assert made.calls.totals.retries == 1
        assert torch.allclose(made.compute(ids, x), expected, rtol=1e-6, atol=1e-6)


def test_a_refusal_ends_the_layer_by_name_and_leaves_the_links() -> None:
    ids, x = drawn(12, 3)
    with workers() as made:
        expected = made.compute(ids, x)
        made.answers["b"].append(failed)
        with pytest.raises(ExpertFailedError, match="worker b: no such weights"):
            made.compute(ids, x)
        assert torch.equal(made.compute(ids, x), expected)
        assert not made.lost


def test_without_any_worker_left_the_layer_can_be_tried_again() -> None:
    ids, x = drawn(12, 4)
    with workers() as made:
        made.compute(ids, x)
        made.answers["a"].append(gone)
        made.answers["b"].append(gone)
        with pytest.raises(ExpertsUnavailableError):
            made.compute(ids, x)
        assert sorted(made.lost) == ["a", "b"]


def test_a_link_that_is_closed_beside_a_call_ends_the_call() -> None:
    ids, x = drawn(12, 5)
    with workers() as made:
        made.compute(ids, x)
        made.answers["a"].append(lambda port, arrival: made.calls.drop_link("a"))
        made.compute(ids, x)
        assert made.calls.worker_ids == ["b"]


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_link_that_is_retired_beside_a_step_is_closed_after_it_and_nothing_is_sent_again(is_whole: bool) -> None:
    ids, x = drawn(12, 5)
    with workers(is_whole=is_whole) as made:
        expected = made.compute(ids, x)
        made.calls.end()

        def retire_and_answer(port: TcpPort, arrival: Arrival) -> None:
            made.calls.retire_link("a")
            plainly(port, arrival)

        link = made.calls._links["a"]
        made.answers["a"].append(retire_and_answer)
        assert torch.equal(made.compute(ids, x), expected)
        assert made.calls.worker_ids == ["b"]
        assert not link.is_closed
        assert made.calls.link_stats()[""].rows_back == link.stats.rows_back > 0
        made.calls.end()
        assert link.is_closed
        assert made.calls.totals.retries == 0
        assert made.calls.link_stats()[""].rows_back == link.stats.rows_back
        assert torch.allclose(made.compute(ids, x), expected, rtol=1e-6, atol=1e-6)


def test_a_link_that_is_retired_between_steps_is_closed_at_once_and_a_retired_one_can_still_be_dropped() -> None:
    ids, x = drawn(12, 5)
    with workers() as made:
        a, b = made.calls._links["a"], made.calls._links["b"]
        made.calls.retire_link("a")
        assert a.is_closed
        made.compute(ids, x)
        made.calls.retire_link("b")
        assert not b.is_closed
        made.calls.drop_link("b")
        assert b.is_closed


def test_rows_that_would_not_fit_a_socket_go_the_long_way() -> None:
    ids, x = drawn(64, 6)
    with workers() as made:
        made.compute(ids[:2], x[:2])
        whole = made.calls._exchanges
        assert whole is not None
        whole._max_rows = 63
        made.compute(ids[:63], x[:63])
        assert made.compute(ids, x).shape == (64, D)
        assert whole._exchange.totals[:, 0].sum() == 4  # two calls of two workers; the third one was not its own


class Broken:
    """Shared experts that cannot be computed, after something else has happened."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None):
        self._meanwhile = meanwhile

    def forget(self) -> None:
        pass

    def compute(self, x: torch.Tensor) -> None:
        self._meanwhile()
        raise MemoryError("no room")


@pytest.mark.parametrize("way", ["two calls"], indirect=True)
@pytest.mark.parametrize("answer", [plainly, after_progress, late, failed, gone])
def test_what_fails_while_rows_are_away_leaves_nothing_in_flight(answer: Answer, way: str) -> None:
    ids, x = drawn(12, 7)
    with workers() as made:
        expected = made.compute(ids, x)
        made.answers["a"].append(answer)
        made.calls.shared = {0: Broken()}  # type: ignore[dict-item]
        with pytest.raises(MemoryError, match="no room"):
            made.compute(ids, x)
        made.calls.shared = {}
        assert all(link.num_in_flight == 0 for _, link in made.calls._live if not link.is_closed)
        assert torch.allclose(made.compute(ids, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["two calls"], indirect=True)
def test_a_link_that_is_closed_while_rows_are_away_has_them_computed_by_the_other(way: str) -> None:
    ids, x = drawn(12, 9)
    with workers() as made:
        expected = made.compute(ids, x)

        class Closing(Broken):
            def compute(self, x: torch.Tensor) -> None:
                made.calls.drop_link("a")

        made.calls.shared = {0: Closing()}  # type: ignore[dict-item]
        assert torch.allclose(made.compute(ids, x), expected, rtol=1e-6, atol=1e-6)
        assert made.calls.worker_ids == ["b"]
        assert made.calls.totals.python_exchanges == 1


def test_choices_of_no_expert_count_for_nothing() -> None:
    rng = np.random.default_rng(8)
    with workers() as fast, workers(is_whole=False) as slow:
        for made in (fast, slow):  # who counts loads does not know such choices
            made.calls.loads.note = lambda *_: np.zeros(NUM_EXPERTS, np.int64)  # type: ignore[method-assign]
        for seed in range(20):
            ids, x = drawn(int(rng.integers(1, 20)), seed)
            dropped = [[e if rng.random() > seed / 25 else -1 for e in row] for row in ids]
            dropped[0][0] = 3  # at least one
            assert torch.equal(fast.compute(dropped, x), slow.compute(dropped, x))
