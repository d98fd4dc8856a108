"""Where experts come from when they are not in a slot: host memory, and the files behind it.

Owns the memory that loading needs: staging sets for the disk, and the arena. Knows neither slots' owners nor policies.
Weights never change, so nothing is ever copied back. A checksum is verified when bytes come from the disk, and not on a
copy from the arena. Safe for use by several loading threads.
"""

import queue
import threading
from collections import OrderedDict
from enum import StrEnum
from typing import Protocol

import torch

from collegium.buffering.policies import ExpertId
from collegium.model import packed_memory
from collegium.model.experts import PackedExpert
from collegium.model.manifest import Manifest
from collegium.model.weights import ExpertReader


class Tier(StrEnum):
    """What a load read from."""

    HOST = "host"
    DISK = "disk"


class Source(Protocol):
    """Brings experts into slots."""

    def fill(self, expert_id: ExpertId, slot: PackedExpert) -> Tier:
        """Copy one expert into a slot that nobody reads; blocks. Raises CheckpointError, naming the expert."""
        ...


class Disk:
    """The checkpoint's files, through a fixed number of staging sets."""

    def __init__(self, manifest: Manifest, dtype: torch.dtype, *, num_sets: int):
        """Set memory aside: a set holds one expert as it is stored, and one in `dtype` where the two differ."""
        self._sets: queue.LifoQueue[ExpertReader] = queue.LifoQueue()
        for _ in range(num_sets):
            self._sets.put(ExpertReader(manifest, dtype))

    def fill(self, expert_id: ExpertId, slot: PackedExpert) -> Tier:
        """Read, verify and pack one expert; see Source."""
        reader = self._sets.get()
        try:
            slot.load(reader.read(*expert_id))
        finally:
            self._sets.put(reader)
        return Tier.DISK


class Arena:
    """Experts in host memory in the kernel's form, least recently used out first, in front of another source."""

    def __init__(self, behind: Source, *, num_places: int, expert_bytes: int, is_pinned: bool = False):
        """Set aside `num_places` times `expert_bytes`; page-locked where a device is to copy from it by itself."""
        self._behind, self._expert_bytes, self.num_places = behind, expert_bytes, num_places
        size = num_places * expert_bytes
        if is_pinned or not size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
        else:
            self._memory = packed_memory.take(size)
        self._places: OrderedDict[ExpertId, int] = OrderedDict()  # least recently used first
        self._free = list(range(num_places))
        self._in_use: dict[ExpertId, int] = {}  # how many threads read it now
        self._lock = threading.Lock()

    def fill(self, expert_id: ExpertId, slot: PackedExpert) -> Tier:
        """Copy one expert from the arena, or from behind it, and then keep it here; see Source."""
        with self._lock:
            place = self._places.get(expert_id)
            if place is not None:
                self._places.move_to_end(expert_id)
                self._in_use[expert_id] = self._in_use.get(expert_id, 0) + 1
        if place is None:
            tier = self._behind.fill(expert_id, slot)
            self._keep(expert_id, slot)
            return tier
        try:
            slot.copy_from(self._address(place))
        finally:
            with self._lock:
                self._in_use[expert_id] -= 1
                if not self._in_use[expert_id]:
                    del self._in_use[expert_id]
        return Tier.HOST

    @property
    def num_kept(self) -> int:
        """Experts that lie in the arena."""
        return len(self._places)

    def keeps(self, expert_id: ExpertId) -> bool:
        """Whether an expert lies in the arena."""
        return expert_id in self._places

    def _keep(self, expert_id: ExpertId, slot: PackedExpert) -> None:
        with self._lock:
            if expert_id in self._places:
                return
            if not self._free:
                idle = next((one for one in self._places if one not in self._in_use), None)
                if idle is None:
                    return
                self._free.append(self._places.pop(idle))
            place = self._free.pop()
        slot.copy_to(self._address(place))  # nobody knows the place yet
        with self._lock:
            if expert_id in self._places:  # another thread brought it meanwhile
                self._free.append(place)
            else:
                self._places[expert_id] = place

    def _address(self, place: int) -> int:
        return self._memory.data_ptr() + place * self._expert_bytes
