"""Which model types are served, and how each one's checkpoint lays out its experts.

Owns the table of architectures and the descriptor of an expert's arithmetic. Reads config.json only; imports neither
torch nor transformers, so that a gateway or a worker can ask. Sources: the architectures' modelling code and the
weight conversions of transformers 5.23, which reads and writes two layouts of most architectures: the published one,
and its own in memory (`save_pretrained(save_original_format=False)`).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import cast

from collegium.model import encoder_decoder
from collegium.model.checkpoint_files import CheckpointError, has_file, read_json, shown
from collegium.model.config_fields import check_config, check_eos, check_finite


class UnsupportedModelError(ValueError):
    """The checkpoint's model type, or a feature of it, is not served."""


class Layout(StrEnum):
    """How experts lie in the files."""

    PER_EXPERT = "per_expert"  # one tensor per expert and role: ...experts.7.gate_proj.weight [F, D]
    FUSED = "fused"  # one tensor per layer: [E, 2F, D] and [E, D, F]
    FUSED_TRANSPOSED = "fused_transposed"  # [E, D, 2F], gate and up interleaved, and [E, F, D], with biases
    UNGATED = "ungated"  # one tensor per expert and role, of experts that have no gate, with or without biases
    STACKED = "stacked"  # [E * F, D] for gate, up and (transposed) down


class Role(StrEnum):
    """What a stored tensor is to its expert."""

    GATE = "gate"
    UP = "up"
    DOWN = "down"
    GATE_UP = "gate_up"
    GATE_UP_BIAS = "gate_up_bias"
    UP_BIAS = "up_bias"
    DOWN_BIAS = "down_bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One model type: where its experts are in a checkpoint.

    `layouts` holds, for each layout that its checkpoints have, a map from a regular expression over tensor names to a
    role; group `layer` is the decoder layer, group `expert`, where there is one, the expert's index, and group `stack`
    the "encoder" or the "decoder" of a model that has both. Their layers are counted through, the encoder's first.
    """

    model_type: str
    layouts: Mapping[Layout, Mapping[str, Role]]
    num_experts_key: str
    top_k_key: str = "num_experts_per_tok"
    num_layers_key: str = "num_hidden_layers"

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it has an encoder beside its decoder."""
        return self.model_type in encoder_decoder.MODEL_TYPES


_LAYER = r"^(?:model\.)?layers\.(?P<layer>[0-9]{1,5})\."
_PER_EXPERT = _LAYER + r"(?:mlp|block_sparse_moe)\.experts\.(?P<expert>[0-9]{1,5})\."
_PROJECTIONS = {
    _PER_EXPERT + r"(?:gate_proj|w1)\.weight$": Role.GATE,
    _PER_EXPERT + r"(?:up_proj|w3)\.weight$": Role.UP,
    _PER_EXPERT + r"(?:down_proj|w2)\.weight$": Role.DOWN,
}
_EXPERTS = _LAYER + r"(?:mlp|block_sparse_moe)\.experts\."
_FUSED = {_EXPERTS + r"gate_up_proj$": Role.GATE_UP, _EXPERTS + r"down_proj$": Role.DOWN}
_GRANITE = {
    _LAYER + r"block_sparse_moe\.input_linear\.weight$": Role.GATE_UP,
    _LAYER + r"block_sparse_moe\.output_linear\.weight$": Role.DOWN,
}
_FUSED_TRANSPOSED = _FUSED | {
    _EXPERTS + r"gate_up_proj_bias$": Role.GATE_UP_BIAS,
    _EXPERTS + r"down_proj_bias$": Role.DOWN_BIAS,
}
_NLLB = (
    r"^model\.(?P<stack>encoder|decoder)\.layers\.(?P<layer>[0-9]{1,5})\.ffn\.experts\.expert_(?P<expert>[0-9]{1,5})\."
)
_SWITCH = (
    r"^(?P<stack>encoder|decoder)\.block\.(?P<layer>[0-9]{1,5})\.layer\.[12]\.mlp\.experts\."
    r"expert_(?P<expert>[0-9]{1,5})\."
)
_BLOCK = r"^(?:transformer\.)?blocks\.(?P<layer>[0-9]{1,5})\.ffn\.experts\.mlp\."
_STACKED = {_BLOCK + "w1$": Role.GATE, _BLOCK + "v1$": Role.UP, _BLOCK + "w2$": Role.DOWN}


