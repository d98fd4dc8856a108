"""Which replica computes what in a step: by the step's own counts, with few workers for each token."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from router_svc.load_counts import LoadCounts
from router_svc.routing import LayerRoute, choose_in_python, choose_replicas


def chosen(
    ids: list[list[int]], worker_of: list[int], replicas: dict[int, tuple[int, ...]], activation_rows: float = 4.0
) -> list[list[int]] | None:
    pairs = np.array(ids)
    route = LayerRoute(worker_of=np.array(worker_of), replicas=replicas)
    counts = np.bincount(pairs.ravel(), minlength=len(worker_of))
    workers = choose_replicas(pairs, counts, route, max(worker_of) + 1, activation_rows)
    return None if workers is None else workers.tolist()


def work_of(
    workers: NDArray[np.int64], ids: NDArray[np.int64], num_workers: int, activation_rows: float
) -> list[float]:
    """Rows of each worker, and so many more for each expert that it reads."""
    return [
        float((workers == w).sum()) + activation_rows * len(set(ids[workers == w].tolist())) for w in range(num_workers)
    ]


def test_without_replicas_among_the_chosen_nothing_is_decided() -> None:
    assert chosen([[0, 1]], [0, 1, 0], {2: (0, 1)}) is None


def test_a_replica_on_the_idle_worker_computes() -> None:
    # expert 2 has homes on both; worker 0 has experts 0 and 1 of this step already
    assert chosen([[0, 2], [1, 2]], [0, 0, 0, 1], {2: (0, 1)}) == [[0, 1], [0, 1]]


def test_among_homes_that_stay_below_the_busiest_tokens_go_where_they_go_anyway() -> None:
    # worker 2 is the busiest whatever happens; the token of expert 3 visits worker 1 anyway
    ids = [[0, 3], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1], [1, 1]]
    assert (chosen(ids, [1, 2, 0, 0], {3: (0, 1)}) or [])[0] == [1, 1]
    assert (chosen(ids, [0, 2, 0, 0], {3: (0, 1)}) or [])[0] == [0, 0]


def test_many_rows_of_one_expert_are_split_over_its_homes_and_few_are_not() -> None:
    many = chosen([[0]] * 100, [0, 1], {0: (0, 1)})
    assert many is not None and sorted(map(many.count, ([0], [1]))) == [50, 50]
    few = chosen([[0]] * 3, [0, 1], {0: (0, 1)})
    assert few in ([[0]] * 3, [[1]] * 3)


@settings(max_examples=300)
@given(st.integers(1, 40), st.integers(2, 12), st.integers(2, 5), st.integers(0, 2**31))
def test_every_pair_goes_to_a_home_and_the_busiest_is_bounded(
    num_tokens: int, num_experts: int, num_workers: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    top_k = int(rng.integers(1, min(4, num_experts) + 1))
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(num_tokens)])
    homes = [
        tuple(rng.permutation(num_workers)[: rng.integers(1, num_workers + 1)].tolist()) for _ in range(num_experts)
    ]
    route = LayerRoute(
        worker_of=np.array([h[e % len(h)] for e, h in enumerate(homes)]),
        replicas={e: h for e, h in enumerate(homes) if len(h) > 1},
    )
    counts = np.bincount(ids.ravel(), minlength=num_experts)
    rows = float(rng.choice([0.5, 4.0, 16.0]))
    workers = choose_replicas(ids, counts, route, num_workers, rows)
    in_python = choose_in_python(ids, counts, route, num_workers, rows)
    assert (workers is None) == (in_python is None)
    if workers is not None and in_python is not None:
        assert workers.tolist() == in_python.tolist()
    if workers is None:
        assert not any(counts[e] for e in route.replicas)
        return
    assert all(w in homes[e] for e, w in zip(ids.ravel().tolist(), workers.ravel().tolist(), strict=True))
    before = work_of(route.worker_of[ids], ids, num_workers, rows)
    after = work_of(workers, ids, num_workers, rows)
    largest = max(counts[e] + rows for e in range(num_experts) if counts[e])
    # What comes last to the busiest has two homes or more, of which that one was the least busy.
    assert max(after) <= max(max(before), largest + sum(after) / 2) + 1e-6


def test_counts_are_kept_apart_by_phase_and_say_in_how_many_steps_an_expert_was_used() -> None:
    loads = LoadCounts(2, 4)
    assert loads.note(1, np.array([[0, 1], [0, 2]]), 1).tolist() == [2, 1, 1, 0]
    loads.note(1, np.array([[0, 3]]), 1)
    assert loads.decode[1].tolist() == [2, 1, 0, 1]
    assert loads.prefill[1].tolist() == [1, 0, 1, 0]
    assert loads.activations[1].tolist() == [2, 1, 1, 1]
    assert not loads.decode[0].any()
    message = loads.to_message("router-1")
    assert message.member_id == "router-1"
    assert list(message.layers[1].prefill_tokens) == [1, 0, 1, 0]
