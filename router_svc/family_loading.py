"""Read the attention, gates and embeddings of a model of the commonest family straight from its checkpoint.

Owns the layers' parameters as modules, under the names that the model library gives them, and the list of tensors that
such a checkpoint has. Nothing here computes but the rotation: lean and device_model do, by the table of programs.
Whatever is out of the ordinary is left to the library (library_model): importing it takes longer than everything else
at a router's start together.
D model, E experts, W head width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from collegium.model.router_tensors import RouterTensor
from router_svc.family_config import FamilyConfig
from router_svc.remote_experts import RemoteExperts

_GATES = {"mixtral": "block_sparse_moe.gate.weight"}  # what files call it, where modules do not


class Projection(nn.Linear):
    """A linear map whose weights are read: none are drawn, which would take longer."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Norm(nn.Module):
    """The weight of a root-mean-square norm."""

    def __init__(self, width: int, config: FamilyConfig, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.variance_epsilon = config.rms_norm_eps


class Gate(nn.Module):
    """The weight of a layer's gate, [E, D]."""

    def __init__(self, config: FamilyConfig, num_experts: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size, dtype=dtype))
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob

    def forward(self, rows: Tensor) -> Tensor:
        """Score rows [T, D] for every expert: [T, E]; the highest are chosen."""
        return F.linear(rows, self.weight)


class Attention(nn.Module):
    """The projections and norms of a layer's attention."""

    def __init__(self, config: FamilyConfig, layer_idx: int, dtype: torch.dtype):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.scaling = config.head_dim**-0.5
        d_model, has_bias = config.hidden_size, config.attention_bias
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Projection(d_model, query, bias=has_bias, dtype=dtype)
        self.k_proj = Projection(d_model, key, bias=has_bias, dtype=dtype)
        self.v_proj = Projection(d_model, key, bias=has_bias, dtype=dtype)
        self.o_proj = Projection(query, d_model, bias=has_bias, dtype=dtype)
        if config.model_type == "olmoe":  # all heads together
            self.q_norm, self.k_norm = Norm(query, config, dtype), Norm(key, config, dtype)
        elif config.model_type == "qwen3_moe":  # each head by itself
            self.q_norm, self.k_norm = Norm(config.head_dim, config, dtype), Norm(config.head_dim, config, dtype)


class MoeBlock(nn.Module):
    """A layer's gate beside what stands for its experts."""

    def __init__(self, config: FamilyConfig, layer_idx: int, num_experts: int, dtype: torch.dtype):
        super().__init__()
        self.gate = Gate(config, num_experts, dtype)
        self.experts = RemoteExperts()
        self.experts.layer = layer_idx


class Layer(nn.Module):
    """What a decoder layer has."""

    def __init__(self, config: FamilyConfig, layer_idx: int, num_experts: int, dtype: torch.dtype):
        super().__init__()
        self.self_attn = Attention(config, layer_idx, dtype)
        self.mlp = MoeBlock(config, layer_idx, num_experts, dtype)
        self.input_layernorm = Norm(config.hidden_size, config, dtype)
        self.post_attention_layernorm = Norm(config.hidden_size, config, dtype)


class Rotation(nn.Module):
    """The plain rotation of positions, as the model library computes it, bit for bit."""

    inv_freq: Tensor

    def __init__(self, config: FamilyConfig):
        super().__init__()
        share = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        self.register_buffer("inv_freq", 1.0 / (config.rope_theta**share), persistent=False)  # [W/2]

    @torch.no_grad()
    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [1, T], each [1, T, W], in the type and on the device of `like`."""
        angles = positions[..., None].float() * self.inv_freq.to(device=like.device, dtype=torch.float)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(like.dtype), both.sin().to(like.dtype)


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: FamilyConfig, num_experts: int, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size, dtype=dtype)
        )
        self.layers = nn.ModuleList(Layer(config, i, num_experts, dtype) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, config, dtype)
        self.rotary_emb = Rotation(config)


class FamilyModel(nn.Module):
    """The parameters of a model of the family, without experts; its memory is not initialised."""

    def __init__(self, config: FamilyConfig, num_experts: int, dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.model = Decoder(config, num_experts, dtype)
        self.lm_head = Projection(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


def load_family_model(
    model_dir: Path, config: FamilyConfig, tensors: Sequence[RouterTensor], num_experts: int, dtype: torch.dtype
) -> FamilyModel | None:
    """Read a checkpoint with a plain config; None if its files hold other tensors than such a model has.

    `tensors`: all that are no expert's. Raises what safetensors and torch raise of files and memory.
    """
    model = FamilyModel(config, num_experts, dtype)
    parameters = _stored(model)
    if {one.key: one.shape for one in tensors} != {key: tuple(value.shape) for key, value in parameters.items()}:
        return None
    with torch.no_grad():
        for file in sorted({one.file for one in tensors}):
            with safe_open(model_dir / file, framework="pt") as stored:
                for one in tensors:
                    if one.file == file:
                        parameters[one.key].copy_(stored.get_tensor(one.key))
    return model


def _stored(model: FamilyModel) -> Mapping[str, Tensor]:
    """A model's parameters by the names of the tensors in files."""
    gate = _GATES.get(model.config.model_type, "mlp.gate.weight")
    return {name.replace("mlp.gate.weight", gate): value for name, value in model.named_parameters()}
