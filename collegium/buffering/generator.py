"""Routing as a trained gate makes it, without a model: seeded traces of any shape.

Owns the generator. An expert's score for a token is a static term per (layer, expert) plus a slow and a fast AR(1)
process, all normal; a token takes the top k. With the scales below it matches a recorded trace of Qwen3-30B-A3B
within about 4 % in overlap of neighbouring tokens, spread of load and hit rates. Uniform routing, which random
weights give, makes every policy hit slots / experts. L layers, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collegium.buffering.traces import DECODE, PREFILL, Trace, TraceHeader

_SLOW_RHO = 0.97
_FAST_RHO = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingShape:
    """What a generated trace looks like."""

    num_layers: int
    num_experts: int
    top_k: int
    expert_bytes: int = 1
    num_prompts: int = 1
    prompt_tokens: int = 28
    decode_tokens: int = 128
    drift: float = 0.0  # share of the static terms that is drawn anew at each prompt's border: 0.3 for topic drift
    static_scale: float = 1.0
    slow_scale: float = 0.6
    fast_scale: float = 1.0


def generate_trace(shape: RoutingShape, *, seed: int) -> Trace:
    """Make a trace: of each prompt its prefill, layer by layer, then its decode steps. ValueError for no such shape."""
    if not 0 < shape.top_k <= shape.num_experts or shape.num_layers < 1:
        raise ValueError(f"there is no top {shape.top_k} of {shape.num_experts} experts in {shape.num_layers} layers")
    rng = np.random.default_rng(seed)
    scores = _scores(shape, rng)
    parts: list[NDArray[np.float64]] = []
    for turn in range(shape.num_prompts):
        prompt = [next(scores) for _ in range(shape.prompt_tokens)]
        decode = [next(scores) for _ in range(shape.decode_tokens)]
        if prompt:
            parts.append(_rows(shape, np.stack(prompt, axis=1), turn, PREFILL, 0).reshape(-1, 7))
        if decode:
            rows = _rows(shape, np.stack(decode, axis=1), turn, DECODE, len(prompt))
            parts.append(rows.swapaxes(0, 1).reshape(-1, 7))
    rows = np.concatenate(parts) if parts else np.zeros((0, 7))
    turn, phase, step, layer, slot, expert = rows[:, :6].astype(np.int64).T
    header = TraceHeader(
        model="generated",
        arch=f"seed-{seed}",
        num_layers=shape.num_layers,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        expert_bytes=dict.fromkeys(range(shape.num_layers), shape.expert_bytes),
    )
    return Trace(
        header=header,
        turn=turn,
        phase=phase,
        step=step,
        layer=layer,
        slot=slot,
        expert=expert,
        weight=rows[:, 6],
        residency=np.zeros_like(turn),  # as if nothing had ever been resident
        expert_bytes=np.full_like(turn, shape.expert_bytes),
    )


def _scores(shape: RoutingShape, rng: np.random.Generator) -> Iterator[NDArray[np.float64]]:
    """Give the scores of one token after another, [L, E] each."""
    size = (shape.num_layers, shape.num_experts)
    static, slow, fast = (rng.standard_normal(size) for _ in range(3))
    num_tokens = shape.prompt_tokens + shape.decode_tokens
    token = 0
    while True:
        if token and token % num_tokens == 0 and shape.drift:
            static = np.where(rng.random(size) < shape.drift, rng.standard_normal(size), static)
        yield shape.static_scale * static + shape.slow_scale * slow + shape.fast_scale * fast
        slow = _SLOW_RHO * slow + (1 - _SLOW_RHO**2) ** 0.5 * rng.standard_normal(size)
        fast = _FAST_RHO * fast + (1 - _FAST_RHO**2) ** 0.5 * rng.standard_normal(size)
        token += 1


def _rows(
    shape: RoutingShape, scores: NDArray[np.float64], turn: int, phase: int, first_step: int
) -> NDArray[np.float64]:
    """Choose for scores [L, T, E]; gives turn, phase, step, layer, slot, expert, weight as [L, T, K, 7]."""
    num_layers, num_tokens, _ = scores.shape
    experts = np.argsort(-scores, axis=2, kind="stable")[:, :, : shape.top_k]  # [L, T, K]
    weights = np.exp(np.take_along_axis(scores, experts, axis=2))
    weights /= weights.sum(axis=2, keepdims=True)
    rows = np.empty((num_layers, num_tokens, shape.top_k, 7))
    rows[..., 0] = turn
    rows[..., 1] = phase
    rows[..., 2] = first_step + np.arange(num_tokens)[:, None]
    rows[..., 3] = np.arange(num_layers)[:, None, None]
    rows[..., 4] = np.arange(shape.top_k)
    rows[..., 5] = experts
    rows[..., 6] = weights
    return rows
