"""The forward pass in few calls: what the modelling classes do, without their cost.

Owns LeanModel. Profiled at one row of 12 layers, modelling classes took two thirds of a router's time, nearly all of it
interpreter and torch's calls on small tensors; here a layer is a few calls of the C kernels, and a decode step that
nothing disturbs is one for all layers, experts included. What the layers compute is read from a model's modules by the
table of programs; a model that has none runs on the modelling classes.
T rows, D model, H query heads, W head width, L cached positions, K top-k, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from collegium.model import native
from collegium.model.kernels import Kernel, kernel_for
from collegium.model.native.layer import FinalNorm, LayerBlock, Workspace
from collegium.model.native.step import DecodeStep, StepWeights
from router_svc import programs
from router_svc.cache_shapes import CacheShape
from router_svc.kv_blocks import BLOCK_TOKENS
from router_svc.paged_attention import PagedCache, StepIndex
from router_svc.remote_experts import RemoteExperts, StepCall
from router_svc.shared_experts import OwnShared

_FEWEST_ROTATIONS, _MOST_ROTATIONS = 2048, 65_536  # positions of the table of rotations; beyond, steps go by layer
_MOST_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    block: LayerBlock
    experts: RemoteExperts | None  # the stand-in
    shared: OwnShared | None  # computed while rows are away


class LeanModel:
    """Computes a model's packed steps from its weights."""

    def __init__(self, model: nn.Module, num_shared: int = 0):
        """Pack the layers of a model for which `why_not` found nothing; its own are emptied of what is packed.

        num_shared: as programs.weights_of has it.
        """
        self._parts = parts = programs.outside(model)
        self._head = cast(Any, model)
        self._final = FinalNorm(parts.final_norm)
        self.dtype: torch.dtype = parts.embedding.weight.dtype
        self.layers: list[_Layer] = []
        self.cache_shapes: dict[int, CacheShape] = {}
        for idx, layer in enumerate(parts.layers):
            weights = programs.weights_of(parts, layer, num_shared)
            self.cache_shapes[idx] = programs.cache_shape(weights)
            block, experts = LayerBlock(weights, BLOCK_TOKENS), programs.experts_of(parts, layer)
            shared: OwnShared | None = None
            if isinstance(experts, RemoteExperts):
                experts.shared.clear()
                if block.has_mlp:
                    shared = OwnShared()
                    experts.shared.append(shared)
            self.layers.append(_Layer(block=block, experts=cast(RemoteExperts | None, experts), shared=shared))
            programs.drop_packed(parts, layer)  # the model's own copy would only take memory
        self._bound: PagedCache | None = None
        self._blocks = [layer.block for layer in self.layers]
        self._rotated = torch.empty(0, 0), torch.empty(0, 0)
        # Of "longrope" the rotation of a position depends on how many are asked for: there is no table of it.
        self._most_rotations = _MOST_ROTATIONS if parts.has_one_rotation else 0
        self._step_weights = StepWeights(
            embedding=parts.embedding.weight.detach(),
            embedding_scale=parts.embedding_scale,
            final_norm=self._final,
            rotated=parts.rotated,
        )
        self._steps: dict[int, DecodeStep] = {}  # idle ones, by number of rows
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
                    return self._logits(
                        step.work.x if len(keep) == step.num_rows else step.work.x.index_select(0, keep)
                    )
                if step.block:  # something came between: on from there
                    return self._by_layer(step.block, step.work, step.cos, step.sin, cache, keep, num_threads)
            finally:
                self._steps[step.num_rows] = step
        work = Workspace(self._blocks, input_ids.shape[1])
        work.h.copy_(self._parts.embedding(input_ids)[0])
        if self._parts.embedding_scale != 1.0:
            work.h *= self._parts.embedding_scale
        cos, sin = self._parts.rotations(positions)
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
            self._rotated = self._parts.rotations(torch.arange(size)[None])
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
            if layer.experts is None:
                block.add_mlp(work, num_threads)
                continue
            assert layer.experts.call is not None
            if layer.shared is not None:
                layer.shared.owe(work.x, lambda block=block: block.add_mlp(work, num_threads))
            y = layer.experts.call(layer.experts.layer, work.x, ids, weights)
            if layer.shared is not None:
                layer.shared.settle(work.x)
            block.add(work, y)
        return self._logits(self._final.apply(work.h.index_select(0, keep)).to(self.dtype))

    def _logits(self, rows: Tensor) -> Tensor:
        logits = cast(Tensor, self._head.lm_head(rows))
        return logits if self._parts.logits_divisor == 1.0 else logits / self._parts.logits_divisor

    def _attend_chunks(
        self, layer: int, work: Workspace, cache: PagedCache, index: StepIndex, num_threads: int
    ) -> None:
        block = self.layers[layer].block
        at = index.num_decodes
        for chunk, (num_rows, _) in enumerate(index.chunks):
            if block.attend_prompt(work, at, num_rows, index.chunk_slots[chunk], num_threads):
                at += num_rows
                continue
            query = work.q[at : at + num_rows].to(self.dtype).view(1, num_rows, -1, block.head_width).transpose(1, 2)
            out = cache.attend_chunk(
                layer,
                chunk,
                query,
                scaling=block.scaling,
                window=block.window or None,
                sinks=block.sinks,
                expand=block.up,
            )
            work.attended[at : at + num_rows] = out.reshape(num_rows, -1)
            at += num_rows


def why_not(model: nn.Module) -> str:
    """Say why a model cannot be computed leanly; empty where it can."""
    return why_not_here(next(model.parameters()).dtype) or programs.why_not(model, is_on_device=False)


def why_not_here(dtype: torch.dtype) -> str:
    """Say why no model can be computed leanly on this machine; empty where those that have a program can."""
    if native.library() is None or kernel_for(dtype) is not Kernel.NATIVE:
        return "the native kernels are not in use"
    return ""
