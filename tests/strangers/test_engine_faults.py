"""Whatever fails for one request, at whatever point of the engine's loop, ends that request alone, and is told."""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from collegium.fabric.errors import ResourceExhausted
from collegium.model.sampling import SamplingParams
from collegium.v1 import inference_pb2 as ipb
from collegium.v1 import router_pb2 as pb
from router_svc import live_sequences, messages, sampler
from router_svc.choices import LayerChoices, StepChoices
from router_svc.engine import Engine
from router_svc.expert_calls import ExpertFailedError, ExpertsUnavailableError
from router_svc.failures import Failure
from router_svc.remote_experts import RemoteExperts
from router_svc.sequence import Sequence, StopRules
from router_svc.sequence_life import SequenceLife
from router_svc.service import Outboxes, RouterService
from router_svc.step import Step
from tests.oracle import Oracle
from tests.router_rig import Outcomes, RouterRig, router_rig

INTERNAL, UNAVAILABLE, RESOURCE_EXHAUSTED = 13, 14, 8
NUM_CANARIES = 9
LATE = Failure(code="DEADLINE_EXCEEDED", reason="DEADLINE_EXCEEDED", message="late")


@pytest.fixture(scope="module")
def rig(oracle: Oracle) -> Iterator[RouterRig]:
    with router_rig(oracle.checkpoint("mixtral"), kv_tokens=2048) as running:
        yield running


@pytest.fixture(scope="module")
def answers(rig: RouterRig) -> Outcomes:
    """What the canaries and the request that will be spoilt answer when nothing fails."""
    return rig.ask(*crowd(rig))


def crowd(rig: RouterRig, *, bad: tuple[str, ...] = ("bad",), **changes: Any) -> list[pb.Submission]:
    """Make nine innocent requests, and bad ones between them."""
    good = [rig.submission(f"canary-{idx}", prompt_ids=[20 + idx, 30, 40]) for idx in range(NUM_CANARIES)]
    spoilt = [rig.submission(name, prompt_ids=[50, 51], **changes) for name in bad]
    return [*good[:4], *spoilt, *good[4:]]


def check_canaries(outcomes: Outcomes, answers: Outcomes) -> None:
    canaries = {key: outcome for key, outcome in outcomes.items() if key[0].startswith("canary")}
    assert len(canaries) == NUM_CANARIES
    for key, outcome in canaries.items():
        assert outcome.failure is None, outcome.failure
        assert outcome.token_ids == answers[key].token_ids


def check_failed(outcomes: Outcomes, reason: str, *names: str, code: int = INTERNAL) -> None:
    for name in names or ("bad",):
        failure = outcomes[name, 0].failure
        assert failure is not None
        assert (failure.code, failure.reason) == (code, reason), failure.message


def is_bad(sequence: Sequence) -> bool:
    return sequence.request_id.startswith("bad")


