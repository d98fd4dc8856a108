"""Play recorded choices of experts on any model, for experiments: its answers are then worth nothing.

Owns the choices of a trace, cut to the model's shape. The weights stay the gate's own. Layer l plays layer l mod L' of
the trace; position p of a sequence plays the trace's token (p + a number from the request's id) mod N.
T rows of a step, K top-k, N tokens and L' layers of the trace.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.buffering.traces import Trace, TraceError, read_trace
from router_svc.foresight import Choices
from router_svc.remote_experts import ExpertCall

Run = tuple[str, int, int]  # positions of a sequence in a step: its request's id, the first, the one after the last


class UnsafeRoutingError(ValueError):
    """The file's routing cannot be played on the model."""


class UnsafeRouting:
    """Choices that replace the gates'. Owned by the engine's thread."""

    asks_gates = False

    def __init__(self, table: NDArray[np.int64], *, num_experts: int, accuracy: float = 0.0, seed: int = 0):
        """Play `table` [L', N, K]: ids are taken mod num_experts and made distinct in each token.

        accuracy: share of the choices that `predict` foretells rightly; 0: it foretells nothing.
        """
        self._table = torch.from_numpy(_distinct(table % num_experts, num_experts))
        self._accuracy, self._num_experts = accuracy, num_experts
        self._draw = np.random.default_rng(seed)
        self._tokens = torch.zeros(0, dtype=torch.long)  # [T] of the step at hand

    def begin(self, rows: Sequence[Run]) -> None:
        """Take the rows of the step that is computed next."""
        self._tokens = torch.tensor(tokens_of(rows, self._table.shape[1]))

    def played(self, call: ExpertCall) -> ExpertCall:
        """Wrap an expert call so that it gets the played ids instead of the gate's."""

        def play(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return call(layer, x, self._chosen(layer).to(ids.device), weights)

        return play

    def predict(self, layer: int, x: Tensor) -> Choices | None:
        """Foretell for the step's first len(x) rows as a gate of the accuracy asked for would."""
        if not self._accuracy:
            return None
        ids = self._chosen(layer)[: len(x)].numpy()
        wrong = self._draw.random(ids.shape) >= self._accuracy
        others = self._draw.integers(1, self._num_experts, ids.shape)
        return _distinct(np.where(wrong, (ids + others) % self._num_experts, ids), self._num_experts).tolist()

    def _chosen(self, layer: int) -> Tensor:
        return self._table[layer % len(self._table)].index_select(0, self._tokens)  # [T, K]


def load_unsafe_routing(path: Path, *, num_experts: int, top_k: int) -> UnsafeRouting:
    """Read a trace to be played on a model. Raises UnsafeRoutingError naming the file and what does not fit."""
    try:
        table = table_of(read_trace(path), top_k)
    except (TraceError, OSError) as error:
        raise UnsafeRoutingError(str(error)) from error
    except UnsafeRoutingError as error:
        raise UnsafeRoutingError(f"{path}: {error}") from None
    return UnsafeRouting(table, num_experts=num_experts)


def table_of(trace: Trace, top_k: int) -> NDArray[np.int64]:
    """Lay out a trace's choices by layer, token and rank: [L', N, K]; tokens in the order of their sequences.

    Tokens that lack a layer are left out: some recorders skip the last one for all but a prompt's last token. Raises
    UnsafeRoutingError.
    """
    if trace.header.top_k < top_k:
        raise UnsafeRoutingError(
            f"its tokens choose {trace.header.top_k} experts, the model's {top_k}; play a trace of at least {top_k}"
        )
    _, layer = np.unique(trace.layer, return_inverse=True)
    _, token = np.unique(np.stack([trace.turn, trace.step]), axis=1, return_inverse=True)
    is_used = trace.slot < top_k
    table = np.full((int(layer.max()) + 1, int(token.max()) + 1, top_k), -1, dtype=np.int64)
    table[layer[is_used], token[is_used], trace.slot[is_used]] = trace.expert[is_used]
    whole = (table >= 0).all(axis=(0, 2))
    if not whole.any():
        raise UnsafeRoutingError(f"no token has {top_k} experts at each of its {len(table)} layers")
    return table[:, whole]


def tokens_of(rows: Sequence[Run], num_tokens: int) -> list[int]:
    """Say which of a trace's tokens each row of a step plays: [T]."""
    tokens: list[int] = []
    for request_id, begin, end in rows:
        start = zlib.crc32(request_id.encode())
        tokens += [(start + position) % num_tokens for position in range(begin, end)]
    return tokens


def _distinct(ids: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """Replace ids [..., K] that stand in their row before by the next one that does not. Needs K <= num_experts."""
    out = ids.copy()
    for slot in range(1, out.shape[-1]):
        while (is_taken := (out[..., :slot] == out[..., slot : slot + 1]).any(-1)).any():
            out[is_taken, slot] = (out[is_taken, slot] + 1) % num_experts
    return out
