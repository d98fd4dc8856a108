"""Policies that put residents in an order: what goes first is always known.

Owns the order. A layer's residents stand under keys, the smallest goes first; the heads of the layers are kept, so
that a victim costs microseconds in one layer as in all. `lifo` is the paper's (Huang et al., NeurIPS 2024, section
5): what the batch does not use, then last in, first out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TypeAlias

ExpertId: TypeAlias = tuple[int, int]  # MoE layer, index
Key: TypeAlias = tuple[float, int]  # what it is worth within its layer, tick that breaks ties


class Ranked:
    """Residents in the order in which they go: the smallest key of a layer, and of all layers, is known."""

    name = ""

    def __init__(self) -> None:
        self._keys: dict[int, dict[int, Key]] = {}  # layer -> index -> key
        self._heads: dict[int, tuple[float, int, ExpertId]] = {}  # layer -> its first to go, comparable across layers
        self._stale: set[int] = set()  # layers whose head must be looked for again
        self._seen: dict[ExpertId, int] = {}  # tick of the last visit
        self._latest: dict[int, int] = {}  # layer -> first tick of its latest visit
        self._tick = 0

    def visit(self, layer: int, experts: Sequence[int], counts: Sequence[float], num_tokens: float) -> None:
        self._latest[layer] = self._tick
        keys = self._keys.get(layer, {})
        for index in experts:
            self._seen[layer, index] = self._tick
            self._tick += 1
            if index in keys:
                keys[index] = self._key(layer, index)
        self._stale.add(layer)

    def admit(self, expert_id: ExpertId) -> None:
        layer, index = expert_id
        if self._seen.get(expert_id, -1) < self._latest.get(layer, 0):
            self._seen[expert_id] = self._tick  # not asked for by the latest visit: as recent as now
            self._tick += 1
        self._keys.setdefault(layer, {})[index] = self._key(layer, index)
        self._stale.add(layer)

    def evict(self, expert_id: ExpertId) -> None:
        layer, index = expert_id
        if self._keys.get(layer, {}).pop(index, None) is not None:
            self._stale.add(layer)

    def victim(self, layer: int | None, spared: Collection[ExpertId]) -> ExpertId | None:
        if layer is None:
            for stale in self._stale:
                self._look_again(stale)
            self._stale.clear()
            return self._first_of_all(spared)
        if layer in self._stale:
            self._look_again(layer)
            self._stale.discard(layer)
        head = self._heads.get(layer)
        if head is not None and head[2] in spared:
            head = self._first(layer, spared)
        return None if head is None else head[2]

    def is_worth(self, expert_id: ExpertId, victim: ExpertId) -> bool:
        return True

    def score(self, expert_id: ExpertId) -> float:
        return 0.0

    def set_homes(self, experts: Iterable[ExpertId]) -> None:
        pass

    def _first_of_all(self, spared: Collection[ExpertId]) -> ExpertId | None:
        head = min(self._heads.values(), default=None)
        if head is not None and head[2] in spared:
            # Only layers that begin with a spared expert have to be looked through.
            heads = (self._first(x, spared) if head[2] in spared else head for x, head in self._heads.items())
            head = min((head for head in heads if head is not None), default=None)
        return None if head is None else head[2]

    def _look_again(self, layer: int) -> None:
        head = self._first(layer, ())
        if head is None:
            self._heads.pop(layer, None)
        else:
            self._heads[layer] = head

    def _first(self, layer: int, spared: Collection[ExpertId]) -> tuple[float, int, ExpertId] | None:
        keys = self._keys.get(layer, {})
        if spared:
            kept = {index for at, index in spared if at == layer}
            keys = {index: key for index, key in keys.items() if index not in kept}
        if not keys:
            return None
        index = min(keys, key=keys.__getitem__)
        worth, tick = keys[index]
        return worth * self._scale(layer), tick, (layer, index)

    def _key(self, layer: int, index: int) -> Key:
        """Rank an expert that is resident or about to be."""
        return 0.0, self._seen[layer, index]

    def _scale(self, layer: int) -> float:
        """Give the factor that makes the worth of a layer's keys comparable with other layers'."""
        return 1.0


class Lru(Ranked):
    """The one whose last visit is longest ago goes first."""

    name = "lru"


class Fifo(Ranked):
    """The one that was admitted first goes first."""

    name = "fifo"

    def __init__(self) -> None:
        super().__init__()
        self._admitted: dict[ExpertId, int] = {}

    def admit(self, expert_id: ExpertId) -> None:
        self._admitted[expert_id] = self._tick
        self._tick += 1
        super().admit(expert_id)

    def _key(self, layer: int, index: int) -> Key:
        return 0.0, self._admitted[layer, index]


class Lifo(Fifo):
    """The paper's: what the latest visit does not use goes first, then the one that was admitted last."""

    name = "lifo"

    def __init__(self) -> None:
        super().__init__()
        self._active: frozenset[ExpertId] = frozenset()

    def visit(self, layer: int, experts: Sequence[int], counts: Sequence[float], num_tokens: float) -> None:
        super().visit(layer, experts, counts, num_tokens)
        self._active = frozenset((layer, index) for index in experts)

    def victim(self, layer: int | None, spared: Collection[ExpertId]) -> ExpertId | None:
        found = super().victim(layer, self._active.union(spared))
        return super().victim(layer, spared) if found is None else found

    def _key(self, layer: int, index: int) -> Key:
        return 0.0, -self._admitted[layer, index]


class Lfu(Ranked):
    """The one with the fewest visits goes first; counts outlive evictions, recency breaks ties."""

    name = "lfu"

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[ExpertId, int] = {}
        self._visits: dict[int, int] = {}

    def visit(self, layer: int, experts: Sequence[int], counts: Sequence[float], num_tokens: float) -> None:
        self._visits[layer] = self._visits.get(layer, 0) + 1
        for index in experts:
            self._uses[layer, index] = self._uses.get((layer, index), 0) + 1
        super().visit(layer, experts, counts, num_tokens)

    def score(self, expert_id: ExpertId) -> float:
        """Give the share of the layer's visits that used the expert."""
        return self._uses.get(expert_id, 0) / max(1, self._visits.get(expert_id[0], 0))

    def _key(self, layer: int, index: int) -> Key:
        return self._uses.get((layer, index), 0), self._seen[layer, index]
