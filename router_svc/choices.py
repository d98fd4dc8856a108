"""Which experts the gates chose in a step, as values, and who wants to hear of them.

Owns the listeners. Knows nothing of sequences, of files or of gRPC.
T rows, K top-k.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collegium.fabric import logs

_log = logs.get("recorder")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoices:
    """One MoE layer's share of StepChoices."""

    layer: int
    ids: NDArray[np.int64]  # [T, K], the heaviest first
    weights: NDArray[np.float32]  # [T, K]
    missed: NDArray[np.uint16]  # [M], experts that workers had to load for the step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChoices:
    """What one step chose: rows of decoding sequences first, then those of prompts. Or what rows of sources chose in
    the layers of an encoder.
    """

    step: int
    sequences: list[int]  # [T] numbers
    positions: list[int]  # [T] in their sequences
    num_decode_rows: int
    layers: list[LayerChoices]
    is_of_sources: bool = False

    @property
    def num_choices(self) -> int:
        """Choices of experts, over all layers."""
        return sum(layer.ids.size for layer in self.layers)


Listener = Callable[[StepChoices], None]  # called from the engine's thread


class Listeners:
    """Told of every committed step. Come and go from one other thread than the engine's, which tells them."""

    def __init__(self) -> None:
        self._members: tuple[Listener, ...] = ()

    def __len__(self) -> int:
        return len(self._members)

    def add(self, listener: Listener) -> None:
        """Tell a listener of every step that begins from now on."""
        self._members = (*self._members, listener)

    def remove(self, listener: Listener) -> None:
        """Tell it no more."""
        self._members = tuple(one for one in self._members if one != listener)

    def tell(self, choices: StepChoices) -> None:
        """Tell all of a step. One that raises is told no more."""
        for listener in self._members:
            try:
                listener(choices)
            except Exception:
                _log.exception("a listener failed and is told no more")
                self.remove(listener)
