"""Dispatch plans carry exactly the gate's choices; shares come back into token order, also when a worker fails."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from collegium.model.architectures import Activation, ExpertForm
from collegium.model.dispatch import WorkerShare, combine, needed_bytes, plan_dispatch, plan_in_numpy, replan, rows_for
from collegium.model.experts import PackedExpert, gated, run_experts, weighted_sum
from collegium.model.placement import Placement
from collegium.model.weights import ExpertWeights
from router_svc.paged_attention import group_lengths
from router_svc.routing import route

D_MODEL, D_FFN = 16, 24
FORM = ExpertForm(activation=Activation.SILU)


def choices(num_tokens: int, top_k: int, num_experts: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    ids = np.stack([random.permutation(num_experts)[:top_k] for _ in range(num_tokens)])
    return ids, random.random((num_tokens, top_k), dtype=np.float32)


def pairs_of(share: WorkerShare) -> set[tuple[int, int, float]]:
    experts = np.repeat(share.experts, share.counts)
    tokens = share.tokens[share.pair_rows]
    return {(int(t), int(e), float(w)) for t, e, w in zip(tokens, experts, share.pair_weights, strict=True)}


@given(
    num_tokens=st.integers(1, 60),
    num_experts=st.integers(1, 40),
    num_workers=st.integers(1, 7),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_a_plan_holds_every_choice_once_and_each_token_once_per_worker(
    num_tokens: int, num_experts: int, num_workers: int, seed: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, min(num_experts, 8)))
    ids, weights = choices(num_tokens, top_k, num_experts, seed)
    worker_of = np.random.default_rng(seed).integers(0, num_workers, num_experts)
    plan = plan_dispatch(ids, weights, worker_of)
    expected = {(t, int(e), float(w)) for t in range(num_tokens) for e, w in zip(ids[t], weights[t], strict=True)}
    found: set[tuple[int, int, float]] = set()
    for share in plan.shares:
        assert share.num_rows == len(set(share.tokens.tolist())) > 0
        assert {int(worker_of[e]) for e in share.experts} == {share.worker}
        assert share.experts.tolist() == sorted(set(share.experts.tolist()))
        assert share.counts.sum() == len(share.pair_rows)
        assert not found & pairs_of(share)
        found |= pairs_of(share)
    assert found == expected
    elsewhere = np.random.default_rng(seed + 1).integers(0, num_workers, ids.shape)
    ids[np.random.default_rng(seed).random(ids.shape) < 0.1] = -1
    for workers in (None, elsewhere):
        one, other = (f(ids, weights, worker_of, workers) for f in (plan_dispatch, plan_in_numpy))
        assert one.num_tokens == other.num_tokens
        assert len(one.shares) == len(other.shares)
        for mine, theirs in zip(one.shares, other.shares, strict=True):
            for name in ("worker", "tokens", "experts", "counts", "pair_rows", "pair_weights"):
                a, b = np.asarray(getattr(mine, name)), np.asarray(getattr(theirs, name))
                assert name == "worker" or a.dtype == b.dtype
                assert np.array_equal(a, b)
    anew = [pairs_of(new) for share in plan.shares for new in replan(share, worker_of * 0, num_tokens)]
    assert set().union(*anew) == expected


@given(num_tokens=st.integers(1, 80), num_workers=st.integers(1, 5), seed=st.integers(0, 999))
def test_computed_shares_sum_to_what_one_worker_would_give(num_tokens: int, num_workers: int, seed: int) -> None:
    num_experts, top_k = 6, 3
    generator = torch.Generator().manual_seed(seed)
    weights = [
        ExpertWeights(
            gate_up=torch.randn(2 * D_FFN, D_MODEL, generator=generator),
            down=torch.randn(D_MODEL, D_FFN, generator=generator),
        )
        for _ in range(num_experts)
    ]
    experts = [PackedExpert(one) for one in weights]
    x = torch.randn(num_tokens, D_MODEL, generator=generator)
    ids, scores = choices(num_tokens, top_k, num_experts, seed)
    plan = plan_dispatch(ids, scores, np.arange(num_experts) % num_workers)
    answers = [
        (
            share,
            run_experts(
                rows_for(x, share),
                [experts[e] for e in share.experts],
                share.counts.tolist(),
                share.pair_rows.astype(np.int64),
                share.pair_weights,
                FORM,
            ),
        )
        for share in plan.shares
    ]
    expected = torch.zeros(num_tokens, D_MODEL, dtype=torch.float64)
    for token in range(num_tokens):
        for expert, score in zip(ids[token], scores[token], strict=True):
            one = weights[expert]
            hidden = gated((x[token] @ one.gate_up.T)[None], FORM)
            expected[token] += (hidden @ one.down.T)[0].double() * float(score)
    total = combine(answers, num_tokens, D_MODEL, torch.float32)
    torch.testing.assert_close(total, expected.float(), rtol=1e-4, atol=1e-4)
    assert needed_bytes(plan.shares, D_MODEL, 4) == sum(
        2 * share.num_rows * D_MODEL * 4 + 8 * len(share.pair_rows) for share in plan.shares
    )


def test_an_expert_or_worker_that_does_not_exist_is_an_error() -> None:
    weights = np.ones((2, 2), np.float32)
    with pytest.raises(IndexError):
        plan_dispatch(np.array([[0, 1], [2, 9]]), weights, np.zeros(4, np.int64))
    assert plan_dispatch(np.full((2, 2), -1), weights, np.zeros(4, np.int64)).shares == ()


def test_rows_that_do_not_match_the_plan_are_refused() -> None:
    ids, scores = choices(4, 2, 4, 0)
    plan = plan_dispatch(ids, scores, np.zeros(4, dtype=np.int64))
    with pytest.raises(ValueError, match="returned"):
        combine([(plan.shares[0], torch.zeros(3, D_MODEL))], 4, D_MODEL, torch.float32)


@given(num_pairs=st.integers(1, 90), num_rows=st.integers(1, 30), seed=st.integers(0, 999))
def test_a_weighted_sum_is_the_same_by_either_path(num_pairs: int, num_rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.integers(0, num_rows, num_pairs)
    scores = random.random(num_pairs, dtype=np.float32)
    values = torch.from_numpy(random.standard_normal((num_pairs, D_MODEL), dtype=np.float32))
    expected = torch.zeros(num_rows, D_MODEL, dtype=torch.float64)
    for value, row, score in zip(values, rows, scores, strict=True):
        expected[row] += value.double() * float(score)
    assert torch.equal(weighted_sum(values, rows, scores, num_rows, torch.float64), expected)


def test_routing_takes_live_homes_and_falls_back_on_any_live_worker() -> None:
    placement = Placement(epoch=1, worker_ids=("a", "b", "c"), homes=(((0,), (1,), (0, 1), (2,)),))
    assert route(placement, ["a", "b"], 1, 4)[0].worker_of.tolist()[:3] == [0, 1, 0]
    assert route(placement, ["b"], 1, 4)[0].worker_of.tolist() == [0, 0, 0, 0]
    again = [route(placement, live, 1, 4)[0].worker_of[3] for live in (["a", "b"], ["b", "a"])]
    assert ["a", "b"][again[0]] == ["b", "a"][again[1]]  # all routers choose the same
    assert len(route(Placement(epoch=0, worker_ids=(), homes=()), ["a"], 3, 5)) == 3


def test_decode_rows_are_grouped_so_that_padding_at_most_doubles_them() -> None:
    assert group_lengths([5, 60, 7]) == [[0, 1, 2]]
    assert group_lengths([4000, 30, 100, 70, 3000]) == [[1, 3, 2], [4, 0]]
