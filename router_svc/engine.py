"""The engine: one thread that forms steps, computes them, samples, and reports what is new.

Owns the scheduler, the KV cache and every sequence; others reach it through a queue of commands and a callback. A step
is pure until it is committed, so a step whose experts could not be had is computed again, and one that a request spoils
is computed again by halves, until those who spoil it are alone. Whatever fails for one request, at whatever point, ends
that request and nobody else's.
"""

import functools
import itertools
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from opentelemetry.trace import Span, StatusCode
from torch import Tensor

from collegium.fabric import logs, tracing
from collegium.model.sampling import SampleRow, TokenCounts, TokenLogprobs, UnusableLogitsError, sample, token_logprobs
from router_svc.expert_calls import ExpertCalls, ExpertFailedError, ExpertsUnavailableError
from router_svc.kv_blocks import BlockPool
from router_svc.micro_batches import MicroBatching
from router_svc.model_loader import RouterModel
from router_svc.news import Deliver, Failure, Load, News, NewsBoard
from router_svc.pace import StepPace
from router_svc.paged_attention import PagedCache, StepIndex
from router_svc.recorder import Recorder
from router_svc.scheduler import Row, Scheduler, Step
from router_svc.sequence import Finish, Sequence
from router_svc.sequence_life import SequenceLife
from router_svc.turns import by_turns
from router_svc.unsafe_routing import UnsafeRouting

_log = logs.get("engine")

_RETRY_S = 0.05  # pause before a step is computed again that found no worker
_IDLE_S = 1.0
_TRACED_DECODES = 64  # of a sampled request's decode steps, one in so many gets spans: such a step takes the long way


Ref = tuple[str, int | None]  # a request, and one choice of it or all


@dataclass(frozen=True, slots=True, kw_only=True)
class _Command:
    """Something for the engine's thread to do, and how to end whom it was about if that fails."""

    name: str
    run: Callable[[], object]
    give_up: Callable[[Failure], object]


@dataclass(slots=True)
class _Request:
    """The live choices of a request, and the tokens that it was submitted with."""

    num_tokens: int
    sequences: list[Sequence] = field(default_factory=list)


@dataclass(slots=True)
class EngineTotals:
    """Counters since the start; written by the engine's thread alone."""

    steps: dict[str, int] = field(default_factory=lambda: {"decode": 0, "prefill": 0, "mixed": 0})
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    step_seconds: float = 0.0
    forward_seconds: float = 0.0  # of step_seconds, all but sampling and bookkeeping
    micro_batches: int = 0
    refused: Counter[str] = field(default_factory=Counter[str])  # submissions, by reason


_UNUSABLE_LOGITS = Failure(
    code="INTERNAL", reason="UNUSABLE_LOGITS", message="the model gave no usable scores (NaN or infinite)"
)


