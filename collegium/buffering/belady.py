"""Belady's MIN: the resident that is needed again last goes first. It knows the future, so it is a yardstick only.

Owns the next visit of each expert. Like other policies it inserts what was missed, and the published curves do so too;
only where a visit needs more experts than there is room for does it choose among them. A selective one is free: after
each visit it holds those that are needed again first. Where experts are equally large, no policy of its kind has more
hits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from collegium.buffering.ranked import ExpertId, Key, Ranked
from collegium.buffering.visits import Visit


class Min(Ranked):
    """MIN for one replay of the visits that it is told in advance; to be told the same visits in the same order."""

    name = "min"

    def __init__(self, visits: Sequence[Visit], *, is_selective: bool = False) -> None:
        super().__init__()
        self._is_selective = is_selective
        self._next_of_visit = _next_visits(visits)
        self._next: dict[ExpertId, int] = {}
        self._now = 0
        self._active: frozenset[ExpertId] = frozenset()

    def visit(self, layer: int, experts: Sequence[int], counts: Sequence[float], num_tokens: float) -> None:
        for index, following in zip(experts, self._next_of_visit[self._now], strict=True):
            self._next[layer, index] = following
        self._now += 1
        self._active = frozenset((layer, index) for index in experts)
        super().visit(layer, experts, counts, num_tokens)

    def victim(self, layer: int | None, spared: Collection[ExpertId]) -> ExpertId | None:
        # What a visit needs can go as well: its hits were had before its misses come.
        found = None if self._is_selective else super().victim(layer, spared)
        return super().victim(layer, ()) if found is None else found

    def is_worth(self, expert_id: ExpertId, victim: ExpertId) -> bool:
        is_forced = not self._is_selective and victim not in self._active
        return is_forced or self._next[expert_id] < self._next[victim]

    def _key(self, layer: int, index: int) -> Key:
        return -self._next[layer, index], self._seen[layer, index]


def _next_visits(visits: Sequence[Visit]) -> list[tuple[int, ...]]:
    """Say for each expert of each visit which visit needs it next; len(visits) where none does."""
    upcoming: dict[ExpertId, int] = {}
    found: list[tuple[int, ...]] = []
    for at in range(len(visits) - 1, -1, -1):
        visit = visits[at]
        found.append(tuple(upcoming.get((visit.layer, index), len(visits)) for index in visit.experts))
        upcoming.update(((visit.layer, index), at) for index in visit.experts)
    return found[::-1]
