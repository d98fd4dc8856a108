"""Runs the balancer."""

from __future__ import annotations

import asyncio
import sys

from balancer_svc.planner import Planner
from balancer_svc.rebalancing import Rules
from balancer_svc.redis_store import RedisStore
from balancer_svc.roster import Roster
from balancer_svc.service import Balancer
from balancer_svc.settings import BalancerSettings
from balancer_svc.store import StoreError
from collegium.fabric import lifecycle, logs, metrics, rpc, settings, telemetry
from collegium.fabric.errors import Unavailable
from collegium.fabric.redis_url import check_redis_url
from collegium.v1 import balancer_pb2_grpc

_GRACE_S = 1.0

_log = logs.get("balancer")


async def serve(options: BalancerSettings, stop: lifecycle.Stop) -> None:
    """Serve until asked to stop."""
    lifecycle.keep_imports()
    check_redis_url(options.redis_url)
    planner = Planner(
        expected_workers=options.expected_workers,
        settle_s=options.settle_ms / 1e3,
        patience_s=options.patience_ms / 1e3,
        rules=Rules(
            target=options.target,
            spare_share=options.spare_share,
            byte_budget=int(options.move_budget) or None,
            horizon_s=options.horizon_s,
        ),
        ready_limit_s=options.ready_limit_s,
    )
    store = RedisStore(options.redis_url, options.cluster)
    ttl_s = options.lease_ttl_ms / 1e3
    balancer = Balancer(
        Roster(ttl_s, stall_s=ttl_s / 4),
        planner,
        store,
        window_s=options.window_s,
        rebalance_s=options.rebalance_s,
        lead_ttl_s=options.lead_ttl_ms / 1e3,
        max_workers=options.max_workers,
        max_members=options.max_members,
    )
    server = rpc.Server(
        "balancer",
        services=("collegium.v1.Balancer",),
        options=rpc.limits(options.max_connections, options.max_streams),
    )
    balancer_pb2_grpc.add_BalancerServicer_to_server(balancer.rpcs, server.grpc)
    metrics.expose(balancer.counters)
    metrics_url = metrics.serve_metrics(
        options.metrics_bind,
        advertise=options.advertise,
        prefix=options.metrics_prefix,
        max_connections=options.metrics_connections,
    )
    try:
        address = await server.start(options.bind)
        _log.info("listening", address=address, metrics=metrics_url)
        await store.connect(options.redis_wait_s)
        try:
            await balancer.load()
        except StoreError as error:
            raise Unavailable(f"Redis went away at the start: {error}", field="REDIS_URL") from error
        loop = asyncio.create_task(balancer.run(), name="balancer")
        loop.add_done_callback(lambda _: stop.request())
        lifecycle.freeze()
        server.set_serving(True)
        await stop.wait()
        balancer.end()
        await asyncio.wait([loop], timeout=_GRACE_S)  # not cancelled: that may hit it while Redis answers
        await balancer.resign()
        await server.stop(_GRACE_S)
        if loop.done():
            loop.result()
        loop.cancel()
    finally:
        await server.stop(0)
        await store.close()


def main() -> int:
    """Read the settings and run."""
    options = settings.parse(BalancerSettings, None, prog="balancer_svc")
    logs.configure(level=options.log_level, form=options.log_format, service="balancer")
    telemetry.setup("balancer", options)

    async def serve_with(stop: lifecycle.Stop) -> None:
        await serve(options, stop)

    return lifecycle.run(serve_with, name="balancer_svc", health_bind=options.health_bind)


if __name__ == "__main__":
    sys.exit(main())
