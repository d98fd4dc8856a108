"""Hosts: whether two processes can meet over a unix socket, and how hosts are written. Owns nothing."""

import os
from pathlib import Path


def host_identity() -> str:
    """Name the kernel and the namespaces that this process runs in: in the same ones, paths of sockets are."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return "/".join((boot_id, *(str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("net", "mnt"))))


def bracketed(host: str) -> str:
    """Write a host as it stands before a port: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
