"""Check the values of config.json and generation_config.json before anything is built from them.

Owns the tables of fields and their bounds: numbers that become loops, memory or divisors, and what must fit together.
Fields that no table names are left to the model library, but for one thing: no number may be infinite or NaN. Every
refusal names file, field and value. Imports neither torch nor transformers.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from collegium.model.checkpoint_files import CheckpointError, has_file, kind_of, read_json, shown, shown_value
from collegium.model.config_rope import ROPE_TYPES, check_rope, head_width

# Of experts and layers, as many as a balancer places; published models have 512 and 128.
_DIM, _HEADS, _EXPERTS, _LAYERS, _LENGTH = 1 << 20, 1 << 16, 4096, 1024, 1 << 30

# Whole numbers: the least and largest value, and whether null stands for the architecture's own.
_WHOLE: Mapping[str, tuple[int, int, bool]] = {
    "vocab_size": (1, 1 << 24, False),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "ffn_hidden_size"), (1, _DIM, False)),
    **dict.fromkeys(("head_dim", "q_lora_rank"), (1, _DIM, True)),
    **dict.fromkeys(
        ("d_model", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), (1, _DIM, False)
    ),
    "shared_expert_intermediate_size": (0, _DIM, False),
    **dict.fromkeys(("num_attention_heads", "kv_n_heads", "n_heads"), (1, _HEADS, False)),
    "num_key_value_heads": (1, _HEADS, True),
    "num_hidden_layers": (1, _LAYERS, False),
    "n_layers": (1, _LAYERS, True),
    "max_position_embeddings": (1, _LENGTH, False),
    **dict.fromkeys(("max_seq_len", "original_max_position_embeddings"), (1, _LENGTH, True)),
    "rotary_dim": (1, _DIM, True),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), (1, _EXPERTS, False)),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k"), (1, _EXPERTS, False)),
    **dict.fromkeys(("n_group", "topk_group"), (1, _EXPERTS, True)),
    "n_shared_experts": (1, 1024, False),
    "moe_num_shared_experts": (0, 1024, False),
    **dict.fromkeys(("moe_k", "moe_topk"), (1, _EXPERTS, False)),
    "moe_layer_start_index": (0, _LAYERS, False),
    "moe_layer_end_index": (-1, _LAYERS, False),
    "moe_layer_interval": (1, _LAYERS, False),
    "first_k_dense_replace": (0, _LAYERS, False),
    "decoder_sparse_step": (1, _LAYERS, False),
    "max_window_layers": (0, _LENGTH, False),
    "sliding_window": (0, _LENGTH, True),
    "num_labels": (0, 1 << 16, True),  # transformers makes a name for each
    **dict.fromkeys(("pad_token_id", "bos_token_id"), (-(1 << 31), 1 << 31, True)),
}
# Numbers: the bounds, themselves included.
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "rope_theta": (1e-3, 1e30),
    "factor": (1e-3, 1e6),
    **dict.fromkeys(("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), (1e-6, 1e6)),
    **dict.fromkeys(("mscale", "mscale_all_dim", "short_mscale", "long_mscale", "attention_factor"), (0.0, 1e6)),
    "partial_rotary_factor": (1e-3, 1.0),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), (0.0, 1.0)),
    **dict.fromkeys(("swiglu_limit", "clip_qkv"), (1e-6, 1e30)),
    "swiglu_alpha": (-1e6, 1e6),
    "logits_scaling": (1e-6, 1e6),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), (-1e6, 1e6)),
    "routed_scaling_factor": (-1e6, 1e6),
    "moe_norm_min": (0.0, 1.0),
    "alpha": (1e-6, 1e9),  # of a dynamic rotation that does not depend on the length
    "moe_normalize_expert_weights": (1e-6, 1e6),  # the p of a norm
    **dict.fromkeys(("initializer_range", "router_aux_loss_coef", "router_jitter_noise"), (-1e6, 1e6)),
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "emb_pdrop", "attn_pdrop"), (0.0, 1.0)),
}
_TRUTHS = (
    *("tie_word_embeddings", "norm_topk_prob", "use_sliding_window", "attention_bias", "use_qk_norm", "qkv_bias"),
    *("use_cache", "output_router_logits", "mlp_bias", "lm_head_bias", "rope_interleave", "use_bias"),
)
_LISTS = ("layer_types", "mlp_only_layers", "architectures")
_TEXTS = ("model_type", "hidden_act", "topk_method")
# Objects whose fields are checked by the same tables.
_NESTED = ("attn_config", "ffn_config", "rope_scaling", "rope_parameters")
# Kinds of layers that transformers' code of the served architectures has; "attention" is an older name of the first.
_LAYER_TYPES = ("full_attention", "sliding_attention", "attention")
# Fields of training, and of what transformers returns beside the logits: no value of theirs matters here.
NOT_USED = (
    *("attention_dropout", "resid_pdrop", "emb_pdrop", "attn_pdrop", "initializer_range", "num_labels"),
    *("router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "use_cache", "architectures"),
    *("moe_jitter_eps", "moe_loss_weight", "input_jitter_noise"),
)
# What the modelling classes of the served architectures read. Every other field is ignored: how weights were stored and
# which code computes them (`dtype`, `_experts_implementation`) are chosen anew by whoever serves.
USED = {*_WHOLE, *_NUMBERS, *_TRUTHS, *_LISTS, *_TEXTS, *_NESTED, "eos_token_id", "ffn_act_fn"} - {
    *NOT_USED,
    "model_type",
}
_CAN_BE_NULL = (
    *("clip_qkv", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"),
    "moe_normalize_expert_weights",
)
# Fields that are each other's names in transformers: which of two different values counted would be chance.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOPS = ("num_experts_per_tok", "moe_k", "moe_topk")
# Numbers that some configs give for each layer; all must be one.
_PER_LAYER = ("moe_topk", "num_experts", "moe_intermediate_size", "num_experts_per_tok")
_SAME = (_EXPERT_COUNTS, _TOPS, ("d_model", "hidden_size"), ("n_heads", "num_attention_heads"))
_DENSE = {"deepseek_v3": 3, "glm4_moe": 1}  # first layers without experts where config.json does not say it
_ERNIE_LAYERS = 28  # of ernie4_5_moe, where config.json does not say it
_TOPK_METHODS = ("greedy", "group_limited_greedy")  # of deepseek_v2; deepseek_v3 has one
_MAX_EOS_IDS = 1024


def check_config(path: Path, config: Mapping[str, object]) -> None:
    """Check the values of a config.json. Raises CheckpointError naming the field."""
    check_finite(path, config)
    if config.get("per_layer_config") is not None:
        raise CheckpointError(f"{path}: per_layer_config gives layers configs of their own, which is not supported")
    for name, value in _named_fields(path, config):
        if not _is_fixed_rotation(config, name):
            _check_field(path, name, _of_all_layers(path, name, value))
    for names in _SAME:
        values = {name: config[name] for name in names if config.get(name) is not None}
        if len(set(map(str, values.values()))) > 1:
            said = " and ".join(f"{name} is {shown(value)}" for name, value in values.items())
            raise CheckpointError(f"{path}: {said}; they name one thing and must be equal")
    check_eos(path, config)
    _check_relations(path, config)
    _check_layers(path, config)
    _check_own(path, config)
    check_rope(path, config)


def check_generation_config(model_dir: Path) -> dict[str, object]:
    """Read and check generation_config.json; empty if the checkpoint has none. Raises CheckpointError."""
    path = model_dir / "generation_config.json"
    if not has_file(path):
        return {}
    config = read_json(path)
    check_eos(path, config)
    return config


def whole_number(config: Mapping[str, object], name: str) -> int | None:
    """Return a field of a checked config; None if it is absent or null."""
    value = config.get(name)
    if isinstance(value, list) and name in _PER_LAYER and value:
        value = cast("list[object]", value)[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def model_fields(config: Mapping[str, object]) -> dict[str, object]:
    """Copy what a model is built from out of a checked config, in the types that transformers insists on."""
    fields = {name: _as_used(name, value, config) for name, value in config.items() if name in USED}
    # Where it is null or absent, attention divides by itself; transformers' yarn and longrope do not.
    width = head_width(config)
    fields.pop("head_dim", None)
    return fields if width is None else fields | {"head_dim": width}


def _as_used(name: str, value: object, config: Mapping[str, object]) -> object:
    if name in _NUMBERS and isinstance(value, int):
        return float(value)
    if name in _PER_LAYER and isinstance(value, list):
        return cast("list[object]", value)[0]
    if name == "num_key_value_heads" and value is None:
        return config.get("num_attention_heads")
    if isinstance(value, dict):
        inner = cast("Mapping[str, object]", value)
        return {key: _as_used(key, one, inner) for key, one in inner.items() if name.startswith("rope") or key in USED}
    return value


def _of_all_layers(path: Path, name: str, value: object) -> object:
    """Return the number of a field that gives one for each layer; what is no such field, as it is."""
    if name not in _PER_LAYER or not isinstance(value, list):
        return value
    each = cast("list[object]", value)
    if not each or any(one != each[0] or type(one) is not type(each[0]) for one in each):
        raise CheckpointError(f"{path}: {name} is {shown_value(value)}; layers that differ in it are not supported")
    return each[0]


def _is_fixed_rotation(config: Mapping[str, object], name: str) -> bool:
    """Whether a field names the rotation of Hunyuan's that is called dynamic and is not, for it has an alpha."""
    outer, _, leaf = name.rpartition(".")
    if (
        config.get("model_type") != "hunyuan_v1_moe"
        or not outer.startswith("rope")
        or leaf not in ("rope_type", "type")
    ):
        return False
    rope = cast("Mapping[str, object]", config[outer])
    return rope.get("rope_type", rope.get("type")) == "dynamic" and bool(rope.get("alpha"))


