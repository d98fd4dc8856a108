"""Memory for packed weights: pieces of large runs, in huge pages where the system gives them.

Weights are read from end to end at every token, so what they lie in decides how often an address has to be looked up:
thousands of small allocations take a page of 4 KiB each time. Owns the runs; a piece goes back when its tensor is gone,
and a run when all its pieces have.
"""

import contextlib
import mmap
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

_HUGE = 2 << 20
_RUN_BYTES = 32 << 20
_ALIGNED = 64


class _Run:
    """One mapping; pieces are cut from its front."""

    def __init__(self, num_bytes: int):
        try:
            mapped = mmap.mmap(-1, num_bytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise MemoryError(f"no memory for packed weights ({num_bytes:,} bytes): {error.strerror}") from error
        with contextlib.suppress(AttributeError, OSError):  # without huge pages it is memory all the same
            mapped.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(mapped, dtype=torch.uint8)  # holds the mapping
        start = -whole.data_ptr() % _HUGE
        self.memory = whole[start : start + num_bytes]
        self.cut = 0
        self.free: dict[int, list[int]] = {}  # where pieces begin that came back, by size
        self.num_live = 0


_lock = threading.Lock()
_runs: list[_Run] = []
_returned: deque[tuple[_Run, int, int]] = deque()  # by whichever thread the collector runs in, amid anything


def take(num_bytes: int) -> Tensor:
    """Return [num_bytes] uint8, aligned to a cache line; what is in it is not said. Raises MemoryError."""
    size = -(-num_bytes // _ALIGNED) * _ALIGNED
    with _lock, torch.inference_mode(False):  # a run serves callers of both modes
        _take_in()
        run = next((one for one in _runs if one.free.get(size) or one.cut + size <= len(one.memory)), None)
        if run is None:
            run = _Run(max(_RUN_BYTES, -(-size // _HUGE) * _HUGE))
            _runs.append(run)
        if run.free.get(size):
            begin = run.free[size].pop()
        else:
            begin, run.cut = run.cut, run.cut + size
        run.num_live += 1
    with torch.inference_mode(False):
        piece = run.memory[begin : begin + num_bytes]
    weakref.finalize(piece, _give_back, run, size, begin).atexit = False
    return piece


def _give_back(run: _Run, size: int, begin: int) -> None:
    _returned.append((run, size, begin))
    if _lock.acquire(blocking=False):  # else it is taken in by who holds it, or at the next take
        try:
            _take_in()
        finally:
            _lock.release()


def _take_in() -> None:
    while _returned:
        run, size, begin = _returned.popleft()
        run.num_live -= 1
        run.free.setdefault(size, []).append(begin)
        if not run.num_live and run in _runs:
            _runs.remove(run)
