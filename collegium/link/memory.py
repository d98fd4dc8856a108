"""Tensors as bytes and bytes as tensors, without a copy. Pure; knows no frame's fields."""

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from collegium.link.frame import FrameError


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


def rows_at(address: int, num_rows: int, d_model: int, dtype: torch.dtype) -> torch.Tensor:
    """Return rows [num_rows, d_model] that lie at an address; they are not kept alive."""
    memory = (ctypes.c_uint8 * (num_rows * d_model * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(num_rows, d_model)
