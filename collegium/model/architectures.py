"""Which model types are served, and how each one's checkpoint lays out its experts.

Owns the table of architectures and the descriptor of an expert's arithmetic. Reads config.json only; imports neither
torch nor transformers, so that a gateway or a worker can ask. Sources: the architectures' modelling code in
transformers 5.23.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import cast

from collegium.model.checkpoint_files import CheckpointError, has_file, read_json


class UnsupportedModelError(ValueError):
    """The checkpoint's model type, or a feature of it, is not served."""


class Layout(StrEnum):
    """How experts lie in the files."""

    PER_EXPERT = "per_expert"  # one tensor per expert and role: ...experts.7.gate_proj.weight [F, D]
    FUSED = "fused"  # one tensor per layer: [E, 2F, D] and [E, D, F]
    FUSED_TRANSPOSED = "fused_transposed"  # [E, D, 2F], gate and up interleaved, and [E, F, D], with biases
    STACKED = "stacked"  # [E * F, D] for gate, up and (transposed) down


class Role(StrEnum):
    """What a stored tensor is to its expert."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_UP = "gate_up"
    GATE_UP_BIAS = "gate_up_bias"
    DOWN_BIAS = "down_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model type: where its experts are in a checkpoint.

    `patterns` maps a regular expression over tensor names to a role; group `layer` is the decoder layer, group
    `expert`, where there is one, the expert's index.
    """

    model_type: str
    layout: Layout
    patterns: Mapping[str, Role]
    num_experts_key: str
    top_k_key: str
    num_layers_key: str = "num_hidden_layers"


_PER_EXPERT = r"^(?:.*\.)?layers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe)\.experts\.(?P<expert>\d+)\.{}\.weight$"
_PROJECTIONS = {
    _PER_EXPERT.format("(?:gate_proj|w1)"): Role.GATE,
    _PER_EXPERT.format("(?:up_proj|w3)"): Role.UP,
    _PER_EXPERT.format("(?:down_proj|w2)"): Role.DOWN,
}
_FUSED = {
    r"^(?:.*\.)?layers\.(?P<layer>\d+)\.block_sparse_moe\.input_linear\.weight$": Role.GATE_UP,
    r"^(?:.*\.)?layers\.(?P<layer>\d+)\.block_sparse_moe\.output_linear\.weight$": Role.DOWN,
}
_FUSED_TRANSPOSED = {
    r"^(?:.*\.)?layers\.(?P<layer>\d+)\.mlp\.experts\.gate_up_proj$": Role.GATE_UP,
    r"^(?:.*\.)?layers\.(?P<layer>\d+)\.mlp\.experts\.gate_up_proj_bias$": Role.GATE_UP_BIAS,
    r"^(?:.*\.)?layers\.(?P<layer>\d+)\.mlp\.experts\.down_proj$": Role.DOWN,
    r"^(?:.*\.)?layers\.(?P<layer>\d+)\.mlp\.experts\.down_proj_bias$": Role.DOWN_BIAS,
}
_STACKED = {
    r"^(?:.*\.)?blocks\.(?P<layer>\d+)\.ffn\.experts\.mlp\.w1$": Role.GATE,
    r"^(?:.*\.)?blocks\.(?P<layer>\d+)\.ffn\.experts\.mlp\.v1$": Role.UP,
    r"^(?:.*\.)?blocks\.(?P<layer>\d+)\.ffn\.experts\.mlp\.w2$": Role.DOWN,
}


