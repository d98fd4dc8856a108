"""Played routing: a trace's choices replace the gate's, cut to the model's shape; its weights stay the gate's."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.one_process import OneProcess, Request
from collegium.buffering.traces import TraceWriter, read_trace
from collegium.fabric.errors import FailedPrecondition
from collegium.model.sampling import SamplingParams
from router_svc.app import read_unsafe_routing
from router_svc.choices import StepChoices
from router_svc.sequence import Sequence as Grown
from router_svc.sequence import StopRules
from router_svc.settings import Settings
from router_svc.step import Row, Step
from router_svc.unsafe_routing import UnsafeRouting, UnsafeRoutingError, load_unsafe_routing, table_of, tokens_of
from tests.oracle import Oracle


def write_trace(
    path: Path, choices: Sequence[Sequence[Sequence[int] | None]], *, num_experts: int = 16, top_k: int = 3
) -> Path:
    """Write a trace: choices[token][layer] is what a token chose there, None where it is not recorded."""
    with path.open("w") as file:
        num_layers = len(choices[0])
        writer = TraceWriter(
            file,
            model="m",
            arch="a",
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            expert_bytes=[100] * num_layers,
        )
        for step, layers in enumerate(choices):
            for layer, experts in enumerate(layers):
                if experts is not None:
                    nothing = [0] * len(experts)
                    writer.write(
                        turn=0, phase=1, step=step, layer=layer, experts=experts, weights=[0.5] * len(experts),
                        residency=nothing, expert_bytes=nothing,
                    )  # fmt: skip
    return path


def grown(request_id: str, num_prompt: int = 20) -> Grown:
    return Grown(
        owner=1,
        request_id=request_id,
        choice_index=0,
        prompt_ids=list(range(num_prompt)),
        sampling=SamplingParams(),
        rules=StopRules(max_tokens=5),
    )


def play(routing: UnsafeRouting, step: Step, layer: int, weights: Tensor) -> Tensor:
    """Give the ids [T, K] that an expert call gets in a step."""
    seen: list[Tensor] = []

    def call(_layer: int, x: Tensor, ids: Tensor, given: Tensor) -> Tensor:
        assert given is weights
        seen.append(ids)
        return x

    routing.begin([(row.sequence.request_id, row.begin, row.end) for row in step.rows])
    routing.played(call)(layer, torch.zeros(step.num_rows, 4), torch.full(weights.shape, 7), weights)
    return seen[0]


TOKENS = [[[t, t + 5, t + 9], [15 - t, 1, 0]] for t in range(1, 6)]


def test_consecutive_positions_play_consecutive_tokens_at_the_layer_modulo_the_traces(tmp_path: Path) -> None:
    routing = load_unsafe_routing(write_trace(tmp_path / "t.csv", TOKENS), num_experts=16, top_k=3)
    sequence = grown("a request")
    decode, chunk = (
        Row(sequence=sequence, begin=19, num_rows=1),
        Row(sequence=grown("another"), begin=0, num_rows=11),
    )
    weights = torch.rand(12, 3)
    for layer in range(5):
        ids = play(routing, Step(decodes=(decode,), chunks=(chunk,)), layer, weights).tolist()
        ring = [token[layer % 2] for token in TOKENS]
        start = ring.index(ids[1])
        assert ids[1:] == [ring[(start + i) % 5] for i in range(11)]
        assert ids[0] in ring


def test_where_a_sequence_begins_is_told_by_its_request_alone(tmp_path: Path) -> None:
    routing = load_unsafe_routing(write_trace(tmp_path / "t.csv", TOKENS), num_experts=16, top_k=3)

    def first(request_id: str) -> list[int]:
        row = Row(sequence=grown(request_id), begin=0, num_rows=1)
        return play(routing, Step(decodes=(), chunks=(row,)), 0, torch.rand(1, 3))[0].tolist()

    assert first("x") == first("x")
    assert len({tuple(first(f"request-{i}")) for i in range(40)}) == 5


@given(st.data())
def test_ids_of_any_trace_are_distinct_and_of_the_model(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 12))
    top_k = data.draw(st.integers(1, num_experts))
    table = data.draw(st.lists(st.lists(st.integers(0, 127), min_size=top_k, max_size=top_k), min_size=1, max_size=4))
    routing = UnsafeRouting(np.array([table]), num_experts=num_experts)
    row = Row(sequence=grown("r"), begin=0, num_rows=len(table))
    ids = play(routing, Step(decodes=(), chunks=(row,)), 0, torch.rand(len(table), top_k))
    assert ((ids >= 0) & (ids < num_experts)).all()
    assert all(len(set(token)) == top_k for token in ids.tolist())


def test_ids_that_fit_already_stay_as_they_are(tmp_path: Path) -> None:
    routing = load_unsafe_routing(write_trace(tmp_path / "t.csv", [[[3, 2, 9]]]), num_experts=10, top_k=2)
    row = Row(sequence=grown("r"), begin=0, num_rows=1)
    assert play(routing, Step(decodes=(row,), chunks=()), 0, torch.rand(1, 2)).tolist() == [[3, 2]]


def test_tokens_that_lack_a_layer_are_left_out(tmp_path: Path) -> None:
    choices = [[[1, 2, 3], None], [[4, 5, 6], [7, 8, 9]], [[1, 2, 3], [2, 3]]]
    table = table_of(read_trace(write_trace(tmp_path / "t.csv", choices)), 3)
    assert table.tolist() == [[[4, 5, 6]], [[7, 8, 9]]]


@pytest.mark.parametrize(
    ("choices", "top_k", "named"),
    [
        (TOKENS, 4, "choose 3 experts, the model's 4"),
        ([[[1, 2, 3], None], [None, [1, 2, 3]]], 3, "no token has 3 experts at each of its 2 layers"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused_by_name(
    choices: list[list[list[int] | None]], top_k: int, named: str, tmp_path: Path
) -> None:
    path = write_trace(tmp_path / "t.csv", choices)
    with pytest.raises(UnsafeRoutingError, match=named) as caught:
        load_unsafe_routing(path, num_experts=16, top_k=top_k)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_trace_or_not_there_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "no.csv").write_text("hello\n")
    for name in ("no.csv", "absent.csv"):
        with pytest.raises(UnsafeRoutingError, match=name):
            load_unsafe_routing(tmp_path / name, num_experts=16, top_k=2)


def test_nothing_is_foretold_unless_an_accuracy_is_asked_for_and_then_about_so_much_is_right() -> None:
    table = np.random.default_rng(1).permuted(np.tile(np.arange(32), (1, 500, 1)), axis=-1)[..., :4]
    row = Row(sequence=grown("r", 500), begin=0, num_rows=500)
    x = torch.zeros(300, 4)
    for accuracy in (0.0, 0.7, 1.0):
        routing = UnsafeRouting(table, num_experts=32, accuracy=accuracy)
        chosen = play(routing, Step(decodes=(), chunks=(row,)), 0, torch.rand(500, 4)).numpy()[:300]
        foretold = routing.predict(0, x)
        if accuracy == 0.0:
            assert foretold is None
            continue
        assert foretold is not None
        assert len(foretold) == 300
        right = (np.array(foretold)[:, :, None] == chosen[:, None, :]).any(-1).mean()
        assert right == pytest.approx(accuracy, abs=0.05)
        assert all(len(set(token)) == 4 for token in foretold)


def test_requests_wake_the_experts_of_the_file_and_a_perfect_foresight_names_each(oracle: Oracle) -> None:
    table = np.random.default_rng(2).permuted(np.tile(np.arange(8), (2, 11, 1)), axis=-1)[..., :2]
    routing = UnsafeRouting(table, num_experts=8, accuracy=1.0)
    told: list[StepChoices] = []
    with OneProcess(
        oracle.checkpoint("mixtral"), num_workers=2, unsafe_routing=routing, expert_memory="60%"
    ) as cluster:
        cluster.engine.listeners.add(told.append)
        ((answer,),) = cluster.run([Request(prompt_ids=[9, 10, 11], max_tokens=6)])
        totals = cluster.calls.totals
    assert answer.failure == ""
    (start,) = tokens_of([("request-1", 0, 1)], 11)
    for choices in told:
        for layer in choices.layers:
            played = [sorted(table[layer.layer % 2, (start + p) % 11].tolist()) for p in choices.positions]
            assert np.sort(layer.ids, axis=1).tolist() == played
    assert totals.hinted_right == totals.hinted == 5 * 2 * 2  # decoded tokens, foretold layers, experts


def test_a_router_refuses_a_file_that_it_cannot_play_and_names_the_flag(tmp_path: Path) -> None:
    settings = Settings(model=Path("x"), unsafe_routing=tmp_path / "absent.csv")
    model = SimpleNamespace(num_experts=8, top_k=2, both=None)
    with pytest.raises(FailedPrecondition, match=r"--unsafe-routing: .*absent\.csv"):
        read_unsafe_routing(settings, model)  # type: ignore[arg-type]


def test_the_router_plays_nothing_unless_it_is_told_to() -> None:
    settings = Settings(model=Path("x"))
    assert settings.unsafe_routing is None
    assert read_unsafe_routing(settings, None) is None  # type: ignore[arg-type]
