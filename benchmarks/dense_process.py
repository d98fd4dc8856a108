"""A dense translation model by CTranslate2 as a process of a benchmark, driven by lines of JSON; needs `ctranslate2`.

    python -m benchmarks.dense_process MODEL NUM_THREADS

The shape is that of an NLLB-MoE, MODEL, with every layer dense and as wide as what a token wakes on average: a
model of equal active size, which CTranslate2's engine serves in float32, its widest type on a CPU. Weights are random,
so lengths are given: reads {"lengths": [tokens of each source], "new_tokens": n}, each sentence gets n tokens; writes
{"seconds": s}.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_SPECIAL = ["<blank>", "<unk>", "<s>", "</s>"]


def write_dense(config: dict[str, Any], out: Path) -> None:
    """Write a CTranslate2 model of that shape."""
    from ctranslate2.specs import TransformerSpec, common_spec  # type: ignore[import-not-found]

    drawn = np.random.default_rng(0)
    d_model, vocab = int(config["d_model"]), int(config["vocab_size"])
    layers = config["encoder_layers"], config["decoder_layers"]
    spec: Any = TransformerSpec.from_config(
        layers, config["encoder_attention_heads"], pre_norm=True, activation=common_spec.Activation.RELU
    )

    def linear(to: Any, num_out: int, num_in: int) -> None:
        to.weight = drawn.standard_normal((num_out, num_in), dtype=np.float32) * num_in**-0.5
        to.bias = np.zeros(num_out, np.float32)

    def norm(to: Any) -> None:
        to.gamma, to.beta = np.ones(d_model, np.float32), np.zeros(d_model, np.float32)

    def attention(to: Any, *widths: int) -> None:
        norm(to.layer_norm)
        for part, width in zip(to.linear, widths, strict=True):
            linear(part, width, d_model)

    def stack(to: Any, d_ffn: int) -> None:
        norm(to.layer_norm)
        to.position_encodings.encodings = np.zeros((config["max_position_embeddings"], d_model), np.float32)
        for layer in to.layer:
            attention(layer.self_attention, 3 * d_model, d_model)
            if hasattr(layer, "attention"):
                attention(layer.attention, d_model, 2 * d_model, d_model)
            norm(layer.ffn.layer_norm)
            linear(layer.ffn.linear_0, d_ffn, d_model)
            linear(layer.ffn.linear_1, d_model, d_ffn)

    stack(spec.encoder, active_width(config, "encoder"))
    stack(spec.decoder, active_width(config, "decoder"))
    table = drawn.standard_normal((vocab, d_model), dtype=np.float32) * d_model**-0.5
    embeddings = spec.encoder.embeddings
    for to in (embeddings[0] if isinstance(embeddings, list) else embeddings, spec.decoder.embeddings):
        to.weight = table
    linear(spec.decoder.projection, vocab, d_model)
    words = [*_SPECIAL, *(f"t{n}" for n in range(vocab - len(_SPECIAL)))]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.validate()
    spec.optimize()
    spec.save(str(out))


def active_width(config: dict[str, Any], stack: str) -> int:
    """The mean over layers of how wide what a token goes through is: two experts, or the dense part."""
    step, num_layers, width = (config[f"{stack}_{name}"] for name in ("sparse_step", "layers", "ffn_dim"))
    num_sparse = num_layers // step if step else 0
    return int(width) * (num_layers + num_sparse) // int(num_layers)


def main(model_dir: str, num_threads: int) -> None:
    """Answer until stdin ends."""
    import ctranslate2

    config = json.loads((Path(model_dir) / "config.json").read_text())
    drawn = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "dense"
        out.mkdir()
        write_dense(config, out)
        translator: Any = ctranslate2.Translator(
            str(out), device="cpu", compute_type="float32", inter_threads=1, intra_threads=num_threads
        )
        print("ready", flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            most = config["vocab_size"] - len(_SPECIAL)
            sources = [[f"t{drawn.randrange(most)}" for _ in range(length)] for length in asked["lengths"]]
            began_s = time.perf_counter()
            translator.translate_batch(
                sources,
                beam_size=1,
                max_decoding_length=asked["new_tokens"],
                min_decoding_length=asked["new_tokens"],
                return_end_token=True,
            )
            print(json.dumps({"seconds": time.perf_counter() - began_s}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
