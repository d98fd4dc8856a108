"""What every RPC passes through at a server: errors become statuses, a caller's trace goes on.

Owns the one place where exceptions meet gRPC. Streams are driven here, so that a handler's `finally` runs as soon as
its call ends.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, TypeVar, cast

import grpc
from grpc import aio
from opentelemetry.trace import Span, SpanKind, StatusCode

from collegium.fabric import logs, tracing
from collegium.fabric.errors import CollegiumError, Internal, Unavailable, trailing_metadata

_log = logs.get("rpc")
_FOR_CALLERS = "/collegium.v1.Inference/"
_QUIET = ("/grpc.health.", "/grpc.reflection.")
Context = aio.ServicerContext[Any, Any]
Req = TypeVar("Req")
Res = TypeVar("Res")
Behaviour = Callable[[Any, Context], Awaitable[Any]]


class StatusInterceptor(aio.ServerInterceptor):
    """Wraps every asynchronous handler of a server; answers for services that it will offer and does not yet."""

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Req, Res] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Req, Res] | None:
        """Give the handler of a method, wrapped; one that gRPC's thread pool runs is left alone."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None and method.lstrip("/").partition("/")[0] in self._services:
            return grpc.unary_unary_rpc_method_handler(_guarded(_not_yet, method))
        return None if handler is None else _wrap(handler, method)


def _wrap(handler: grpc.RpcMethodHandler[Any, Any], method: str) -> grpc.RpcMethodHandler[Any, Any]:
    kinds = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }
    kind, make = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    inner: Any = getattr(handler, kind)
    if inspect.isasyncgenfunction(inner):
        behaviour = _driven(inner)
    elif inspect.iscoroutinefunction(inner):
        behaviour = cast("Behaviour", inner)
    else:
        return handler
    return make(
        _guarded(behaviour, method),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


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
        span = None
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
            _mark(span, error)
            _refuse(context, error)
        except aio.AbortError:
            raise
        except Exception:
            _log.exception("a call failed by a fault of ours", method=method)
            fault = Internal("internal error; the server's log has the details", reason="FAULT")
            _mark(span, fault)
            _refuse(context, fault)
        except asyncio.CancelledError:
            if span is not None and span.is_recording():
                span.set_attribute("error.type", "CANCELLED")
            raise
        finally:
            if span is not None:
                span.end()

    return guarded


def _refuse(context: Context, error: CollegiumError) -> None:
    # Not by abort(): what it raises is kept by gRPC's own state of the call, and with it, by way of its traceback, the
    # request and everything that was made for it, until the cycle collector comes by.
    context.set_trailing_metadata(trailing_metadata(error))
    context.set_code(error.code)
    context.set_details(error.message)


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
