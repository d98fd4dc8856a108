"""How many rows a step may have while several callers are served."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_svc.kv_blocks import BlockPool
from router_svc.pace import LEAST_ROWS, StepPace
from router_svc.scheduler import Scheduler
from tests.strangers.test_fair_order import add, compute, request, run

MAX_ROWS = 512


def after(pace: StepPace, num_steps: int, *, fixed_s: float, row_s: float, decodes: int = 0) -> int:
    """Have steps take a fixed time and a time for each row, as full as they may be; return the rows of the next."""
    for _ in range(num_steps):
        rows = pace.max_rows
        pace.note(rows, has_prompts=True, seconds=fixed_s + rows * row_s)
        if decodes:
            pace.note(decodes, has_prompts=False, seconds=fixed_s + decodes * row_s)
    return pace.max_rows


@given(
    bound_s=st.floats(0.005, 1.0), fixed_s=st.floats(0.0, 0.3), row_s=st.floats(1e-6, 1e-2), decodes=st.integers(0, 64)
)
@settings(max_examples=200, deadline=None)
def test_steps_come_to_take_as_long_as_they_may(bound_s: float, fixed_s: float, row_s: float, decodes: int) -> None:
    rows = after(StepPace(bound_s, MAX_ROWS), 200, fixed_s=fixed_s, row_s=row_s, decodes=decodes)
    takes_s, may_s = fixed_s + rows * row_s, bound_s
    if decodes:
        may_s = max(may_s, 3 * (fixed_s + decodes * row_s))
    assert LEAST_ROWS <= rows <= MAX_ROWS
    if rows > LEAST_ROWS:
        assert takes_s <= 1.05 * may_s
    if rows < MAX_ROWS:  # and no less than they may, where a row more would fit
        fits = (may_s - fixed_s) / row_s
        assert rows >= min(MAX_ROWS, max(LEAST_ROWS, 0.9 * fits - 2))


def test_nothing_is_bounded_before_anything_is_known_and_where_nothing_is_to_be() -> None:
    assert StepPace(0.05, MAX_ROWS).max_rows == MAX_ROWS
    assert after(StepPace(0.0, MAX_ROWS), 50, fixed_s=1.0, row_s=1.0) == MAX_ROWS
    assert after(StepPace(0.05, 8), 50, fixed_s=1.0, row_s=1.0) == 8


def test_a_short_prompt_says_nothing_of_what_a_row_of_a_long_one_takes() -> None:
    pace = StepPace(0.05, MAX_ROWS)
    rows = after(pace, 50, fixed_s=0.02, row_s=1e-4)
    for _ in range(100):
        pace.note(3, has_prompts=True, seconds=0.02)
    assert pace.max_rows == rows


@pytest.mark.parametrize(("bound_s", "max_rows"), [(-0.1, 512), (0.1, 0)])
def test_what_makes_no_sense_is_refused(bound_s: float, max_rows: int) -> None:
    with pytest.raises(ValueError, match="at least 0 and 1"):
        StepPace(bound_s, max_rows)


def scheduler_with(num_callers: int, *, decoding: int = 4) -> Scheduler:
    """Sequences that decode, and a long prompt of the last caller."""
    scheduler = Scheduler(BlockPool(8192), max_batch_tokens=MAX_ROWS, max_num_seqs=256)
    add(scheduler, *(request(f"decodes-{i}", prompt=2, output=1000, caller=1) for i in range(decoding)))
    run(scheduler, 1)
    add(scheduler, request("long", prompt=6000, caller=num_callers))
    return scheduler


@pytest.mark.parametrize(("num_callers", "rows"), [(1, MAX_ROWS), (2, 100)])
def test_prompts_get_fewer_rows_only_while_several_callers_are_served(num_callers: int, rows: int) -> None:
    scheduler = scheduler_with(num_callers)
    for _ in range(5):
        step = scheduler.schedule(100)
        assert step is not None
        assert (step.num_rows, len(step.decodes)) == (rows, 4)
        compute(scheduler, step)
    assert scheduler.num_shortened == (5 if num_callers > 1 else 0)
    step = scheduler.schedule()
    assert step is not None and step.num_rows == MAX_ROWS


def test_whoever_decodes_has_a_row_and_a_prompt_goes_on_however_small_the_bound() -> None:
    scheduler = scheduler_with(2, decoding=200)
    step = scheduler.schedule(50)
    assert step is not None
    assert len(step.decodes) == 200
    assert sum(row.num_rows for row in step.chunks) == LEAST_ROWS


def test_a_step_that_needed_no_more_rows_is_not_counted_as_shortened() -> None:
    scheduler = Scheduler(BlockPool(64), max_batch_tokens=MAX_ROWS, max_num_seqs=8)
    add(scheduler, *(request(f"short-{caller}", prompt=10, output=5, caller=caller) for caller in (1, 2)))
    for _ in range(4):
        step = scheduler.schedule(100)
        assert step is not None
        compute(scheduler, step)
    assert scheduler.num_shortened == 0
