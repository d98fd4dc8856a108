"""docs/settings.md, written from the services' own settings: every flag, its variable, bounds, default and meaning.

`make docs` writes it; a test holds the committed page against it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from balancer_svc.settings import BalancerSettings
from collegium.fabric.settings import Described, ServiceSettings, describe
from expert_svc.settings import Settings as WorkerSettings
from gateway.settings import GatewaySettings
from router_svc.settings import Settings as RouterSettings

_HEAD = """<!-- Written by `make docs` from the services' settings. Do not edit. -->

# Settings

Each service is `python -P -m MODULE --flag value ...`; a flag beats its environment variable, which beats the default.
`--help` prints the same. `collegium up --help` lists what a cluster on one machine takes; the chart's values are in
[its README](../deploy/k8s/collegium/README.md).

A limit that refuses counts what it refused: see [telemetry](telemetry.md).
"""
_SERVICES: tuple[tuple[str, type[ServiceSettings]], ...] = (
    ("Gateway, `gateway`", GatewaySettings),
    ("Router, `router_svc`", RouterSettings),
    ("Worker, `expert_svc`", WorkerSettings),
    ("Balancer, `balancer_svc`", BalancerSettings),
)


def render() -> str:
    """Write the page."""
    common = describe(ServiceSettings)
    flags = {one.flag for one in common}
    parts = [_HEAD, *_section("Every service", common)]
    for title, settings in _SERVICES:
        parts += _section(title, [one for one in describe(settings) if one.flag not in flags])
    return "\n".join(parts)


def _section(title: str, settings: list[Described]) -> list[str]:
    return [
        f"## {title}\n",
        "| flag | variable | default | what it sets |",
        "|---|---|---|---|",
        *(_row(one) for one in settings),
        "",
    ]


def _row(one: Described) -> str:
    default = one.default if one.default in ("required", "none") else f"`{one.default}`"
    told = f"{one.help}; {one.bounds}" if one.bounds else one.help
    cells = (f"`{one.flag}`", f"`{one.variable}`", default, told)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    sys.stdout.write(render())
