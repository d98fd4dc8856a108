"""The span and the metrics of each call, under gen_ai.* names, on whatever providers the caller's process has set up.

Owns the names of attributes. Uses the OpenTelemetry API alone, which costs next to nothing where no SDK is set up.
Nothing of a prompt or an answer is noted, nor a message of an error, which may repeat it.
"""

from __future__ import annotations

import time

from opentelemetry import metrics
from opentelemetry.trace import Span, SpanKind, StatusCode

from collegium.client.generate_call import GenerateCall
from collegium.fabric import tracing
from collegium.fabric.errors import CollegiumError
from collegium.fabric.metric_names import REQUEST_SECONDS

_meter = metrics.get_meter("collegium")
# The boundaries that OpenTelemetry's conventions advise.
_duration = _meter.create_histogram(
    "gen_ai.client.operation.duration",
    unit="s",
    description="From a call to the end of its answer, over all attempts",
    explicit_bucket_boundaries_advisory=REQUEST_SECONDS,
)
_usage = _meter.create_histogram(
    "gen_ai.client.token.usage",
    unit="{token}",
    description="Tokens of a call, by gen_ai.token.type: of the prompt (input), generated (output)",
    explicit_bucket_boundaries_advisory=[
        1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864,
    ],
)  # fmt: skip


class GenerateSpan:
    """The span of one generate call, from its first attempt to its end."""

    def __init__(self, call: GenerateCall) -> None:
        """Start it."""
        self._call = call
        self._began_s = time.monotonic()
        request = call.request
        self._attributes: dict[str, str] = {
            "gen_ai.operation.name": "chat" if request.HasField("chat") else "text_completion",
            "gen_ai.provider.name": "collegium",
            "gen_ai.request.model": request.model,
        }
        attributes: dict[str, str | int | float] = {**self._attributes, "gen_ai.response.id": request.request_id}
        if request.stopping.HasField("max_tokens"):
            attributes["gen_ai.request.max_tokens"] = request.stopping.max_tokens
        for name in ("temperature", "top_p", "top_k"):
            if request.sampling.HasField(name):
                attributes[f"gen_ai.request.{name}"] = getattr(request.sampling, name)
        name = f"{self._attributes['gen_ai.operation.name']} {request.model}".rstrip()
        self.span: Span = tracing.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)

    def fail(self, error: CollegiumError) -> None:
        """Note that the call failed."""
        mark_failed(self.span, error)
        self._attributes["error.type"] = error.code.name

    def end(self) -> None:
        """Note how the call went, and end its span."""
        call = self._call
        if not call.is_complete and "error.type" not in self._attributes:  # its caller went away
            self._attributes["error.type"] = "CANCELLED"
            self.span.set_attribute("error.type", "CANCELLED")
        if self.span.is_recording():
            self.span.set_attribute("gen_ai.response.model", call.model)
            self.span.set_attribute("gen_ai.response.finish_reasons", call.finish_reasons)
            if call.seed is not None:
                self.span.set_attribute("gen_ai.request.seed", str(call.seed))
            if call.usage is not None:
                self.span.set_attribute("gen_ai.usage.input_tokens", call.usage.prompt_tokens)
                self.span.set_attribute("gen_ai.usage.output_tokens", call.usage.output_tokens)
        self.span.end()
        named = {**self._attributes, "gen_ai.response.model": call.model}
        attributes = {name: value for name, value in named.items() if value}
        _duration.record(time.monotonic() - self._began_s, attributes)
        if call.usage is not None:
            _usage.record(call.usage.prompt_tokens, {**attributes, "gen_ai.token.type": "input"})
            _usage.record(call.usage.output_tokens, {**attributes, "gen_ai.token.type": "output"})


def unary_span(method: str) -> Span:
    """Start the span of another call."""
    return tracing.start_span(f"collegium.v1.Inference/{method}", kind=SpanKind.CLIENT)


def mark_failed(span: Span, error: CollegiumError) -> None:
    """Note on a span that its call failed."""
    if span.is_recording():
        span.set_status(StatusCode.ERROR, error.reason)
        span.set_attribute("error.type", error.code.name)
