"""The asynchronous client. Drives the state machines of retry and generate_call over grpc.aio.

A client may be used on several event loops, at once or one after another: channels are opened at first use, one per
loop and address (see loops). A stream belongs to the task that reads it, but any task of its loop may cancel it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

from grpc import aio
from opentelemetry import trace
from opentelemetry.trace import Span

from collegium.client.connection import Connection, Reach
from collegium.client.generate_call import CallView, GenerateCall
from collegium.client.loops import ChannelsByLoop, running_loop
from collegium.client.options import GenerateOptions, ScoreOptions, generate_request, score_request, uint
from collegium.client.passages import Passages
from collegium.client.results import (
    Chunk,
    Cluster,
    Completion,
    Model,
    Scaling,
    Score,
    Translated,
    read_cluster,
    read_model,
    read_scaling,
    read_score,
)
from collegium.client.retry import Attempts, RetryPolicy
from collegium.client.spans import GenerateSpan, mark_failed, unary_span
from collegium.client.translate_call import TranslateCall, TranslateOptions, translate_options
from collegium.fabric.channels import channel
from collegium.fabric.errors import CollegiumError, FailedPrecondition, from_rpc_error
from collegium.v1 import inference_pb2 as pb
from collegium.v1 import inference_pb2_grpc


class AsyncClient:
    """A client of one cluster for asyncio, as an async context manager or until close().

    target: HOST:PORT of a gateway, or several (a sequence, or separated by commas); http:// before it is dropped,
    https:// where TLS is spoken. InvalidArgument for what is no address. timeout_s: for each whole call,
    retries included, unless the call gives its own; None: no limit.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        *,
        api_key: str | None = None,
        tls: bool = False,
        tls_ca: str | Path | bytes | None = None,
        tls_server_name: str | None = None,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        connection = Connection(api_key=api_key, tls=tls, tls_ca=tls_ca, tls_server_name=tls_server_name)
        self._reach = AsyncChannels(target, connection, retry, timeout_s)

    async def __aenter__(self) -> AsyncClient:
        """Use the client until the block ends."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        await self.close()

    async def close(self) -> None:
        """End every call and connection. Idempotent."""
        await self._reach.close()

    @property
    def targets(self) -> tuple[str, ...]:
        """The gateways' addresses, HOST:PORT each."""
        return self._reach.addresses.names

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Stream the continuation of a prompt; see GenerateOptions. The call begins with the first chunk asked for."""
        return AsyncStream(self._reach, GenerateCall(generate_request(prompt, options)), options.get("timeout_s"))

    async def complete(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Completion:
        """Generate, and give everything at the end."""
        async with self.generate(prompt, **options) as stream:
            return await stream.completion()

    async def translate(
        self,
        text: str,
        *,
        to: str = "",
        source: str = "",
        split: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[TranslateOptions],
    ) -> Translated:
        """Translate one text; see TranslateOptions. to, source: codes of languages, such as "fra_Latn"; empty: as the
        model's files say. split: as translate_all has it. Raises what the text failed by.
        """
        each = self.translate_all([text], to=to, source=source, split=split, timeout_s=timeout_s, **options)
        found = [one async for one in each]
        if found[0].error is not None:
            raise found[0].error
        return found[0]

    def translate_all(
        self,
        texts: Iterable[str] | AsyncIterable[str],
        *,
        to: str = "",
        source: str = "",
        split: bool = False,
        timeout_s: float | None = None,
        **options: Unpack[TranslateOptions],
    ) -> AsyncIterator[Translated]:
        """Translate texts, several at a time; give each in its turn. One that fails has its error, and others go on.

        split: translate each text sentence by sentence, and keep what lies between them; needs the extra "sentences",
        and fails a text whose sentences do not all succeed. The texts are taken as they are needed.
        """
        call = TranslateCall(translate_options(to, source, options))
        if not split:
            return _translations(self._reach, call, texts, timeout_s)
        passages = Passages(source, options.get("n", 1))
        return _whole(_translations(self._reach, call, passages.cut_each(texts), timeout_s), passages)

    async def score(self, prompt: str | None = None, **options: Unpack[ScoreOptions]) -> Score:
        """Give the log-probability of every token of a text, or of an answer to it, and the perplexity."""
        timeout_s = options.get("timeout_s")
        return read_score(await self._reach.ask("Score", score_request(prompt, options), timeout_s))

    async def list_models(self, *, timeout_s: float | None = None) -> tuple[Model, ...]:
        """Name the models that are served."""
        response: pb.ListModelsResponse = await self._reach.ask("ListModels", pb.ListModelsRequest(), timeout_s)
        return tuple(read_model(model) for model in response.models)

    async def get_model(self, model: str = "", *, timeout_s: float | None = None) -> Model:
        """Describe one model; NotFound for a name that is not served."""
        return read_model((await self._reach.ask("GetModel", pb.GetModelRequest(model=model), timeout_s)).model)

    async def get_cluster(self, *, timeout_s: float | None = None) -> Cluster:
        """Describe the services behind the gateway."""
        return read_cluster(await self._reach.ask("GetCluster", pb.GetClusterRequest(), timeout_s))

    async def scale_workers(self, num_workers: int, *, timeout_s: float | None = None) -> Scaling:
        """Say how many expert workers there should be; whoever starts processes follows."""
        request = pb.ScaleWorkersRequest(num_workers=uint("num_workers", num_workers))
        return read_scaling(await self._reach.ask("ScaleWorkers", request, timeout_s))

    async def cancel(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """End a running request by its id, at every gateway that is known; whether one had it running."""
        request = pb.CancelRequest(request_id=request_id)
        names = self._reach.addresses.names
        answers = [await self._reach.ask("Cancel", request, timeout_s, (name,)) for name in names]
        return any(answer.was_running for answer in answers)


class AsyncChannels(Reach):
    """One channel per event loop and address, and the calls on them."""

    def __init__(
        self, target: str | Sequence[str], connection: Connection, policy: RetryPolicy | None, timeout_s: float | None
    ) -> None:
        super().__init__(target, connection, policy, timeout_s)
        self._channels = ChannelsByLoop(
            lambda address: channel(address, credentials=self.credentials, options=self.connection.options)
        )

    async def close(self) -> None:
        """Close every channel."""
        await self._channels.close()

    def open(self, call: GenerateCall, address: str, timeout_s: float | None, span: Span) -> Any:
        """Open one try's stream."""
        request = call.next_request()
        stub = self._stub(address)
        method = stub.Resume if isinstance(request, pb.ResumeRequest) else stub.Generate
        return method(request, timeout=timeout_s, metadata=self.connection.metadata(span))

    def open_translate(self, feed: AsyncIterator[pb.TranslateRequest], address: str, timeout_s: float | None) -> Any:
        """Open one try's stream of sentences."""
        metadata = self.connection.metadata(trace.INVALID_SPAN)
        return self._stub(address).Translate(feed, timeout=timeout_s, metadata=metadata)

    async def ask(self, method: str, request: Any, timeout_s: float | None, only: tuple[str, ...] = ()) -> Any:
        """Make a unary call."""
        attempts = self.attempts(timeout_s, only)
        span = unary_span(method)
        metadata = self.connection.metadata(span)
        try:
            while True:
                left_s = attempts.time_left_s(time.monotonic())
                send = getattr(self._stub(attempts.address), method)
                try:
                    return await send(request, timeout=left_s, metadata=metadata)
                except aio.AioRpcError as error:
                    await asyncio.sleep(attempts.fail(from_rpc_error(error), time.monotonic()))
        except CollegiumError as error:
            mark_failed(span, error)
            raise
        finally:
            span.end()

    def _stub(self, address: str) -> Any:
        return inference_pb2_grpc.InferenceStub(self._channels.get(address))


