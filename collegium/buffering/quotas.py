"""How many slots each layer should have: soft quotas by marginal gain.

Owns quotas, of one class of slots that are all alike. Knows neither which expert goes nor bytes: a policy picks the
victim in the layer that is named here. The expected hits of a layer's n-th slot are the uses per visit of its n-th
most used expert, so handing out slots one by one to the layer that gains most is taking the most used of all. L
layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

HALF_LIFE_VISITS = 128.0  # of the averages that quotas come from: far slower than what a policy evicts
EVEN_SHARE = 0.9  # of an even share, kept by each layer whatever its gain: lower gains more where layers differ
EVERY_VISITS = 8  # per layer: how often quotas are reckoned anew


class Quotas:
    """Soft quotas of num_slots slots over num_layers layers; an even split until visits say otherwise."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        num_slots: int,
        *,
        half_life_visits: float = HALF_LIFE_VISITS,
        even_share: float = EVEN_SHARE,
        every_visits: int = EVERY_VISITS,
    ) -> None:
        self._num_slots = num_slots
        self._kept = 0.5 ** (1.0 / half_life_visits)
        self._even_share = even_share
        self._every = every_visits * num_layers
        self._uses = np.zeros((num_layers, num_experts))  # [L, E] float64, visits that used it over visits
        self._quotas = [num_slots / num_layers] * num_layers
        self._num_visits = 0

    @property
    def quotas(self) -> tuple[float, ...]:
        """Give the slots that each layer should have: together num_slots, or all experts where those are fewer."""
        return tuple(self._quotas)

    def visit(self, layer: int, experts: Sequence[int], counts: Sequence[float], num_tokens: float) -> None:
        """Learn which experts a visit of a layer used."""
        uses = self._uses[layer]
        uses *= self._kept
        uses[np.asarray(experts, dtype=np.intp)] += 1.0 - self._kept
        self._num_visits += 1
        if self._num_visits % self._every == 0:
            self._reckon()

    def layer_to_shrink(self, layer: int, num_resident: Sequence[int]) -> int:
        """Say from which layer an insertion into a layer takes its slot: the one furthest above its quota.

        num_resident: [L] residents that could go. The answer has at least one, and may be the layer itself, which wins
        ties. ValueError where no layer has any.
        """
        above = [(n - quota, -at) for at, (n, quota) in enumerate(zip(num_resident, self._quotas, strict=True)) if n]
        if not above:
            raise ValueError("no layer has a resident expert")
        most, at = max(above)
        own = num_resident[layer] + 1 - self._quotas[layer]
        return layer if num_resident[layer] and own >= most else -at

    def _reckon(self) -> None:
        num_layers, num_experts = self._uses.shape
        floor = int(min(self._even_share * self._num_slots / num_layers, num_experts))
        gains = -np.sort(-self._uses, axis=1)  # [L, E], a layer's n-th slot gains gains[l, n]
        left = min(self._num_slots, num_layers * num_experts) - floor * num_layers
        order = np.argsort(-gains[:, floor:], axis=None, kind="stable")[: max(0, left)]
        extra = np.bincount(order // max(1, num_experts - floor), minlength=num_layers)
        self._quotas = [float(floor + more) for more in extra]
