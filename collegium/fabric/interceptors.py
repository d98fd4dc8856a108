"""What every RPC passes through at a server: errors become statuses, a caller's trace goes on.

Owns the one place where exceptions meet gRPC: a request that cannot be read and a method that does not exist are the
caller's errors; any other exception of a handler is ours, whatever its base class. Streams are driven here, so that a
handler's `finally` runs as soon as its call ends.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar, cast

import grpc
from google.protobuf import descriptor_pool
from grpc import aio
from opentelemetry.trace import Span, SpanKind, StatusCode

from collegium.fabric import logs, tracing
from collegium.fabric.errors import (
    CollegiumError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    Unavailable,
    Unimplemented,
    shown,
    status_message,
    trailing_metadata,
)

_log = logs.get("rpc")
_FOR_CALLERS = "/collegium.v1.Inference/"
_QUIET = ("/grpc.health.", "/grpc.reflection.")
_WORDS = {False: "unary", True: "stream"}
_EOF = cast("Any", aio).EOF  # which its types lack
_REQUEST_S = 60.0  # from a call's headers to the end of its one request: 16 MiB at 2 Mbit/s
Context = aio.ServicerContext[Any, Any]
Req = TypeVar("Req")
Res = TypeVar("Res")
Behaviour = Callable[[Any, Context], Awaitable[Any]]


class StatusInterceptor(aio.ServerInterceptor):
    """Wraps every asynchronous handler of a server and answers for methods that have none.

    services: those that the server offers, or will offer once its process has started.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Req, Res] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Req, Res] | None:
        """Return the handler of a method, wrapped.

        A method of an offered service that was not added yet is UNAVAILABLE. A method that the servicer left to its
        generated base class, and any other method without a handler, is UNIMPLEMENTED.
        """
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None:
            handler = refusing(_not_yet if self._will_offer(method) else _unknown(method))
        return _wrap(handler, method)

    def _will_offer(self, method: str) -> bool:
        service, _, verb = method.lstrip("/").partition("/")
        if service not in self._services:
            return False
        try:
            # Generated code adds all methods of a service at once, so a method that exists is missing only before.
            return verb in descriptor_pool.Default().FindServiceByName(service).methods_by_name
        except KeyError:  # the service's generated code has not been imported yet
            return True


def refusing(behaviour: Behaviour) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler for a method of any kind whose behaviour only raises.

    It reads no request: a caller that sends none is answered at once.
    """
    return grpc.stream_stream_rpc_method_handler(behaviour)


def _wrap(handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
    """Wrap a handler of any kind as one of a stream of requests, which is what lets us answer for what is sent.

    gRPC reads the one request of a unary call before it calls the handler: it answers UNKNOWN if the bytes are no
    message, and nothing at all if there are none.
    """
    kind = f"{_WORDS[bool(handler.request_streaming)]}_{_WORDS[bool(handler.response_streaming)]}"
    inner: Any = getattr(handler, kind)
    if inspect.isasyncgenfunction(inner):
        behaviour = _driven(inner)
    elif inspect.iscoroutinefunction(inner):
        behaviour = cast("Behaviour", inner)
    else:  # the generated base class's: every handler of ours is asynchronous
        return _wrap(refusing(_unknown(method)), method)
    make = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
    reader = handler.request_deserializer
    return make(
        _guarded(_reading_all(behaviour) if handler.request_streaming else _reading_one(behaviour), method),
        request_deserializer=None if reader is None else _checked(reader),
        response_serializer=handler.response_serializer,
    )


def _checked(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def checked(packed: bytes) -> Any:
        try:
            return read(packed)
        except Exception:
            raise InvalidArgument(
                "the request is not a message of this method",
                reason="UNREADABLE_REQUEST",
                remedy="send the protobuf message that the method's .proto file names",
            ) from None

    return checked


def _reading_one(behaviour: Behaviour) -> Behaviour:
    async def reading(_: Any, context: Context) -> Any:
        try:
            async with asyncio.timeout(_REQUEST_S):
                request = await context.read()
        except TimeoutError:
            raise DeadlineExceeded(
                f"the request did not arrive within {_REQUEST_S:g} s of its call", reason="SLOW_REQUEST"
            ) from None
        if request is _EOF:
            raise InvalidArgument(
                "the call has no request", reason="NO_REQUEST", remedy="send one message, which may be empty"
            )
        return await behaviour(request, context)

    return reading


def _reading_all(behaviour: Behaviour) -> Behaviour:
    async def reading(requests: Any, context: Context) -> Any:
        watched = _Requests(requests)
        answer = await behaviour(watched, context)
        if watched.error is not None:  # the handler read in another task and ended its stream well
            raise watched.error
        return answer

    return reading


class _Requests:
    """Iterates over a stream's requests and remembers the one that could not be read."""

    def __init__(self, requests: AsyncIterator[Any]) -> None:
        self._stream = requests
        self._requests: AsyncIterator[Any] | None = None  # gRPC begins to read when asked for it
        self.error: InvalidArgument | None = None

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> Any:
        if self._requests is None:
            self._requests = aiter(self._stream)
        try:
            return await anext(self._requests)
        except InvalidArgument as error:
            self.error = error
            raise


