"""W3C traces by OpenTelemetry: set up once, near zero cost where no endpoint is set.

Owns the tracer, the reading and writing of traceparent. Attributes are the callers' business.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace import Link, Span, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from collegium.fabric.channels import NO_PROXY

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

TRACEPARENT = "traceparent"
_SCOPE = "collegium"
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(?:-|$)")
_propagator = TraceContextTextMapPropagator()
_reserved = ContextVar("reserved", default=0)  # the id of the span that is started now; 0: any
_shutdown = None
_enabled = False


def setup_tracing(resource: Resource, otlp_endpoint: str, ratio: float) -> None:
    """Export this process's spans to an OTLP/gRPC endpoint; an empty endpoint leaves tracing off.

    A request whose caller sampled it is traced; of those that arrive without a trace, the given share.
    """
    global _shutdown, _enabled
    if not otlp_endpoint:
        return
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = make_provider(resource, ratio)
    exporter = OTLPSpanExporter(
        endpoint=otlp_endpoint,
        insecure=not otlp_endpoint.startswith("https"),
        timeout=2,
        channel_options=cast("Any", NO_PROXY),
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=500))
    trace.set_tracer_provider(provider)
    _shutdown, _enabled = provider.shutdown, True


def make_provider(resource: Resource | None = None, ratio: float = 1.0) -> TracerProvider:
    """Make what spans of this process come from, with nowhere to go yet; its ids are those of `reserve` where given."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    class Ids(RandomIdGenerator):
        def generate_span_id(self) -> int:
            return _reserved.get() or super().generate_span_id()

    return TracerProvider(resource=resource, sampler=ParentBasedTraceIdRatio(ratio), id_generator=Ids())


def shutdown_tracing() -> None:
    """Send what is left and stop; a no-op without setup_tracing. Blocks for seconds where the endpoint is gone."""
    global _shutdown, _enabled
    if _shutdown is not None:
        _shutdown()
    _shutdown, _enabled = None, False


def is_tracing() -> bool:
    """Say whether spans go anywhere."""
    return _enabled


def current_traceparent() -> str:
    """Give the traceparent of the current span where it is sampled, else the empty string."""
    return traceparent_of(trace.get_current_span())


def traceparent_of(span: Span) -> str:
    """Give the traceparent of a span where it is sampled, else the empty string."""
    context = span.get_span_context()
    if not context.is_valid or not context.trace_flags.sampled:
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def trace_id_of(traceparent: str) -> str:
    """Give the trace id of a traceparent, for logs; the empty string where it is none."""
    match = _TRACEPARENT.match(traceparent)
    return match[1] if match and match[1].strip("0") else ""


def reserve(traceparent: str) -> str:
    """Give the traceparent of a span that is to be under this one and that is started later, as its `own`."""
    return f"{traceparent[:36]}{random.getrandbits(64) or 1:016x}{traceparent[52:]}"


def start_span(
    name: str,
    *,
    traceparent: str = "",
    own: str = "",
    kind: SpanKind = SpanKind.INTERNAL,
    attributes: Mapping[str, AttributeValue] | None = None,
    start_ns: int | None = None,
    links: Sequence[Span] = (),
) -> Span:
    """Start a span under a traceparent, or under the current span where that is empty; the caller ends it.

    own: its traceparent, where that was reserved. links: spans of other traces that it serves as well.
    """
    parent = _propagator.extract({TRACEPARENT: traceparent}) if traceparent else None
    token = _reserved.set(int(own[36:52], 16) if own else 0)
    try:
        return trace.get_tracer(_SCOPE).start_span(
            name,
            context=parent,
            kind=kind,
            attributes=attributes,
            start_time=start_ns,
            links=[Link(span.get_span_context()) for span in links],
        )
    finally:
        _reserved.reset(token)


def make_current(span: Span) -> None:
    """Make a span the current one for the rest of this task; nothing needs to be undone when the task ends."""
    otel_context.attach(trace.set_span_in_context(span))


def span_from_traceparent(
    name: str,
    traceparent: str,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> None:
    """Record a span that is over already, such as a step or a worker's batch; times are time.time_ns().

    Does nothing without a traceparent or while tracing is off.
    """
    if _enabled and traceparent:
        start_span(name, traceparent=traceparent, attributes=attributes, start_ns=start_ns).end(end_ns)
