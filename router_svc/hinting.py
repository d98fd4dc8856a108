"""Tell workers which experts coming layers will ask them for: the first ones when a step begins, by what its tokens
chose the last time, the others while an earlier layer's rows are with the workers.

Owns what was foretold until the layer's own choices are known, and the count of both. Advice only: whatever goes wrong
here is swallowed, because the dispatch that follows meets the same fault and answers for it.
T rows, K top-k.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from collegium.link.base import RouterLink
from collegium.link.frame import Hint, LinkError
from collegium.model.native.step import Foretelling
from router_svc.foresight import Foretells
from router_svc.token_memory import TokenMemory


@dataclass(slots=True)
class HintTotals:
    """Choices, one per row and expert, since the start."""

    hinted: int = 0  # foretold
    hinted_right: int = 0  # of these, the choices that the layer then made


class Hinting:
    """Foretells layers of a step before their turn. Owned by the engine's thread."""

    def __init__(self, foresight: Foretells, totals: HintTotals, memory: TokenMemory | None = None):
        """`totals` are counted up."""
        self._foresight, self._totals, self._memory = foresight, totals, memory
        self._tokens: Sequence[int] = ()  # [T] of the step at hand
        # By layer and row of the step at hand, choices [K]:
        self._recalled: dict[int, dict[int, list[int]]] = {}
        self._foretold: dict[int, dict[int, list[int]]] = {}  # recalled or from a gate

    def begin(self, tokens: Sequence[int]) -> None:
        """Open a step, or the same one again, of tokens [T]; of none where no worker has a use for hints."""
        self._tokens = tokens
        self._recalled.clear()
        self._foretold.clear()

    def recall(
        self, num_decode_rows: int, table: Sequence[NDArray[np.int64]], live: Sequence[tuple[str, RouterLink]]
    ) -> None:
        """Tell each worker its part of what the step's first `num_decode_rows` tokens are remembered to choose.

        table[layer] [E]: who computes each expert, an index into `live`.
        """
        if self._memory is None:
            return
        for layer in self._memory.layers:
            known = self._memory.recall(layer, self._tokens[:num_decode_rows])
            if known:
                self._recalled[layer] = self._foretold[layer] = known
                self._send(layer, known.values(), table[layer], live)

    def hand_over(self, foretelling: Foretelling, num_rows: int) -> None:
        """Let a step in one call foretell from here on: what has been recalled is its to settle."""
        num_known = 0 if self._memory is None else len(self._memory.layers)
        foretelling.open(num_rows, self._recalled, num_known)
        self._recalled, self._foretold = {}, {}

    def take_back(self, foretelling: Foretelling, num_layers: int) -> None:
        """Hear what such a step has foretold and chosen, of its first `num_layers` layers."""
        call = foretelling.call
        self._totals.hinted += call.hinted
        self._totals.hinted_right += call.right
        call.hinted = call.right = 0
        if self._memory is not None and len(self._tokens) == foretelling.chosen.shape[1]:
            for layer in self._memory.layers[:num_layers]:
                self._memory.learn(layer, self._tokens, foretelling.chosen[layer])

    def settle(self, layer: int, ids: NDArray[np.int64]) -> None:
        """Count how much of what was foretold came true: ids [T, K] are what the rows of the step chose."""
        said = self._foretold.pop(layer, None)
        if said:
            self._totals.hinted += len(said) * ids.shape[1]
            self._totals.hinted_right += sum(len(set(ids[row].tolist()).intersection(one)) for row, one in said.items())
        if self._memory is not None and len(self._tokens) == len(ids):
            self._memory.learn(layer, self._tokens, ids)

    def tell(
        self,
        layer: int,
        x: Tensor,
        worker_of: NDArray[np.int64],
        live: Sequence[tuple[str, RouterLink]],
    ) -> None:
        """Foretell a layer's choices of the decode rows x [T, D] and send each worker its part.

        Rows whose tokens are remembered at that layer have been told already.
        worker_of [E]: who computes each expert of that layer, an index into `live`.
        """
        known = self._recalled.get(layer, {})
        rows = [row for row in range(len(x)) if row not in known]
        if not rows:
            return
        ids = self._foresight.predict(layer, x[rows] if known else x)
        if ids is None:
            return
        self._foretold[layer] = known | dict(zip(rows, ids, strict=True))
        self._send(layer, ids, worker_of, live)

    def _send(
        self,
        layer: int,
        ids: Iterable[list[int]],
        worker_of: NDArray[np.int64],
        live: Sequence[tuple[str, RouterLink]],
    ) -> None:
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
