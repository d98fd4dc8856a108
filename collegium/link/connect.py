"""Pick the transport of a link by its name. Owns nothing else."""

import ssl

import torch

from collegium.link import dial, nccl
from collegium.link.base import Connect, RouterLink

CONNECTS: dict[str, Connect] = {
    "tcp": dial.connect_tcp,
    "unix": dial.connect_unix,
    "nccl": nccl.connect,
}


def connect(
    transport: str,
    address: str,
    *,
    link_id: int,
    secret: bytes,
    dtype: torch.dtype,
    d_model: int,
    deadline_s: float,
    tls: ssl.SSLContext | None = None,
) -> RouterLink:
    """Open a link over `transport` ("tcp", "unix", "nccl"); see base.Connect.

    Raises ValueError for another name.
    """
    if transport not in CONNECTS:
        raise ValueError(f"no transport is named {transport!r}; there are {', '.join(CONNECTS)}")
    return CONNECTS[transport](
        address, link_id=link_id, secret=secret, dtype=dtype, d_model=d_model, deadline_s=deadline_s, tls=tls
    )
