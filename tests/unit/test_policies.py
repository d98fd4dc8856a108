"""Eviction policies and quotas: who goes first, who is let in, and which layer pays."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.buffering.policies import POLICIES, Policy, make_policy
from collegium.buffering.quotas import Quotas


def filled(name: str, experts: list[int], layer: int = 0, **options: float) -> Policy:
    """Make a policy whose residents were visited and admitted one after another."""
    policy = make_policy(name, **options)  # pyright: ignore[reportArgumentType]
    for index in experts:
        policy.visit(layer, [index], [1], 1)
        policy.admit((layer, index))
    return policy


def order(policy: Policy, layer: int | None = 0) -> list[tuple[int, int]]:
    """Evict until nothing is left; gives who went when."""
    gone: list[tuple[int, int]] = []
    while (victim := policy.victim(layer, ())) is not None:
        policy.evict(victim)
        gone.append(victim)
    return gone


def test_an_unknown_policy_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'clock'.*lifo, fifo, lru, lfu, ewma"):
        make_policy("clock")


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_bears_the_name_under_which_it_is_made(name: str) -> None:
    assert make_policy(name).name == name


@pytest.mark.parametrize("name", POLICIES)
def test_there_is_no_victim_where_nothing_is_resident_or_all_is_spared(name: str) -> None:
    policy = filled(name, [1, 2])
    assert policy.victim(1, ()) is None
    assert policy.victim(0, {(0, 1), (0, 2)}) is None
    assert policy.victim(None, {(0, 1), (0, 2)}) is None


def test_lru_evicts_what_was_visited_longest_ago() -> None:
    policy = filled("lru", [1, 2, 3])
    policy.visit(0, [1], [1], 1)
    assert order(policy) == [(0, 2), (0, 3), (0, 1)]


def test_lru_counts_an_admission_that_no_visit_asked_for_as_recent() -> None:
    policy = filled("lru", [1, 2])
    policy.admit((0, 9))
    assert order(policy) == [(0, 1), (0, 2), (0, 9)]


def test_fifo_evicts_in_the_order_of_admission_whatever_is_visited() -> None:
    policy = filled("fifo", [1, 2, 3])
    policy.visit(0, [1], [1], 1)
    assert order(policy) == [(0, 1), (0, 2), (0, 3)]


def test_lifo_evicts_what_the_visit_does_not_use_first_and_of_that_the_newest() -> None:
    policy = filled("lifo", [1, 2, 3, 4])
    policy.visit(0, [2, 4], [1, 1], 1)
    assert order(policy) == [(0, 3), (0, 1), (0, 4), (0, 2)]


def test_lfu_evicts_by_visits_and_then_by_recency_and_remembers_what_it_evicted() -> None:
    policy = filled("lfu", [1, 2, 2, 3])
    assert policy.score((0, 2)) == 0.5
    assert order(policy) == [(0, 1), (0, 3), (0, 2)]
    policy.visit(0, [1, 2], [8, 1], 8)
    policy.admit((0, 1))
    policy.admit((0, 2))
    assert order(policy) == [(0, 1), (0, 2)]


def test_ewma_halves_in_eight_tokens_of_its_own_layer() -> None:
    policy = filled("ewma", [1])
    before = policy.score((0, 1))
    policy.visit(1, [5], [1000], 1000)
    assert policy.score((0, 1)) == before
    policy.visit(0, [2], [8], 8)
    assert policy.score((0, 1)) == pytest.approx(before / 2)
    assert policy.score((0, 2)) == pytest.approx(0.5)


def test_ewma_comes_to_the_uses_per_token_whatever_the_batch() -> None:
    for num_tokens in (1, 4, 64):
        policy = make_policy("ewma")
        for _ in range(200):
            policy.visit(3, [7, 8], [num_tokens, num_tokens / 4], num_tokens)
        assert policy.score((3, 7)) == pytest.approx(1.0)
        assert policy.score((3, 8)) == pytest.approx(0.25)


def test_ewma_remembers_what_it_evicted_and_breaks_ties_by_recency() -> None:
    policy = make_policy("ewma")
    policy.visit(0, [1, 2], [1, 1], 1)
    policy.admit((0, 2))
    policy.admit((0, 1))
    policy.visit(0, [3], [1], 1)
    policy.admit((0, 3))
    assert policy.score((0, 1)) == policy.score((0, 2)) > 0
    assert order(policy) == [(0, 1), (0, 2), (0, 3)]
    assert policy.score((0, 1)) == policy.score((0, 2)) > 0


def test_ewma_weighs_layers_against_each_other() -> None:
    policy = make_policy("ewma")
    for layer, times in ((0, 1), (1, 9), (2, 3)):
        for _ in range(times):
            policy.visit(layer, [5], [1], 1)
        policy.admit((layer, 5))
    assert order(policy, None) == [(0, 5), (2, 5), (1, 5)]


def test_ewma_keeps_its_order_when_a_layer_has_decayed_out_of_reach() -> None:
    policy = filled("ewma", [1, 1, 2])
    for _ in range(600):
        policy.visit(0, [3], [8], 8)
    policy.visit(0, [4], [1], 1)
    for index in (4, 3):
        policy.admit((0, index))
    assert order(policy) == [(0, 2), (0, 1), (0, 4), (0, 3)]
    assert policy.score((0, 3)) == pytest.approx(0.5 ** (1 / 8))


def test_a_home_counts_as_so_many_more_uses() -> None:
    policy = filled("ewma", [1, 2], home_bonus=0.5)
    plain = policy.score((0, 1))
    policy.set_homes([(0, 1), (4, 4)])
    assert policy.score((0, 1)) == pytest.approx(plain + 0.5)
    assert policy.score((4, 4)) == 0.5
    assert order(policy) == [(0, 2), (0, 1)]


def test_without_a_bonus_homes_change_nothing() -> None:
    policy = filled("ewma", [1, 2])
    policy.set_homes([(0, 1)])
    assert order(policy) == [(0, 1), (0, 2)]


def test_every_policy_lets_everyone_in_unless_it_is_selective() -> None:
    for name in POLICIES:
        assert filled(name, [1, 1, 1, 2]).is_worth((0, 9), (0, 1))


def test_a_selective_ewma_learns_to_keep_out_newcomers_that_are_not_used_again() -> None:
    policy = make_policy("ewma", is_selective=True)
    policy.admit((0, 0))
    answers: list[bool] = []
    for newcomer in range(1, 400):
        policy.visit(0, [0, newcomer], [1, 1], 1)
        policy.visit(0, [newcomer + 1000], [1], 1)
        answers.append(policy.is_worth((0, newcomer + 1000), (0, 0)))
    assert not any(answers[-50:])


def test_a_selective_ewma_goes_on_letting_in_newcomers_that_are_used_again() -> None:
    policy = make_policy("ewma", is_selective=True)
    for index in range(400):
        policy.visit(0, [index], [1], 1)
        assert policy.is_worth((0, index), (0, max(0, index - 2)))
        policy.visit(0, [index], [1], 1)


steps = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
        st.booleans(),
        st.booleans(),
    ),
    max_size=30,
)


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40)
@given(steps=steps)
def test_a_victim_is_resident_not_spared_and_asking_for_it_changes_nothing(
    name: str, steps: list[tuple[int, list[int], bool, bool]]
) -> None:
    policy = make_policy(name, is_selective=True)
    resident: set[tuple[int, int]] = set()
    for layer, experts, is_admitting, from_all in steps:
        policy.visit(layer, experts, [1] * len(experts), len(experts))
        if is_admitting:
            for index in experts:
                policy.admit((layer, index))
                resident.add((layer, index))
        spared = {(layer, index) for index in experts}
        asked = None if from_all else layer
        eligible = {expert_id for expert_id in resident if asked in (None, expert_id[0])} - spared
        victim = policy.victim(asked, spared)
        assert (victim in eligible) if eligible else (victim is None)
        assert policy.victim(asked, list(spared)) == victim
        if victim is not None:
            policy.evict(victim)
            resident.remove(victim)
    assert set(order(policy, None)) == resident


@given(steps=steps)
def test_lru_agrees_with_a_list_in_order_of_use(steps: list[tuple[int, list[int], bool, bool]]) -> None:
    policy = make_policy("lru")
    used: list[tuple[int, int]] = []
    resident: set[tuple[int, int]] = set()
    for layer, experts, _, from_all in steps:
        policy.visit(layer, experts, [1] * len(experts), 1)
        for index in experts:
            expert_id = (layer, index)
            used = [one for one in used if one != expert_id] + [expert_id]
            if expert_id not in resident:
                policy.admit(expert_id)
                resident.add(expert_id)
        if len(resident) > 5:
            asked = None if from_all else layer
            victim = policy.victim(asked, ())
            assert victim == next(one for one in used if one in resident and asked in (None, one[0]))
            policy.evict(victim)
            resident.remove(victim)


def test_quotas_begin_even_and_go_to_the_layer_that_gains_more() -> None:
    quotas = Quotas(2, 16, 16, even_share=0.5, every_visits=4)
    assert quotas.quotas == (8.0, 8.0)
    for turn in range(64):
        quotas.visit(0, [0, 1], [1, 1], 1)  # needs two slots and no more
        quotas.visit(1, [turn % 16, (turn + 5) % 16], [1, 1], 1)
    assert quotas.quotas == (4.0, 12.0)


@given(data=st.data(), num_layers=st.integers(1, 5), num_experts=st.integers(1, 12), num_slots=st.integers(0, 80))
def test_quotas_hand_out_all_slots_and_never_name_a_layer_that_has_nothing_to_give(
    data: st.DataObject, num_layers: int, num_experts: int, num_slots: int
) -> None:
    quotas = Quotas(num_layers, num_experts, num_slots, every_visits=1)
    some = st.lists(st.integers(0, num_experts - 1), min_size=1, max_size=4, unique=True)
    for _ in range(3):
        for layer in range(num_layers):
            experts = data.draw(some)
            quotas.visit(layer, experts, [1] * len(experts), 1)
    assert sum(quotas.quotas) == min(num_slots, num_layers * num_experts)
    resident = data.draw(st.lists(st.integers(0, 4), min_size=num_layers, max_size=num_layers))
    layer = data.draw(st.integers(0, num_layers - 1))
    if any(resident):
        assert resident[quotas.layer_to_shrink(layer, resident)]
    else:
        with pytest.raises(ValueError, match="no layer"):
            quotas.layer_to_shrink(layer, resident)


def test_an_insertion_takes_its_slot_from_the_layer_furthest_above_its_quota_and_from_its_own_on_a_tie() -> None:
    quotas = Quotas(3, 8, 12)
    assert quotas.layer_to_shrink(0, [3, 6, 3]) == 1
    assert quotas.layer_to_shrink(0, [4, 5, 3]) == 0
    assert quotas.layer_to_shrink(2, [4, 5, 4]) == 2