class Engine:
    """Grows sequences until told to stop."""

    def __init__(
        self,
        model: RouterModel,
        calls: ExpertCalls,
        deliver: Deliver,
        *,
        num_blocks: int,
        max_batch_tokens: int,
        max_num_seqs: int,
        num_threads: int,
        expert_wait_s: float = 30.0,
        on_end: Callable[[], None] = lambda: None,
        unsafe_routing: UnsafeRouting | None = None,
        num_micro_batches: int = 0,
        max_queued_seqs: int = 65_536,
        max_queued_tokens: int = 16_777_216,
        shared_step_s: float = 0.0,
    ):
        """Make an engine; `start` starts it.

        `deliver` is called from the engine's thread, once per owner and step; `on_end` when the thread ends.
        `expert_wait_s`: how long a step waits for any worker before its sequences fail. `num_micro_batches`: into how
        many parts every step is split; 0: as measured. `max_queued_seqs`, `max_queued_tokens`: choices, and tokens of
        their prompts, that the engine holds at once; submissions beyond are refused. `shared_step_s`: how long a step
        with prompts should take at most while several callers are served; 0: any time.
        """
        self._model, self._calls, self._deliver = model, calls, deliver
        self._pool = BlockPool(num_blocks)
        self._cache = PagedCache(model.cache_shapes, num_blocks, model.dtype, model.device)
        self._scheduler = Scheduler(self._pool, max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)
        self._num_threads, self._expert_wait_s = num_threads, expert_wait_s
        self._on_end = on_end
        self._is_idle = threading.Event()  # no sequence is left, waits to be taken, or has news to be told
        self._is_idle.set()
        self._by_key: dict[tuple[int, str, int], Sequence] = {}
        self._requests: dict[tuple[int, str], _Request] = {}
        self._num_tokens = 0  # of all requests
        self._max_queued_seqs, self._max_queued_tokens = max_queued_seqs, max_queued_tokens
        self._nearest_s = float("inf")  # no deadline is before it
        self._counts: dict[Sequence, TokenCounts] = {}
        self._commands: deque[_Command] = deque()
        self._wakeup = threading.Condition()
        self._is_stopping = self._has_ended = False
        self._news = NewsBoard(lambda owner, news, load, step: self._deliver(owner, news, load, step))
        self._has_logged = False  # whether the step at hand has told of a fault
        self._retry_until_s = 0.0  # until when the step at hand is computed again by halves; 0: no fault so far
        self._num_submitted = 0
        self.totals = EngineTotals()
        self.num_step = 0
        self.error: BaseException | None = None
        self.recorder = Recorder()
        self._unsafe_routing = unsafe_routing
        self._micro_batching = MicroBatching(num_micro_batches)
        self._pace = StepPace(shared_step_s, max_batch_tokens)
        calls.shared = model.shared_experts()
        if unsafe_routing is None:
            model.set_expert_call(calls.compute, calls.compute_step)
        else:
            model.set_expert_call(unsafe_routing.played(calls.compute))
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End after the step at hand."""
        self._is_stopping = True
        self.call(lambda: None)
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def wait_idle(self, timeout_s: float) -> bool:
        """Block until every sequence that was submitted has ended and its end was delivered, or the time is over.

        Returns whether it is idle.
        """
        return self._is_idle.wait(timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def attach(self, owner: int) -> None:
        """Begin to report to an owner; the first report, empty but for the load, comes at once."""
        self._post(
            _Command(
                name="attach",
                run=lambda: self._news.open(owner, self.load()),
                give_up=lambda failure: self._detach(owner),
            )
        )

    def detach(self, owner: int) -> None:
        """End all of an owner's sequences and report to it no more."""
        self._post(
            _Command(name="detach", run=lambda: self._detach(owner), give_up=lambda failure: self._detach(owner))
        )

    def submit(self, sequences: Seq[Sequence]) -> None:
        """Take the choices of one request."""
        self._post(
            _Command(
                name="submit",
                run=lambda: self._submit(sequences),
                give_up=lambda failure: self._end_all([s for s in sequences if not s.has_ended], failure),
            ),
            is_work=True,
        )

    def cancel(self, owner: int, request_id: str, choice_index: int | None = None) -> None:
        """End a request, or one choice, with Finish.CANCELLED; its blocks are free before the next step."""
        self.cancel_all(owner, [(request_id, choice_index)])

    def cancel_all(self, owner: int, refs: Seq[Ref]) -> None:
        """End several requests or choices of an owner; those that are not known are passed over."""
        self._post_refs("cancel", owner, refs, lambda s: self._end(s, Finish.CANCELLED))

    def pause(self, owner: int, request_id: str, choice_index: int | None, is_paused: bool) -> None:
        """Hold a request's state and compute nothing, or go on."""
        self.pause_all(owner, [(request_id, choice_index)], is_paused=is_paused)

    def pause_all(self, owner: int, refs: Seq[Ref], *, is_paused: bool) -> None:
        """Hold several requests or choices of an owner, or let them go on; those not known are passed over."""
        name = "pause" if is_paused else "unpause"
        self._post_refs(name, owner, refs, lambda s: self._scheduler.pause(s, is_paused=is_paused))

    def call(self, run: Callable[[], object]) -> None:
        """Have something called from the engine's thread, after what was asked for before."""
        self._post(_Command(name="call", run=run, give_up=lambda failure: None))

    @property
    def num_commands(self) -> int:
        """What others asked for and the engine's thread has not begun."""
        return len(self._commands)

    def load(self) -> Load:
        """How busy it is; exact from the engine's thread, approximate from others."""
        scheduler = self._scheduler
        return Load(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            waiting_tokens=scheduler.num_waiting_tokens,
            free_blocks=self._pool.num_free,
            total_blocks=self._pool.num_blocks,
        )

    @property
    def num_preemptions(self) -> int:
        """Sequences that gave up their blocks to others."""
        return self._scheduler.num_preemptions

    @property
    def num_shortened(self) -> int:
        """Steps that had fewer prompt rows because several callers are served."""
        return self._scheduler.num_shortened

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the cache."""
        return self._scheduler.num_cached_tokens

    @property
    def num_sequences(self) -> int:
        """Sequences known."""
        return len(self._by_key)

    def _post_refs(self, name: str, owner: int, refs: Seq[Ref], run: Callable[[Sequence], object]) -> None:
        """Post what is to be done with each live choice that is named."""
        if refs:
            self._post(
                _Command(
                    name=name,
                    run=lambda: self._obey_refs(name, owner, refs, run),
                    give_up=lambda failure: [self._end_all(self._of(owner, *ref), failure) for ref in refs],
                )
            )

    def _obey_refs(self, name: str, owner: int, refs: Seq[Ref], run: Callable[[Sequence], object]) -> None:
        for request_id, choice_index in refs:
            for sequence in self._of(owner, request_id, choice_index):
                try:
                    run(sequence)
                except Exception as error:
                    _log.exception("a command failed", command=name, request_id=request_id)
                    self._end(sequence, None, _command_failed(name, error))

    def _post(self, command: _Command, *, is_work: bool = False) -> None:
        with self._wakeup:
            if is_work and not self._has_ended:
                self._is_idle.clear()
            self._commands.append(command)
            self._wakeup.notify()

    # --- the engine's thread ---

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while not self._is_stopping:
                    self._turn()
        except BaseException as error:
            self.error = error
            _log.exception("the engine has died")
            raise
        finally:
            with self._wakeup:
                self._has_ended = True
                self._is_idle.set()  # nothing will come of what is left
            self._on_end()

    def _turn(self) -> None:
        for _ in range(len(self._commands)):  # those that come meanwhile have the next turn
            self._obey(self._commands.popleft())
        self._expire(time.monotonic())
        step = self._schedule()
        if step is None:
            self._flush()
            with self._wakeup:
                if not self._commands:
                    if not self._by_key:
                        self._is_idle.set()
                    if not self._is_stopping:
                        self._wakeup.wait(self._idle_s())
            return
        self.num_step += 1
        began = time.monotonic()
        self._has_logged, self._retry_until_s = False, 0.0
        self._compute_or_wait(step)
        self.totals.step_seconds += time.monotonic() - began
        self._flush()

    def _obey(self, command: _Command) -> None:
        try:
            command.run()
        except Exception as error:
            _log.exception("a command failed", command=command.name)
            try:
                command.give_up(_command_failed(command.name, error))
            except Exception:
                _log.exception("what a command was about could not be ended", command=command.name)

    def _schedule(self) -> Step | None:
        """Form the next step. A sequence that makes this fail is ended."""
        while True:
            try:
                return self._scheduler.schedule(self._pace.max_rows)
            except Exception as error:
                culprit = self._scheduler.at_hand
                if culprit is None or culprit.has_ended:
                    raise
                _log.exception("a step could not be formed", request_id=culprit.request_id)
                self._end(culprit, None, _step_failed(error))

    def _compute_or_wait(self, step: Step) -> None:
        """Compute a step and take its tokens; if it fails, compute its halves, down to single sequences.

        So a step that one of its sequences spoils costs at most two more steps' rows. One that fails whatever is left
        out costs log2(n) more for n sequences, and at most the time that steps may wait for experts.
        """
        try:
            logits, spans, began_s = self._compute(step)
        except ExpertsUnavailableError as error:
            self._wait_for_experts(step, error)
            return
        except Exception as error:
            if not isinstance(error, ExpertFailedError):
                self._log_fault(num_rows=step.num_rows)
            failure = _step_failed(error)
        else:
            self._settle(step, logits, spans, began_s)
            return
        # Not where the error is caught: its traceback holds the tensors of the step, and there may be no room for more.
        self._retry_until_s = self._retry_until_s or time.monotonic() + self._expert_wait_s
        if len(step.rows) == 1 or self._is_stopping or time.monotonic() > self._retry_until_s:
            self._end_all([row.sequence for row in step.rows], failure)
            return
        for half in step.halves():
            self._compute_or_wait(half)

    def _log_fault(self, **fields: object) -> None:
        """Log the fault at hand with its traceback, if it is the first one of the step."""
        if not self._has_logged:
            self._has_logged = True
            _log.exception("a step failed", **fields)

    def _wait_for_experts(self, step: Step, error: ExpertsUnavailableError) -> None:
        now = time.monotonic()
        message = f"{error} (waited {self._expert_wait_s:g} s); see that expert workers run and reach the balancer"
        for row in step.rows:
            since = row.sequence.stalled_since_s = row.sequence.stalled_since_s or now
            if now - since > self._expert_wait_s:
                self._end(row.sequence, None, Failure(code="UNAVAILABLE", reason="NO_EXPERT_WORKER", message=message))
        with self._wakeup:
            self._wakeup.wait(_RETRY_S)

    def _compute(self, step: Step) -> tuple[Tensor, dict[Sequence, tuple[int, int]], float]:
        """Compute a step's logits. Changes nothing but cached rows that are not committed, so it can be repeated.

        Returns the logits of the rows that were kept, where each sequence's lie among them, and when it began.
        """
        keep, spans = _kept_rows(step)
        self._calls.on_layer = self.recorder.begin(step)
        num_parts = 1
        # What listens to routing or plays it takes steps whole.
        if self._calls.on_layer is None and self._unsafe_routing is None:
            num_parts = self._micro_batching.choose(step.num_rows, has_prompts=bool(step.chunks))
        began_s, blocked_s = time.monotonic(), self._calls.totals.blocked_s
        span = self._trace(step)
        try:
            logits = self._forward(step, step.split(num_parts) if num_parts > 1 else [step], keep)
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
        self._pace.note(step.num_rows, has_prompts=bool(step.chunks), seconds=seconds)
        self._micro_batching.note(
            step.num_rows,
            has_prompts=bool(step.chunks),
            num_parts=num_parts,
            seconds=seconds,
            blocked_s=self._calls.totals.blocked_s - blocked_s,
        )
        self.totals.forward_seconds += seconds
        self.totals.micro_batches += num_parts
        return logits, spans, began_s

    def _settle(self, step: Step, logits: Tensor, spans: dict[Sequence, tuple[int, int]], began_s: float) -> None:
        """Commit a step and take what its logits say; whom that fails for ends alone."""
        for row in step.rows:
            try:
                self._scheduler.commit_row(row)
                row.sequence.stalled_since_s = None
                if row.sequence.life is not None:
                    row.sequence.life.begin(began_s)
            except Exception as error:
                self._spoil(row.sequence, error)
        self.recorder.commit(step, self.num_step)
        self.totals.steps[step.kind] += 1
        self.totals.prefilled_tokens += sum(row.num_rows for row in step.chunks)
        for row in step.rows:
            if row.sequence.is_score and not row.sequence.has_ended:
                try:
                    self._score(row, logits, spans)
                except Exception as error:
                    self._spoil(row.sequence, error)
        due = [row for row in step.rows if row.reaches_end and not (row.sequence.is_score or row.sequence.has_ended)]
        self._sample(due, logits, spans)

    def _spoil(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence for which something failed that is no other's."""
        self._log_fault(request_id=sequence.request_id)
        self._end(sequence, None, _step_failed(error))

    def _forward(self, step: Step, parts: Seq[Step], keep: list[int]) -> Tensor:
        """Compute a step in parts: logits of its rows in `keep`, of its first row where that is empty."""
        if self._unsafe_routing is not None:
            self._unsafe_routing.begin(step)
        tokens = [[t for row in part.rows for t in row.sequence.tokens(row.begin, row.end)] for part in parts]
        self._calls.begin(self.num_step, [(ids, len(part.decodes)) for ids, part in zip(tokens, parts, strict=True)])
        indexes = [StepIndex(part, self._model.device) for part in parts]

        def compute(idx: int, kept: list[int]) -> Tensor:
            input_ids = torch.tensor([tokens[idx]], device=self._model.device)
            rows = torch.tensor(kept or [0], device=self._model.device)
            return self._model.forward(input_ids, indexes[idx].positions, self._cache, rows)

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

    def _sample(self, rows: list[Row], logits: Tensor, spans: dict[Sequence, tuple[int, int]]) -> None:
        """Draw a token for each row's sequence; rows for which that fails are tried by halves."""
        if not rows:
            return
        sequences = [row.sequence for row in rows]
        at = [spans[sequence][0] for sequence in sequences]
        try:
            chosen = logits if at == list(range(logits.shape[0])) else logits[at]
            sampled = sample(chosen, [self._sample_row(sequence) for sequence in sequences])
        except UnusableLogitsError as error:
            for idx in error.row_idxs:
                self._end(sequences[idx], None, _UNUSABLE_LOGITS)
            self._sample([row for idx, row in enumerate(rows) if idx not in error.row_idxs], logits, spans)
            return
        except Exception as error:
            if len(rows) == 1:
                self._spoil(sequences[0], error)
                return
            self._log_fault(num_rows=len(rows))
            middle = len(rows) // 2
            self._sample(rows[:middle], logits, spans)
            self._sample(rows[middle:], logits, spans)
            return
        for sequence, token, logprobs in zip(sequences, sampled.token_ids, sampled.logprobs, strict=True):
            try:
                self._take(sequence, token, logprobs)
            except Exception as error:
                self._spoil(sequence, error)

    def _take(self, sequence: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        sequence.append(token)
        if sequence.life is not None:
            sequence.life.token()
        if sequence in self._counts:
            self._counts[sequence].add(token)
        self.totals.generated_tokens += 1
        news = self._news.tell(sequence)
        news.token_ids.append(token)
        if logprobs is not None:
            news.logprobs.append(logprobs)
        if sequence.has_ended:
            self._end(sequence, sequence.finish)

    def _score(self, row: Row, logits: Tensor, spans: dict[Sequence, tuple[int, int]]) -> None:
        sequence = row.sequence
        begin, end = spans[sequence]
        nexts = sequence.prompt_ids[row.begin + 1 : row.end + 1]
        skip = max(0, sequence.num_scored - row.begin)
        if nexts[skip:]:
            scored = token_logprobs(logits[begin + skip : end], nexts[skip:], sequence.num_logprobs or 0)
            if any(math.isnan(one.chosen) for one in scored):
                self._end(sequence, None, _UNUSABLE_LOGITS)
                return
            self._news.tell(sequence).logprobs += scored
            sequence.num_scored = row.begin + len(nexts)
        if row.reaches_end:
            self._end(sequence, Finish.STOP)

    def _sample_row(self, sequence: Sequence) -> SampleRow:
        return SampleRow(
            params=sequence.sampling,
            position=len(sequence.output_ids),
            choice_index=sequence.choice_index,
            tokens=self._counts_of(sequence) if sequence.sampling.has_penalties else None,
            banned_ids=sequence.banned_ids(),
            num_logprobs=sequence.num_logprobs,
        )

    def _counts_of(self, sequence: Sequence) -> TokenCounts:
        """Find or make the counts of a sequence. What a prompt costs in them, its choices share."""
        counts = self._counts.get(sequence)
        if counts is None:
            siblings = self._of(sequence.owner, sequence.request_id, None)
            like = next((self._counts[one] for one in siblings if one in self._counts), None)
            counts = self._counts[sequence] = TokenCounts(sequence.prompt_ids, sequence.output_ids, like=like)
        return counts

    def _trace(self, step: Step) -> Span | None:
        """Open the span of a step that sampled sequences have rows in: under the first one's, linked to the others'."""
        if not tracing.is_tracing():
            return None
        sampled = [row.sequence for row in step.rows if row.sequence.life is not None and row.sequence.life.traceparent]
        due = [one for one in sampled if not one.is_decoding or len(one.output_ids) % _TRACED_DECODES == 0]
        if not due or due[0].life is None:
            return None
        span = tracing.start_span(
            "router.step",
            traceparent=due[0].life.traceparent,
            attributes={
                "collegium.step": self.num_step,
                "collegium.rows": step.num_rows,
                "collegium.sequences": len(step.rows),
                "collegium.kind": step.kind,
            },
            links=[one.life.span for one in sampled if one is not due[0] and one.life and one.life.span],
        )
        self._calls.trace(tracing.traceparent_of(span))
        return span

    # --- sequences ---

    def _detach(self, owner: int) -> None:
        self._news.close(owner)
        for sequence in [s for s in self._by_key.values() if s.owner == owner]:
            self._forget(sequence)

    def _submit(self, sequences: Seq[Sequence]) -> None:
        if sequences[0].owner not in self._news:
            return
        num_tokens = len(sequences[0].prompt_ids) + sum(len(s.output_ids) for s in sequences)
        if (failure := self._refusal(sequences, num_tokens)) is not None:
            self.totals.refused[failure.reason] += 1
            for sequence in sequences:
                sequence.finish = Finish.CANCELLED
                self._news.tell(sequence).failure = failure
            return
        for sequence in sequences:
            self._num_submitted += 1
            sequence.number = self._num_submitted
            sequence.end_if_long()
            if sequence.has_ended:  # a replay that had all its tokens
                self._news.tell(sequence)
                continue
            self._enter(sequence, num_tokens)
            sequence.life = SequenceLife(
                sequence.traceparent,
                sequence.request_id,
                sequence.choice_index,
                num_prompt=len(sequence.prompt_ids),
                num_given=len(sequence.output_ids),
            )
            self._scheduler.add(sequence)
            self.totals.prompt_tokens += len(sequence.prompt_ids)

    def _refusal(self, sequences: Seq[Sequence], num_tokens: int) -> Failure | None:
        """Say why a submission is not taken, or None if it is."""
        keys = {_key(sequence) for sequence in sequences}
        request_id = sequences[0].request_id
        if len(keys) < len(sequences):
            message = f"choices: request_id {request_id!r} has a choice_index twice; give each once"
            return Failure(code="INVALID_ARGUMENT", reason="DUPLICATE_REQUEST_ID", message=message)
        if not self._by_key.keys().isdisjoint(keys):
            message = f"request_id {request_id!r} is running already; give each request an id of its own"
            return Failure(code="INVALID_ARGUMENT", reason="DUPLICATE_REQUEST_ID", message=message)
        for what, held, more, limit, flag in (
            ("choices", len(self._by_key), len(sequences), self._max_queued_seqs, "--max-queued-seqs"),
            ("tokens", self._num_tokens, num_tokens, self._max_queued_tokens, "--max-queued-tokens"),
        ):
            if held + more > limit:
                message = f"the router holds {held} {what} and takes at most {limit} ({flag}); try again later"
                return Failure(code="RESOURCE_EXHAUSTED", reason="QUEUE_FULL", message=message)
        return None

    def _enter(self, sequence: Sequence, num_tokens: int) -> None:
        """Note a sequence under its names; num_tokens: of its whole request."""
        self._by_key[_key(sequence)] = sequence
        self._nearest_s = min(self._nearest_s, sequence.deadline_s)
        name = (sequence.owner, sequence.request_id)
        if name not in self._requests:
            self._requests[name] = _Request(num_tokens)
            self._num_tokens += num_tokens
        self._requests[name].sequences.append(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Forget the names of a sequence. Nothing happens if they are not its own."""
        name = (sequence.owner, sequence.request_id)
        request = self._requests.get(name)
        if request is None or self._by_key.get(_key(sequence)) is not sequence:
            return
        del self._by_key[_key(sequence)]
        request.sequences.remove(sequence)
        if not request.sequences:
            del self._requests[name]
            self._num_tokens -= request.num_tokens

    def _of(self, owner: int, request_id: str, choice_index: int | None) -> list[Sequence]:
        request = self._requests.get((owner, request_id))
        if request is None:
            return []
        return [s for s in request.sequences if choice_index in (None, s.choice_index)]

    def _end(self, sequence: Sequence, finish: Finish | None, failure: Failure | None = None) -> None:
        self._news.tell(sequence).failure = failure
        if finish is not None:
            sequence.finish = sequence.finish or finish
        if failure is not None:
            trace_id = tracing.trace_id_of(sequence.traceparent)
            say = _log.info if failure.code == "DEADLINE_EXCEEDED" else _log.warning
            say(
                "a sequence failed",
                code=failure.code,
                reason=failure.reason,
                why=failure.message,
                request_id=sequence.request_id,
                **({"trace_id": trace_id} if trace_id else {}),
            )
        self._forget(sequence, failure)

    def _forget(self, sequence: Sequence, failure: Failure | None = None) -> None:
        """Give back all that a sequence holds. Never raises: what fails of it is logged."""
        if sequence.finish is None:
            sequence.finish = Finish.CANCELLED
        self._leave(sequence)
        self._counts.pop(sequence, None)
        for give_back in (self._scheduler.end, functools.partial(_end_life, failure=failure)):
            try:
                give_back(sequence)
            except Exception:
                _log.exception("a sequence was not given back whole", request_id=sequence.request_id)

    def _end_all(self, sequences: Seq[Sequence], failure: Failure) -> None:
        for sequence in sequences:
            self._end(sequence, None, failure)

    def _expire(self, now: float) -> None:
        if now < self._nearest_s:
            return
        for sequence in [s for s in self._by_key.values() if s.deadline_s <= now]:
            message = "the request's deadline passed while it was computed"
            self._end(sequence, None, Failure(code="DEADLINE_EXCEEDED", reason="DEADLINE_EXCEEDED", message=message))
        self._nearest_s = min((s.deadline_s for s in self._by_key.values()), default=float("inf"))

    def _idle_s(self) -> float:
        return max(0.0, min(_IDLE_S, self._nearest_s - time.monotonic()))

    def _flush(self) -> None:
        for sequence in self._news.flush(self.load, self.num_step):
            self._forget(sequence)


def _command_failed(name: str, error: Exception) -> Failure:
    message = f"the router failed to {name} ({type(error).__name__}); its log has the details"
    return Failure(code="INTERNAL", reason="COMMAND_FAILED", message=message)


def _step_failed(error: Exception) -> Failure:
    """Say that a step failed, or that an expert did."""
    if isinstance(error, ExpertFailedError):
        return Failure(code="INTERNAL", reason="EXPERT_FAILED", message=f"an expert could not be computed: {error}")
    message = f"the router failed in a step ({type(error).__name__}); its log has the details"
    return Failure(code="INTERNAL", reason="STEP_FAILED", message=message)


def _end_life(sequence: Sequence, failure: Failure | None) -> None:
    """Close the span and the times of a sequence."""
    life, sequence.life = sequence.life, None
    if life is not None:
        life.end(
            finish="" if failure or sequence.finish is None else sequence.finish.name.lower(),
            failure="" if failure is None else failure.reason,
            num_output=len(sequence.output_ids),
            num_cached=sequence.num_cached,
            num_preemptions=sequence.num_preemptions,
        )


def _key(sequence: Sequence) -> tuple[int, str, int]:
    return sequence.owner, sequence.request_id, sequence.choice_index


def _kept_rows(step: Step) -> tuple[list[int], dict[Sequence, tuple[int, int]]]:
    """Which rows of the packed batch need logits, and where each sequence's lie among them: (rows, begin and end by
    sequence).
    """
    keep: list[int] = []
    spans: dict[Sequence, tuple[int, int]] = {}
    at = 0
    for row in step.rows:
        begin = len(keep)
        if row.sequence.is_score:
            keep += range(at, at + row.num_rows - int(row.reaches_end))
        elif row.reaches_end:
            keep.append(at + row.num_rows - 1)
        spans[row.sequence] = (begin, len(keep))
        at += row.num_rows
    return keep, spans


__all__ = ["Deliver", "Engine", "EngineTotals", "Failure", "Load", "News"]
