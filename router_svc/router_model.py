"""A model without its experts, as the engine uses it: what it is, and its forward pass over the packed rows of a step.

Owns nothing: model_loader.py makes it. T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from collegium.model.encoder_decoder import EncoderDecoderConfig
from router_svc.cache_shapes import CacheShape
from router_svc.encoder_decoder import EncoderDecoderModel
from router_svc.paged_attention import PagedCache, SourceRun
from router_svc.remote_experts import ExpertCall, RemoteExperts, StepCall
from router_svc.shared_experts import Shared


class OwnPass(Protocol):
    """A forward pass of our own, for the models that it can compute."""

    cache_shapes: dict[int, CacheShape]  # by layer index of the model's cache

    def set_step_call(self, call: StepCall | None) -> None:
        """Say who computes all layers of a step in one call; a pass that goes by layer has no use for it."""
        ...

    def forward(self, input_ids: Tensor, positions: Tensor, cache: PagedCache, keep: Tensor) -> Tensor:
        """Compute one packed pass: input_ids, positions [1, T]; returns logits [len(keep), V]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterModel:
    """A model without experts, ready for packed steps."""

    model: nn.Module
    model_type: str
    dtype: torch.dtype
    device: torch.device
    vocab_size: int
    max_positions: int
    num_experts: int
    top_k: int
    eos_ids: tuple[int, ...]
    cache_shapes: dict[int, CacheShape]  # by layer index of the model's cache
    moe_layers: tuple[int, ...]  # decoder layer of each MoE layer
    num_shared: int = 0  # the last of num_experts, which every row has, are counted in top_k
    both: EncoderDecoderConfig | None = None  # of a model with an encoder
    forced_id: int | None = None  # what its answers begin with if nothing else is said
    lean: OwnPass | None = None  # computes the forward pass in the place of the modelling classes; None: they do

    @property
    def num_routed(self) -> int:
        """How many of a row's experts the gate chooses."""
        return self.top_k - self.num_shared

    def set_expert_call(self, call: ExpertCall, compute_step: StepCall | None = None) -> None:
        """Say who computes the experts, layer by layer, or of all layers of a step where that can be done."""
        if self.lean is not None:
            self.lean.set_step_call(compute_step)
        for module in self.model.modules():
            if isinstance(module, RemoteExperts):
                module.call = call

    def shared_experts(self) -> dict[int, Shared]:
        """The shared experts by MoE layer, to be computed while rows are away."""
        remotes = [m for m in self.model.modules() if isinstance(m, RemoteExperts)]
        return {remote.layer: shared for remote in remotes for shared in remote.shared}

    def moe_blocks(self) -> dict[int, nn.Module]:
        """The blocks that hold a gate and, elsewhere, experts, by MoE layer."""
        modules = dict(self.model.named_modules())
        return {
            module.layer: modules[name.rpartition(".")[0]]
            for name, module in modules.items()
            if isinstance(module, RemoteExperts)
        }

    def cache_bytes_per_token(self) -> int:
        """Bytes that one position takes over all layers."""
        return sum(shape.num_bytes(self.dtype) for shape in self.cache_shapes.values())

    def encode(self, sources: Sequence[SourceRun], cache: PagedCache, most_rows: int) -> None:
        """Encode sources whole and store what is looked at of them; most_rows: of one call for experts."""
        assert isinstance(self.lean, EncoderDecoderModel)
        self.lean.encode(sources, cache, most_rows)

    def forward(self, input_ids: Tensor, positions: Tensor, cache: object, keep: Tensor) -> Tensor:
        """Compute one packed pass: input_ids, positions [1, T]; returns logits [len(keep), V] of the rows in `keep`."""
        if self.lean is not None and isinstance(cache, PagedCache):
            return self.lean.forward(input_ids, positions, cache, keep)
        out = self.model(
            input_ids=input_ids,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            paged=cache,
            logits_to_keep=keep,
        )
        return out.logits[0]
