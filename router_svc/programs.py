"""The table of forward passes: what each architecture's layers compute, and where its modules keep the parameters.

Owns the reading of a model's modules, our own (family_loading) or those of transformers 5.23, into what the C kernels
and the pass for GPUs compute. Adding an architecture whose layers are made of known parts is an entry of the table;
what the table cannot say is left to the modelling classes, the reference that the golden tests hold it against.
H query heads, N plain and P rotated numbers of a latent query's head, C width of latents, D model, E experts.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, cast

import torch
from torch import Tensor, nn

from collegium.model.architectures import expert_form
from collegium.model.native.layer import (
    AttentionWeights,
    GateKind,
    GateWeights,
    HeadNorms,
    LatentAttentionWeights,
    LayerWeights,
    MlpWeights,
    NormWeights,
)
from router_svc.cache_shapes import CacheShape, window_of


class Rotation(Enum):
    """What a model's rotary module gives for a position."""

    WHOLE = auto()  # cosines and sines, each frequency twice
    HALVES = auto()  # each once
    COMPLEX = auto()  # complex numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One architecture. Names are attributes, dotted; those of numbers are of the gate, its block, or the config."""

    model: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    # of a layer
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    attention: str = "self_attn"
    block: str = "mlp"
    # of its attention
    is_latent: bool = False
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    head_norms: HeadNorms = HeadNorms.NONE
    head_norm_names: tuple[str, str] = ("q_norm", "k_norm")  # where they are absent, heads are not normed
    rotation: Rotation = Rotation.WHOLE
    is_interleaved: bool | str = False  # neighbours are rotated together; a name: where the config says so
    clip: str = ""
    sinks: str = ""
    # of its block
    gate: str = "gate"
    gate_kind: GateKind = GateKind.SOFTMAX
    norm_power: float | str = 0.0  # the norm that chosen weights are divided by; a name: where it is set
    scale: str = ""
    correction: str = ""
    groups: tuple[str, str] | None = None  # how many there are, and how many of them are kept
    group_tops: int = 1
    jitter: str = ""
    shared: str = ""  # the experts that all rows have
    shared_weight: str = ""  # what weighs them
    # of the config
    embedding_scale: str = ""
    residual: str = ""
    logits_divisor: str = ""


_DEEPSEEK = {"is_latent": True, "shared": "shared_experts", "scale": "routed_scaling_factor"}
_BY_SIGMOID: dict[str, Any] = {
    "gate_kind": GateKind.SIGMOID,
    "correction": "e_score_correction_bias",
    "norm_power": "norm_topk_prob",
    "scale": "routed_scaling_factor",
    "groups": ("num_group", "topk_group"),
    "group_tops": 2,
    "shared": "shared_experts",
}
PROGRAMS: Mapping[str, Program] = {
    "mixtral": Program(norm_power=1.0),
    "olmoe": Program(head_norms=HeadNorms.TOGETHER, clip="clip_qkv", norm_power="norm_topk_prob"),
    "qwen3_moe": Program(head_norms=HeadNorms.PER_HEAD, norm_power="norm_topk_prob"),
    "qwen2_moe": Program(norm_power="norm_topk_prob", shared="shared_expert", shared_weight="shared_expert_gate"),
    "phimoe": Program(gate="router", gate_kind=GateKind.SPARSE_MIXER, jitter="router_jitter_noise"),
    "minimax_m2": Program(
        head_norms=HeadNorms.TOGETHER,
        gate_kind=GateKind.SIGMOID,
        correction="e_score_correction_bias",
        norm_power=1.0,
    ),
    "glm4_moe": Program(head_norms=HeadNorms.PER_HEAD, **_BY_SIGMOID),
    "granitemoe": Program(
        block="block_sparse_moe",
        gate="router",
        gate_kind=GateKind.CHOSEN_SOFTMAX,
        norm_power=1.0,
        embedding_scale="embedding_multiplier",
        residual="residual_multiplier",
        logits_divisor="logits_scaling",
    ),
    "gpt_oss": Program(
        gate="router", gate_kind=GateKind.CHOSEN_SOFTMAX, norm_power=1.0, sinks="sinks", rotation=Rotation.HALVES
    ),
    "dbrx": Program(
        model="transformer",
        embedding="wte",
        layers="blocks",
        final_norm="norm_f",
        norms=("norm_attn_norm.norm_1", "norm_attn_norm.norm_2"),
        attention="norm_attn_norm.attn",
        block="ffn",
        projections=("Wqkv",),
        out="out_proj",
        clip="clip_qkv",
        gate="router.layer",
        norm_power="moe_normalize_expert_weights",
    ),
    "deepseek_v2": Program(
        rotation=Rotation.COMPLEX, is_interleaved=True, groups=("num_group", "topk_group"), **_DEEPSEEK
    ),
    "ernie4_5_moe": Program(
        is_interleaved=True,
        correction="moe_statics.e_score_correction_bias",
        norm_power=1.0,
        shared="shared_experts",
    ),
    "hunyuan_v1_moe": Program(
        head_norms=HeadNorms.PER_ROTATED_HEAD,
        head_norm_names=("query_layernorm", "key_layernorm"),
        gate="gate.wg",
        norm_power=1.0,
        shared="shared_mlp",
    ),
    "dots1": Program(head_norms=HeadNorms.PER_HEAD, **_BY_SIGMOID),
    "deepseek_v3": Program(is_interleaved="rope_interleave", **(_BY_SIGMOID | _DEEPSEEK)),
}

