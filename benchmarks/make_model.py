"""Write a checkpoint with random weights, for speed alone.

    python benchmarks/make_model.py OUT_DIR [--architecture NAME | --wide LAYERS] [--positions N] [--device cuda]

12 layers of width 768, 32 experts of width 768 of which each token wakes 4, vocabulary 4096, bf16: some 700 M
parameters, 1.4 GB; a Qwen3-MoE, or of another architecture with what is its own. With `--wide`: a Qwen3-MoE of so many
layers as Qwen3-30B-A3B has 48 of, 1.2 GB each, vocabulary 32768. Routing is near uniform, so it says nothing about
caches or balance. Without a tokenizer: it serves token ids.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 2048,
}
# What an architecture has beside that.
OWN: dict[str, dict[str, object]] = {
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": []},
    "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 1536},
    "gpt_oss": {"num_local_experts": 32, "intermediate_size": 768, "sliding_window": 128},
    "deepseek_v2": {
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "num_key_value_heads": 12,
        "q_lora_rank": None,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "head_dim": 32,  # what is rotated
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    # DeepSeek-MoE as its papers have it: many small experts, in groups of which a token is open to few, shared ones
    "deepseek_v3": {
        "n_routed_experts": 128,
        "num_experts": 128,
        "moe_intermediate_size": 192,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "num_key_value_heads": 12,
        "q_lora_rank": None,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "head_dim": 32,
        "first_k_dense_replace": 1,
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 2.5,
    },
}
WIDE = SHAPE | {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "head_dim": 128,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}


def main() -> None:
    """Read the arguments and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--architecture", choices=sorted(OWN), default="qwen3_moe", metavar="NAME", help=", ".join(OWN))
    parser.add_argument("--wide", type=int, metavar="LAYERS", help="the shape of Qwen3-30B-A3B, with so many layers")
    parser.add_argument("--positions", type=int, default=SHAPE["max_position_embeddings"], help="the longest sequence")
    parser.add_argument("--device", default="cpu", help="where weights are drawn")
    args = parser.parse_args()
    out: Path = args.out
    torch.manual_seed(0)
    shape = WIDE | {"num_hidden_layers": args.wide} if args.wide else SHAPE
    shape = shape | OWN[args.architecture] | {"max_position_embeddings": args.positions}
    config = CONFIG_MAPPING[args.architecture](bos_token_id=1, eos_token_id=2, **shape)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out)
    sys.stdout.write(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters\n")


if __name__ == "__main__":
    main()
