"""The reference must not be a mirror: its distances are checked against sums done by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.checkpoints import Variant
from tests.oracle import CLEAR, Oracle, gate_gaps


def test_the_gap_of_a_plain_gate_is_between_the_last_chosen_and_the_first_left() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5, 2.25], [0.0, 0.0, 0.0, 0.0]])
    assert gate_gaps(SimpleNamespace(top_k=2), (None,), (logits, None, None)).tolist() == [0.25, 0.0]
    assert gate_gaps(SimpleNamespace(top_k=4), (None,), (logits, None, None)).tolist() == [math.inf, math.inf]
    assert gate_gaps(SimpleNamespace(num_chosen=1), (None,), logits)[0] == 0.5


def test_the_gap_of_a_grouped_gate_counts_groups_as_well() -> None:
    gate = SimpleNamespace(top_k=1, num_group=2, topk_group=1, topk_method="group_limited_greedy")
    logits = torch.tensor([[3.0, 1.0, 2.9, 2.8]])  # groups 3.0 against 2.9, then 3.0 against 1.0
    assert gate_gaps(gate, (None,), (logits,)).tolist() == [pytest.approx(0.1)]
    gate.topk_method = "greedy"
    gate.top_k = 3
    assert gate_gaps(gate, (None,), (logits,)).tolist() == [pytest.approx(1.8)]


def test_the_gap_of_a_biased_gate_is_in_sigmoid_scores_plus_bias() -> None:
    bias = torch.tensor([0.0, 0.0, 0.3])
    logits = torch.tensor([[0.0, 2.0, 0.0]])  # 0.5, 0.881, 0.8
    gap = gate_gaps(SimpleNamespace(top_k=1), (None, bias), (logits,))
    assert gap.tolist() == [pytest.approx(1 / (1 + math.exp(-2)) - 0.8)]


def test_the_gap_of_a_sparse_mixer_counts_the_edge_of_its_neighbourhood() -> None:
    gate = SimpleNamespace(top_k=2, router_jitter_noise=0.01)
    logits = torch.tensor([[10.0, 9.79, 5.0, 4.0]])  # 0.021 from the best, where 0.02 is the edge
    assert gate_gaps(gate, (None,), (logits,)).tolist() == [pytest.approx(0.001, abs=1e-6)]


def test_answers_are_clear_the_same_each_time_and_kept(oracle: Oracle) -> None:
    checkpoint = oracle.checkpoint("mixtral")
    chosen = oracle.choose_prompts(checkpoint, 2, max_tokens=8, lengths=(5, 9), seed=3)
    assert [len(one.prompt_ids) for one in chosen] == [5, 9]
    assert all(one.margin > CLEAR and one.gap > CLEAR and len(one.token_ids) == 8 for one in chosen)
    again = oracle.reference(checkpoint, [one.prompt_ids for one in chosen], max_tokens=8)
    assert [one.token_ids for one in again] == [one.token_ids for one in chosen]
    shorter = oracle.reference(checkpoint, [chosen[0].prompt_ids], max_tokens=3)
    assert shorter[0].token_ids == chosen[0].token_ids[:3]
    assert shorter[0].logprobs == pytest.approx(chosen[0].logprobs[:3], abs=1e-5)
    (scored,) = oracle.score(checkpoint, [chosen[0].prompt_ids + chosen[0].token_ids])
    assert scored[-8:] == pytest.approx(chosen[0].logprobs, abs=1e-5)


def test_a_checkpoint_is_made_once_and_sharded_where_asked(oracle: Oracle) -> None:
    assert oracle.checkpoint("olmoe") == oracle.checkpoint("olmoe")
    assert len(list(oracle.checkpoint("olmoe", Variant.SHARDED).glob("*.safetensors"))) > 3
