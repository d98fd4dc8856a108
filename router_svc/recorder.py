"""Record which experts the gates chose for running sequences and for their sources, for whoever listens.

Owns a step's choices until the step is committed: one that is computed again is told once, and so is a position that a
preempted sequence computes anew. Belongs to the engine's thread. Without a listener nothing is kept.
T rows, K top-k.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from collegium.fabric import logs
from router_svc.choices import LayerChoices, Listeners, StepChoices
from router_svc.expert_calls import OnLayer
from router_svc.step import Step

_log = logs.get("recorder")


@dataclass(frozen=True, slots=True)
class Hearing:
    """Who is told of the layers of a step: of its rows, and of the sources that are encoded before them."""

    of_rows: OnLayer
    of_sources: OnLayer


class Recorder:
    """Hands committed steps' choices to listeners."""

    def __init__(self, listeners: Listeners) -> None:
        """Tell these, who come and go meanwhile."""
        self._listeners = listeners
        self._is_heard = False  # whether somebody listens to the step at hand, and nothing failed
        self._rows: list[int] = []  # those of the step at hand that nobody was told of
        self._layers: list[LayerChoices] = []
        self._source_layers: dict[int, list[LayerChoices]] = {}  # by layer; more than one where the rows are many

    def begin(self, step: Step) -> Hearing | None:
        """Forget what was not committed and say who takes each layer of this step; None where nobody listens."""
        self._forget()
        if not len(self._listeners):
            return None
        self._is_heard = True
        at = 0
        for row in step.rows:
            first = max(row.begin, row.sequence.num_recorded)
            if not row.beam:  # of several, the best one's: a position is told once
                self._rows += range(at + first - row.begin, at + row.num_rows)
            at += row.num_rows
        return Hearing(self._note, self._note_source)

    def commit(self, step: Step, num_step: int) -> None:
        """Tell the listeners of a step that is now in the cache."""
        if not self._is_heard:
            return
        try:
            told = [self._choices_of_sources(step, num_step), self._choices_of(step, num_step)]
        except Exception:  # a trace lacks a step: that is no reason to spoil the step itself
            _log.exception("the choices of a step could not be told")
            return
        finally:
            self._forget()
        for choices in told:
            if choices.sequences:
                self._listeners.tell(choices)

    def _forget(self) -> None:
        self._is_heard, self._rows, self._layers, self._source_layers = False, [], [], {}

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

    def _choices_of_sources(self, step: Step, num_step: int) -> StepChoices:
        """Of the sources that this step encoded, those that were not told before."""
        sequences: list[int] = []
        positions: list[int] = []
        kept: list[int] = []
        at = 0
        for row in step.rows:
            if not row.encodes:
                continue
            if not row.sequence.is_source_recorded:
                sequences += [row.sequence.number] * row.num_source
                positions += range(row.num_source)
                kept += range(at, at + row.num_source)
                row.sequence.is_source_recorded = True
            at += row.num_source
        return StepChoices(
            step=num_step,
            sequences=sequences,
            positions=positions,
            num_decode_rows=0,
            layers=[_joined(parts, kept) for parts in self._source_layers.values()] if kept else [],
            is_of_sources=True,
        )

    def _note(
        self, layer: int, ids: NDArray[np.int64], weights: NDArray[np.float32], missed: NDArray[np.uint16]
    ) -> None:
        choices = self._ranked(layer, ids, weights, missed, self._rows)
        if choices is not None:
            self._layers.append(choices)

    def _note_source(
        self, layer: int, ids: NDArray[np.int64], weights: NDArray[np.float32], missed: NDArray[np.uint16]
    ) -> None:
        choices = self._ranked(layer, ids, weights, missed, range(len(ids)))
        if choices is not None:
            self._source_layers.setdefault(layer, []).append(choices)

    def _ranked(
        self,
        layer: int,
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        missed: NDArray[np.uint16],
        rows: Seq[int],
    ) -> LayerChoices | None:
        if not self._is_heard:
            return None
        try:
            rank = np.argsort(-weights[rows], axis=1, kind="stable")  # gates give the ids in any order
            return LayerChoices(
                layer=layer,
                ids=np.take_along_axis(ids[rows], rank, axis=1),
                weights=np.take_along_axis(weights[rows], rank, axis=1),
                missed=missed,
            )
        except Exception:
            _log.exception("the choices of a layer could not be recorded; nobody is told of the step", layer=layer)
            self._forget()
            return None


def _joined(parts: Seq[LayerChoices], rows: Seq[int]) -> LayerChoices:
    """Put the calls of a layer together, and keep `rows`."""
    return LayerChoices(
        layer=parts[0].layer,
        ids=np.concatenate([one.ids for one in parts])[rows],
        weights=np.concatenate([one.weights for one in parts])[rows],
        missed=np.unique(np.concatenate([one.missed for one in parts])),
    )
