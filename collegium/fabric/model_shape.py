"""What a member says of its model when it joins: identity by parts, and the sizes that placement needs.

Owns the correspondence of a manifest and a ModelShape, and the sentence about two that differ.
"""

from __future__ import annotations

from collections.abc import Mapping

from collegium.model import identity
from collegium.model.checkpoint_files import shown
from collegium.model.manifest_entries import Manifest
from collegium.v1 import balancer_pb2 as pb

_BYTES = {"float32": 4, "bfloat16": 2}


def shape_of(manifest: Manifest, dtype: str) -> pb.ModelShape:
    """Describe a checkpoint that is served as `dtype`, "float32" or "bfloat16", to the balancer."""
    layers = [
        pb.LayerShape(num_experts=len(layer.experts), expert_bytes=manifest.num_params * _BYTES[dtype])
        for layer in manifest.layers
    ]
    return pb.ModelShape(digest=manifest.digest, layers=layers, parts=manifest.parts | {identity.DTYPE: dtype})


def tell_other_model(digest: str, parts: Mapping[str, str], their_digest: str, their_parts: Mapping[str, str]) -> str:
    """Say by name how two models differ, such as "config.json and tokenizer differ"; "" if they are the same.

    The served types count only if both sides say them. A side that names no parts is told by its digest.
    """
    if identity.DTYPE not in parts.keys() & their_parts.keys():
        parts, their_parts = _without_dtype(parts), _without_dtype(their_parts)
    if digest == their_digest and parts.get(identity.DTYPE) == their_parts.get(identity.DTYPE):
        return ""
    told = identity.tell_differences(parts, their_parts) if parts and their_parts else ""
    digests = f"digests {shown(digest[:12]) or 'none'} and {shown(their_digest[:12]) or 'none'}"
    return f"{told} ({digests})" if told else f"their {digests} differ"


def _without_dtype(parts: Mapping[str, str]) -> dict[str, str]:
    return {name: part for name, part in parts.items() if name != identity.DTYPE}
