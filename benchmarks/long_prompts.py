"""Long prompts: time for each token and memory by the prompt's length.

    python -m benchmarks.long_prompts MODEL_DIR [--lengths 512,1024,2048,4096,8192] [--rounds 3] [--dtype bfloat16]

One process computes prompts of random tokens, chunk by chunk, one new token each; lengths take turns. A token's time
is compared with a line through lengths: maps, gates and experts take the same for each token, attention as much as
there is before it. Memory is the peak of the process above what it held before its first prompt: what computing takes,
for the pools of keys and values are filled at the start. `python -m benchmarks.make_model OUT --positions 8448` makes
a model.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import conditions
from benchmarks.one_process import OneProcess, Request
from benchmarks.ways import told_of_one

_FIRST_PLAIN_ID = 10


def memory_mb(field: str) -> float:
    """Memory of this process in MiB, by /proc: VmRSS now, VmHWM the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def forget_peak() -> None:
    """Begin to look for the most memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[512, 1024, 2048, 4096, 8192]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    dtype, longest = getattr(torch, args.dtype), max(args.lengths)
    draw = random.Random(0)
    one = OneProcess(args.model, dtype=dtype, kv_tokens=2 * longest, num_threads=2, worker_threads=2)
    with told_of_one(one, "one process") as running:

        def seconds(length: int) -> float:
            prompt = [draw.randrange(_FIRST_PLAIN_ID, running.model.vocab_size) for _ in range(length)]
            began = time.perf_counter()
            running.run([Request(prompt_ids=prompt, max_tokens=1)])
            return time.perf_counter() - began

        seconds(64)
        peaks: dict[int, float] = {}
        before = memory_mb("VmRSS")
        for length in sorted(args.lengths):  # shortest first: memory that is kept between calls stays
            forget_peak()
            seconds(length)
            peaks[length] = memory_mb("VmHWM") - before
        took: dict[int, list[float]] = {length: [] for length in args.lengths}
        for number in range(args.rounds):
            for length in args.lengths:
                took[length].append(seconds(length))
                sys.stderr.write(f"round {number + 1}: {length} tokens in {took[length][-1]:.2f} s\n")
        cached_mb = running.model.cache_bytes_per_token() / 2**20
    per_token = {length: statistics.median(took[length]) / length for length in args.lengths}
    first, last = min(args.lengths), longest
    slope = (per_token[last] - per_token[first]) / (last - first) if last > first else 0.0
    table = Table(title="prompts by length; on the line: a token's time over what a line through both ends says")
    for name in ("tokens", "tokens/s", "ms a token", "on the line", "peak MiB above", "MiB of keys and values"):
        table.add_column(name, justify="right")
    for length in sorted(args.lengths):
        line = per_token[first] + slope * (length - first)
        cells = (length, f"{1 / per_token[length]:.0f}", f"{1e3 * per_token[length]:.3f}")
        more = (f"{per_token[length] / line:.2f}", f"{peaks[length]:.0f}", f"{cached_mb * length:.0f}")
        table.add_row(*map(str, cells), *more)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    facts = conditions(model=args.model.name, dtype=args.dtype, threads="router 2, worker 2")
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)


if __name__ == "__main__":
    main()
