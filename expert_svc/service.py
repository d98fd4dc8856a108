"""The worker's gRPC service: promise links to routers, describe what is resident.

Owns the promises: ids and one-time secrets. Rows never pass here.
"""

import itertools
import secrets
import time
from collections.abc import Callable, Mapping

import grpc
import torch

from collegium.fabric import logs
from collegium.fabric.errors import FailedPrecondition, InvalidArgument, Unavailable, shown
from collegium.fabric.hosts import host_identity
from collegium.fabric.model_shape import tell_other_model
from collegium.link.base import ExpectedLink, WorkerPort
from collegium.link.frame import SECRET_BYTES
from collegium.model.manifest import Manifest
from collegium.v1 import expert_pb2, expert_pb2_grpc
from expert_svc.buffer import ExpertBuffer
from expert_svc.validation import check_open_link

_log = logs.get("worker")
_SECRET_LIFE_S = 10.0
_NUM_CREDITS = 4  # micro-batches of one router that may be under way at once

Context = grpc.aio.ServicerContext


class ExpertService(expert_pb2_grpc.ExpertServicer):
    """Implements collegium.v1.Expert."""

    def __init__(
        self,
        port: WorkerPort,
        buffer: ExpertBuffer,
        manifest: Manifest,
        dtype: torch.dtype,
        *,
        data_address: str,
        counters: Callable[[], Mapping[str, float]],
    ):
        """`data_address` is what routers are told for transport "tcp"."""
        self._port, self._buffer, self._manifest, self._dtype = port, buffer, manifest, dtype
        self._data_address, self._counters = data_address, counters
        self._digest, self._parts = manifest.digest, manifest.parts
        self.worker_id = ""  # set by whoever holds the lease
        self._ids = itertools.count(1)
        self.is_draining = False

    async def OpenLink(self, request: expert_pb2.OpenLinkRequest, context: Context) -> expert_pb2.OpenLinkResponse:
        """Promise a link and say how to connect."""
        if self.is_draining:
            raise Unavailable("the worker is draining", reason="DRAINING", retry_after_s=1.0)
        check_open_link(request)
        self._check(request)
        transport, address = self._choose(request)
        link_id, secret = next(self._ids), secrets.token_bytes(SECRET_BYTES)
        try:
            self._port.expect(
                ExpectedLink(
                    link_id=link_id,
                    secret=secret,
                    router_id=request.router_id,
                    dtype=self._dtype,
                    reply_dtype=self._dtype,
                    d_model=self._manifest.d_model,
                    max_rows=request.max_rows,
                    num_credits=_NUM_CREDITS,
                    expires_s=time.monotonic() + _SECRET_LIFE_S,
                    max_pairs=request.max_rows * self._manifest.top_k,
                )
            )
        except ValueError as error:
            raise InvalidArgument(str(error), reason="BAD_LINK", field="max_rows") from error
        _log.info("link promised", link_id=link_id, router_id=request.router_id, transport=transport)
        return expert_pb2.OpenLinkResponse(
            link_id=link_id,
            secret=secret,
            transport=transport,
            address=address,
            num_credits=_NUM_CREDITS,
            worker_id=self.worker_id,
            wants_hints=self._buffer.can_prefetch,
        )

    async def GetWorker(self, request: expert_pb2.GetWorkerRequest, context: Context) -> expert_pb2.GetWorkerResponse:
        """Describe this worker."""
        resident = [
            expert_pb2.ResidentLayer(layer=layer, experts=experts)
            for layer, experts in self._buffer.residency().items()
        ]
        return expert_pb2.GetWorkerResponse(
            worker_id=self.worker_id,
            resident=resident,
            resident_bytes=self._buffer.resident_bytes,
            counters=self._counters(),
        )

    def _check(self, request: expert_pb2.OpenLinkRequest) -> None:
        dtype = str(self._dtype).removeprefix("torch.")
        told = tell_other_model(self._digest, self._parts, request.model_digest, request.model_parts)
        if request.model_digest != self._digest:
            raise FailedPrecondition(
                f"the router serves another checkpoint than this worker: {told}",
                reason="MODEL_DIFFERS",
                field="model_digest",
                remedy="start routers and workers on the same checkpoint",
            )
        if request.dtype != dtype:
            raise FailedPrecondition(
                f"the router sends {shown(request.dtype)} rows, the worker computes in {dtype}",
                reason="DTYPE_DIFFERS",
                field="dtype",
                remedy="start both with the same --dtype",
            )

    def _choose(self, request: expert_pb2.OpenLinkRequest) -> tuple[str, str]:
        offered = dict(self._port.addresses)
        for transport in request.transports:
            if transport == "unix" and "unix" in offered and request.host == host_identity():
                return "unix", offered["unix"]
            if transport == "tcp" and "tcp" in offered:
                return "tcp", self._data_address or offered["tcp"]
        raise FailedPrecondition(
            f"no common transport: the router takes {shown(', '.join(request.transports))}, "
            f"the worker offers {', '.join(offered)}",
            reason="NO_TRANSPORT",
            field="transports",
            remedy="choose another --link-transport",
        )
