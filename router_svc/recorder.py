"""Record which experts the gates chose for running sequences, for whoever listens.

Owns a step's choices until the step is committed: one that is computed again is told once, and so is a position that a
preempted sequence computes anew. Belongs to the engine's thread. Without a listener nothing is kept.
T rows, K top-k.
"""

import numpy as np
from numpy.typing import NDArray

from collegium.fabric import logs
from router_svc.choices import LayerChoices, Listeners, StepChoices
from router_svc.expert_calls import OnLayer
from router_svc.step import Step

_log = logs.get("recorder")


class Recorder:
    """Hands committed steps' choices to listeners."""

    def __init__(self, listeners: Listeners) -> None:
        """Tell these, who come and go meanwhile."""
        self._listeners = listeners
        self._rows: list[int] | None = None  # rows of the step at hand that nobody was told of; None: nobody listens
        self._layers: list[LayerChoices] = []

    def begin(self, step: Step) -> OnLayer | None:
        """Forget what was not committed and say who takes each layer of this step; None where nobody listens."""
        self._rows, self._layers = None, []
        if not len(self._listeners):
            return None
        self._rows = []
        at = 0
        for row in step.rows:
            first = max(row.begin, row.sequence.num_recorded)
            if not row.beam:  # of several, the best one's: a position is told once
                self._rows += range(at + first - row.begin, at + row.num_rows)
            at += row.num_rows
        return self._note

    def commit(self, step: Step, num_step: int) -> None:
        """Tell the listeners of a step that is now in the cache."""
        if not self._rows:
            return
        try:
            choices = self._choices_of(step, num_step)
        except Exception:  # a trace lacks a step: that is no reason to spoil the step itself
            _log.exception("the choices of a step could not be told")
            return
        finally:
            self._rows, self._layers = None, []
        self._listeners.tell(choices)

    def _choices_of(self, step: Step, num_step: int) -> StepChoices:
        sequences: list[int] = []
        positions: list[int] = []
        num_decode_rows = 0
        for idx, row in enumerate(step.rows):
            if row.beam:
                continue
            new = range(max(row.begin, row.sequence.num_recorded), row.end)
            sequences += [row.sequence.number] * len(new)
            positions += new
            num_decode_rows += len(new) if idx < len(step.decodes) else 0
            row.sequence.num_recorded = max(row.end, row.sequence.num_recorded)
        return StepChoices(
            step=num_step,
            sequences=sequences,
            positions=positions,
            num_decode_rows=num_decode_rows,
            layers=self._layers,
        )

    def _note(
        self, layer: int, ids: NDArray[np.int64], weights: NDArray[np.float32], missed: NDArray[np.uint16]
    ) -> None:
        if self._rows is None:
            return
        try:
            rank = np.argsort(-weights[self._rows], axis=1, kind="stable")  # gates give the ids in any order
            choices = LayerChoices(
                layer=layer,
                ids=np.take_along_axis(ids[self._rows], rank, axis=1),
                weights=np.take_along_axis(weights[self._rows], rank, axis=1),
                missed=missed,
            )
        except Exception:
            _log.exception("the choices of a layer could not be recorded; nobody is told of the step", layer=layer)
            self._rows, self._layers = None, []
            return
        self._layers.append(choices)
