"""Placements between their message and their value: what a view of the cluster carries.

Owns the packed form (offsets and indices). Knows nothing of how placements are planned or used.
"""

from __future__ import annotations

import itertools

from collegium.model.placement import Placement
from collegium.v1 import balancer_pb2 as pb


def to_proto(placement: Placement) -> pb.Placement:
    """Write a placement as its message."""
    message = pb.Placement(epoch=placement.epoch, worker_ids=placement.worker_ids)
    for layer in placement.homes:
        row = message.layers.add()
        row.offsets.append(0)
        for homes in layer:
            row.worker_idx.extend(homes)
            row.offsets.append(len(row.worker_idx))
    return message


def from_proto(message: pb.Placement) -> Placement:
    """Read a placement; ValueError where its arrays do not fit together."""
    homes: list[tuple[tuple[int, ...], ...]] = []
    for i, layer in enumerate(message.layers):
        offsets, indices = list(layer.offsets), list(layer.worker_idx)
        if not offsets or offsets[0] != 0 or offsets[-1] != len(indices) or offsets != sorted(offsets):
            raise ValueError(f"layers[{i}].offsets do not fit worker_idx")
        if any(w >= len(message.worker_ids) for w in indices):
            raise ValueError(f"layers[{i}].worker_idx names a worker that is not listed")
        homes.append(tuple(tuple(indices[a:b]) for a, b in itertools.pairwise(offsets)))
    return Placement(epoch=message.epoch, worker_ids=tuple(message.worker_ids), homes=tuple(homes))