def raising(real: Callable[..., Any], when: Callable[..., bool], error: Exception | None = None) -> Callable[..., Any]:
    """Wrap a function so that it raises for what it is given."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if when(*args, **kwargs):
            raise error or RuntimeError("injected")
        return real(*args, **kwargs)

    return wrapped


def spoil_forward(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, when: Callable[[Step], bool], error: Exception | None = None
) -> list[int]:
    """Let forward passes fail after they have written the cache; returns the sizes of the steps that were tried."""
    tried: list[int] = []
    real = engine._forward.run

    def run(step: Step, *args: Any) -> Any:
        tried.append(len(step.rows))
        logits = real(step, *args)
        if when(step):
            raise error or RuntimeError("injected")
        return logits

    monkeypatch.setattr(engine._forward, "run", run)
    return tried


@pytest.mark.parametrize("bad", [("bad",), ("bad-1", "bad-2"), ("bad-1", "bad-2", "bad-3", "bad-4", "bad-5")])
def test_a_step_that_sequences_spoil_is_computed_by_halves_until_they_are_alone(
    rig: RouterRig,
    answers: Outcomes,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    bad: tuple[str, ...],
) -> None:
    tried = spoil_forward(monkeypatch, rig.engine, lambda step: any(is_bad(row.sequence) for row in step.rows))
    with caplog.at_level(logging.ERROR):
        outcomes = rig.ask(*crowd(rig, bad=bad))
    check_canaries(outcomes, answers)
    check_failed(outcomes, "STEP_FAILED", *bad)
    num_steps = 6 + 1  # the first step may have been formed while submissions were still coming
    num_rows = NUM_CANARIES + len(bad)
    assert sum(tried) <= num_rows * (num_steps + math.ceil(math.log2(num_rows)) + 1)
    assert 1 <= len([record for record in caplog.records if record.exc_info]) <= 2
    assert rig.is_idle()


def test_a_step_that_fails_whoever_is_in_it_fails_all_with_bounded_work_and_one_traceback(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        tried = spoil_forward(patch, rig.engine, lambda step: True)
        outcomes = rig.ask(*crowd(rig))
    for outcome in outcomes.values():
        assert outcome.failure is not None and outcome.failure.reason == "STEP_FAILED"
        assert outcome.failure.message == "the router failed in a step (RuntimeError); its log has the details"
    num_rows = NUM_CANARIES + 1
    assert sum(tried) <= num_rows * (math.ceil(math.log2(num_rows)) + 1)
    assert len([record for record in caplog.records if record.exc_info]) <= 2
    assert rig.is_idle()
    check_canaries(rig.ask(*crowd(rig)), answers)  # and the next requests are served


def test_a_fault_that_only_large_steps_have_costs_nobody_an_answer(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_forward(monkeypatch, rig.engine, lambda step: len(step.rows) > 3, MemoryError("injected"))
    outcomes = rig.ask(*crowd(rig))
    check_canaries(outcomes, answers)
    assert outcomes["bad", 0].token_ids == answers["bad", 0].token_ids
    assert rig.is_idle()


def test_halves_that_find_no_worker_wait_and_go_on(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def when(step: Step) -> bool:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ExpertsUnavailableError("injected")
        return any(is_bad(row.sequence) for row in step.rows)

    spoil_forward(monkeypatch, rig.engine, when)
    outcomes = rig.ask(*crowd(rig))
    check_canaries(outcomes, answers)
    check_failed(outcomes, "STEP_FAILED")
    assert rig.is_idle()


def test_an_expert_that_rows_of_one_sequence_spoil_fails_it_alone(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    error = ExpertFailedError("worker a: injected")
    tried = spoil_forward(monkeypatch, rig.engine, lambda step: any(is_bad(row.sequence) for row in step.rows), error)
    outcomes = rig.ask(*crowd(rig))
    check_canaries(outcomes, answers)
    check_failed(outcomes, "EXPERT_FAILED")
    assert sum(tried) <= 10 * (7 + 5)
    assert not [record for record in caplog.records if record.exc_info]
    assert rig.is_idle()


@pytest.mark.parametrize("num_parts", [2, 3])
def test_a_spoilt_step_of_several_micro_batches_costs_the_others_nothing(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch, num_parts: int
) -> None:
    engine = rig.engine
    monkeypatch.setattr(engine._forward._micro_batching, "_fixed", num_parts)
    compute, calls = rig.cluster.calls.compute, Counter[int]()

    def failing(layer: int, *args: Any) -> Any:  # in the middle of a layer, with other parts amid theirs
        calls[layer] += 1
        if layer == 1 and calls[layer] % 5 == 2:
            raise RuntimeError("injected")
        return compute(layer, *args)

    rig.cluster.model.set_expert_call(failing)
    try:
        outcomes = rig.ask(*crowd(rig))
    finally:
        rig.cluster.model.set_expert_call(compute, rig.cluster.calls.compute_step)
    assert calls[1] > 5
    served = {key: outcome for key, outcome in outcomes.items() if outcome.failure is None}
    assert len(served) >= 5
    assert all(outcome.token_ids == answers[key].token_ids for key, outcome in served.items())
    assert rig.is_idle()


SEQUENCE_FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Engine], None]] = {
    "sampling": lambda patch, engine: patch.setattr(
        engine._sampler, "_sample_row", raising(engine._sampler._sample_row, lambda sequence: is_bad(sequence))
    ),
    "the sampler": lambda patch, engine: patch.setattr(
        sampler,
        "sample",
        raising(sampler.sample, lambda logits, rows: any(row.num_logprobs == 7 for row in rows)),
    ),
    "its counts": lambda patch, engine: patch.setattr(
        sampler, "TokenCounts", raising(sampler.TokenCounts, lambda prompt, *_, **__: prompt == [50, 51])
    ),
    "taking a token": lambda patch, engine: patch.setattr(
        engine._sampler,
        "_take",
        raising(engine._sampler._take, lambda sequence, *_: is_bad(sequence) and len(sequence.output_ids) == 3),
    ),
    "committing": lambda patch, engine: patch.setattr(
        engine.scheduler, "commit_row", raising(engine.scheduler.commit_row, lambda row: is_bad(row.sequence))
    ),
    "looking for blocks": lambda patch, engine: patch.setattr(
        Sequence, "block_names", raising(Sequence.block_names, lambda self, _: is_bad(self))
    ),
}


@pytest.mark.parametrize("what", sorted(SEQUENCE_FAULTS))
def test_what_fails_for_one_sequence_of_a_step_ends_it_alone(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    SEQUENCE_FAULTS[what](monkeypatch, rig.engine)
    outcomes = rig.ask(*crowd(rig, num_logprobs=7, sampling=ipb.Sampling(presence_penalty=1.0)))
    check_canaries(outcomes, answers)
    check_failed(outcomes, "STEP_FAILED")
    monkeypatch.undo()
    assert rig.is_idle()


def test_a_score_that_fails_ends_alone(rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "token_logprobs", raising(sampler.token_logprobs, lambda *_: True))
    outcomes = rig.ask(*crowd(rig, is_score=True))
    check_canaries(outcomes, answers)
    check_failed(outcomes, "STEP_FAILED")
    assert rig.is_idle()


COMMAND_FAULTS: dict[str, Callable[[pytest.MonkeyPatch, Engine], None]] = {
    "its times": lambda patch, engine: patch.setattr(
        live_sequences, "SequenceLife", raising(SequenceLife, lambda _, request_id, *__, **___: request_id == "bad")
    ),
    "queueing it": lambda patch, engine: patch.setattr(
        engine.scheduler, "add", raising(engine.scheduler.add, lambda one: is_bad(one) and one.choice_index == 1)
    ),
}


@pytest.mark.parametrize("what", sorted(COMMAND_FAULTS))
def test_a_submission_that_fails_half_way_ends_alone_and_gives_everything_back(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    COMMAND_FAULTS[what](monkeypatch, rig.engine)
    choices = [pb.ChoiceStart(choice_index=index) for index in range(3)]
    outcomes = rig.ask(*crowd(rig, choices=choices))
    check_canaries(outcomes, answers)
    for index in range(3):
        failure = outcomes["bad", index].failure
        assert failure is not None and (failure.code, failure.reason) == (INTERNAL, "COMMAND_FAILED")
    assert any(record.exc_info for record in caplog.records)
    monkeypatch.undo()
    assert rig.is_idle()


@pytest.mark.parametrize("name", ["cancel", "pause", "unpause"])
def test_a_command_that_fails_ends_the_request_that_it_names_alone(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    scheduler, live = rig.engine.scheduler, rig.engine._live
    monkeypatch.setattr(scheduler, "pause", raising(scheduler.pause, lambda one, **_: is_bad(one)))
    # A cancellation ends with a finish, giving up with a failure.
    monkeypatch.setattr(live, "end", raising(live.end, lambda one, finish, *_: is_bad(one) and finish is not None))
    refs = [pb.SequenceRef(request_id="bad")]
    frame = pb.AttachRequest(submissions=crowd(rig, stopping=ipb.Stopping(max_tokens=300, ignore_eos=True)))
    field = {"cancel": frame.cancellations, "pause": frame.pauses, "unpause": frame.unpauses}[name]
    field.extend(refs)
    outcomes = rig.talk(frame)
    check_canaries(outcomes, answers)
    check_failed(outcomes, "COMMAND_FAILED")
    monkeypatch.undo()
    assert rig.is_idle()


def test_news_that_cannot_be_told_cost_the_others_of_the_stream_nothing(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_untold(item: Any) -> bool:
        return is_bad(item.sequence) and bool(item.token_ids)

    monkeypatch.setattr(messages, "_news_of", raising(messages._news_of, is_untold))
    outcomes = rig.ask(*crowd(rig))
    check_canaries(outcomes, answers)
    check_failed(outcomes, "NEWS_FAILED")
    assert rig.is_idle()


def test_an_owner_that_cannot_be_reached_loses_its_sequences_and_nobody_elses(
    rig: RouterRig, answers: Outcomes
) -> None:
    engine = rig.engine
    lost, deliver = 1_000_001, engine._news.deliver
    engine._news.deliver = raising(deliver, lambda owner, *_: owner == lost)  # from the first time on
    engine.commands.attach(lost)
    engine.commands.submit([_sequence(lost)])
    assert engine.commands.wait_idle(30)
    engine._news.deliver = deliver
    engine.commands.attach(lost)
    engine._news.deliver = raising(lambda *_: None, lambda owner, news, *_: bool(news))
    engine.commands.submit([_sequence(lost)])
    assert engine.commands.wait_idle(30)
    engine.commands.detach(lost)
    check_canaries(rig.ask(*crowd(rig)), answers)
    assert rig.is_idle()


def _sequence(owner: int) -> Sequence:
    return Sequence(
        owner=owner,
        request_id="lost",
        choice_index=0,
        prompt_ids=[9],
        sampling=SamplingParams(),
        rules=StopRules(max_tokens=200),
    )


def test_a_listener_that_fails_is_told_no_more_and_the_step_is_taken(rig: RouterRig, answers: Outcomes) -> None:
    told: list[StepChoices] = []

    def fail(choices: StepChoices) -> None:
        told.append(choices)
        raise RuntimeError("injected")

    heard: list[StepChoices] = []
    rig.engine.listeners.add(fail)
    rig.engine.listeners.add(heard.append)
    try:
        check_canaries(rig.ask(*crowd(rig)), answers)
        assert rig.engine.listeners._members == (heard.append,)
    finally:
        rig.engine.listeners.remove(heard.append)
    assert len(told) == 1 and len(heard) >= 6
    assert rig.is_idle()


def test_a_deadline_passes_for_one_and_each_later_one_is_still_seen(rig: RouterRig, answers: Outcomes) -> None:
    endless = ipb.Stopping(max_tokens=10_000, ignore_eos=True)
    frame = pb.AttachRequest(submissions=crowd(rig, bad=()))
    frame.submissions.extend(
        rig.submission(f"bad-{ms}", prompt_ids=[50, 51], deadline_ms=ms, stopping=endless) for ms in (30, 1, 60)
    )
    frame.pauses.extend(pb.SequenceRef(request_id=f"bad-{ms}") for ms in (30, 60))
    outcomes = rig.talk(frame)
    check_canaries(outcomes, answers)
    for ms in (1, 30, 60):
        failure = outcomes[f"bad-{ms}", 0].failure
        assert failure is not None and failure.reason == "DEADLINE_EXCEEDED"
    assert rig.is_idle()


def test_what_a_router_holds_for_gateways_is_bounded_and_told(
    rig: RouterRig, answers: Outcomes, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = rig.engine.commands.refused["QUEUE_FULL"]
    for limit in ("_max_queued_seqs", "_max_queued_tokens"):
        with monkeypatch.context() as patch:
            patch.setattr(rig.engine._requests, limit, 40)
            many = pb.ChoiceStart(choice_index=0, output_ids=[5] * 30)
            choices = [many] if limit.endswith("tokens") else [pb.ChoiceStart(choice_index=i) for i in range(40)]
            stopping = ipb.Stopping(max_tokens=40, ignore_eos=True)
            outcomes = rig.ask(*crowd(rig, choices=choices, stopping=stopping))
        check_canaries({key: outcomes[key] for key in outcomes if key[0] != "bad"}, answers)
        check_failed(outcomes, "QUEUE_FULL", code=RESOURCE_EXHAUSTED)
        failure = outcomes["bad", 0].failure
        assert failure is not None and f"-{limit[1:]}".replace("_", "-") in failure.message
    assert rig.engine.commands.refused["QUEUE_FULL"] == refused + 2
    assert rig.is_idle()


async def test_streams_and_traces_beyond_a_limit_are_refused(rig: RouterRig) -> None:
    outboxes = Outboxes(asyncio.get_running_loop())
    service = RouterService(outboxes, max_gateways=2, max_traces=2)
    service.open(rig.engine.commands, rig.engine.listeners, rig.model, [1])
    rig.engine._news.deliver = outboxes.deliver

    async def silence() -> Any:
        await asyncio.Event().wait()
        yield pb.AttachRequest()

    for open_one, reason in (
        (lambda: service.Attach(silence(), None), "TOO_MANY_GATEWAYS"),  # type: ignore[arg-type]
        (lambda: service.Trace(pb.TraceRequest(), None), "TOO_MANY_TRACES"),  # type: ignore[arg-type]
    ):
        streams: list[Any] = [open_one(), open_one()]
        for stream in streams:
            await anext(stream)
        with pytest.raises(ResourceExhausted) as error:
            await anext(open_one())
        assert error.value.reason == reason and "the maximum is 2" in error.value.message
        await streams[0].aclose()
        await anext(again := open_one())  # there is room again
        for stream in (*streams, again):
            await stream.aclose()
    assert rig.engine.listeners._members == ()
    assert len(outboxes) == 0


async def test_a_trace_that_is_not_read_keeps_a_bounded_number_of_choices(rig: RouterRig) -> None:
    service = RouterService(Outboxes(asyncio.get_running_loop()))
    service.open(rig.engine.commands, rig.engine.listeners, rig.model, [1])
    trace: Any = service.Trace(pb.TraceRequest(), None)  # type: ignore[arg-type]
    await anext(trace)
    (listener,) = rig.engine.listeners._members
    shape, missed = (100_000, 8), np.zeros(0, np.uint16)
    layer = LayerChoices(layer=0, ids=np.zeros(shape, np.int64), weights=np.zeros(shape, np.float32), missed=missed)
    step = StepChoices(step=1, sequences=[1], positions=[0], num_decode_rows=0, layers=[layer])
    for _ in range(20):
        listener(step)
    await asyncio.sleep(0)
    (steps,) = service._traces
    assert steps.qsize() <= 7
    while not steps.empty():
        last = steps.get_nowait()
    assert isinstance(last, ResourceExhausted) and last.reason == "SLOW_READER"
    await trace.aclose()


async def test_a_gateway_that_reads_nothing_is_cut_off_by_bytes_too(rig: RouterRig) -> None:
    outboxes = Outboxes(asyncio.get_running_loop())
    cut: list[int] = []
    outboxes.on_cut = cut.append
    owner, attached = outboxes.open()
    large = pb.AttachResponse(news=[pb.SequenceNews(failure=pb.Failure(message="x" * 1_000_000))])
    for _ in range(100):
        outboxes.put(owner, large)
    assert cut == [owner]
    assert attached.outbox.qsize() == 1 and attached.outbox.get_nowait() is None


@pytest.fixture(scope="module")
def chunked(oracle: Oracle) -> Iterator[RouterRig]:
    """A router that takes prompts in chunks of 16, half of it in chunks of its own."""
    with router_rig(oracle.checkpoint("mixtral"), kv_tokens=2048, max_batch_tokens=16, num_micro_batches=1) as running:
        yield running


def poison(rig: RouterRig, monkeypatch: pytest.MonkeyPatch, value: float, *, call: int, row: int = 3) -> None:
    """Put a value into one row of what the first layer's workers answer to one prompt's chunk, the `call`th."""
    remote = next(m for m in rig.cluster.model.model.modules() if isinstance(m, RemoteExperts))
    real, num_calls = remote.call, 0

    def answer(layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        nonlocal num_calls
        assert real is not None
        y = real(layer, x, ids, weights)
        if x.shape[0] > row:
            num_calls += 1
            if num_calls == call:
                y = y.clone()
                y[row, 0] = value
        return y

    monkeypatch.setattr(remote, "call", answer)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [1, 3, 5], ids=["in the first chunk", "in the third", "in the last"])
def test_one_number_that_is_none_in_an_answer_fails_one_request_and_no_later_one_that_begins_alike(
    value: float, call: int, rig: RouterRig, chunked: RouterRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_ids = [100 + call, 200 if math.isnan(value) else 201 + (value > 0), *range(20, 88)]
    with monkeypatch.context() as patch:
        poison(chunked, patch, value, call=call)
        check_failed(chunked.ask(chunked.submission("bad", prompt_ids=prompt_ids)), "UNUSABLE_LOGITS")
    wanted = rig.ask(rig.submission("right", prompt_ids=prompt_ids))["right", 0]
    again, later = (
        chunked.ask(chunked.submission(name, prompt_ids=prompt_ids))[name, 0] for name in ("again", "later")
    )
    assert again.failure is None
    assert again.token_ids == later.token_ids == wanted.token_ids
    assert (again.cached_prompt_tokens, later.cached_prompt_tokens) == (0, 64)
    assert chunked.is_idle()


def test_a_request_that_begins_as_a_spoilt_one_beside_it_shares_nothing_of_it(
    rig: RouterRig, chunked: RouterRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_ids = [99, *range(30, 99)]
    names = [f"alike-{idx}" for idx in range(4)]
    with monkeypatch.context() as patch:
        poison(chunked, patch, math.nan, call=1)
        outcomes = chunked.ask(*(chunked.submission(name, prompt_ids=prompt_ids) for name in names))
    wanted = rig.ask(rig.submission("right", prompt_ids=prompt_ids))["right", 0]
    whole = [outcome for outcome in outcomes.values() if outcome.failure is None]
    assert len(whole) == len(names) - 1
    assert all(outcome.token_ids == wanted.token_ids for outcome in whole)
    assert chunked.is_idle()


def test_a_deadline_leaves_what_was_computed_to_others(chunked: RouterRig, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt_ids = [98, *range(40, 109)]
    with monkeypatch.context() as patch:  # as if it had passed when the first token was drawn
        patch.setattr(chunked.engine._sampler, "_take", lambda one, *_: chunked.engine._live.end(one, None, LATE))
        check_failed(
            chunked.ask(chunked.submission("late", prompt_ids=prompt_ids)), "DEADLINE_EXCEEDED", "late", code=4
        )
    again = chunked.ask(chunked.submission("again", prompt_ids=prompt_ids))["again", 0]
    assert again.cached_prompt_tokens == 64
