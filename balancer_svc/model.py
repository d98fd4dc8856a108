"""The model that a cluster serves, as far as placement has to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from collegium.model.placement import LayerSize


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What placement needs to know of the model; equal digests mean equal checkpoints, and parts name what differs."""

    digest: str
    layers: tuple[LayerSize, ...]
    parts: Mapping[str, str] = field(default_factory=dict[str, str])
