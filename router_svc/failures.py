"""Why a sequence could not go on, as its gateway is told. Owns the wording of what is a fault of the router's own."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a sequence could not go on: a canonical status name, a reason and a message."""

    code: str
    reason: str
    message: str


class UnusableRowsError(ValueError):
    """A step has stored keys or values that are no finite numbers."""


UNUSABLE_LOGITS = Failure(
    code="INTERNAL", reason="UNUSABLE_LOGITS", message="the model gave no usable scores (NaN or infinite)"
)


def command_failed(name: str, error: Exception) -> Failure:
    """Say that what was asked for could not be done."""
    message = f"the router failed to {name} ({type(error).__name__}); its log has the details"
    return Failure(code="INTERNAL", reason="COMMAND_FAILED", message=message)


def step_failed(error: Exception) -> Failure:
    """Say that a step failed."""
    if isinstance(error, UnusableRowsError):
        return UNUSABLE_LOGITS
    message = f"the router failed in a step ({type(error).__name__}); its log has the details"
    return Failure(code="INTERNAL", reason="STEP_FAILED", message=message)


def expert_failed(error: Exception) -> Failure:
    """Say that an expert failed."""
    return Failure(code="INTERNAL", reason="EXPERT_FAILED", message=f"an expert could not be computed: {error}")