def _per_expert(model_type: str, num_experts_key: str, top_k_key: str = "num_experts_per_tok") -> Architecture:
    return Architecture(
        model_type=model_type,
        layouts={Layout.PER_EXPERT: _PROJECTIONS, Layout.FUSED: _FUSED},
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
        _per_expert("dots1", "n_routed_experts"),
        _per_expert("ernie4_5_moe", "moe_num_experts", top_k_key="moe_k"),
        _per_expert("hunyuan_v1_moe", "num_experts", top_k_key="moe_topk"),
        Architecture(
            model_type="granitemoe",
            layouts={Layout.FUSED: _GRANITE | _FUSED},
            num_experts_key="num_local_experts",
        ),
        Architecture(
            model_type="gpt_oss",
            layouts={Layout.FUSED_TRANSPOSED: _FUSED_TRANSPOSED},
            num_experts_key="num_local_experts",
        ),
        Architecture(
            model_type="dbrx",
            layouts={Layout.STACKED: _STACKED},
            num_experts_key="ffn_config.moe_num_experts",
            top_k_key="ffn_config.moe_top_k",
            num_layers_key="n_layers",
        ),
        Architecture(
            model_type=encoder_decoder.NLLB,
            layouts={
                Layout.UNGATED: {
                    _NLLB + r"fc1\.weight$": Role.UP,
                    _NLLB + r"fc1\.bias$": Role.UP_BIAS,
                    _NLLB + r"fc2\.weight$": Role.DOWN,
                    _NLLB + r"fc2\.bias$": Role.DOWN_BIAS,
                }
            },
            num_experts_key="num_experts",
        ),
        Architecture(
            model_type=encoder_decoder.SWITCH,
            layouts={Layout.UNGATED: {_SWITCH + r"wi\.weight$": Role.UP, _SWITCH + r"wo\.weight$": Role.DOWN}},
            num_experts_key="num_experts",
        ),
    )
}

