"""What one process holds, as the kernel tells it: memory, descriptors, threads, and the ports that it listens on.

Reads /proc alone, so that nothing depends on what a process says of itself and no port can be forgotten.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_LISTEN = "0A"
_UNIX_ACCEPTS = "00010000"


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a process holds. rss_mb: resident memory in MiB."""

    rss_mb: float
    num_descriptors: int
    num_threads: int


def footprint(pid: int) -> Footprint:
    """Read what a process holds now. FileNotFoundError or ProcessLookupError if it is gone."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return Footprint(
        rss_mb=pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        num_descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        num_threads=len(os.listdir(f"/proc/{pid}/task")),
    )


def is_alive(pid: int) -> bool:
    """True while the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def reset_peak(pid: int) -> None:
    """Forget the largest resident memory so far; peak_mb counts from here."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_mb(pid: int) -> float:
    """Return the largest resident memory since reset_peak, in MiB."""
    line = next(one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10


def listening_ports(pid: int) -> Sequence[int]:
    """List the TCP ports, IPv4 and IPv6, that a process listens on."""
    inodes = _sockets(pid)
    found: set[int] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and fields[9] in inodes:
                found.add(int(fields[1].rpartition(":")[2], 16))
    return sorted(found)


def listening_names(pid: int) -> Sequence[str]:
    """List the unix sockets that a process listens on: paths, and abstract ones as "@name"."""
    inodes = _sockets(pid)
    found: list[str] = []
    for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == _UNIX_ACCEPTS and fields[6] in inodes and fields[-1].startswith(("@", "/")):
            found.append(fields[-1])
    return sorted(found)


def _sockets(pid: int) -> set[str]:
    found: set[str] = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found
