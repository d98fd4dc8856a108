"""Runs a gateway."""

from __future__ import annotations

import asyncio
import sys

from collegium.fabric import lifecycle, logs, metrics, settings, telemetry
from gateway.app import open_gateway
from gateway.settings import GatewaySettings


async def serve(options: GatewaySettings, stop: lifecycle.Stop) -> None:
    """Serve until asked to stop, then let running requests end."""
    lifecycle.keep_imports()
    url = metrics.serve_metrics(
        options.metrics_bind,
        advertise=options.advertise,
        prefix=options.metrics_prefix,
        max_connections=options.metrics_connections,
    )
    async with open_gateway(options, url) as gateway:
        await stop.wait()
        await gateway.drain(options.drain_s)
        await asyncio.to_thread(telemetry.flush)


def main() -> int:
    """Read the settings and run."""
    options = settings.parse(GatewaySettings, None, prog="gateway")
    logs.configure(level=options.log_level, form=options.log_format, service="gateway")
    telemetry.setup("gateway", options)

    async def serve_with(stop: lifecycle.Stop) -> None:
        await serve(options, stop)

    return lifecycle.run(serve_with, name="gateway", health_bind=options.health_bind)


if __name__ == "__main__":
    sys.exit(main())
