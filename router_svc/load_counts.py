"""Count what gates choose, by layer and expert: the load that the balancer plans with.

Owns the counts since the start. Written by the engine's thread alone; a copy that another thread takes meanwhile may
lack a layer of the step at hand, which the next one has. L layers, E experts, T rows, K top-k.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from collegium.v1 import balancer_pb2 as pb

Counts = NDArray[np.int64]


class LoadCounts:
    """Choices by phase, and steps in which an expert had any row: each [L, E]."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.decode: Counts = np.zeros((num_layers, num_experts), np.int64)
        self.prefill: Counts = np.zeros((num_layers, num_experts), np.int64)
        self.activations: Counts = np.zeros((num_layers, num_experts), np.int64)

    def note(self, layer: int, ids: NDArray[np.int64], num_decode_rows: int) -> Counts:
        """Count a layer's choices ids [T, K], the first rows decoding ones; gives the step's own counts [E]."""
        num_experts = self.decode.shape[1]
        decode = np.bincount(ids[:num_decode_rows].ravel(), minlength=num_experts)
        self.decode[layer] += decode
        counts = decode
        if num_decode_rows < len(ids):
            prefill = np.bincount(ids[num_decode_rows:].ravel(), minlength=num_experts)
            self.prefill[layer] += prefill
            counts = decode + prefill
        self.activations[layer] += counts > 0
        return counts

    def to_message(self, member_id: str) -> pb.ReportLoadRequest:
        """Write the counts as a report."""
        layers = [
            pb.LayerLoad(decode_tokens=decode, prefill_tokens=prefill, activations=activations)
            for decode, prefill, activations in zip(
                self.decode.tolist(), self.prefill.tolist(), self.activations.tolist(), strict=True
            )
        ]
        return pb.ReportLoadRequest(member_id=member_id, layers=layers)
