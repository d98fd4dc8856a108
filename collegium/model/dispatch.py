"""Plan which worker computes which rows, and put the answers back together.

Owns DispatchPlan. Knows nothing of links, of workers' health, or of weights.
T tokens, K top-k, D model, N = T*K pairs, G experts with rows. Dynamic gating: Huang et al., NeurIPS 2024, section 4.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collegium.model import native
from collegium.model.native import dispatch as native_dispatch


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerShare:
    """What one worker gets of one layer's tokens. A token goes once, with all its pairs for that worker.

    experts [G] uint16, rising; counts [G] uint16, their pairs; pair_rows [P] uint32, ordered by expert: index into
    `tokens`; pair_weights [P] float32; tokens [R] int64, rising: index into the layer's tokens.
    """

    worker: int
    tokens: NDArray[np.int64]
    experts: NDArray[np.uint16]
    counts: NDArray[np.uint16]
    pair_rows: NDArray[np.uint32]
    pair_weights: NDArray[np.float32]

    @property
    def num_rows(self) -> int:
        """R: rows that travel."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchPlan:
    """The shares of one layer; workers without rows do not appear."""

    num_tokens: int
    shares: tuple[WorkerShare, ...]


def plan_dispatch(
    expert_ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    worker_of: NDArray[np.int64],
    workers: NDArray[np.int64] | None = None,
) -> DispatchPlan:
    """Split the gate's choices by worker.

    expert_ids, weights: [T, K]; an id below 0 means no expert. worker_of: [E], the worker that computes each expert
    now; workers: [T, K], who computes each pair instead, where experts have several homes. Ordered by
    (worker, expert, token): by counting, O(N + W * (E + T)), or in numpy by one sort.
    """
    if native.library() is not None and expert_ids.size <= 65_535:  # a count has 16 bits
        return _plan_natively(expert_ids, weights, worker_of, workers)
    return plan_in_numpy(expert_ids, weights, worker_of, workers)


def _plan_natively(
    expert_ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    worker_of: NDArray[np.int64],
    workers: NDArray[np.int64] | None,
) -> DispatchPlan:
    ids = np.ascontiguousarray(expert_ids, np.int64)
    chosen = None if workers is None else np.ascontiguousarray(workers, np.int64)
    num_workers = 1 + int(max(worker_of.max(initial=0), 0 if chosen is None else chosen.max(initial=0)))
    planned = native_dispatch.plan(
        ids, np.ascontiguousarray(weights, np.float32), np.ascontiguousarray(worker_of, np.int64), chosen, num_workers
    )
    return DispatchPlan(num_tokens=len(ids), shares=shares_of(planned))


def shares_of(planned: native_dispatch.Planned) -> tuple[WorkerShare, ...]:
    """Take apart what the library planned, as views."""
    shares: list[WorkerShare] = []
    row = group = pair = 0
    for worker, (num_rows, num_groups, num_pairs) in enumerate(planned.sizes.reshape(-1, 3).tolist()):
        if num_pairs:
            shares.append(
                WorkerShare(
                    worker=worker,
                    tokens=planned.tokens[row : row + num_rows],
                    experts=planned.experts[group : group + num_groups],
                    counts=planned.counts[group : group + num_groups],
                    pair_rows=planned.pair_rows[pair : pair + num_pairs],
                    pair_weights=planned.pair_weights[pair : pair + num_pairs],
                )
            )
            row, group, pair = row + num_rows, group + num_groups, pair + num_pairs
    return tuple(shares)


def plan_in_numpy(
    expert_ids: NDArray[np.int64],
    weights: NDArray[np.float32],
    worker_of: NDArray[np.int64],
    workers: NDArray[np.int64] | None = None,
) -> DispatchPlan:
    """Plan without the library, for machines that have none; `plan_dispatch` says what."""
    num_tokens, top_k = expert_ids.shape
    expert, weight = expert_ids.ravel(), weights.ravel()
    token: NDArray[np.int64] = np.repeat(np.arange(num_tokens, dtype=np.int64), top_k)
    worker = worker_of[expert] if workers is None else workers.ravel()
    if (expert < 0).any():
        kept = expert >= 0
        expert, token, weight, worker = expert[kept], token[kept], weight[kept], worker[kept]
    return DispatchPlan(num_tokens=num_tokens, shares=_split(token, expert, weight, worker, num_tokens))


