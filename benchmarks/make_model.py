"""Write a Qwen3-MoE checkpoint of 705 M parameters with random weights, for speed alone.

    python benchmarks/make_model.py OUT_DIR

12 layers of width 768, 32 experts of width 768 of which each token wakes 4, vocabulary 4096, bf16: 1.4 GB. Its routing
is near uniform, so it says nothing about caches or balance. Without a tokenizer: it serves token ids.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

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


def main() -> None:
    """Read the argument and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    torch.manual_seed(0)
    config = Qwen3MoeConfig(decoder_sparse_step=1, mlp_only_layers=[], bos_token_id=1, eos_token_id=2, **SHAPE)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out)
    sys.stdout.write(f"{out}: {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters\n")


if __name__ == "__main__":
    main()
