"""What the C kernels compute of a layer, against the same in torch: gates of every kind, attention of any widths."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from collegium.model import native
from collegium.model.architectures import Activation, ExpertForm
from collegium.model.native.layer import (
    AttentionWeights,
    DecodeTables,
    GateKind,
    GateWeights,
    LatentAttentionWeights,
    LayerBlock,
    LayerWeights,
    MlpWeights,
    NormWeights,
    Workspace,
)

pytestmark = pytest.mark.skipif(native.library() is None, reason="the native kernels were not built")
D_MODEL = 48
BLOCK_TOKENS = 4


def rows(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(heads: int = 2, kv_heads: int = 1, width: int = 8, *, dtype: torch.dtype = torch.float32) -> AttentionWeights:
    return AttentionWeights(
        qkv=rows((heads + 2 * kv_heads) * width, D_MODEL, seed=1, dtype=dtype),
        out=rows(D_MODEL, heads * width, seed=2, dtype=dtype),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_width=width,
        rotated=width,
        scaling=width**-0.5,
    )


def layer(
    attention: AttentionWeights | LatentAttentionWeights, gate: GateWeights | None = None, mlp: MlpWeights | None = None
) -> LayerBlock:
    norm = NormWeights(weight=torch.ones(D_MODEL), eps=1e-6)
    weights = LayerWeights(input_norm=norm, output_norm=norm, attention=attention, gate=gate, mlp=mlp)
    return LayerBlock(weights, BLOCK_TOKENS)


def normed(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


# --- gates ---


def expected_choice(gate: GateWeights, x: Tensor) -> Tensor:
    """The weight of each expert for each row, zero where it is not chosen: [T, E]; NaN where ties could decide."""
    logits = x.double() @ gate.weight.double().T
    if gate.bias is not None:
        logits += gate.bias.double()
    out = torch.zeros_like(logits)
    if gate.kind is GateKind.SPARSE_MIXER:
        left = logits.clone()
        for _ in range(2):
            most, best = left.max(-1, keepdim=True)
            far = (most - logits) / torch.maximum(logits.abs(), most) > 2 * gate.jitter
            out.scatter_(1, best, left.masked_fill(far, -torch.inf).softmax(-1).gather(1, best))
            left.scatter_(1, best, -torch.inf)
        return out
    if gate.kind is GateKind.SOFTMAX:
        scores = logits.softmax(-1)
    else:
        scores = logits.sigmoid() if gate.kind is GateKind.SIGMOID else logits
    ranked = scores if gate.correction is None else scores + gate.correction.double()
    if gate.num_groups > 1:
        groups = ranked.unflatten(-1, (gate.num_groups, -1))
        of_group = groups.topk(min(gate.group_tops, groups.shape[-1]), -1).values.sum(-1)
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(
            1, of_group.topk(gate.kept_groups, -1).indices, True
        )
        ranked = ranked.masked_fill(~kept.repeat_interleave(groups.shape[-1], 1), -torch.inf)
    ids = ranked.topk(gate.top_k, -1).indices
    weights = scores.gather(1, ids)
    if gate.kind is GateKind.CHOSEN_SOFTMAX:
        weights = weights.softmax(-1)
    if gate.norm_power:
        weights = weights / weights.norm(p=gate.norm_power, dim=-1, keepdim=True)
    return out.scatter_(1, ids, weights * gate.scale)


def any_gate(seed: int) -> GateWeights:
    """A gate of parts in any combination."""
    draw = random.Random(seed)
    kind = draw.choice(list(GateKind))
    num_groups = draw.choice([1, 1, 2, 3, 4])
    size = draw.randint(1 if num_groups == 1 else 2, 7)
    num_experts = max(num_groups * size, 2)
    kept = draw.randint(1, num_groups)
    gate = GateWeights(
        weight=rows(num_experts, D_MODEL, seed=seed) * D_MODEL**-0.5,
        bias=rows(num_experts, seed=seed + 1) if draw.random() < 0.5 else None,
        top_k=2 if kind is GateKind.SPARSE_MIXER else draw.randint(1, max(num_experts // num_groups * kept, 1)),
        kind=kind,
        jitter=draw.choice([0.0, 0.01, 0.3]),
    )
    if kind is GateKind.SPARSE_MIXER:
        return gate
    if kind is GateKind.CHOSEN_SOFTMAX:
        return replace(gate, norm_power=1.0)
    return replace(
        gate,
        correction=rows(num_experts, seed=seed + 2) if draw.random() < 0.5 else None,
        norm_power=draw.choice([0.0, 1.0, 2.0, 3.0]),
        scale=draw.choice([1.0, 2.5]),
        num_groups=num_groups,
        kept_groups=kept,
        group_tops=draw.choice([1, 2]),
    )


@pytest.mark.parametrize("seed", range(100))
def test_gates_of_any_parts_choose_and_weigh_as_in_torch(seed: int) -> None:
    gate = any_gate(seed)
    block = layer(plain(), gate)
    work = Workspace([block], 9)
    work.h.copy_(rows(9, D_MODEL, seed=seed + 3))
    work.attended.zero_()
    ids, weights = block.finish(work, 1)
    expected = expected_choice(gate, normed(work.h))
    found = torch.zeros_like(expected).scatter_(1, ids, weights.double())
    assert ids.sort().values.diff(dim=-1).ne(0).all(), "an expert was chosen twice"
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_rows_that_are_no_numbers_choose_experts_that_exist_and_weigh_them_by_none() -> None:
    for kind, groups in itertools.product(GateKind, (1, 2)):
        gate = GateWeights(weight=rows(6, D_MODEL, seed=1), top_k=2, kind=kind, num_groups=groups, kept_groups=1)
        block = layer(plain(), gate)
        work = Workspace([block], 3)
        work.h.copy_(rows(3, D_MODEL, seed=2))
        work.h[1] = torch.nan
        work.attended.zero_()
        ids, weights = block.finish(work, 1)
        assert ids[1].tolist() == [0, 1] and torch.isnan(weights[1]).all()
        assert torch.isfinite(weights[[0, 2]]).all()


# --- attention of decode rows ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 8, 16, 24, 40, 64, 120])
@pytest.mark.parametrize(("window", "has_sinks"), [(0, False), (5, True), (0, True)])
def test_decode_rows_of_any_width_attend_as_in_torch(
    width: int, window: int, has_sinks: bool, dtype: torch.dtype
) -> None:
    heads, kv_heads, lengths = 6, 2, [1, 7, 30]
    sinks = rows(heads, seed=4) if has_sinks else None
    block = layer(replace(plain(heads, kv_heads, width, dtype=dtype), window=window, sinks=sinks))
    pools = [rows(16 * BLOCK_TOKENS, kv_heads * width, seed=seed, dtype=dtype) for seed in (5, 6)]
    block.bind(*pools)
    tables, slots = tables_of(lengths)
    work = Workspace([block], len(lengths))
    work.q.copy_(rows(len(lengths), heads * width, seed=7))
    block.attend(work, tables, 2)
    for row, (length, at) in enumerate(zip(lengths, slots, strict=True)):
        begin = max(0, length - window) if window else 0
        key, value = (pool[at[begin:length]].double().unflatten(-1, (kv_heads, width)) for pool in pools)
        key, value = (one.repeat_interleave(heads // kv_heads, 1).transpose(0, 1) for one in (key, value))
        scores = (key @ work.q[row].double().view(heads, width, 1))[..., 0] * width**-0.5
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None]), -1)
        expected = scores.softmax(-1)[:, None, : length - begin] @ value
        torch.testing.assert_close(work.attended[row].double(), expected.flatten(), rtol=1e-4, atol=1e-5)


def tables_of(lengths: list[int]) -> tuple[DecodeTables, list[Tensor]]:
    """Blocks of a pool for sequences of these lengths, not in their order; and the slots of each one's positions."""
    sizes = [-(-length // BLOCK_TOKENS) for length in lengths]
    blocks = np.random.default_rng(0).permutation(16)[: sum(sizes)].astype(np.int64)
    first = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    slots = [
        torch.from_numpy((blocks[at : at + size, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)).reshape(-1))
        for at, size in zip(first, sizes, strict=True)
    ]
    return DecodeTables(blocks, first, np.array(lengths, np.int64)), slots


# --- latent attention ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 12, 32, 80])
@pytest.mark.parametrize("farthest", [None, 1, 40])
def test_a_sources_rows_share_no_company_and_look_around_as_in_torch(
    width: int, farthest: int | None, dtype: torch.dtype
) -> None:
    heads, lengths = 3, [1, 5, 16, 17, 70, 300]
    if width != 32:  # so long ones take a while
        lengths = lengths[:-1]
    block = layer(plain(heads, heads, width, dtype=dtype))
    num_rows = sum(lengths)
    work = Workspace([block], num_rows)
    work.q.copy_(rows(num_rows, heads * width, seed=3) * 2)
    keys, values = (rows(num_rows, heads * width, seed=seed, dtype=dtype) for seed in (4, 5))
    block.bind(keys, values)
    table = None if farthest is None else rows(heads, 2 * farthest + 1, seed=6)
    block.attend_around(work, np.array(lengths, np.int64), table, 2)
    begin = 0
    for length in lengths:
        span = slice(begin, begin + length)
        query, key, value = (
            one[span].double().view(length, heads, width).transpose(0, 1) for one in (work.q, keys, values)
        )
        scores = query @ key.transpose(1, 2) * width**-0.5
        if table is not None and farthest is not None:
            ahead = torch.arange(length)[None] - torch.arange(length)[:, None]
            scores += table[:, ahead.clamp(-farthest, farthest) + farthest]
        expected = (scores.softmax(-1) @ value).transpose(0, 1).reshape(length, -1)
        torch.testing.assert_close(work.attended[span].double(), expected, rtol=2e-5, atol=2e-5)
        alone = Workspace([block], length)
        alone.q.copy_(work.q[span])
        block.bind(keys[span], values[span])
        block.attend_around(alone, np.array([length], np.int64), table, 1)
        assert torch.equal(alone.attended, work.attended[span])  # to the last bit, whatever the company and the threads
        begin += length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("latent", "rotated", "plain_width", "value_width"),
    [(32, 16, 32, 16), (8, 8, 16, 32), (40, 4, 10, 16), (24, 6, 2, 9)],
)
def test_latent_keys_are_looked_at_as_if_they_were_expanded(
    latent: int, rotated: int, plain_width: int, value_width: int, dtype: torch.dtype
) -> None:
    heads, lengths, width = 3, [1, 9, 26], plain_width + rotated
    weights = LatentAttentionWeights(
        down=rows(heads * width + latent + rotated, D_MODEL, seed=1, dtype=dtype),
        up=(rows(heads * (plain_width + value_width), latent, seed=2) * latent**-0.5).to(dtype),
        out=rows(D_MODEL, heads * value_width, seed=3, dtype=dtype),
        num_heads=heads,
        latent_width=latent,
        rotated=rotated,
        head_width=width,
        value_width=value_width,
        key_norm=NormWeights(weight=torch.ones(latent), eps=1e-6),
        scaling=width**-0.5,
    )
    block = layer(weights)
    pools = [rows(16 * BLOCK_TOKENS, size, seed=seed, dtype=dtype) for seed, size in ((5, latent), (6, rotated))]
    block.bind(*pools)
    tables, slots = tables_of(lengths)
    work = Workspace([block], len(lengths))
    work.q.copy_(rows(len(lengths), heads * width, seed=7, dtype=dtype))
    block.attend(work, tables, 1)
    tolerance = 1e-4 if dtype is torch.float32 else 0.03
    for row, (length, at) in enumerate(zip(lengths, slots, strict=True)):
        expected = expanded(weights, pools, at[:length], work.q[row : row + 1])
        torch.testing.assert_close(work.attended[row].double(), expected.flatten(), rtol=tolerance, atol=tolerance)
    # and as the rows of a prompt, where that is computed here
    prompt = Workspace([block], 26)
    prompt.q.copy_(rows(26, heads * width, seed=8, dtype=dtype))
    if block.attend_prompt(prompt, 0, 26, slots[2][:26].contiguous(), 1):
        expected = expanded(weights, pools, slots[2][:26], prompt.q)
        torch.testing.assert_close(prompt.attended.double(), expected, rtol=tolerance, atol=tolerance)


def expanded(weights: LatentAttentionWeights, pools: list[Tensor], at: Tensor, q: Tensor) -> Tensor:
    """Attend with the last len(q) rows of the positions `at`, keys and values made of latents: [rows, H * V]."""
    heads, plain_width = weights.num_heads, weights.head_width - weights.rotated
    whole = (pools[0][at].double() @ weights.up.double().T).unflatten(-1, (heads, -1)).transpose(0, 1)
    rotated = pools[1][at].double().expand(heads, -1, -1)
    key, value = torch.cat((whole[..., :plain_width], rotated), -1), whole[..., plain_width:]
    query = q.double().unflatten(-1, (heads, -1)).transpose(0, 1)
    mask = torch.ones(len(q), len(at), dtype=torch.bool).tril(len(at) - len(q))
    scores = (query @ key.transpose(1, 2) * weights.scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)


# --- dense parts ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("is_weighed", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5, 70])
def test_what_all_rows_share_is_added(num_rows: int, is_weighed: bool, has_biases: bool, dtype: torch.dtype) -> None:
    gate, up = (rows(40, D_MODEL, seed=seed, dtype=dtype) for seed in (1, 2))
    down = rows(D_MODEL, 40, seed=3, dtype=dtype)
    biases = tuple(rows(size, seed=seed, dtype=dtype) for size, seed in ((40, 4), (40, 5), (D_MODEL, 6)))
    weigh = rows(1, D_MODEL, seed=7, dtype=dtype) if is_weighed else None
    mlp = MlpWeights(
        gate=gate,
        up=up,
        down=down,
        biases=biases if has_biases else None,  # type: ignore[arg-type]
        form=ExpertForm(activation=Activation.SILU),
        weigh=weigh,
    )
    block = layer(plain(dtype=dtype), mlp=mlp)
    work = Workspace([block], num_rows)
    work.h.zero_()
    work.x.copy_(0.2 * rows(num_rows, D_MODEL, seed=8))
    block.add_mlp(work, 2)
    x = work.x.double()
    b = [one.double() if has_biases else torch.zeros(()) for one in biases]
    expected = (
        torch.nn.functional.silu(x @ gate.double().T + b[0]) * (x @ up.double().T + b[1])
    ) @ down.double().T + b[2]
    if weigh is not None:
        expected *= (x @ weigh.double().T).sigmoid()
    tolerance = 1e-4 if dtype is torch.float32 else 0.03
    torch.testing.assert_close(work.h.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
