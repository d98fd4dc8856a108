"""The engine: one thread that schedules steps, computes them, samples, and tells what is new.

Owns the thread, the order of a step, and what becomes of one that fails; the parts of a step are modules of their own.
Others reach it through commands and hear of it by a callback. A step is pure until it is committed, so a step whose
experts could not be had is computed again, and one that a request spoils is computed again by halves, until those who
spoil it are alone. Whatever fails for one request, at whatever point, ends that request and nobody else's.
"""

import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq

import torch

from collegium.fabric import logs
from router_svc import commands as asked
from router_svc.choices import Listeners
from router_svc.commands import Command, Commands
from router_svc.expert_calls import ExpertCalls, ExpertFailedError, ExpertsUnavailableError
from router_svc.failures import Failure, command_failed, expert_failed, step_failed
from router_svc.forward_pass import ForwardPass
from router_svc.kv_blocks import BlockPool
from router_svc.live_sequences import LiveSequences
from router_svc.news import Deliver, NewsBoard
from router_svc.pace import StepPace
from router_svc.recorder import Recorder
from router_svc.requests import Requests
from router_svc.router_model import RouterModel
from router_svc.sampler import Sampler
from router_svc.scheduler import Scheduler
from router_svc.sequence import Finish, Sequence
from router_svc.step import Step
from router_svc.step_faults import StepFaults
from router_svc.step_logits import StepLogits
from router_svc.totals import EngineTotals
from router_svc.unsafe_routing import UnsafeRouting

_log = logs.get("engine")