class AsyncStream(CallView):
    """One generate call: an async iterator over chunks, and an async context manager that cancels what is not read."""

    def __init__(self, reach: AsyncChannels, call: GenerateCall, timeout_s: float | None) -> None:
        super().__init__(call)
        self._reach = reach
        self._timeout_s = timeout_s
        self._chunks = self._run()
        self._is_cancelled = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._rpc: Any = None

    @property
    def is_cancelled(self) -> bool:
        """Whether cancel() was called."""
        return self._is_cancelled.is_set()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """Iterate over chunks."""
        return self

    async def __anext__(self) -> Chunk:
        """Wait for the next chunk. Raises what ended the call, after retries and resumption have failed."""
        loop = running_loop()
        self._loop = self._loop or loop
        if self._loop is not loop:
            raise FailedPrecondition(
                "this stream was begun on another event loop, where its connection is",
                reason="OTHER_EVENT_LOOP",
                remedy="read it to the end there, or ask anew here",
            )
        return await anext(self._chunks)

    async def __aenter__(self) -> AsyncStream:
        """Use the stream until the block ends."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel what is not read."""
        self.cancel()
        await self._chunks.aclose()

    def cancel(self) -> None:
        """End the call, from any task; iteration then ends without an error. Idempotent."""
        self._is_cancelled.set()
        rpc = self._rpc
        if rpc is not None:
            rpc.cancel()

    async def completion(self) -> Completion:
        """Read to the end, and give everything."""
        return self._call.completion([chunk async for chunk in self])

    async def _run(self) -> AsyncGenerator[Chunk, None]:
        call = self._call
        span = GenerateSpan(call)
        attempts = self._reach.attempts(self._timeout_s)
        try:
            while not (call.is_complete or self.is_cancelled):
                left_s = attempts.time_left_s(time.monotonic())
                try:
                    self._rpc = self._reach.open(call, attempts.address, left_s, span.span)
                    if self.is_cancelled:
                        self._rpc.cancel()
                    async for message in self._rpc:
                        attempts.succeed(time.monotonic())
                        for chunk in call.absorb(message):
                            yield chunk
                    call.end_stream()
                except aio.AioRpcError as error:
                    await self._pause(attempts, from_rpc_error(error))
                except asyncio.CancelledError:
                    # grpc.aio raises this for a call that cancel() ended, as well as for a task that is cancelled.
                    task = asyncio.current_task()
                    if not self.is_cancelled or (task is not None and task.cancelling()):
                        raise
                except CollegiumError as error:
                    await self._pause(attempts, error)
        except CollegiumError as error:
            span.fail(error)
            raise
        finally:
            if self._rpc is not None:
                self._rpc.cancel()
            span.end()

    async def _pause(self, attempts: Attempts, error: CollegiumError) -> None:
        # A stream that breaks after its last message, or because the caller ended it, is over.
        if not (self.is_cancelled or self._call.is_complete):
            pause_s = attempts.fail(error, time.monotonic())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._is_cancelled.wait()


