"""A worker that answers rows which are no numbers, for as long as a test says."""

import numpy as np
import torch

from expert_svc.buffer import ExpertBuffer
from expert_svc.compute import ComputeLoop


def poisoned(loop: ComputeLoop, buffer: ExpertBuffer, layer: int) -> list[int]:
    """Have a layer's batches answered by NaN, one for each entry of the list that is returned.

    What is resident is answered without the interpreter, so the layer's experts are let go of; what is poisoned is
    not loaded.
    """
    poison: list[int] = []
    compute, end = loop._compute, loop._port.native

    def answer(batch):  # type: ignore[no-untyped-def]
        if batch.layer != layer or not poison:
            compute(batch)
            return
        poison.pop()
        y = torch.full((batch.num_rows, loop._d_model), torch.nan, dtype=loop._dtype)
        end.answer(y.data_ptr(), np.empty(0, np.uint16), 0, 1)

    loop._compute = answer  # type: ignore[method-assign]
    let_go(buffer, layer)
    return poison


def let_go(buffer: ExpertBuffer, layer: int) -> None:
    """Have a buffer without a budget hold nothing of a layer."""
    buffer.release_others([(at, e) for at, experts in buffer.residency().items() if at != layer for e in experts])
