"""The linear map that everything else is made of, on weights packed for the machine.

Owns PackedLinear. On a CPU the weight is laid out by oneDNN once; a row of the product then does not depend on how many
rows there are (measured: torch's plain linear does not have that property), and reads of weights run near memory
bandwidth. The packed bytes of one shape and type are laid out alike on one machine, so they can be copied from one
PackedLinear into another: that is what a slot is.
R rows, I inputs, O outputs.
"""

import ctypes
import functools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

# The row count that oneDNN is told to expect when it chooses a layout; it holds for any other as well.
_EXPECTED_ROWS = 8


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Say whether this machine and build of torch pack weights of that type, by trying."""
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

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        """Pack `weight` [O, I]; it is copied and may be freed afterwards. `bias` [O] is kept."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._is_packed = weight.device.type == "cpu" and can_pack(weight.dtype)
        with torch.inference_mode():
            self._weight = (
                torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
                if self._is_packed
                else weight.detach().clone()
            )

    def memory(self) -> list[NDArray[np.uint8]]:
        """Give the bytes that the kernel reads, writable and in its own form: of the weight, then of the bias if any.

        Views: they live no longer than this object.
        """
        parts = [_bytes_of(self._weight)]
        return parts if self._bias is None else [*parts, _bytes_of(self._bias)]

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the map to [..., I]; the leading shape is kept."""
        if not self._is_packed:
            return F.linear(rows, self._weight, self._bias)
        if rows.numel() == 0:
            return rows.new_empty(*rows.shape[:-1], self.out_features)
        return torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    if not tensor.is_mkldnn:
        return tensor.view(torch.uint8).reshape(-1).numpy()
    address = torch.ops.mkldnn.data_ptr(tensor)  # oneDNN may pad: there can be more bytes than the shape says
    return np.ctypeslib.as_array((ctypes.c_uint8 * torch.ops.mkldnn._nbytes(tensor)).from_address(address))


def pack_linears(module: nn.Module) -> int:
    """Replace every plain nn.Linear inside `module` by a PackedLinear. Returns how many were replaced."""
    count = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear:
            bias: Tensor | None = getattr(child, "bias", None)  # typed as always there, and it is not
            setattr(module, name, PackedLinear(child.weight.detach(), None if bias is None else bias.detach()))
            count += 1
        else:
            count += pack_linears(child)
    return count
