"""The default policy: a moving average of each expert's uses per token.

Owns the averages, and, where it is selective, what it learns about whom to let in. A layer's averages decay together,
so one number per layer decays and a visit touches only the experts that it uses. u: an average over its layer's decay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from collegium.buffering.ranked import ExpertId, Key, Ranked

HALF_LIFE_TOKENS = 8.0
_FIRST_BIAS = 0.25  # of newcomers: as good as always let in, until visits have taught otherwise
_LEARNING_RATE = 0.005  # per newcomer or victim; from 0.003 to 0.01 makes no difference that can be seen
_TINY = 1e-150  # a layer's decay below this is folded into its averages, far from where floats end


class Ewma(Ranked):
    """The one with the smallest moving average of uses per token goes first; recency breaks ties.

    Averages decay with the tokens of their own layer and outlive evictions. A home counts as home_bonus more uses per
    token. A selective one keeps a newcomer out where its next use is less likely than the victim's. Averages say too
    little of newcomers, who were used this moment, and too much of victims; how far they are off is learned, by
    layer, from who of them is used by the next visit.
    """

    name = "ewma"

    def __init__(self, half_life_tokens: float, home_bonus: float, is_selective: bool) -> None:
        super().__init__()
        self._per_token = 0.5 ** (1.0 / half_life_tokens)
        self._home_bonus = home_bonus
        self._is_selective = is_selective
        self._averages: dict[int, dict[int, float]] = {}  # layer -> index -> u; times the layer's decay: uses per token
        self._decay: dict[int, float] = {}
        self._homes: dict[int, set[int]] = {}
        # By layer, the scores to learn from: of newcomers (True) and of victims (False), by (index, which).
        self._compared: dict[int, dict[tuple[int, bool], float]] = {}
        self._newcomer_bias: dict[int, float] = {}  # layer -> mean of used by the next visit (0 or 1) minus score
        self._victim_bias: dict[int, float] = {}

    def visit(self, layer: int, experts: Sequence[int], counts: Sequence[float], num_tokens: float) -> None:
        if layer in self._compared:
            self._learn(layer, frozenset(experts))
        kept = self._per_token**num_tokens
        decay = self._decay.get(layer, 1.0) * kept
        if decay < _TINY:
            self._fold(layer, decay)
            decay = 1.0
        self._decay[layer] = decay
        averages = self._averages.setdefault(layer, {})
        gain = (1.0 - kept) / decay / num_tokens
        for index, count in zip(experts, counts, strict=True):
            averages[index] = averages.get(index, 0.0) + gain * count
        super().visit(layer, experts, counts, num_tokens)

    def is_worth(self, expert_id: ExpertId, victim: ExpertId) -> bool:
        if not self._is_selective:
            return True
        score, victim_score = self.score(expert_id), self.score(victim)
        self._compared.setdefault(expert_id[0], {})[expert_id[1], True] = score
        self._compared.setdefault(victim[0], {})[victim[1], False] = victim_score
        newcomer_bias = self._newcomer_bias.get(expert_id[0], _FIRST_BIAS)
        return score + newcomer_bias >= victim_score + self._victim_bias.get(victim[0], 0.0)

    def score(self, expert_id: ExpertId) -> float:
        layer, index = expert_id
        bonus = self._home_bonus if index in self._homes.get(layer, ()) else 0.0
        return self._averages.get(layer, {}).get(index, 0.0) * self._scale(layer) + bonus

    def set_homes(self, experts: Iterable[ExpertId]) -> None:
        self._homes = {}
        for layer, index in experts:
            self._homes.setdefault(layer, set()).add(index)
        self._stale.update(self._keys)

    def _learn(self, layer: int, used: frozenset[int]) -> None:
        newcomer_bias = self._newcomer_bias.get(layer, _FIRST_BIAS)
        victim_bias = self._victim_bias.get(layer, 0.0)
        for (index, is_newcomer), score in self._compared.pop(layer).items():
            seen = (index in used) - score
            if is_newcomer:
                newcomer_bias += _LEARNING_RATE * (seen - newcomer_bias)
            else:
                victim_bias += _LEARNING_RATE * (seen - victim_bias)
        self._newcomer_bias[layer] = newcomer_bias
        self._victim_bias[layer] = victim_bias

    def _first(self, layer: int, spared: Collection[ExpertId]) -> tuple[float, int, ExpertId] | None:
        homes = self._homes.get(layer) if self._home_bonus else None
        if not homes:
            return super()._first(layer, spared)
        ranked = (
            (self.score((layer, index)), tick, (layer, index))
            for index, (_, tick) in self._keys.get(layer, {}).items()
            if (layer, index) not in spared
        )
        return min(ranked, default=None)

    def _key(self, layer: int, index: int) -> Key:
        return self._averages.get(layer, {}).get(index, 0.0), self._seen[layer, index]

    def _scale(self, layer: int) -> float:
        return self._decay.get(layer, 1.0)

    def _fold(self, layer: int, decay: float) -> None:
        # Decay only ever shrinks one number per layer; now and then it goes into the averages themselves.
        averages = {index: u * decay for index, u in self._averages.get(layer, {}).items()}
        self._averages[layer] = averages
        keys = self._keys.get(layer, {})
        keys.update({index: (averages.get(index, 0.0), tick) for index, (_, tick) in keys.items()})
