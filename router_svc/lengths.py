"""How many positions a model is made for, rotary scaling included.

Owns the reading of config.json's rope parameters as transformers has standardised them (`rope_scaling` of older
configs among them). Model cards tell users to add a `rope_scaling` beside the old `max_position_embeddings`; the
length is then the scaled one, as vLLM has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from router_svc.family_config import FamilyConfig

_DEFAULT_POSITIONS = 2048


def rope_parameters(config: PreTrainedConfig | FamilyConfig) -> list[Mapping[str, Any]]:
    """List the rope parameters: one for the whole model, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def served_positions(config: PreTrainedConfig | FamilyConfig) -> int:
    """Return the longest sequence that the model is made for, in tokens: the shortest of its kinds of layer."""
    told = int(getattr(config, "max_position_embeddings", None) or _DEFAULT_POSITIONS)
    return min(_scaled(config, rope, told) for rope in rope_parameters(config))


def _scaled(config: PreTrainedConfig | FamilyConfig, rope: Mapping[str, Any], told: int) -> int:
    """Return the length by one kind of layer; `told` is max_position_embeddings.

    yarn and linear interpolate up to factor times the trained length. What that length is, the rope parameters say;
    without that it is max_position_embeddings itself, as transformers takes it. Where max_position_embeddings is the
    scaled length already, factor times the original is the same number. llama3's factor bends frequencies and is no
    ratio of lengths. longrope changes the frequencies of a whole sequence when it outgrows the trained length, which
    transformers does by computing it anew; sequences end there instead.
    """
    kind = rope.get("rope_type")
    trained = rope.get("original_max_position_embeddings")
    if kind == "longrope":
        trained = trained or getattr(config, "original_max_position_embeddings", None)
        return min(told, int(trained or told))
    if kind in ("yarn", "linear") and rope.get("factor"):
        return max(1, int(float(rope["factor"]) * int(trained or told)))
    return told
