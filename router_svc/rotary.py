"""Rotary positions that switch with length, for batches of several lengths.

Owns CohortRotary. Some models (rope type "longrope") use one set of frequencies up to a trained length and another
beyond it, and transformers decides for a whole batch by its largest position. Packed requests must not decide for each
other, so rows
are computed in two cohorts. Every other rope type depends on a row's own position alone and is left as it is.
"""

import torch
from torch import Tensor, nn


class CohortRotary(nn.Module):
    """Wraps a model's rotary module: rows up to `border` positions and rows beyond it get their frequencies apart."""

    def __init__(self, rotary: nn.Module, border: int):
        super().__init__()
        self.rotary, self.border = rotary, border

    def forward(self, x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [1, T, width], for position_ids [1, T]."""
        beyond = position_ids[0] >= self.border
        if not bool(beyond.any()) or bool(beyond.all()):
            return self.rotary(x, position_ids, *args, **kwargs)
        parts: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []
        for cohort in (~beyond, beyond):
            at = cohort.nonzero()[:, 0]
            parts.append((at, self.rotary(x, position_ids[:, at], *args, **kwargs)))
        order = torch.cat([at for at, _ in parts]).argsort()
        cos, sin = (torch.cat([pair[i] for _, pair in parts], 1)[:, order] for i in (0, 1))
        return cos, sin


def group_by_cohort(model: nn.Module) -> None:
    """Wrap the rotary modules of a model whose frequencies switch with length."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            config = getattr(child, "config", None)
            if not type(child).__name__.endswith("RotaryEmbedding") or config is None:
                continue
            rope = getattr(config, "rope_parameters", None) or {}
            if rope.get("rope_type") == "longrope":
                border = rope.get("original_max_position_embeddings") or getattr(
                    config, "original_max_position_embeddings", None
                )
                setattr(parent, name, CohortRotary(child, int(border or config.max_position_embeddings)))