# Spellings of one number: transformers 4 and 5 write different ones.
_SYNONYMS = {
    "moe_num_experts": "num_experts",
    "moe_k": "num_experts_per_tok",
    "moe_topk": "num_experts_per_tok",
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
    """An expert's arithmetic: down(act(gate(x)) * up(x)), or down(act(up(x))) where it is not gated, with the clamped
    variant's two constants.
    """

    activation: Activation
    clamp: float = 0.0
    alpha: float = 1.0
    is_gated: bool = True


def read_config(model_dir: Path) -> dict[str, object]:
    """Read config.json. Raises CheckpointError naming the file and what is wrong with it."""
    path = model_dir / "config.json"
    if not os.path.isdir(model_dir):
        raise CheckpointError(f"model directory {model_dir} does not exist or is not a directory")
    if not has_file(path):
        raise CheckpointError(f"{path} is missing: give the folder of a Hugging Face checkpoint")
    return read_json(path)


def read_architecture(model_dir: Path) -> tuple[dict[str, object], Architecture]:
    """Read config.json, find its architecture and check the values of its fields.

    Raises CheckpointError naming the field, or UnsupportedModelError.
    """
    config = read_config(model_dir)
    path = model_dir / "config.json"
    architecture = architecture_of(config, path)
    if architecture.is_encoder_decoder:
        check_finite(path, config)
        check_eos(path, config)
        encoder_decoder.read_encoder_decoder(config, path)
    else:
        check_config(path, config)
    if has_file(model_dir / "adapter_config.json"):
        raise UnsupportedModelError(
            f"{model_dir / 'adapter_config.json'}: adapters are not served; merge it into the weights, or remove it"
        )
    return config, architecture


def architecture_of(config: Mapping[str, object], path: Path = Path("config.json")) -> Architecture:
    """Find the architecture of a config, read from `path`. Raises UnsupportedModelError listing those that work."""
    model_type = config.get("model_type")
    found = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        named = repr(shown(model_type)) if isinstance(model_type, str) else shown(model_type)
        raise UnsupportedModelError(
            f"{path}: model type {named} is not supported; these are: {', '.join(sorted(ARCHITECTURES))}"
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{path}: the checkpoint is quantized (quantization_config); "
            "serve an unquantized float32, bfloat16 or float16 one"
        )
    return found


def config_int(config: Mapping[str, object], key: str) -> int | None:
    """Look up a number by its dotted key, or by its other spelling. None where it is absent."""
    for name in (key, _SYNONYMS.get(key)):
        value: object = config
        for part in (name or "").split("."):
            value = cast(Mapping[str, object], value).get(part) if isinstance(value, Mapping) else None
        if isinstance(value, list) and value:  # a checked config has the same for all layers
            value = cast("list[object]", value)[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def expert_form(config: Mapping[str, object], path: Path = Path("config.json")) -> ExpertForm:
    """Read the arithmetic of the experts from a checked config. Raises UnsupportedModelError for an unknown activation,
    CheckpointError for one that is no name.
    """
    if config.get("model_type") == "gpt_oss":
        clamp, alpha = config.get("swiglu_limit"), config.get("swiglu_alpha")
        return ExpertForm(
            activation=Activation.CLAMPED_SWIGLU,
            clamp=float(clamp) if isinstance(clamp, int | float) else 7.0,
            alpha=float(alpha) if isinstance(alpha, int | float) else 1.702,
        )
    if config.get("model_type") in encoder_decoder.MODEL_TYPES:
        field = "activation_function" if config["model_type"] == encoder_decoder.NLLB else "dense_act_fn"
        return ExpertForm(
            activation=_activation(path, field, encoder_decoder.read_encoder_decoder(config, path).activation),
            is_gated=False,
        )
    field, name = "hidden_act", config.get("hidden_act")
    ffn = config.get("ffn_config")
    if name is None and isinstance(ffn, Mapping):
        field, act = "ffn_config.ffn_act_fn", cast(Mapping[str, object], ffn).get("ffn_act_fn")
        if act is not None and not isinstance(act, Mapping):
            raise CheckpointError(f"{path}: {field} is {shown(act)}; it must be an object with a name")
        name = cast(Mapping[str, object], act or {}).get("name")
    return ExpertForm(activation=_activation(path, field, "silu" if name is None else str(name)))


def _activation(path: Path, field: str, name: str) -> Activation:
    activation = _ACTIVATIONS.get(name)
    if activation is None:
        raise UnsupportedModelError(
            f"{path}: {field} {shown(name)!r} is not supported; these are: {', '.join(_ACTIVATIONS)}"
        )
    return activation


def role_of(
    architecture: Architecture, key: str, num_encoder_layers: int = 0
) -> tuple[Layout, Role, int, int | None] | None:
    """Say what a tensor is: (layout, role, decoder layer, expert or None for all), or None if it is no expert's.

    num_encoder_layers: those that a decoder's layers are counted behind.
    """
    for layout, patterns in architecture.layouts.items():
        for pattern, role in patterns.items():
            if match := re.fullmatch(pattern, key):
                groups = match.groupdict()
                expert = groups.get("expert")
                layer = int(match["layer"]) + (num_encoder_layers if groups.get("stack") == "decoder" else 0)
                return layout, role, layer, None if expert is None else int(expert)
    return None
