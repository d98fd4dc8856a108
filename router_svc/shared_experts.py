"""Compute a layer's shared experts while the rows of its routed ones are with the workers.

Owns SharedExperts, which stands before a model's own module and moves its work, and OwnShared, the same for a pass that
says itself what there is to do. Models call theirs before their routed
experts or after them; both use the result only when the routed experts are done, so it may be computed in between.
T rows, D model.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

_NAMES = ("shared_expert", "shared_experts")  # in the blocks of transformers 5.23


class Shared(Protocol):
    """What can be computed while rows are away."""

    def compute(self, x: Tensor) -> None:
        """Do the work for rows [T, D] that the routed experts got, where it has not been done."""
        ...

    def settle(self, x: Tensor) -> None:
        """Take notice that the routed experts are done with rows [T, D]: what is still owed is computed now."""
        ...

    def forget(self) -> None:
        """Drop what a pass that failed has left: other rows will lie in the same memory."""
        ...


class OwnShared:
    """A layer's shared experts, of our own pass. Rows are told apart by their memory: parts of a step take turns."""

    def __init__(self) -> None:
        self._owed: dict[int, Callable[[], None]] = {}

    def owe(self, x: Tensor, work: Callable[[], None]) -> None:
        """Have `work` done once while rows x [T, D] are away."""
        self._owed[x.data_ptr()] = work

    def compute(self, x: Tensor) -> None:
        """Do what is owed for rows x."""
        work = self._owed.pop(x.data_ptr(), None)
        if work is not None:
            work()

    def settle(self, x: Tensor) -> None:
        """Do it now if it has not been done."""
        self.compute(x)

    def forget(self) -> None:
        """Owe nothing."""
        self._owed.clear()


class SharedExperts(nn.Module):
    """A layer's shared experts. Calls are told apart by the memory of their rows: parts of a step take turns."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self._is_first: bool | None = None  # before the routed experts; not known before the first pass
        self._has_met_routed = False
        self._owed: dict[int, tuple[Tensor, Tensor]] = {}  # rows, and where their result is expected
        self._done: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Return the result for rows [..., D]; where the routed experts come later, `compute` will have filled it."""
        key = x.data_ptr()
        if self._is_first is None:
            self._is_first = not self._has_met_routed
        elif self._is_first:
            out = x.new_empty(x.shape)
            self._owed[key] = (x, out)
            return out
        elif key in self._done:
            return self._done.pop(key).view(x.shape)
        return self.inner(x)

    def compute(self, x: Tensor) -> None:
        """Do the work for rows [T, D] that the routed experts got, where it has not been done."""
        key = x.data_ptr()
        if self._is_first is False and key not in self._done:
            self._done[key] = self.inner(x)
        elif key in self._owed:
            rows, out = self._owed.pop(key)
            out.copy_(self.inner(rows))

    def settle(self, x: Tensor) -> None:
        """Take notice that the routed experts are done with rows [T, D]: what is still owed is computed now."""
        self._has_met_routed = True
        if x.data_ptr() in self._owed:
            self.compute(x)

    def forget(self) -> None:
        """Drop what a pass that failed has left: other rows will lie in the same memory."""
        self._owed.clear()
        self._done.clear()


def wrap(block: nn.Module) -> SharedExperts | None:
    """Put a SharedExperts in the place of a MoE block's own; None where it has none."""
    for name in _NAMES:
        inner = getattr(block, name, None)
        if isinstance(inner, nn.Module):
            shared = SharedExperts(inner)
            setattr(block, name, shared)
            return shared
    return None
