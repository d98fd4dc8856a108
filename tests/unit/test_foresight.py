"""What a gate foretells: the next layer's choices on every architecture, and how it is told to workers."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from collegium.link.base import LinkStats, RouterLink
from collegium.link.frame import Dispatch, Hint, LinkClosed, Reply
from router_svc.expert_calls import ExpertCalls
from router_svc.foresight import Foresight
from router_svc.model_loader import load_router_model
from router_svc.remote_experts import RemoteExperts
from router_svc.token_memory import TokenMemory
from tests.checkpoints import DECODERS, Variant
from tests.oracle import Oracle

NUM_ROWS = 7
WIDTH = 64


def chosen_by(block: nn.Module, x: Tensor) -> Tensor:
    """Let a sparse block choose experts for rows x [T, D]: [T, K]."""
    seen: list[Tensor] = []

    def call(_layer: int, rows: Tensor, ids: Tensor, _weights: Tensor) -> Tensor:
        seen.append(ids)
        return torch.zeros_like(rows)

    experts = cast(RemoteExperts, block.experts)
    before, experts.call = experts.call, call
    block(x[None])
    experts.call = before
    return seen[0]


# Gates that limit the groups they choose from do so in other variants alone.
GATES = [(arch, Variant.BASE) for arch in DECODERS]
GATES += [(arch, Variant.OTHER) for arch in ("deepseek_v2", "glm4_moe")]


@pytest.mark.parametrize(("arch", "variant"), GATES)
def test_where_the_next_block_sees_the_same_rows_its_choices_are_foretold_exactly(
    arch: str, variant: Variant, oracle: Oracle
) -> None:
    checkpoint, cpu = oracle.checkpoint(arch, variant), torch.device("cpu")
    model, theirs = (load_router_model(checkpoint, torch.float32, cpu, by) for by in ("auto", "transformers"))
    foresight = Foresight(model.moe_blocks(), top_k=model.top_k, device=model.device)
    num_layers = len(model.moe_layers)
    assert foresight.layers == tuple(range(num_layers))
    blocks = [m for m in theirs.model.modules() if isinstance(getattr(m, "experts", None), RemoteExperts)]
    x = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        for layer in range(1, num_layers):
            foretold = foresight.predict(layer, x)
            assert foretold is not None
            assert [len(row) for row in foretold] == [model.top_k] * NUM_ROWS
            assert [sorted(row) for row in foretold] == chosen_by(blocks[layer], x).sort().values.tolist()
        assert foresight.predict(num_layers, x) is None


class Block(nn.Module):
    """A sparse block whose gate is up to the test."""

    def __init__(self, gate: nn.Module | None):
        super().__init__()
        self.experts = RemoteExperts(cast(Any, None))
        self.experts.layer = 0
        if gate is not None:
            self.gate = gate


class Broken(nn.Module):
    """A gate that fails."""

    num_calls = 0

    def forward(self, rows: Tensor) -> Tensor:
        self.num_calls += 1
        raise RuntimeError("not in the mood")


class Demanding(nn.Module):
    """A gate that wants what its block lacks."""

    def forward(self, rows: Tensor, temperature: float) -> Tensor:
        return rows * temperature


def foresight_of(gate: nn.Module | None) -> Foresight:
    return Foresight({0: Block(gate)}, top_k=2, device=torch.device("cpu"))


@pytest.mark.parametrize("gate", [None, Demanding()])
def test_a_layer_without_a_gate_that_can_be_asked_is_not_foretold(gate: nn.Module | None) -> None:
    assert foresight_of(gate).layers == ()


def test_a_gate_that_fails_is_not_asked_again() -> None:
    gate = Broken()
    foresight = foresight_of(gate)
    assert foresight.predict(0, torch.zeros(1, 4)) is None
    assert foresight.predict(0, torch.zeros(1, 4)) is None
    assert gate.num_calls == 1


class Told:
    """Foretells what the test says, and notes the rows that it was asked about."""

    asks_gates = False

    def __init__(self, ids: dict[int, list[list[int]]]):
        self.ids, self.asked = ids, list[tuple[int, int]]()

    def predict(self, layer: int, x: Tensor) -> list[list[int]] | None:
        self.asked.append((layer, len(x)))
        return self.ids.get(layer)


class FakeLink:
    """A link to a worker that answers zeros, and remembers what it was sent, in order."""

    takes_hints = True

    def __init__(self, hint: Callable[[Hint], bool] | None = None):
        self.link_id, self.stats = 1, LinkStats()
        self.sent: list[Dispatch | Hint | str] = []
        self._hint = hint

    def send(self, dispatch: Dispatch) -> None:
        self.sent.append(dispatch)

    def receive(self, seq: int, deadline_s: float, *, patience_s: float = 0.0) -> Reply:
        (dispatch,) = [one for one in self.sent if isinstance(one, Dispatch) and one.seq == seq]
        self.sent.append("received")
        return Reply(seq=seq, y=torch.zeros_like(dispatch.x))

    def hint(self, hint: Hint) -> bool:
        self.sent.append(hint)
        return self._hint is None or self._hint(hint)

    def close(self) -> None:
        pass

    @property
    def hints(self) -> list[tuple[int, list[int], list[int]]]:
        return [(h.layer, h.experts.tolist(), h.counts.tolist()) for h in self.sent if isinstance(h, Hint)]

    @property
    def dispatches(self) -> list[Dispatch]:
        return [one for one in self.sent if isinstance(one, Dispatch)]


def compute(calls: ExpertCalls, layer: int, ids: list[list[int]]) -> None:
    """Have rows computed; without a placement, experts go to workers by hash."""
    calls.compute(layer, torch.ones(len(ids), 4), torch.tensor(ids), torch.full((len(ids), len(ids[0])), 0.5))


def begin(calls: ExpertCalls, num_decode_rows: int, tokens: list[int] | None = None) -> None:
    """Open a step; its tokens do not matter where none are remembered."""
    calls.begin(1, [(tokens or [], num_decode_rows)])


def two_workers(
    told: Told | None, *, num_ahead: int = 1, memory: TokenMemory | None = None
) -> tuple[ExpertCalls, dict[str, FakeLink]]:
    calls = ExpertCalls(num_layers=3, num_experts=8, timeout_s=1.0, foresight=told, num_ahead=num_ahead, memory=memory)
    links = {"a": FakeLink(), "b": FakeLink()}
    for name, link in links.items():
        calls.add_link(name, cast(RouterLink, link))
    return calls, links


def test_each_worker_is_told_of_its_own_experts_after_the_dispatches_and_before_the_wait() -> None:
    told = Told({1: [[3, 6], [6, 5]]})
    calls, links = two_workers(told)
    begin(calls, 2)
    compute(calls, 0, [[0, 1], [2, 3]])
    experts: dict[int, int] = {}
    for link in links.values():
        for layer, mine, counts in link.hints:
            assert layer == 1
            experts |= dict(zip(mine, counts, strict=True))
    assert experts == {3: 1, 5: 1, 6: 2}
    assert sum(len(link.hints) for link in links.values()) <= 2
    for link in links.values():
        kinds = [one if isinstance(one, str) else type(one).__name__ for one in link.sent]
        assert kinds == sorted(kinds, key=["Dispatch", "Hint", "received"].index)


def test_only_decoding_rows_are_asked_about_and_none_at_the_last_layer() -> None:
    told = Told({1: [[0, 1]]})
    calls, links = two_workers(told)
    begin(calls, 1)
    compute(calls, 0, [[0, 1], [2, 3], [4, 5]])
    compute(calls, 2, [[0, 1], [2, 3], [4, 5]])
    assert told.asked == [(1, 1)]
    begin(calls, 0)
    compute(calls, 0, [[0, 1], [2, 3]])
    assert told.asked == [(1, 1)]
    assert all(layer == 1 for link in links.values() for layer, *_ in link.hints)


def test_a_dispatch_says_how_many_of_its_rows_belong_to_prompts() -> None:
    calls, links = two_workers(None)
    begin(calls, 2)
    ids = [[e] for e in range(8)]
    compute(calls, 0, ids)
    sent = [d for link in links.values() for d in link.dispatches]
    assert len(sent) == 2
    for dispatch in sent:
        assert dispatch.num_prompt_rows == sum(expert >= 2 for expert in dispatch.experts.tolist())
    begin(calls, 8)
    compute(calls, 0, ids)
    assert all(link.dispatches[-1].num_prompt_rows == 0 for link in links.values())


def test_what_was_foretold_is_counted_against_what_the_layer_then_chose() -> None:
    calls, _ = two_workers(Told({1: [[0, 1], [1, 2]], 2: [[4, 5], [6, 7]]}))
    begin(calls, 2)
    compute(calls, 0, [[0, 1], [2, 3], [5, 6]])
    assert (calls.totals.hinted, calls.totals.hinted_right) == (0, 0)
    compute(calls, 1, [[1, 5], [2, 1], [0, 1]])
    assert (calls.totals.hinted, calls.totals.hinted_right) == (4, 3)
    begin(calls, 2)
    compute(calls, 0, [[4, 5], [6, 7], [0, 1]])  # the step was computed again from its start
    assert (calls.totals.hinted, calls.totals.hinted_right) == (4, 3)


def test_workers_can_be_told_of_more_layers_than_the_next_and_the_newest_word_counts() -> None:
    told = Told({1: [[0, 1]], 2: [[2, 3]]})
    calls, links = two_workers(told, num_ahead=2)
    begin(calls, 1)
    compute(calls, 0, [[0, 1]])
    assert {layer for link in links.values() for layer, *_ in link.hints} == {1, 2}
    told.ids[2] = [[6, 7]]
    compute(calls, 1, [[4, 5]])
    compute(calls, 2, [[6, 7]])
    assert told.asked == [(1, 1), (2, 1), (2, 1)]
    assert (calls.totals.hinted, calls.totals.hinted_right) == (4, 2)


def test_a_worker_that_takes_no_hint_costs_nothing() -> None:
    def closed(_hint: Hint) -> bool:
        raise LinkClosed("gone")

    calls = ExpertCalls(num_layers=3, num_experts=8, timeout_s=1.0, foresight=Told({1: [[0, 1]]}))
    links = {"a": FakeLink(closed), "b": FakeLink(lambda _hint: False)}
    for name, link in links.items():
        calls.add_link(name, cast(RouterLink, link))
    begin(calls, 1)
    compute(calls, 0, [[0, 1]])
    assert calls.worker_ids == ["a", "b"]
    assert calls.totals.retries == 0


def hints_of(links: dict[str, FakeLink]) -> dict[int, dict[int, int]]:
    """Put together what all workers were told: tokens by expert, by layer; and forget it."""
    told: dict[int, dict[int, int]] = {}
    for link in links.values():
        for layer, experts, counts in link.hints:
            told.setdefault(layer, {}).update(zip(experts, counts, strict=True))
        link.sent.clear()
    return told


def test_when_a_step_begins_workers_are_told_what_its_tokens_chose_the_last_time() -> None:
    calls, links = two_workers(Told({}), memory=TokenMemory(num_layers=2))
    begin(calls, 1, [70, 71, 70])
    compute(calls, 0, [[0, 1], [2, 3], [4, 5]])  # of a token that stands there twice the later choice is kept
    compute(calls, 1, [[1, 2], [3, 4], [5, 6]])
    compute(calls, 2, [[7, 0], [7, 0], [7, 0]])
    hints_of(links)
    begin(calls, 2, [70, 99, 71])
    assert hints_of(links) == {0: {4: 1, 5: 1}, 1: {5: 1, 6: 1}}
    begin(calls, 2, [71, 71])
    assert hints_of(links) == {0: {2: 2, 3: 2}, 1: {3: 2, 4: 2}}


def test_a_gate_is_asked_only_about_rows_whose_tokens_are_not_remembered() -> None:
    told = Told({1: [[6, 7]]})
    calls, links = two_workers(told, memory=TokenMemory(num_layers=2), num_ahead=2)
    begin(calls, 0, [70])
    compute(calls, 0, [[0, 1]])
    compute(calls, 1, [[1, 2]])
    told.asked.clear()
    begin(calls, 2, [70, 99])
    hints_of(links)
    compute(calls, 0, [[0, 1], [2, 3]])
    assert told.asked == [(1, 1), (2, 2)]
    assert hints_of(links) == {1: {6: 1, 7: 1}}
    compute(calls, 1, [[1, 2], [6, 3]])
    assert (calls.totals.hinted, calls.totals.hinted_right) == (6, 5)


def test_tokens_that_share_a_place_are_never_taken_for_each_other() -> None:
    memory = TokenMemory(num_layers=1, num_places=8)
    memory.learn(0, [3], np.array([[1, 2]]))
    assert memory.recall(0, [3, 11]) == {0: [1, 2]}
    memory.learn(0, [11], np.array([[4, 5]]))
    assert memory.recall(0, [3, 11]) == {1: [4, 5]}
    assert memory.recall(1, [3, 11]) == {}


def test_workers_whose_slots_hold_everything_are_told_nothing_and_nothing_is_learned() -> None:
    calls = ExpertCalls(
        num_layers=3, num_experts=8, timeout_s=1.0, foresight=Told({}), memory=TokenMemory(num_layers=1)
    )
    link = FakeLink()
    calls.add_link("a", cast(RouterLink, link), wants_hints=False)
    begin(calls, 1, [70])
    compute(calls, 0, [[0, 1]])
    calls.add_link("b", cast(RouterLink, FakeLink()))
    begin(calls, 1, [70])
    assert link.hints == []
