"""Hosts: whether two processes can meet over a unix socket, and how hosts are written. Owns nothing."""

import os
from pathlib import Path


def host_identity() -> str:
    """Name the kernel and the network namespace that this process runs in; abstract sockets meet inside one alone."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot_id}/{os.stat('/proc/self/ns/net').st_ino}"


def bracketed(host: str) -> str:
    """Write a host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
