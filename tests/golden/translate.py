"""What transformers 4.48.3, whose NLLB-MoE is right as it is, translates with the demo model: written to a file once.

    python tests/golden/translate.py > tests/golden/demo-mt.json

To be run in an environment of its own, with transformers 4.48.3; imports nothing of this project. The tests hold the
reference that they use, 5.23 corrected, and the cluster against the file.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, NllbMoeForConditionalGeneration

MODEL = Path(__file__).parents[2] / "models" / "demo-mt"
MAX_TOKENS = 48
TEXTS = (Path(__file__).parent / "texts.txt").read_text(encoding="utf-8").splitlines()


def main() -> None:
    """Translate every text to both languages, greedily and by four beams."""
    assert transformers.__version__ == "4.48.3", transformers.__version__
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = NllbMoeForConditionalGeneration.from_pretrained(MODEL, torch_dtype=torch.float32).eval()
    found = []
    for to in ("fra_Latn", "deu_Latn"):
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            options = {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(to), "max_new_tokens": MAX_TOKENS}
            options |= {"do_sample": False, "return_dict_in_generate": True, "output_scores": True}
            greedy = model.generate(input_ids=ids, num_beams=1, **options)
            beams = model.generate(input_ids=ids, num_beams=4, num_return_sequences=2, early_stopping=True, **options)
            found.append(
                {
                    "to": to,
                    "text": text,
                    "token_ids": greedy.sequences[0, 1:].tolist(),
                    "said": tokenizer.decode(greedy.sequences[0], skip_special_tokens=True),
                    "beams": [tokenizer.decode(row, skip_special_tokens=True) for row in beams.sequences],
                    "scores": beams.sequences_scores.tolist(),
                }
            )
    json.dump({"transformers": transformers.__version__, "found": found}, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
