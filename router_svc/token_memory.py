"""Remember which experts a token's first layers chose the last time: the next time they mostly choose the same.

Owns the memory, bounded whatever the vocabulary. A token's row at the first MoE layers is little more than its
embedding, so the choice there hangs on the token far more than on its context (Xue et al., OpenMoE, 2024, call it
context-independent specialization). The first layers are just those that no earlier layer's rows can foretell.
T rows, K top-k.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_NUM_PLACES = 1 << 16  # tokens beyond so many share places, the latest stays; 1.3 MB per layer at K = 8


class TokenMemory:
    """Choices by layer and token. Owned by the engine's thread."""

    def __init__(self, *, num_layers: int, num_places: int = _NUM_PLACES):
        """Remember the first `num_layers` MoE layers."""
        self._num_layers, self._num_places = num_layers, num_places
        self._tokens = np.full((num_layers, num_places), -1, np.int64)  # whose choices lie in each place
        self._choices: NDArray[np.uint16] | None = None  # [num_layers, num_places, K], made when K is known

    @property
    def layers(self) -> range:
        """The layers that are remembered."""
        return range(self._num_layers)

    def learn(self, layer: int, tokens: Sequence[int], ids: NDArray[np.int64]) -> None:
        """Note the choices ids [T, K] of tokens [T] at a layer."""
        if layer not in self.layers:
            return
        if self._choices is None:
            self._choices = np.zeros((self._num_layers, self._num_places, ids.shape[1]), np.uint16)
        known = np.asarray(tokens, np.int64)
        places = known % self._num_places
        self._tokens[layer, places] = known
        self._choices[layer, places] = ids

    def recall(self, layer: int, tokens: Sequence[int]) -> dict[int, list[int]]:
        """Give the choices [K] that each token made last, by its index in `tokens`; those never seen are left out."""
        if self._choices is None or layer not in self.layers:
            return {}
        place_of, choices = self._tokens[layer], self._choices[layer]
        known: dict[int, list[int]] = {}
        for row, token in enumerate(tokens):
            place = token % self._num_places
            if place_of[place] == token:
                known[row] = choices[place].tolist()
        return known
