"""Keep a link to every live worker: ask for it over the control channel, connect, hand it to the engine.

Owned by the event loop; connecting itself runs in a thread. Says whether the router can reach any worker.
"""

import asyncio
import socket
import time
from collections.abc import Callable

import grpc

from collegium.fabric import logs, rpc
from collegium.fabric.errors import CollegiumError, from_rpc_error
from collegium.fabric.views import from_proto
from collegium.link.connect import connect
from collegium.link.frame import LinkError
from collegium.v1 import balancer_pb2, expert_pb2, expert_pb2_grpc
from router_svc.expert_calls import ExpertCalls
from router_svc.model_loader import RouterModel

_log = logs.get("links")
_OPEN_S = 5.0
_RETRY_S = (0.1, 2.0)


class LinkKeeper:
    """One task per worker that keeps its link open while the worker lives."""

    def __init__(
        self,
        calls: ExpertCalls,
        model: RouterModel,
        *,
        digest: str,
        max_rows: int,
        transport: str,
        d_model: int,
        on_change: Callable[[], None],
    ):
        """`on_change` is called on the event loop whenever a link came or went."""
        self._calls, self._model = calls, model
        self._digest, self._max_rows, self._d_model = digest, max_rows, d_model
        self._transports = ["unix", "tcp"] if transport == "auto" else [transport]
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lost: dict[str, asyncio.Event] = {}
        self.router_id = ""

    def take(self, view: balancer_pb2.WatchPlacementResponse) -> None:
        """Follow the cluster's view: links to live workers, the placement in force."""
        if view.placement.epoch:
            self._calls.set_placement(from_proto(view.placement))
        workers = {
            m.member_id: m.address
            for m in view.members
            if m.role == balancer_pb2.ROLE_WORKER and m.state == balancer_pb2.MEMBER_STATE_SERVING
        }
        for worker_id in self._tasks.keys() - workers.keys():
            self._forget(worker_id)
        for worker_id, address in workers.items():
            if worker_id not in self._tasks:
                self._lost[worker_id] = asyncio.Event()
                self._tasks[worker_id] = asyncio.create_task(self._keep(worker_id, address), name=f"link-{worker_id}")

    def on_lost(self, worker_id: str, why: str) -> None:
        """Hear from the engine that a link broke. Thread-safe."""
        self._loop.call_soon_threadsafe(self._note_loss, worker_id, why)

    async def close(self) -> None:
        """End all tasks and links."""
        for worker_id in list(self._tasks):
            self._forget(worker_id)
        self._calls.close()

    def _note_loss(self, worker_id: str, why: str) -> None:
        _log.warning("link lost", worker_id=worker_id, why=why)
        if worker_id in self._lost:
            self._lost[worker_id].set()
        self._on_change()

    def _forget(self, worker_id: str) -> None:
        self._tasks.pop(worker_id).cancel()
        self._lost.pop(worker_id, None)
        self._calls.drop_link(worker_id)
        self._on_change()

    async def _keep(self, worker_id: str, address: str) -> None:
        pause = _RETRY_S[0]
        while True:
            lost = self._lost[worker_id]
            lost.clear()
            try:
                await self._open(worker_id, address)
                pause = _RETRY_S[0]
                await lost.wait()
            except (CollegiumError, LinkError, OSError, ValueError) as error:
                _log.warning("link cannot be opened", worker_id=worker_id, address=address, why=str(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_S[1])

    async def _open(self, worker_id: str, address: str) -> None:
        request = expert_pb2.OpenLinkRequest(
            router_id=self.router_id,
            model_digest=self._digest,
            dtype=str(self._model.dtype).removeprefix("torch."),
            transports=self._transports,
            max_rows=self._max_rows,
            host=socket.gethostname(),
        )
        async with rpc.channel(address) as channel:
            try:
                answer = await expert_pb2_grpc.ExpertStub(channel).OpenLink(request, timeout=_OPEN_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
        link = await asyncio.to_thread(
            connect,
            answer.transport,
            answer.address,
            link_id=answer.link_id,
            secret=answer.secret,
            dtype=self._model.dtype,
            d_model=self._d_model,
            deadline_s=time.monotonic() + _OPEN_S,
        )
        if worker_id not in self._tasks:  # it left meanwhile
            link.close()
            return
        self._calls.add_link(worker_id, link)
        _log.info("link open", worker_id=worker_id, transport=answer.transport, address=answer.address)
        self._on_change()
