"""Telemetry in one place: metrics (see metrics) and traces (see tracing)."""

from collegium.fabric.metrics import (
    METRICS,
    Counters,
    MetricName,
    MetricsRegistry,
    expose,
    histogram,
    registry,
    series,
    serve_metrics,
)
from collegium.fabric.tracing import (
    TRACEPARENT,
    current_traceparent,
    is_tracing,
    make_current,
    setup_tracing,
    shutdown_tracing,
    span_from_traceparent,
    start_span,
    traceparent_of,
)

__all__ = [
    "METRICS",
    "TRACEPARENT",
    "Counters",
    "MetricName",
    "MetricsRegistry",
    "current_traceparent",
    "expose",
    "histogram",
    "is_tracing",
    "make_current",
    "registry",
    "series",
    "serve_metrics",
    "setup_tracing",
    "shutdown_tracing",
    "span_from_traceparent",
    "start_span",
    "traceparent_of",
]