class _Texts:
    """The caller's texts, which may take their time. What was taken for a stream that has broken is for the next."""

    def __init__(self, texts: Iterable[str] | AsyncIterable[str]) -> None:
        self._texts = _each(texts)
        self._kept: list[str] = []
        self._taking: asyncio.Task[None] | None = None
        self.error: BaseException | None = None  # that they ended by

    async def send_next(self, call: TranslateCall, stream: int) -> pb.TranslateRequest | None:
        """Write the next one down; None where there are no more, or for a stream that is over."""
        if not self._kept and not call.has_all:
            self._taking = self._taking or asyncio.create_task(self._take(call))
            await asyncio.shield(self._taking)
        request = call.send(self._kept[0], stream) if self._kept else None
        if request is not None:
            self._kept.clear()
        return request

    async def _take(self, call: TranslateCall) -> None:
        try:
            self._kept.append(await anext(self._texts))
        except StopAsyncIteration:
            call.has_all = True
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            self.error, call.has_all = error, True
        finally:
            self._taking = None

    def close(self) -> None:
        """Wait for no more of them."""
        if self._taking is not None:
            self._taking.cancel()


async def _each(texts: Iterable[str] | AsyncIterable[str]) -> AsyncGenerator[str, None]:
    if isinstance(texts, AsyncIterable):
        async for text in texts:
            yield text
    else:
        for text in texts:
            yield text


async def _translations(
    reach: AsyncChannels, call: TranslateCall, given: Iterable[str] | AsyncIterable[str], timeout_s: float | None
) -> AsyncGenerator[Translated, None]:
    """Run a translate call to its end, over as many streams as it takes."""
    attempts, texts = reach.attempts(timeout_s), _Texts(given)
    try:
        while not call.is_complete:
            answered, rpc = asyncio.Event(), None
            try:
                left_s = attempts.time_left_s(time.monotonic())
                rpc = reach.open_translate(_feed(call, texts, answered), attempts.address, left_s)
                async for response in rpc:
                    attempts.succeed(time.monotonic())
                    found = call.absorb(response)
                    answered.set()
                    yield found
                call.end_stream()
            except aio.AioRpcError as error:
                await asyncio.sleep(attempts.fail(from_rpc_error(error), time.monotonic()))
            except CollegiumError as error:
                await asyncio.sleep(attempts.fail(error, time.monotonic()))
            finally:
                answered.set()  # a feed that waits for it would wait for ever
                if rpc is not None:
                    rpc.cancel()
    finally:
        texts.close()
    if texts.error is not None:
        raise texts.error


async def _whole(each: AsyncGenerator[Translated, None], passages: Passages) -> AsyncGenerator[Translated, None]:
    """Put the sentences of texts together again."""
    async with contextlib.aclosing(each):
        async for one in each:
            whole = passages.join(one)
            if whole is not None:
                yield whole


async def _feed(
    call: TranslateCall, texts: _Texts, answered: asyncio.Event
) -> AsyncGenerator[pb.TranslateRequest, None]:
    """Sentences on their way into one try's stream, until a later one is opened or there are no more."""
    stream, again = call.begin()
    for request in again:
        yield request
    while call.is_current(stream):
        if not call.has_room:
            answered.clear()
            await answered.wait()
            continue
        request = await texts.send_next(call, stream)
        if request is None:
            return
        yield request
