"""What a worker's memory comes to: slots, staging sets, places in the arena; and the least that is of use.

Pure arithmetic on bytes. The token cycle is what one token touches over all layers: a buffer that is smaller cannot
hold even one token's experts until the next token comes.
"""

from dataclasses import dataclass

from collegium.fabric.byte_size import ByteSize, MemoryBudget
from collegium.fabric.errors import FailedPrecondition

_LEAST_SLOTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """A model's experts in the kernel's form, and what reading one takes beside its slot."""

    num_experts: int  # over all layers
    num_layers: int
    top_k: int
    expert_bytes: int
    staging_bytes: int  # of one set: the expert as stored, cast where it must be, and packed
    is_on_device: bool = False  # slots are in a device's memory, and staging sets are not

    @property
    def token_cycle_bytes(self) -> int:
        """Bytes of the experts that one token touches."""
        return self.num_layers * self.top_k * self.expert_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How a worker's memory is laid out. num_slots None: as many as are needed, no budget."""

    num_slots: int | None
    num_places: int  # of the arena
    num_staging_sets: int
    token_cycle_bytes: int
    least_bytes: int

    def is_below_token_cycle(self, expert_bytes: int) -> bool:
        """Whether one token's experts do not fit."""
        return self.num_slots is not None and self.num_slots * expert_bytes < self.token_cycle_bytes


def plan_memory(
    model: ModelBytes, expert_memory: MemoryBudget, host_memory: MemoryBudget, *, num_staging_sets: int
) -> MemoryPlan:
    """Lay out the budgets. Staging sets come out of host memory where there is an arena, or where expert memory is a
    device's, else out of expert memory.

    Raises FailedPrecondition, naming the least number that works, where a budget is too small.
    """
    total = model.num_experts * model.expert_bytes
    staging = num_staging_sets * model.staging_bytes
    has_arena = bool(host_memory)
    num_places = 0
    if has_arena:
        room = host_memory.bytes_of(total) - (0 if host_memory.is_share else staging)
        num_places = min(model.num_experts, room // model.expert_bytes)
        if num_places < 1:
            raise _too_small("--host-memory", host_memory, model.expert_bytes + staging, "one expert and its staging")
    beside = 0 if has_arena or model.is_on_device else staging
    least = _LEAST_SLOTS * model.expert_bytes + beside
    num_slots = None
    if expert_memory:
        given = expert_memory.bytes_of(total)
        if given < least:
            raise _too_small("--expert-memory", expert_memory, least, "two slots")
        num_slots = min(model.num_experts, (given - beside) // model.expert_bytes)
    return MemoryPlan(
        num_slots=num_slots,
        num_places=num_places,
        num_staging_sets=num_staging_sets,
        token_cycle_bytes=model.token_cycle_bytes,
        least_bytes=least,
    )


def _too_small(flag: str, given: MemoryBudget, least: int, what: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{flag} {given} is less than {what} take",
        reason="MEMORY_TOO_SMALL",
        field=flag,
        remedy=f"give at least {ByteSize(least)} ({least / 2**20:.1f} MiB)",
    )
