"""Foretell which experts a coming MoE layer will choose: its gate, asked about an earlier layer's rows.

Owns the gates that stand beside the model's experts. Knows nothing of links, workers or steps; what it says is advice
and may be wrong. A block adds little to the stream that it reads from, so the next gate sees almost the same rows: the
idea of Eliseev and Mazur, Fast Inference of Mixture-of-Experts Language Models with Offloading, 2023.
T rows, D model, E experts, K top-k.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from collegium.fabric import logs

_log = logs.get("foresight")

_PROBE_ROWS = 256
_GATE_NAMES = ("gate", "router")  # what the supported architectures call it


Choices = list[list[int]]  # [T][K] experts


class Foretells(Protocol):
    """Whoever foretells choices; `Foresight` asks gates, a test or an experiment may know better."""

    asks_gates: bool  # whether it says no more than the layers' own gates would

    def predict(self, layer: int, x: Tensor) -> Choices | None:
        """Say what rows x [T, D] will choose at a coming MoE layer, or None where nobody can tell."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One layer's gate, and what its block hands to it beside the rows."""

    forward: Callable[..., object]  # the module's own: a call would wake hooks that record what gates say
    block: nn.Module
    extras: tuple[str, ...]  # the block's attributes that follow the rows as arguments
    top_k: int

    def choose(self, x: Tensor) -> Tensor:
        """Choose experts for rows x [T, D]: [T, K]. Raises ValueError where the gate's answer names none."""
        said = self.forward(x, *[getattr(self.block, name) for name in self.extras])
        return _ids_in(said if isinstance(said, tuple) else (said,), x.shape[0], self.top_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGate:
    """A gate that chooses the highest of its linear scores, whatever it does to them for the weights' sake.

    Asked without that, a gate costs a router half as much (measured: 50 us against 120 us at one row, caches cold).
    """

    weight: Tensor  # [E, D]
    bias: Tensor | None
    top_k: int

    def choose(self, x: Tensor) -> Tensor:
        """Choose experts for rows x [T, D]: [T, K]."""
        return F.linear(x, self.weight, self.bias).topk(self.top_k, dim=-1).indices


class Foresight:
    """The gates of a model by MoE layer. Owned by the engine's thread."""

    asks_gates = True

    def __init__(self, blocks: Mapping[int, nn.Module], *, top_k: int, device: torch.device):
        """Find the gates in the blocks that hold them, by MoE layer; what cannot be used is said in the log, once."""
        self._device = device
        found = {layer: _gate_beside(block, top_k) for layer, block in blocks.items()}
        self._gates = {layer: _simplest(gate) for layer, gate in found.items() if isinstance(gate, Gate)}
        missing = {layer: why for layer, why in found.items() if isinstance(why, str)}
        if missing:
            _log.warning("gates cannot be asked ahead", layers=sorted(missing), why=next(iter(missing.values())))

    @property
    def layers(self) -> tuple[int, ...]:
        """MoE layers whose choices can be foretold."""
        return tuple(sorted(self._gates))

    def predict(self, layer: int, x: Tensor) -> Choices | None:
        """Say what rows x [T, D] of an earlier layer would choose at a layer; None where it has no gate.

        Never fails: a gate that does is not asked again.
        """
        gate = self._gates.get(layer)
        if gate is None:
            return None
        try:
            return gate.choose(x.to(self._device)).tolist()
        except Exception as error:  # modelling code of another library; advice must not cost a step
            del self._gates[layer]
            _log.warning("a gate cannot be asked ahead", layer=layer, why=f"{type(error).__name__}: {error}")
            return None


def _gate_beside(block: nn.Module, top_k: int) -> Gate | str:
    """Find the gate in the block that holds the experts, or say why there is none to use."""
    gate = next((m for name in _GATE_NAMES if isinstance(m := getattr(block, name, None), nn.Module)), None)
    if gate is None:
        return f"{type(block).__name__} has no {' or '.join(_GATE_NAMES)}"
    _, *others = inspect.signature(gate.forward).parameters.values()
    needed = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if lacking := [name for name in needed if not hasattr(block, name)]:
        return f"{type(gate).__name__} wants {lacking[0]}, which {type(block).__name__} does not hold"
    return Gate(forward=gate.forward, block=block, extras=tuple(needed), top_k=top_k)


def _simplest(gate: Gate) -> Gate | LinearGate:
    """Give the linear gate that chooses as this one does on random rows, or this one where there is none."""
    module: object = getattr(gate.forward, "__self__", None)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return gate
    linear = LinearGate(weight=weight, bias=bias if isinstance(bias, Tensor) else None, top_k=gate.top_k)
    rows = torch.randn(_PROBE_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    rows = rows.to(weight.device, weight.dtype)
    try:
        with torch.inference_mode():
            is_same = torch.equal(gate.choose(rows).sort().values, linear.choose(rows).sort().values)
    except Exception:  # it will be said when the gate is asked in earnest
        return gate
    return linear if is_same else gate


def _ids_in(said: tuple[object, ...], num_rows: int, top_k: int) -> Tensor:
    """Pick the ids [T, K] out of what a gate returned; where it gave scores [T, E] alone, those of the highest."""
    tensors = [one for one in said if isinstance(one, Tensor)]
    for one in tensors:
        if not one.is_floating_point() and one.shape == (num_rows, top_k):
            return one
    for one in tensors:
        if one.is_floating_point() and one.ndim == 2 and one.shape[0] == num_rows and one.shape[1] >= top_k:
            return one.topk(top_k, dim=-1).indices
    raise ValueError(f"its answer has neither ids nor scores: {[tuple(one.shape) for one in tensors]}")
