"""Put a gateway together and take it apart again.

Owns the order: listen, join, attach to routers; and backwards: refuse, let running requests end, let go of routers,
leave.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from collegium.fabric import lifecycle, logs, metrics, rpc
from collegium.fabric.channels import check_target
from collegium.fabric.errors import FailedPrecondition
from collegium.fabric.leases import Membership
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.identity import read_text_sources
from collegium.v1 import balancer_pb2, inference_pb2_grpc
from collegium.v1 import inference_pb2 as pb
from gateway.admission import Admission, Limits
from gateway.auth import KeyInterceptor, KeyRing
from gateway.cluster import ClusterView
from gateway.converted import tokenizer_folder
from gateway.counts import Counts
from gateway.pool import RouterPool
from gateway.relay import Relay
from gateway.service import InferenceService
from gateway.settings import GatewaySettings
from gateway.text_process import TextProcess
from gateway.texts import Texts
from gateway.tokenizer import Tokenizer

SERVICE_NAME = "collegium.v1.Inference"
_log = logs.get("gateway")


class Serving:
    """Says at the server and at the balancer whether this gateway can serve."""

    def __init__(self, server: rpc.Server) -> None:
        self.membership: Membership | None = None
        self._server = server
        self._is_serving = False
        self._is_over = False

    def join(self, membership: Membership) -> None:
        """Report to a balancer as well."""
        self.membership = membership
        self._report()

    def set(self, is_serving: bool) -> None:
        """Note whether any router can take requests."""
        if is_serving != self._is_serving and not self._is_over:
            self._is_serving = is_serving
            _log.info("serving" if is_serving else "not serving: no router can")
            self._server.set_serving(is_serving)
            self._report()

    def end(self) -> None:
        """Say NOT_SERVING from now on."""
        self.set(False)
        self._is_over = True
        if self.membership is not None:
            self.membership.set_state(balancer_pb2.MEMBER_STATE_DRAINING)

    def _report(self) -> None:
        if self.membership is not None:
            self.membership.set_state(
                balancer_pb2.MEMBER_STATE_SERVING if self._is_serving else balancer_pb2.MEMBER_STATE_JOINING
            )


@dataclass(slots=True, kw_only=True)
class Gateway:
    """A gateway that listens."""

    address: str
    server: rpc.Server
    pool: RouterPool
    admission: Admission
    counts: Counts
    service: InferenceService
    serving: Serving

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and let running ones go on for a while."""
        self.serving.end()
        await self.server.stop(grace_s)


@asynccontextmanager
async def open_gateway(options: GatewaySettings, metrics_url: str = "") -> AsyncGenerator[Gateway, None]:
    """Run a gateway; CollegiumError or SettingsError where it cannot start."""
    options.check()
    try:
        own_parts = read_text_sources(options.model)
    except CheckpointError as error:
        raise FailedPrecondition(str(error), reason="UNUSABLE_CHECKPOINT", field="--model") from error
    tokenizer_dir = await tokenizer_folder(options.model)
    tokenizer = None if tokenizer_dir is None else Tokenizer.load(tokenizer_dir)
    if tokenizer is not None and tokenizer.foreign_class:
        _log.warning(
            "transformers would build this tokenizer's steps from its class; tokenizer.json's are used instead",
            model=options.model,
            tokenizer_class=tokenizer.foreign_class,
            remedy="if ids differ, set tokenizer_class to PreTrainedTokenizerFast where tokenizer.json was made",
        )
    for setting, addresses in (("--balancer", [options.balancer]), ("--routers", options.routers)):
        for address in filter(None, addresses):
            check_target(address, setting)
    gateway_id = uuid.uuid4().hex[:8]
    counts = Counts()
    limits = Limits(
        requests=options.max_requests,
        sequences=options.max_sequences,
        output_tokens=options.max_output_tokens,
        queued_tokens=options.max_queued_tokens,
    )
    admission = Admission(limits, clock=asyncio.get_running_loop().time, on_refusal=counts.note_refusal)
    server = _server(options)
    async with AsyncExitStack() as stack:
        serving = Serving(server)
        pool = await stack.enter_async_context(
            RouterPool(gateway_id=gateway_id, connect=rpc.channel, on_serving=serving.set, own_parts=own_parts)
        )
        texts = await stack.enter_async_context(_texts(options, tokenizer, tokenizer_dir or options.model))
        stack.callback(metrics.expose(lambda: _series(counts, admission, pool, texts)))
        balancer_channel = None
        if options.balancer:
            balancer_channel = await stack.enter_async_context(rpc.channel(options.balancer))
        cluster = ClusterView(
            pool,
            lambda: _status(gateway_id, address, metrics_url, counts, is_serving=server.health.is_serving()),
            balancer=options.balancer,
            channel=balancer_channel,
            membership=lambda: serving.membership,
        )
        relay = Relay(pool, counts, router_wait_s=options.router_wait_s, stall_timeout_s=options.stall_timeout_s)
        service = InferenceService(
            pool=pool,
            admission=admission,
            relay=relay,
            tokenizer=tokenizer,
            texts=texts,
            cluster=cluster,
            counts=counts,
            has_keys=options.api_keys is not None,
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server.grpc)
        address = rpc.advertised(await server.start(options.bind), options.advertise)
        stack.push_async_callback(server.stop, 0)
        lifecycle.freeze()
        _log.info("listening", address=address, tls=options.tls_cert is not None, metrics=metrics_url)
        if options.balancer:
            membership = Membership(
                options.balancer,
                balancer_pb2.ROLE_GATEWAY,
                address,
                metrics_url,
                options.threads or 1,
                counters=counts.series,
                join_limit_s=options.balancer_wait_s,
            )
            serving.join(await stack.enter_async_context(membership))
            following = asyncio.create_task(_follow(membership, pool), name="follow-routers")
            stack.push_async_callback(_end, following)
        else:
            pool.set_addresses(options.routers)
        yield Gateway(
            address=address,
            server=server,
            pool=pool,
            admission=admission,
            counts=counts,
            service=service,
            serving=serving,
        )


