"""Make a worker's expert buffer from its budgets, and say what they come to.

Owns the order in which memory is taken: staging sets, arena, slots. Used by the service and by whoever runs workers in
a process of its own.
"""

import math

import torch

from collegium.buffering.pinned import Pinned
from collegium.buffering.policies import Policy, make_policy
from collegium.buffering.quotas import Quotas
from collegium.fabric import logs
from collegium.fabric.byte_size import ByteSize, MemoryBudget
from collegium.fabric.errors import FailedPrecondition
from collegium.model.manifest import Manifest
from collegium.model.weights import ExpertReader
from expert_svc.budget import MemoryPlan, ModelBytes, plan_memory
from expert_svc.buffer import ExpertBuffer
from expert_svc.loading import Loads
from expert_svc.regret import RegretSample
from expert_svc.slots import Slots, blank_slot, bytes_on_device
from expert_svc.tiers import Arena, Disk, Source

_log = logs.get("memory")
_NUM_STAGING_SETS = 2  # one is packed while the next is read


def bytes_of(manifest: Manifest, dtype: torch.dtype, device: torch.device | None = None) -> ModelBytes:
    """Measure what an expert and its staging take."""
    expert_bytes = blank_slot(manifest, dtype).num_bytes if device is None else bytes_on_device(manifest, dtype)
    return ModelBytes(
        num_experts=sum(len(layer.experts) for layer in manifest.layers),
        num_layers=len(manifest.layers),
        top_k=manifest.top_k,
        expert_bytes=expert_bytes,
        staging_bytes=ExpertReader(manifest, dtype).num_bytes + expert_bytes,
        is_on_device=device is not None,
    )


def make_source(
    manifest: Manifest,
    dtype: torch.dtype,
    *,
    expert_memory: MemoryBudget,
    host_memory: MemoryBudget,
    device: torch.device | None = None,
) -> Source:
    """Make what slots are filled from. Raises FailedPrecondition where a budget is too small."""
    model = bytes_of(manifest, dtype, device)
    plan = plan_memory(model, expert_memory, host_memory, num_staging_sets=_NUM_STAGING_SETS)
    disk = Disk(manifest, dtype, num_sets=plan.num_staging_sets)
    if not plan.num_places:
        return disk
    is_pinned = device is not None and device.type == "cuda"
    return Arena(disk, num_places=plan.num_places, expert_bytes=model.expert_bytes, is_pinned=is_pinned)


def make_buffer(
    manifest: Manifest,
    dtype: torch.dtype,
    *,
    expert_memory: MemoryBudget,
    host_memory: MemoryBudget,
    policy: str = "ewma",
    num_load_threads: int = 2,
    can_prefetch: bool = True,
    source: Source | None = None,
    device: torch.device | None = None,
) -> ExpertBuffer:
    """Take all memory now and make the buffer. `source` stands in for the tiers where it is given; with a `device`,
    slots are in its memory.

    Raises FailedPrecondition, naming the least that works, where a budget is too small.
    """
    if device is not None and not expert_memory:
        raise FailedPrecondition(
            "slots on a device are all made at the start, so their number must be known",
            reason="MEMORY_NOT_GIVEN",
            field="--expert-memory",
            remedy="give it, such as 40GiB, or 100% where every expert fits",
        )
    model = bytes_of(manifest, dtype, device)
    plan = plan_memory(model, expert_memory, host_memory, num_staging_sets=_NUM_STAGING_SETS)
    _tell(model, plan)
    source = source or make_source(manifest, dtype, expert_memory=expert_memory, host_memory=host_memory, device=device)
    num_experts = [len(layer.experts) for layer in manifest.layers]
    buffer = ExpertBuffer(
        Slots(manifest, dtype, num_slots=plan.num_slots, device=device),
        Loads(source, num_threads=num_load_threads),
        _policy_for(manifest, policy),
        Quotas(model.num_layers, max(num_experts), plan.num_slots or model.num_experts),
        num_experts=num_experts,
        can_prefetch=can_prefetch,
    )
    return buffer


def _policy_for(manifest: Manifest, name: str) -> Policy:
    policy = make_policy(name, is_selective=True)
    if not manifest.num_shared:
        return policy
    sizes = [len(layer.experts) for layer in manifest.layers]
    shared = [(layer, size - 1 - at) for layer, size in enumerate(sizes) for at in range(manifest.num_shared)]
    return Pinned(policy, shared)


def make_sample(manifest: Manifest, buffer: ExpertBuffer) -> RegretSample | None:
    """Have the buffer's visits sampled, where its policy has anything to decide."""
    if buffer.is_roomy or buffer.max_resident is None:
        return None
    num_experts = max(len(layer.experts) for layer in manifest.layers)
    sample = RegretSample(num_layers=len(manifest.layers), num_experts=num_experts, num_slots=buffer.max_resident)
    buffer.on_visit = sample.note
    return sample


def _tell(model: ModelBytes, plan: MemoryPlan) -> None:
    facts = {
        "expert_bytes": model.expert_bytes,
        "token_cycle": f"{model.token_cycle_bytes / 2**20:.1f} MiB",
        "least": f"{plan.least_bytes / 2**20:.1f} MiB",
    }
    if plan.num_slots is None:
        _log.info("expert memory without a limit", **facts)
        return
    share = 100 * plan.num_slots / model.num_experts
    _log.info("expert memory", slots=plan.num_slots, of_all_experts=f"{share:.1f}%", arena=plan.num_places, **facts)
    if plan.is_below_token_cycle(model.expert_bytes):
        wanted = ByteSize(math.ceil(model.token_cycle_bytes / 2**20) * 2**20)
        _log.warning(
            "--expert-memory holds less than one token's experts: most requests will be misses, unless other workers "
            "take their share",
            token_cycle=str(wanted),
            slots=plan.num_slots,
        )
