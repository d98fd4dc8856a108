"""Runs a gateway."""

from __future__ import annotations

import sys

from collegium.fabric import lifecycle, logs, settings, telemetry
from gateway.app import open_gateway
from gateway.settings import GatewaySettings


async def serve(options: GatewaySettings, stop: lifecycle.Stop) -> None:
    """Serve until asked to stop, then let running requests end."""
    async with open_gateway(
        options, telemetry.serve_metrics(options.metrics_bind, advertise=options.advertise)
    ) as gateway:
        await stop.wait()
        await gateway.drain(options.drain_s)


def main() -> int:
    """Read the settings and run."""
    options = settings.parse(GatewaySettings, None, prog="gateway")
    logs.configure(level=options.log_level, form=options.log_format, service="gateway")
    telemetry.setup_tracing("collegium-gateway", options.otlp_endpoint, options.trace_ratio)

    async def serve_with(stop: lifecycle.Stop) -> None:
        await serve(options, stop)

    try:
        return lifecycle.run(serve_with, name="gateway", health_bind=options.health_bind)
    finally:
        telemetry.shutdown_tracing()


if __name__ == "__main__":
    sys.exit(main())