def router_addresses(view: balancer_pb2.WatchPlacementResponse) -> Collection[str]:
    """Name the routers that can take work, as the balancer sees them."""
    return [
        member.address
        for member in view.members
        if member.role == balancer_pb2.ROLE_ROUTER and member.state == balancer_pb2.MEMBER_STATE_SERVING
    ]


async def _follow(membership: Membership, pool: RouterPool) -> None:
    await membership.follow(lambda view: pool.set_addresses(router_addresses(view)))


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _server(options: GatewaySettings) -> rpc.Server:
    tls = None
    if options.tls_cert is not None and options.tls_key is not None:
        tls = rpc.TlsFiles(cert=options.tls_cert, key=options.tls_key)
    interceptors = [] if options.api_keys is None else [KeyInterceptor(KeyRing.load(options.api_keys))]
    bounds = (
        ("grpc.max_receive_message_length", int(options.max_message_bytes)),
        *rpc.limits(options.max_connections, options.max_streams),
    )
    return rpc.Server("gateway", services=(SERVICE_NAME,), options=bounds, tls=tls, interceptors=interceptors)


def _status(gateway_id: str, address: str, metrics_url: str, counts: Counts, *, is_serving: bool) -> pb.MemberStatus:
    return pb.MemberStatus(
        role="gateway",
        member_id=gateway_id,
        address=address,
        state="SERVING" if is_serving else "JOINING",
        num_threads=1,
        metrics_url=metrics_url,
        counters=counts.series(),
        counted_unix_ms=time.time_ns() // 10**6,
    )


@asynccontextmanager
async def _texts(
    options: GatewaySettings, tokenizer: Tokenizer | None, tokenizer_dir: Path
) -> AsyncGenerator[Texts, None]:
    short, long = (
        TextProcess(tokenizer_dir, limit_s=options.text_limit_s, memory_bytes=int(options.text_memory))
        for _ in range(2)
    )
    checking = None
    if tokenizer is not None and tokenizer.has_chat_template:
        checking = asyncio.create_task(_check_template(short, tokenizer, options.model), name="check-template")
    try:
        yield Texts(tokenizer, short, long)
    finally:
        if checking is not None:
            await _end(checking)
        await short.close()
        await long.close()


async def _check_template(process: TextProcess, tokenizer: Tokenizer, model_dir: Path) -> None:
    """Tell of a chat template that is broken or incomplete; start the process that renders it, before the first job."""
    if tokenizer.undefined_names:
        _log.warning(
            "the checkpoint's chat template uses names that nothing defines; they stay empty",
            model=model_dir,
            names=", ".join(tokenizer.undefined_names),
            remedy="name these tokens in tokenizer_config.json",
        )
    fault = await process.template_fault()
    if fault:
        _log.warning("the checkpoint's chat template is broken: chat requests fail", model=model_dir, fault=fault)


def _series(counts: Counts, admission: Admission, pool: RouterPool, texts: Texts) -> dict[str, float]:
    return counts.series() | {
        "collegium_texts_refused_total": texts.num_refusals,
        "collegium_running_sequences": admission.num_sequences,
        "collegium_queued_tokens": admission.queued_tokens,
        "collegium_routers_attached": sum(attachment.is_attached for attachment in pool.attachments),
    }
