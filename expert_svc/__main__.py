"""Run a worker. Settings are read before anything heavy is imported, so that a mistyped one is reported at once."""

import asyncio
import importlib
import sys

from collegium.fabric import lifecycle, logs, settings
from collegium.fabric.low_priority import run_low
from expert_svc.settings import Settings


async def serve(config: Settings, stop: lifecycle.Stop) -> None:
    """Import what computes, and serve until stopped."""
    if config.idle_start:  # importing torch takes seconds of a core that others serve with
        importlib.import_module("numpy")  # it may start threads of its own, which must not keep the low priority
        await asyncio.to_thread(run_low, lambda: importlib.import_module("expert_svc.app"), "import")
    from expert_svc.app import main

    lifecycle.keep_imports()
    await main(config, stop)


if __name__ == "__main__":
    parsed = settings.parse(Settings, None, prog="expert_svc")
    logs.configure(level=parsed.log_level, form=parsed.log_format, service="worker")
    sys.exit(lifecycle.run(lambda stop: serve(parsed, stop), name="expert_svc", health_bind=parsed.health_bind))
