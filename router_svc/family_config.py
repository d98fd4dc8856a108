"""What config.json says of a model of the commonest family, where it says all of it.

Owns FamilyConfig and the question whether a config is plain: every number that decides an answer is written there, none
is left to a default of the model library, and no field is there whose meaning is not known here. Of any other config
the library is asked, which also says what is wrong with it. Knows no tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from collegium.model.config_fields import USED, model_fields

# Fields that say nothing about attention, gates and embeddings: they are the experts', or the tokenizer's.
_ELSEWHERE = {"intermediate_size", "moe_intermediate_size", "hidden_act", "bos_token_id", "pad_token_id"}
_COMMON = {
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "num_experts_per_tok", "eos_token_id"),
}
_COUNTS = {"num_experts", "num_local_experts"}  # one number; the survey has read it
_ROPE = {"rope_theta", "rope_scaling", "rope_parameters"}
_OWN: Mapping[str, set[str]] = {
    "mixtral": {"sliding_window"},
    "olmoe": {"clip_qkv", "norm_topk_prob", "attention_bias"},
    "qwen3_moe": {
        *("norm_topk_prob", "attention_bias", "use_sliding_window", "sliding_window"),
        *("decoder_sparse_step", "mlp_only_layers"),
    },
}
_MAY_BE_THERE = {"qwen3_moe": {"max_window_layers"}}  # the library's code of these layers does not read it


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyConfig:
    """A plain config, under the names that the model library gives its fields."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    num_experts_per_tok: int
    eos_token_id: int | list[int] | None
    rope_parameters: Mapping[str, object]
    sliding_window: int | None
    # Where an architecture has no such field, this is what its layers do.
    norm_topk_prob: bool = True
    attention_bias: bool = False
    clip_qkv: float | None = None

    @property
    def rope_theta(self) -> float:
        """The base of the rotation's frequencies."""
        return cast(float, self.rope_parameters["rope_theta"])


def plain_config(config: Mapping[str, object]) -> FamilyConfig | None:
    """Read a checked config.json; None if it is of another family, or leaves anything to the model library."""
    model_type = str(config.get("model_type"))
    if model_type not in _OWN:
        return None
    fields = model_fields(config)
    needed = _COMMON | _OWN[model_type]
    known = needed | _ELSEWHERE | _COUNTS | _ROPE | _MAY_BE_THERE.get(model_type, set())
    theta = _rope_theta(fields)
    if not needed <= fields.keys() or (fields.keys() & USED) - known or theta is None:
        return None
    is_windowed = fields.get("use_sliding_window", model_type == "mixtral")
    has_experts_everywhere = fields.get("decoder_sparse_step", 1) == 1 and not fields.get("mlp_only_layers")
    width, heads = cast(int, fields["hidden_size"]), cast(int, fields["num_attention_heads"])
    if not has_experts_everywhere or width % heads or (model_type == "olmoe" and fields["head_dim"] != width // heads):
        return None
    told: dict[str, Any] = {name: fields[name] for name in FamilyConfig.__dataclass_fields__ if name in fields}
    told |= {
        "model_type": model_type,
        "sliding_window": fields["sliding_window"] if is_windowed else None,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    return FamilyConfig(**told)


def _rope_theta(fields: Mapping[str, object]) -> float | None:
    """Return the base of a plain rotation, in the newer spelling or the older one; None if it is scaled or not said."""
    if fields.get("rope_scaling"):
        return None
    rope = fields.get("rope_parameters")
    if rope is None:
        theta = fields.get("rope_theta")
    elif "rope_theta" in fields or cast("Mapping[str, object]", rope).keys() != {"rope_type", "rope_theta"}:
        return None
    else:
        inner = cast("Mapping[str, object]", rope)
        theta = inner["rope_theta"] if inner["rope_type"] == "default" else None
    return theta if isinstance(theta, float) else None
