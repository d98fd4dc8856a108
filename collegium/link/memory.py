"""Tensors as bytes and bytes as tensors, without a copy. Pure; knows no frame's fields."""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from collegium.link.frame import FrameError

_ALIGN: Final = 64  # a cache line, and what the widest vector load likes


def buffer_of(rows: torch.Tensor) -> npt.NDArray[np.generic]:
    """Return the bytes of contiguous CPU rows as something that a socket can send."""
    if rows.requires_grad:
        rows = rows.detach()
    if rows.dtype is torch.bfloat16:  # numpy has no such type
        rows = rows.view(torch.int16)
    try:
        return rows.numpy()
    except TypeError:
        raise FrameError(f"rows on {rows.device} cannot travel in a frame; bring them to the host first") from None


def byte_view(rows: torch.Tensor) -> memoryview:
    """Return the writable bytes of a contiguous CPU tensor."""
    return rows.view(-1).view(torch.uint8).numpy().data


def round_up(num_bytes: int) -> int:
    """Round up to the alignment of rows."""
    return -(-num_bytes // _ALIGN) * _ALIGN
