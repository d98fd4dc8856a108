"""Steps and KV blocks: nothing leaks, nobody starves, budgets hold, whatever comes and goes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.model.sampling import SamplingParams
from router_svc.kv_blocks import BLOCK_TOKENS, BlockPool, block_hash, num_blocks_for
from router_svc.scheduler import Scheduler
from router_svc.sequence import Finish, Sequence, StopRules
from router_svc.step import Step


def sequence(name: int, prompt: int, max_tokens: int = 4, *, common: bool = False, **fields: object) -> Sequence:
    ids = list(range(prompt)) if common else [1000 * (name + 1) + i for i in range(prompt)]
    return Sequence(
        owner=0,
        request_id=str(name),
        choice_index=0,
        prompt_ids=ids,
        sampling=SamplingParams(),
        rules=StopRules(max_tokens=max_tokens),
        **fields,  # type: ignore[arg-type]
    )


def compute(scheduler: Scheduler, step: Step) -> None:
    """Do what the engine does after a step: commit, draw a token, end what has ended."""
    scheduler.commit(step)
    for row in step.rows:
        if row.reaches_end and not row.sequence.has_ended:
            row.sequence.append(7)
        if row.sequence.has_ended:
            scheduler.end(row.sequence)


def run_to_end(scheduler: Scheduler, limit: int = 10_000) -> int:
    for count in range(limit):
        step = scheduler.schedule()
        if step is None:
            return count
        compute(scheduler, step)
    raise AssertionError("the scheduler does not come to an end")


@given(
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 30)), min_size=1, max_size=12),
    num_blocks=st.integers(7, 20),
    budget=st.integers(1, 60),
    seats=st.integers(1, 8),
)
def test_every_sequence_gets_all_its_tokens_and_every_block_comes_back(
    sizes: list[tuple[int, int]], num_blocks: int, budget: int, seats: int
) -> None:
    pool = BlockPool(num_blocks)
    scheduler = Scheduler(pool, max_batch_tokens=budget, max_num_seqs=seats)
    sequences = [sequence(i, prompt, output) for i, (prompt, output) in enumerate(sizes)]
    for one in sequences:
        scheduler.add(one)
    run_to_end(scheduler)
    assert [len(one.output_ids) for one in sequences] == [output for _, output in sizes]
    assert pool.num_free == num_blocks


@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=10),
    budget=st.integers(4, 40),
    moves=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["pause", "go on", "cancel"])), max_size=20),
)
def test_a_step_keeps_its_budget_and_no_block_has_two_writers_while_sequences_pause_and_end(
    sizes: list[int], budget: int, moves: list[tuple[int, str]]
) -> None:
    pool = BlockPool(12)
    scheduler = Scheduler(pool, max_batch_tokens=budget, max_num_seqs=6)
    sequences = [sequence(i, size, 8, common=True) for i, size in enumerate(sizes)]
    for one in sequences:
        scheduler.add(one)
    while moves or any(not s.has_ended and not s.is_paused for s in sequences):
        step = scheduler.schedule()
        if step is not None:
            assert step.num_rows <= budget
            written = Counter(
                row.sequence.blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS
                for row in step.rows
                for at in range(row.begin, row.end)
            )
            assert max(written.values()) == 1
            compute(scheduler, step)
        elif not moves:
            break
        if moves:
            idx, move = moves.pop()
            one = sequences[idx % len(sequences)]
            one.is_paused = move == "pause"
            if move == "cancel" and not one.has_ended:
                one.finish = Finish.CANCELLED
                scheduler.end(one)
    for one in sequences:
        one.is_paused = False
    run_to_end(scheduler)
    assert all(one.has_ended for one in sequences)
    assert pool.num_free == pool.num_blocks


def test_a_prompt_goes_in_chunks_beside_decode_rows() -> None:
    scheduler = Scheduler(BlockPool(64), max_batch_tokens=8, max_num_seqs=8)
    scheduler.add(sequence(0, 3, 20))
    compute(scheduler, scheduler.schedule() or pytest.fail("nothing to do"))
    scheduler.add(sequence(1, 20, 2))
    step = scheduler.schedule()
    assert step is not None
    assert step.kind == "mixed"
    assert [row.num_rows for row in step.rows] == [1, 7]


def test_a_repeated_prompt_computes_its_last_block_and_tail_alone() -> None:
    scheduler = Scheduler(BlockPool(64), max_batch_tokens=512, max_num_seqs=8)
    scheduler.add(sequence(0, 200, 1, common=True))
    run_to_end(scheduler)
    again = sequence(1, 205, 1, common=True)
    scheduler.add(again)
    step = scheduler.schedule()
    assert step is not None
    assert again.num_cached == 200 // BLOCK_TOKENS * BLOCK_TOKENS
    assert step.num_rows == 205 - again.num_cached


def test_a_score_computes_all_of_a_known_prompt() -> None:
    scheduler = Scheduler(BlockPool(64), max_batch_tokens=512, max_num_seqs=8)
    scheduler.add(sequence(0, 64, 1, common=True))
    run_to_end(scheduler)
    scheduler.add(sequence(1, 64, 1, common=True, is_score=True))
    step = scheduler.schedule()
    assert step is not None
    assert step.num_rows == 64


def test_a_stalled_reader_gives_way_to_those_who_read() -> None:
    scheduler = Scheduler(BlockPool(4), max_batch_tokens=64, max_num_seqs=1)
    stalled = sequence(0, 40, 20)
    scheduler.add(stalled)
    compute(scheduler, scheduler.schedule() or pytest.fail("nothing to do"))
    stalled.is_paused = True
    other = sequence(1, 40, 2)
    scheduler.add(other)
    run_to_end(scheduler)
    assert other.has_ended
    assert not stalled.has_ended
    stalled.is_paused = False
    run_to_end(scheduler)
    assert len(stalled.output_ids) == 20


def test_further_choices_wait_for_the_first_ones_prompt_and_then_share_it() -> None:
    scheduler = Scheduler(BlockPool(64), max_batch_tokens=16, max_num_seqs=8)
    leader = sequence(0, 40, 2, common=True)
    follower = sequence(0, 40, 2, common=True, leader=leader)
    scheduler.add(leader)
    scheduler.add(follower)
    while leader.num_computed < 40:
        step = scheduler.schedule()
        assert step is not None
        assert follower not in [row.sequence for row in step.rows]
        compute(scheduler, step)
    run_to_end(scheduler)
    assert follower.num_cached == 32
    # Nor is the prompt's content hashed again for each choice.
    assert [a is b for a, b in zip(follower.block_names(40), leader.block_names(40), strict=True)] == [True] * 2
    other = sequence(1, 40, 2, common=True)
    assert follower.block_names(41) == other.block_names(40)


def test_an_end_of_sequence_id_counts_only_after_min_tokens() -> None:
    one = sequence(0, 4, 9)
    one.rules = StopRules(max_tokens=9, min_tokens=2, eos_ids=frozenset({7}))
    assert one.banned_ids() == [7]
    one.append(5)
    one.append(7)  # as a replay might bring it
    assert not one.has_ended
    assert one.banned_ids() == ()
    one.append(7)
    assert (one.finish, one.stop_id) == (Finish.STOP, 7)


def test_blocks_released_twice_are_refused_and_names_depend_on_all_before() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(blocks)
    with pytest.raises(ValueError, match="3 KV blocks wanted"):
        pool.allocate(3)
    tokens = list(range(BLOCK_TOKENS))
    assert block_hash(b"", tokens) != block_hash(block_hash(b"", tokens), tokens)
    assert [num_blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_what_a_failed_sequence_computed_or_found_is_found_by_nobody() -> None:
    pool = BlockPool(64)
    scheduler = Scheduler(pool, max_batch_tokens=512, max_num_seqs=8)
    scheduler.add(sequence(0, 40, 1, common=True))
    run_to_end(scheduler)
    companion, failing = (sequence(name, 64, 8, common=True) for name in (1, 2))
    for one in (companion, failing):
        scheduler.add(one)
        compute(scheduler, scheduler.schedule() or pytest.fail("nothing to do"))
    assert companion.num_cached == 32
    assert failing.num_cached == 48
    scheduler.end(failing, has_failed=True)
    assert pool.find(companion.block_names(64)) == []
    run_to_end(scheduler)  # whoever holds such blocks goes on with them
    assert companion.has_ended
    later = sequence(3, 64, 1, common=True)
    scheduler.add(later)
    run_to_end(scheduler)
    assert later.num_cached == 0
    assert pool.num_free == pool.num_blocks
    assert len(pool.find(later.block_names(64))) == 4  # computed again, they are shared again


def test_what_others_computed_stays_findable_when_a_sequence_fails() -> None:
    pool = BlockPool(64)
    scheduler = Scheduler(pool, max_batch_tokens=512, max_num_seqs=8)
    good, failing = sequence(0, 64), sequence(1, 64)
    for one in (good, failing):
        scheduler.add(one)
    compute(scheduler, scheduler.schedule() or pytest.fail("nothing to do"))
    scheduler.end(failing, has_failed=True)
    assert len(pool.find(good.block_names(64))) == 4
    assert pool.find(failing.block_names(64)) == []
