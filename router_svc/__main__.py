"""Run a router. Settings are read before anything heavy is imported, so that a mistyped one is reported at once."""

import sys

from collegium.fabric import lifecycle, logs, settings
from router_svc.settings import Settings


async def serve(config: Settings, stop: lifecycle.Stop) -> None:
    """Import what computes, and serve until stopped."""
    from router_svc.app import main

    lifecycle.keep_imports()
    await main(config, stop)


if __name__ == "__main__":
    parsed = settings.parse(Settings, None, prog="router_svc")
    logs.configure(level=parsed.log_level, form=parsed.log_format, service="router")
    sys.exit(lifecycle.run(lambda stop: serve(parsed, stop), name="router_svc", health_bind=parsed.health_bind))
