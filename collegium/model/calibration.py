"""Measure which kernels compute an expert fastest on this machine, once, and remember it.

Owns the measurement, its file in the cache, and the choice. Weights are read cold, as in serving, where thousands of
experts pass between two uses of one. Takes under a second; the file is kept by machine, type and shape, so only the
first start on a machine pays. D model, F ffn, R rows.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from collegium.model import native
from collegium.model.architectures import ExpertForm
from collegium.model.cache_root import cache_file
from collegium.model.experts import PackedExpert, expert_run
from collegium.model.kernels import Kernel, available, kernel_for, use_kernel
from collegium.model.weights import ExpertWeights

ROWS = (1, 4, 16, 64)  # of one expert: decoding alone, a few, a batch, a prompt
_BUDGET_S = 0.8  # over all kernels and row counts
_COLD_BYTES = 64 << 20  # experts are taken in turn from so many bytes: more than the caches hold
_MOST_EXPERT_BYTES = 8 << 20  # a larger expert is measured by a part of it: bytes per second are the same
_CLEARLY = 0.9  # ours are kept unless others take at most this part of the time: noise must not choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured: microseconds of one expert call by kernel and rows, and the kernel that this speaks for."""

    machine: str
    kernel: Kernel
    microseconds: Mapping[str, Mapping[str, float]]

    def describe(self) -> dict[str, str]:
        """Each kernel's figures in one string, by name, for a log."""
        return {
            name: " ".join(f"{rows}:{us:.0f}us" for rows, us in by_rows.items())
            for name, by_rows in self.microseconds.items()
        }


def calibrate(d_model: int, d_ffn: int, dtype: torch.dtype, form: ExpertForm) -> Calibration:
    """Return what is known of this machine, type, shape and number of threads; measure it where nothing is.

    Where the cache cannot be written it is measured at every start.
    """
    if len(kernels := rivals(dtype)) == 1:
        return Calibration(machine=machine_name(), kernel=kernels[0], microseconds={})
    kind = form.activation if form.is_gated else f"{form.activation} without a gate"
    key = "|".join(map(str, (machine_name(), dtype, d_model, d_ffn, kind, torch.get_num_threads())))
    path = _cache_file()
    with _locked(path):  # several services of one machine start at once, and would measure each other
        known = _read(path)
        if (found := _parse(known.get(key))) is not None and found.kernel in available(dtype):
            return found
        measured = measure(d_model, d_ffn, dtype, form)
        with contextlib.suppress(OSError):
            work = path.with_suffix(f".{os.getpid()}")
            work.write_text(json.dumps({**known, key: asdict(measured)}, indent=1))
            work.replace(path)
    return measured


def rivals(dtype: torch.dtype) -> list[Kernel]:
    """Kernels that can be the best: torch's plain ones only where there are no others."""
    return [kernel for kernel in available(dtype) if kernel is not Kernel.TORCH] or [Kernel.TORCH]


def measure(d_model: int, d_ffn: int, dtype: torch.dtype, form: ExpertForm) -> Calibration:
    """Time every kernel of this machine at several row counts, and choose. Blocks for less than a second."""
    d_ffn = max(1, min(d_ffn, _MOST_EXPERT_BYTES // (3 * d_model * dtype.itemsize)))
    kernels = rivals(dtype)
    before = kernel_for(dtype)
    try:
        figures = {
            kernel.value: _time_one(kernel, d_model, d_ffn, dtype, form, _BUDGET_S / len(kernels)) for kernel in kernels
        }
    finally:
        use_kernel(before, dtype)
    return Calibration(machine=machine_name(), kernel=choose(figures), microseconds=figures)


def settle_kernel(wanted: str, d_model: int, d_ffn: int, dtype: torch.dtype, form: ExpertForm) -> Calibration:
    """Set this process's kernels for `dtype` to `wanted`, or to the measured best where that is "auto".

    Before anything is packed. Raises KernelUnavailableError.
    """
    if wanted == "auto":
        calibration = calibrate(d_model, d_ffn, dtype, form)
    else:
        calibration = Calibration(machine=machine_name(), kernel=Kernel(wanted), microseconds={})
    use_kernel(calibration.kernel, dtype)
    return calibration


def choose(microseconds: Mapping[str, Mapping[str, float]]) -> Kernel:
    """The first kernel, unless another is clearly faster in geometric mean over the row counts."""
    means = {
        name: math.exp(sum(map(math.log, by_rows.values())) / len(by_rows)) for name, by_rows in microseconds.items()
    }
    first = next(iter(means))
    best = min(means, key=means.__getitem__)
    return Kernel(best if means[best] < _CLEARLY * means[first] else first)


def machine_name() -> str:
    """Name this machine by host, processor, instructions in use and torch."""
    library = native.library()
    return "|".join((platform.node(), _processor(), library.isa if library else "none", str(torch.__version__)))


def _time_one(
    kernel: Kernel, d_model: int, d_ffn: int, dtype: torch.dtype, form: ExpertForm, budget_s: float
) -> dict[str, float]:
    use_kernel(kernel, dtype)
    began_s = time.perf_counter()
    blank = ExpertWeights(
        gate_up=torch.full(((1 + form.is_gated) * d_ffn, d_model), 0.01, dtype=dtype),
        down=torch.full((d_model, d_ffn), 0.01, dtype=dtype),
    )
    expert_bytes = (2 + form.is_gated) * d_ffn * d_model * dtype.itemsize
    experts = [PackedExpert(blank)]
    while len(experts) * expert_bytes < _COLD_BYTES and time.perf_counter() - began_s < 0.4 * budget_s:
        experts.append(PackedExpert(blank))
    part_s = (budget_s - (time.perf_counter() - began_s)) / len(ROWS)
    figures: dict[str, float] = {}
    turn = 0
    for num_rows in ROWS:
        x, pair_rows = torch.full((num_rows, d_model), 0.5, dtype=dtype), np.arange(num_rows)
        until_s = time.perf_counter() + part_s
        best_s = math.inf
        while True:
            run = expert_run(x, [num_rows], pair_rows, form)
            call_s = time.perf_counter()
            run.compute([0], [experts[turn % len(experts)]])
            now_s = time.perf_counter()
            best_s = min(best_s, now_s - call_s)
            turn += 1
            if now_s > until_s:
                break
        figures[str(num_rows)] = round(best_s * 1e6, 2)
    return figures


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cache_file() -> Path:
    return cache_file("kernels.json")


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_suffix(".lock").open("w")
    except OSError:  # no place to remember: measure without
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(path: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        found: object = json.loads(path.read_text())
        if isinstance(found, dict):
            return cast(dict[str, object], found)
    return {}


def _parse(entry: object) -> Calibration | None:
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        fields = cast(Mapping[str, object], entry)
        return Calibration(
            machine=str(fields["machine"]),
            kernel=Kernel(str(fields["kernel"])),
            microseconds=cast(Mapping[str, Mapping[str, float]], fields["microseconds"]),
        )
    return None
