"""Membership: how a process takes a lease at the balancer, keeps it, and learns the cluster's view.

Owns the renewing and the watching, on the loop that entered it. A balancer that is away changes nothing: the last view
stays, and renewing goes on until it is back. What a balancer says is a peer's word: an answer or a view that is out of
bounds is dropped whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any

from google.protobuf.message import Message
from grpc import aio

from collegium.fabric import bounds, lifecycle, logs, metrics, rpc
from collegium.fabric.channels import check_target
from collegium.fabric.errors import CollegiumError, DeadlineExceeded, NotFound, Unavailable, from_rpc_error
from collegium.fabric.faults import Faults
from collegium.fabric.views import check_view
from collegium.v1 import balancer_pb2 as pb
from collegium.v1 import balancer_pb2_grpc

_CALL_S = 2.0
_BACKOFF_S = (0.1, 2.0)
_SAY_EVERY_S = 3.0

_log = logs.get("leases")


class Membership:
    """One process's lease: an async context manager around the time in which it takes part.

    Entering joins, trying in sight for `join_limit_s` (then Unavailable); leaving gives the lease back. A lease that
    lapsed is replaced by a new one under a new member_id.
    """

    def __init__(
        self,
        balancer_address: str,
        role: pb.Role,
        address: str,
        metrics_url: str = "",
        num_threads: int = 0,
        model: pb.ModelShape | None = None,
        capacity_bytes: int = 0,
        counters: Callable[[], Mapping[str, float]] = dict,
        *,
        failure_domain: str = "",
        tls: rpc.TlsTrust | None = None,
        join_limit_s: float = 30.0,
    ) -> None:
        self._balancer_address = balancer_address
        self._join_request = pb.JoinRequest(
            role=role,
            address=address,
            metrics_url=metrics_url,
            num_threads=num_threads,
            model=model,
            capacity_bytes=capacity_bytes,
            failure_domain=failure_domain,
        )
        self._counters = counters
        self._tls = tls
        self._join_limit_s = join_limit_s
        self._member_id = ""
        self._ttl_s = 1.0
        self._state: pb.MemberState = pb.MEMBER_STATE_JOINING
        self._ready_plan = 0
        self._seen_epoch = 0
        self._view: pb.WatchPlacementResponse | None = None
        self._viewed_s = time.monotonic()
        self._view_changed = asyncio.Event()
        self._kick = asyncio.Event()
        self._is_lost = False
        self._dropped = ""  # why a view was dropped last
        self._tasks: list[asyncio.Task[None]] = []
        self._faults = {
            name: Faults(_log, name) for name in ("renewing the lease", "watching the cluster", "following the cluster")
        }

    @property
    def member_id(self) -> str:
        """The id under the present lease."""
        return self._member_id

    @property
    def view(self) -> pb.WatchPlacementResponse | None:
        """The newest view of the cluster, None until the first one came; not to be modified."""
        return self._view

    @property
    def viewed_s(self) -> float:
        """When the newest view came, on the monotonic clock; before the first one, when this was made."""
        return self._viewed_s

    def set_state(self, state: pb.MemberState) -> None:
        """Report how far this process is; sent at once."""
        if state != self._state:
            self._state = state
            self._kick.set()

    def set_ready_plan(self, epoch: int) -> None:
        """Report that the homes of a plan are resident (workers); sent at once."""
        if epoch != self._ready_plan:
            self._ready_plan = epoch
            self._kick.set()

    async def report_load(self, report: pb.ReportLoadRequest) -> bool:
        """Tell the balancer what gates have chosen so far (routers). Gives whether it heard."""
        report.member_id = self._member_id
        try:
            await self._stub.ReportLoad(report, timeout=_CALL_S)
        except aio.AioRpcError as error:
            _log.debug("the balancer did not take the load report", why=error.details())
            return False
        return True

    async def follow(self, take: Callable[[pb.WatchPlacementResponse], Awaitable[None] | None]) -> None:
        """Hand every view to `take` until cancelled.

        A view that `take` fails on ends nothing: it is given again after a pause, unless a newer one has come.
        """
        faults = self._faults["following the cluster"]
        async for view in self.views():
            while view is self._view:
                try:
                    taking = take(view)
                    if taking is not None:
                        await taking
                except Exception as error:
                    await asyncio.sleep(faults.note(error))
                else:
                    faults.clear()
                    break

    async def views(self) -> AsyncIterator[pb.WatchPlacementResponse]:
        """Iterate over views, the newest first and then every change; a slow reader skips to the newest.

        Never ends by itself. The placement's epoch never shrinks from one view to the next.
        """
        last = None
        while True:
            changed, view = self._view_changed, self._view
            if view is not None and view is not last:
                last = view
                yield view
            else:
                await changed.wait()

    async def __aenter__(self) -> Membership:
        """Join and start renewing and watching."""
        check_target(self._balancer_address, "--balancer")
        self._channel = rpc.channel(self._balancer_address, tls=self._tls)
        self._stub: Any = balancer_pb2_grpc.BalancerStub(self._channel)
        try:
            await self._join_within(self._join_limit_s)
        except BaseException:
            await self._channel.close()
            raise
        self._conceal = metrics.expose(self._own_counters)
        self._tasks = [
            asyncio.create_task(self._renew_for_ever(), name="lease-renew"),
            asyncio.create_task(self._watch_for_ever(), name="placement-watch"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back, within a second."""
        self._conceal()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            await self._stub.Leave(pb.LeaveRequest(member_id=self._member_id), timeout=1.0)
        except aio.AioRpcError as lost:
            _log.debug("the lease could not be given back", member_id=self._member_id, why=lost.details())
        finally:
            await self._channel.close()

    async def _join_within(self, limit_s: float) -> None:
        start_s = time.monotonic()
        said_s, pause_s = start_s, _BACKOFF_S[0]
        while True:
            try:
                await self._join()
                return
            except (Unavailable, DeadlineExceeded) as error:
                now_s = time.monotonic()
                if now_s - start_s + pause_s > limit_s:
                    raise Unavailable(
                        f"the balancer at {self._balancer_address} did not answer within {limit_s:g} s: {error}",
                        reason="BALANCER_UNREACHABLE",
                        field="--balancer",
                        remedy="check the address and that the balancer runs; --balancer-wait-s says how long to wait",
                    ) from error
                if now_s - said_s > _SAY_EVERY_S:
                    said_s = now_s
                    _log.warning("waiting for the balancer", address=self._balancer_address, why=error.message)
            await lifecycle.sleep_unless_stopping(pause_s)
            pause_s = min(2 * pause_s, _BACKOFF_S[1])

    async def _join(self) -> None:
        request = pb.JoinRequest()
        request.CopyFrom(self._join_request)
        request.seen_epoch = self._seen_epoch
        try:
            response: pb.JoinResponse = await self._stub.Join(request, timeout=_CALL_S)
        except aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        _check_answer(response)
        self._member_id, self._ttl_s = response.member_id, response.ttl_ms / 1e3
        _log.info("joined", member_id=self._member_id, balancer=self._balancer_address)
        self._kick.set()  # what was reported under an older lease is reported again

    async def _renew_for_ever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._ttl_s / 3):
                    await self._kick.wait()
            except TimeoutError:
                pass
            self._kick.clear()
            try:
                await self._renew()
                if self._is_lost:
                    _log.info("the balancer is back", address=self._balancer_address)
                self._is_lost = False
            except CollegiumError as error:
                if not self._is_lost:
                    _log.warning("the balancer is away; going on without it", why=error.message)
                self._is_lost = True
                await asyncio.sleep(min(self._ttl_s / 10, 0.5))
                self._kick.set()
            except Exception as error:
                await asyncio.sleep(self._faults["renewing the lease"].note(error))
                self._kick.set()

    async def _renew(self) -> None:
        request = pb.RenewRequest(
            member_id=self._member_id,
            state=self._state,
            ready_plan=self._ready_plan,
            counters=self._count(),
            seen_epoch=self._seen_epoch,
        )
        try:
            response: pb.RenewResponse = await self._stub.Renew(request, timeout=max(0.5, self._ttl_s / 3))
            _check_answer(response)
            self._ttl_s = response.ttl_ms / 1e3
        except aio.AioRpcError as rpc_error:
            error = from_rpc_error(rpc_error)
            if not isinstance(error, NotFound):
                raise error from rpc_error
            _log.warning("the lease had lapsed; joining again", member_id=self._member_id)
            await self._join()

    def _count(self) -> Mapping[str, float]:
        try:
            return bounds.usable_counters(self._counters())
        except Exception:  # a fault in counting must not cost the lease
            _log.exception("counters could not be read")
            return {}

    def _own_counters(self) -> Mapping[str, float]:
        return {
            metrics.series("collegium_seen_epoch"): float(self._seen_epoch),
            metrics.series("collegium_view_age_seconds"): time.monotonic() - self._viewed_s,
            metrics.series("collegium_loop_faults_total"): float(
                sum(faults.num_faults for faults in self._faults.values())
            ),
        }

    async def _watch_for_ever(self) -> None:
        pause_s = _BACKOFF_S[0]
        while True:
            try:
                request = pb.WatchPlacementRequest(member_id=self._member_id)
                watch: AsyncIterator[pb.WatchPlacementResponse] = self._stub.WatchPlacement(
                    request, wait_for_ready=True
                )
                async for view in watch:
                    self._take(view)
                    pause_s = _BACKOFF_S[0]
            except aio.AioRpcError as error:
                _log.debug("the watch broke", why=error.details())
            except Exception as error:
                self._faults["watching the cluster"].note(error)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _BACKOFF_S[1])

    def _take(self, view: pb.WatchPlacementResponse) -> None:
        try:
            check_view(view)
        except ValueError as error:
            self._drop(str(error))
            return
        if view.placement.epoch < self._seen_epoch:
            _log.debug("dropped a view from the past", epoch=view.placement.epoch, seen=self._seen_epoch)
            return
        if view.placement.epoch > self._seen_epoch:
            self._seen_epoch = view.placement.epoch
            self._kick.set()
        self._view, self._viewed_s = view, time.monotonic()
        self._view_changed.set()
        self._view_changed = asyncio.Event()

    def _drop(self, why: str) -> None:
        if why != self._dropped:
            self._dropped = why
            _log.warning("dropped a view that cannot be used; the last one stays", why=why)


def _check_answer(response: Message) -> None:
    try:
        bounds.check(response)
    except bounds.OutOfBoundsError as error:
        raise Unavailable(f"the balancer's answer cannot be used: {error}", reason="BAD_ANSWER") from error
