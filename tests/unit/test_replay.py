"""Replays of routing: the accounts add up, the published curve comes out, and traces are read with care."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.buffering.belady import Min
from collegium.buffering.generator import RoutingShape, generate_trace
from collegium.buffering.policies import POLICIES, Policy, make_policy
from collegium.buffering.replay import (
    Capacity,
    PrefillRule,
    Result,
    Scope,
    capacity_of_bytes,
    capacity_of_percent,
    replay,
)
from collegium.buffering.traces import DECODE, PREFILL, Trace, TraceError, TraceWriter, read_trace
from collegium.buffering.visits import Visit, moe_layers, read_visits, side_by_side
from collegium.cli.main import main

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "traces" / "qwen3-30b-a3b.csv"
needs_published = pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published trace is not in ../shared/traces")
SMALL = RoutingShape(num_layers=3, num_experts=16, top_k=4, expert_bytes=10, prompt_tokens=12, decode_tokens=40)


@cache
def published() -> tuple[tuple[int, ...], list[Visit]]:
    trace = read_trace(PUBLISHED)
    return tuple(trace.header.expert_bytes[layer] for layer in moe_layers(trace)), read_visits(trace)


@cache
def small() -> list[Visit]:
    return read_visits(generate_trace(SMALL, seed=1))


def policy_of(name: str, visits: Sequence[Visit], is_selective: bool = False) -> Policy:
    if name == "min":
        return Min(visits, is_selective=is_selective)
    return make_policy(name, is_selective=is_selective)


def decode(layer: int, *experts: int) -> Visit:
    return Visit(is_decode=True, layer=layer, experts=experts, counts=(1,) * len(experts), num_tokens=1)


visits_of_any_kind = st.lists(
    st.builds(
        lambda is_decode, layer, experts: replace(decode(layer, *experts), is_decode=is_decode),
        st.booleans(),
        st.integers(0, 2),
        st.lists(st.integers(0, 7), min_size=1, max_size=4, unique=True),
    ),
    min_size=1,
    max_size=40,
)


@pytest.mark.parametrize("name", [*POLICIES, "min"])
@pytest.mark.parametrize("scope", Scope)
@settings(max_examples=25)
@given(
    visits=visits_of_any_kind,
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    percent=st.floats(1, 100),
    prefill=st.sampled_from(PrefillRule),
    is_selective=st.booleans(),
)
def test_hits_and_misses_are_all_requests_and_no_budget_is_ever_exceeded(
    name: str,
    scope: Scope,
    visits: list[Visit],
    sizes: tuple[int, ...],
    percent: float,
    prefill: PrefillRule,
    is_selective: bool,
) -> None:
    capacity = capacity_of_percent(scope, sizes, 8, percent)
    result = replay(visits, policy_of(name, visits, is_selective), capacity, prefill=prefill)
    requests = sum(len(visit.experts) for visit in visits)
    assert result.prefill_requests + result.decode_requests == requests
    assert result.prefill_hits + result.decode_hits + result.num_misses == requests
    assert result.most_bytes <= sum(capacity.room)
    assert result == replay(visits, policy_of(name, visits, is_selective), capacity, prefill=prefill)


@pytest.mark.parametrize("scope", [Scope.LAYER, Scope.POOL])
@settings(max_examples=50)
@given(visits=visits_of_any_kind, slots=st.integers(1, 12))
def test_no_policy_has_more_hits_than_min_where_experts_are_equally_large(
    scope: Scope, visits: list[Visit], slots: int
) -> None:
    visits = [replace(visit, is_decode=True) for visit in visits]
    room = (slots,) * 3 if scope is Scope.LAYER else (slots,)
    capacity = Capacity(scope=scope, sizes=(1, 1, 1), num_experts=8, room=room)
    for is_selective in (False, True):
        best = replay(visits, Min(visits, is_selective=is_selective), capacity).decode_hits
        for name in POLICIES:
            assert replay(visits, make_policy(name, is_selective=is_selective), capacity).decode_hits <= best


def play(visits: Sequence[Visit], name: str, slots: int, **options: PrefillRule) -> Result:
    capacity = Capacity(scope=Scope.LAYER, sizes=(10,), num_experts=8, room=(10 * slots,))
    return replay(visits, policy_of(name, visits), capacity, **options)


def test_a_replay_counts_what_can_be_counted_by_hand() -> None:
    visits = [decode(0, 1, 2), decode(0, 2, 3), decode(0, 1, 3)]
    result = play(visits, "lru", 2)
    assert (result.decode_requests, result.decode_hits, result.bytes_read) == (6, 2, 40)
    assert play(visits, "lru", 3).decode_hits == 3


def test_min_inserts_what_was_missed_unless_it_is_selective() -> None:
    visits = [decode(0, 1), decode(0, 5), decode(0, 1, 2), decode(0, 5)]
    capacity = Capacity(scope=Scope.LAYER, sizes=(1,), num_experts=8, room=(2,))
    assert replay(visits, Min(visits), capacity).decode_hits == 1
    assert replay(visits, Min(visits, is_selective=True), capacity).decode_hits == 2


def test_a_visit_larger_than_the_room_keeps_its_hits_and_streams_the_rest() -> None:
    visits = [decode(0, 1, 2), decode(0, 2, 3, 4), decode(0, 2)]
    result = play(visits, "lru", 1)
    assert (result.decode_hits, result.num_inserted, result.num_streamed) == (1, 2, 3)
    result = play(visits, "lru", 2)
    assert (result.decode_hits, result.num_inserted, result.num_streamed) == (2, 3, 1)


def test_misses_with_the_best_scores_get_the_room() -> None:
    visits = [decode(0, 5), decode(0, 5), decode(0, 6, 7), decode(0, 1, 5), decode(0, 5)]
    assert play(visits, "ewma", 1).decode_hits == 2
    assert play(visits, "lru", 1).decode_hits == 1


def test_prefill_that_is_streamed_evicts_nothing() -> None:
    prompt = [replace(decode(0, index, index + 1), is_decode=False) for index in range(2, 7)]
    visits = [decode(0, 0, 1), *prompt, decode(0, 0, 1)]
    assert play(visits, "lru", 2, prefill=PrefillRule.INSERT).decode_hits == 0
    assert play(visits, "lru", 2, prefill=PrefillRule.STREAM).decode_hits == 2


def test_a_quota_that_is_full_streams_instead_of_robbing_other_layers() -> None:
    visits = [decode(layer, 1, 2, 3) for _ in range(20) for layer in range(3)]
    capacity = Capacity(scope=Scope.QUOTA, sizes=(1, 1, 1), num_experts=8, room=(6,))
    assert replay(visits, make_policy("lru"), capacity).decode_hits > 100  # of 114 that six slots can give
    assert replay(visits, make_policy("lru"), replace(capacity, scope=Scope.POOL)).decode_hits == 0


def test_shares_of_slots_are_rounded_down_to_one_at_least() -> None:
    assert capacity_of_percent(Scope.LAYER, [10, 20], 8, 3).room == (10, 20)
    assert capacity_of_percent(Scope.LAYER, [10, 20], 60, 12.5).room == (70, 140)
    assert capacity_of_percent(Scope.LAYER, [10, 20], 48, 6.25).room == (30, 60)
    assert capacity_of_percent(Scope.POOL, [10, 20], 8, 50).room == (120,)
    assert capacity_of_percent(Scope.POOL, [10, 20], 8, 1).room == (20,)


def test_a_budget_below_one_slot_is_refused_with_the_least_that_works() -> None:
    with pytest.raises(ValueError, match="needs 40"):
        capacity_of_bytes(Scope.LAYER, [10, 20], 8, 39)
    assert capacity_of_bytes(Scope.POOL, [10, 20], 8, 39).room == (39,)


@needs_published
@pytest.mark.parametrize("budget_mib", [500, 2000])
def test_the_published_curve_comes_out_to_half_a_point(budget_mib: int) -> None:
    sizes, visits = published()
    with PUBLISHED.with_suffix(".curve.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["budget_mib"] == str(budget_mib)]
    wanted = {row["policy"]: row for row in rows if row["policy"] in ("lru", "lfu", "belady")}
    assert len(wanted) == 3
    for published_name, row in wanted.items():
        name = "min" if published_name == "belady" else published_name
        capacity = capacity_of_bytes(Scope.POOL, sizes, 128, budget_mib * 2**20)
        result = replay(visits, policy_of(name, visits), capacity)
        assert 100 * result.hit_rate_decode == pytest.approx(float(row["hit_pct_decode"]), abs=0.5)
        assert result.bytes_read / 2**20 == pytest.approx(float(row["read_mib"]), rel=0.02)


@needs_published
def test_ewma_has_its_share_of_mins_hits_and_is_nowhere_behind_lru() -> None:
    sizes, visits = published()
    for percent in (3.125, 12.5, 50):
        capacity = capacity_of_percent(Scope.LAYER, sizes, 128, percent)
        ewma, lru, best = (replay(visits, policy_of(name, visits), capacity) for name in ("ewma", "lru", "min"))
        assert ewma.hit_rate_decode >= lru.hit_rate_decode - 0.005
        if percent == 12.5:
            assert ewma.decode_hits >= 0.82 * best.decode_hits


def test_a_generated_trace_is_routed_as_a_trained_model_routes() -> None:
    shape = RoutingShape(num_layers=4, num_experts=128, top_k=6, prompt_tokens=0, decode_tokens=200)
    trace = generate_trace(shape, seed=3)
    chosen = np.zeros((200, 4, 128), dtype=bool)
    chosen[trace.step, trace.layer, trace.expert] = True
    for lag, overlap in ((1, 0.37), (8, 0.26), (32, 0.22)):  # measured on Qwen3-30B-A3B: 0.38, 0.27, 0.24
        assert (chosen[lag:] & chosen[:-lag]).sum() / (6 * 4 * (200 - lag)) == pytest.approx(overlap, abs=0.04)
    loads = chosen.sum(axis=0)
    assert (loads.std(axis=1) / loads.mean(axis=1)).mean() == pytest.approx(1.95, abs=0.2)


def test_a_seed_makes_one_trace_and_drift_moves_the_experts() -> None:
    shape = replace(SMALL, num_prompts=2, prompt_tokens=0, decode_tokens=300)
    again, other = generate_trace(shape, seed=1), generate_trace(shape, seed=2)
    trace = generate_trace(shape, seed=1)
    assert np.array_equal(trace.expert, again.expert) and not np.array_equal(trace.expert, other.expert)

    def change(drift: float) -> float:
        moved = generate_trace(replace(shape, drift=drift), seed=1)
        loads = [np.bincount(moved.expert[moved.turn == turn], minlength=16) for turn in (0, 1)]
        return float(np.abs(loads[0] - loads[1]).sum())

    assert change(1.0) > 1.5 * change(0.0)
    with pytest.raises(ValueError, match="top 20 of 16"):
        generate_trace(replace(SMALL, top_k=20), seed=1)


def text_of(trace: Trace) -> str:
    """Write a trace as `collegium trace` does."""
    file = io.StringIO()
    header = trace.header
    writer = TraceWriter(
        file,
        model=header.model,
        arch=header.arch,
        num_layers=header.num_layers,
        num_experts=header.num_experts,
        top_k=header.top_k,
        expert_bytes=header.expert_bytes,
    )
    for begin in range(0, len(trace), header.top_k):
        rows = slice(begin, begin + header.top_k)
        writer.write(
            turn=int(trace.turn[begin]),
            phase=int(trace.phase[begin]),
            step=int(trace.step[begin]),
            layer=int(trace.layer[begin]),
            experts=trace.expert[rows].tolist(),
            weights=trace.weight[rows].tolist(),
            residency=trace.residency[rows].tolist(),
            expert_bytes=trace.expert_bytes[rows].tolist(),
        )
    return file.getvalue()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    trace = generate_trace(replace(SMALL, num_prompts=2), seed=5)
    path = tmp_path / "trace.csv"
    path.write_text(text_of(trace))
    back = read_trace(path)
    assert back.header == trace.header
    for name in ("turn", "phase", "step", "layer", "slot", "expert", "residency", "expert_bytes"):
        assert np.array_equal(getattr(back, name), getattr(trace, name))
    assert np.allclose(back.weight, trace.weight, rtol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("turn,phase,step", "turn,phase,stop", r"trace.csv:6: no column 'step', an unknown column 'stop'"),
        ("turn,phase,step", "phase,turn,step", r"trace.csv:6: the columns in another order"),
        ("\n0,0,0,0,0,", "\n0,0,0,x,0,", r"trace.csv:7: column layer: 'x' is no number"),
        ("\n0,0,0,0,0,", "\n0,0,0,7,0,", r"trace.csv:7: column layer: '7' has no size; add a line `# layer=7"),
        ("\n0,0,0,0,0,", "\n0,2,0,0,0,", r"trace.csv:7: column phase: '2' is no phase"),
        ("\n0,0,0,0,0,", "\n0,0,0,0,", r"trace.csv:7: 8 columns where there should be 9"),
        ("n_expert=16", "n_expert=2", r"trace.csv:\d+: column expert: '\d+' is past the last expert"),
        ("n_expert=16", "", r"trace.csv: the header lacks a line like"),
        (
            "# layer=1 expert_bytes=10",
            "# layer=1 expert_bytes=?",
            r"trace.csv:4: .* gives no layer with its expert_bytes",
        ),
    ],
)
def test_a_trace_that_is_wrong_is_refused_by_line_and_column(
    tmp_path: Path, old: str, new: str, complaint: str
) -> None:
    text = text_of(generate_trace(SMALL, seed=5))
    assert old in text
    path = tmp_path / "trace.csv"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(TraceError, match=complaint):
        read_trace(path)


def test_what_is_no_trace_at_all_is_refused_as_such(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, complaint in ((b"", "not a trace"), (b"hello\n", "not a trace"), (b"\xff\xfe\x00", "no text")):
        path.write_bytes(content)
        with pytest.raises(TraceError, match=complaint):
            read_trace(path)
    path.write_text("".join(text_of(generate_trace(SMALL, seed=5)).partition("expert_bytes\n")[:2]))
    with pytest.raises(TraceError, match="no rows below line 6"):
        read_trace(path)


def test_rows_become_visits_of_runs_with_prefill_in_micro_batches() -> None:
    trace = generate_trace(replace(SMALL, num_layers=2, prompt_tokens=10, decode_tokens=2), seed=5)
    visits = read_visits(trace)
    shape = [(visit.layer, visit.is_decode, visit.num_tokens) for visit in visits]
    assert shape == [
        *((layer, False, size) for layer in (0, 1) for size in (8, 2)),
        *((layer, True, 1) for _ in range(2) for layer in (0, 1)),
    ]
    assert [sum(visit.counts) for visit in visits] == [4 * visit.num_tokens for visit in visits]
    assert [visit.num_tokens for visit in read_visits(trace, prefill_tokens=0)][:2] == [10, 10]


def test_layers_without_experts_are_left_out_and_a_model_of_one_layer_has_a_visit_per_token() -> None:
    trace = generate_trace(replace(SMALL, num_layers=1, decode_tokens=5, prompt_tokens=3), seed=5)
    header = replace(trace.header, num_layers=3, expert_bytes={0: 0, 2: 10})
    visits = read_visits(replace(trace, header=header, layer=np.full(len(trace), 2)))
    assert [(visit.layer, visit.num_tokens) for visit in visits] == [(0, 3), *[(0, 1)] * 5]


def test_windows_run_side_by_side_and_a_visit_is_the_union_of_theirs() -> None:
    prompt = replace(decode(0, 7), is_decode=False)
    steps = [(decode(0, step, step + 1), decode(1, step)) for step in range(5)]
    visits = [prompt, *(visit for pair in steps for visit in pair)]
    assert side_by_side(visits, 1) == visits
    joined = side_by_side(visits, 2)  # steps 0 and 2, then 1 and 3; step 4 is left over
    assert [(visit.layer, visit.experts, visit.counts, visit.num_tokens) for visit in joined] == [
        (0, (7,), (1,), 1),
        (0, (0, 1, 2, 3), (1, 1, 1, 1), 2),
        (1, (0, 2), (1, 1), 2),
        (0, (1, 2, 3, 4), (1, 1, 1, 1), 2),
        (1, (1, 3), (1, 1), 2),
    ]
    joined = side_by_side([prompt, decode(0, 1, 2), prompt, decode(0, 2, 3)], 2)
    assert [visit.counts for visit in joined] == [(1,), (1,), (1, 2, 1)]
    with pytest.raises(ValueError, match="5 decode steps, too few for 6 windows"):
        side_by_side(visits, 6)


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text_of(generate_trace(SMALL, seed=5)))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *argv: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["collegium", "replay", *map(str, argv)])
    return main()


def test_the_command_prints_a_json_list_with_an_object_per_size_and_policy(
    trace_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--policies", "lru,ewma,min", "--slots-percent", "25,50", "--batch", "2", "--scope", "pool", "--json")
    assert run(monkeypatch, trace_file, *flags) == 0
    rows = json.loads(capfd.readouterr().out)
    assert [(row["slots_percent"], row["policy"]) for row in rows] == [
        (percent, name) for percent in (25, 50) for name in ("lru", "ewma", "min")
    ]
    for row in rows:
        assert row["scope"] == "pool" and row["batch"] == 2
        assert 0 <= row["hit_rate_decode"] <= 1 and row["bytes_read"] % 10 == 0
        best = next(x for x in rows if x["policy"] == "min" and x["slots_percent"] == row["slots_percent"])
        assert row["min_ratio"] == pytest.approx(row["hit_rate_decode"] / best["hit_rate_decode"])


def test_the_command_takes_budgets_and_prints_a_table_without_json(
    trace_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, trace_file, "--budget-mib", "0.001", "--policies", "lifo", "--json") == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert row["budget_mib"] == 0.001 and "slots_percent" not in row
    assert run(monkeypatch, trace_file) == 0
    out = capfd.readouterr().out
    assert "3 MoE layers of 16 experts, top 4" in out and "6.25 %" in out and "of MIN's" in out


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--policies", "lru,clock"), "--policies: there is no policy 'clock'; give lifo, fifo, lru, lfu, ewma, min"),
        (("--slots-percent", "5", "--budget-mib", "5"), "--slots-percent or --budget-mib, not both"),
        (("--slots-percent", "0"), "--slots-percent: '0' are no sizes"),
        (("--slots-percent", "101"), "--slots-percent: '101' are no sizes"),
        (("--budget-mib", "much"), "--budget-mib: 'much' are no sizes"),
        (("--budget-mib", "0.00001"), "--budget-mib: 10 bytes are too few: scope layer needs 30"),
        (("--batch", "50"), "--batch: the trace has 40 decode steps, too few for 50 windows"),
    ],
)
def test_the_command_names_the_flag_that_is_wrong(
    trace_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    complaint: str,
) -> None:
    assert run(monkeypatch, trace_file, *flags) == 1
    captured = capfd.readouterr()
    assert complaint in captured.err and not captured.out


def test_the_command_names_the_file_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "none.csv") == 1
    assert "none.csv; record one with `collegium trace`" in capfd.readouterr().err
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    assert run(monkeypatch, tmp_path / "notes.csv") == 1
    assert "notes.csv:1: not a trace" in capfd.readouterr().err
    (tmp_path / "prompt.csv").write_text(text_of(generate_trace(replace(SMALL, decode_tokens=0), seed=5)))
    assert run(monkeypatch, tmp_path / "prompt.csv") == 1
    assert "no decode steps" in capfd.readouterr().err
    assert (PREFILL, DECODE) == (0, 1)
