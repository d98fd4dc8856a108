"""The yardstick process of the serving benchmark: plain `generate` on a left-padded batch, driven by lines of JSON.

Reads {"prompts": [...], "max_tokens": n}; writes {"seconds": s, "stamps": [time of every step]}.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList, logging


class _Stamps(StoppingCriteria):
    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.at.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def main(model_dir: Path, dtype: str, num_threads: int, device: str) -> None:
    """Serve lines until the input ends."""
    logging.set_verbosity_error()
    torch.set_num_threads(num_threads)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval().to(device)
    sys.stdout.write("{}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        work = json.loads(line)
        ids = torch.tensor(work["prompts"], device=device)
        stamps = _Stamps()
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=work["max_tokens"],
                min_new_tokens=work["max_tokens"],
                do_sample=False,
                eos_token_id=None,
                stopping_criteria=StoppingCriteriaList([stamps]),
            )
        ended = time.perf_counter()
        answer = {"seconds": ended - began, "stamps": [at - began for at in stamps.at]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4])
