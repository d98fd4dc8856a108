"""Experts that are in slots, and a table of where their packed weights lie, which the native end reads at every batch.

Written under the buffer's lock. L layers, E experts.
"""

import time
from collections.abc import Iterable

import numpy as np

from collegium.buffering.policies import ExpertId
from collegium.model.experts import PackedExpert
from collegium.model.native import ExpertLayout

_LOOK_EVERY_S = 0.2e-3


class Residents(dict[ExpertId, PackedExpert]):
    """A dict of slots that keeps `table` [L, E] int64 in step: addresses of packed weights, 0 where there are none.

    leases [L, E] uint8: the native end's, who takes one before it looks at the table and computes under it.
    """

    def __init__(self, num_experts: list[int]):
        """Begin with none. `num_experts` by layer."""
        super().__init__()
        self.table = np.zeros((len(num_experts), max(num_experts, default=0)), np.int64)
        self.leases = np.zeros(self.table.shape, np.uint8)
        self.layout: ExpertLayout | None = None  # of the packed weights, once there are any

    def __setitem__(self, expert_id: ExpertId, slot: PackedExpert) -> None:
        """Take in a slot that has landed."""
        super().__setitem__(expert_id, slot)
        if slot.layout is not None:
            self.layout = slot.layout
            self.table[expert_id] = slot.address

    def remove(self, expert_id: ExpertId) -> PackedExpert:
        """Take a slot out."""
        self.table[expert_id] = 0
        return self.pop(expert_id)

    def wait_unleased(self, expert_ids: Iterable[ExpertId]) -> None:
        """Wait until nobody computes from experts that have been removed, for a batch at most; not under a lock."""
        for expert_id in expert_ids:
            while self.leases[expert_id]:
                time.sleep(_LOOK_EVERY_S)
