"""Experts that stay once they are resident, whatever the policy of the others is: those that every token has.

Huang et al. lock the shared experts of DeepSeek-MoE in the cache (their answer to the reviewers). Owns nothing but the
names of these; the policy of the others doesn't hear of their coming.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from collegium.buffering.policies import Policy
from collegium.buffering.ranked import ExpertId


class Pinned:
    """A policy beside experts that it doesn't decide on."""

    def __init__(self, policy: Policy, pinned: Iterable[ExpertId]) -> None:
        """pinned: they always deserve a slot and are never a victim."""
        self._policy, self._pinned = policy, frozenset(pinned)
        self.name = policy.name

    def visit(self, layer: int, experts: Sequence[int], counts: Sequence[float], num_tokens: float) -> None:
        """Tell the policy, of all experts: what is visited beside a pinned one still counts."""
        self._policy.visit(layer, experts, counts, num_tokens)

    def admit(self, expert_id: ExpertId) -> None:
        """Tell the policy, unless the expert is none of its own."""
        if expert_id not in self._pinned:
            self._policy.admit(expert_id)

    def evict(self, expert_id: ExpertId) -> None:
        """Tell the policy, unless the expert is none of its own: a home that has moved away goes, pinned or not."""
        if expert_id not in self._pinned:
            self._policy.evict(expert_id)

    def victim(self, layer: int | None, spared: Collection[ExpertId]) -> ExpertId | None:
        """Ask the policy, which knows of no pinned one."""
        return self._policy.victim(layer, spared)

    def is_worth(self, expert_id: ExpertId, victim: ExpertId) -> bool:
        """Say that a pinned one is, and ask of others."""
        return expert_id in self._pinned or self._policy.is_worth(expert_id, victim)

    def score(self, expert_id: ExpertId) -> float:
        """Ask the policy."""
        return self._policy.score(expert_id)

    def set_homes(self, experts: Iterable[ExpertId]) -> None:
        """Tell the policy."""
        self._policy.set_homes(experts)
