"""Make tiny checkpoints with random weights for every served architecture.

Owns their configurations and how weights are drawn: large enough that gates and next tokens are decided by clear
margins, in the file layout of published checkpoints (`save_pretrained` writes that layout). `build` needs transformers
and is called from the oracle's process; nothing else here imports it. Ids alone are served unless the variant is TEXT.
"""

import hashlib
import json
import re
import shutil
import tempfile
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

VOCAB_SIZE = 320
EOS_ID = 2
MAX_LENGTH = 1024


class Variant(StrEnum):
    """What differs from the plain checkpoint of an architecture."""

    BASE = "base"
    SHARDED = "sharded"  # the same weights in several files with an index
    OTHER = "other"  # other shapes and options: odd counts, tied embeddings, group-limited gates and the like
    BF16 = "bf16"  # the same weights, rounded to bfloat16
    TEXT = "text"  # with a byte-level tokenizer and a chat template
    FUSED = "fused"  # the same weights as transformers 5 holds them: one tensor for all experts of a layer


_TOKENS = {"vocab_size": VOCAB_SIZE, "bos_token_id": 1, "eos_token_id": EOS_ID, "pad_token_id": 0}
_GQA = _TOKENS | {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
}
_MLA = _GQA | {
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_DBRX = _TOKENS | {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": MAX_LENGTH}

_BASE: dict[str, dict[str, Any]] = {
    "mixtral": _GQA | {"intermediate_size": 96, "num_local_experts": 8, "sliding_window": None},
    "olmoe": _GQA | {"intermediate_size": 48, "num_experts": 16, "num_experts_per_tok": 4},
    "qwen2_moe": _GQA
    | {
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": _GQA
    | {
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
    },
    "deepseek_v2": _MLA
    | {
        "head_dim": 8,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
    },
    "deepseek_v3": _MLA
    | {
        "q_lora_rank": 24,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
    },
    "gpt_oss": _GQA
    | {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 8,
    },
    "granitemoe": _GQA | {"intermediate_size": 48, "num_local_experts": 8, "num_experts_per_tok": 2},
    "phimoe": _GQA
    | {"intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "glm4_moe": _GQA
    | {
        "head_dim": 16,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots1": _GQA
    | {
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "sliding_window": None,
    },
    "ernie4_5_moe": _GQA
    | {
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 1,
        "moe_k": 3,
        "moe_layer_start_index": 1,
    },
    "hunyuan_v1_moe": _GQA
    | {"head_dim": 16, "intermediate_size": 48, "num_experts": 8, "moe_topk": 2},
    "minimax_m2": _GQA
    | {"head_dim": 16, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
    "dbrx": _DBRX
    | {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2, "hidden_size": 64},
    },
}  # fmt: skip

_OTHER: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 24, "num_hidden_layers": 2},
    "olmoe": {"num_experts": 7, "num_experts_per_tok": 7, "norm_topk_prob": True, "clip_qkv": 3.0},
    "qwen2_moe": {
        "decoder_sparse_step": 2,
        "mlp_only_layers": [],
        "num_hidden_layers": 4,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 12,
        "max_window_layers": 2,
    },
    "qwen3_moe": {"num_experts": 9, "num_experts_per_tok": 1, "norm_topk_prob": False, "tie_word_embeddings": True},
    "deepseek_v2": {
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "q_lora_rank": 24,
        "kv_lora_rank": 8,
    },  # as wide as the rotary part: the cache's shapes alone do not tell it is latent
    "deepseek_v3": {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "norm_topk_prob": False, "n_shared_experts": 2},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 16, "num_key_value_heads": 4},
    "granitemoe": {
        "num_local_experts": 5,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.2,
        "logits_scaling": 1.5,
        "tie_word_embeddings": True,
    },
    "phimoe": {"num_local_experts": 5, "num_key_value_heads": 4, "num_hidden_layers": 2, "sliding_window": 12},
    "glm4_moe": {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3, "use_qk_norm": True},
    "dots1": {
        "n_routed_experts": 12,
        "n_group": 3,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": False,
        "sliding_window": 12,
        "max_window_layers": 1,
        "attention_bias": True,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 6,
        "moe_num_shared_experts": 0,
        "moe_k": 1,
        "moe_layer_interval": 2,
        "num_hidden_layers": 4,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_moe": {
        "num_experts": 5,
        "moe_topk": [3, 3, 3],
        "attention_bias": True,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 10000.0, "factor": 1.0},
        "tie_word_embeddings": True,
    },
    "minimax_m2": {"num_local_experts": 6, "num_experts_per_tok": 3},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 6, "moe_top_k": 3, "hidden_size": 64}},
}

