"""Planning as arithmetic: what every plan keeps, what the default reaches, and what a move may cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.balancing.domains import matter
from collegium.balancing.fleet import (
    EMPTY,
    Fleet,
    Floats,
    Ints,
    count_copies,
    count_moves,
    from_lists,
    make_fleet,
    max_loads,
    max_over_mean,
    weigh,
)
from collegium.balancing.forecast import forecast, persistence
from collegium.balancing.moves import Terms, rebalance
from collegium.balancing.policies import POLICIES
from collegium.balancing.replicated import EVEN, replicate

SMALL = np.array([[600.0, 560, 120, 120, 20, 10, 10, 10]])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Floats, Fleet]:
    """Loads and workers of any counts, speeds, sizes and domains, with slots for every expert."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    num_workers = draw(st.integers(1, 9))
    seed, kind = (
        draw(st.integers(0, 2**31)),
        draw(st.sampled_from(["lognormal", "equal", "one hot", "zero", "some zero"])),
    )
    rng = np.random.default_rng(seed)
    loads = rng.lognormal(0, 1.5, (num_layers, num_experts))
    if kind == "equal":
        loads[:] = 1.0
    elif kind == "one hot":
        loads[:, 0] += 50 * num_experts
    elif kind == "zero":
        loads[:] = 0.0
    elif kind == "some zero":
        loads[rng.random(loads.shape) < 0.5] = 0.0
    slots = rng.integers(0, 2 * num_experts // num_workers + 3, (num_layers, num_workers))
    for row in slots:  # workers of unequal memory, together enough
        while np.minimum(row, num_experts).sum() < num_experts:
            row[int(row.argmin())] += 1
    fleet = Fleet(
        num_slots=slots,
        speeds=rng.choice([0.5, 1.0, 1.0, 2.0], num_workers),
        domains=rng.integers(0, draw(st.integers(1, num_workers)), num_workers),
    )
    return loads, fleet


def check(experts: Ints, fleet: Fleet, num_experts: int, *, can_repeat: bool = False) -> None:
    """What every plan keeps: a home for every expert, capacities, and no expert twice on a worker."""
    assert (count_copies(experts, num_experts) >= 1).all()
    assert ((experts != EMPTY).sum(2) <= fleet.num_slots).all()
    if not can_repeat:
        for row in experts.reshape(-1, experts.shape[2]).tolist():
            seated = [e for e in row if e != EMPTY]
            assert len(set(seated)) == len(seated)


@settings(max_examples=60, deadline=None)
@given(cases())
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_plan_gives_every_expert_a_home_within_capacities(policy: str, case: tuple[Floats, Fleet]) -> None:
    loads, fleet = case
    experts = POLICIES[policy](loads[None], fleet)
    check(experts, fleet, loads.shape[1], can_repeat=policy == "eplb")
    assert np.array_equal(experts, POLICIES[policy](loads[None].copy(), fleet))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_default_is_never_less_even_than_the_policies_that_it_replaces(case: tuple[Floats, Fleet]) -> None:
    loads, fleet = case
    mine = max_over_mean(replicate(loads, fleet).experts, loads, fleet.speeds)
    greedy = max_over_mean(POLICIES["greedy"](loads[None], fleet), loads, fleet.speeds)
    if not matter(fleet.domains):
        assert (mine <= np.maximum(greedy, EVEN) * 1.1).all()
    assert (mine >= 1 - 1e-9).all()


@settings(max_examples=200, deadline=None)
@given(cases(), st.data())
def test_moving_keeps_what_plans_keep_whatever_there_was_before(
    case: tuple[Floats, Fleet], data: st.DataObject
) -> None:
    loads, fleet = case
    num_experts = loads.shape[1]
    seed = data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    # Any seats at all: of workers that had more room, that died (their rows are empty), or that are new.
    before = np.full((*fleet.num_slots.shape, num_experts), EMPTY, np.int64)
    for row in before.reshape(-1, num_experts):
        some = rng.permutation(num_experts)[: rng.integers(0, num_experts + 1)]
        row[: len(some)] = some
    terms = Terms(expert_bytes=np.full(len(loads), 100), byte_budget=data.draw(st.sampled_from([None, 0, 300])))
    outcome = rebalance(before, loads, fleet, target=1.02, terms=terms)
    check(outcome.experts, fleet, num_experts)
    assert count_moves(before, outcome.experts, num_experts) <= outcome.num_moves
    assert outcome.num_bytes == 100 * outcome.num_moves
    again = rebalance(before, loads, fleet, target=1.02, terms=terms)
    assert np.array_equal(outcome.experts, again.experts) and outcome.reasons == again.reasons
    if terms.byte_budget is None:
        more = rebalance(outcome.experts, loads, fleet, target=1.02, terms=terms)
        assert more.num_moves == 0


@settings(max_examples=60, deadline=None)
@given(cases())
def test_moving_from_a_plan_never_makes_a_layer_less_even(case: tuple[Floats, Fleet]) -> None:
    loads, fleet = case
    before = POLICIES["greedy"](loads[None], fleet)
    outcome = rebalance(before, loads, fleet, target=1.02, terms=Terms(expert_bytes=np.ones(len(loads), np.int64)))
    was, now = (max_over_mean(e, loads, fleet.speeds) for e in (before, outcome.experts))
    assert (now <= was + 1e-9).all()


def test_sixty_one_layers_are_even_in_every_layer() -> None:
    loads = np.random.default_rng(0).lognormal(0, 1, (61, 256))
    fleet = make_fleet(61, 32, 288)
    experts = replicate(loads, fleet).experts
    check(experts, fleet, 256)
    assert max_over_mean(experts, loads, fleet.speeds).max() <= 1.005


def test_the_small_example_reaches_the_optimum_with_even_splits() -> None:
    fleet = make_fleet(1, 8, 16)
    assert weigh(replicate(SMALL, fleet).experts, SMALL).sum(2).max() == pytest.approx(196.67, abs=0.01)
    assert weigh(POLICIES["eplb"](SMALL[None], fleet), SMALL).sum(2).max() == pytest.approx(232)


def test_after_drift_few_seats_change() -> None:
    rng = np.random.default_rng(1)
    loads = rng.lognormal(0, 1, (61, 256))
    fleet = make_fleet(61, 32, 288)
    base = replicate(loads, fleet).experts
    drifted = loads * rng.lognormal(0, 0.3, loads.shape)
    terms = Terms(expert_bytes=np.ones(61, np.int64))
    outcome = rebalance(base, drifted, fleet, target=1.02, terms=terms)
    assert max_over_mean(outcome.experts, drifted, fleet.speeds).max() <= 1.02
    assert count_moves(base, outcome.experts, 256) <= outcome.num_moves <= 40 * 61


def test_workers_of_unequal_speed_finish_together() -> None:
    loads = np.random.default_rng(1).lognormal(0, 1, (4, 64))
    fleet = make_fleet(4, 5, 83, speeds=[1, 2, 1, 0.5, 1])
    assert max_over_mean(replicate(loads, fleet).experts, loads, fleet.speeds).max() <= EVEN + 1e-9


def test_copies_stand_in_more_than_one_domain_and_the_plan_stays_even() -> None:
    loads = np.random.default_rng(2).lognormal(0, 1, (8, 128))
    domains = [w // 8 for w in range(16)]
    fleet = make_fleet(8, 16, 160, domains=domains)
    experts = replicate(loads, fleet).experts
    for layer in experts:
        for expert in range(128):
            homes = np.nonzero((layer == expert).any(1))[0].tolist()
            assert len(homes) == 1 or len({domains[w] for w in homes}) == 2
    assert max_over_mean(experts, loads, fleet.speeds).max() <= 1.01


def test_moves_bring_copies_into_another_domain_and_leave_them_there() -> None:
    fleet = make_fleet(1, 4, 12, domains=[0, 0, 1, 1])
    before = from_lists([[[0, 1], [2, 3], [4, 5], [6, 7]]], 4, 8)
    hot = np.array([[60.0, 10, 10, 10, 30, 10, 10, 10]])
    terms = Terms(expert_bytes=np.array([1]))
    outcome = rebalance(before, hot, fleet, target=1.02, terms=terms)
    homes = np.nonzero((outcome.experts[0] == 0).any(1))[0]
    assert {0, 1} == {int(fleet.domains[w]) for w in homes}
    turned = np.roll(hot, 3)
    again = rebalance(outcome.experts, turned, fleet, target=1.02, terms=terms)
    for expert in np.flatnonzero(count_copies(again.experts, 8)[0] > 1).tolist():
        assert len({int(fleet.domains[w]) for w in np.nonzero((again.experts[0] == expert).any(1))[0]}) == 2


def test_seats_cost_no_more_than_their_number_however_wide_they_are_laid_out() -> None:
    rng = np.random.default_rng(0)
    loads = rng.lognormal(0, 1, (1, 256))
    fleet = make_fleet(1, 32, 288)
    seats = replicate(loads, fleet).experts
    wide = np.full((1, 32, 256), EMPTY, np.int64)
    wide[:, :, 200 : 200 + seats.shape[2]] = seats
    terms = Terms(expert_bytes=np.array([1]))
    drifted = loads * rng.lognormal(0, 0.3, loads.shape)
    outcomes = [rebalance(one, drifted, fleet, target=1.02, terms=terms) for one in (seats, wide)]
    assert outcomes[1].experts.shape == outcomes[0].experts.shape
    assert outcomes[0].num_moves == outcomes[1].num_moves


def test_nothing_moves_where_the_gain_does_not_pay_and_the_reason_is_told() -> None:
    loads = np.array([[5.0, 5, 1, 1, 1, 1, 1, 1]])
    fleet = make_fleet(1, 2, 8)
    before = from_lists([[[0, 1, 2, 3], [4, 5, 6, 7]]], 2, 8)
    free = Terms(expert_bytes=np.array([1000]))
    dear = Terms(expert_bytes=np.array([1000]), seconds_per_byte=1.0, horizon_s=10.0)
    cheap = Terms(expert_bytes=np.array([1000]), seconds_per_byte=1e-6, horizon_s=10.0)
    assert rebalance(before, loads, fleet, target=1.02, terms=free).num_moves == 2
    assert rebalance(before, loads, fleet, target=1.02, terms=cheap).num_moves == 2
    outcome = rebalance(before, loads, fleet, target=1.02, terms=dear)
    assert outcome.num_moves == 0
    assert "would save" in outcome.reasons[0]


def test_a_byte_budget_goes_to_the_layer_that_gains_most() -> None:
    loads = np.array([[4.0, 4, 1, 1], [40.0, 40, 1, 1]])
    fleet = make_fleet(2, 2, 4)
    before = from_lists([[[0, 1], [2, 3]]] * 2, 2, 4)
    terms = Terms(expert_bytes=np.array([10, 10]), byte_budget=20)
    outcome = rebalance(before, loads, fleet, target=1.02, terms=terms)
    ratios = max_over_mean(outcome.experts, loads, fleet.speeds)
    assert ratios.tolist() == [pytest.approx(1.6), pytest.approx(1.0)]
    assert any("budget" in reason for reason in outcome.reasons)


def test_a_hot_expert_gets_a_copy_in_a_free_slot() -> None:
    loads = np.array([[70.0, 10, 10, 10]])
    fleet = make_fleet(1, 2, 6)
    before = from_lists([[[0, 1], [2, 3]]], 2, 4)
    outcome = rebalance(before, loads, fleet, target=1.02, terms=Terms(expert_bytes=np.array([1])))
    assert count_copies(outcome.experts, 4)[0, 0] == 2
    assert max_over_mean(outcome.experts, loads, fleet.speeds)[0] < 1.2


def test_experts_of_a_lost_worker_go_to_those_with_room_even_without_a_budget() -> None:
    loads = np.ones((1, 6))
    before = from_lists([[[0, 1], [2, 3], [4, 5]]], 2, 6)  # the third worker is gone
    terms = Terms(expert_bytes=np.array([1]), byte_budget=0)
    outcome = rebalance(before, loads, make_fleet(1, 2, 6), target=1.02, terms=terms)
    assert (count_copies(outcome.experts, 6) == 1).all()
    assert "had no home" in outcome.reasons[0]


def test_max_load_is_the_largest_share_of_any_window_and_avg_max_load_their_mean() -> None:
    experts = from_lists([[[0], [1]]], 2, 2)
    history = np.array([[[3.0, 1.0]], [[1.0, 1.0]]])
    assert max_loads(experts, history) == (0.75, 0.625)


def test_experts_that_are_busy_together_are_parted() -> None:
    together = np.array([1.0, 3.0, 1.0, 3.0])
    apart = 4.0 - together
    history = np.stack([together, together, apart, apart], 1)[:, None]  # [T, 1, 4]
    experts = POLICIES["anti_correlation"](history, make_fleet(1, 2, 4))
    assert {frozenset(row) for row in experts[0].tolist()} in (
        {frozenset({0, 2}), frozenset({1, 3})},
        {frozenset({0, 3}), frozenset({1, 2})},
    )


@pytest.mark.parametrize(
    ("placement", "why"), [([[[0, 0]]], "twice"), ([[[0, 9]]], "outside 0 to 3"), ([[[-2]]], "outside")]
)
def test_a_placement_that_cannot_be_is_refused(placement: list[list[list[int]]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_lists(placement, 1, 4)


def test_a_forecast_follows_the_newest_window_and_pulls_what_does_not_last_towards_the_mean() -> None:
    steady = np.array([[[1.0, 3.0]], [[1.0, 3.0]]])
    assert forecast(steady).tolist() == [[1.0, 3.0]]
    turned = np.array([[[1.0, 3.0]], [[3.0, 1.0]]])
    assert persistence(turned) == 0.5
    expected = forecast(turned)
    assert expected[0, 0] > expected[0, 1] and expected[0, 0] < 2 * 2 / 3 + 1
    assert forecast(turned[:1]).tolist() == turned[0].tolist()
