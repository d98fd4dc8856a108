"""Every RPC of collegium.v1.Inference over real gRPC, against a router that keeps router.proto's contract."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from collegium.v1 import inference_pb2 as pb
from collegium.v1 import router_pb2
from gateway.tokenizer import Tokenizer
from tests.fake_router import FakeRouter, expected, model, score_of, scripted
from tests.gateway_rig import (
    DEMO,
    Rig,
    endings,
    error_of,
    gather,
    ids_request,
    rig,
    text,
    text_request,
    token_ids,
    until,
)

_loaded = Tokenizer.load(DEMO)
assert _loaded is not None
TOKENIZER: Tokenizer = _loaded
NAN = float("nan")


@pytest.fixture
async def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
async def served(router: FakeRouter) -> AsyncIterator[Rig]:
    async with rig(router) as running:
        yield running


# Generate.


async def test_a_stream_tells_the_seed_first_and_the_usage_last(served: Rig) -> None:
    responses = await gather(served.stub.Generate(ids_request(1, 2, 3, request_id="mine")))
    assert token_ids(responses) == expected([1, 2, 3], 8)
    assert text(responses) == TOKENIZER.decode(expected([1, 2, 3], 8))
    assert {response.request_id for response in responses} == {"mine"}
    assert responses[0].start.model == "fake-lm"
    assert responses[0].start.prompt_tokens == 3
    assert [response.HasField("start") for response in responses[1:]] == [False] * (len(responses) - 1)
    assert [response.HasField("usage") for response in responses[:-1]] == [False] * (len(responses) - 1)
    assert responses[-1].usage == pb.Usage(prompt_tokens=3, cached_prompt_tokens=1, output_tokens=8)
    assert endings(responses) == {0: ("FINISH_REASON_LENGTH", "")}


async def test_text_is_tokenised_as_the_checkpoint_says(served: Rig, router: FakeRouter) -> None:
    await gather(served.stub.Generate(text_request("The quick brown fox")))
    assert list(router.submissions[0].prompt_ids) == TOKENIZER.encode("The quick brown fox")


async def test_a_long_text_is_tokenised_too(served: Rig, router: FakeRouter) -> None:
    long_text = "word " * 400
    await gather(served.stub.Generate(pb.GenerateRequest(text=long_text.encode(), stopping=pb.Stopping(max_tokens=1))))
    assert list(router.submissions[0].prompt_ids) == TOKENIZER.encode(long_text)


async def test_a_conversation_is_rendered_by_the_chat_template(router: FakeRouter, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    async with rig(router, model_dir=tmp_path) as served:
        messages = [pb.ChatMessage(role="user", content=b"hi"), pb.ChatMessage(role="bot", content="é".encode())]
        await gather(served.stub.Generate(pb.GenerateRequest(chat=pb.ChatPrompt(messages=messages))))
        assert list(router.submissions[0].prompt_ids) == TOKENIZER.encode("user: hi\nbot: é\n")
        assert (await served.stub.GetModel(pb.GetModelRequest())).model.has_chat_template


async def test_a_checkpoint_without_a_tokenizer_serves_ids(router: FakeRouter, tmp_path: Path) -> None:
    async with rig(router, model_dir=tmp_path) as served:
        responses = await gather(served.stub.Generate(ids_request(7)))
        assert token_ids(responses) == expected([7], 8)
        assert text(responses) == ""
        assert (await error_of(served.stub.Generate(text_request("hi")))).field == "text"
        assert not (await served.stub.GetModel(pb.GetModelRequest())).model.has_tokenizer


async def test_the_router_is_given_everything_and_no_stop_strings(served: Rig, router: FakeRouter) -> None:
    stopping = pb.Stopping(max_tokens=4, min_tokens=2, ignore_eos=True, stop_ids=[9], stop_strings=[b"zzz"])
    sampling = pb.Sampling(temperature=0.5, top_k=3, top_p=0.5, seed=11)
    await gather(
        served.stub.Generate(ids_request(1, sampling=sampling, stopping=stopping, num_choices=3, num_logprobs=2))
    )
    (submission,) = router.submissions
    assert submission.sampling == sampling
    assert submission.stopping == pb.Stopping(max_tokens=4, min_tokens=2, ignore_eos=True, stop_ids=[9])
    assert [choice.choice_index for choice in submission.choices] == [0, 1, 2]
    assert submission.num_logprobs == 2
    assert not submission.is_score


async def test_choices_are_apart_and_the_same_seed_gives_them_again(served: Rig) -> None:
    request = ids_request(1, 2, sampling=pb.Sampling(temperature=1.0), num_choices=3)
    first = await gather(served.stub.Generate(request))
    request.sampling.seed = first[0].start.seed
    second = await gather(served.stub.Generate(request))
    assert [token_ids(first, i) for i in range(3)] == [token_ids(second, i) for i in range(3)]
    assert token_ids(first, 0) != token_ids(first, 1)
    assert first[-1].usage.output_tokens == 24


async def test_logprobs_come_with_their_tokens(served: Rig) -> None:
    responses = await gather(served.stub.Generate(ids_request(4, num_logprobs=3)))
    chunks = [chunk for response in responses for chunk in response.chunks]
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
    entries = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.chosen for entry in entries] == [score_of(token_id) for token_id in expected([4], 8)]
    assert all(len(entry.top_ids) == len(entry.top) == 3 for entry in entries)


async def test_end_of_sequence_and_stop_ids_end_a_choice(served: Rig, router: FakeRouter) -> None:
    router.next_token = scripted([5, 6, 7], then=0)
    assert endings(await gather(served.stub.Generate(ids_request(1)))) == {0: ("FINISH_REASON_STOP", "0")}
    stopping = pb.Stopping(max_tokens=8, stop_ids=[6])
    responses = await gather(served.stub.Generate(ids_request(1, stopping=stopping)))
    assert token_ids(responses) == [5, 6]
    assert endings(responses) == {0: ("FINISH_REASON_STOP", "6")}


async def test_a_stop_string_ends_one_choice_and_the_others_go_on(served: Rig, router: FakeRouter) -> None:
    script = TOKENIZER.encode(" one two END three four five six")

    def next_token(prompt_ids: Any, output_ids: Any, choice_index: int, sampling: Any) -> int:
        return script[len(output_ids)] if choice_index == 0 else 1000 + len(output_ids)

    router.next_token = next_token
    stopping = pb.Stopping(max_tokens=len(script), stop_strings=[b"END"])
    responses = await gather(served.stub.Generate(ids_request(1, stopping=stopping, num_choices=2)))
    assert text(responses, 0) == " one two "
    assert endings(responses) == {0: ("FINISH_REASON_STOP", "END"), 1: ("FINISH_REASON_LENGTH", "")}
    assert len(token_ids(responses, 1)) == len(script)
    await router.until(lambda: bool(router.cancellations))
    (ref,) = router.cancellations
    assert ref.HasField("choice_index")
    assert ref.choice_index == 0


async def test_a_stop_string_inside_a_step_of_many_tokens_ends_at_the_same_id(served: Rig, router: FakeRouter) -> None:
    script = TOKENIZER.encode(" one two END three four five six")
    router.next_token = scripted(script)
    stopping = pb.Stopping(max_tokens=50, stop_strings=[b"END"])
    one_by_one = await gather(served.stub.Generate(ids_request(1, stopping=stopping)))
    router.tokens_per_step = 50
    at_once = await gather(served.stub.Generate(ids_request(1, stopping=stopping)))
    assert token_ids(one_by_one) == token_ids(at_once)
    assert text(one_by_one) == text(at_once) == " one two "


async def test_no_response_cuts_a_character(served: Rig, router: FakeRouter) -> None:
    router.next_token = scripted(TOKENIZER.encode("日本語 🙂"))
    responses = await gather(served.stub.Generate(ids_request(1, max_tokens=50)))
    assert text(responses) == "日本語 🙂"
    assert not any("\ufffd" in chunk.text for response in responses for chunk in response.chunks)


async def test_requests_share_one_stream_and_frames(served: Rig, router: FakeRouter) -> None:
    answers = await asyncio.gather(*(gather(served.stub.Generate(ids_request(i))) for i in range(1, 33)))
    assert [token_ids(responses) for responses in answers] == [expected([i], 8) for i in range(1, 33)]
    assert len(router.gateways) == 1


# Cancel.


async def test_cancel_ends_a_stream_well_with_what_there_is(served: Rig, router: FakeRouter) -> None:
    router.hold()
    call = served.stub.Generate(ids_request(1, request_id="long", max_tokens=100, num_choices=2))
    reading = asyncio.create_task(gather(call))
    await router.until(lambda: len(router.sequences) == 2)
    router.step(3)
    await router.until(lambda: router.num_steps == 3)
    assert (await served.stub.Cancel(pb.CancelRequest(request_id="long"))).was_running
    responses = await reading
    assert endings(responses) == dict.fromkeys(range(2), ("FINISH_REASON_CANCELLED", ""))
    assert responses[-1].HasField("usage")
    assert token_ids(responses) == expected([1], len(token_ids(responses)))
    await router.until(lambda: not router.sequences)
    assert not (await served.stub.Cancel(pb.CancelRequest(request_id="long"))).was_running
    assert (await error_of(served.stub.Cancel(pb.CancelRequest()))).field == "request_id"


async def test_a_caller_that_goes_away_frees_its_sequences(served: Rig, router: FakeRouter) -> None:
    router.hold()
    call = served.stub.Generate(ids_request(1, max_tokens=100))
    await router.until(lambda: bool(router.sequences))
    call.cancel()
    await router.until(lambda: not router.sequences)
    await until(lambda: served.gateway.admission.num_requests == 0)


async def test_callers_who_go_away_at_any_moment_leave_no_error_in_the_log(
    served: Rig, router: FakeRouter, caplog: pytest.LogCaptureFixture
) -> None:
    async def leave_after(count: int) -> None:
        call = served.stub.Generate(ids_request(1, max_tokens=300, num_choices=4))
        async for _ in call:
            count -= 1
            if count <= 0:
                call.cancel()
                return

    await asyncio.gather(*(leave_after(1 + i % 20) for i in range(60)))
    await router.until(lambda: not router.sequences)
    await until(lambda: not served.gateway.service.running())
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]
    assert "INTERNAL" not in served.gateway.counts.failures


async def test_a_thousand_cancelled_requests_leave_nothing_behind(served: Rig, router: FakeRouter) -> None:
    router.hold()
    await gather_one_step(served, router)
    tasks_before = len(asyncio.all_tasks())
    for _ in range(10):
        calls = [served.stub.Generate(ids_request(1, max_tokens=100)) for _ in range(100)]
        await router.until(lambda: len(router.sequences) == 100)
        for call in calls:
            call.cancel()
        await router.until(lambda: not router.sequences)
        del calls
    gateway = served.gateway
    await until(lambda: not gateway.service.running() and gateway.admission.num_requests == 0)
    await until(lambda: len(asyncio.all_tasks()) <= tasks_before)
    assert gateway.admission.queued_tokens == 0
    (attachment,) = gateway.pool.attachments
    assert attachment.candidate().num_sequences <= 1  # the router's own word may be one frame old
    assert len(router.submissions) == 1001


async def gather_one_step(served: Rig, router: FakeRouter) -> None:
    router.step()
    await gather(served.stub.Generate(ids_request(1, max_tokens=1)))


# Score.


async def test_score_gives_every_token_its_logprob(served: Rig, router: FakeRouter) -> None:
    scored = list(range(1, 60))  # several steps
    response = await served.stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=scored)))
    assert list(response.token_ids) == scored
    assert list(response.logprobs) == [0.0, *(score_of(token_id) for token_id in scored[1:])]
    mean = sum(response.logprobs) / (len(scored) - 1)
    assert response.perplexity == pytest.approx(2.718281828459045**-mean)
    assert router.submissions[0].is_score
    text_scored = await served.stub.Score(pb.ScoreRequest(text=b"Hello there"))
    assert list(text_scored.token_ids) == TOKENIZER.encode("Hello there")


async def test_a_single_token_is_scored_without_a_router(served: Rig, router: FakeRouter) -> None:
    response = await served.stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=[5])))
    assert (list(response.logprobs), response.perplexity) == ([0.0], 1.0)
    assert not router.submissions


# Resume.


async def test_resume_goes_on_from_what_the_caller_has(served: Rig, router: FakeRouter) -> None:
    request = ids_request(3, 4, max_tokens=10, num_choices=3, sampling=pb.Sampling(temperature=1.0, seed=5))
    whole = await gather(served.stub.Generate(request))
    wanted = [token_ids(whole, i) for i in range(3)]
    have = TOKENIZER.decode(wanted[0][:4])
    progress = [
        pb.ChoiceProgress(choice_index=0, token_ids=wanted[0][:4], text_offset=len(have.rstrip("\ufffd"))),
        pb.ChoiceProgress(choice_index=1, token_ids=wanted[1], finish_reason=pb.FINISH_REASON_LENGTH),
    ]
    call = served.stub.Resume(pb.ResumeRequest(request=request, progress=progress))
    rest = [message.response async for message in call]
    chunks = [chunk for response in rest for chunk in response.chunks]
    first = [token_id for chunk in chunks if chunk.choice_index == 0 for token_id in chunk.token_ids]
    assert [*wanted[0][:4], *first] == wanted[0]
    assert min(chunk.token_offset for chunk in chunks if chunk.choice_index == 0) == 4
    assert {chunk.choice_index for chunk in chunks} == {0, 2}
    assert token_ids(rest, 2) == wanted[2]
    assert rest[-1].usage.output_tokens == 30
    submission = router.submissions[-1]
    assert {choice.choice_index: list(choice.output_ids) for choice in submission.choices} == {0: wanted[0][:4], 2: []}


async def test_resume_of_a_finished_request_needs_no_router(served: Rig, router: FakeRouter) -> None:
    request = ids_request(3, max_tokens=2, sampling=pb.Sampling(seed=1))
    progress = [pb.ChoiceProgress(token_ids=[5, 6])]
    rest = [r.response async for r in served.stub.Resume(pb.ResumeRequest(request=request, progress=progress))]
    assert endings(rest) == {0: ("FINISH_REASON_LENGTH", "")}
    assert text(rest) == TOKENIZER.decode([5, 6])
    assert rest[-1].HasField("usage")
    assert not router.submissions


async def test_resume_with_progress_needs_the_seed(served: Rig) -> None:
    request = pb.ResumeRequest(request=ids_request(3), progress=[pb.ChoiceProgress(token_ids=[5])])
    assert (await error_of(served.stub.Resume(request))).field == "request.sampling.seed"


# Models, cluster, health, reflection.


async def test_models_are_named_and_described(served: Rig) -> None:
    listed = (await served.stub.ListModels(pb.ListModelsRequest())).models
    assert [entry.name for entry in listed] == ["fake-lm"]
    for name in ("", "fake-lm"):
        assert (await served.stub.GetModel(pb.GetModelRequest(model=name))).model == listed[0]
    assert listed[0].has_tokenizer
    error = await error_of(served.stub.GetModel(pb.GetModelRequest(model="other")))
    assert (error.code, error.field) == (grpc.StatusCode.NOT_FOUND, "model")


async def test_without_a_balancer_the_cluster_is_what_the_gateway_sees(served: Rig) -> None:
    cluster = await served.stub.GetCluster(pb.GetClusterRequest())
    assert [(member.role, member.state) for member in cluster.members] == [
        ("gateway", "SERVING"),
        ("router", "SERVING"),
    ]


async def test_workers_are_not_scaled_to_none_nor_without_a_balancer(served: Rig) -> None:
    none = await error_of(served.stub.ScaleWorkers(pb.ScaleWorkersRequest()))
    assert (none.code, none.field) == (grpc.StatusCode.INVALID_ARGUMENT, "num_workers")
    alone = await error_of(served.stub.ScaleWorkers(pb.ScaleWorkersRequest(num_workers=2)))
    assert (alone.code, alone.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_BALANCER")


async def test_a_gateway_serves_only_while_a_router_can(router: FakeRouter) -> None:
    async with rig(is_waiting=False, routers=("127.0.0.1:1",)) as lonely:
        error = await error_of(lonely.stub.Generate(ids_request(1)))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_ROUTER")
        assert error.retry_after_s
        assert not lonely.gateway.server.health.is_serving()
    async with rig(router) as served, aio.insecure_channel(served.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        router.set_serving(False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        router.set_serving(True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING


async def test_the_service_reflects_itself(served: Rig) -> None:
    async with aio.insecure_channel(served.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        listed = await call.read()
        names = {service.name for service in listed.list_services_response.service}
        assert "collegium.v1.Inference" in names
        call.cancel()


# What is refused.


BAD_CHAT = pb.ChatPrompt(messages=[pb.ChatMessage(role="u", content=b"x")])
REFUSED = {
    "no prompt": (pb.GenerateRequest(), "prompt"),
    "empty text": (text_request(""), "text"),
    "broken UTF-8": (text_request(b"\xc3\x28"), "text"),
    "no ids": (ids_request(), "token_ids"),
    "an id out of range": (ids_request(4096), "token_ids"),
    "longer than the model": (ids_request(*[1] * 512), "token_ids"),
    "NaN": (ids_request(1, sampling=pb.Sampling(temperature=NAN)), "sampling.temperature"),
    "negative": (ids_request(1, sampling=pb.Sampling(top_p=-1)), "sampling.top_p"),
    "no tokens": (ids_request(1, stopping=pb.Stopping(max_tokens=0)), "stopping.max_tokens"),
    "too many choices": (ids_request(1, num_choices=1000), "num_choices"),
    "no chat template": (pb.GenerateRequest(chat=BAD_CHAT), "chat"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_wrong_field_is_invalid_and_named(served: Rig, router: FakeRouter, name: str) -> None:
    request, field = REFUSED[name]
    error = await error_of(served.stub.Generate(request))
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert error.field == field
    assert error.remedy
    assert error.remedy in error.message
    assert not router.submissions


async def test_an_unknown_model_is_not_found(served: Rig) -> None:
    for call in (
        served.stub.Generate(ids_request(1, model="other")),
        served.stub.Score(pb.ScoreRequest(model="other", token_ids=pb.TokenIds(ids=[1]))),
    ):
        error = await error_of(call)
        assert (error.code, error.field) == (grpc.StatusCode.NOT_FOUND, "model")


async def test_a_message_over_the_limit_keeps_grpcs_own_status(router: FakeRouter) -> None:
    async with rig(router, max_message_bytes=2048) as served:
        error = await error_of(served.stub.Generate(text_request("x" * 4000)))
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.retry_after_s is None


async def test_a_deadline_that_passes_ends_the_request_and_its_sequences(served: Rig, router: FakeRouter) -> None:
    router.hold()
    error = await error_of(served.stub.Generate(ids_request(1), timeout=0.2))
    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < router.submissions[0].deadline_ms <= 200
    await router.until(lambda: not router.sequences)
    await until(lambda: served.gateway.admission.num_requests == 0)
    assert (await error_of(served.stub.Generate(ids_request(1), timeout=0.0))).code == grpc.StatusCode.DEADLINE_EXCEEDED
    error = await error_of(served.stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=[1, 2])), timeout=0.2))
    assert error.code == grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_full_gateway_sheds_with_a_delay(router: FakeRouter) -> None:
    async with rig(router, max_requests=2, max_queued_tokens=8) as served:
        router.hold()
        calls = [served.stub.Generate(ids_request(1, max_tokens=1)) for _ in range(2)]
        await router.until(lambda: len(router.sequences) == 2)
        error = await error_of(served.stub.Generate(ids_request(1)))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "REQUESTS_EXHAUSTED")
        assert error.retry_after_s
        router.release()
        for call in calls:
            await gather(call)
        router.hold()
        waiting = served.stub.Generate(ids_request(*range(1, 8), max_tokens=1))
        await router.until(lambda: len(router.sequences) == 1)
        error = await error_of(served.stub.Generate(ids_request(1, 2, 3)))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOKENS_EXHAUSTED")
        error = await error_of(served.stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=[1, 2, 3]))))
        assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        router.release()
        await gather(waiting)
        assert served.gateway.counts.shed == 3


async def test_a_failure_of_the_router_keeps_its_status_and_frees_the_other_choices(
    served: Rig, router: FakeRouter
) -> None:
    router.failure = router_pb2.Failure(code=9, message="the weights are gone", reason="NO_WEIGHTS")
    error = await error_of(served.stub.Generate(ids_request(1, num_choices=3)))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_WEIGHTS")
    error = await error_of(served.stub.Score(pb.ScoreRequest(token_ids=pb.TokenIds(ids=[1, 2]))))
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION
    router.failure = None
    assert token_ids(await gather(served.stub.Generate(ids_request(1)))) == expected([1], 8)


async def test_a_hundred_good_requests_are_untouched_by_bad_ones(served: Rig) -> None:
    bad_requests = [
        text_request(b"\xff"),
        ids_request(9999),
        ids_request(1, sampling=pb.Sampling(min_p=NAN)),
        ids_request(1, model="x"),
        pb.GenerateRequest(),
    ]

    async def bad(index: int) -> grpc.StatusCode:
        return (await error_of(served.stub.Generate(bad_requests[index % len(bad_requests)]))).code

    async def good(index: int) -> bool:
        return token_ids(await gather(served.stub.Generate(ids_request(index)))) == expected([index], 8)

    answers = await asyncio.gather(*(good(i) for i in range(1, 101)), *(bad(i) for i in range(50)))
    assert all(answers[:100])
    assert {code.name for code in answers[100:] if isinstance(code, grpc.StatusCode)} == {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
    }


async def test_a_router_with_another_model_is_left_alone(router: FakeRouter) -> None:
    other = FakeRouter(model(name="other-lm"))
    async with rig(router) as served:
        address = await other.start()
        served.gateway.pool.set_addresses([*served.router_addresses, address])
        answers = await asyncio.gather(*(gather(served.stub.Generate(ids_request(i))) for i in range(1, 20)))
        assert all(token_ids(answer) for answer in answers)
        assert not other.submissions
        await other.stop()


async def test_counts_and_metrics_tell_what_happened(served: Rig) -> None:
    await gather(served.stub.Generate(ids_request(1, 2, 3)))
    await error_of(served.stub.Generate(ids_request()))
    series = served.gateway.counts.series()
    assert series["collegium_prompt_tokens_total"] == 3
    assert series["collegium_generation_tokens_total"] == 8
    assert series['collegium_request_success_total{finished_reason="length"}'] == 1
    assert series['collegium_request_failure_total{code="INVALID_ARGUMENT"}'] == 1
