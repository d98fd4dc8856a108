"""What a forward pass gives of a step: logits of the rows that need them, and whose these are.

R rows that were kept, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from router_svc.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLogits:
    """The logits of one step, and when it was computed."""

    logits: Tensor  # [R, V]
    spans: Mapping[Sequence, tuple[int, int]]  # begin and end of each sequence's rows
    began_s: float
    seconds: float

    def of(self, sequences: list[Sequence]) -> Tensor:
        """Return the first row of each sequence, [len(sequences), V]."""
        at = [self.spans[sequence][0] for sequence in sequences]
        return self.logits if at == list(range(self.logits.shape[0])) else self.logits[at]
