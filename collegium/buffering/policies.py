"""Which resident expert makes room for a missed one: the seam that the policies of the expert buffer stand behind.

Owns the policies' names. A policy knows neither bytes nor slots nor weights: whoever holds the slots tells it what
was visited, admitted and evicted, and asks it for victims. No clock, no randomness: traces can be replayed. One
thread owns a policy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from collegium.buffering.ewma import HALF_LIFE_TOKENS, Ewma
from collegium.buffering.ranked import ExpertId, Fifo, Lfu, Lifo, Lru


class Policy(Protocol):
    """An eviction policy of one buffer."""

    name: str

    def visit(self, layer: int, experts: Sequence[int], counts: Sequence[float], num_tokens: float) -> None:
        """Learn that num_tokens tokens visited a layer and counts[i] of them chose experts[i], which are distinct.

        To be told before the admits and evicts of the same visit.
        """
        ...

    def admit(self, expert_id: ExpertId) -> None:
        """Take note that an expert is resident from now on."""
        ...

    def evict(self, expert_id: ExpertId) -> None:
        """Take note that an expert is no longer resident; it need not have been a victim."""
        ...

    def victim(self, layer: int | None, spared: Collection[ExpertId]) -> ExpertId | None:
        """Say which resident of a layer, or of all (None), goes first; None where all are spared. Changes nothing."""
        ...

    def is_worth(self, expert_id: ExpertId, victim: ExpertId) -> bool:
        """Say whether an expert deserves the slot of a victim; always, but for a policy that is selective."""
        ...

    def score(self, expert_id: ExpertId) -> float:
        """Give the expected uses per token, comparable across layers; 0 where the policy has no idea."""
        ...

    def set_homes(self, experts: Iterable[ExpertId]) -> None:
        """Replace the experts that have their home here; only policies that score care."""
        ...


_PLAIN: Mapping[str, Callable[[], Policy]] = {"lifo": Lifo, "fifo": Fifo, "lru": Lru, "lfu": Lfu}
POLICIES = (*_PLAIN, "ewma")


def make_policy(
    name: str,
    *,
    half_life_tokens: float = HALF_LIFE_TOKENS,
    home_bonus: float = 0.0,
    is_selective: bool = False,
) -> Policy:
    """Make a policy with nothing resident; the options are those of `ewma`. ValueError for an unknown name."""
    if name == "ewma":
        return Ewma(half_life_tokens, home_bonus, is_selective)
    if name not in _PLAIN:
        raise ValueError(f"there is no policy {name!r}; there are {', '.join(POLICIES)}")
    return _PLAIN[name]()
