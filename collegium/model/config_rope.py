"""Check the rotary parameters of config.json: what each rope type needs, and what a model can use.

Owns what transformers 5.23 asks of rope_parameters and of the older rope_scaling, which it finds out only while it
builds a model. Bounds of single numbers are config_fields'. Imports neither torch nor transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

from collegium.model.checkpoint_files import CheckpointError, kind_of, shown, shown_value

ROPE_TYPES = ("default", "linear", "yarn", "longrope", "llama3")
# Numbers that a rope type cannot do without. A rope_theta that is absent is the architecture's own.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_PHIMOE_NEEDS = ("short_mscale", "long_mscale")
_NEVER_NULL = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_FACTORS = (1e-6, 1e6)
# Width of a head where config.json does not say it; others divide hidden_size by the number of heads.
_HEAD_WIDTHS = {"gpt_oss": 64, "minimax_m2": 128}
# Number of heads where config.json does not say it; those of the others are 32.
HEADS = {
    "dbrx": 16,
    "ernie4_5_moe": 20,
    "glm4_moe": 96,
    "gpt_oss": 64,
    "minimax_m2": 48,
    **dict.fromkeys(("olmoe", "qwen2_moe"), 16),
}
LATENT = ("deepseek_v2", "deepseek_v3")
_PARTIAL = ("glm4_moe", "minimax_m2")


def head_width(config: Mapping[str, object], d_model: int | None = None) -> int | None:
    """Return the width of a head of attention by a checked config; None if it does not say it.

    d_model: what stands for a hidden_size that is absent. Latent attention has heads of several widths: None.
    """
    model_type = str(config.get("model_type"))
    if model_type in LATENT:
        return None
    told = None if model_type == "dbrx" else config.get("head_dim", _HEAD_WIDTHS.get(model_type))
    if isinstance(told, int):
        return told
    wide = next((config[name] for name in ("hidden_size", "d_model") if name in config), d_model)
    default = HEADS.get(model_type, 32)
    heads = next((config[name] for name in ("num_attention_heads", "n_heads") if name in config), default)
    return wide // heads if isinstance(wide, int) and isinstance(heads, int) else None


def check_rope(path: Path, config: Mapping[str, object]) -> None:
    """Check the rotary parameters of a config whose single fields are in bounds. Raises CheckpointError."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = cast("Mapping[str, object]", config.get(field) or {})
    for name, value in rope.items():
        if isinstance(value, dict) or name.endswith("_attention"):
            raise CheckpointError(
                f"{path}: {field}.{shown(name)} is {kind_of(rope[name])}; rotary parameters for each kind of layer are "
                f"not supported by {config.get('model_type')}"
            )
    # In the object as well as beside it, null does not stand for the default.
    if "rope_theta" not in rope and config.get("rope_theta", 0) is None:
        raise CheckpointError(f"{path}: rope_theta is null; it must be a number")
    for name in _NEVER_NULL:
        if name in rope and rope[name] is None:
            raise CheckpointError(f"{path}: {field}.{name} is null; it must be a number")
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    needed = _NEEDED.get(kind, ())
    if config.get("model_type") == "phimoe" and kind != "default":
        needed += _PHIMOE_NEEDS
    for name in needed:
        if rope.get(name) is None:
            raise CheckpointError(f"{path}: {field} lacks {name}, which rope type {kind} needs")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    is_scaled = kind != "default" or config.get("model_type") == "gpt_oss"  # which is scaled if nothing is said
    if is_scaled and share not in (None, 1) and config.get("model_type") not in _PARTIAL:
        raise CheckpointError(
            f"{path}: partial_rotary_factor is {share}; {config.get('model_type')} rotates whole heads with rope type "
            f"{kind}"
        )
    if kind == "longrope":
        for name in _NEEDED[kind]:
            _check_factors(path, f"{field}.{name}", rope[name], _num_frequencies(config, rope))
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if kind == "yarn" and theta is not None and float(str(theta)) <= 1.0:
        raise CheckpointError(f"{path}: rope_theta is {theta}; with rope type yarn it must be more than 1")
    if kind == "llama3" and float(str(rope["high_freq_factor"])) <= float(str(rope["low_freq_factor"])):
        raise CheckpointError(
            f"{path}: {field}.high_freq_factor is {rope['high_freq_factor']}; it must be more than low_freq_factor "
            f"{rope['low_freq_factor']}"
        )


def _num_frequencies(config: Mapping[str, object], rope: Mapping[str, object]) -> int | None:
    """Return how many pairs of a head's numbers are rotated; None if the config does not say it."""
    width = config.get("qk_rope_head_dim") if config.get("model_type") in LATENT else head_width(config)
    default = 0.5 if config.get("model_type") == "glm4_moe" else 1.0
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", default))
    if not isinstance(width, int) or not isinstance(share, int | float):
        return None
    rotary_dim = config.get("rotary_dim")  # of MiniMax-M2, which has no partial_rotary_factor
    if config.get("model_type") == "minimax_m2" and isinstance(rotary_dim, int) and share == 1.0:
        return (rotary_dim + 1) // 2
    return (int(width * share) + 1) // 2


def _check_factors(path: Path, field: str, value: object, length: int | None) -> None:
    least, most = _FACTORS
    if not isinstance(value, list):
        raise CheckpointError(f"{path}: {field} is {kind_of(value)}; it must be a list of numbers")
    numbers = cast("list[object]", value)
    for index, one in enumerate(numbers):
        if not isinstance(one, int | float) or isinstance(one, bool) or not least <= one <= most:
            raise CheckpointError(
                f"{path}: {field}[{index}] is {shown_value(one)}; it must be a number from {least:g} to {most:g}"
            )
    if length is not None and len(numbers) != length:
        raise CheckpointError(
            f"{path}: {field} has {len(numbers)} numbers; heads of this width are rotated by {length}"
        )
