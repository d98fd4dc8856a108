"""A layer's shared experts as experts like the others: which bytes of the stored tensors would be whose.

What all rows go through is stored as one gated expert, of a multiple of a routed one's width: a sum over its hidden
numbers, so it is as many experts of a routed one's width, each of weight 1. Owns the cut. D model, F ffn of a routed
expert, N shared ones.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from collegium.model.architectures import Layout, Role, UnsupportedModelError
from collegium.model.checkpoint_survey import Survey
from collegium.model.manifest_entries import ITEM_BYTES, TensorRef
from collegium.model.router_tensors import RouterTensor

_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.mlp\.(?:shared_experts?|shared_mlp)\.(gate|up|down)_proj\.weight$")
_ROLES = {"gate": Role.GATE, "up": Role.UP, "down": Role.DOWN}
_REMEDY = "leave its shared experts on the router (--shared-experts=router)"


def with_shared(survey: Survey) -> tuple[Survey, int]:
    """Have a survey's shared experts follow the routed ones of each layer: the survey, and N.

    Raises UnsupportedModelError where there are none, or none that are so many experts of weight 1.
    """
    found: dict[int, dict[Role, RouterTensor]] = {}
    for one in survey.router:
        if match := _KEY.search(one.key):
            found.setdefault(int(match[1]), {})[_ROLES[match[2]]] = one
    if not found:
        raise UnsupportedModelError(f"this {survey.model_type} has no shared experts; leave --shared-experts out")
    if any("shared_expert_gate" in one.key for one in survey.router):
        raise UnsupportedModelError(f"{survey.model_type} weighs its shared experts by a gate of their own; {_REMEDY}")
    if survey.layout not in (Layout.PER_EXPERT, Layout.FUSED) or not survey.form.is_gated:
        raise UnsupportedModelError(f"{survey.model_type} keeps its routed experts in another form; {_REMEDY}")
    counts = {_num_shared(survey, found.get(layer, {})) for layer in survey.experts}
    if len(counts) > 1 or None in counts:
        raise UnsupportedModelError(
            f"the shared experts of {survey.model_type} are no multiple of a routed one's width in every layer; "
            f"{_REMEDY}"
        )
    num_shared = counts.pop() or 0
    experts = {
        layer: {
            **routed,
            **{survey.num_experts + at: _cut(survey, found[layer], at, num_shared) for at in range(num_shared)},
        }
        for layer, routed in survey.experts.items()
    }
    num_experts, top_k = survey.num_experts + num_shared, survey.top_k + num_shared
    return replace(survey, experts=experts, num_experts=num_experts, top_k=top_k), num_shared


def _num_shared(survey: Survey, tensors: Mapping[Role, RouterTensor]) -> int | None:
    """N of a layer; None where its tensors don't say."""
    if set(tensors) != set(_ROLES.values()) or any(one.dtype not in ITEM_BYTES for one in tensors.values()):
        return None
    width = tensors[Role.UP].shape[0]
    fits = tensors[Role.GATE].shape == tensors[Role.UP].shape == (width, survey.d_model)
    if not fits or tensors[Role.DOWN].shape != (survey.d_model, width) or width % survey.d_ffn:
        return None
    return width // survey.d_ffn


def _cut(survey: Survey, tensors: Mapping[Role, RouterTensor], at: int, num_shared: int) -> dict[Role, TensorRef]:
    """The share of the at-th: rows of gate and up, columns of down."""
    d_model, d_ffn = survey.d_model, survey.d_ffn
    found: dict[Role, TensorRef] = {}
    for role, one in tensors.items():
        item = ITEM_BYTES[one.dtype]
        is_down = role is Role.DOWN
        found[role] = TensorRef(
            file=one.file,
            key=one.key,
            role=role,
            offset=one.offset + at * d_ffn * item * (1 if is_down else d_model),
            shape=(d_model, d_ffn) if is_down else (d_ffn, d_model),
            dtype=one.dtype,
            row_bytes=d_ffn * num_shared * item if is_down and num_shared > 1 else 0,
        )
    return found
