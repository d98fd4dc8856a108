"""The gating benchmark compares like with like: all implementations compute the same layer, and say what they take."""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gating
from benchmarks.gating import Row, claims, measure, ratio_to_best
from benchmarks.gating_layers import IMPLEMENTATIONS, Shape, Weights, needed_bytes

SMALL = Shape(d_model=32, d_ffn=16, experts=8, top_k=2, capacity=1.0)  # a place for every token: nothing is dropped
FIELDS = {"tokens", "experts", "top_k", "routing", "implementation", "milliseconds", "peak_bytes"}


@pytest.fixture
def small_heap() -> Iterator[None]:
    """Leave to the garbage collector, which runs before each peak, only what a test makes."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("routing", ["uniform", "skewed"])
@pytest.mark.parametrize("tokens", [1, 7, 70])
@torch.inference_mode()
def test_all_implementations_compute_the_same_layer(tokens: int, routing: str) -> None:
    weights = Weights(SMALL, torch.float32)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(0))
    bias = weights.bias(routing)
    expected = IMPLEMENTATIONS["eager"](weights)(x, bias)
    assert expected.abs().max() > 0.01
    for name, make in IMPLEMENTATIONS.items():
        torch.testing.assert_close(make(weights)(x, bias), expected, rtol=1e-4, atol=1e-5, msg=name)


@torch.inference_mode()
def test_static_gates_drop_what_finds_no_place_and_dynamic_gating_nothing() -> None:
    tight = Shape(d_model=32, d_ffn=16, experts=8, top_k=2, capacity=0.05)
    weights = Weights(tight, torch.float32)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    bias = weights.bias("skewed")
    whole = IMPLEMENTATIONS["ours"](weights)(x, bias)
    for name in ("static_gshard", "static_fairseq"):
        cut = IMPLEMENTATIONS[name](weights)(x, bias)
        assert (cut == 0).all(1).sum() > (whole == 0).all(1).sum() == 0


def test_skewed_routing_is_skewed() -> None:
    weights = Weights(SMALL, torch.float32)
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    shares = {}
    for routing in ("uniform", "skewed"):
        _, ids = weights.choose(x, weights.bias(routing))
        shares[routing] = float(torch.bincount(ids.flatten(), minlength=8).max() / ids.numel())
    assert shares["skewed"] > 1.3 * shares["uniform"]


def test_what_cannot_fit_is_known_before_it_is_tried() -> None:
    large = Shape(d_model=2048, d_ffn=8192, experts=128, top_k=2, capacity=1.0)
    assert needed_bytes("static_gshard", large, 4096, 4) > gating.ROOM_BYTES > needed_bytes("ours", large, 4096, 4)
    assert needed_bytes("batched_mm", large, 64, 4) > gating.ROOM_BYTES


@pytest.mark.usefixtures("small_heap")
@torch.inference_mode()
def test_rows_have_times_and_peaks_where_the_layer_fits_and_nulls_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(SMALL, torch.float32)
    names = ["eager", "batched_mm", "ours"]
    rows = list(measure("tokens", weights, (1, 16), ("uniform",), names, 2))
    assert [(r.tokens, r.implementation) for r in rows] == [(t, n) for t in (1, 16) for n in names]
    assert all((r.milliseconds or 0) > 0 and (r.peak_bytes or 0) >= weights.num_bytes for r in rows)
    monkeypatch.setattr(gating, "ROOM_BYTES", needed_bytes("batched_mm", SMALL, 16, 4) - 1)
    monkeypatch.setattr(gating.Peak, "of", lambda *_: 0)
    (row,) = (r for r in measure("tokens", weights, (16,), ("uniform",), names, 1) if r.implementation == "batched_mm")
    assert row.milliseconds is row.peak_bytes is None


def row(name: str, tokens: int, milliseconds: float | None, peak: int = 1, sweep: str = "tokens") -> Row:
    """A figure."""
    return Row(
        sweep=sweep, tokens=tokens, experts=8, top_k=2, routing="uniform", implementation=name,
        milliseconds=milliseconds, peak_bytes=peak if milliseconds else None, d_model=1, d_ffn=1, dtype="float32",
    )  # fmt: skip


def test_claims_name_the_worst_point_and_compare_each_at_its_own_best() -> None:
    assert ratio_to_best({"eager": row("eager", 1, 4.0), "x": row("x", 1, 3.0), "ours": row("ours", 1, 2.0)}) == 1.5
    assert ratio_to_best({"eager": row("eager", 1, None), "ours": row("ours", 1, 2.0)}) is None
    (line,) = claims([row("eager", 1, 4.0), row("ours", 1, 2.0), row("eager", 9, 1.0), row("ours", 9, 2.0)])
    assert "0.50x at least (9 tokens" in line
    assert "1.00x in geometric mean" in line
    name = next(iter(gating.PAPER))
    figures = [("static_gshard", 64, 64.0, 30), ("static_gshard", 128, None, 0), ("ours", 64, 16.0, 10)]
    lines = list(claims([row(n, t, ms, peak, name) for n, t, ms, peak in [*figures, ("ours", 128, 16.0, 20)]]))
    assert "8.00x in maximum throughput" in lines[0]
    assert "64: 4.0x; peak memory at 64 tokens 3.00x lower" in lines[0]


@pytest.mark.usefixtures("small_heap")
def test_json_is_a_list_of_objects_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gating, "BASE", SMALL)
    monkeypatch.setattr(gating, "TOKENS", (1, 4))
    monkeypatch.setattr(gating, "_POINT_S", 0.0)
    monkeypatch.setattr(gating, "conditions", lambda **facts: facts)
    monkeypatch.setattr(sys, "argv", ["gating.py", "--json", "--only", "tokens"])
    gating.main()
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * 2 * len(IMPLEMENTATIONS)
    assert all(set(one) >= FIELDS for one in rows)
    assert Path(gating.__file__).name == "gating.py"
