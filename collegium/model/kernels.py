"""The linear map that everything else is made of, on weights packed for the machine; and which kernels pack them.

Owns PackedLinear and the process's choice of kernels. Three are known: `native`, our own C kernels, which stream
weights near memory bandwidth from one row on and know the matrix units of AMX; `onednn`, torch's packed linears, which
know more kinds of them; and `torch`, its plain ones, for what neither takes. Which one is best depends on the machine:
calibration.py measures it. With the first two a row of the product does not depend on how many rows there are
(measured: torch's plain linear does not have that property). The packed bytes of one shape and type are laid out alike
in one process, so they can be copied from one PackedLinear into another: that is what a slot is.
R rows, I inputs, O outputs.
"""

import ctypes
import functools
from enum import StrEnum

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from collegium.model import native, packed_memory

# The row count that oneDNN is told to expect when it chooses a layout; it holds for any other as well.
_EXPECTED_ROWS = 8


class Kernel(StrEnum):
    """A family of kernels; weights packed by one mean nothing to another."""

    NATIVE = "native"
    ONEDNN = "onednn"
    TORCH = "torch"


class KernelUnavailableError(ValueError):
    """The kernels asked for cannot be used on this machine."""


_chosen: dict[torch.dtype, Kernel] = {}


def available(dtype: torch.dtype) -> list[Kernel]:
    """List what can compute with weights of that type on this machine's CPU, ours first."""
    kernels = [Kernel.TORCH]
    if _onednn_packs(dtype):
        kernels.insert(0, Kernel.ONEDNN)
    if dtype in native.DTYPES and native.library() is not None:
        kernels.insert(0, Kernel.NATIVE)
    return kernels


def kernel_for(dtype: torch.dtype) -> Kernel:
    """Say which kernels pack weights of that type in this process."""
    if dtype not in _chosen:
        _chosen[dtype] = available(dtype)[0]
    return _chosen[dtype]


def use_kernel(kernel: Kernel, dtype: torch.dtype) -> None:
    """Choose for this process, before anything is packed. Raises KernelUnavailableError."""
    if kernel not in available(dtype):
        hint = "; `make setup` builds it where there is a C compiler" if kernel is Kernel.NATIVE else ""
        raise KernelUnavailableError(f"kernel {kernel} cannot compute {dtype} on this machine{hint}")
    _chosen[dtype] = kernel


@functools.cache
def _onednn_packs(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        weight = torch.eye(16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _EXPECTED_ROWS)
        rows = torch.ones(2, 16, dtype=dtype)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], ""), rows)
    except (RuntimeError, AttributeError):
        return False


class PackedLinear(nn.Module):
    """rows [R, I] -> rows @ weight.T + bias [R, O], without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, kernel: Kernel | None = None):
        """Pack `weight` [O, I]; it is copied and may be freed afterwards. `bias` [O] is kept."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self.weight = torch.empty_like(weight, device="meta")  # its shape and type alone, which modelling code asks for
        self.kernel = kernel or (kernel_for(weight.dtype) if weight.device.type == "cpu" else Kernel.TORCH)
        self._library = native.library() if self.kernel is Kernel.NATIVE else None
        with torch.inference_mode():
            if self._library is not None:
                self._weight = packed_memory.take(
                    self._library.packed_bytes(self.out_features, self.in_features, weight.dtype)
                )
                self._library.pack(self._weight.data_ptr(), weight)
            elif self.kernel is Kernel.ONEDNN:
                self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
            else:
                self._weight = weight.detach().clone()

    def memory(self) -> list[NDArray[np.uint8]]:
        """Give the bytes that the kernel reads, writable and in its own form: of the weight, then of the bias if any.

        Views: they live no longer than this object.
        """
        parts = [_bytes_of(self._weight)]
        return parts if self._bias is None else [*parts, _bytes_of(self._bias)]

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the map to [..., I]; the leading shape is kept."""
        if self.kernel is Kernel.TORCH:
            return F.linear(rows, self._weight, self._bias)
        if rows.numel() == 0:
            return rows.new_empty(*rows.shape[:-1], self.out_features)
        if self._library is None:
            return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        flat = rows if rows.dim() == 2 else rows.reshape(-1, self.in_features)
        out = self._library.linear(flat, self._weight, self._bias, self.out_features, torch.get_num_threads())
        return out if rows.dim() == 2 else out.view(*rows.shape[:-1], self.out_features)


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    if not tensor.is_mkldnn:
        return tensor.view(torch.uint8).reshape(-1).numpy()
    address = torch.ops.mkldnn.data_ptr(tensor)  # oneDNN may pad: there can be more bytes than the shape says
    return np.ctypeslib.as_array((ctypes.c_uint8 * torch.ops.mkldnn._nbytes(tensor)).from_address(address))


def pack_linears(module: nn.Module) -> int:
    """Replace by a PackedLinear whatever inside `module` computes as nn.Linear does. Returns how many were replaced."""
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward:
            bias: Tensor | None = getattr(child, "bias", None)  # typed as always there, and it is not
            setattr(module, name, PackedLinear(child.weight.detach(), None if bias is None else bias.detach()))
            count += 1
        else:
            count += pack_linears(child)
    return count