def _named_fields(path: Path, config: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Iterate over a config's fields and those of the nested objects, by dotted name."""
    for name, value in config.items():
        yield name, value
        if name not in _NESTED or value is None:
            continue
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: {name} is {kind_of(value)}, not an object")
        for key, inner in cast("dict[str, object]", value).items():
            yield f"{name}.{key}", inner


def _check_field(path: Path, name: str, value: object) -> None:
    leaf = name.rpartition(".")[2]
    if leaf in _WHOLE:
        low, high, can_be_null = _WHOLE[leaf]
        if value is None and can_be_null:
            return
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{path}: {name} is {shown_value(value)}; it must be a whole number")
        if not low <= value <= high:
            raise CheckpointError(f"{path}: {name} is {shown_value(value)}; it must be from {low} to {high}")
    elif leaf in NOT_USED:
        return
    elif leaf in _NUMBERS:
        least, most = _NUMBERS[leaf]
        if value is None and (leaf in _CAN_BE_NULL or leaf in ("rope_theta", "partial_rotary_factor", "factor")):
            return  # of the rotary parameters, check_rope says which may be null
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise CheckpointError(
                f"{path}: {name} is {shown_value(value)}; it must be a number from {least:g} to {most:g}"
            )
    elif leaf in _TRUTHS and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {name} is {shown_value(value)}; it must be true or false")
    elif leaf in _LISTS and value is not None and not isinstance(value, list):
        raise CheckpointError(f"{path}: {name} is {shown_value(value)}; it must be a list")
    elif leaf in _TEXTS and not isinstance(value, str) and not (value is None and leaf == "topk_method"):
        raise CheckpointError(f"{path}: {name} is {shown_value(value)}; it must be text")
    elif name.startswith("rope") and leaf in ("rope_type", "type") and value not in ROPE_TYPES:
        why = "makes positions depend on the batch; use" if value == "dynamic" else "must be"
        raise CheckpointError(f"{path}: {name} is {shown_value(value)}; it {why} one of {', '.join(ROPE_TYPES)}")


def check_eos(path: Path, config: Mapping[str, object]) -> None:
    """Check the ids that end a sequence. Raises CheckpointError."""
    eos = config.get("eos_token_id")
    ids = cast("list[object]", eos) if isinstance(eos, list) else [] if eos is None else [eos]
    is_whole = all(isinstance(one, int) and not isinstance(one, bool) and abs(one) < 1 << 31 for one in ids)
    if not is_whole or len(ids) > _MAX_EOS_IDS:
        raise CheckpointError(
            f"{path}: eos_token_id is {shown_value(eos)}; it must be a token id or a list of at most {_MAX_EOS_IDS} of "
            "them"
        )


def _check_relations(path: Path, config: Mapping[str, object]) -> None:
    ffn = config.get("ffn_config")
    experts = [whole_number(config, name) for name in _EXPERT_COUNTS]
    tops = [whole_number(config, name) for name in _TOPS]
    if isinstance(ffn, dict):
        experts.append(whole_number(cast("dict[str, object]", ffn), "moe_num_experts"))
        tops.append(whole_number(cast("dict[str, object]", ffn), "moe_top_k"))
    num_experts, top_k = next(filter(None, experts), None), next(filter(None, tops), None)
    if num_experts and top_k and top_k > num_experts:
        raise CheckpointError(f"{path}: {top_k} experts are chosen for each token, and there are {num_experts}")
    groups, kept = whole_number(config, "n_group") or 1, whole_number(config, "topk_group") or 1
    if num_experts and (num_experts % groups or kept > groups or (top_k or 0) > num_experts // groups * kept):
        raise CheckpointError(
            f"{path}: n_group is {groups} and topk_group {kept}, which does not fit {num_experts} experts of which "
            f"{top_k} are chosen"
        )
    heads, kv_heads = whole_number(config, "num_attention_heads"), whole_number(config, "num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads is {heads}, which is not a multiple of num_key_value_heads {kv_heads}"
        )
    vocab_size, pad = whole_number(config, "vocab_size"), whole_number(config, "pad_token_id")
    if vocab_size and pad is not None and not -vocab_size <= pad < vocab_size:
        raise CheckpointError(f"{path}: pad_token_id is {pad}; the vocabulary has {vocab_size} ids")
    if config.get("sliding_window") == 0 and config.get("use_sliding_window") is not False:
        raise CheckpointError(f"{path}: sliding_window is 0; it must be at least 1, or null for none")


def _check_own(path: Path, config: Mapping[str, object]) -> None:
    """Check what single architectures ask for."""
    model_type = config.get("model_type")
    if model_type == "dbrx":
        attention = cast("Mapping[str, object]", config.get("attn_config") or {})
        for name in ("rope_theta", "clip_qkv"):
            if attention.get(name) is None:
                raise CheckpointError(f"{path}: attn_config lacks {name}, which dbrx needs")
        if config.get("tie_word_embeddings") is True:
            raise CheckpointError(f"{path}: tie_word_embeddings is true, which dbrx does not have")
    if model_type == "dots1" and config.get("n_shared_experts") is None:
        raise CheckpointError(f"{path} lacks n_shared_experts, which dots1 needs")
    if model_type == "qwen2_moe" and config.get("shared_expert_intermediate_size") == 0:
        raise CheckpointError(f"{path}: shared_expert_intermediate_size is 0; it must be from 1 to {_DIM}")
    if model_type == "deepseek_v2" and config.get("topk_method", "greedy") not in _TOPK_METHODS:
        raise CheckpointError(
            f"{path}: topk_method is {shown_value(config['topk_method'])}; it must be one of {', '.join(_TOPK_METHODS)}"
        )
    if model_type != "deepseek_v2" or config.get("topk_method") == "group_limited_greedy":
        for name in ("n_group", "topk_group"):
            if config.get(name, 1) is None:
                raise CheckpointError(f"{path}: {name} is null; it must be a whole number")
    if (width := head_width(config)) is not None and (not width or width % 2):
        heads = "" if "num_attention_heads" in config else ", as num_attention_heads is the architecture's own"
        raise CheckpointError(f"{path}: heads are {width} wide{heads}; the width must be even and at least 2")


def _check_layers(path: Path, config: Mapping[str, object]) -> None:
    num_layers = whole_number(config, "num_hidden_layers") or whole_number(config, "n_layers")
    num_dense = config.get("first_k_dense_replace", _DENSE.get(str(config.get("model_type")), 0))
    if num_layers is not None and isinstance(num_dense, int) and num_dense >= num_layers:
        raise CheckpointError(f"{path}: first_k_dense_replace is {num_dense}; no layer of {num_layers} has experts")
    if config.get("model_type") == "ernie4_5_moe":
        start, end, every = (
            cast(int, config.get(f"moe_layer_{name}", default))
            for name, default in (("start_index", 1), ("end_index", -1), ("interval", 1))
        )
        last = min((num_layers or _ERNIE_LAYERS) - 1, end if end >= 0 else _LAYERS)
        if (last + 1) // every * every - 1 < start:
            raise CheckpointError(
                f"{path}: moe_layer_start_index is {start}, moe_layer_end_index {end} and moe_layer_interval {every}; "
                f"no layer of {num_layers or _ERNIE_LAYERS} has experts"
            )
    kinds = cast("list[object]", config.get("layer_types") or [])
    for index, kind in enumerate(kinds):
        if kind not in _LAYER_TYPES:
            raise CheckpointError(
                f"{path}: layer_types[{index}] is {shown_value(kind)}; it must be one of {', '.join(_LAYER_TYPES)}"
            )
    if config.get("layer_types") is not None and num_layers is not None and len(kinds) != num_layers:
        raise CheckpointError(f"{path}: layer_types names {len(kinds)} layers; there are {num_layers}")
    for index, layer in enumerate(cast("list[object]", config.get("mlp_only_layers") or [])):
        if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < (num_layers or _LAYERS):
            raise CheckpointError(
                f"{path}: mlp_only_layers[{index}] is {shown_value(layer)}; it must be a whole number from 0 to "
                f"{(num_layers or _LAYERS) - 1}"
            )


def check_finite(path: Path, config: Mapping[str, object]) -> None:
    """Check that every number is finite. Raises CheckpointError naming the field."""
    rest: list[tuple[str, object]] = list(config.items())
    while rest:
        name, value = rest.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{path}: {shown(name)} is {value}; every number must be finite")
        if isinstance(value, dict):
            rest += [(f"{name}.{key}", inner) for key, inner in cast("dict[str, object]", value).items()]
        elif isinstance(value, list):
            rest += [(f"{name}[{i}]", inner) for i, inner in enumerate(cast("list[object]", value))]
