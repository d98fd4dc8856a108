"""The balancer's settings.

Owns their names, defaults and checks; read once, at start.
"""

from __future__ import annotations

from dataclasses import dataclass

from collegium.fabric.settings import ServiceSettings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class BalancerSettings(ServiceSettings):
    """What the balancer takes beside what every service takes."""

    redis_url: str = setting(
        "the balancer's memory: redis://, rediss:// or unix:// URL", env="REDIS_URL", unit="URL", secret=True
    )
    cluster: str = setting("name that keeps clusters apart in one Redis", default="default")
    expected_workers: int = setting(
        "workers to wait for before the first placement; 0: plan when no new one came for --settle-ms",
        default=0,
        at_least=0,
    )
    settle_ms: int = setting("quiet time before the first placement, in ms", default=500, at_least=0)
    patience_ms: int = setting("longest wait for --expected-workers, in ms", default=20_000, at_least=0)
    lease_ttl_ms: int = setting("time after which a silent member is lost, in ms", default=5_000, at_least=200)
