"""The SDK against real gateways: streams, retries, resumption, typed errors, both kinds of client alike."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from grpc import aio
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from collegium.client import (
    AsyncClient,
    Client,
    CollegiumError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    RetryPolicy,
    Unauthenticated,
    Unavailable,
)
from collegium.fabric import rpc, tracing
from collegium.fabric.errors import trailing_metadata
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import inference_pb2_grpc
from tests.fake_router import FakeRouter, expected
from tests.gateway_rig import certificate, rig, until

T = TypeVar("T")
QUICK = RetryPolicy(rounds=3, first_pause_s=0.001, longest_pause_s=0.002)


class Both:
    """One set of calls, made by either client from the test's loop."""

    def __init__(self, kind: str, target: Any, **options: Any) -> None:
        self.kind = kind
        self._client: Any = (Client if kind == "sync" else AsyncClient)(target, **options)

    async def call(self, method: str, *args: Any, **options: Any) -> Any:
        if self.kind == "sync":
            return await asyncio.to_thread(getattr(self._client, method), *args, **options)
        return await getattr(self._client, method)(*args, **options)

    async def stream(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        """Iterate over chunks."""
        stream = self._client.generate(*args, **options)
        if self.kind == "async":
            async for chunk in stream:
                yield chunk
            return
        while (chunk := await asyncio.to_thread(next, stream, None)) is not None:
            yield chunk

    async def close(self) -> None:
        done = self._client.close()
        if done is not None:
            await done


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@asynccontextmanager
async def client_of(kind: str, target: Any, **options: Any) -> AsyncIterator[Both]:
    client = Both(kind, target, **options)
    try:
        yield client
    finally:
        await client.close()


# Against a gateway.


async def test_a_completion_has_everything(kind: str) -> None:
    async with rig(FakeRouter()) as served, client_of(kind, served.address) as client:
        completion = await client.call("complete", prompt_ids=[1, 2], max_tokens=5, n=2, logprobs=1, request_id="me")
        assert completion.token_ids == tuple(expected([1, 2], 5))
        assert completion.finish_reason == "length"
        assert completion.request_id == "me"
        assert completion.model == "fake-lm"
        assert completion.seed >= 0
        assert len(completion.choices) == 2
        assert len(completion.logprobs) == 5
        assert completion.logprobs[0].top[0][0] == completion.token_ids[0]
        assert completion.usage.output_tokens == 10


async def test_chunks_come_as_they_are_made(kind: str) -> None:
    router = FakeRouter()
    router.hold()
    async with rig(router) as served, client_of(kind, served.address) as client:
        stream = client.stream("Hello", max_tokens=3)
        for position in range(3):
            router.step()
            chunk = await anext(stream)
            assert (chunk.token_offset, len(chunk.token_ids)) == (position, 1)
        assert chunk.finish_reason == "length"
        assert [chunk async for chunk in stream] == []


async def test_other_calls_give_plain_values(kind: str) -> None:
    async with rig(FakeRouter()) as served, client_of(kind, served.address) as client:
        score = await client.call("score", prompt_ids=[1, 2, 3])
        assert len(score.logprobs) == len(score.token_ids) == 3
        (model,) = await client.call("list_models")
        assert model == await client.call("get_model", "fake-lm")
        assert model.eos_ids == (0,)
        cluster = await client.call("get_cluster")
        assert [member.role for member in cluster.members] == ["gateway", "router"]
        assert not await client.call("cancel", "nobody")


async def test_a_running_request_is_cancelled_by_its_id(kind: str) -> None:
    router = FakeRouter()
    router.hold()
    async with rig(router) as served, client_of(kind, served.address) as client:
        running = asyncio.create_task(client.call("complete", prompt_ids=[1], max_tokens=50, request_id="long"))
        await router.until(lambda: bool(router.sequences))
        assert await client.call("cancel", "long")
        assert (await running).finish_reason == "cancelled"


async def test_errors_are_typed_and_name_the_field(kind: str) -> None:
    async with rig(FakeRouter()) as served, client_of(kind, served.address, retry=QUICK) as client:
        for error, field, options in (
            (InvalidArgument, "sampling.temperature", {"prompt_ids": [1], "temperature": float("nan")}),
            (InvalidArgument, "text", {"prompt": ""}),
            (InvalidArgument, "prompt", {}),
            (NotFound, "model", {"prompt_ids": [1], "model": "other"}),
        ):
            with pytest.raises(error) as caught:
                await client.call("complete", **options)
            assert caught.value.field == field
            assert caught.value.remedy


async def test_a_deadline_ends_a_call(kind: str) -> None:
    router = FakeRouter()
    router.hold()
    async with rig(router) as served, client_of(kind, served.address, timeout_s=0.2) as client:
        with pytest.raises(DeadlineExceeded):
            await client.call("complete", prompt_ids=[1])
        with pytest.raises(DeadlineExceeded):
            await client.call("score", prompt_ids=[1, 2], timeout_s=0.1)
        await router.until(lambda: not router.sequences)


async def test_a_message_over_the_limit_is_not_tried_again(kind: str) -> None:
    async with rig(FakeRouter(), max_message_bytes=2048) as served, client_of(kind, served.address) as client:
        with pytest.raises(ResourceExhausted):
            await client.call("complete", "x" * 5000)


async def test_nobody_at_the_address_is_unavailable(kind: str) -> None:
    async with client_of(kind, "127.0.0.1:1", retry=QUICK) as client:
        with pytest.raises(Unavailable):
            await client.call("complete", prompt_ids=[1])
        with pytest.raises(Unavailable):
            await client.call("list_models")


async def test_keys_and_tls_are_options(kind: str, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    (tmp_path / "keys").write_text("secret\n")
    settings = {"tls_cert": cert, "tls_key": key, "api_keys": tmp_path / "keys", "is_waiting": False}
    async with rig(FakeRouter(), **settings) as served:
        await rpc.wait_until_serving(served.address, tls=rpc.TlsTrust(ca=cert))
        async with client_of(kind, served.address, tls_ca=cert, api_key="secret") as client:
            assert (await client.call("complete", prompt_ids=[1], max_tokens=2)).token_ids == tuple(expected([1], 2))
        async with client_of(kind, served.address, tls_ca=cert.read_bytes(), api_key="wrong") as client:
            with pytest.raises(Unauthenticated):
                await client.call("complete", prompt_ids=[1])
        async with client_of(kind, served.address, tls_ca=cert) as client:
            with pytest.raises(Unauthenticated):
                await client.call("list_models")


async def test_a_stream_left_early_is_cancelled() -> None:
    router = FakeRouter()
    async with rig(router) as served:
        async with (
            AsyncClient(served.address) as client,
            client.generate(prompt_ids=[1], max_tokens=400) as stream,
        ):
            await anext(stream)
        await router.until(lambda: not router.sequences)

        def leave() -> None:
            with Client(served.address) as client, client.generate(prompt_ids=[1], max_tokens=400) as stream:
                next(stream)

        await asyncio.to_thread(leave)
        await router.until(lambda: not router.sequences)


async def test_a_stream_is_cancelled_from_outside_and_ends_without_an_error() -> None:
    router = FakeRouter()
    router.hold()
    async with rig(router) as served:
        async with AsyncClient(served.address) as client:
            stream = client.generate(prompt_ids=[1])
            reading = asyncio.ensure_future(asyncio.wait_for(_all(stream), 30))
            await router.until(lambda: bool(router.sequences))
            stream.cancel()
            assert await reading == []
            assert stream.is_cancelled
        await router.until(lambda: not router.sequences)
        with Client(served.address) as blocking:
            blocked = blocking.generate(prompt_ids=[1])
            waiting = asyncio.ensure_future(asyncio.to_thread(list, blocked))
            await router.until(lambda: bool(router.sequences))
            blocked.cancel()
            assert await waiting == []
        await router.until(lambda: not router.sequences)


async def _all(stream: Any) -> list[Any]:
    return [chunk async for chunk in stream]


async def test_a_task_that_is_cancelled_cancels_its_stream() -> None:
    router = FakeRouter()
    router.hold()
    async with rig(router) as served, AsyncClient(served.address) as client:
        task = asyncio.create_task(client.complete(prompt_ids=[1]))
        await router.until(lambda: bool(router.sequences))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await router.until(lambda: not router.sequences)


async def test_a_client_is_shared_among_threads() -> None:
    async with rig(FakeRouter()) as served:
        answers: dict[int, Any] = {}

        def ask(index: int) -> None:
            answers[index] = client.complete(prompt_ids=[index], max_tokens=5).token_ids

        with Client(served.address) as client:
            threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 17)]
            await asyncio.to_thread(_run_all, threads)
        assert answers == {i: tuple(expected([i], 5)) for i in range(1, 17)}


