"""How steps are split, how parts take turns, and when splitting is chosen."""

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from collegium.model.sampling import SamplingParams
from router_svc.micro_batches import MicroBatching
from router_svc.sequence import Sequence, StopRules
from router_svc.shared_experts import wrap
from router_svc.step import Row, Step
from router_svc.turns import by_turns, pause


def sequence(number: int) -> Sequence:
    return Sequence(
        owner=1,
        request_id=f"r{number}",
        choice_index=0,
        prompt_ids=[1] * 64,
        sampling=SamplingParams(),
        rules=StopRules(max_tokens=4),
    )


@given(
    num_decodes=st.integers(0, 6),
    chunks=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), max_size=4),
    num_parts=st.integers(1, 4),
)
def test_parts_hold_every_row_once_in_order_and_as_evenly_as_can_be(
    num_decodes: int, chunks: list[tuple[int, int]], num_parts: int
) -> None:
    decodes = tuple(Row(sequence=sequence(i), begin=40 + i, num_rows=1) for i in range(num_decodes))
    step = Step(
        decodes=decodes,
        chunks=tuple(Row(sequence=sequence(10 + i), begin=b, num_rows=n) for i, (b, n) in enumerate(chunks)),
    )
    if step.num_rows < num_parts:
        return
    parts = step.split(num_parts)

    def positions(one: Step) -> list[tuple[str, int, bool]]:
        return [(r.sequence.request_id, p, r in one.decodes) for r in one.rows for p in range(r.begin, r.end)]

    assert list(itertools.chain.from_iterable(map(positions, parts))) == positions(step)
    sizes = [part.num_rows for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_parts_take_turns_in_their_order_and_the_short_one_is_not_waited_for() -> None:
    log: list[str] = []

    def part(name: str, num_turns: int) -> Callable[[], str]:
        def run() -> str:
            for turn in range(num_turns):
                log.append(f"{name}{turn}")
                pause()
            return name

        return run

    entered: list[int] = []
    assert by_turns([part("a", 3), part("b", 1), part("c", 2)], entered.append) == ["a", "b", "c"]
    assert log == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert entered == [0, 1, 2, 0, 1, 2, 0, 2, 0]


def test_an_error_in_one_part_unwinds_the_others_and_goes_on() -> None:
    log: list[str] = []

    def waiting() -> None:
        try:
            pause()
            log.append("went on")
        finally:
            log.append("unwound")

    def failing() -> None:
        raise ValueError("this one")

    def never() -> None:
        log.append("started")

    with pytest.raises(ValueError, match="this one"):
        by_turns([waiting, failing, never], lambda _: None)
    assert log == ["unwound"]


def test_outside_of_turns_a_pause_is_nothing() -> None:
    pause()


def played(seconds_of: Callable[[int, int], float], rows: list[int], noise: float = 0.0) -> tuple[list[int], float]:
    """Serve steps of a machine where a step of so many rows in so many parts takes `seconds_of`: what was chosen, and
    the time of m = 1 over the time taken.
    """
    batching, draw = MicroBatching(), random.Random(5)
    chosen: list[int] = []
    whole = taken = 0.0
    for num_rows in rows:
        parts = batching.choose(num_rows, has_prompts=False)
        chosen.append(parts)
        seconds = seconds_of(num_rows, parts)
        whole += seconds_of(num_rows, 1)
        taken += seconds
        batching.note(
            num_rows,
            has_prompts=False,
            num_parts=parts,
            seconds=seconds * (1 + noise * draw.uniform(-1, 1)),
            blocked_s=0.5 * seconds,
        )
    return chosen, whole / taken


def bound_by_arithmetic(num_rows: int, parts: int) -> float:
    """Attention 1, experts 1, link 1 per row: parts overlap, and each pays a little more."""
    a = e = 1e-4 * num_rows / parts + 2e-5
    return max(parts * a, parts * e, a + e + 1e-4 * num_rows)


def bound_by_weights(num_rows: int, parts: int) -> float:
    """Each part reads all weights again, and the two sides share the cores."""
    return 2e-3 * parts


def test_where_parts_pay_the_best_number_of_them_is_found() -> None:
    chosen, gain = played(bound_by_arithmetic, [64] * 400, noise=0.1)
    best = min(range(1, 5), key=lambda m: bound_by_arithmetic(64, m))
    assert best > 1
    usual = sorted(chosen[200:])[100]
    assert bound_by_arithmetic(64, usual) <= 1.03 * bound_by_arithmetic(64, best)
    assert gain > 0.9 * bound_by_arithmetic(64, 1) / bound_by_arithmetic(64, best)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_where_parts_do_not_pay_trying_them_costs_less_than_a_fiftieth(noise: float) -> None:
    chosen, gain = played(bound_by_weights, [16] * 1000, noise)
    assert set(chosen[-200:]) == {1}
    assert gain > 0.98


def test_each_size_is_judged_for_itself() -> None:
    def mixed(num_rows: int, parts: int) -> float:
        return bound_by_weights(num_rows, parts) if num_rows < 32 else bound_by_arithmetic(num_rows, parts)

    chosen, _ = played(mixed, [16, 256] * 300)
    assert set(chosen[-100::2]) == {1}
    assert min(chosen[-99::2]) > 1


def test_what_nobody_waits_for_is_not_tried_to_be_hidden() -> None:
    batching = MicroBatching()
    for _ in range(200):
        assert batching.choose(8, has_prompts=True) == 1
        batching.note(8, has_prompts=True, num_parts=1, seconds=0.01, blocked_s=0.0001)


def test_a_fixed_number_is_cut_to_the_rows_and_another_than_1_to_4_is_refused() -> None:
    assert [MicroBatching(3).choose(n, has_prompts=False) for n in (1, 2, 3, 50)] == [1, 2, 3, 3]
    with pytest.raises(ValueError, match="5 micro-batches"):
        MicroBatching(5)


class Block(nn.Module):
    """A MoE block whose shared experts come before or after the routed ones; it logs who computes when."""

    def __init__(self, log: list[str], *, is_first: bool) -> None:
        super().__init__()
        self.log, self.is_first = log, is_first
        self.shared_experts: nn.Module = Doubling(log)

    def forward(self, x: torch.Tensor, routed: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if self.is_first:
            shared = self.shared_experts(x)
            return routed(x) + shared
        y = routed(x)
        return y + self.shared_experts(x[None])[0]


class Doubling(nn.Module):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.log.append("shared")
        return 2 * x


@pytest.mark.parametrize("is_first", [False, True])
def test_shared_experts_are_computed_while_rows_are_away(is_first: bool) -> None:
    log: list[str] = []
    block = Block(log, is_first=is_first)
    shared = wrap(block)
    assert shared is not None

    def routed(x: torch.Tensor, *, is_overlapped: bool = True) -> torch.Tensor:
        log.append("sent")
        if is_overlapped:
            shared.compute(x)
        log.append("received")
        shared.settle(x)
        return x.clone()

    first, second = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)
    assert torch.equal(block(first, routed), 3 * first)  # the order is learnt here
    log.clear()
    assert torch.equal(block(second, routed), 3 * second)
    assert log == ["sent", "shared", "received"]
    log.clear()
    assert torch.equal(block(first, lambda x: routed(x, is_overlapped=False)), 3 * first)  # whoever does not ask for it
    assert sorted(log) == ["received", "sent", "shared"]


def test_what_a_failed_pass_left_behind_is_not_taken_for_other_rows() -> None:
    log: list[str] = []
    block = Block(log, is_first=False)
    shared = wrap(block)
    assert shared is not None
    rows = torch.ones(2, 3)

    def routed(x: torch.Tensor) -> torch.Tensor:
        shared.settle(x)
        return x.clone()

    block(rows, routed)
    shared.compute(rows)  # and the pass ends here
    rows.fill_(5.0)
    shared.forget()
    assert torch.equal(block(rows, routed), 3 * rows)
