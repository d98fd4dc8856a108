"""Routers out of step are brought together by short waits, and waiting ends where it does not pay."""

import heapq
import random
from collections.abc import Callable

import pytest

from collegium.native.worker_end import join_until
from expert_svc.join_wait import JoinTrial

NUM_LAYERS = 12
ACTIVE = 6.0  # of its layers a router may be silent


class Met:
    """Where routers were met last, and how fast they go, as the native end keeps it."""

    def __init__(self, trial: JoinTrial):
        self.trial = trial
        self.routers: dict[str, tuple[int, float, float]] = {}  # layer, when, from layer to layer

    def note(self, router: str, layer: int, at: float) -> None:
        last, last_at, layer_s = self.routers.get(router, (-1, 0.0, 0.0))
        if last >= 0 and layer == (last + 1) % NUM_LAYERS:
            usual = layer_s or at - last_at
            layer_s = min(0.8 * usual + 0.2 * (at - last_at), 2 * usual)
        self.routers[router] = layer, at, layer_s
        if layer == 0:
            active = [one for one, (_, met, its) in self.routers.items() if at - met < ACTIVE * its]
            self.trial.note(router, active, 1, at)

    def until(self, layer: int, here: list[str], arrived: float) -> float:
        if not self.trial.is_on or len(self.routers) < 2:
            return 0.0
        links = [
            (last, round(at * 1e9), round(layer_s * 1e9), router in here)
            for router, (last, at, layer_s) in self.routers.items()
        ]
        return join_until(links, NUM_LAYERS, layer, round(arrived * 1e9)) * 1e-9


def served(
    wait: Met | None,
    *,
    attention_s: float,
    experts_s: Callable[[int], float],
    phase: float,
    duration_s: float = 3.0,
) -> tuple[float, float]:
    """Play two routers of one row each and a worker that serves one batch at a time, `experts_s(routers)` long.

    Returns layers served per second, and the share of them that was served for both together in the second half.
    """
    waiting: list[tuple[float, str, int]] = []  # arrived, router, layer
    coming = [(0.0, "a", 0), (phase * attention_s, "b", 5)]
    draw = random.Random(3)
    now = 0.0
    num_served = num_late = num_joined = 0
    while now < duration_s:
        while coming and coming[0][0] <= now:
            at, router, layer = heapq.heappop(coming)
            waiting.append((at, router, layer))
            if wait is not None:
                wait.note(router, layer, at)
        ready = soonest = None
        for at, _, layer in waiting:
            here = [r for _, r, its in waiting if its == layer]
            until = 0.0 if wait is None else wait.until(layer, here, at)
            if until <= now:
                ready = layer
                break
            soonest = until if soonest is None else min(soonest, until)
        if ready is None:
            times = [t for t in (soonest, coming[0][0] if coming else None) if t is not None]
            now = max(now + 1e-9, min(times))
            continue
        batch = [one for one in waiting if one[2] == ready]
        waiting = [one for one in waiting if one[2] != ready]
        now += experts_s(len(batch))
        num_served += len(batch)
        if now > duration_s / 2:
            num_late += len(batch)
            num_joined += len(batch) if len(batch) > 1 else 0
        for _, router, layer in batch:
            heapq.heappush(coming, (now + attention_s * draw.uniform(0.9, 1.1), router, (layer + 1) % NUM_LAYERS))
    return num_served / now, num_joined / num_late


def bound_by_weights(num_routers: int) -> float:
    return 2e-3


def bound_by_rows(num_routers: int) -> float:
    return 1e-4 * num_routers


@pytest.mark.parametrize("phase", [0.1, 0.5, 0.9])
def test_routers_five_layers_apart_come_together_and_each_expert_is_read_once_for_both(phase: float) -> None:
    wait = Met(JoinTrial(is_fixed=True))
    rate, joined = served(wait, attention_s=1e-3, experts_s=bound_by_weights, phase=phase)
    rate_without, joined_without = served(None, attention_s=1e-3, experts_s=bound_by_weights, phase=phase)
    assert joined_without < 0.1
    assert joined > 0.95
    assert rate > 1.2 * rate_without


def test_where_waiting_pays_the_trial_keeps_it() -> None:
    wait = Met(JoinTrial())
    rate, joined = served(wait, attention_s=1e-3, experts_s=bound_by_weights, phase=0.5, duration_s=20.0)
    assert wait.trial.is_on
    assert joined > 0.9
    assert rate > 1.15 * served(None, attention_s=1e-3, experts_s=bound_by_weights, phase=0.5)[0]


def test_where_waiting_does_not_pay_it_ends_and_costs_little() -> None:
    wait = Met(JoinTrial())
    rate, _ = served(wait, attention_s=1e-3, experts_s=bound_by_rows, phase=0.5, duration_s=20.0)
    assert not wait.trial.is_on
    assert rate > 0.97 * served(None, attention_s=1e-3, experts_s=bound_by_rows, phase=0.5)[0]


def test_nobody_waits_for_a_router_that_is_alone_idle_or_in_front() -> None:
    wait = Met(JoinTrial(is_fixed=True))
    for layer in range(5):
        wait.note("a", layer, 0.001 * layer)
    assert wait.until(4, ["a"], 0.004) == 0.0  # alone
    for layer in range(5):
        wait.note("b", layer, 0.0005 + 0.001 * layer)
    wait.note("a", 5, 0.005)
    assert wait.until(5, ["a"], 0.005) == pytest.approx(0.0055)  # b comes next: half a layer's time, and no longer
    assert wait.until(4, ["b"], 0.0045) == 0.0  # a is in front
    assert wait.until(5, ["a", "b"], 0.005) == 0.0  # all are here
    assert wait.until(5, ["a"], 0.1) == 0.0  # b has been silent for long


def test_a_trial_compares_the_same_routers_only() -> None:
    trial = JoinTrial(is_on=True)
    now = 0.0
    for round_number in range(400):  # a third router comes and goes: no block is ever whole
        active = ["a", "b"] if round_number // 5 % 2 else ["a", "b", "c"]
        for router in active:
            now += 0.001
            assert trial.note(router, active, 1, now)
    assert trial.num_trials == 0
