"""The tensors of a checkpoint that routers read, and whether they fit config.json: checked before anything is loaded.

Owns what a header can tell: shapes against the config's numbers, and layers that lack what the others have. Whether
every tensor of the architecture is there, only the model library knows; a router says so when it loads.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from collegium.model.architectures import Architecture, UnsupportedModelError, config_int
from collegium.model.checkpoint_files import CheckpointError, shown
from collegium.model.config_fields import whole_number
from collegium.model.config_rope import LATENT, head_width
from collegium.model.encoder_decoder import EncoderDecoderConfig, expected_tensors
from collegium.model.safetensors_files import ITEM_BITS

_LAYER = re.compile(r"(?:model\.|transformer\.)?(?:layers|blocks)\.([0-9]{1,9})\.(.*)", re.DOTALL)
_EMBEDDING = re.compile(r"(?:model\.|transformer\.)?(?:embed_tokens|wte)\.weight")
_GATE = re.compile(r"(?:mlp|block_sparse_moe|ffn)\.(?:gate|gate\.wg|router|router\.layer)\.weight")
_ATTENTION = re.compile(r"(?:self_attn|norm_attn_norm)\.")
_PROJECTION = re.compile(r"self_attn\.(q|k|v|o|q_a|q_b|kv_a|kv_b)_proj(?:_with_mqa)?\.weight")
_SERVED = ("F32", "BF16", "F16", "F64")


@dataclass(frozen=True, slots=True)
class RouterTensor:
    """Where a tensor lies that no expert owns."""

    file: str
    key: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        num_bits = ITEM_BITS[self.dtype]
        for length in self.shape:
            num_bits *= length
        return num_bits // 8


def layer_of(key: str) -> int:
    """Return the decoder layer that a tensor belongs to; -1 if it belongs to none."""
    match = _LAYER.fullmatch(key)
    return int(match[1]) if match else -1


def common_name(key: str) -> str:
    """Return a tensor's name as both layouts of a checkpoint have it; for comparison, not for reading."""
    match = _LAYER.fullmatch(key)
    if match is None:
        return key
    rest = match[2].replace("block_sparse_moe.", "mlp.", 1)
    rest = rest.replace("mlp.moe_statics.", "mlp.gate.moe_statics.", 1)  # of Ernie, whose files leave the gate out
    for gate in ("mlp.router.layer.", "mlp.gate."):
        rest = rest.replace(gate, "mlp.router.", 1) if rest.startswith(gate) else rest
    return f"layers.{match[1]}.{rest}"


def check_router_tensors(
    model_dir: Path,
    config: Mapping[str, object],
    architecture: Architecture,
    tensors: Sequence[RouterTensor],
    *,
    d_model: int,
    num_experts: int,
) -> None:
    """Check what routers read against a checked config. `d_model` is the experts' width.

    Raises CheckpointError naming the file and the tensor, or config.json and the field; UnsupportedModelError for
    types of weights that are not served.
    """
    path = model_dir / "config.json"
    name = "d_model" if architecture.model_type == "dbrx" else "hidden_size"
    if (width := whole_number(config, name)) is not None and width != d_model:
        raise CheckpointError(f"{path}: {name} is {width}; the experts' tensors are {d_model} wide")
    _check_layers(path, model_dir, config, architecture, tensors)
    widths = _projections(config, d_model)
    vocab_size = whole_number(config, "vocab_size")
    has_embedding = False
    for one in tensors:
        wanted: tuple[int, ...] | None = None
        match = _LAYER.fullmatch(one.key)
        rest = match[2] if match else ""
        if _EMBEDDING.fullmatch(one.key):
            has_embedding = True
            wanted = (vocab_size if vocab_size is not None else one.shape[0], d_model) if one.shape else None
        elif _GATE.fullmatch(rest):
            wanted = (num_experts, d_model)
        elif projection := _PROJECTION.fullmatch(rest):
            wanted = widths.get(projection[1])
        if wanted is not None and one.shape != wanted:
            raise CheckpointError(
                f"{model_dir / one.file}: tensor {shown(one.key)} has shape {list(one.shape)}; by config.json it is "
                f"{list(wanted)}"
            )
        if len(one.shape) > 1 and one.key.endswith(".weight") and one.dtype not in _SERVED:
            raise UnsupportedModelError(
                f"{model_dir / one.file}: tensor {shown(one.key)} is of type {one.dtype}; float32, bfloat16 and "
                "float16 are served"
            )
    if not has_embedding:
        raise CheckpointError(f"{model_dir} lacks the tensor of the embedding; fetch the checkpoint again")