def _per_expert(model_type: str, num_experts_key: str, top_k_key: str = "num_experts_per_tok") -> Architecture:
    return Architecture(
        model_type=model_type,
        layout=Layout.PER_EXPERT,
        patterns=_PROJECTIONS,
        num_experts_key=num_experts_key,
        top_k_key=top_k_key,
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    a.model_type: a
    for a in (
        _per_expert("mixtral", "num_local_experts"),
        _per_expert("phimoe", "num_local_experts"),
        _per_expert("minimax_m2", "num_local_experts"),
        _per_expert("olmoe", "num_experts"),
        _per_expert("qwen2_moe", "num_experts"),
        _per_expert("qwen3_moe", "num_experts"),
        _per_expert("deepseek_v2", "n_routed_experts"),
        _per_expert("deepseek_v3", "n_routed_experts"),
        _per_expert("glm4_moe", "n_routed_experts"),
        Architecture(
            model_type="granitemoe",
            layout=Layout.FUSED,
            patterns=_FUSED,
            num_experts_key="num_local_experts",
            top_k_key="num_experts_per_tok",
        ),
        Architecture(
            model_type="gpt_oss",
            layout=Layout.FUSED_TRANSPOSED,
            patterns=_FUSED_TRANSPOSED,
            num_experts_key="num_local_experts",
            top_k_key="num_experts_per_tok",
        ),
        Architecture(
            model_type="dbrx",
            layout=Layout.STACKED,
            patterns=_STACKED,
            num_experts_key="ffn_config.moe_num_experts",
            top_k_key="ffn_config.moe_top_k",
            num_layers_key="n_layers",
        ),
    )
}

# Spellings of one number: transformers 4 and 5 write different ones.
_SYNONYMS = {
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_local_experts",
}


class Activation(StrEnum):
    """The gate's non-linearity in an expert's gated linear unit."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    CLAMPED_SWIGLU = "clamped_swiglu"  # gpt_oss: (up + 1) * gate * sigmoid(alpha * gate), both clamped


_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertForm:
    """An expert's arithmetic: down(act(gate(x)) * up(x)), with the clamped variant's two constants."""

    activation: Activation
    clamp: float = 0.0
    alpha: float = 1.0


def read_config(model_dir: Path) -> dict[str, object]:
    """Read config.json. Raises CheckpointError naming the file and what is wrong with it."""
    path = model_dir / "config.json"
    if not model_dir.is_dir():
        raise CheckpointError(f"model directory {model_dir} does not exist or is not a directory")
    if not has_file(path):
        raise CheckpointError(f"{path} is missing: give the folder of a Hugging Face checkpoint")
    return read_json(path)


def architecture_of(config: Mapping[str, object]) -> Architecture:
    """Find the architecture of a config. Raises UnsupportedModelError listing those that work."""
    model_type = config.get("model_type")
    found = ARCHITECTURES.get(str(model_type))
    if found is None:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; these are: {', '.join(sorted(ARCHITECTURES))}"
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            "the checkpoint is quantized (config.json: quantization_config); "
            "serve an unquantized float32, bfloat16 or float16 one"
        )
    return found


def config_int(config: Mapping[str, object], key: str) -> int | None:
    """Look up a number by its dotted key, or by its other spelling. None where it is absent."""
    for name in (key, _SYNONYMS.get(key)):
        value: object = config
        for part in (name or "").split("."):
            value = cast(Mapping[str, object], value).get(part) if isinstance(value, Mapping) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def expert_form(config: Mapping[str, object]) -> ExpertForm:
    """Read the arithmetic of the experts from a config. Raises UnsupportedModelError for an unknown activation."""
    if config.get("model_type") == "gpt_oss":
        clamp, alpha = config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)
        assert isinstance(clamp, int | float) and isinstance(alpha, int | float)
        return ExpertForm(activation=Activation.CLAMPED_SWIGLU, clamp=float(clamp), alpha=float(alpha))
    ffn = config.get("ffn_config")
    name = config.get("hidden_act")
    if name is None and isinstance(ffn, Mapping):
        act = cast(Mapping[str, object], ffn).get("ffn_act_fn")
        name = cast(Mapping[str, object], act).get("name") if isinstance(act, Mapping) else None
    activation = _ACTIVATIONS.get(str(name or "silu"))
    if activation is None:
        raise UnsupportedModelError(
            f"config.json: hidden_act {name!r} is not supported; these are: {', '.join(_ACTIVATIONS)}"
        )
    return ExpertForm(activation=activation)


def role_of(architecture: Architecture, key: str) -> tuple[Role, int, int | None] | None:
    """Say what a tensor is: (role, decoder layer, expert or None for all), or None where it is no expert's."""
    for pattern, role in architecture.patterns.items():
        if match := re.match(pattern, key):
            expert = match.groupdict().get("expert")
            return role, int(match["layer"]), None if expert is None else int(expert)
    return None
