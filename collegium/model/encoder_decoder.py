"""What an encoder-decoder checkpoint is by its config.json, and the tensors that its routers read.

Owns EncoderDecoderConfig and the names and shapes of everything that is no expert's. Reads no tensor; imports neither
torch nor transformers. Sources: the modelling code of transformers 4.48.3 and 5.23 for NLLB-MoE (NLLB Team, No Language
Left Behind, 2022) and Switch Transformers (Fedus, Zoph and Shazeer, 2022).
MoE layers are numbered through both stacks, the encoder's first. D model, H heads, W head width, E experts, F ffn,
V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from collegium.model.checkpoint_files import CheckpointError, shown_value

NLLB, SWITCH = "nllb-moe", "switch_transformers"
MODEL_TYPES = (NLLB, SWITCH)

_DIM, _HEADS, _EXPERTS, _LAYERS, _LENGTH = 1 << 20, 1 << 16, 4096, 512, 1 << 30
_IDS = (-(1 << 31), 1 << 31)
# Fields that decide an answer, with what they are where config.json leaves them out, and their bounds.
_WHOLE: Mapping[str, Mapping[str, tuple[int, int, int]]] = {
    NLLB: {
        "vocab_size": (128112, 1, 1 << 24),
        "d_model": (1024, 4, _DIM),
        "max_position_embeddings": (1024, 1, _LENGTH),
        **dict.fromkeys(("encoder_layers", "decoder_layers"), (12, 1, _LAYERS)),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), (4096, 1, _DIM)),
        **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), (16, 1, _HEADS)),
        **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), (4, 0, _LAYERS)),
        "num_experts": (128, 2, _EXPERTS),
        "decoder_start_token_id": (2, *_IDS),
        "pad_token_id": (1, *_IDS),
    },
    SWITCH: {
        "vocab_size": (32128, 1, 1 << 24),
        "d_model": (768, 1, _DIM),
        "d_kv": (64, 1, _DIM),
        "d_ff": (2048, 1, _DIM),
        **dict.fromkeys(("num_layers", "num_decoder_layers"), (12, 1, _LAYERS)),
        **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), (3, 0, _LAYERS)),
        "num_heads": (12, 1, _HEADS),
        "num_experts": (8, 1, _EXPERTS),
        "relative_attention_num_buckets": (32, 4, 1 << 16),
        "relative_attention_max_distance": (128, 2, 1 << 20),
        "pad_token_id": (0, *_IDS),
    },
}
# Names that transformers has for some fields beside their own.
_ALIASES: Mapping[str, Mapping[str, str]] = {
    NLLB: {
        "d_model": "hidden_size",
        "encoder_attention_heads": "num_attention_heads",
        "encoder_layers": "num_hidden_layers",
    },
    SWITCH: {"d_model": "hidden_size", "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"},
}
_TRUTHS: Mapping[str, Mapping[str, bool]] = {
    NLLB: {"scale_embedding": True, "router_bias": False, "tie_word_embeddings": True},
    SWITCH: {"router_bias": False, "tie_word_embeddings": True},
}
_SWITCH_LENGTH = 1 << 20  # positions are relative: only memory bounds a text


@dataclass(frozen=True, slots=True, kw_only=True)
class StackConfig:
    """An encoder or a decoder. sparse: the layers that have experts."""

    num_layers: int
    num_heads: int
    d_ffn: int
    sparse: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderConfig:
    """What decides an answer of an encoder-decoder model."""

    model_type: str
    d_model: int
    head_width: int
    encoder: StackConfig
    decoder: StackConfig
    num_experts: int
    top_k: int
    vocab_size: int
    max_positions: int
    activation: str
    expert_scale: float  # what an expert's output is multiplied by
    has_gate_bias: bool
    is_tied: bool  # the embedding is the head, too
    embedding_scale: float
    norm_eps: float
    num_buckets: int  # of relative distances
    max_distance: int
    start_id: int  # what a decoder begins with
    pad_id: int

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts, the decoder's behind all of the encoder's."""
        return (*self.encoder.sparse, *(self.encoder.num_layers + one for one in self.decoder.sparse))

    @property
    def num_layers(self) -> int:
        """Layers of both stacks."""
        return self.encoder.num_layers + self.decoder.num_layers


