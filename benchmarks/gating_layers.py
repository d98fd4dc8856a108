"""The experts of an MoE layer in every manner that `gating.py` and `paper.py` compare, on the same weights and choices.

Owns the manners. Static gating as Huang et al. (NeurIPS 2024, section 2) describe it after GShard and fairseq; padding
to the busiest expert as in Tutel (Hwang et al., 2023), to blocks as in MegaBlocks (Gale et al., 2023), both written for
matmuls of a CPU; the three implementations of transformers are called, not copied. For each: how many bytes a call
takes beside the weights, so that what cannot fit is not tried.
T tokens, E experts, K top-k, C places of an expert, D model, F ffn, H = 2F where experts are gated, else F.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A layer's sizes, and the static gates' capacity: each expert has ceil(capacity * T) places."""

    d_model: int
    d_ffn: int
    experts: int
    top_k: int
    capacity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """The experts of a layer."""

    up: Tensor  # [E, H, D], gates above ups
    down: Tensor  # [E, D, F]
    up_bias: Tensor | None = None  # [E, H]
    down_bias: Tensor | None = None  # [E, D]
    capacity: float = 1.0  # of static gates: each expert has ceil(capacity * T) places
    activation: Activation = Activation.SILU

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]

    @property
    def is_gated(self) -> bool:
        """Whether there is a gate beside up."""
        return self.up.shape[1] > self.down.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights."""
        parts = (self.up, self.down, self.up_bias, self.down_bias)
        return sum(part.nbytes for part in parts if part is not None)

    def places(self, tokens: int) -> int:
        """C."""
        return max(1, math.ceil(self.capacity * tokens))

    def ffn(self, expert: int, rows: Tensor) -> Tensor:
        """One expert on rows [N, D]."""
        up_bias, down_bias = (None if one is None else one[expert] for one in (self.up_bias, self.down_bias))
        return F.linear(self._act(F.linear(rows, self.up[expert], up_bias)), self.down[expert], down_bias)

    def every_ffn(self, rows: Tensor) -> Tensor:
        """All experts at once, each on its own rows [E, N, D]."""
        hidden = torch.bmm(rows, self.up.transpose(1, 2))
        hidden = self._act(hidden if self.up_bias is None else hidden.add_(self.up_bias[:, None]))
        out = torch.bmm(hidden, self.down.transpose(1, 2))
        return out if self.down_bias is None else out.add_(self.down_bias[:, None])

    def _act(self, hidden: Tensor) -> Tensor:
        act = _ACTS[self.activation]
        if not self.is_gated:
            return act(hidden)
        gate, up = hidden.chunk(2, -1)
        return act(gate) * up


_ACTS = {Activation.SILU: F.silu, Activation.RELU: F.relu}


class Weights:
    """A layer's parameters, in one dtype. The gate's bias makes routing uneven: the same tokens, other choices."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0):
        """Draw them."""
        generator = torch.Generator().manual_seed(seed)
        d_model, d_ffn, experts = shape.d_model, shape.d_ffn, shape.experts
        self.shape, self.dtype = shape, dtype
        self.gate = torch.randn(experts, d_model, generator=generator).div_(math.sqrt(d_model)).to(dtype)
        up = torch.empty(experts, 2 * d_ffn, d_model, dtype=dtype)
        down = torch.empty(experts, d_model, d_ffn, dtype=dtype)
        for tensor, width in ((up, d_model), (down, d_ffn)):
            tensor.uniform_(-math.sqrt(3 / width), math.sqrt(3 / width), generator=generator)
        self.bank = Bank(up=up, down=down, capacity=shape.capacity)

    @property
    def num_bytes(self) -> int:
        """Bytes of the experts."""
        return self.bank.num_bytes

    def bias(self, routing: str) -> Tensor:
        """The gate's bias [E]: none for "uniform"; for "skewed" that of a Zipf law (0.8), experts shuffled."""
        if routing == "uniform":
            return torch.zeros(self.shape.experts)
        ranks = torch.from_numpy(np.random.default_rng(1).permutation(self.shape.experts)) + 1
        return -0.8 * ranks.float().log()

    def choose(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Gate x [T, D]: ids and weights [T, K]."""
        scores = torch.softmax(F.linear(x, self.gate).float() + bias, -1)
        weights, ids = scores.topk(self.shape.top_k, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True)


Experts = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [T, D], ids [T, K], weights [T, K]) -> [T, D]
Layer = Callable[[Tensor, Tensor], Tensor]  # (x [T, D], bias [E]) -> [T, D]


def layer_of(name: str, w: Weights) -> Layer:
    """A layer with its gate."""
    experts = IMPLEMENTATIONS[name](w.bank)

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return experts(x, *w.choose(x, bias))

    return layer


def _masks(bank: Bank, x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The static gate: dispatch [T, E, C] of ones, and combine, the same with weights. Who comes late is dropped."""
    tokens, places = x.shape[0], bank.places(x.shape[0])
    combine = torch.zeros(tokens, bank.num_experts, places, dtype=x.dtype)
    taken = torch.zeros(bank.num_experts, dtype=torch.long)
    for k in range(ids.shape[1]):  # first choices first, as GShard does
        hot = F.one_hot(ids[:, k], bank.num_experts)  # [T, E]
        place = (hot.cumsum(0) - 1 + taken).gather(1, ids[:, k : k + 1])[:, 0]
        taken += hot.sum(0)
        kept = place < places
        combine[torch.nonzero(kept)[:, 0], ids[kept, k], place[kept]] = weights[kept, k].to(x.dtype)
    return (combine > 0).to(x.dtype), combine


def static_gshard(bank: Bank) -> Experts:
    """Masks and einsums, all experts as one batch of matmuls over all places."""

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dispatch, combine = _masks(bank, x, ids, weights)
        out = bank.every_ffn(torch.einsum("tec,td->ecd", dispatch, x))
        return torch.einsum("tec,ecd->td", combine, out)

    return experts


def static_fairseq(bank: Bank) -> Experts:
    """Masks and einsums, one expert after another over all of its places."""

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        dispatch, combine = _masks(bank, x, ids, weights)
        rows = torch.einsum("tec,td->ecd", dispatch, x)
        out = torch.stack([bank.ffn(e, rows[e]) for e in range(bank.num_experts)])
        return torch.einsum("tec,ecd->td", combine, out)

    return experts


def _places(ids: Tensor, begins: Tensor, counts: Tensor) -> Tensor:
    """Where each pair's row goes [T*K], the rows of expert e from begins[e] on, in the order of the tokens."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return place.add_(begins[flat])


def _scattered(x: Tensor, place: Tensor, num_rows: int, top_k: int) -> Tensor:
    return x.new_zeros(num_rows, x.shape[1]).index_copy_(0, place, x.repeat_interleave(top_k, 0))


def _gathered(out: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    return (out[place].view(*weights.shape, -1) * weights.to(out.dtype)[..., None]).sum(1)


def padded(bank: Bank) -> Experts:
    """Nothing dropped, rows placed by index; every expert padded to the busiest one's rows."""

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = torch.bincount(ids.flatten(), minlength=bank.num_experts)
        most = int(counts.max())
        place = _places(ids, torch.arange(bank.num_experts) * most, counts)
        rows = _scattered(x, place, bank.num_experts * most, ids.shape[1])
        out = bank.every_ffn(rows.view(bank.num_experts, most, -1))
        return _gathered(out.view(rows.shape), place, weights)

    return experts


def block_sparse(bank: Bank) -> Experts:
    """Nothing dropped; each expert's rows padded to whole blocks, and only blocks with rows computed."""

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        counts = torch.bincount(ids.flatten(), minlength=bank.num_experts)
        whole = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS
        begins = whole.cumsum(0) - whole
        place = _places(ids, begins, counts)
        rows = _scattered(x, place, int(whole.sum()), ids.shape[1])
        out = torch.empty_like(rows)
        for e in torch.nonzero(whole)[:, 0].tolist():
            span = slice(int(begins[e]), int(begins[e] + whole[e]))
            out[span] = bank.ffn(e, rows[span])
        return _gathered(out, place, weights)

    return experts


def of_transformers(implementation: str) -> Callable[[Bank], Experts]:
    """An experts implementation of transformers, through its own class; gated experts without biases."""

    def make(bank: Bank) -> Experts:
        config: Any = Qwen3MoeConfig(
            hidden_size=bank.up.shape[2],
            moe_intermediate_size=bank.down.shape[2],
            num_experts=bank.num_experts,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(bank.up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(bank.down, requires_grad=False)

        def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            out: Tensor = module(x, ids, weights.to(x.dtype))
            return out

        return experts

    return make


def ours(bank: Bank) -> Experts:
    """Dynamic gating as Collegium serves it: the router's plan, the worker's kernels; no link between them."""
    biases = (bank.up_bias, bank.down_bias)
    packed = [
        PackedExpert(
            ExpertWeights(
                gate_up=bank.up[e],
                down=bank.down[e],
                gate_up_bias=None if biases[0] is None else biases[0][e],
                down_bias=None if biases[1] is None else biases[1][e],
            )
        )
        for e in range(bank.num_experts)
    ]
    worker_of = np.zeros(bank.num_experts, np.int64)
    form = ExpertForm(activation=bank.activation, is_gated=bank.is_gated)

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        (share,) = plan_dispatch(ids.numpy(), weights.float().numpy(), worker_of).shares
        called = [packed[e] for e in share.experts.tolist()]
        return run_experts(x, called, share.counts.tolist(), share.pair_rows.astype(np.int64), share.pair_weights, form)

    return experts


IMPLEMENTATIONS: dict[str, Callable[[Bank], Experts]] = {
    "static_gshard": static_gshard,
    "static_fairseq": static_fairseq,
    "padded": padded,
    "block_sparse": block_sparse,
    "eager": of_transformers("eager"),
    "grouped_mm": of_transformers("grouped_mm"),
    "batched_mm": of_transformers("batched_mm"),
    "ours": ours,
}


def needed_bytes(name: str, bank: Bank, tokens: int, top_k: int) -> int:
    """Estimate what a call takes beside the weights, from the arrays that it cannot do without: a lower bound."""
    (experts, d_hidden, d_model), d_ffn, item_bytes = bank.up.shape, bank.down.shape[2], bank.up.itemsize
    pairs = tokens * top_k
    if name.startswith("static"):
        places = bank.places(tokens) * experts
        return item_bytes * (2 * tokens * places + places * (d_hidden + 2 * d_model))
    if name == "padded":  # no expert has fewer rows than the mean
        return item_bytes * max(pairs, experts) * (d_hidden + 2 * d_model)
    if name == "batched_mm":  # gathers each pair's weights
        return item_bytes * pairs * 2 * d_ffn * d_model
    if name == "block_sparse":
        return item_bytes * (2 * d_model * (pairs + experts * BLOCK_ROWS // 2))
    if name == "eager":
        return item_bytes * tokens * d_model + 8 * tokens * experts * top_k
    return item_bytes * pairs * (d_hidden + d_model)
