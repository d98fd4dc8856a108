"""When a sequence came, was begun, had its first token and ended: for metrics, for its span, and for the log.

Owns the span of a sampled sequence, under which its steps are. The engine's thread owns all of it.
"""

import time

from opentelemetry.trace import Span, StatusCode

from collegium.fabric import metrics, tracing


class SequenceLife:
    """The times of one sequence, on the monotonic clock in seconds."""

    __slots__ = ("_arrived_s", "_began_s", "_first_s", "_last_s", "span", "traced_tokens", "traceparent")

    def __init__(self, traceparent: str, request_id: str, choice_index: int, *, num_prompt: int, num_given: int):
        """num_given: tokens that an earlier router has generated."""
        self._arrived_s = time.monotonic()
        self._began_s = self._first_s = self._last_s = 0.0
        self.span: Span | None = None
        self.traceparent = ""
        self.traced_tokens = 0  # how many were there at the last step that was traced
        if traceparent and tracing.is_tracing():
            attributes = {
                "collegium.request_id": request_id,
                "collegium.choice": choice_index,
                "collegium.prompt_tokens": num_prompt,
                "collegium.given_tokens": num_given,
            }
            self.span = tracing.start_span("router.sequence", traceparent=traceparent, attributes=attributes)
            self.traceparent = tracing.traceparent_of(self.span)

    def begin(self, now_s: float) -> None:
        """Note a step that had rows of it, by when it began; the first one counts."""
        if not self._began_s:
            self._began_s = now_s
            metrics.histogram("collegium_request_queue_time_seconds").observe(now_s - self._arrived_s)
            if self.span is not None:
                self.span.add_event("first step", timestamp=time.time_ns() - round((time.monotonic() - now_s) * 1e9))

    def token(self) -> None:
        """Note a token."""
        self._last_s = time.monotonic()
        if not self._first_s:
            self._first_s = self._last_s
            metrics.histogram("collegium_request_prefill_time_seconds").observe(self._first_s - self._began_s)
            if self.span is not None:
                self.span.add_event("first token")

    def end(self, *, finish: str, failure: str, num_output: int, num_cached: int, num_preemptions: int) -> None:
        """Note the end. finish: why, or empty; failure: a reason, or empty. Without effect the second time."""
        if self._first_s and not failure:
            metrics.histogram("collegium_request_decode_time_seconds").observe(self._last_s - self._first_s)
        self._first_s = 0.0
        if self.span is not None:
            self.span.set_attributes(
                {
                    "collegium.output_tokens": num_output,
                    "collegium.cached_tokens": num_cached,
                    "collegium.preemptions": num_preemptions,
                    "collegium.finish": finish,
                }
            )
            if failure:
                self.span.set_status(StatusCode.ERROR, failure)
            self.span.end()
            self.span = None