def check_encoder_decoder(
    model_dir: Path, config: EncoderDecoderConfig, tensors: Sequence[RouterTensor]
) -> tuple[RouterTensor, ...]:
    """Check that every tensor of an encoder-decoder model is there, and give those alone: others are not read.

    Raises CheckpointError naming the file and the tensor, UnsupportedModelError for types that are not served.
    """
    found = {one.key: one for one in tensors}
    wanted = expected_tensors(config)
    for key, shape in wanted.items():
        one = found.get(key)
        if one is None:
            raise CheckpointError(f"{model_dir} lacks tensor {key}; fetch the checkpoint again")
        if one.shape != shape:
            raise CheckpointError(
                f"{model_dir / one.file}: tensor {key} has shape {list(one.shape)}; by config.json it is {list(shape)}"
            )
        if one.dtype not in _SERVED:
            raise UnsupportedModelError(
                f"{model_dir / one.file}: tensor {key} is of type {one.dtype}; float32, bfloat16 and float16 are served"
            )
    return tuple(found[key] for key in wanted)


def _check_layers(
    path: Path,
    model_dir: Path,
    config: Mapping[str, object],
    architecture: Architecture,
    tensors: Sequence[RouterTensor],
) -> None:
    attention: dict[int, set[str]] = {}
    for one in tensors:
        if match := _LAYER.fullmatch(one.key):
            names = attention.setdefault(int(match[1]), set())
            if _ATTENTION.match(match[2]):
                names.add(match[2])
    num_layers = config_int(config, architecture.num_layers_key)
    if num_layers is None:
        return
    if num_layers > len(attention):
        raise CheckpointError(
            f"{path}: {architecture.num_layers_key} is {num_layers}; the files hold tensors of {len(attention)} layers"
        )
    every = set[str]().union(*attention.values())
    for layer, names in sorted(attention.items()):
        if lacks := sorted(every - names):
            raise CheckpointError(
                f"{model_dir}: decoder layer {layer} lacks its tensor {shown(lacks[0])}; fetch the checkpoint again"
            )


def _projections(config: Mapping[str, object], d_model: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of the projections of attention, by the name of each, as far as the config says them."""
    if config.get("model_type") in LATENT:
        return _latent_projections(config, d_model)
    heads, width = whole_number(config, "num_attention_heads"), head_width(config, d_model)
    if heads is None or width is None:
        return {}
    shapes = {"q": (heads * width, d_model), "o": (d_model, heads * width)}
    kv_heads = whole_number(config, "num_key_value_heads")
    return shapes if kv_heads is None else shapes | dict.fromkeys("kv", (kv_heads * width, d_model))


def _latent_projections(config: Mapping[str, object], d_model: int) -> dict[str, tuple[int, int]]:
    names = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    numbers = [number for name in names if (number := whole_number(config, name)) is not None]
    if len(numbers) < len(names):
        return {}
    heads, nope, rope, value, latent = numbers
    shapes = {
        "q": (heads * (nope + rope), d_model),
        "kv_a": (latent + rope, d_model),
        "kv_b": (heads * (nope + value), latent),
        "o": (d_model, heads * value),
    }
    if (rank := whole_number(config, "q_lora_rank")) is not None:
        shapes |= {"q_a": (rank, d_model), "q_b": (heads * (nope + rope), rank)}
    return shapes
