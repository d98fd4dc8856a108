"""Which layers of a traced step get spans: all where dispatches are few, else each in its turn."""

from __future__ import annotations

import pytest

from router_svc.traced_layers import is_traced


def test_a_small_model_has_every_layer_traced() -> None:
    assert all(is_traced(layer, num_traced, 6 * 2) for layer in range(6) for num_traced in range(3))


@pytest.mark.parametrize(("num_layers", "num_workers"), [(61, 64), (48, 8), (26, 10)])
def test_a_large_one_has_a_bounded_part_traced_and_every_layer_in_turn(num_layers: int, num_workers: int) -> None:
    num_dispatches = num_layers * num_workers
    rounds = -(-num_dispatches // 256)
    traced = [
        {layer for layer in range(num_layers) if is_traced(layer, num_traced, num_dispatches)}
        for num_traced in range(rounds)
    ]
    assert all(len(layers) * num_workers <= 256 + num_workers for layers in traced)
    assert sorted(layer for layers in traced for layer in layers) == list(range(num_layers))