def replan(share: WorkerShare, worker_of: NDArray[np.int64], num_tokens: int) -> tuple[WorkerShare, ...]:
    """Split a share anew, for a worker that could not compute it. Token indices stay those of the layer."""
    expert = np.repeat(share.experts.astype(np.int64), share.counts)
    return _split(share.tokens[share.pair_rows], expert, share.pair_weights, worker_of[expert], num_tokens)


def _split(
    token: NDArray[np.int64],
    expert: NDArray[np.int64],
    weight: NDArray[np.float32],
    worker: NDArray[np.int64],
    num_tokens: int,
) -> tuple[WorkerShare, ...]:
    order = np.lexsort((expert, worker))  # stable: tokens stay rising within an expert
    token, expert, weight, worker = token[order], expert[order], weight[order], worker[order]
    starts = [0, *(np.flatnonzero(np.diff(worker)) + 1).tolist(), len(worker)]
    shares: list[WorkerShare] = []
    for begin, end in itertools.pairwise(starts):
        if begin == end:
            continue
        its_tokens, its_experts = token[begin:end], expert[begin:end]
        present = np.zeros(num_tokens, dtype=bool)
        present[its_tokens] = True
        row_of = np.cumsum(present) - 1
        first = np.flatnonzero(np.concatenate(([True], its_experts[1:] != its_experts[:-1])))
        shares.append(
            WorkerShare(
                worker=int(worker[begin]),
                tokens=np.flatnonzero(present),
                experts=its_experts[first].astype(np.uint16),
                counts=np.diff(np.append(first, end - begin)).astype(np.uint16),
                pair_rows=row_of[its_tokens].astype(np.uint32),
                pair_weights=np.ascontiguousarray(weight[begin:end], dtype=np.float32),
            )
        )
    return tuple(shares)


def rows_for(x: Tensor, share: WorkerShare) -> Tensor:
    """Gather a share's rows from x [T, D]: [R, D], contiguous. Not a copy where every token travels and x is
    contiguous.
    """
    if share.num_rows == x.shape[0]:
        return x.contiguous()
    return x.index_select(0, torch.from_numpy(share.tokens))


def combine(answers: Sequence[tuple[WorkerShare, Tensor]], num_tokens: int, d_model: int, dtype: torch.dtype) -> Tensor:
    """Sum the workers' partial rows into token order.

    answers: shares with their rows [R, D], not modified. Returns [T, D] in `dtype`, zero for tokens without an answer;
    sums run in float64 for float32 and in float32 for half-width types, in the order given. Raises ValueError where
    rows do not
    match a share.
    """
    for share, rows in answers:
        if rows.shape != (share.num_rows, d_model):
            raise ValueError(
                f"worker {share.worker} returned {tuple(rows.shape)}, the plan has {(share.num_rows, d_model)}"
            )
    if len(answers) == 1 and answers[0][0].num_rows == num_tokens:
        return answers[0][1].to(dtype, copy=True)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    total = torch.zeros(num_tokens, d_model, dtype=wide)
    for share, rows in answers:
        if share.num_rows == num_tokens:
            total += rows
        else:
            tokens = torch.from_numpy(share.tokens)
            total.index_copy_(0, tokens, total.index_select(0, tokens) + rows)
    return total.to(dtype)


def needed_bytes(shares: Sequence[WorkerShare], d_model: int, item_bytes: int) -> int:
    """Count the bytes that must travel: rows out, rows back, 8 per (token, expert) (DESIGN.md, invariant 2)."""
    return sum(2 * share.num_rows * d_model * item_bytes + 8 * len(share.pair_rows) for share in shares)
