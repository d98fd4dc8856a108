"""`transformers` translating as a process of a benchmark, driven by lines of JSON: NLLB-MoE corrected, batches padded.

    python -m benchmarks.corrected_transformers MODEL DTYPE NUM_THREADS

Reads {"texts": [...], "to": language, "max_tokens": n}; writes {"seconds": s, "texts": [...], "num_tokens": n}.
"""

import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts


def run_chosen(self: Any, rows: Any, _mask: Any, weights: Any) -> Any:
    """Run every expert that the gate chose, each on its rows: 5.23 runs the first two, whatever was chosen."""
    out = torch.zeros_like(rows)
    for expert in weights.sum(0).nonzero()[:, 0].tolist():
        at = weights[:, expert].nonzero()[:, 0]
        y = self[f"expert_{expert}"](rows[at]) * (1 - self.moe_token_dropout)
        out.index_add_(0, at, y * weights[at, expert, None].to(y.dtype))
    return out


def main(model_dir: str, dtype: str, num_threads: int) -> None:
    """Answer until stdin ends."""
    torch.set_num_threads(num_threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    NllbMoeExperts.forward = run_chosen  # type: ignore[method-assign]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForSeq2SeqLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began_s = time.perf_counter()
        batch = tokenizer(asked["texts"], return_tensors="pt", padding=True)
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            forced_bos_token_id=tokenizer.convert_tokens_to_ids(asked["to"]),
            max_new_tokens=asked["max_tokens"],
            do_sample=False,
            num_beams=asked["num_beams"],
        )
        texts = tokenizer.batch_decode(out, skip_special_tokens=True)
        seconds = time.perf_counter() - began_s
        pad = model.config.pad_token_id
        num_tokens = int((out[:, 1:] != pad).sum())
        print(json.dumps({"seconds": seconds, "texts": texts, "num_tokens": num_tokens}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
