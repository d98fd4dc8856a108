"""What a benchmark was run under: printed with every result, so that a figure can be judged."""

import os
import subprocess
import threading
import time
from pathlib import Path

import numpy as np

_BUFFER_BYTES = 256 << 20
_REPEATS = 3


def memory_bandwidth_gb_s(num_threads: int) -> float:
    """Measure how fast threads together read memory, in GB/s: the best of a few passes over 256 MiB each."""
    buffers = [np.ones(_BUFFER_BYTES // 8) for _ in range(num_threads)]
    best = 0.0
    for _ in range(_REPEATS):
        threads = [threading.Thread(target=buffer.sum) for buffer in buffers]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        best = max(best, num_threads * _BUFFER_BYTES / (time.perf_counter() - began) / 1e9)
    return best


def commit() -> str:
    """Name the commit that is measured, with a mark where files differ from it."""
    root = Path(__file__).parents[1]
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def conditions(**facts: object) -> dict[str, object]:
    """Collect the conditions of a run beside facts of the benchmark's own (model, dtype, threads)."""
    num_cores = os.cpu_count() or 1
    return {
        **facts,
        "commit": commit(),
        "cores": num_cores,
        "memory_bandwidth_gb_s": round(memory_bandwidth_gb_s(num_cores), 1),
        "load_average": os.getloadavg()[0],
    }
