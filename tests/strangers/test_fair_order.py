"""What one caller asks for never holds up the others for long: choices, long prompts, scores, unread streams.

The scheduler alone, in steps instead of seconds.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.model.sampling import SamplingParams
from router_svc.kv_blocks import BLOCK_TOKENS, BlockPool, num_blocks_for
from router_svc.scheduler import Scheduler
from router_svc.sequence import Finish, Sequence, StopRules
from router_svc.step import Step

_fresh = itertools.count(1)


def request(
    name: str, *, prompt: int = 20, output: int = 8, choices: int = 1, is_score: bool = False, caller: int = 0
) -> list[Sequence]:
    """Make the sequences of one request; its prompt begins like no other."""
    first = next(_fresh)
    made: list[Sequence] = []
    for choice in range(choices):
        made.append(
            Sequence(
                owner=0,
                request_id=name,
                choice_index=choice,
                prompt_ids=[first] * prompt,
                sampling=SamplingParams(),
                rules=StopRules(max_tokens=output),
                is_score=is_score,
                caller=caller,
                leader=made[0] if made else None,
            )
        )
    return made


def add(scheduler: Scheduler, *requests: Iterable[Sequence]) -> None:
    for one in itertools.chain.from_iterable(requests):
        scheduler.add(one)


def compute(scheduler: Scheduler, step: Step) -> None:
    """Do what the engine does after a step."""
    scheduler.commit(step)
    for row in step.rows:
        one = row.sequence
        if row.reaches_end and not one.has_ended:
            if one.is_score:
                one.finish = Finish.STOP
            else:
                one.append(7)
        if one.has_ended:
            scheduler.end(one)


def run(scheduler: Scheduler, num_steps: int, shared_rows: int | None = None) -> list[Step]:
    """Compute so many steps, or as many as there are."""
    steps: list[Step] = []
    for _ in range(num_steps):
        step = scheduler.schedule(shared_rows)
        if step is None:
            break
        compute(scheduler, step)
        steps.append(step)
    return steps


def steps_until(scheduler: Scheduler, one: Sequence, limit: int = 10_000) -> int:
    """Count steps until a sequence has its first token."""
    for count in range(limit):
        if one.output_ids or one.has_ended:
            return count
        assert run(scheduler, 1), "nothing is computed while a sequence waits"
    raise AssertionError(f"no token within {limit} steps")


def test_one_more_request_is_admitted_before_the_next_choice_of_sixty_that_want_sixty_four_each() -> None:
    scheduler = Scheduler(BlockPool(4096), max_batch_tokens=512, max_num_seqs=128)
    flood = [request(f"flood-{i}", choices=64, output=40 + i % 7) for i in range(60)]
    add(scheduler, *flood)
    run(scheduler, 20)
    assert scheduler.num_running == 128
    (late,) = request("late", prompt=50)
    add(scheduler, [late])
    while scheduler.num_running == 128:  # until the first places are free
        run(scheduler, 1)
    run(scheduler, 1)
    assert late.is_running
    assert steps_until(scheduler, late) <= 2
    assert len([one for one in itertools.chain.from_iterable(flood) if not one.is_running and not one.has_ended]) > 3500


def test_places_are_shared_by_requests_not_by_choices() -> None:
    scheduler = Scheduler(BlockPool(4096), max_batch_tokens=512, max_num_seqs=16)
    greedy = request("greedy", choices=64, output=30)
    add(scheduler, greedy)
    run(scheduler, 5)
    others = [request(f"other-{i}", output=200)[0] for i in range(8)]
    add(scheduler, others)
    run(scheduler, 40)
    assert all(one.is_running for one in others)
    assert sum(one.is_running for one in greedy) == 8
    run(scheduler, 1000)
    assert all(one.has_ended for one in [*greedy, *others])


def test_one_callers_hundreds_of_requests_give_a_place_to_another_caller_at_once() -> None:
    scheduler = Scheduler(BlockPool(4096), max_batch_tokens=512, max_num_seqs=128)
    add(scheduler, *(request(f"flood-{i}", output=400, caller=1) for i in range(300)))
    run(scheduler, 20)
    assert scheduler.num_running == 128
    for number in range(5):
        (other,) = request(f"other-{number}", output=8, caller=2)
        add(scheduler, [other])
        assert steps_until(scheduler, other) <= 2
        run(scheduler, 8)
        assert other.has_ended
    assert scheduler.num_preemptions == 5
    run(scheduler, 10_000)
    assert scheduler.num_running == scheduler.num_waiting == 0


def test_callers_come_to_have_as_many_places_and_then_take_none_from_each_other() -> None:
    scheduler = Scheduler(BlockPool(4096), max_batch_tokens=512, max_num_seqs=12)
    flood = [request(f"flood-{i}", output=300, caller=1)[0] for i in range(40)]
    add(scheduler, flood)
    run(scheduler, 10)
    others = [request(f"other-{caller}-{i}", output=300, caller=caller)[0] for caller in (2, 3) for i in range(40)]
    add(scheduler, others)
    run(scheduler, 20)
    running = [one.caller for one in [*flood, *others] if one.is_running]
    assert sorted(running) == [1] * 4 + [2] * 4 + [3] * 4
    num_preemptions = scheduler.num_preemptions
    assert num_preemptions == 8
    run(scheduler, 100)
    assert scheduler.num_preemptions == num_preemptions


@given(
    asked=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 6)),
        min_size=1,
        max_size=40,
    ),
    shared_rows=st.none() | st.integers(1, 40),
)
@settings(max_examples=100, deadline=None)
def test_whoever_asks_for_whatever_every_sequence_ends(
    asked: list[tuple[int, int, int, int, int]], shared_rows: int | None
) -> None:
    scheduler = Scheduler(BlockPool(64), max_batch_tokens=32, max_num_seqs=5)
    made: list[Sequence] = []
    for number, (caller, prompt, output, choices, steps) in enumerate(asked):
        made += request(f"r-{number}", prompt=prompt, output=output, choices=choices, caller=caller)
        add(scheduler, made[-choices:])
        run(scheduler, steps, shared_rows)
    run(scheduler, 20_000, shared_rows)
    assert all(one.has_ended for one in made)
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.pool.num_free == 64


def test_the_last_choice_of_a_request_is_served_while_new_requests_keep_coming() -> None:
    scheduler = Scheduler(BlockPool(256), max_batch_tokens=64, max_num_seqs=4)
    greedy = request("greedy", choices=12, output=4)
    add(scheduler, greedy)
    for number in range(400):  # more than can be served
        add(scheduler, request(f"new-{number}", prompt=4, output=4), request(f"also-{number}", prompt=4, output=4))
        run(scheduler, 1)
        if all(one.has_ended for one in greedy):
            break
    assert number < 200
    assert scheduler.num_waiting > 50  # the new ones did queue up


def test_a_short_prompt_has_its_first_token_while_sixteen_long_scores_are_computed() -> None:
    scheduler = Scheduler(BlockPool(8192), max_batch_tokens=512, max_num_seqs=128)
    scorers = [request(f"score-{i}", prompt=6000, is_score=True)[0] for i in range(16)]
    add(scheduler, scorers)
    run(scheduler, 3)
    (short,) = request("short", prompt=100, output=50)
    add(scheduler, [short])
    assert steps_until(scheduler, short) <= 2
    before = len(short.output_ids)
    run(scheduler, 20)
    assert len(short.output_ids) == before + 20  # and each next token in the next step
    assert not any(one.has_ended for one in scorers[2:])


def test_a_long_prompt_is_computed_however_many_short_ones_come() -> None:
    scheduler = Scheduler(BlockPool(8192), max_batch_tokens=64, max_num_seqs=128)
    (long,) = request("long", prompt=1600, output=2)
    add(scheduler, [long])
    for number in range(1600 // 16 + 2 * 8 + 10):  # a quarter of each step, and its turn may come late
        add(
            scheduler,
            request(f"short-{number}-a", prompt=60, output=1),
            request(f"short-{number}-b", prompt=60, output=1),
        )
        run(scheduler, 1)
    assert long.output_ids


def test_decoding_goes_on_beside_the_prompts_that_came_before() -> None:
    scheduler = Scheduler(BlockPool(512), max_batch_tokens=8, max_num_seqs=8)
    (long,), (early,) = request("long", prompt=400), request("early", prompt=4, output=100)
    add(scheduler, [long])
    run(scheduler, 1)
    scheduler.pause(long, is_paused=True)
    add(scheduler, [early])
    run(scheduler, 1)
    scheduler.pause(long, is_paused=False)
    assert early.output_ids and long.is_running and not long.output_ids
    assert [[row.sequence for row in step.decodes] for step in run(scheduler, 50)] == [[early]] * 50
    assert long.num_computed == 8 + 50 * 7


@pytest.mark.parametrize("can_tell", [True, False])  # whether the scheduler is told of a pause, or finds out
def test_hundreds_of_unread_streams_keep_no_place_and_no_block_from_a_caller_who_reads(can_tell: bool) -> None:
    scheduler = Scheduler(BlockPool(64), max_batch_tokens=64, max_num_seqs=4)
    unread = [request(f"unread-{i}", prompt=24, output=60)[0] for i in range(300)]

    def pause(one: Sequence, is_paused: bool) -> None:
        if can_tell:
            scheduler.pause(one, is_paused=is_paused)
        else:
            one.is_paused = is_paused

    add(scheduler, unread)
    run(scheduler, 3)
    for one in unread:
        pause(one, True)
    (reads,) = request("reads", prompt=24, output=900)
    add(scheduler, [reads])
    assert steps_until(scheduler, reads) <= 2
    run(scheduler, 899)
    assert reads.has_ended
    for one in unread:
        pause(one, False)
    run(scheduler, 100_000)
    assert all(len(one.output_ids) == 60 for one in unread)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_further_choices_share_the_first_ones_prompt_though_others_are_admitted_between() -> None:
    scheduler = Scheduler(BlockPool(1024), max_batch_tokens=64, max_num_seqs=16)
    choices = request("r", prompt=200, choices=8, output=30)
    add(scheduler, choices, *(request(f"other-{i}", prompt=30) for i in range(6)))
    run(scheduler, 1000)
    assert [one.num_cached for one in choices[1:]] == [200 // BLOCK_TOKENS * BLOCK_TOKENS] * 7


def test_an_oldest_request_that_lacks_blocks_waits_for_a_bounded_number_of_others() -> None:
    scheduler = Scheduler(BlockPool(20), max_batch_tokens=64, max_num_seqs=8)
    add(scheduler, *(request(f"first-{i}", prompt=16, output=16) for i in range(8)))
    run(scheduler, 2)
    (large,) = request("large", prompt=16 * 18, output=2)
    add(scheduler, [large])
    for number in range(2000):
        add(scheduler, request(f"small-{number}", prompt=16, output=16))
        run(scheduler, 1)
        if large.output_ids:
            break
    assert large.output_ids


def num_calls(scheduler: Scheduler) -> int:
    """Count the calls of Python functions in one schedule()."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        step = scheduler.schedule()
    finally:
        sys.setprofile(None)
    assert step is not None
    compute(scheduler, step)
    return count


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_step_costs_no_more_with_thousands_waiting(is_paused: bool) -> None:
    def cost(num_waiting: int) -> int:
        scheduler = Scheduler(BlockPool(4096), max_batch_tokens=512, max_num_seqs=32)
        add(scheduler, *(request(f"running-{i}", output=1000) for i in range(32)))
        run(scheduler, 4)
        for number in range(num_waiting):
            (one,) = request(f"waiting-{number}")
            scheduler.add(one)
            scheduler.pause(one, is_paused=is_paused)
        run(scheduler, 200)
        return sum(num_calls(scheduler) for _ in range(50))

    assert cost(4000) <= 1.1 * cost(32)


