"""The commonest family of models, whose forward pass is computed here without the modelling classes, and how to tell.

Owns the reading of a layer's parameters out of a model's modules: our own (family_loading) or transformers' (5.23).
"""

from typing import Any, cast

import torch
from torch import nn

from collegium.model.native.attention import AttentionWeights, HeadNorms
from router_svc.cache_shapes import CacheShape, window_of

# Model types whose layers have this arithmetic, and how they norm queries and keys.
_FAMILY = {
    "mixtral": HeadNorms.NONE,
    "olmoe": HeadNorms.TOGETHER,
    "qwen3_moe": HeadNorms.PER_HEAD,
}


def why_not(model: nn.Module) -> str:
    """Say why a model is not of the family; empty where it is."""
    if cast(Any, model).config.model_type not in _FAMILY:
        return "its layers are of another family"
    inner: Any = model.model
    layers = list(inner.layers)
    if any(not hasattr(layer.mlp, "gate") for layer in layers):
        return "some of its layers have no experts"
    weight = inner.norm.weight
    cos, _ = inner.rotary_emb(weight[None, None], torch.zeros(1, 1, dtype=torch.long, device=weight.device))
    if cos.shape[-1] != layers[0].self_attn.head_dim:
        return "a part of each head is rotated"
    return ""


def weights_of(layer: Any) -> AttentionWeights:
    """Read what a decoder layer computes before its experts."""
    attention = layer.self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    width = int(attention.head_dim)
    return AttentionWeights(
        qkv=torch.cat([one.weight.detach() for one in projections]),
        qkv_bias=None if projections[0].bias is None else torch.cat([one.bias.detach() for one in projections]),
        out=attention.o_proj.weight.detach(),
        out_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
        gate=layer.mlp.gate.weight.detach(),
        top_k=int(layer.mlp.gate.top_k),
        is_normed=bool(getattr(layer.mlp.gate, "norm_topk_prob", True)),  # Mixtral always does
        input_norm=layer.input_layernorm.weight.detach(),
        output_norm=layer.post_attention_layernorm.weight.detach(),
        query_norm=attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
        head_norms=_FAMILY[attention.config.model_type],
        num_heads=attention.q_proj.out_features // width,
        num_kv_heads=attention.k_proj.out_features // width,
        head_width=width,
        eps=float(layer.input_layernorm.variance_epsilon),
        scaling=float(attention.scaling),
        window=window_of(attention.config, attention.layer_idx) or 0,
        clip=float(getattr(attention.config, "clip_qkv", None) or 0.0),
    )


def cache_shape(attention: Any) -> CacheShape:
    """Say what one position of a layer's attention takes."""
    width = int(attention.head_dim)
    heads = attention.k_proj.out_features // width
    return CacheShape(key=(heads, width), value=(heads, width))
