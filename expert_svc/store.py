"""The experts that a worker holds, by (layer, expert).

Owns residency. Any expert can be had at any time: one that is not resident is read now and counted as a miss. Safe for
use by the data thread and a loader thread at once: each expert is read by one of them while the other waits. Knows
nothing of
dispatches.
"""

import threading
from collections.abc import Callable, Iterable, Mapping

from collegium.model.experts import PackedExpert

ExpertId = tuple[int, int]  # (MoE layer, index)


class ExpertStore:
    """Resident experts, in the kernel's form."""

    def __init__(self, read: Callable[[int, int], PackedExpert]):
        """`read(layer, expert)` brings one expert from its files; it may raise CheckpointError."""
        self._read = read
        self._resident: dict[ExpertId, PackedExpert] = {}
        self._in_flight: dict[ExpertId, threading.Event] = {}
        self._lock = threading.Lock()
        self.num_misses = 0

    def get(self, layer: int, expert: int) -> PackedExpert:
        """Return an expert, reading it first where it is not resident. Raises CheckpointError."""
        found = self._resident.get((layer, expert))
        if found is not None:
            return found
        self.num_misses += 1
        return self._load((layer, expert))

    def warm(self, experts: Iterable[ExpertId], progress: Callable[[int, int], None] | None = None) -> None:
        """Make experts resident. `progress(done, total)` after each. Raises CheckpointError at the first that cannot
        be read.
        """
        wanted = sorted(experts)
        for done, expert_id in enumerate(wanted, 1):
            if expert_id not in self._resident:
                self._load(expert_id)
            if progress is not None:
                progress(done, len(wanted))

    def release_others(self, kept: Iterable[ExpertId]) -> int:
        """Let go of every expert that is not in `kept`; what runs now keeps its reference. Returns how many went."""
        kept = set(kept)
        with self._lock:
            gone = [expert_id for expert_id in self._resident if expert_id not in kept]
            for expert_id in gone:
                del self._resident[expert_id]
        return len(gone)

    def is_resident(self, expert_id: ExpertId) -> bool:
        """Whether an expert is held now."""
        return expert_id in self._resident

    def residency(self) -> Mapping[int, list[int]]:
        """List resident experts by layer, rising."""
        layers: dict[int, list[int]] = {}
        for layer, expert in sorted(self._resident.copy()):
            layers.setdefault(layer, []).append(expert)
        return layers

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights held."""
        return sum(expert.num_bytes for expert in list(self._resident.values()))

    @property
    def num_resident(self) -> int:
        """Experts held."""
        return len(self._resident)

    def _load(self, expert_id: ExpertId) -> PackedExpert:
        while True:
            with self._lock:
                found = self._resident.get(expert_id)
                if found is not None:
                    return found
                waited = self._in_flight.get(expert_id)
                if waited is None:
                    self._in_flight[expert_id] = threading.Event()
                    break
            waited.wait()
        try:
            expert = self._read(*expert_id)
            with self._lock:
                self._resident[expert_id] = expert
            return expert
        finally:
            with self._lock:
                self._in_flight.pop(expert_id).set()
