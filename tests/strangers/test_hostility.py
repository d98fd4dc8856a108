"""Hostile inputs against one running cluster of real processes, with a canary that must not notice.

A further attack is one entry of a table in tests/strangers/rigs. Around each: the canary's answers stay right and in
time, nobody dies, nothing is logged as a fault of the server's own, and memory, descriptors and threads come back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.strangers.rigs import by_callers, by_links, by_peers, by_sockets
from tests.strangers.rigs.attack import Attack
from tests.strangers.rigs.canary import Visit, median_s, p99_s
from tests.strangers.rigs.footprint import peak_mb, reset_peak
from tests.strangers.rigs.target import Keeper, Target

ATTACKS = (*by_callers.ATTACKS, *by_sockets.ATTACKS, *by_peers.ATTACKS, *by_links.ATTACKS)
SHORT = tuple(attack for attack in ATTACKS if not attack.is_long)
# What a canary may wait on a machine that does much else. The exact bound is held in the long run, on a quiet machine.
SLOWEST_S, SLOW_S = 10.0, 1.5
SLOW_LONG_S = 0.5
AT_ONCE_S = 1.0
BACK_S = 30.0
NUM_CALM, NUM_CALM_LONG = 5, 300
LONG_S = 6.0


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    made = Keeper(lambda: tmp_path_factory.mktemp("target"))
    yield made
    made.close()


@pytest.mark.parametrize("attack", SHORT, ids=[attack.name for attack in SHORT])
def test_an_attack_harms_nobody_else(keeper: Keeper, attack: Attack) -> None:
    target = keeper.target()
    calm = target.wait_for_canary(NUM_CALM)
    visits = attacked(target, attack, attack.few)
    assert max(one.seconds for one in visits) < SLOWEST_S
    assert median_s(visits) <= max(2 * median_s(calm), SLOW_S)


@pytest.mark.soak
@pytest.mark.timeout(900)  # what dies again and again is started later and later
@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_an_attack_of_full_size_at_most_doubles_what_others_wait(keeper: Keeper, attack: Attack) -> None:
    target = keeper.target()
    calm = target.wait_for_canary(NUM_CALM_LONG)
    visits = attacked(target, attack, attack.many)
    until_s = time.monotonic() + LONG_S
    while time.monotonic() < until_s:
        visits += attacked(target, attack, attack.many)
    assert p99_s(visits) <= max(2 * p99_s(calm), SLOW_LONG_S), f"{p99_s(visits):.3f} s, calm {p99_s(calm):.3f} s"


def attacked(target: Target, attack: Attack, count: int) -> list[Visit]:
    """Attack, check what must hold whatever the attack, and return the canary's requests of that time."""
    before = target.footprints()
    since, began_s = len(target.lines), time.monotonic()
    for name in attack.peak_mb:
        reset_peak(target.pids[name])
    try:
        attack.run(target, count)
    except AssertionError as error:
        error.add_note("\n".join(target.tracebacks(since)[:3]))
        raise
    peaks = {name: peak_mb(target.pids[name]) - before[name].rss_mb for name in attack.peak_mb}
    after = target.wait_for_canary(2)
    visits = target.canary.visits(began_s, after[-1].ended_s)
    target.check_alive()
    errors = [one.error for one in visits if one.error]
    assert not errors, errors[:3]
    faults = target.tracebacks(since)
    assert not faults, faults[:3]
    for name, limit_mb in attack.peak_mb.items():
        assert peaks[name] <= limit_mb, f"{name} took {peaks[name]:.0f} MiB more for a moment"
    if target.wait_until_back(before, AT_ONCE_S, attack.restarts):
        # What is made once, such as a pool's threads, is there now: a second attack must leave nothing.
        before = target.footprints()
        attack.run(target, count)
        kept = target.wait_until_back(before, BACK_S, attack.restarts)
        assert not kept, kept
    return visits
