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
from benchmarks.gating_layers import IMPLEMENTATIONS, Bank, Shape, Weights, layer_of, needed_bytes
from collegium.model.architectures import Activation

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
    expected = layer_of("eager", weights)(x, bias)
    assert expected.abs().max() > 0.01
    for name in IMPLEMENTATIONS:
        torch.testing.assert_close(layer_of(name, weights)(x, bias), expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 64])
@torch.inference_mode()
def test_experts_without_a_gate_and_with_biases_are_the_same_in_every_manner_that_takes_them(
    tokens: int, has_bias: bool
) -> None:
    rng = torch.Generator().manual_seed(0)
    shapes = {"up": (8, 48, 32), "down": (8, 32, 48)} | ({"up_bias": (8, 48), "down_bias": (8, 32)} if has_bias else {})
    bank = Bank(**{n: torch.randn(s, generator=rng) / 6 for n, s in shapes.items()}, activation=Activation.RELU)  # type: ignore[arg-type]
    x = torch.randn(tokens, 32, generator=rng)
    weights, ids = torch.rand(tokens, 8, generator=rng).topk(2, -1)
    expected = torch.stack(
        [sum(weights[t, k] * bank.ffn(int(ids[t, k]), x[t : t + 1])[0] for k in range(2)) for t in range(tokens)]  # type: ignore[misc]
    )
    for name in ("static_gshard", "static_fairseq", "padded", "block_sparse", "ours"):
        found = IMPLEMENTATIONS[name](bank)(x, ids, weights)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


@torch.inference_mode()
def test_static_gates_drop_what_finds_no_place_and_dynamic_gating_nothing() -> None:
    tight = Shape(d_model=32, d_ffn=16, experts=8, top_k=2, capacity=0.05)
    weights = Weights(tight, torch.float32)
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    bias = weights.bias("skewed")
    whole = layer_of("ours", weights)(x, bias)
    for name in ("static_gshard", "static_fairseq"):
        cut = layer_of(name, weights)(x, bias)
        assert (cut == 0).all(1).sum() > (whole == 0).all(1).sum() == 0


def test_skewed_routing_is_skewed() -> None:
    weights = Weights(SMALL, torch.float32)
    x = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    shares = {}
    for routing in ("uniform", "skewed"):
        ids, _ = weights.choose(x, weights.bias(routing))
        shares[routing] = float(torch.bincount(ids.flatten(), minlength=8).max() / ids.numel())
    assert shares["skewed"] > 1.3 * shares["uniform"]


def test_what_cannot_fit_is_known_before_it_is_tried() -> None:
    with torch.device("meta"):
        large = Bank(up=torch.empty(128, 2 * 8192, 2048), down=torch.empty(128, 2048, 8192))
    assert needed_bytes("static_gshard", large, 4096, 2) > gating.ROOM_BYTES > needed_bytes("ours", large, 4096, 2)
    assert needed_bytes("batched_mm", large, 64, 2) > gating.ROOM_BYTES


@pytest.mark.usefixtures("small_heap")
@torch.inference_mode()
def test_rows_have_times_and_peaks_where_the_layer_fits_and_nulls_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(SMALL, torch.float32)
    names = ["eager", "batched_mm", "ours"]
    rows = list(measure("tokens", weights, (1, 16), ("uniform",), names, 2))
    assert [(r.tokens, r.implementation) for r in rows] == [(t, n) for t in (1, 16) for n in names]
    assert all((r.milliseconds or 0) > 0 and (r.peak_bytes or 0) >= weights.num_bytes for r in rows)
    monkeypatch.setattr(gating, "ROOM_BYTES", needed_bytes("batched_mm", weights.bank, 16, 2) - 1)
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
