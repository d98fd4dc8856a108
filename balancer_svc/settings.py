"""The balancer's settings.

Owns their names, defaults and checks; read once, at start.
"""

from __future__ import annotations

from dataclasses import dataclass

from collegium.fabric.bounds import MAX_MEMBERS, MAX_TTL_MS, MAX_WORKERS
from collegium.fabric.settings import ByteSize, ServiceSettings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancerSettings(ServiceSettings):
    """What the balancer takes beside what every service takes."""

    redis_url: str = setting(
        "the balancer's memory: redis://, rediss:// or unix:// URL", env="REDIS_URL", unit="URL", secret=True
    )
    redis_wait_s: float = setting(
        "longest wait for Redis at the start, in seconds; then the process ends", default=30.0, at_least=0.0
    )
    cluster: str = setting("name that keeps clusters apart in one Redis", default="default")
    expected_workers: int = setting(
        "workers to wait for before the first placement; 0: plan when no new one came for --settle-ms",
        default=0,
        at_least=0,
    )
    max_workers: int = setting(
        "most workers that Scale may ask for, at most 4096: what the machines can run that workers are started on",
        default=256,
        at_least=1,
        at_most=MAX_WORKERS,
    )
    max_members: int = setting(
        "most members under a lease at once, at most 8192; one more is refused and counted",
        default=MAX_MEMBERS,
        at_least=1,
        at_most=MAX_MEMBERS,
    )
    settle_ms: int = setting("quiet time before the first placement, in ms", default=500, at_least=0)
    patience_ms: int = setting("longest wait for --expected-workers, in ms", default=20_000, at_least=0)
    rebalance_s: float = setting(
        "time between looks at the load, in s; 0: homes follow members alone", default=10.0, at_least=0.0
    )
    window_s: float = setting("length of a window of load, in s", default=5.0, at_least=0.1, at_most=3600.0)
    target: float = setting(
        "time of a layer's busiest worker over the mean at which it is left as it is", default=1.05, at_least=1.0
    )
    spare_share: float = setting(
        "of a layer's experts, how many replicas there may be beside their homes", default=0.125, at_least=0.0
    )
    move_budget: ByteSize = setting(
        "bytes that one plan may have loaded, one swap at least; 0: no limit", default=ByteSize(256 << 20), at_least=0
    )
    horizon_s: float = setting("time within which a move must pay for its loading, in s", default=60.0, at_least=0.0)
    ready_limit_s: float = setting(
        "longest wait for a plan's experts to be loaded before it is given up, in s", default=120.0, at_least=1.0
    )
    lead_ttl_ms: int = setting(
        "time after which another balancer leads where this one is silent, in ms",
        default=3_000,
        at_least=200,
        at_most=3_600_000,
    )
    lease_ttl_ms: int = setting(
        "time after which a silent member is lost, in ms", default=5_000, at_least=200, at_most=MAX_TTL_MS
    )
