"""Keep a link to every live worker: ask for it over the control channel, connect, hand it to the engine.

Owned by the event loop; connecting itself runs in a thread. Says whether the router can reach any worker.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import grpc
import torch

from collegium.fabric import logs, rpc
from collegium.fabric.errors import CollegiumError, from_rpc_error
from collegium.fabric.hosts import host_identity
from collegium.fabric.views import from_proto
from collegium.link.connect import connect
from collegium.link.frame import LinkError
from collegium.model.placement import Placement
from collegium.v1 import balancer_pb2, expert_pb2, expert_pb2_grpc
from router_svc.expert_calls import ExpertCalls

_log = logs.get("links")
_OPEN_S = 5.0
_RETRY_S = (0.1, 2.0)
_ANSWERING = (balancer_pb2.MEMBER_STATE_SERVING, balancer_pb2.MEMBER_STATE_RETIRING)


class LinkKeeper:
    """One task per worker that keeps its link open while the worker lives."""

    def __init__(
        self,
        calls: ExpertCalls,
        *,
        dtype: torch.dtype,
        digest: str,
        parts: Mapping[str, str],
        max_rows: int,
        transport: str,
        d_model: int,
        num_experts: Sequence[int],
        on_change: Callable[[], None],
    ):
        """`dtype`: of rows; `digest`, `parts`: the manifest's; `num_experts`: by MoE layer.

        `on_change` is called on the event loop whenever a link came or went.
        """
        self._calls, self._dtype = calls, dtype
        self._parts = parts
        self._digest, self._max_rows, self._d_model = digest, max_rows, d_model
        self._transports = ["unix", "tcp"] if transport == "auto" else [transport]
        self._num_experts = list(num_experts)
        self._on_change = on_change
        self._refused_epoch = 0  # of a placement of another shape than the model's
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by address: a worker may get a new id and be the same process
        self._ids: dict[str, str] = {}  # worker id by address
        self._lost: dict[str, asyncio.Event] = {}  # by address
        self._draining: set[str] = set()  # ids of workers that still answer what was sent to them
        self.router_id = ""

    def take(self, view: balancer_pb2.WatchPlacementResponse) -> None:
        """Follow the cluster's view: links to live workers, the placement in force."""
        if view.placement.epoch > self._calls.epoch:
            self._place(from_proto(view.placement))
        if view.balance.row_ns > 0 and view.balance.activation_ns > 0:
            self._calls.activation_rows = view.balance.activation_ns / view.balance.row_ns
        workers = {
            m.address: m.member_id for m in view.members if m.role == balancer_pb2.ROLE_WORKER and m.state in _ANSWERING
        }
        draining = {m.member_id for m in view.members if m.state == balancer_pb2.MEMBER_STATE_DRAINING}
        for worker_id in self._draining - draining:
            self._draining.discard(worker_id)
            self._calls.drop_link(worker_id)
        for address in self._tasks.keys() - workers.keys():
            self._forget(address, is_draining=self._ids[address] in draining)
        for address, worker_id in workers.items():
            if address not in self._tasks:
                self._ids[address], self._lost[address] = worker_id, asyncio.Event()
                self._tasks[address] = asyncio.create_task(self._keep(address), name=f"link-{address}")
            elif self._ids[address] != worker_id:
                self._calls.rename_link(self._ids[address], worker_id)
                self._ids[address] = worker_id

    def _place(self, placement: Placement) -> None:
        shape = [len(layer) for layer in placement.homes]
        if shape == self._num_experts:
            self._calls.set_placement(placement)
        elif placement.epoch != self._refused_epoch:
            self._refused_epoch = placement.epoch
            _log.warning(
                "a placement of another model is not used; the last one stays",
                epoch=placement.epoch,
                layers=len(shape),
                expected_layers=len(self._num_experts),
            )

    def on_lost(self, worker_id: str, why: str) -> None:
        """Hear from the engine that a link broke. Thread-safe."""
        self._loop.call_soon_threadsafe(self._note_loss, worker_id, why)

    async def close(self) -> None:
        """End all tasks and links."""
        for address in list(self._tasks):
            self._forget(address)
        self._calls.close()

    def _note_loss(self, worker_id: str, why: str) -> None:
        _log.warning("link lost", worker_id=worker_id, why=why)
        for address, known in self._ids.items():
            if known == worker_id:
                self._lost[address].set()
        self._on_change()

    def _forget(self, address: str, *, is_draining: bool = False) -> None:
        self._tasks.pop(address).cancel()
        self._lost.pop(address)
        worker_id = self._ids.pop(address)
        if is_draining:
            self._draining.add(worker_id)
            self._calls.retire_link(worker_id)
        else:
            self._calls.drop_link(worker_id)
        self._on_change()

    async def _keep(self, address: str) -> None:
        pause = _RETRY_S[0]
        lost = self._lost[address]
        while True:
            lost.clear()
            try:
                await self._open(address)
                pause = _RETRY_S[0]
                await lost.wait()
            except (CollegiumError, LinkError, OSError, ValueError) as error:
                _log.warning("link cannot be opened", address=address, why=str(error))
            except Exception:
                _log.exception("link cannot be opened", address=address)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_S[1])

    async def _open(self, address: str) -> None:
        request = expert_pb2.OpenLinkRequest(
            router_id=self.router_id,
            model_digest=self._digest,
            dtype=str(self._dtype).removeprefix("torch."),
            transports=self._transports,
            max_rows=self._max_rows,
            host=host_identity(),
            model_parts=self._parts,
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
            dtype=self._dtype,
            d_model=self._d_model,
            deadline_s=time.monotonic() + _OPEN_S,
        )
        worker_id = self._ids[address]
        self._calls.add_link(worker_id, link, wants_hints=answer.wants_hints)
        _log.info("link open", worker_id=worker_id, transport=answer.transport, address=answer.address)
        self._on_change()
