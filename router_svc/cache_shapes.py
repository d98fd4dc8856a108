"""What a model keeps of each position, and how far back its layers look: what attention must know of a model.

Owns the reading of an attention window from a config of transformers (5.23).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from router_svc.family_config import FamilyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What one position of one layer's cache holds, as the model hands it over."""

    key: tuple[int, int]  # (heads, width)
    value: tuple[int, int]
    is_latent: bool = False  # MLA's pair of latent and rotary key, which the model expands itself

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes a position takes in this layer."""
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * dtype.itemsize


def window_of(config: PreTrainedConfig | FamilyConfig, layer_idx: int) -> int | None:
    """Say how far back a layer looks, as the masks of transformers 5.23 do; None: everywhere.

    Some models pass a window to attention that their mask does not apply, others apply one that they do not pass.
    """
    match config.model_type:
        case "mixtral" | "qwen3_moe" | "phimoe":
            return config.sliding_window
        case "qwen2_moe" | "gpt_oss" | "dots1":
            return config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        case _:
            return None
