"""The span of each call, with gen_ai.* attributes, on whatever tracer the caller's process has set up.

Owns the names of attributes. Uses the OpenTelemetry API alone, which costs next to nothing where no SDK is set up.
"""

from __future__ import annotations

from opentelemetry.trace import Span, SpanKind, StatusCode

from collegium.client.generate_call import GenerateCall
from collegium.fabric import tracing
from collegium.fabric.errors import CollegiumError


def generate_span(call: GenerateCall) -> Span:
    """Start the span of a generate call."""
    request = call.request
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": "chat" if request.HasField("chat") else "text_completion",
        "gen_ai.provider.name": "collegium",
        "gen_ai.request.model": request.model,
        "gen_ai.response.id": request.request_id,
    }
    if request.stopping.HasField("max_tokens"):
        attributes["gen_ai.request.max_tokens"] = request.stopping.max_tokens
    for name in ("temperature", "top_p", "top_k"):
        if request.sampling.HasField(name):
            attributes[f"gen_ai.request.{name}"] = getattr(request.sampling, name)
    name = f"{attributes['gen_ai.operation.name']} {request.model}".rstrip()
    return tracing.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)


def end_generate_span(span: Span, call: GenerateCall) -> None:
    """Note how the call went, and end its span."""
    if span.is_recording():
        span.set_attribute("gen_ai.response.model", call.model)
        span.set_attribute("gen_ai.response.finish_reasons", call.finish_reasons)
        if call.seed is not None:
            span.set_attribute("gen_ai.request.seed", str(call.seed))
        if call.usage is not None:
            span.set_attribute("gen_ai.usage.input_tokens", call.usage.prompt_tokens)
            span.set_attribute("gen_ai.usage.output_tokens", call.usage.output_tokens)
    span.end()


def unary_span(method: str) -> Span:
    """Start the span of another call."""
    return tracing.start_span(f"collegium.v1.Inference/{method}", kind=SpanKind.CLIENT)


def mark_failed(span: Span, error: CollegiumError) -> None:
    """Note on a span that its call failed."""
    if span.is_recording():
        span.set_status(StatusCode.ERROR, error.message)
        span.set_attribute("error.type", error.code.name)