def read_encoder_decoder(config: Mapping[str, object], path: Path = Path("config.json")) -> EncoderDecoderConfig:
    """Read and check the config of one of MODEL_TYPES. Raises CheckpointError naming the field."""
    model_type = str(config.get("model_type"))
    number = {name: _whole(path, config, model_type, name) for name in _WHOLE[model_type]}
    truth = {name: _truth(path, config, name, default) for name, default in _TRUTHS[model_type].items()}
    if config.get("is_encoder_decoder") is False:
        raise CheckpointError(f"{path}: is_encoder_decoder is false; {model_type} is served with its encoder alone")
    if model_type == SWITCH and config.get("num_decoder_layers", 0) is None:
        number["num_decoder_layers"] = number["num_layers"]
    for name in ("pad_token_id", "decoder_start_token_id"):
        if name in number and not 0 <= number[name] < number["vocab_size"]:
            raise CheckpointError(f"{path}: {name} is {number[name]}; the vocabulary has {number['vocab_size']} ids")
    return (_read_nllb if model_type == NLLB else _read_switch)(path, config, number, truth)


def expected_tensors(config: EncoderDecoderConfig) -> dict[str, tuple[int, ...]]:
    """List the tensors that routers read, with their shapes."""
    vocab, d_model = config.vocab_size, config.d_model
    is_nllb = config.model_type == NLLB
    prefix = "model." if is_nllb else ""
    wanted: dict[str, tuple[int, ...]] = {}
    if config.is_tied:
        wanted[f"{prefix}shared.weight"] = (vocab, d_model)
    else:  # transformers draws at random what lacks of these
        for name in (f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight", "lm_head.weight"):
            wanted[name] = (vocab, d_model)
    for name, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        wanted |= (_nllb_stack if is_nllb else _switch_stack)(config, f"{prefix}{name}", stack, name == "decoder")
    return wanted


def dropped_by_transformers(config: Mapping[str, object]) -> str:
    """Say which tokens `transformers` drops by such a config at inference; empty where it drops none that fits."""
    if config.get("model_type") == SWITCH:
        capacity = config.get("expert_capacity", 64)
        return f"expert_capacity is {shown_value(capacity)}: those of one text beyond so many for one expert"
    fraction = config.get("moe_eval_capacity_token_fraction", 1.0)
    if isinstance(fraction, int | float) and fraction >= 1:
        return ""
    return f"moe_eval_capacity_token_fraction is {shown_value(fraction)}: those of a batch beyond an expert's share"


def _read_nllb(
    path: Path, config: Mapping[str, object], number: Mapping[str, int], truth: Mapping[str, bool]
) -> EncoderDecoderConfig:
    policy = config.get("second_expert_policy", "all")
    if policy != "all":
        raise CheckpointError(
            f"{path}: second_expert_policy is {shown_value(policy)}, by which a token's second expert is a matter of "
            'chance; "all" is served'
        )
    dropout = config.get("moe_token_dropout", 0.2)
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
        raise CheckpointError(f"{path}: moe_token_dropout is {shown_value(dropout)}; it must be a number from 0 to 1")
    d_model = number["d_model"]
    heads = {name: number[f"{name}_attention_heads"] for name in ("encoder", "decoder")}
    for name, num_heads in heads.items():
        if d_model % num_heads:
            raise CheckpointError(
                f"{path}: {name}_attention_heads is {num_heads}, which does not divide d_model {d_model}"
            )
    if heads["encoder"] != heads["decoder"]:
        raise CheckpointError(
            f"{path}: encoder_attention_heads is {heads['encoder']} and decoder_attention_heads {heads['decoder']}; "
            "stacks whose heads differ are not served"
        )
    stacks = {
        name: StackConfig(
            num_layers=number[f"{name}_layers"],
            num_heads=heads[name],
            d_ffn=number[f"{name}_ffn_dim"],
            sparse=_every(number[f"{name}_layers"], number[f"{name}_sparse_step"], is_last=True),
        )
        for name in heads
    }
    return EncoderDecoderConfig(
        model_type=NLLB,
        d_model=d_model,
        head_width=d_model // heads["encoder"],
        encoder=stacks["encoder"],
        decoder=_with_experts(path, stacks),
        num_experts=number["num_experts"],
        top_k=2,
        vocab_size=number["vocab_size"],
        max_positions=number["max_position_embeddings"],
        activation=_text(path, config, "activation_function", "relu"),
        expert_scale=1.0 - dropout,
        has_gate_bias=truth["router_bias"],
        is_tied=truth["tie_word_embeddings"],
        embedding_scale=math.sqrt(d_model) if truth["scale_embedding"] else 1.0,
        norm_eps=1e-5,
        num_buckets=0,
        max_distance=0,
        start_id=number["decoder_start_token_id"],
        pad_id=number["pad_token_id"],
    )


def _read_switch(
    path: Path, config: Mapping[str, object], number: Mapping[str, int], truth: Mapping[str, bool]
) -> EncoderDecoderConfig:
    if number["relative_attention_max_distance"] <= number["relative_attention_num_buckets"] // 2:
        raise CheckpointError(
            f"{path}: relative_attention_max_distance is {number['relative_attention_max_distance']}; it must be above "
            f"half of relative_attention_num_buckets {number['relative_attention_num_buckets']}"
        )
    eps = config.get("layer_norm_epsilon", 1e-6)
    if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 <= eps <= 1:
        raise CheckpointError(f"{path}: layer_norm_epsilon is {shown_value(eps)}; it must be a number from 0 to 1")
    stacks: dict[str, StackConfig] = {}
    for name, layers in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        num_layers, num_sparse = number[layers], number[f"num_sparse_{name}_layers"]
        step = num_layers // num_sparse if num_sparse else num_layers
        stacks[name] = StackConfig(
            num_layers=num_layers,
            num_heads=number["num_heads"],
            d_ffn=number["d_ff"],
            sparse=_every(num_layers, step, is_last=False),
        )
    start = config.get("decoder_start_token_id")
    if start is None:
        start = number["pad_token_id"]
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < number["vocab_size"]:
        raise CheckpointError(f"{path}: decoder_start_token_id is {shown_value(start)}; it must be a token id")
    is_tied, d_model = truth["tie_word_embeddings"], number["d_model"]
    return EncoderDecoderConfig(
        model_type=SWITCH,
        d_model=d_model,
        head_width=number["d_kv"],
        encoder=stacks["encoder"],
        decoder=_with_experts(path, stacks),
        num_experts=number["num_experts"],
        top_k=1,
        vocab_size=number["vocab_size"],
        max_positions=_SWITCH_LENGTH,
        activation=_text(path, config, "dense_act_fn", "relu"),
        expert_scale=1.0,
        has_gate_bias=truth["router_bias"],
        is_tied=is_tied,
        embedding_scale=1.0,
        norm_eps=float(eps),
        num_buckets=number["relative_attention_num_buckets"],
        max_distance=number["relative_attention_max_distance"],
        start_id=start,
        pad_id=number["pad_token_id"],
    )


def _every(num_layers: int, step: int, *, is_last: bool) -> tuple[int, ...]:
    """Layers that have experts: of every `step` the last, or the second where there is one."""
    if step <= 0:
        return ()
    if is_last:
        return tuple(range(step - 1, num_layers, step))
    return tuple(range(num_layers)) if step == 1 else tuple(range(1, num_layers, step))


def _with_experts(path: Path, stacks: Mapping[str, StackConfig]) -> StackConfig:
    if not stacks["decoder"].sparse:
        raise CheckpointError(f"{path}: no layer of the decoder has experts; that is not served")
    return stacks["decoder"]


def _nllb_stack(
    config: EncoderDecoderConfig, prefix: str, stack: StackConfig, is_decoder: bool
) -> dict[str, tuple[int, ...]]:
    d_model = config.d_model
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in range(stack.num_layers):
        at = f"{prefix}.layers.{layer}"
        maps = {
            f"{attention}.{name}_proj": (d_model, d_model)
            for attention in (("self_attn", "cross_attention") if is_decoder else ("self_attn",))
            for name in ("q", "k", "v", "out")
        }
        if layer not in stack.sparse:
            maps |= {"ffn.fc1": (stack.d_ffn, d_model), "ffn.fc2": (d_model, stack.d_ffn)}
        for name, shape in maps.items():
            wanted |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
        for name in ("self_attn_layer_norm", "ff_layer_norm", *(("cross_attention_layer_norm",) if is_decoder else ())):
            wanted |= {f"{at}.{name}.weight": (d_model,), f"{at}.{name}.bias": (d_model,)}
        if layer in stack.sparse:
            wanted |= _gate(config, f"{at}.ffn.router.classifier")
    return wanted | {f"{prefix}.layer_norm.weight": (d_model,), f"{prefix}.layer_norm.bias": (d_model,)}


def _switch_stack(
    config: EncoderDecoderConfig, prefix: str, stack: StackConfig, is_decoder: bool
) -> dict[str, tuple[int, ...]]:
    d_model, inner = config.d_model, stack.num_heads * config.head_width
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in range(stack.num_layers):
        at = f"{prefix}.block.{layer}.layer"
        for part, name in enumerate(("SelfAttention", "EncDecAttention") if is_decoder else ("SelfAttention",)):
            wanted |= {f"{at}.{part}.{name}.{one}.weight": (inner, d_model) for one in "qkv"}
            wanted[f"{at}.{part}.{name}.o.weight"] = (d_model, inner)
        last = 2 if is_decoder else 1
        wanted |= {f"{at}.{part}.layer_norm.weight": (d_model,) for part in range(last + 1)}
        if layer in stack.sparse:
            wanted |= _gate(config, f"{at}.{last}.mlp.router.classifier")
        else:
            wanted |= {
                f"{at}.{last}.mlp.wi.weight": (stack.d_ffn, d_model),
                f"{at}.{last}.mlp.wo.weight": (d_model, stack.d_ffn),
            }
    first = f"{prefix}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return wanted | {first: (config.num_buckets, stack.num_heads), f"{prefix}.final_layer_norm.weight": (d_model,)}


def _gate(config: EncoderDecoderConfig, name: str) -> dict[str, tuple[int, ...]]:
    wanted: dict[str, tuple[int, ...]] = {f"{name}.weight": (config.num_experts, config.d_model)}
    return wanted | {f"{name}.bias": (config.num_experts,)} if config.has_gate_bias else wanted


def _whole(path: Path, config: Mapping[str, object], model_type: str, name: str) -> int:
    default, least, most = _WHOLE[model_type][name]
    alias = _ALIASES[model_type].get(name, name)
    said = [(one, config[one]) for one in dict.fromkeys((name, alias)) if config.get(one) is not None]
    for one, value in said:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise CheckpointError(
                f"{path}: {one} is {shown_value(value)}; it must be a whole number from {least} to {most}"
            )
    if len({cast(int, value) for _, value in said}) > 1:
        told = " and ".join(f"{one} is {shown_value(value)}" for one, value in said)
        raise CheckpointError(f"{path}: {told}; they name one thing and must be equal")
    return cast(int, said[0][1]) if said else default


def _truth(path: Path, config: Mapping[str, object], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {name} is {shown_value(value)}; it must be true or false")
    return value


def _text(path: Path, config: Mapping[str, object], name: str, default: str) -> str:
    value = config.get(name, default)
    if not isinstance(value, str):
        raise CheckpointError(f"{path}: {name} is {shown_value(value)}; it must be text")
    return value