# Those whose layers the pass for GPUs knows.
_ON_DEVICE = ("mixtral", "olmoe", "qwen3_moe")


class UnknownPartError(Exception):
    """A model has something that its architecture's program cannot say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What lies around a model's layers."""

    program: Program
    embedding: nn.Embedding
    layers: Sequence[Any]
    final_norm: NormWeights
    embedding_scale: float
    logits_divisor: float
    rotary: Any
    has_one_rotation: bool  # of a position, whatever else is asked for

    @property
    def rotated(self) -> int:
        """How many numbers of a head are rotated."""
        return self.rotations(torch.zeros(1, 1, dtype=torch.long, device=self.embedding.weight.device))[0].shape[-1]

    def rotations(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [1, T]: two tensors [T, rotated] float32, halves alike."""
        said = self.rotary(torch.empty(1, 1, 1, device=positions.device), positions)
        if self.program.rotation is Rotation.COMPLEX:
            said = said.real, said.imag
        cos, sin = (one[0].float() for one in said)
        if self.program.rotation is not Rotation.WHOLE:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        return cos.contiguous(), sin.contiguous()


def why_not(model: nn.Module, *, is_on_device: bool) -> str:
    """Say why there is no program for a model; empty where there is."""
    model_type = cast(Any, model).config.model_type
    if model_type not in (_ON_DEVICE if is_on_device else PROGRAMS):
        return f"no program for {model_type}" + (" on this device" if is_on_device else "")
    parts = outside(model)
    blocks = [_at(layer, parts.program.block) for layer in parts.layers]
    sparse = [block for block in blocks if hasattr(block, "experts")]
    if is_on_device and len(sparse) < len(blocks):
        return "some of its layers have no experts"
    if is_on_device and parts.rotated != _at(parts.layers[0], parts.program.attention).head_dim:
        return "a part of each head is rotated"
    try:
        for block in sparse:
            _gate(parts.program, block)
    except UnknownPartError as error:
        return str(error)
    return ""


def outside(model: nn.Module) -> Outside:
    """Read what lies around the layers of a model whose type has a program. Raises UnknownPartError."""
    config: Any = cast(Any, model).config
    program = PROGRAMS[config.model_type]
    inner = _at(model, program.model)
    rope: Mapping[str, object] = getattr(config, "rope_parameters", None) or {}
    return Outside(
        program=program,
        embedding=_at(inner, program.embedding),
        layers=list(_at(inner, program.layers)),
        final_norm=_norm(_at(inner, program.final_norm)),
        embedding_scale=_number(program.embedding_scale, 1.0, config),
        logits_divisor=_number(program.logits_divisor, 1.0, config),
        rotary=inner.rotary_emb,
        has_one_rotation=rope.get("rope_type") != "longrope",
    )


def weights_of(parts: Outside, layer: Any, num_shared: int = 0) -> LayerWeights:
    """Read what a decoder layer computes but for its routed experts. Raises UnknownPartError.

    num_shared: experts that its shared one is on workers; 0: the layer computes it.
    """
    program = parts.program
    attention, block = _at(layer, program.attention), _at(layer, program.block)
    config = attention.config
    has_experts = hasattr(block, "experts")
    shared = getattr(block, program.shared, None) if has_experts and program.shared else None
    dense = (None if num_shared else shared) if has_experts else block
    first, second = (_at(layer, name) for name in program.norms)
    return LayerWeights(
        input_norm=_norm(first),
        output_norm=_norm(second),
        attention=_latent(program, attention) if program.is_latent else _plain(parts, attention),
        gate=replace(_gate(program, block), num_shared=num_shared) if has_experts else None,
        mlp=None if dense is None else _mlp(dense, config, getattr(block, program.shared_weight or "-", None)),
        residual=_number(program.residual, 1.0, config),
    )


def drop_packed(parts: Outside, layer: Any) -> None:
    """Let go of a layer's modules whose parameters have been packed: the gate stays, for it is asked to foretell."""
    program = parts.program
    attention, block = _at(layer, program.attention), _at(layer, program.block)
    for name, module in list(attention.named_children()):
        if isinstance(module, nn.Linear):
            setattr(attention, name, None)
    if hasattr(block, "experts"):
        for name in (program.shared, program.shared_weight):
            if name:
                setattr(block, name, None)
    else:
        for name, _ in list(block.named_children()):
            setattr(block, name, None)


def experts_of(parts: Outside, layer: Any) -> nn.Module | None:
    """Return what stands for a layer's experts; None where it has none."""
    found: nn.Module | None = getattr(_at(layer, parts.program.block), "experts", None)
    return found


def cache_shape(weights: LayerWeights) -> CacheShape:
    """Say what one position of a layer's attention takes."""
    attention = weights.attention
    if isinstance(attention, LatentAttentionWeights):
        return CacheShape(key=(1, attention.latent_width), value=(1, attention.rotated), is_latent=True)
    heads = (attention.num_kv_heads, attention.head_width)
    return CacheShape(key=heads, value=heads)


def _plain(parts: Outside, attention: Any) -> AttentionWeights:
    program, config = parts.program, attention.config
    projections = [_at(attention, name) for name in program.projections]
    out, width = _at(attention, program.out), int(attention.head_dim)
    qkv = torch.cat([one.weight.detach() for one in projections])
    bias = None if projections[0].bias is None else torch.cat([one.bias.detach() for one in projections])
    num_heads = out.in_features // width
    num_kv_heads = (len(qkv) // width - num_heads) // 2
    rotated = parts.rotated
    if _is_interleaved(program, config):
        turned = _halved(width, rotated, at=0, device=qkv.device)
        heads = torch.arange(num_heads + num_kv_heads, device=qkv.device)[:, None] * width + turned
        rows = torch.cat((heads.flatten(), torch.arange(heads.numel(), len(qkv), device=qkv.device)))
        qkv, bias = qkv[rows], None if bias is None else bias[rows]
    norms = [getattr(attention, name, None) for name in program.head_norm_names]
    is_normed = program.head_norms is not HeadNorms.NONE and norms[0] is not None
    sinks = getattr(attention, program.sinks) if program.sinks else None
    return AttentionWeights(
        qkv=qkv,
        qkv_bias=bias,
        out=out.weight.detach(),
        out_bias=None if out.bias is None else out.bias.detach(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=width,
        rotated=rotated,
        scaling=float(attention.scaling),
        query_norm=_norm(norms[0]) if is_normed else None,
        key_norm=_norm(norms[1]) if is_normed else None,
        head_norms=program.head_norms if is_normed else HeadNorms.NONE,
        window=window_of(config, attention.layer_idx) or 0,
        clip=_number(program.clip, 0.0, attention, config),
        sinks=None if sinks is None else sinks.detach(),
    )


def _latent(program: Program, attention: Any) -> LatentAttentionWeights:
    width, rotated = int(attention.qk_head_dim), int(attention.qk_rope_head_dim)
    num_heads, latent = int(attention.num_heads), int(attention.kv_lora_rank)
    is_query_latent = attention.q_lora_rank is not None
    query = attention.q_b_proj if is_query_latent else attention.q_proj
    down, keys = query if not is_query_latent else attention.q_a_proj, attention.kv_a_proj_with_mqa
    device = keys.weight.device
    query_rows = torch.arange(num_heads * width, device=device)
    key_rows = torch.arange(latent + rotated, device=device)
    if _is_interleaved(program, attention.config):
        turned = _halved(width, rotated, at=width - rotated, device=device)
        query_rows = (torch.arange(num_heads, device=device)[:, None] * width + turned).flatten()
        key_rows = _halved(latent + rotated, rotated, at=latent, device=device)
    query_weight = query.weight.detach()[query_rows]
    first = [down.weight.detach() if is_query_latent else query_weight, keys.weight.detach()[key_rows]]
    bias: Tensor | None = None
    if keys.bias is not None:  # of queries that are not latent there is none
        above = down.bias.detach() if is_query_latent else keys.bias.new_zeros(len(query_rows))
        bias = torch.cat([above, keys.bias.detach()[key_rows]])
    return LatentAttentionWeights(
        down=torch.cat(first),
        down_bias=bias,
        query_up=query_weight if is_query_latent else None,
        up=attention.kv_b_proj.weight.detach(),
        out=attention.o_proj.weight.detach(),
        out_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
        num_heads=num_heads,
        latent_width=latent,
        rotated=rotated,
        head_width=width,
        value_width=int(attention.v_head_dim),
        query_norm=_norm(attention.q_a_layernorm) if is_query_latent else None,
        key_norm=_norm(attention.kv_a_layernorm),
        scaling=float(attention.scaling),
    )


def _gate(program: Program, block: Any) -> GateWeights:
    gate, owners = block, [block]
    for name in program.gate.split("."):
        gate = getattr(gate, name)
        owners.insert(0, gate)
    weight = gate.weight.detach()
    bias, correction = getattr(gate, "bias", None), _find(program.correction, *owners)
    num_groups, kept_groups = (int(_number(name, 1, *owners)) for name in program.groups or ("", ""))
    top_k = int(_number("top_k", 0, *owners))
    if program.groups and getattr(gate, "topk_method", "group_limited_greedy") != "group_limited_greedy":
        if gate.topk_method != "greedy":
            raise UnknownPartError(f"its gates choose by {gate.topk_method}")
        num_groups = kept_groups = 1
    num_groups = max(num_groups, 1)
    if len(weight) % num_groups or not 1 <= top_k <= len(weight) // num_groups * kept_groups:
        raise UnknownPartError(f"its gates choose {top_k} of {kept_groups} groups of {len(weight)} experts")
    if _number("norm_min", 0.0, *owners) > 1 / len(weight):
        raise UnknownPartError(f"its gates divide weights by {gate.norm_min} at least")
    if program.gate_kind is GateKind.SPARSE_MIXER and top_k != 2:
        raise UnknownPartError(f"its gates choose {top_k} experts, and know how to choose 2")
    power = program.norm_power
    return GateWeights(
        weight=weight,
        bias=None if bias is None else bias.detach(),
        correction=None if correction is None else correction.detach().flatten(),
        top_k=top_k,
        kind=program.gate_kind,
        norm_power=_number(power, 0.0, *owners) if isinstance(power, str) else power,
        scale=_number(program.scale, 1.0, *owners),
        num_groups=num_groups,
        kept_groups=kept_groups,
        group_tops=program.group_tops,
        jitter=_number(program.jitter, 0.0, *owners),
    )


def _mlp(mlp: Any, config: Any, weigh: Any) -> MlpWeights:
    parts = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    gate, up, down = (one.weight.detach() for one in parts)
    biases = None if parts[0].bias is None else tuple(one.bias.detach() for one in parts)
    return MlpWeights(
        gate=gate,
        up=up,
        down=down,
        biases=cast("tuple[Tensor, Tensor, Tensor] | None", biases),
        form=expert_form({"hidden_act": config.hidden_act}),
        weigh=None if weigh is None else weigh.weight.detach(),
    )


def _norm(module: Any) -> NormWeights:
    if isinstance(module, nn.LayerNorm):
        bias: Tensor | None = module.bias  # typed as always there, and it is not
        return NormWeights(
            weight=module.weight.detach(),
            bias=None if bias is None else bias.detach(),
            eps=float(module.eps),
            is_centred=True,
        )
    return NormWeights(weight=module.weight.detach(), eps=float(module.variance_epsilon))


def _is_interleaved(program: Program, config: Any) -> bool:
    named = program.is_interleaved
    return bool(getattr(config, named)) if isinstance(named, str) else named


def _halved(width: int, rotated: int, *, at: int, device: torch.device) -> Tensor:
    """Order a head's numbers so that those which were neighbours among the rotated lie half of these apart: [width]."""
    order = torch.arange(width, device=device)
    turned = order[at : at + rotated]
    order[at : at + rotated] = torch.cat((turned[0::2], turned[1::2]))
    return order


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _find(name: str, *owners: Any) -> Any:
    """Return what the first owner that has something of that name has; None where nobody has, or no name is given."""
    for owner in owners if name else ():
        with contextlib.suppress(AttributeError):
            if (found := _at(owner, name)) is not None:
                return found
    return None


def _number(name: str, default: float, *owners: Any) -> float:
    found = _find(name, *owners)
    return default if found is None else float(found)
