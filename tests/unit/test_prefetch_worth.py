"""What a worker finds out about itself: whether prefetching pays, and how near its hits come to Belady's MIN."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from expert_svc.prefetch_trial import PrefetchTrial
from expert_svc.regret import RegretSample


class Decoding:
    """A worker that decodes: each round takes what `cost` says, in seconds of its own clock."""

    def __init__(self, trial: PrefetchTrial, cost: Callable[[bool], float]):
        self.trial, self.cost, self.now_s = trial, cost, 0.0
        self.was_on = trial.is_on

    def round(self, num_rows: int = 4, idle_s: float = 0.0) -> None:
        self.was_on = self.trial.is_on
        self.now_s += self.cost(self.trial.is_on) + idle_s
        for layer in range(3):
            self.trial.note(self.now_s + layer * 1e-3, layer, num_rows)

    def until_decided(self, **round_of: float) -> None:
        """Decode until the next trial is over."""
        num_trials, rounds = self.trial.num_trials, 0
        while self.trial.num_trials == num_trials:
            self.round(**round_of)  # type: ignore[arg-type]
            rounds += 1
            assert rounds < 100_000


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize(("on_s", "off_s", "pays"), [(0.011, 0.010, False), (0.010, 0.011, True)])
def test_prefetching_is_switched_by_what_rounds_take(is_on: bool, on_s: float, off_s: float, pays: bool) -> None:
    decoding = Decoding(PrefetchTrial(is_on=is_on), lambda is_on: on_s if is_on else off_s)
    decoding.until_decided()
    assert decoding.trial.is_on == pays
    for _ in range(100):  # and stays so until it is tried again
        decoding.round()
        assert decoding.trial.is_on == pays


def test_both_modes_are_tried_in_turn_and_as_often() -> None:
    seen: list[bool] = []
    decoding = Decoding(PrefetchTrial(), lambda is_on: seen.append(is_on) or 0.01)  # type: ignore[func-returns-value]
    decoding.until_decided()
    switches = sum(one != other for one, other in pairwise(seen))
    assert switches >= 10
    assert abs(seen.count(True) - seen.count(False)) <= 1


def test_a_round_that_begins_with_the_other_mode_s_buffer_is_not_counted() -> None:
    rounds: dict[bool, int] = {}  # since a mode was switched to

    def cost(is_on: bool) -> float:
        rounds[is_on] = rounds.get(is_on, 0) + 1
        rounds.pop(not is_on, None)
        if is_on:
            return 0.010 if rounds[True] <= 2 else 0.013  # of four rounds; without the first, most are slow
        return 0.012

    decoding = Decoding(PrefetchTrial(), cost)
    decoding.until_decided()
    assert not decoding.trial.is_on


def test_time_in_which_nothing_was_asked_is_nobody_s_fault() -> None:
    decoding = Decoding(PrefetchTrial(), lambda is_on: 0.010 if is_on else 0.011)
    num_rounds = 0
    while not decoding.trial.num_trials:
        num_rounds += 1
        decoding.round(idle_s=30.0 if decoding.trial.is_on and num_rounds % 5 < 3 else 0.0)
    assert decoding.trial.is_on


def test_rounds_of_other_sizes_and_of_prompts_alone_are_not_compared() -> None:
    trial = PrefetchTrial()
    decoding = Decoding(trial, lambda is_on: 0.01)
    for step in range(1000):
        decoding.round(num_rows=step % 2 + 1)
        decoding.round(num_rows=0)
    assert (trial.num_trials, trial.is_on) == (0, True)


def test_it_goes_on_trying_more_and_more_seldom_and_changes_its_mind() -> None:
    decoding = Decoding(PrefetchTrial(), lambda is_on: 0.010 if is_on else 0.011)
    ended: list[float] = []
    for _ in range(9):
        decoding.until_decided()
        ended.append(decoding.now_s)
    pauses = [later - earlier for earlier, later in pairwise(ended)]
    assert pauses[0] < pauses[1] < pauses[2]
    assert pauses[-1] == pytest.approx(pauses[-2], rel=0.1)  # but it never gives up
    decoding.cost = lambda is_on: 0.012 if is_on else 0.011
    decoding.until_decided()
    assert not decoding.trial.is_on
    before = decoding.now_s
    decoding.until_decided()
    assert decoding.now_s - before < pauses[1]  # having changed its mind, it looks again soon


@pytest.mark.parametrize(("is_selective", "num_min_hits"), [(False, 300), (True, 400)])
def test_hits_over_min_s_are_those_of_a_case_worked_by_hand(is_selective: bool, num_min_hits: int) -> None:
    # 0 1 2 0 1 2 ... through two slots: MIN hits every other time, and two times of three where it need not insert.
    now = [0.0]
    sample = RegretSample(num_layers=1, num_experts=3, num_slots=2, is_selective=is_selective, clock=lambda: now[0])

    def visit(first: int, end: int) -> None:
        for at in range(first, end):
            sample.note(0, [at % 3], int(at >= 600 and at % 4 == 0))

    visit(0, 100)
    assert sample.min_ratio() is None  # too few to say
    visit(100, 1200)
    assert sample.min_ratio() is None  # asked again too soon
    now[0] += 60.0
    assert sample.min_ratio() == pytest.approx(150 / num_min_hits, rel=0.01)  # the latter half is judged
    visit(1201, 1900)
    now[0] += 1.0
    assert sample.min_ratio() == pytest.approx(150 / num_min_hits, rel=0.01)


def test_layers_share_the_slots_and_a_visit_of_several_experts_counts_each() -> None:
    sample = RegretSample(num_layers=2, num_experts=4, num_slots=4)
    for _ in range(600):  # two of layer 0 and two of layer 1 fit: nothing is ever missed
        sample.note(0, [0, 1], 1)
        sample.note(1, [2, 3], 2)
    assert sample.min_ratio() == 0.75