_RETRY_S = 0.05  # pause before a step is computed again that found no worker
_IDLE_S = 1.0


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
        self._num_threads, self._expert_wait_s, self._on_end = num_threads, expert_wait_s, on_end
        self.commands, self.listeners, self.totals = Commands(), Listeners(), EngineTotals()
        self.num_step = 0
        self.error: BaseException | None = None
        self.scheduler = Scheduler(BlockPool(num_blocks), max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs)
        self._pace = StepPace(shared_step_s, max_batch_tokens)
        self._news = NewsBoard(deliver)
        self._requests = Requests(max_queued_seqs=max_queued_seqs, max_queued_tokens=max_queued_tokens)
        self._faults = StepFaults()
        self._live = LiveSequences(
            self._requests,
            self._news,
            self._faults,
            refused=self.commands.refused,
            release=self.scheduler.end,
            num_blocks=num_blocks,
            most_rows=max_batch_tokens,
        )
        self._forward = ForwardPass(
            model,
            calls,
            self.totals,
            num_blocks=num_blocks,
            num_micro_batches=num_micro_batches,
            unsafe_routing=unsafe_routing,
            most_rows=max_batch_tokens,
        )
        self._recorder = Recorder(self.listeners)
        self._sampler = Sampler(self._requests, self._news, self._live, self._faults, self.totals, fork=self._fork)
        self._retry_until_s = 0.0  # until when the step at hand is computed again by halves; 0: no fault so far
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread."""
        self.commands.is_served = True
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End after the step at hand."""
        self.commands.stop()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    # --- the engine's thread ---

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            with torch.inference_mode():
                while not self.commands.is_stopping:
                    self._turn()
        except BaseException as error:
            self.error = error
            _log.exception("the engine has died")
            raise
        finally:
            self.commands.end()
            self._on_end()

    def _turn(self) -> None:
        """Do what was asked for, then compute one step: schedule, forward, sample, tell."""
        for command in self.commands.take():
            self._obey(command)
        self._live.expire(time.monotonic())
        step = self._schedule()
        if step is not None:
            self.num_step += 1
            self._faults.begin()
            self._retry_until_s = 0.0
            began_s = time.monotonic()
            self._compute(step)
            self.totals.step_seconds += time.monotonic() - began_s
        self._tell()
        if step is None:
            idle_s = max(0.0, min(_IDLE_S, self._requests.nearest_s - time.monotonic()))
            self.commands.rest(idle_s, has_work=bool(len(self._requests)))

    def _schedule(self) -> Step | None:
        """Form the next step. A sequence that makes this fail is ended."""
        while True:
            try:
                return self.scheduler.schedule(self._pace.max_rows)
            except Exception as error:
                culprit = self.scheduler.at_hand
                if culprit is None or culprit.has_ended:
                    raise
                _log.exception("a step could not be formed", request_id=culprit.request_id)
                self._live.end(culprit, None, step_failed(error))

    def _compute(self, step: Step) -> None:
        """Compute a step and take its tokens; if it fails, compute its halves, down to single sequences.

        So a step that one of its sequences spoils costs at most two more steps' rows. One that fails whatever is left
        out costs log2(n) more for n sequences, and at most the time that steps may wait for experts.
        """
        try:
            logits = self._forward.compute(step, self.num_step, self._recorder.begin(step))
        except ExpertsUnavailableError as error:
            self._wait_for_experts(step, error)
            return
        except ExpertFailedError as error:
            failure = expert_failed(error)
        except Exception as error:
            self._faults.tell(num_rows=step.num_rows)
            failure = step_failed(error)
        else:
            num_rows = step.num_rows + step.num_source_rows
            self._pace.note(num_rows, has_prompts=bool(step.chunks), seconds=logits.seconds)
            self._commit(step, logits)
            self._sampler.sample(step, logits)
            return
        # Not where the error is caught: its traceback holds the tensors of the step, and there may be no room for more.
        self._retry_until_s = self._retry_until_s or time.monotonic() + self._expert_wait_s
        if step.num_sequences == 1 or self.commands.is_stopping or time.monotonic() > self._retry_until_s:
            self._live.fail_all(dict.fromkeys(row.sequence for row in step.rows), failure)
            return
        for half in step.halves():
            self._compute(half)

    def _wait_for_experts(self, step: Step, error: ExpertsUnavailableError) -> None:
        now_s = time.monotonic()
        message = f"{error} (waited {self._expert_wait_s:g} s); see that expert workers run and reach the balancer"
        failure = Failure(code="UNAVAILABLE", reason="NO_EXPERT_WORKER", message=message)
        for row in {id(row.sequence): row for row in step.rows}.values():
            since_s = row.sequence.stalled_since_s = row.sequence.stalled_since_s or now_s
            if now_s - since_s > self._expert_wait_s:
                self._live.end(row.sequence, None, failure)
        self.commands.wait(_RETRY_S)

    def _commit(self, step: Step, logits: StepLogits) -> None:
        """Note that a step's rows are in the cache; a sequence for which that fails ends alone."""
        for row in step.rows:
            try:
                self._forward.check(row)
                self.scheduler.commit_row(row)
                row.sequence.stalled_since_s = None
                if row.sequence.life is not None:
                    row.sequence.life.begin(logits.began_s)
            except Exception as error:
                self._live.spoil(row.sequence, error)
        self._recorder.commit(step, self.num_step)
        self.totals.steps[step.kind] += 1
        self.totals.prefilled_tokens += sum(row.num_rows for row in step.chunks)

    def _fork(self, sequence: Sequence, parents: Seq[int], tables: Seq[list[int]]) -> None:
        """Have the beams of a sequence go on from others' blocks."""
        self._forward.copy_blocks(self.scheduler.fork(sequence, parents, tables))

    def _tell(self) -> None:
        for sequence in self._news.flush(self.scheduler.load, self.num_step):
            self._live.forget(sequence)

    # --- commands ---

    def _obey(self, command: Command) -> None:
        try:
            match command:
                case asked.Attach(owner):
                    self._news.open(owner, self.scheduler.load())
                case asked.Detach(owner):
                    self._live.detach(owner)
                case asked.Submit(sequences):
                    for sequence in self._live.take(sequences):
                        self.scheduler.add(sequence)
                        self.totals.prompt_tokens += len(sequence.prompt_ids)
                case asked.Cancel():
                    self._each(command, lambda one: self._live.end(one, Finish.CANCELLED))
                case asked.Pause(is_paused=is_paused):
                    self._each(command, lambda one: self._pause(one, is_paused=is_paused))
                case asked.Call(run):
                    run()
        except Exception as error:
            _log.exception("a command failed", command=command.name)
            try:
                self._give_up(command, command_failed(command.name, error))
            except Exception:
                _log.exception("what a command was about could not be ended", command=command.name)

    def _pause(self, sequence: Sequence, *, is_paused: bool) -> None:
        if sequence.searched_by is None:
            self.scheduler.pause(sequence, is_paused=is_paused)

    def _each(self, command: asked.Cancel | asked.Pause, run: Callable[[Sequence], None]) -> None:
        """Do what is asked for with each live choice that is named; one for which it fails ends alone."""
        for sequence in self._named(command):
            try:
                run(sequence)
            except Exception as error:
                _log.exception("a command failed", command=command.name, request_id=sequence.request_id)
                self._live.end(sequence, None, command_failed(command.name, error))

    def _give_up(self, command: Command, failure: Failure) -> None:
        """End whom a command was about that could not be obeyed."""
        match command:
            case asked.Attach(owner) | asked.Detach(owner):
                self._live.detach(owner)
            case asked.Submit(sequences):
                self._live.fail_all([s for s in sequences if not s.has_ended], failure)
            case asked.Cancel() | asked.Pause():
                self._live.fail_all(self._named(command), failure)
            case asked.Call():
                pass

    def _named(self, command: asked.Cancel | asked.Pause) -> Iterator[Sequence]:
        for ref in command.refs:
            yield from self._requests.of(command.owner, *ref)
