"""Compute a step's logits: the model's forward pass over all rows, whole or in micro-batches that take turns.

Owns the KV cache's tensors, the choice of micro-batches and the step's span. A pass changes nothing but cached rows
that are not committed, so it can be repeated. Knows nothing of sampling, or of what becomes of a step that fails.
"""

import functools
import itertools
import time
from collections.abc import Sequence as Seq

import torch
from opentelemetry.trace import Span, StatusCode
from torch import Tensor

from collegium.fabric import tracing
from router_svc.expert_calls import ExpertCalls, OnLayer
from router_svc.kv_blocks import BLOCK_TOKENS
from router_svc.micro_batches import MicroBatching
from router_svc.paged_attention import PagedCache, SourceRun, StepIndex
from router_svc.recorder import Hearing
from router_svc.router_model import RouterModel
from router_svc.sequence import Sequence
from router_svc.sequence_life import SequenceLife
from router_svc.step import Row, Step
from router_svc.step_logits import StepLogits
from router_svc.totals import EngineTotals
from router_svc.turns import by_turns
from router_svc.unsafe_routing import UnsafeRouting

_TRACED_DECODES = 64  # of a sampled request's decode steps, one in so many gets spans: a dozen and more for each


class ForwardPass:
    """Owned by the engine's thread."""

    def __init__(
        self,
        model: RouterModel,
        calls: ExpertCalls,
        totals: EngineTotals,
        *,
        num_blocks: int,
        num_micro_batches: int,
        unsafe_routing: UnsafeRouting | None,
        most_rows: int,
    ):
        """num_micro_batches: into how many parts every step is split; 0: as measured. most_rows: that links take."""
        self._most_rows = most_rows
        self._model, self._calls, self._totals = model, calls, totals
        self._cache = PagedCache(model.cache_shapes, num_blocks, model.dtype, model.device)
        self._micro_batching = MicroBatching(num_micro_batches)
        self._unsafe_routing = unsafe_routing
        calls.shared = model.shared_experts()
        if unsafe_routing is not None and model.both is not None:
            raise ValueError("routing cannot be played on a model with an encoder")
        if unsafe_routing is None:
            model.set_expert_call(calls.compute, calls.compute_step)
        else:
            model.set_expert_call(unsafe_routing.played(calls.compute))

    def compute(self, step: Step, num_step: int, hearing: Hearing | None) -> StepLogits:
        """Compute a step's logits; hearing: told of each layer's choices, None if nobody listens."""
        keep, spans = step.kept_rows()
        self._calls.on_layer = None if hearing is None else hearing.of_rows
        num_parts = 1
        # What listens to routing or plays it takes steps whole.
        if hearing is None and self._unsafe_routing is None and not step.num_source_rows:
            num_parts = self._micro_batching.choose(step.num_rows, has_prompts=bool(step.chunks))
        began_s, blocked_s = time.monotonic(), self._calls.totals.blocked_s
        span = self._trace(step, num_step)
        try:
            parts = step.split(num_parts) if num_parts > 1 else [step]
            logits = self.run(step, parts, keep, num_step, None if hearing is None else hearing.of_sources)
        except Exception as error:
            if span is not None:
                span.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            self._calls.end()
            self._calls.trace("")
            if span is not None:
                span.end()
        seconds = time.monotonic() - began_s
        if not step.num_source_rows:  # which are no part of what it compares
            self._micro_batching.note(
                step.num_rows,
                has_prompts=bool(step.chunks),
                num_parts=num_parts,
                seconds=seconds,
                blocked_s=self._calls.totals.blocked_s - blocked_s,
            )
        self._totals.forward_seconds += seconds
        self._totals.micro_batches += num_parts
        return StepLogits(logits=logits, spans=spans, began_s=began_s, seconds=seconds)

    def copy_blocks(self, copies: Seq[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each."""
        self._cache.copy_blocks(copies)

    def check(self, row: Row) -> None:
        """Look at what a step has stored for a sequence, before others may share it. Raises UnusableRowsError.

        A single row that reaches the end is not looked at: its logits are.
        """
        if not (row.sequence.has_ended or (row.num_rows == 1 and row.reaches_end)):
            self._cache.check(row)

    def run(
        self, step: Step, parts: Seq[Step], keep: list[int], num_step: int, on_source_layer: OnLayer | None = None
    ) -> Tensor:
        """Compute a step in parts: logits of its rows in `keep`, of its first row where that is empty."""
        if self._unsafe_routing is not None:
            self._unsafe_routing.begin([(row.sequence.request_id, row.begin, row.end) for row in step.rows])
        tokens = [[t for row in part.rows for t in row.token_ids] for part in parts]
        self._calls.begin(num_step, [(ids, len(part.decodes)) for ids, part in zip(tokens, parts, strict=True)])
        indexes = [StepIndex(part.decodes, part.chunks, self._model.device) for part in parts]

        def compute(idx: int, kept: list[int]) -> Tensor:
            input_ids = torch.tensor([tokens[idx]], device=self._model.device)
            rows = torch.tensor(kept or [0], device=self._model.device)
            return self._model.forward(input_ids, indexes[idx].positions, self._cache, rows)

        if step.num_source_rows:
            with self._calls.sources(on_source_layer):
                self._model.encode(_sources(step), self._cache, self._most_rows)
        if len(parts) == 1:
            self._cache.begin(indexes[0])
            return compute(0, keep)

        def enter(idx: int) -> None:
            self._cache.begin(indexes[idx])
            self._calls.enter(idx)

        starts = [0, *itertools.accumulate(part.num_rows for part in parts)]
        kept = [[row - first for row in keep if first <= row < last] for first, last in itertools.pairwise(starts)]
        logits = by_turns([functools.partial(compute, idx, rows) for idx, rows in enumerate(kept)], enter)
        wanted = [one for one, rows in zip(logits, kept, strict=True) if rows]
        return torch.cat(wanted) if wanted else logits[0]

    def _trace(self, step: Step, num_step: int) -> Span | None:
        """Open the span of a step that sampled sequences have rows in: under the first one's, linked to the others'."""
        if not tracing.is_tracing():
            return None
        sampled = [row.sequence for row in step.rows if row.sequence.life is not None and row.sequence.life.traceparent]
        due = [one for one in sampled if one.life is not None and _is_due(one, one.life)]
        if not due or due[0].life is None:
            return None
        for one in sampled:
            if one.life is not None:  # it is linked to this step, and needs none of its own for a while
                one.life.traced_tokens = len(one.output_ids)
        span = tracing.start_span(
            "router.step",
            traceparent=due[0].life.traceparent,
            attributes={
                "collegium.step": num_step,
                "collegium.rows": step.num_rows,
                "collegium.sequences": len(step.rows),
                "collegium.kind": step.kind,
            },
            links=[one.life.span for one in sampled if one is not due[0] and one.life and one.life.span],
        )
        self._calls.trace(tracing.traceparent_of(span))
        return span


def _sources(step: Step) -> list[SourceRun]:
    """The sources that a step encodes."""
    return [
        SourceRun(
            token_ids=row.sequence.source_ids,
            slots=[
                row.source_blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS for at in range(row.num_source)
            ],
        )
        for row in step.rows
        if row.encodes
    ]


def _is_due(sequence: Sequence, life: SequenceLife) -> bool:
    return not sequence.is_decoding or len(sequence.output_ids) >= life.traced_tokens + _TRACED_DECODES
