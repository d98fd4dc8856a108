"""One MoE layer in every manner that `benchmarks/gating.py` compares, on the same weights and with the same gate.

Owns the layers. Static gating as Huang et al. (NeurIPS 2024, section 2) describe it after GShard and fairseq; padding
to blocks as in MegaBlocks (Gale et al., 2023), written for matmuls of a CPU; the three implementations of transformers
are called, not copied. For each layer: how many bytes a call takes beside the weights, so that what cannot fit is not
tried.
T tokens, E experts, K top-k, C places of an expert, D model, F ffn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from collegium.model.architectures import Activation, ExpertForm
from collegium.model.dispatch import plan_dispatch
from collegium.model.experts import PackedExpert, run_experts
from collegium.model.weights import ExpertWeights

BLOCK_ROWS = 32  # MegaBlocks pads to 128 for a GPU's tiles; a CPU's are smaller
_FORM = ExpertForm(activation=Activation.SILU)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A layer's sizes, and the static gates' capacity: each expert has ceil(capacity * T) places."""

    d_model: int
    d_ffn: int
    experts: int
    top_k: int
    capacity: float

    def places(self, tokens: int) -> int:
        """C."""
        return max(1, math.ceil(self.capacity * tokens))


class Weights:
    """A layer's parameters, in one dtype. The gate's bias makes routing uneven: the same tokens, other choices."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0):
        """Draw them."""
        generator = torch.Generator().manual_seed(seed)
        d_model, d_ffn, experts = shape.d_model, shape.d_ffn, shape.experts
        self.shape, self.dtype = shape, dtype
        self.gate = torch.randn(experts, d_model, generator=generator).div_(math.sqrt(d_model)).to(dtype)
        self.gate_up = torch.empty(experts, 2 * d_ffn, d_model, dtype=dtype)
        self.down = torch.empty(experts, d_model, d_ffn, dtype=dtype)
        for tensor, width in ((self.gate_up, d_model), (self.down, d_ffn)):
            tensor.uniform_(-math.sqrt(3 / width), math.sqrt(3 / width), generator=generator)

    @property
    def num_bytes(self) -> int:
        """Bytes of the experts."""
        return self.gate_up.nbytes + self.down.nbytes

    def bias(self, routing: str) -> Tensor:
        """The gate's bias [E]: none for "uniform"; for "skewed" that of a Zipf law (0.8), experts shuffled."""
        if routing == "uniform":
            return torch.zeros(self.shape.experts)
        ranks = torch.from_numpy(np.random.default_rng(1).permutation(self.shape.experts)) + 1
        return -0.8 * ranks.float().log()

    def choose(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Gate x [T, D]: weights and ids [T, K]."""
        scores = torch.softmax(F.linear(x, self.gate).float() + bias, -1)
        weights, ids = scores.topk(self.shape.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids


Layer = Callable[[Tensor, Tensor], Tensor]  # (x [T, D], bias [E]) -> [T, D]


def _ffn(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(rows, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def _masks(w: Weights, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The static gate: dispatch [T, E, C] of ones, and combine, the same with weights. Who comes late is dropped."""
    tokens, places = x.shape[0], w.shape.places(x.shape[0])
    weights, ids = w.choose(x, bias)
    combine = torch.zeros(tokens, w.shape.experts, places, dtype=x.dtype)
    taken = torch.zeros(w.shape.experts, dtype=torch.long)
    for k in range(w.shape.top_k):  # first choices first, as GShard does
        hot = F.one_hot(ids[:, k], w.shape.experts)  # [T, E]
        place = (hot.cumsum(0) - 1 + taken).gather(1, ids[:, k : k + 1])[:, 0]
        taken += hot.sum(0)
        kept = place < places
        combine[torch.nonzero(kept)[:, 0], ids[kept, k], place[kept]] = weights[kept, k].to(x.dtype)
    return (combine > 0).to(x.dtype), combine


def static_gshard(w: Weights) -> Layer:
    """Masks and einsums, all experts as one batch of matmuls over all places."""

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        dispatch, combine = _masks(w, x, bias)
        rows = torch.einsum("tec,td->ecd", dispatch, x)
        gate, up = torch.bmm(rows, w.gate_up.transpose(1, 2)).chunk(2, -1)
        out = torch.bmm(F.silu(gate) * up, w.down.transpose(1, 2))
        return torch.einsum("tec,ecd->td", combine, out)

    return layer


def static_fairseq(w: Weights) -> Layer:
    """Masks and einsums, one expert after another over all of its places."""

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        dispatch, combine = _masks(w, x, bias)
        rows = torch.einsum("tec,td->ecd", dispatch, x)
        out = torch.stack([_ffn(rows[e], w.gate_up[e], w.down[e]) for e in range(w.shape.experts)])
        return torch.einsum("tec,ecd->td", combine, out)

    return layer


def block_sparse(w: Weights) -> Layer:
    """Nothing dropped; each expert's rows padded to whole blocks, and only blocks with rows computed."""

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        weights, ids = w.choose(x, bias)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=w.shape.experts)
        padded = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
        begins = padded.cumsum(0) - padded
        place = torch.empty_like(flat)
        place[order] = torch.arange(len(flat)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        place += begins[flat]
        rows = x.new_zeros(int(padded.sum()), x.shape[1]).index_copy_(0, place, x.repeat_interleave(w.shape.top_k, 0))
        out = torch.empty_like(rows)
        for e in torch.nonzero(padded)[:, 0].tolist():
            span = slice(int(begins[e]), int(begins[e] + padded[e]))
            out[span] = _ffn(rows[span], w.gate_up[e], w.down[e])
        return (out[place].view(*ids.shape, -1) * weights.to(x.dtype)[..., None]).sum(1)

    return layer


def of_transformers(implementation: str) -> Callable[[Weights], Layer]:
    """An experts implementation of transformers, through its own class."""

    def make(w: Weights) -> Layer:
        s = w.shape
        config: Any = Qwen3MoeConfig(
            hidden_size=s.d_model,
            moe_intermediate_size=s.d_ffn,
            num_experts=s.experts,
            num_experts_per_tok=s.top_k,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(w.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(w.down, requires_grad=False)

        def layer(x: Tensor, bias: Tensor) -> Tensor:
            weights, ids = w.choose(x, bias)
            out: Tensor = module(x, ids, weights.to(x.dtype))
            return out

        return layer

    return make


def ours(w: Weights) -> Layer:
    """Dynamic gating as Collegium serves it: the router's plan, the worker's kernels; no link between them."""
    experts = [PackedExpert(ExpertWeights(gate_up=g, down=d)) for g, d in zip(w.gate_up, w.down, strict=True)]
    worker_of = np.zeros(w.shape.experts, np.int64)

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        weights, ids = w.choose(x, bias)
        (share,) = plan_dispatch(ids.numpy(), weights.numpy(), worker_of).shares
        called = [experts[e] for e in share.experts.tolist()]
        return run_experts(
            x, called, share.counts.tolist(), share.pair_rows.astype(np.int64), share.pair_weights, _FORM
        )

    return layer


IMPLEMENTATIONS: dict[str, Callable[[Weights], Layer]] = {
    "static_gshard": static_gshard,
    "static_fairseq": static_fairseq,
    "block_sparse": block_sparse,
    "eager": of_transformers("eager"),
    "grouped_mm": of_transformers("grouped_mm"),
    "batched_mm": of_transformers("batched_mm"),
    "ours": ours,
}


def needed_bytes(name: str, shape: Shape, tokens: int, item_bytes: int) -> int:
    """Estimate what a call takes beside the weights, from the arrays that it cannot do without: a lower bound."""
    pairs, hidden = tokens * shape.top_k, 2 * shape.d_ffn + shape.d_model
    if name.startswith("static"):
        places = shape.places(tokens) * shape.experts
        return item_bytes * (2 * tokens * places + places * (hidden + shape.d_model))
    if name == "batched_mm":  # gathers each pair's weights
        return item_bytes * pairs * 2 * shape.d_ffn * shape.d_model
    if name == "block_sparse":
        return item_bytes * (2 * shape.d_model * (pairs + shape.experts * BLOCK_ROWS // 2))
    if name == "eager":
        return item_bytes * tokens * shape.d_model + 8 * tokens * shape.experts * shape.top_k
    return item_bytes * pairs * hidden
