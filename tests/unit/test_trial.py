"""Two ways that take turns: the better one stays, is tried again after a pause, and the pause grows while it wins."""

from __future__ import annotations

from statistics import median

from expert_svc.trial import Trial

NUM_TURNS = 4


def faster(with_it: list[float], without_it: list[float]) -> bool | None:
    return median(with_it) >= median(without_it) if with_it and without_it else None


def run(trial: Trial, now_s: float, *, on: float, off: float) -> None:
    """Measure rates for one trial."""
    for _ in range(2 * NUM_TURNS):
        assert not trial.is_resting(now_s)
        trial.add(on if trial.is_on else off)
        trial.end_turn(now_s)


def test_the_better_way_stays_whichever_was_in_use_and_the_pause_doubles_while_it_wins() -> None:
    trial = Trial(faster, is_on=True, num_turns=NUM_TURNS)
    now_s, pauses = 0.0, list[float]()
    for on in (1.0, 1.0, 1.0, 3.0):
        run(trial, now_s, on=on, off=2.0)
        assert trial.is_on == (on > 2.0)
        began_s = now_s
        while trial.is_resting(now_s):
            now_s += 1.0
        pauses.append(now_s - began_s)
    assert pauses == [20.0, 40.0, 80.0, 20.0]
    assert trial.num_trials == 4


def test_where_nothing_can_be_told_the_verdict_stands() -> None:
    trial = Trial(faster, is_on=False, num_turns=1)
    trial.end_turn(0.0)
    trial.end_turn(0.0)
    assert not trial.is_on and trial.num_trials == 1 and trial.is_resting(1.0)
