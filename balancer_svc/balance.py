"""How even the load is, and what was done about it: the numbers that metrics, status and watchers are given.

Owns the account: evenness by phase, the hottest experts, moves and their bytes, the last decision and when it was.
L layers, E experts, W workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from balancer_svc.costs import Costs
from balancer_svc.load_windows import Window
from balancer_svc.model import Model
from balancer_svc.rebalancing import has_even_layers, to_experts
from collegium.balancing.fleet import Floats, max_over_mean
from collegium.fabric.metrics import series
from collegium.model.placement import LayerSize, Placement
from collegium.v1 import balancer_pb2 as pb

_NUM_HOTTEST = 8
_PHASES = ("decode", "prefill")


class Account:
    """Written by the balancer's loop."""

    def __init__(self, now_s: float) -> None:
        self.decision = "the load has not been looked at yet"
        self._began_s = now_s
        self._moved_s: float | None = None  # when a plan that moved something came into force
        self._num_moves = self._num_bytes = 0
        self._pending: tuple[int, int, int] = (0, 0, 0)  # epoch, moves and bytes of the plan that is under way
        self._evenness: dict[str, pb.Evenness] = {}
        self._hottest: list[pb.ExpertLoad] = []

    def decide(self, decision: str) -> None:
        """Note what a look at the load came to."""
        self.decision = decision

    def plan(self, plan: Placement, in_force: Placement, layers: Sequence[LayerSize]) -> None:
        """Note what a plan will move, against what is in force."""
        if not in_force.epoch:
            return  # the first homes are no moves
        before = {
            (layer, expert, in_force.worker_ids[w])
            for layer, row in enumerate(in_force.homes)
            for expert, homes in enumerate(row)
            for w in homes
        }
        moves = num_bytes = 0
        for layer, row in enumerate(plan.homes):
            for expert, homes in enumerate(row):
                new = sum((layer, expert, plan.worker_ids[w]) not in before for w in homes)
                moves += new
                num_bytes += new * layers[layer].expert_bytes
        self._pending = (plan.epoch, moves, num_bytes)

    def publish(self, placement: Placement, now_s: float) -> None:
        """Note that a plan came into force."""
        epoch, moves, num_bytes = self._pending
        if epoch == placement.epoch and moves:
            self._num_moves += moves
            self._num_bytes += num_bytes
            self._moved_s = now_s

    def measure(self, model: Model | None, placement: Placement, windows: Sequence[Window]) -> None:
        """Work out how even the newest window is under the placement in force."""
        self._evenness, self._hottest = {}, []
        if not windows or model is None or not placement.worker_ids or not has_even_layers(model.layers):
            return
        window = windows[-1]
        if window.decode.shape != (len(model.layers), model.layers[0].num_experts):
            return
        experts = to_experts(placement, placement.worker_ids, model.layers)
        speeds = np.ones(len(placement.worker_ids))
        for phase, counts in zip(_PHASES, (window.decode, window.prefill), strict=True):
            counted = np.flatnonzero(counts.sum(1))
            if counted.size:
                even = 1.0 / max_over_mean(experts[counted], counts[counted].astype(np.float64), speeds)
                self._evenness[phase] = _evenness(even)
        shares = window.tokens / np.maximum(window.tokens.sum(1, keepdims=True), 1)  # [L, E]
        for at in np.argsort(-shares, axis=None, kind="stable")[:_NUM_HOTTEST].tolist():
            layer, expert = divmod(at, shares.shape[1])
            self._hottest.append(pb.ExpertLoad(layer=layer, expert=expert, share=float(shares[layer, expert])))

    def counters(self, now_s: float) -> Mapping[str, float]:
        """Give the numbers by series."""
        counts = {
            series("collegium_moves_total"): float(self._num_moves),
            series("collegium_moved_bytes_total"): float(self._num_bytes),
            series("collegium_seconds_since_plan"): now_s - (self._began_s if self._moved_s is None else self._moved_s),
        }
        for phase, even in self._evenness.items():
            for statistic, value in (("min", even.min), ("p50", even.p50), ("mean", even.mean)):
                counts[series("collegium_expert_balancedness", phase=phase, statistic=statistic)] = value
        return counts

    def to_message(
        self,
        now_s: float,
        *,
        costs: Costs,
        num_windows: int,
        is_leader: bool,
        has_memory: bool,
        retiring: Sequence[str] = (),
    ) -> pb.Balance:
        """Write the account."""
        return pb.Balance(
            decode=self._evenness.get("decode"),
            prefill=self._evenness.get("prefill"),
            num_windows=num_windows,
            since_plan_ms=-1 if self._moved_s is None else round((now_s - self._moved_s) * 1e3),
            last_decision=self.decision,
            moves=self._num_moves,
            moved_bytes=self._num_bytes,
            row_ns=costs.row_s * 1e9 if costs.is_measured else 0.0,
            activation_ns=costs.activation_s * 1e9 if costs.is_measured else 0.0,
            is_leader=is_leader,
            has_memory=has_memory,
            hottest=self._hottest,
            retiring=retiring,
        )


def _evenness(even: Floats) -> pb.Evenness:
    return pb.Evenness(min=float(even.min()), p50=float(np.median(even)), mean=float(even.mean()))
