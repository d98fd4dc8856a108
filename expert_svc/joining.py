"""Join the dispatches that wait for the same layer into one batch, whichever router sent them.

Owns the order in which a worker serves dispatches: the oldest first, and with it all that wait for its layer. Pure: no
I/O. R rows, P pairs, G experts with rows, D model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.link.base import Arrival
from collegium.link.frame import Dispatch


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedBatch:
    """One expert call: rows of one or several dispatches of one layer.

    x: [R, D]; experts, counts: [G]; decode_counts: [G], of counts those of decoding rows; pair_rows, pair_weights: [P]
    ordered by expert; row_counts: rows of each dispatch, in order.
    """

    layer: int
    x: Tensor
    experts: list[int]
    counts: list[int]
    decode_counts: list[int]
    num_decode_rows: int
    pair_rows: NDArray[np.int64]
    pair_weights: NDArray[np.float32]
    row_counts: list[int]


class DispatchQueue:
    """Dispatches that have arrived and were not served yet, oldest first."""

    def __init__(self) -> None:
        self._waiting: list[Arrival] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, arrivals: Iterable[Arrival]) -> None:
        """Queue dispatches."""
        self._waiting.extend(arrivals)

    def layers(self) -> list[tuple[int, set[str], float]]:
        """Layers that are waited for, oldest dispatch first: each with its routers and when the oldest arrived."""
        found: dict[int, tuple[set[str], float]] = {}
        for arrival in self._waiting:
            found.setdefault(arrival.dispatch.layer, (set(), arrival.received_s))[0].add(arrival.router_id)
        return [(layer, routers, arrived_s) for layer, (routers, arrived_s) in found.items()]

    def take(self, max_rows: int, layer: int | None = None) -> list[Arrival]:
        """Take the oldest of a layer (without one: the oldest of all) and every other that waits for its layer, up to
        `max_rows` rows together (the oldest always goes).
        """
        if not self._waiting:
            return []
        if layer is None:
            layer = self._waiting[0].dispatch.layer
        num_rows = 0
        taken: list[Arrival] = []
        kept: list[Arrival] = []
        for arrival in self._waiting:
            rows = arrival.dispatch.x.shape[0]
            if arrival.dispatch.layer == layer and (not taken or num_rows + rows <= max_rows):
                taken.append(arrival)
                num_rows += rows
            else:
                kept.append(arrival)
        self._waiting = kept
        return taken


def join(dispatches: Sequence[Dispatch]) -> JoinedBatch:
    """Make one batch of dispatches of one layer, so that each expert runs once on the rows of all of them."""
    first = dispatches[0]
    num_decode_rows = sum(d.x.shape[0] - d.num_prompt_rows for d in dispatches)
    if len(dispatches) == 1:
        counts, pair_rows = first.counts.tolist(), first.pair_rows.astype(np.int64)
        return JoinedBatch(
            layer=first.layer,
            x=first.x,
            experts=first.experts.tolist(),
            counts=counts,
            decode_counts=_decode_counts(counts, pair_rows < num_decode_rows) if first.num_prompt_rows else counts,
            num_decode_rows=num_decode_rows,
            pair_rows=pair_rows,
            pair_weights=first.pair_weights,
            row_counts=[first.x.shape[0]],
        )
    row_counts = [d.x.shape[0] for d in dispatches]
    starts = np.cumsum([0, *row_counts[:-1]])
    expert_of = np.concatenate([np.repeat(d.experts, d.counts) for d in dispatches])
    rows = np.concatenate([d.pair_rows.astype(np.int64) + start for d, start in zip(dispatches, starts, strict=True)])
    weights = np.concatenate([d.pair_weights for d in dispatches])
    order = np.argsort(expert_of, kind="stable")
    experts, counts = np.unique(expert_of, return_counts=True)
    is_decode = np.concatenate([d.pair_rows < d.x.shape[0] - d.num_prompt_rows for d in dispatches])[order]
    return JoinedBatch(
        layer=first.layer,
        x=torch.cat([d.x for d in dispatches]),
        experts=experts.tolist(),
        counts=counts.tolist(),
        decode_counts=_decode_counts(counts.tolist(), is_decode),
        num_decode_rows=num_decode_rows,
        pair_rows=rows[order],
        pair_weights=weights[order],
        row_counts=row_counts,
    )


def _decode_counts(counts: list[int], is_decode: NDArray[np.bool_]) -> list[int]:
    """Count the pairs of decoding rows by group: counts [G], is_decode [P] ordered by group."""
    starts = np.cumsum([0, *counts[:-1]])
    decode_counts: list[int] = np.add.reduceat(is_decode, starts, dtype=np.int64).tolist()
    return decode_counts
