"""Static gating with a capacity, in the system itself: what finds no place at its expert is dropped.

Owns Dropping: a model served in one process, whose router leaves out of each layer of a step the choices beyond the
capacity, first choices first, as GShard and fairseq do; and the two other techniques beside it, so that all eight
combinations can be judged by what they answer. Dynamic gating is the same process without a capacity.
T tokens of a step, E experts, K top-k.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.one_process import Answer, OneProcess, Request
from benchmarks.techniques import balance
from benchmarks.ways import told_of_one

_NUM_WORKERS = 2


class Dropping:
    """A model in one process; a context manager. Counts the choices that came, and those that were dropped."""

    def __init__(self, model_dir: Path, *, factor: float, buffers: bool, balances: bool):
        """factor: an expert takes at most ceil(factor * K / E * T) rows of a step; 0: all that choose it.

        buffers: slots for half of the experts. balances: homes and copies are planned from the loads of the first run.
        """
        memory = {"expert_memory": "25%", "host_memory": "100%"} if buffers else {}
        self._told = ExitStack()
        self._running = self._told.enter_context(
            told_of_one(OneProcess(model_dir, num_workers=_NUM_WORKERS, dtype=torch.float32, **memory), "one process")
        )
        self._factor, self._balances = factor, balances
        self.num_choices = self.num_dropped = 0
        model = self._running.model
        # NLLB-MoE divides by the weights that are left, once some are dropped.
        self._is_renormalised = model.both is not None and model.top_k > 1
        self._num_experts = model.num_experts
        if factor:
            model.set_expert_call(self._compute)

    def __enter__(self) -> "Dropping":
        return self

    def __exit__(self, *_: object) -> None:
        self._told.close()

    @property
    def num_misses(self) -> int:
        """Experts that were not in their worker's slots when rows came for them."""
        return sum(buffer.totals.requests - buffer.totals.hits for buffer in self._running.buffers)

    def run(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """Serve requests; see OneProcess. The first run is what balancing learns from."""
        answers = self._running.run(requests)
        if self._balances:
            balance(self._running)
            self._balances = False
        return answers

    def _compute(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        capacity = max(1, math.ceil(self._factor * ids.shape[1] / self._num_experts * len(ids)))
        kept = torch.from_numpy(places(ids.numpy(), weights.numpy()) < capacity)
        left = weights * kept
        if self._is_renormalised:
            rest = left.sum(1, keepdim=True)
            left = torch.where(rest > 0, left * weights.sum(1, keepdim=True) / rest.clamp(min=1e-9), left)
        self.num_choices += kept.numel()
        self.num_dropped += int(kept.numel() - kept.sum())
        return self._running.calls.compute(layer, x, ids, left)


def places(ids: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.int64]:
    """Which place at its expert each choice [T, K] takes: all tokens' first choices before their second ones."""
    rank = np.argsort(-weights, axis=1, kind="stable")
    flat = np.take_along_axis(ids, rank, axis=1).T.ravel()
    order = np.argsort(flat, kind="stable")
    place = np.empty_like(flat)
    place[order] = np.arange(len(flat)) - np.searchsorted(flat[order], flat[order])
    found = np.empty_like(ids)
    np.put_along_axis(found, rank, place.reshape(ids.shape[1], -1).T, axis=1)
    return found
