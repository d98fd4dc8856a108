"""Tell workers which experts the next layer will ask them for, while this layer's rows are with them.

Owns what was foretold until the layer's own choices are known, and the count of both. Advice only: whatever goes wrong
here is swallowed, because the dispatch that follows meets the same fault and answers for it.
T rows, K top-k.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from collegium.link.base import RouterLink
from collegium.link.frame import Hint, LinkError
from router_svc.foresight import Choices, Foretells


@dataclass(slots=True)
class HintTotals:
    """Choices, one per row and expert, since the start."""

    hinted: int = 0  # foretold
    hinted_right: int = 0  # of these, the choices that the layer then made


class Hinting:
    """Foretells layers of a step before their turn. Owned by the engine's thread."""

    def __init__(self, foresight: Foretells, totals: HintTotals):
        """`totals` are counted up."""
        self._foresight, self._totals = foresight, totals
        self._foretold: dict[int, Choices] = {}  # by layer, of the step at hand

    def settle(self, layer: int, ids: NDArray[np.int64]) -> None:
        """Count how much of what was foretold came true: ids [T, K] are what the rows of the step chose."""
        if layer == 0:  # another step, or the same one again
            self._foretold.clear()
        said = self._foretold.pop(layer, None)
        if not said or len(said) > len(ids):
            return
        self._totals.hinted += len(said) * len(said[0])
        self._totals.hinted_right += sum(
            len(set(row).intersection(chosen)) for row, chosen in zip(said, ids[: len(said)].tolist(), strict=True)
        )

    def tell(
        self,
        layer: int,
        x: Tensor,
        worker_of: NDArray[np.int64],
        live: Sequence[tuple[str, RouterLink]],
    ) -> None:
        """Foretell a layer's choices of the decode rows x [T, D] and send each worker its part.

        worker_of [E]: who computes each expert of that layer, an index into `live`.
        """
        ids = self._foresight.predict(layer, x)
        if ids is None:
            return
        self._foretold[layer] = ids
        # No numpy: for the few choices of decode rows, any call of it costs as much as all of this.
        expected = Counter(chain.from_iterable(ids))  # tokens by expert
        shares: dict[int, list[int]] = {}  # experts by worker
        for expert in expected:
            shares.setdefault(int(worker_of[expert]), []).append(expert)
        for worker, experts in shares.items():
            counts = [expected[expert] for expert in experts]
            hint = Hint(layer=layer, experts=np.array(experts, np.uint16), counts=np.array(counts, np.uint16))
            try:
                live[worker][1].hint(hint)
            except LinkError:
                continue
