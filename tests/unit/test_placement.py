"""Planning homes: complete, even, stable, deterministic, for any counts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collegium.fabric.views import from_proto, to_proto
from collegium.model.placement import NO_PLACEMENT, LayerSize, Placement, Worker, plan_homes
from collegium.v1 import balancer_pb2 as pb

layers_of_one_size = st.builds(
    lambda num_layers, num_experts, expert_bytes: (
        [LayerSize(num_experts=num_experts, expert_bytes=expert_bytes)] * num_layers
    ),
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(1, 1000),
)
layers_of_any_size = st.lists(
    st.builds(LayerSize, num_experts=st.integers(1, 20), expert_bytes=st.integers(1, 1000)), min_size=1, max_size=5
)
worker_sets = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True)


def workers(ids: list[str] | str, capacity_bytes: int = 0) -> list[Worker]:
    return [Worker(worker_id=worker_id, capacity_bytes=capacity_bytes) for worker_id in ids]


def counts_by_layer(placement: Placement) -> list[list[int]]:
    return [[sum(w in homes for homes in layer) for w in range(len(placement.worker_ids))] for layer in placement.homes]


def bytes_by_worker(placement: Placement, layers: list[LayerSize]) -> list[int]:
    rows = counts_by_layer(placement)
    return [
        sum(row[w] * layer.expert_bytes for row, layer in zip(rows, layers, strict=True))
        for w in range(len(placement.worker_ids))
    ]


def moved(before: Placement, after: Placement) -> list[tuple[str, str]]:
    return [
        (before.workers_of(i, e)[0], after.workers_of(i, e)[0])
        for i, layer in enumerate(before.homes)
        for e in range(len(layer))
        if before.workers_of(i, e) != after.workers_of(i, e)
    ]


def replan_through(layers: list[LayerSize], history: list[list[str]]) -> Placement:
    placement = NO_PLACEMENT
    for epoch, ids in enumerate(history, 1):
        placement = plan_homes(layers, workers(ids), placement, epoch=epoch)
    return placement


def test_ten_experts_on_three_workers_are_shared_four_three_three() -> None:
    placement = plan_homes([LayerSize(num_experts=10, expert_bytes=8)], workers("abc"), epoch=4)
    assert placement.epoch == 4
    assert counts_by_layer(placement) == [[4, 3, 3]]


def test_what_one_layer_leaves_over_goes_to_another_worker_in_the_next() -> None:
    placement = plan_homes([LayerSize(num_experts=4, expert_bytes=8)] * 3, workers("abc"))
    assert sorted(bytes_by_worker(placement, [LayerSize(num_experts=4, expert_bytes=8)] * 3)) == [32, 32, 32]


@given(layers_of_any_size, st.lists(worker_sets, min_size=1, max_size=4))
def test_every_expert_has_one_home_and_layers_are_even_after_any_history(
    layers: list[LayerSize], history: list[list[str]]
) -> None:
    placement = replan_through(layers, history)
    assert placement.worker_ids == tuple(history[-1])
    assert [len(layer) for layer in placement.homes] == [layer.num_experts for layer in layers]
    assert all(len(homes) == 1 for layer in placement.homes for homes in layer)
    for row in counts_by_layer(placement):
        assert max(row) - min(row) <= 1


@given(layers_of_one_size, st.lists(worker_sets, min_size=1, max_size=4))
def test_totals_differ_by_at_most_one_expert_after_any_history(
    layers: list[LayerSize], history: list[list[str]]
) -> None:
    totals = bytes_by_worker(replan_through(layers, history), layers)
    assert max(totals) - min(totals) <= layers[0].expert_bytes


@given(layers_of_any_size, st.lists(worker_sets, min_size=1, max_size=4))
def test_planning_again_moves_nothing(layers: list[LayerSize], history: list[list[str]]) -> None:
    once = replan_through(layers, history)
    again = plan_homes(layers, workers(history[-1]), once, epoch=once.epoch)
    assert again == once


@given(st.integers(1, 40), worker_sets)
def test_in_one_layer_a_joining_worker_is_the_only_one_that_gains(num_experts: int, ids: list[str]) -> None:
    layers = [LayerSize(num_experts=num_experts, expert_bytes=1)]
    before = plan_homes(layers, workers(ids))
    assert all(to == "new" for _, to in moved(before, plan_homes(layers, workers(["new", *ids]), before)))


@given(st.integers(1, 40), worker_sets.filter(lambda ids: len(ids) > 1))
def test_in_one_layer_a_dying_worker_is_the_only_one_that_loses(num_experts: int, ids: list[str]) -> None:
    layers = [LayerSize(num_experts=num_experts, expert_bytes=1)]
    before = plan_homes(layers, workers(ids))
    for gone in ids:
        rest = [worker_id for worker_id in reversed(ids) if worker_id != gone]
        assert all(source == gone for source, _ in moved(before, plan_homes(layers, workers(rest), before)))


@given(layers_of_one_size, worker_sets)
def test_a_worker_that_joins_takes_experts_and_moves_few_between_others(
    layers: list[LayerSize], ids: list[str]
) -> None:
    before = plan_homes(layers, workers(ids))
    after = plan_homes(layers, workers([*ids, "new"]), before)
    moves = moved(before, after)
    to_others = [move for move in moves if move[1] != "new"]
    assert len(to_others) <= len(layers)  # at most one a layer, to even out totals


@given(layers_of_one_size, worker_sets.filter(lambda ids: len(ids) > 1))
def test_a_worker_that_dies_keeps_nothing_and_orphans_go_to_the_living(layers: list[LayerSize], ids: list[str]) -> None:
    before = plan_homes(layers, workers(ids))
    after = plan_homes(layers, workers(ids[1:]), before)
    assert ids[0] not in after.worker_ids
    kept = [move for move in moved(before, after) if move[0] != ids[0]]
    assert len(kept) <= len(layers)


def test_workers_share_by_capacity_where_it_binds() -> None:
    layers = [LayerSize(num_experts=12, expert_bytes=10)] * 2
    small, large = Worker(worker_id="small", capacity_bytes=60), Worker(worker_id="large", capacity_bytes=0)
    placement = plan_homes(layers, [small, large])
    assert bytes_by_worker(placement, layers) == [60, 180]


def test_too_little_capacity_still_gives_every_expert_a_home() -> None:
    layers = [LayerSize(num_experts=8, expert_bytes=10)]
    few = [Worker(worker_id="a", capacity_bytes=10), Worker(worker_id="b", capacity_bytes=30)]
    assert bytes_by_worker(plan_homes(layers, few), layers) == [20, 60]


def test_a_replica_becomes_the_home_when_the_first_one_dies() -> None:
    base = Placement(epoch=1, worker_ids=("a", "b", "c"), homes=(((0, 2), (1,)),))
    after = plan_homes([LayerSize(num_experts=2, expert_bytes=1)], workers("bc"), base)
    assert after.workers_of(0, 0) == ("c",)
    assert after.workers_of(0, 1) == ("b",)


def test_a_base_of_another_shape_counts_as_none() -> None:
    layers = [LayerSize(num_experts=3, expert_bytes=1)]
    other = plan_homes([LayerSize(num_experts=5, expert_bytes=1)], workers("ab"))
    assert plan_homes(layers, workers("ab"), other) == plan_homes(layers, workers("ab"))


def test_planning_without_workers_or_with_repeated_ids_is_refused() -> None:
    layers = [LayerSize(num_experts=3, expert_bytes=1)]
    with pytest.raises(ValueError, match="at least one"):
        plan_homes(layers, [])
    with pytest.raises(ValueError, match="repeat"):
        plan_homes(layers, workers("aa"))


def test_questions_to_a_placement_are_answered_by_id() -> None:
    placement = Placement(epoch=2, worker_ids=("a", "b"), homes=(((0,), (1, 0)), ((1,),)))
    assert placement.workers_of(0, 1) == ("b", "a")
    assert placement.experts_of("a") == [(0, 0), (0, 1)]
    assert placement.experts_of("gone") == []
    assert placement.num_homes() == {"a": 2, "b": 2}
    assert placement.renamed({"a": "z"}).worker_ids == ("z", "b")


@given(layers_of_any_size, worker_sets)
def test_a_placement_survives_its_message(layers: list[LayerSize], ids: list[str]) -> None:
    placement = plan_homes(layers, workers(ids), epoch=7)
    assert from_proto(pb.Placement.FromString(to_proto(placement).SerializeToString())) == placement


def test_a_message_whose_arrays_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="offsets"):
        from_proto(pb.Placement(worker_ids=["a"], layers=[pb.LayerPlacement(offsets=[0, 2], worker_idx=[0])]))
    with pytest.raises(ValueError, match="not listed"):
        from_proto(pb.Placement(worker_ids=["a"], layers=[pb.LayerPlacement(offsets=[0, 1], worker_idx=[1])]))