def _run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


async def test_another_gateway_takes_a_stream_up_where_the_first_one_died(kind: str) -> None:
    router = FakeRouter()
    router.hold()
    async with (
        rig(router) as first,
        rig(routers=tuple(first.router_addresses)) as second,
        client_of(kind, [first.address, second.address]) as client,
    ):
        await _resume_elsewhere(client, router, first)


async def _resume_elsewhere(client: Both, router: FakeRouter, first: Any) -> None:
    stream = client.stream(prompt_ids=[4, 2], max_tokens=12, n=2, temperature=1.0, logprobs=0)
    router.step(3)
    chunks = [await anext(stream)]
    await router.until(lambda: router.num_steps == 3)
    await first.gateway.server.stop(0)
    router.release()
    chunks.extend([chunk async for chunk in stream])
    seed = router.submissions[0].sampling.seed
    assert {submission.sampling.seed for submission in router.submissions} == {seed}
    for choice_index in range(2):
        mine = [chunk for chunk in chunks if chunk.choice_index == choice_index]
        found = [token_id for chunk in mine for token_id in chunk.token_ids]
        assert found == expected([4, 2], 12, choice_index, temperature=1.0, seed=seed)
        assert sum(len(chunk.logprobs) for chunk in mine) == 12
        assert mine[-1].finish_reason == "length"
    assert len({submission.request_id.split("/")[0] for submission in router.submissions}) == 1


