"""The paper's evaluation compares like with like, and its claims are of the points that were measured."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from benchmarks.capacity import places
from benchmarks.dense_process import active_width
from benchmarks.paper import SERVED, Point, claims
from benchmarks.paper_models import LM, POLICIES, powers
from benchmarks.paper_page import page
from benchmarks.paper_routing import Recorded, caches, idle, placements, windows
from collegium.buffering.generator import RoutingShape, generate_trace
from collegium.buffering.visits import read_visits


def points(rates: dict[str, Sequence[float | None]], activations: dict[str, int]) -> list[Point]:
    return [
        Point(
            workload=LM.name,
            tokens=tokens,
            policy=policy,
            milliseconds=None if rate is None else 1e3 * tokens / rate,
            tokens_per_s=rate,
            activation_bytes=activations.get(policy) if rate is not None else None,
            weight_bytes=100,
            gigaflops=rate,
        )
        for policy, each in rates.items()
        for tokens, rate in zip((1, 2, 4), each, strict=True)
    ]


RATES: dict[str, Sequence[float | None]] = {
    "static": (1.0, 2.0, None),
    "padded": (4.0, 3.0, 2.0),
    "block-sparse": (5.0, 9.0, 10.0),
    "dynamic": (6.0, 9.9, 20.0),
    SERVED: (3.0, 10.0, 16.0),
}


def test_claims_compare_each_policy_at_its_own_best_and_all_at_equal_batch() -> None:
    said = claims(LM, points(RATES, {"static": 300, "dynamic": 50}))
    assert (said["dynamic over static"], said["served over static"], said["dynamic over padded"]) == (10.0, 8.0, 5.0)
    assert said["least at equal batch"] == "1.10x (block-sparse, 2 tokens)"
    assert said["least at equal batch, served"] == "0.60x (block-sparse, 1 token)"
    assert said["static's largest batch"] == 2
    assert said["served, GFLOP/s"] == 16.0
    assert said["memory at static's largest batch"] == round(400 / 150, 2)
    assert said["activations less by"] == round(1 - 50 / 300, 3)


def test_powers_end_at_the_largest_that_fits() -> None:
    assert list(powers(9)) == [1, 2, 4, 8]
    assert list(powers(4096))[-1] == 4096


@pytest.fixture(scope="module")
def recorded() -> Recorded:
    shape = RoutingShape(num_layers=2, num_experts=16, top_k=2, num_prompts=4, prompt_tokens=0, decode_tokens=256)
    return Recorded(workload=LM.name, trace=generate_trace(shape, seed=1))


def test_windows_count_every_choice_of_whole_windows(recorded: Recorded) -> None:
    counts = windows(recorded.trace)
    assert counts.shape == (15, 2, 16)  # the last of 16 may be short, and is left out
    assert (counts.sum(2) == 64 * 2).all()


def test_the_page_has_a_table_for_each_figure(recorded: Recorded) -> None:
    rows = list(placements([recorded]))
    assert {row["placement"] for row in rows} >= {"static", "greedy", "anti_correlation", "replicated"}
    assert all(1 / 8 <= float(str(row["Avg Max Load"])) <= float(str(row["Max Load"])) <= 1 for row in rows)
    hits = list(caches([recorded]))
    for row in hits:
        rates = [float(str(row[name])) for name in ("lifo", "lru", "ewma", "min")]
        assert max(rates) == rates[-1]
    by_size = [float(str(row["min"])) for row in hits]
    assert by_size == sorted(by_size)
    (told,) = idle([recorded])
    visits = read_visits(recorded.trace, prefill_tokens=0)
    assert told["tokens"] == 4 * 256 and told["tokens of a batch"] == round(2 * 4 * 256 / len(visits), 1)
    every = points(RATES, {"static": 300, "dynamic": 50})
    text = "\n".join(
        page(
            {
                "conditions": {
                    "dtype": "float32",
                    "threads": 2,
                    "commit": "c",
                    "cores": 2,
                    "memory_bandwidth_gb_s": 20.0,
                },
                "points": [dataclasses.asdict(one) for one in every],
                "idle": [told],
                "caches": hits,
                "placement": rows,
            }
        )
    )
    for said in ("6.21x", "**10.0x**", "| 4 | - |", "2.67x", "83.3 %", "anti_correlation"):
        assert said in text
    assert all(f"`{policy}`" in text for policy in (*POLICIES, SERVED))


def test_first_choices_find_their_places_before_second_ones() -> None:
    ids = np.array([[3, 5], [5, 3], [3, 5]])
    weights = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]], dtype=np.float32)
    assert places(ids, weights).tolist() == [[0, 2], [0, 1], [2, 1]]
    rng = torch.Generator().manual_seed(0)
    top, chosen = torch.rand(40, 8, generator=rng).topk(3, -1)
    found = places(chosen.numpy(), top.numpy())
    taken = [0] * 8
    for rank in range(3):  # GShard's order, written plainly
        for token in range(40):
            assert found[token, rank] == taken[int(chosen[token, rank])]
            taken[int(chosen[token, rank])] += 1


def test_a_dense_model_of_equal_active_size_is_as_wide_as_what_a_token_goes_through() -> None:
    config = {"encoder_sparse_step": 2, "encoder_layers": 4, "encoder_ffn_dim": 320}
    assert active_width(config, "encoder") == (320 + 640 + 320 + 640) // 4
    assert active_width(config | {"encoder_sparse_step": 0}, "encoder") == 320
