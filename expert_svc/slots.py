"""The worker's fast memory: slots that hold one expert each, in the kernel's form.

Owns the slots and which of them are free. With a budget they are all made at the start and none later; without one they
are made as they are needed. The manifest refuses a checkpoint whose experts differ in shape, so every slot fits every
expert.
"""

import torch

from collegium.fabric import logs
from collegium.model.device_experts import DeviceSlots
from collegium.model.experts import PackedExpert
from collegium.model.manifest import Manifest
from collegium.model.weights import empty_weights

_log = logs.get("slots")


def blank_slot(manifest: Manifest, dtype: torch.dtype) -> PackedExpert:
    """Make a slot; its memory is touched, so that it is there when it is needed."""
    return PackedExpert(empty_weights(manifest, dtype))


def bytes_on_device(manifest: Manifest, dtype: torch.dtype) -> int:
    """Say what a slot takes in a device's memory, where nothing is packed."""
    blank = empty_weights(manifest, dtype)
    parts = (blank.gate_up, blank.down, blank.gate_up_bias, blank.down_bias)
    return sum(part.nbytes for part in parts if part is not None)


class Slots:
    """Slots of one worker. The one that was freed last is given first: its memory is likeliest to be in a cache."""

    def __init__(
        self, manifest: Manifest, dtype: torch.dtype, *, num_slots: int | None, device: torch.device | None = None
    ):
        """Make `num_slots`, or with None as many as will be asked for; on a device, all of them in one piece."""
        self._manifest, self._dtype = manifest, dtype
        self.capacity = num_slots
        self.slab: DeviceSlots | None = None
        if device is not None:
            if num_slots is None:
                raise ValueError("slots on a device are made at the start: say how many")
            self.slab = DeviceSlots(empty_weights(manifest, dtype), num_slots=num_slots, device=device)
            if self.slab.is_cuda:
                forms = {str(rows): form.name for rows, form in self.slab.calibrate().items()}
                _log.info("kernel forms by rows of an expert", device=str(device), **forms)
            self._free: list[PackedExpert] = [*self.slab.slots]
            self.num_made, self.slot_bytes = num_slots, bytes_on_device(manifest, dtype)
            return
        blank = empty_weights(manifest, dtype)  # one for all: freed between them, it would leave holes in the heap
        self._free = [PackedExpert(blank) for _ in range(num_slots or 0)]
        self.num_made = len(self._free)
        self.slot_bytes = (self._free[0] if self._free else blank_slot(manifest, dtype)).num_bytes

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def take(self) -> PackedExpert | None:
        """Give a slot, or None where all of the budget is taken."""
        if self._free:
            return self._free.pop()
        if self.capacity is not None:
            return None
        self.num_made += 1
        return blank_slot(self._manifest, self._dtype)

    def give_back(self, slot: PackedExpert) -> None:
        """Take a slot back; without a budget its memory goes back to the system."""
        if self.capacity is None:
            self.num_made -= 1
        else:
            self._free.append(slot)
