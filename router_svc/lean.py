"""The forward pass of the commonest family of models in few calls: what the modelling classes do, without their cost.

Owns LeanModel. Profiled at one row of 12 layers, modelling classes took two thirds of a router's time, nearly all of it
interpreter and torch's calls on small tensors; here a layer is three calls of the C kernels, and a decode step that
nothing disturbs is one for all layers, experts included. Weights, embedding, rotation and head are taken from a model's
modules, our own (family_loading) or transformers'; a model that is not of the family runs on the modelling classes.
T rows, D model, H query heads, G key-value heads, W head width, K top-k, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from collegium.model import native
from collegium.model.kernels import Kernel, kernel_for
from collegium.model.native.attention import AttentionBlock, Workspace, norm
from collegium.model.native.step import DecodeStep, StepWeights
from router_svc import family
from router_svc.cache_shapes import CacheShape
from router_svc.kv_blocks import BLOCK_TOKENS
from router_svc.paged_attention import PagedCache, StepIndex
from router_svc.remote_experts import StepCall

_WIDTH_STEP = 16  # head widths are a multiple of the widest vector
_FEWEST_ROTATIONS, _MOST_ROTATIONS = 2048, 65_536  # positions of the table of rotations; beyond, steps go by layer
_MOST_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    block: AttentionBlock
    experts: nn.Module  # the stand-in


class LeanModel:
    """Computes a model's packed steps from its weights."""

    def __init__(self, model: nn.Module):
        """Pack the attention of a model for which `why_not` found nothing; its own layers are emptied of it."""
        inner: Any = model.model
        self._embed, self._rotary, self._head = inner.embed_tokens, inner.rotary_emb, cast(Any, model)
        self._final = inner.norm.weight.detach().float().contiguous()
        self._final_eps = float(inner.norm.variance_epsilon)
        self.dtype: torch.dtype = inner.norm.weight.dtype
        self.layers: list[_Layer] = []
        self.cache_shapes: dict[int, CacheShape] = {}
        for idx, layer in enumerate(inner.layers):
            self.cache_shapes[idx] = family.cache_shape(layer.self_attn)
            block = AttentionBlock(family.weights_of(layer), BLOCK_TOKENS)
            self.layers.append(_Layer(block=block, experts=layer.mlp.experts))
            # packed now: the model's own copy would only take memory; gates stay, for they are asked to foretell
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer.self_attn, name, None)
        self._bound: PagedCache | None = None
        self._blocks = [layer.block for layer in self.layers]
        self._step_weights = StepWeights(
            embedding=inner.embed_tokens.weight.detach(),
            final_norm=self._final,
            eps=self._final_eps,
            head_width=self.cache_shapes[0].key[1],
        )
        self._steps: dict[int, DecodeStep] = {}  # idle ones, by number of rows
        self._rotated = torch.empty(0, 0), torch.empty(0, 0)
        # Of "longrope" the rotation of a position depends on how many are asked for: there is no table of it.
        rope: dict[str, object] = getattr(inner.config, "rope_parameters", None) or {}
        self._most_rotations = 0 if rope.get("rope_type") == "longrope" else _MOST_ROTATIONS
        # Computes decode steps, experts included, as far as it can: ExpertCalls.compute_step; None: layer by layer.
        self.compute_step: StepCall | None = None

    def set_step_call(self, call: StepCall | None) -> None:
        """Say who computes all layers of a decode step in one call; None: nobody."""
        self.compute_step = call

    def forward(self, input_ids: Tensor, positions: Tensor, cache: PagedCache, keep: Tensor) -> Tensor:
        """Compute one packed pass: input_ids, positions [1, T]; returns logits [len(keep), V]."""
        if self._bound is not cache:
            for idx, layer in enumerate(self.layers):
                layer.block.bind(*cache.pools(idx))
            self._bound = cache
        index, num_threads = cache.index, torch.get_num_threads()
        step = self._step_for(input_ids, index) if self.compute_step is not None else None
        if step is not None:
            assert self.compute_step is not None
            rotation = self._rotations(int(index.decode_tables.lengths.max()))
            step.begin(input_ids, positions, rotation, index.slots, index.decode_tables, num_threads)
            try:
                if self.compute_step(step):
                    rows = step.work.x if len(keep) == step.num_rows else step.work.x.index_select(0, keep)
                    return cast(Tensor, self._head.lm_head(rows))
                if step.layer:  # something came between: on from there
                    return self._by_layer(step.layer, step.work, step.cos, step.sin, cache, keep, num_threads)
            finally:
                self._steps[step.num_rows] = step
        work = Workspace(self.layers[0].block, input_ids.shape[1])
        work.h.copy_(self._embed(input_ids)[0])
        cos, sin = (table[0].contiguous() for table in self._rotary(work.h[None], positions))  # [T, W] float32
        return self._by_layer(0, work, cos, sin, cache, keep, num_threads)

    def _step_for(self, input_ids: Tensor, index: StepIndex) -> DecodeStep | None:
        """Give the memory of a step of decode rows; None where there are prompts, or no table of their positions."""
        if index.chunks or int(index.decode_tables.lengths.max()) > self._most_rotations:
            return None
        num_rows = input_ids.shape[1]
        while len(self._steps) > _MOST_STEPS:
            del self._steps[next(iter(self._steps))]
        return self._steps.pop(num_rows, None) or DecodeStep(self._blocks, self._step_weights, num_rows)

    def _rotations(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the first positions, at least so many: two [positions, W] float32."""
        if num_positions > self._rotated[0].shape[0]:
            size = max(_FEWEST_ROTATIONS, 1 << (num_positions - 1).bit_length())
            like = torch.empty(1, 1, 1)
            cos, sin = self._rotary(like, torch.arange(size)[None])
            self._rotated = cos[0].contiguous(), sin[0].contiguous()
        return self._rotated

    def _by_layer(
        self, first: int, work: Workspace, cos: Tensor, sin: Tensor, cache: PagedCache, keep: Tensor, num_threads: int
    ) -> Tensor:
        """Compute the layers from `first` on, and score the rows in `keep`."""
        index = cache.index
        for idx, layer in enumerate(self.layers[first:], first):
            block = layer.block
            block.project(work, cos, sin, index.slots, num_threads)
            if index.num_decodes:
                block.attend(work, index.decode_tables, num_threads)
            if index.chunks:
                self._attend_chunks(idx, work, cache, index, num_threads)
            ids, weights = block.finish(work, num_threads)
            assert layer.experts.call is not None
            block.add(work, layer.experts.call(idx, work.x, ids, weights))
        rows = norm(work.h.index_select(0, keep), self._final, self._final_eps).to(self.dtype)
        return cast(Tensor, self._head.lm_head(rows))

    def _attend_chunks(
        self, layer: int, work: Workspace, cache: PagedCache, index: StepIndex, num_threads: int
    ) -> None:
        block, width = self.layers[layer].block, self.cache_shapes[layer].key[1]
        at = index.num_decodes
        for chunk, (num_rows, _) in enumerate(index.chunks):
            if block.attend_prompt(work, at, num_rows, index.chunk_slots[chunk], num_threads):
                at += num_rows
                continue
            query = work.q[at : at + num_rows].to(self.dtype).view(1, num_rows, -1, width).transpose(1, 2)
            out = cache.attend_chunk(layer, chunk, query, scaling=block.scaling, window=block.window or None)
            work.attended[at : at + num_rows] = out.reshape(num_rows, -1)
            at += num_rows


def why_not(model: nn.Module) -> str:
    """Say why a model cannot be computed leanly; empty where it can."""
    if reason := family.why_not(model):
        return reason
    inner: Any = model.model
    return why_not_here(inner.norm.weight.dtype, inner.layers[0].self_attn.head_dim)


def why_not_here(dtype: torch.dtype, head_width: int) -> str:
    """Say why a model of the family cannot be computed leanly on this machine; empty where it can."""
    if native.library() is None or kernel_for(dtype) is not Kernel.NATIVE:
        return "the native kernels are not in use"
    if head_width % _WIDTH_STEP:
        return f"its heads are {head_width} wide, no multiple of {_WIDTH_STEP}"
    return ""
