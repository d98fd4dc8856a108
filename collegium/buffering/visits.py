"""A trace as a buffer sees it: visits of layers, in the order in which they came.

Owns the rules by which rows become visits. A visit is a run of rows of one layer and one phase; each expert counts
once in it. Prefill is cut in micro-batches of so many tokens. A pass is one way through the layers: a decode step of
whatever was batched when the trace was recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from collegium.buffering.traces import DECODE, Trace

PREFILL_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """Some tokens at one layer: the experts that they chose, each once, in order of appearance."""

    is_decode: bool
    layer: int  # among the layers that have experts
    experts: tuple[int, ...]
    counts: tuple[int, ...]  # how many of the tokens chose each
    num_tokens: int


def moe_layers(trace: Trace) -> list[int]:
    """Give the numbers of the layers that have experts; visits number them from 0."""
    return sorted(layer for layer, size in trace.header.expert_bytes.items() if size)


def read_visits(trace: Trace, *, prefill_tokens: int = PREFILL_TOKENS) -> list[Visit]:
    """Cut a trace into visits; prefill_tokens of 0 leave a run of prefill whole."""
    number = np.zeros(trace.header.num_layers, dtype=np.int64)
    layers = moe_layers(trace)
    number[layers] = np.arange(len(layers))
    turn, phase, step = trace.turn, trace.phase, trace.step
    is_new = (np.diff(trace.layer) != 0) | (np.diff(phase) != 0)
    # A model of one layer has no other layer between two tokens of a sequence.
    is_new |= (phase[1:] == DECODE) & (np.diff(turn) == 0) & (np.diff(step) != 0)
    bounds = [0, *(np.flatnonzero(is_new) + 1).tolist(), len(trace)]
    tokens: list[tuple[int, int]] = list(zip(turn.tolist(), step.tolist(), strict=True))
    experts: list[int] = trace.expert.tolist()
    visits: list[Visit] = []
    for begin, end in pairwise(bounds):
        is_decode = bool(phase[begin] == DECODE)
        layer = int(number[trace.layer[begin]])
        chunk = 0 if is_decode else prefill_tokens
        visits.extend(_visits_of_run(tokens[begin:end], experts[begin:end], chunk, is_decode, layer))
    return visits


def side_by_side(visits: Sequence[Visit], batch: int) -> list[Visit]:
    """Cut visits into windows of equally many decode passes that run side by side: a visit is the union of theirs.

    Prefill is visited, by itself, when its window comes to the decode pass that follows it. Passes left over at the end
    are left out. ValueError where there are fewer passes than windows.
    """
    if batch == 1:
        return list(visits)
    passes = _passes(visits)
    length = len(passes) // batch
    if not length:
        raise ValueError(f"the trace has {len(passes)} decode steps, too few for {batch} windows")
    windows = [passes[at * length : (at + 1) * length] for at in range(batch)]
    joined: list[Visit] = []
    for now in zip(*windows, strict=True):
        for prefill, _ in now:
            joined += prefill
        layers = sorted({visit.layer for _, decode in now for visit in decode})
        joined += [_union([v for _, decode in now for v in decode if v.layer == layer]) for layer in layers]
    return joined


def _passes(visits: Iterable[Visit]) -> list[tuple[list[Visit], list[Visit]]]:
    """Give each decode pass with the prefill before it."""
    passes: list[tuple[list[Visit], list[Visit]]] = []
    prefill: list[Visit] = []
    for visit in visits:
        if not visit.is_decode:
            prefill.append(visit)
        elif passes and passes[-1][1][-1].layer < visit.layer:
            passes[-1][1].append(visit)
        else:
            passes.append((prefill, [visit]))
            prefill = []
    return passes


def _visits_of_run(
    tokens: Sequence[tuple[int, int]], experts: Sequence[int], chunk: int, is_decode: bool, layer: int
) -> Iterable[Visit]:
    order = {token: at for at, token in enumerate(dict.fromkeys(tokens))}
    size = chunk or len(order)
    for first in range(0, len(order), size):
        counts: dict[int, int] = {}
        for token, expert in zip(tokens, experts, strict=True):
            if first <= order[token] < first + size:
                counts[expert] = counts.get(expert, 0) + 1
        yield Visit(
            is_decode=is_decode,
            layer=layer,
            experts=tuple(counts),
            counts=tuple(counts.values()),
            num_tokens=min(size, len(order) - first),
        )


def _union(visits: Sequence[Visit]) -> Visit:
    counts: dict[int, int] = {}
    for visit in visits:
        for expert, count in zip(visit.experts, visit.counts, strict=True):
            counts[expert] = counts.get(expert, 0) + count
    return Visit(
        is_decode=True,
        layer=visits[0].layer,
        experts=tuple(counts),
        counts=tuple(counts.values()),
        num_tokens=sum(visit.num_tokens for visit in visits),
    )
