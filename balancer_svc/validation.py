"""Whether a request can be taken: every field in its bounds, and in keeping with what the cluster is.

Owns the refusals of the balancer's RPCs; nothing of a refused request is kept. The bounds of single fields are
collegium.fabric.bounds'. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import Message

from balancer_svc.load_windows import Counts, read_layers
from balancer_svc.model import Model
from collegium.fabric import bounds
from collegium.fabric.errors import FailedPrecondition, InvalidArgument
from collegium.v1 import balancer_pb2 as pb

# A peer may raise the cluster's epoch up to here; from here on it only grows by counting, and never reaches 2^53.
MAX_TOLD_EPOCH = 2**52
MAX_COUNTED_EPOCH = MAX_TOLD_EPOCH + 2**51
MAX_EXPERTS_IN_ALL = 2**18  # of a model, over its layers: what a placement lists
MAX_MODEL_BYTES = 2**50  # of a model's experts: a copy of them on each of 4,096 workers is counted without wrapping
_REASONS = {"role": "UNKNOWN_ROLE", "address": "NO_ADDRESS", "num_workers": "BAD_NUM_WORKERS"}


def check(request: Message) -> None:
    """Check every field of a request against its bounds. Raises InvalidArgument with the field and the bound."""
    try:
        bounds.check(request)
    except bounds.OutOfBoundsError as error:
        reason = _REASONS.get(error.field, "OUT_OF_BOUNDS")
        raise InvalidArgument(error.what, reason=reason, field=error.field, remedy=error.remedy) from error


def check_join(request: pb.JoinRequest, newest_epoch: int) -> None:
    """Check a request for a lease. newest_epoch: the highest that this balancer knows. Raises InvalidArgument."""
    check(request)
    _check_epoch("seen_epoch", request.seen_epoch, newest_epoch)
    if request.role != pb.ROLE_WORKER:
        return
    if not request.HasField("model") or not request.model.layers:
        raise InvalidArgument("is missing", reason="NO_MODEL", field="model", remedy="a worker says what it serves")
    problem = problem_of(request.model)
    if problem:
        raise InvalidArgument(
            problem, reason="OUT_OF_BOUNDS", field="model.layers", remedy="give fewer, or smaller ones"
        )


def problem_of(model: pb.ModelShape) -> str:
    """Say what is wrong with a model whose fields are in their bounds; empty if nothing is."""
    if not model.layers:
        return "has no layers"
    num_experts = sum(layer.num_experts for layer in model.layers)
    if num_experts > MAX_EXPERTS_IN_ALL:
        return f"has {num_experts} experts in all; the maximum is {MAX_EXPERTS_IN_ALL}"
    num_bytes = sum(layer.num_experts * layer.expert_bytes for layer in model.layers)
    return "" if num_bytes <= MAX_MODEL_BYTES else f"has {num_bytes} bytes in all; the maximum is {MAX_MODEL_BYTES}"


def check_renew(request: pb.RenewRequest, newest_epoch: int) -> None:
    """Check a renewal. Raises InvalidArgument."""
    check(request)
    _check_epoch("seen_epoch", request.seen_epoch, newest_epoch)
    _check_epoch("ready_plan", request.ready_plan, newest_epoch)


def check_scale(request: pb.ScaleRequest, max_workers: int) -> None:
    """Check a number of workers. Raises InvalidArgument that names the bound."""
    if not request.num_workers:
        raise InvalidArgument("is 0", reason="NO_WORKER", field="num_workers", remedy="give at least 1")
    if request.num_workers > max_workers:
        raise InvalidArgument(
            f"is {request.num_workers}; the maximum is {max_workers}",
            reason="TOO_MANY_WORKERS",
            field="num_workers",
            remedy="give less, or raise --max-workers where the cluster is started",
        )


def read_report(request: pb.ReportLoadRequest, model: Model | None) -> Counts:
    """Read a router's counts, [3, L, E]. Raises InvalidArgument for another shape than the model's."""
    try:
        counts = read_layers(request.layers)
    except ValueError as error:
        raise InvalidArgument(str(error), reason="BAD_SHAPE", field="layers") from error
    _, num_layers, num_experts = counts.shape
    if model is not None and [num_experts] * num_layers != [layer.num_experts for layer in model.layers]:
        raise InvalidArgument(
            f"{num_layers} layers of {num_experts} experts, the model has {len(model.layers)}",
            reason="BAD_SHAPE",
            field="layers",
            remedy="start routers and workers on the same checkpoint",
        )
    return counts


def check_same_shape(known: Model, joining: Model, *, is_in_use: bool) -> None:
    """Check that equal digests have equal layers. Raises FailedPrecondition with what differs.

    is_in_use: whether workers serve the known model now, or a placement of its shape is in force.
    """
    if known.digest != joining.digest or not is_in_use or known.layers == joining.layers:
        return
    raise FailedPrecondition(
        f"this worker's model has {_told(joining)}, the cluster's of the same digest {_told(known)}",
        reason="OTHER_MODEL",
        field="model.layers",
        remedy="give every worker the manifest and dtype of the same checkpoint",
    )


def _told(model: Model) -> str:
    experts: Sequence[int] = sorted({layer.num_experts for layer in model.layers})
    sizes: Sequence[int] = sorted({layer.expert_bytes for layer in model.layers})
    return f"{len(model.layers)} layers of {_range(experts)} experts of {_range(sizes)} bytes"


def _range(numbers: Sequence[int]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _check_epoch(field: str, epoch: int, newest_epoch: int) -> None:
    # Above MAX_TOLD_EPOCH balancers count on, and members tell what was counted to one whose memory was lost.
    if epoch > max(MAX_COUNTED_EPOCH, newest_epoch):
        raise InvalidArgument(
            f"is {epoch}", reason="OUT_OF_BOUNDS", field=field, remedy=f"give 0 to {MAX_COUNTED_EPOCH}"
        )