# Models with an encoder. Where an encoder is deeper than its decoder transformers' `generate` fails for Switch.
_BASE |= {
    "nllb-moe": {
        "vocab_size": VOCAB_SIZE, "d_model": 48, "max_position_embeddings": 96, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "scale_embedding": True,
        "encoder_layers": 3, "decoder_layers": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2,
        "encoder_ffn_dim": 40, "decoder_ffn_dim": 56, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "num_experts": 8, "moe_token_dropout": 0.2, "tie_word_embeddings": False,
    },
    "switch_transformers": {
        "vocab_size": VOCAB_SIZE, "d_model": 48, "d_kv": 10, "d_ff": 56, "num_heads": 4, "num_experts": 8,
        "num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2,
        "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "expert_capacity": 4096,
        "relative_attention_num_buckets": 12, "relative_attention_max_distance": 24, "tie_word_embeddings": False,
    },
}  # fmt: skip
_OTHER |= {
    "nllb-moe": {
        "encoder_layers": 2, "decoder_layers": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 1,
        "router_bias": True, "scale_embedding": False, "moe_token_dropout": 0.0, "activation_function": "gelu",
        "encoder_attention_heads": 3, "decoder_attention_heads": 3, "num_experts": 5, "encoder_ffn_dim": 72,
        "normalize_router_prob_before_dropping": True, "batch_prioritized_routing": True,
    },
    "switch_transformers": {
        "num_layers": 3, "num_decoder_layers": 2, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 1,
        "router_bias": True, "dense_act_fn": "silu", "relative_attention_num_buckets": 32, "d_kv": 16,
        "relative_attention_max_distance": 128, "num_experts": 5, "decoder_start_token_id": 3,
        "tie_word_embeddings": True,
    },
}  # fmt: skip

TRANSLATORS = ("nllb-moe", "switch_transformers")
ARCHITECTURES = tuple(_BASE)
DECODERS = tuple(sorted(set(_BASE) - set(TRANSLATORS)))

_GATE = re.compile(r"\.(?:gate|gate\.wg|router|router\.layer|router\.classifier)\.weight$")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def config_of(arch: str, variant: Variant) -> dict[str, Any]:
    """Return the fields of config.json that make this checkpoint what it is."""
    return _BASE[arch] | (_OTHER[arch] if variant is Variant.OTHER else {})


def cache_key() -> str:
    """Name everything that the bytes of a checkpoint depend on."""
    parts = [Path(__file__).read_text(), version("transformers"), version("torch")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build(arch: str, root: Path, variant: Variant = Variant.BASE) -> Path:
    """Make the checkpoint under root unless it is there already; return its folder. Safe to race."""
    path = root / cache_key() / f"{arch}-{variant}"
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent))
    try:
        _write(arch, work, variant)
        work.chmod(0o755)
        try:
            work.rename(path)
        except OSError:  # another process was faster
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _write(arch: str, path: Path, variant: Variant) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(arch, **config_of(arch, variant))
    kind = AutoModelForSeq2SeqLM if arch in TRANSLATORS else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    draw_weights(model, seed=1)
    if variant is Variant.BF16:
        model.to(torch.bfloat16)
    model.save_pretrained(
        path,
        max_shard_size="300KB" if variant is Variant.SHARDED else "1GB",
        save_original_format=variant is not Variant.FUSED,
    )
    if variant is Variant.TEXT:
        _write_tokenizer(path)


def draw_weights(model: Any, seed: int) -> None:
    """Redraw every weight so that tokens matter to gates, gates to outputs, and outputs to the next token."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or not tensor.is_floating_point():
                continue
            if _GATE.search(name):
                tensor.normal_(0, 0.3, generator=generator)  # wide gaps between gate scores
            elif "e_score_correction_bias" in name:
                tensor.normal_(0, 0.3, generator=generator)
            elif "relative_attention_bias" in name:
                tensor.normal_(0, 1.0, generator=generator)
            elif tensor.ndim >= 2 and not name.endswith("bias"):
                tensor.normal_(0, 0.15 if "embed_positions" not in name else 0.0, generator=generator)
            elif name.endswith("bias") or "sinks" in name:
                tensor.normal_(0, 0.1, generator=generator)
            elif name.endswith("weight"):  # norms
                tensor.normal_(1, 0.1, generator=generator)


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<pad>", "<s>", "</s>", "<|user|>", "<|system|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(specials + letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": _CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
