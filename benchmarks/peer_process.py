"""A peer engine as a process of the serving benchmark, driven by lines of JSON; runs in the peers' environment.

    python peer_process.py vllm|vllm-compile|openvino|llama MODEL DTYPE NUM_THREADS

MODEL is a checkpoint's folder, for OpenVINO what its exporter made of it, for llama.cpp its GGUF file.
Imports nothing of this project: vLLM needs another transformers. Reads {"prompts": [...], "max_tokens": n}; writes
{"seconds": s}. Greedy, no early end, no reuse of a prompt's cache, as for all others.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

_MOST_REQUESTS, _MOST_TOKENS = 64, 1024

Burst = Callable[[list[list[int]], int], None]


def vllm(model: str, dtype: str, *, is_compiled: bool) -> Burst:
    """vLLM's offline engine, which batches continuously as its server does."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(
        model=model,
        dtype=dtype,
        max_model_len=_MOST_TOKENS,
        enforce_eager=not is_compiled,
        max_num_seqs=_MOST_REQUESTS,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,  # ids go in and out; some checkpoints have none
    )

    def burst(prompts: list[list[int]], max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    return burst


def llama(gguf: str, num_threads: int) -> Burst:
    """llama.cpp's server, in this process, with a place for every request."""
    import xllamacpp  # type: ignore[import-not-found]

    params: Any = xllamacpp.CommonParams()
    params.model.path, params.sampling.temp, params.verbosity = gguf, 0.0, -1
    params.n_parallel, params.n_ctx = _MOST_REQUESTS, _MOST_TOKENS * _MOST_REQUESTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
    server: Any = xllamacpp.Server(params)

    def burst(prompts: list[list[int]], max_tokens: int) -> None:
        def one(prompt: list[int]) -> None:
            server.handle_completions(
                {
                    "prompt": prompt,
                    "max_tokens": max_tokens,
                    "temperature": 0.0,
                    "ignore_eos": True,
                    "cache_prompt": False,
                }
            )

        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(one, prompts))

    return burst


def openvino(model: str, dtype: str, num_threads: int) -> Burst:
    """OpenVINO GenAI's continuous batching."""
    import numpy as np
    import openvino as ov  # type: ignore[import-not-found]
    import openvino_genai as genai  # type: ignore[import-not-found]

    scheduling: Any = genai.SchedulerConfig()
    scheduling.cache_size, scheduling.max_num_seqs, scheduling.max_num_batched_tokens = 2, _MOST_REQUESTS, _MOST_TOKENS
    scheduling.enable_prefix_caching, scheduling.dynamic_split_fuse = False, True
    precision = {"bfloat16": "bf16", "float32": "f32"}[dtype]
    properties = {
        "INFERENCE_NUM_THREADS": str(num_threads),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    pipeline: Any = genai.ContinuousBatchingPipeline(model, scheduling, "CPU", properties)

    def burst(prompts: list[list[int]], max_tokens: int) -> None:
        config: Any = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = max_tokens
        config.ignore_eos, config.do_sample = True, False
        ids = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        pipeline.generate(ids, [config] * len(prompts))

    return burst


def main(engine: str, model: str, dtype: str, num_threads: int) -> None:
    """Serve lines until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines print to stdout; lines of JSON have one of their own
    if engine == "llama":
        burst = llama(model, num_threads)
    elif engine == "openvino":
        burst = openvino(model, dtype, num_threads)
    else:
        burst = vllm(model, dtype, is_compiled=engine == "vllm-compile")
    out.write("{}\n")
    out.flush()
    for line in sys.stdin:
        work = json.loads(line)
        began = time.perf_counter()
        burst(work["prompts"], work["max_tokens"])
        out.write(json.dumps({"seconds": time.perf_counter() - began}) + "\n")
        out.flush()
    os._exit(0)  # threads of some engines do not end by themselves


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