def _unknown(method: str) -> Behaviour:
    async def unknown(requests: Any, context: Context) -> None:
        raise Unimplemented(
            f"this server has no method {shown(method)}",
            reason="UNKNOWN_METHOD",
            remedy="list the methods by server reflection",
        )

    return unknown


async def _not_yet(request: Any, context: Context) -> None:
    raise Unavailable("this service is still starting", reason="STARTING", retry_after_s=0.5)


def _driven(generate: Callable[[Any, Context], AsyncIterator[Any]]) -> Behaviour:
    async def behaviour(request: Any, context: Context) -> None:
        messages = cast("Any", generate(request, context))
        try:
            async for message in messages:
                await context.write(message)
        finally:
            await messages.aclose()

    return behaviour


def _guarded(behaviour: Behaviour, method: str) -> Behaviour:
    async def guarded(request: Any, context: Context) -> Any:
        span: Span | None = None
        refusal: CollegiumError | None = None
        if not method.startswith(_QUIET):
            traceparent = _traceparent_of(context)
            # Of what callers ask a share is traced; what services ask each other is so for the sake of a caller alone.
            is_due = bool(traceparent) or method.startswith(_FOR_CALLERS)
            span = _server_span(method, traceparent) if is_due and tracing.is_tracing() else None
            trace_id = tracing.trace_id_of(traceparent if span is None else tracing.traceparent_of(span) or traceparent)
            if trace_id:
                logs.bind(trace_id=trace_id)
        try:
            return await behaviour(request, context)
        except CollegiumError as error:
            refusal = error.with_traceback(None)
        except aio.AbortError:
            raise
        except asyncio.CancelledError:
            if span is not None and span.is_recording():
                span.set_attribute("error.type", "CANCELLED")
            raise
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException:  # a panic of a library written in Rust is no Exception
            _log.exception("a call failed by a fault of ours", method=method)
            refusal = Internal("internal error; the server's log has the details", reason="FAULT")
        finally:
            if span is not None and refusal is not None:
                _mark(span, refusal)
            if span is not None:
                span.end()
        # gRPC keeps what abort() raises, and by way of its traceback this frame, until the cycle collector comes by: by
        # now neither holds the request or anything that was made for it.
        del request
        assert refusal is not None
        await _abort(context, refusal)

    return guarded


async def _abort(context: Context, error: CollegiumError) -> None:
    try:
        await context.abort(error.code, status_message(error), trailing_metadata(error))
    except aio.InternalError:
        # The caller has just left, which done() does not tell: gRPC would log this as an error of the server.
        raise asyncio.CancelledError from None


def _traceparent_of(context: Context) -> str:
    metadata = context.invocation_metadata() or ()
    return next((str(value) for key, value in metadata if key == tracing.TRACEPARENT), "")


def _server_span(method: str, traceparent: str) -> Span:
    service, _, verb = method.lstrip("/").rpartition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": verb}
    span = tracing.start_span(method.lstrip("/"), traceparent=traceparent, kind=SpanKind.SERVER, attributes=attributes)
    tracing.make_current(span)
    return span


def _mark(span: Span | None, error: CollegiumError) -> None:
    # The reason and not the message, which may repeat what a caller wrote.
    if span is not None and span.is_recording():
        span.set_status(StatusCode.ERROR, f"{error.reason} {error.field or ''}".rstrip())
        span.set_attribute("error.type", error.code.name)
