"""What the services say of themselves: their settings, and which of them the chart decides.

Owns the table of roles. Reads the settings' declarations only; starts nothing.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from balancer_svc.settings import BalancerSettings
from collegium.fabric.byte_size import ByteSize, MemoryBudget
from expert_svc.settings import Settings as WorkerSettings
from gateway.settings import GatewaySettings
from router_svc.settings import Settings as RouterSettings

# Decided by the chart for every role, from addresses and from values that all roles share.
_DECIDED = {"bind", "advertise", "balancer", "metrics_bind", "health_bind", "threads"} | {
    "log_level",
    "log_format",
    "otlp_endpoint",
    "trace_ratio",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A service as the chart knows it: its module, its settings, and those of them that the chart decides."""

    module: str
    settings: type[Any]
    decided: frozenset[str]

    @property
    def fields(self) -> Mapping[str, dataclasses.Field[Any]]:
        return {field.name: field for field in dataclasses.fields(self.settings)}

    @property
    def free(self) -> list[str]:
        """Settings that a user may give under `settings`."""
        return sorted(self.fields.keys() - self.decided)

    def variable(self, name: str) -> str:
        """The environment variable of a setting."""
        return self.fields[name].metadata["collegium.setting"].env or f"COLLEGIUM_{name.upper()}"


def _role(module: str, settings: type[Any], *decided: str) -> Role:
    return Role(module=module, settings=settings, decided=frozenset(_DECIDED | {*decided}))


ROLES: Mapping[str, Role] = {
    "gateway": _role("gateway", GatewaySettings, "model", "routers", "drain_s", "tls_cert", "tls_key", "api_keys"),
    "router": _role(
        "router_svc",
        RouterSettings,
        *("model", "manifest", "model_name", "dtype", "device", "drain_s"),
        "unsafe_routing",  # for experiments, which have no place in a chart
    ),
    "worker": _role(
        "expert_svc",
        WorkerSettings,
        *("manifest", "dtype", "device", "data_bind", "data_advertise", "failure_domain", "drain_s"),
    ),
    "balancer": _role(
        "balancer_svc",
        BalancerSettings,
        *("redis_url", "cluster", "expected_workers"),
        "balancer_wait_s",  # it waits for none
    ),
}


def settings_schema(role: Role) -> dict[str, Any]:
    """Write what values.schema.json must say of a role's `settings`."""
    hints = typing.get_type_hints(role.settings)
    properties = {name: _property(role.fields[name], hints[name]) for name in role.free}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _property(field: dataclasses.Field[Any], hint: Any) -> dict[str, Any]:
    meta = field.metadata["collegium.setting"]
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    bounds = {k: v for k, v in (("minimum", meta.at_least), ("maximum", meta.at_most)) if v is not None}
    shape: dict[str, Any]
    if meta.choices:
        shape = {"enum": list(meta.choices)}
    elif hint is bool:
        shape = {"type": "boolean"}
    elif hint is int:
        shape = {"type": "integer", **bounds}
    elif hint is float:
        shape = {"type": "number", **bounds}
    elif hint is ByteSize:
        shape = {"$ref": "#/definitions/bytes"}
    elif hint is MemoryBudget:
        shape = {"$ref": "#/definitions/memoryBudget"}
    else:
        assert hint in (str, Path), f"{field.name}: the schema does not know {hint}"
        shape = {"type": "string"}
    return shape if "$ref" in shape else {"description": meta.help, **shape}
