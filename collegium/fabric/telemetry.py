"""What a process tells of itself, set up in one place: metrics (see metrics), traces (see tracing), both by OTLP."""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from collegium.fabric import metrics, tracing
from collegium.fabric.settings import ServiceSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource

    from collegium.fabric.otlp_metrics import MetricsPush

_push: MetricsPush | None = None


def setup(role: str, options: ServiceSettings) -> None:
    """Send this process's traces and metrics to where the settings say; a no-op where they name no endpoint.

    The libraries for it are imported only then.
    """
    global _push
    if not options.otlp_endpoint:
        return
    resource = _resource(role)
    tracing.setup_tracing(resource, options.otlp_endpoint, options.trace_ratio)
    if options.otlp_metrics_s:
        from collegium.fabric.otlp_metrics import MetricsPush

        source, endpoint = metrics.registry(), options.otlp_endpoint
        _push = MetricsPush(source, endpoint, resource, options.otlp_metrics_s, start_ns=time.time_ns())
        _push.start()


def flush() -> None:
    """Send metrics now, before what they are read from is taken apart; a no-op without setup. May block for seconds."""
    if _push is not None:
        _push.flush()


def shutdown() -> None:
    """Send what is left and stop; a no-op without setup. Blocks for seconds where the endpoint is gone."""
    global _push
    if _push is not None:
        _push.stop()
    _push = None
    tracing.shutdown_tracing()


def _resource(role: str) -> Resource:
    """Say which process this is; OTEL_RESOURCE_ATTRIBUTES adds to it, as OpenTelemetry has it."""
    from opentelemetry.sdk.resources import Resource

    return Resource.create(
        {"service.name": f"collegium-{role}", "service.instance.id": f"{socket.gethostname()}/{os.getpid()}"}
    )
