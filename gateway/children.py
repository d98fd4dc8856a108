"""Run one short task of the gateway's start in a process of its own, where it may fail, hang or fill memory.

Owns how such a child is started, bounded and heard. The child prints one line if it fails, and exits with FAILED.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sys
from collections.abc import Sequence

from collegium.fabric.errors import DeadlineExceeded, FailedPrecondition

FAILED = 3
_MAX_CHARS = 500  # of what a child says


async def run_child(module: str, arguments: Sequence[str], *, limit_s: float) -> None:
    """Run `python -P -m module arguments`.

    FailedPrecondition with the child's own words if it fails, DeadlineExceeded if it takes longer than limit_s.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )
    try:
        async with asyncio.timeout(limit_s):
            said, _ = await process.communicate()
    except TimeoutError:
        raise DeadlineExceeded(f"it took longer than {limit_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        words = said.decode(errors="replace").strip()
        if process.returncode != FAILED or not words:
            words = f"its process exited with status {process.returncode}"
        raise FailedPrecondition(words[:_MAX_CHARS])


def limit_memory(num_bytes: int) -> None:
    """Let this process, a child, have at most this much address space."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard), hard)
    )