# Against a scripted gateway, for what a good one seldom does.


class Scripted(inference_pb2_grpc.InferenceServicer):
    """A gateway that fails as it is told before it answers."""

    def __init__(self, *failures: Callable[[Any], Awaitable[None]]) -> None:
        self.failures = list(failures)
        self.requests: list[Any] = []
        self.metadata: list[Mapping[str, str]] = []

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        await self._begin(request, context)
        yield self._answer()

    async def Resume(self, request: pb.ResumeRequest, context: Any) -> AsyncIterator[pb.ResumeResponse]:
        await self._begin(request, context)
        yield pb.ResumeResponse(response=self._answer(token_offset=1))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        await self._begin(request, context)
        return pb.ListModelsResponse(models=[pb.Model(name="m")])

    async def _begin(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.failures:
            await self.failures.pop(0)(context)

    def _answer(self, token_offset: int = 0) -> pb.GenerateResponse:
        chunk = pb.Chunk(token_offset=token_offset, token_ids=[7], finish_reason=pb.FINISH_REASON_STOP)
        return pb.GenerateResponse(
            start=pb.StreamStart(model="m", seed=1), chunks=[chunk], usage=pb.Usage(output_tokens=1)
        )


def failing(error: CollegiumError) -> Callable[[Any], Awaitable[None]]:
    async def fail(context: Any) -> None:
        await context.abort(error.code, error.message, trailing_metadata(error))

    return fail


def failing_after(response: pb.GenerateResponse, error: CollegiumError | None) -> Callable[[Any], Awaitable[None]]:
    async def fail(context: Any) -> None:
        await context.write(response)
        if error is None:
            await context.abort(grpc.StatusCode.CANCELLED)
        else:
            await context.abort(error.code, error.message, trailing_metadata(error))

    return fail


@asynccontextmanager
async def scripted_gateway(*failures: Callable[[Any], Awaitable[None]]) -> AsyncIterator[tuple[str, Scripted]]:
    server = aio.server()
    servicer = Scripted(*failures)
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        await server.stop(0)


async def test_what_delivered_nothing_is_tried_again_as_it_was(kind: str) -> None:
    shed = ResourceExhausted("full", retry_after_s=0.001)
    async with scripted_gateway(failing(Unavailable("starting")), failing(shed)) as (address, servicer):
        async with client_of(kind, address, retry=QUICK) as client:
            assert (await client.call("complete", "hi")).token_ids == (7,)
        assert len(servicer.requests) == 3
        assert servicer.requests[0] == servicer.requests[2]


async def test_unary_calls_are_tried_again_too(kind: str) -> None:
    async with scripted_gateway(failing(Unavailable("starting"))) as (address, servicer):
        async with client_of(kind, address, retry=QUICK) as client:
            assert (await client.call("list_models"))[0].name == "m"
        assert len(servicer.requests) == 2


async def test_what_delivered_something_is_resumed(kind: str) -> None:
    begun = pb.GenerateResponse(start=pb.StreamStart(model="m", seed=42), chunks=[pb.Chunk(token_ids=[5])])
    async with scripted_gateway(failing_after(begun, None)) as (address, servicer):
        async with client_of(kind, address, retry=QUICK) as client:
            assert (await client.call("complete", "hi")).token_ids == (5, 7)
        _, resume = servicer.requests
        assert isinstance(resume, pb.ResumeRequest)
        assert resume.request.sampling.seed == 42
        assert list(resume.progress) == [pb.ChoiceProgress(token_ids=[5])]


async def test_an_error_of_the_request_is_not_tried_again(kind: str) -> None:
    begun = pb.GenerateResponse(start=pb.StreamStart(model="m", seed=42), chunks=[pb.Chunk(token_ids=[5])])
    for failure in (failing(Internal("fault")), failing_after(begun, Internal("fault"))):
        async with scripted_gateway(failure) as (address, servicer):
            async with client_of(kind, address, retry=QUICK) as client:
                with pytest.raises(Internal):
                    await client.call("complete", "hi")
            assert len(servicer.requests) == 1


async def test_a_gateway_that_keeps_failing_is_given_up(kind: str) -> None:
    async with scripted_gateway(*[failing(Unavailable("never"))] * 9) as (address, servicer):
        async with client_of(kind, address, retry=QUICK) as client:
            with pytest.raises(Unavailable, match="never"):
                await client.call("complete", "hi")
        assert len(servicer.requests) == QUICK.rounds


async def test_a_call_is_one_span_and_its_trace_travels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    starting = failing(Unavailable("starting"))
    async with (
        scripted_gateway(starting) as (address, servicer),
        client_of(kind, address, retry=QUICK) as client,
    ):
        await client.call("complete", "hi", max_tokens=3, temperature=0.5)
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["gen_ai.operation.name"] == "text_completion"
    assert span.attributes["gen_ai.request.max_tokens"] == 3
    assert span.attributes["gen_ai.usage.output_tokens"] == 1
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    trace_id = f"{span.context.trace_id:032x}"
    assert [entry["traceparent"].split("-")[1] for entry in servicer.metadata] == [trace_id, trace_id]


async def test_one_trace_goes_from_the_sdk_through_the_gateway_to_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(tracing, "_enabled", True)
    router = FakeRouter()
    async with rig(router) as served, AsyncClient(served.address) as client:
        await client.complete(prompt_ids=[1], max_tokens=2)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    outer, inner = spans["text_completion"], spans["collegium.v1.Inference/Generate"]
    assert inner.parent is not None
    assert inner.parent.span_id == outer.context.span_id
    assert inner.attributes is not None
    assert inner.attributes["gen_ai.usage.output_tokens"] == 2
    assert router.submissions[0].traceparent == tracing.traceparent_of(trace.NonRecordingSpan(inner.context))


async def test_a_closed_client_says_so(kind: str) -> None:
    async with rig(FakeRouter()) as served:
        client = Both(kind, served.address)
        await client.call("list_models")
        await client.close()
        for method, options in (("complete", {"prompt_ids": [1]}), ("list_models", {})):
            with pytest.raises(FailedPrecondition, match="closed"):
                await client.call(method, **options)


async def test_the_loop_is_left_as_it_was_found() -> None:
    before = len(asyncio.all_tasks())
    async with rig(FakeRouter()) as served, AsyncClient(served.address) as client:
        await asyncio.gather(*(client.complete(prompt_ids=[i], max_tokens=3) for i in range(1, 20)))
    await until(lambda: len(asyncio.all_tasks()) <= before)
