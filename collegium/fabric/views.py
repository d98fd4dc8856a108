"""Placements between their message and their value, and whether a view of the cluster can be taken at all.

Owns the packed form (offsets and indices) and what makes a view whole. Knows nothing of how placements are planned or
used.
"""

from __future__ import annotations

import itertools

from collegium.fabric import bounds
from collegium.fabric.errors import shown
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
    """Read a placement; ValueError where a field is out of bounds or its arrays do not fit together."""
    bounds.check(message)
    repeated = bounds.first_repeated(message.worker_ids)
    if repeated is not None:
        raise ValueError(f"worker_ids names {shown(repeated)} twice")
    num_workers = len(message.worker_ids)
    homes: list[tuple[tuple[int, ...], ...]] = []
    for i, layer in enumerate(message.layers):
        offsets, indices = list(layer.offsets), list(layer.worker_idx)
        if not offsets or offsets[0] != 0 or offsets[-1] != len(indices) or offsets != sorted(offsets):
            raise ValueError(f"layers[{i}].offsets do not fit worker_idx")
        if indices and max(indices) >= num_workers:
            raise ValueError(f"layers[{i}].worker_idx names a worker that is not listed")
        row = tuple(tuple(indices[a:b]) for a, b in itertools.pairwise(offsets))
        if not all(row):
            raise ValueError(f"layers[{i}] has an expert without a home")
        homes.append(row)
    if num_workers and not homes:
        raise ValueError("layers are missing, though worker_ids names workers")
    return Placement(epoch=message.epoch, worker_ids=tuple(message.worker_ids), homes=tuple(homes))


def check_view(view: pb.WatchPlacementResponse) -> None:
    """Check a whole view, which comes from a peer. Raises ValueError that names the field and the bound."""
    bounds.check(view)
    from_proto(view.placement)
    from_proto(view.planned)
    repeated = bounds.first_repeated(member.member_id for member in view.members)
    if repeated is not None:
        raise ValueError(f"members has {shown(repeated)} twice")
