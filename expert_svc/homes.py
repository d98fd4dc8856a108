"""Warm the worker's homes: load what a plan gives it as far as its slots go, report, and say what no plan gives it.

Owned by the event loop; loading runs in a thread of its own, when nothing else wants the core. Make before break: the
homes of the plan in force and of the coming one are kept together until the coming one is published.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence

from collegium.buffering.policies import ExpertId
from collegium.fabric import logs
from collegium.fabric.leases import Membership
from collegium.fabric.low_priority import run_low
from collegium.fabric.views import from_proto
from collegium.model.architectures import CheckpointError
from collegium.model.placement import Placement
from collegium.v1 import balancer_pb2
from expert_svc.buffer import ExpertBuffer

_log = logs.get("homes")
_SAY_EVERY = 0.25  # share of a load between two lines of progress
_RETRY_S = 5.0
_ACKNOWLEDGE_S = 2.0


class HomeKeeper:
    """Follows the cluster's view for one worker."""

    def __init__(
        self,
        buffer: ExpertBuffer,
        membership: Membership,
        on_ready: Callable[[], None],
        *,
        num_experts: Sequence[int] | None = None,
        stands_back: bool = False,
    ):
        """`on_ready` is called whenever a view is taken, once a plan has named this worker and its homes are warm.

        `num_experts`: by MoE layer of the model; None: whatever a placement lists. `stands_back`: others serve already,
        and the first homes are loaded at low priority too, as all later ones are.
        """
        self._num_experts = None if num_experts is None else list(num_experts)
        self._buffer, self._membership, self._on_ready = buffer, membership, on_ready
        self._stands_back = stands_back
        self._ready_plan = 0

    async def follow(self) -> None:
        """Take every view until cancelled."""
        await self._membership.follow(self.take)

    async def take(self, view: balancer_pb2.WatchPlacementResponse) -> None:
        """Load what the coming plan gives this worker, then drop what no plan does."""
        worker_id = self._membership.member_id
        placement, planned = self._read(view.placement), self._read(view.planned)
        current, coming = placement.experts_of(worker_id), planned.experts_of(worker_id)
        self._buffer.set_homes([*current, *coming])
        if planned.epoch > self._ready_plan and worker_id in planned.worker_ids:
            if not await self._warm(coming, planned.epoch):
                return
            self._ready_plan = planned.epoch
            self._membership.set_ready_plan(planned.epoch)
        elif worker_id in placement.worker_ids and not planned.epoch:
            await self._warm(current, placement.epoch)
            if self._buffer.holds_others(current):
                await self._seen_by_routers(placement.epoch)
                gone = await asyncio.to_thread(self._buffer.release_others, current)  # waits for a batch
                _log.info("experts released", num_experts=gone, epoch=placement.epoch)
        if self._ready_plan or worker_id in placement.worker_ids:  # one that no plan has named yet has loaded nothing
            self._on_ready()

    def _read(self, message: balancer_pb2.Placement) -> Placement:
        placement = from_proto(message)
        shape = [len(layer) for layer in placement.homes]
        if placement.worker_ids and self._num_experts not in (None, shape):
            raise ValueError(f"placement {placement.epoch} has {len(shape)} layers of another model's experts")
        return placement

    async def _seen_by_routers(self, epoch: int) -> None:
        """Wait until every router says that it uses an epoch, or 2 s: a stale table costs a miss, never an answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ACKNOWLEDGE_S):
                async for view in self._membership.views():
                    routers = [member for member in view.members if member.role == balancer_pb2.ROLE_ROUTER]
                    if all(router.seen_epoch >= epoch for router in routers):
                        return

    async def _warm(self, experts: Iterable[ExpertId], epoch: int) -> bool:
        wanted = list(experts)
        said = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal said
            if done == total or done / total >= said + _SAY_EVERY:
                said = done / total
                _log.info("loading experts", done=done, total=total, epoch=epoch)

        if all(self._buffer.is_resident(expert_id) for expert_id in wanted):
            return True
        try:
            if self._stands_back or self._ready_plan:
                await asyncio.to_thread(run_low, lambda: self._buffer.warm(wanted, progress), "warm")
            else:  # nobody serves yet
                await asyncio.to_thread(self._buffer.warm, wanted, progress)
        except CheckpointError as error:
            _log.error("an expert cannot be loaded; the worker stays out of the plan", why=str(error), epoch=epoch)
            await asyncio.sleep(_RETRY_S)
            return False
        return True
