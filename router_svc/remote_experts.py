"""What stands where a model had its experts, and the calls through which they are computed elsewhere.

Owns RemoteExperts. It has no parameters, so the experts' tensors are left on the disk. Imports nothing of the model
library.
T tokens, K top-k, D model.
"""

from collections.abc import Callable

from torch import Tensor, nn

from collegium.model.native.step import DecodeStep
from router_svc.shared_experts import Shared

# (MoE layer, x [T, D], ids [T, K], weights [T, K]) -> [T, D]
ExpertCall = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# Computes all layers of a decode step, experts included. Returns False if something came between.
StepCall = Callable[[DecodeStep], bool]


class RemoteExperts(nn.Module):
    """Stands where a model had its experts; hands rows, ids and weights to whoever computes them."""

    def __init__(self, config: object = None, *_: object, **__: object):
        super().__init__()
        self.config = config  # some modelling classes read it
        self.layer = -1  # index among MoE layers
        self.call: ExpertCall | None = None
        # The layer's shared experts. Not a submodule: the block holds them, under their own name.
        self.shared: list[Shared] = []

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute the experts' weighted sums for [..., D] rows; ids and weights are [T, K]."""
        assert self.call is not None
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        y = self.call(self.layer, x, top_k_index, top_k_weights)
        for shared in self.shared:
            shared.settle(x)
        return y.view(hidden_states.shape)