@settings(max_examples=60)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 90), st.integers(1, 20), st.integers(1, 5), st.booleans()), min_size=1, max_size=12
    ),
    num_blocks=st.integers(7, 30),
    budget=st.integers(1, 60),
    seats=st.integers(1, 8),
    num_callers=st.integers(1, 4),  # one of them is nobody
    moves=st.lists(
        st.tuples(st.integers(0, 60), st.sampled_from(["pause", "tell", "go on", "cancel", "add", "step"])), max_size=30
    ),
)
def test_every_sequence_that_is_read_is_served_and_every_block_comes_back(
    requests: list[tuple[int, int, int, bool]],
    num_blocks: int,
    budget: int,
    seats: int,
    num_callers: int,
    moves: list[tuple[int, str]],
) -> None:
    scheduler = Scheduler(BlockPool(num_blocks), max_batch_tokens=budget, max_num_seqs=seats)
    coming = [
        request(
            str(i),
            prompt=prompt,
            output=min(output, 7 * BLOCK_TOKENS - prompt),
            choices=choices,
            is_score=score,
            caller=i % num_callers,
        )
        for i, (prompt, output, choices, score) in enumerate(requests)
    ]
    assert all(num_blocks_for(len(one.prompt_ids) + one.rules.max_tokens) <= 7 for (one, *_) in coming)
    known: list[Sequence] = []
    while coming or moves:
        at, move = moves.pop() if moves else (0, "add")
        if move == "add" and coming:
            add(scheduler, coming[0])
            known += coming.pop(0)
        if known and not (one := known[at % len(known)]).has_ended:
            if move == "cancel":
                one.finish = Finish.CANCELLED
                scheduler.end(one)
            elif move in ("pause", "go on"):
                one.is_paused = move == "pause"
            elif move == "tell":
                scheduler.pause(one, is_paused=not one.is_paused)
        assert scheduler.num_waiting == sum(not one.is_running and not one.has_ended for one in known)
        for step in run(scheduler, 1):
            assert step.num_rows <= budget
            assert scheduler.num_running <= seats
            assert not any(row.sequence.is_paused for row in step.rows)
        assert scheduler.num_waiting_tokens == sum(
            one.num_remaining for one in known if not one.has_ended and not (one.is_running and one.is_decoding)
        )
    run(scheduler, 20_000)
    assert all(one.has_ended or one.is_paused for one in known)
    for one in known:
        one.is_paused = False
    run(scheduler, 20_000)
    assert all(one.has_ended for one in known)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens) == (0, 0, 0)
    assert scheduler.pool.num_free == num_blocks
    assert not scheduler._waiting._lines
    assert not scheduler._waiting._callers
