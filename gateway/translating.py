"""Serve a stream of sentences: several at a time, answered in their order, each by itself.

Owns the order and the bound of what is under way. What a sentence costs and whether it may come in is decided as for
any other request: it is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from collegium.fabric import logs
from collegium.fabric.errors import CollegiumError, Internal, InvalidArgument, ResourceExhausted
from collegium.v1 import inference_pb2 as pb
from gateway.relay import Write

MAX_UNDER_WAY = 64  # sentences of one stream; the next is read when the first of them is answered
_LONGEST_PAUSE_S = 2.0  # before a sentence asks again for which the gateway had no room
_log = logs.get("gateway")
Serve = Callable[[pb.GenerateRequest, Write], Awaitable[None]]
Check = Callable[[pb.GenerateRequest], None]
Tell = Callable[[pb.TranslateResponse], Awaitable[None]]


async def translate(requests: AsyncIterator[pb.TranslateRequest], check: Check, serve: Serve, tell: Tell) -> None:
    """Answer the sentences of a stream until it ends. serve: grows one request to its end; check: raises what is wrong
    with one, whatever its text.

    Raises InvalidArgument or FailedPrecondition where the stream itself is wrong.
    """
    # Beside those in it, one is told and one waits for a place.
    under_way: asyncio.Queue[asyncio.Task[pb.TranslateResponse] | None] = asyncio.Queue(MAX_UNDER_WAY - 2)
    tasks: set[asyncio.Task[pb.TranslateResponse]] = set()

    async def read() -> None:
        options: pb.TranslateOptions | None = None
        index = 0
        async for request in requests:
            options = _options_of(request, options, check)
            if not request.HasField("text"):
                continue
            task = asyncio.create_task(_translated(index, request.text, options, serve))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            index += 1
            await under_way.put(task)
        await under_way.put(None)

    reader = asyncio.create_task(read())
    try:
        while (task := await _next(under_way, reader)) is not None:
            await tell(await task)
        await reader
    finally:
        for task in (reader, *tasks):
            task.cancel()
        await asyncio.gather(reader, *tasks, return_exceptions=True)


async def _next(
    under_way: asyncio.Queue[asyncio.Task[pb.TranslateResponse] | None], reader: asyncio.Task[None]
) -> asyncio.Task[pb.TranslateResponse] | None:
    """Wait for the next sentence; what the reader raises comes behind those that were read before."""
    taking = asyncio.create_task(under_way.get())
    try:
        await asyncio.wait((taking, reader), return_when=asyncio.FIRST_COMPLETED)
        if not taking.done() and under_way.empty():
            reader.result()
        return await taking
    finally:
        taking.cancel()


def _options_of(request: pb.TranslateRequest, before: pb.TranslateOptions | None, check: Check) -> pb.TranslateOptions:
    if before is not None:
        if request.HasField("options"):
            raise InvalidArgument(
                "options are of the whole stream", field="options", remedy="give them first, and once"
            )
        return before
    if not request.HasField("options"):
        raise InvalidArgument("the first message has no options", field="options", remedy="begin with them")
    probe = request_of(request.options)
    probe.token_ids.ids.append(0)
    check(probe)
    return request.options


def request_of(options: pb.TranslateOptions) -> pb.GenerateRequest:
    """Make the request that each sentence is, but for its text."""
    return pb.GenerateRequest(
        model=options.model,
        source_language=options.source_language,
        target_language=options.target_language,
        sampling=options.sampling,
        stopping=options.stopping,
        num_choices=options.num_choices,
        num_logprobs=0 if options.logprobs or options.beam_search.num_beams > 1 else None,
        beam_search=options.beam_search,
    )


async def _translated(index: int, text: bytes, options: pb.TranslateOptions, serve: Serve) -> pb.TranslateResponse:
    response = pb.TranslateResponse(index=index)
    if not text:
        for _ in range(options.num_choices or 1):
            response.translations.add(finish_reason=pb.FINISH_REASON_STOP)
        return response
    try:
        await _serve_patiently(text, options, serve, response)
        return response
    except CollegiumError as error:
        failure = error
    except Exception as error:
        _log.exception("a sentence could not be translated")
        failure = Internal(f"the gateway failed on it ({type(error).__name__}); its log has the details")
    code = failure.code.value[0]
    told = pb.TranslateFailure(code=code, message=str(failure), reason=failure.reason)
    return pb.TranslateResponse(index=index, failure=told)


async def _serve_patiently(
    text: bytes, options: pb.TranslateOptions, serve: Serve, response: pb.TranslateResponse
) -> None:
    """Serve a sentence into a response. Where there is no room, it asks again: nothing else of its stream comes in."""
    request = request_of(options)
    request.text = text

    async def collect(news: pb.GenerateResponse) -> None:
        if news.HasField("start"):
            response.source_tokens = news.start.prompt_tokens
        for chunk in news.chunks:
            while len(response.translations) <= chunk.choice_index:
                response.translations.add()
            one = response.translations[chunk.choice_index]
            one.text += chunk.text
            one.token_ids.extend(chunk.token_ids)
            if request.HasField("num_logprobs"):
                one.logprob += sum(each.chosen for each in chunk.logprobs)
            one.finish_reason = chunk.finish_reason
            if chunk.HasField("score"):
                one.score = chunk.score

    while True:
        try:
            await serve(request, collect)
            return
        except ResourceExhausted as error:
            if error.retry_after_s is None:
                raise
            await asyncio.sleep(min(error.retry_after_s, _LONGEST_PAUSE_S))
