"""Compose a worker: read the manifest, listen, join, load homes, serve, drain."""

import asyncio
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from collegium.fabric import lifecycle, logs, metrics, rpc, telemetry, tracing
from collegium.fabric.errors import FailedPrecondition
from collegium.fabric.leases import Membership
from collegium.fabric.model_shape import shape_of
from collegium.fabric.private_folder import NoFolderError, private_folder
from collegium.link.base import WorkerPort
from collegium.link.tcp_port import TcpPort
from collegium.model.allocation import is_out_of_memory
from collegium.model.calibration import settle_kernel
from collegium.model.checkpoint_files import CheckpointError
from collegium.model.device_experts import has_triton
from collegium.model.devices import DeviceError, find_device
from collegium.model.kernels import KernelUnavailableError
from collegium.model.manifest import Manifest, load_manifest
from collegium.model.served_dtype import tell_dtype
from collegium.native.worker_end import Span
from collegium.v1 import balancer_pb2, expert_pb2_grpc
from expert_svc.compute import ComputeLoop
from expert_svc.counters import WorkerCounters
from expert_svc.homes import HomeKeeper
from expert_svc.join_wait import JoinTrial
from expert_svc.memory import make_buffer, make_sample
from expert_svc.prefetch_trial import PrefetchTrial
from expert_svc.service import ExpertService
from expert_svc.settings import Settings

_LOOK_EVERY_S = 0.02
_SOCKET = "data.sock"
_log = logs.get("worker")


def record_spans(spans: Sequence[Span]) -> None:
    """Record one span per sampled dispatch, from when its batch was begun."""
    epoch_ns = time.time_ns() - time.monotonic_ns()
    for span in spans:
        attributes = {
            "collegium.layer": span.layer,
            "collegium.rows": span.num_pairs,
            "collegium.experts": span.num_groups,
            "collegium.joined": span.num_joined,
            "collegium.wait_us": max(0, round(span.wait_ns / 1e3)),
        }
        traceparent = span.text.decode("ascii", "replace")
        tracing.span_from_traceparent(
            "worker.batch", traceparent, span.began_ns + epoch_ns, span.ended_ns + epoch_ns, attributes
        )


def choose_kernel(config: Settings, manifest: Manifest, dtype: torch.dtype, num_threads: int) -> None:
    """Settle what computes the experts. Raises FailedPrecondition where it cannot be what was asked for."""
    torch.set_num_threads(num_threads)  # a thread's own setting: this one measures
    try:
        chosen = settle_kernel(config.kernel, manifest.d_model, manifest.d_ffn, dtype, manifest.form)
    except KernelUnavailableError as error:
        raise FailedPrecondition(
            str(error), reason="KERNEL_UNAVAILABLE", field="--kernel", remedy="use --kernel=auto"
        ) from error
    _log.info("kernel", kernel=chosen.kernel.value, threads=num_threads, **chosen.describe())


def choose_device(config: Settings) -> torch.device | None:
    """Say where slots are; None: in host memory. Raises FailedPrecondition where the device cannot be used."""
    try:
        device = find_device(config.device)
        if device.type not in ("cpu", "cuda"):
            raise DeviceError(f"experts are computed on a CPU or on CUDA devices, not on {device.type!r}")
    except DeviceError as error:
        raise FailedPrecondition(str(error), reason="UNUSABLE_DEVICE", field="--device", remedy=error.remedy) from error
    if device.type == "cpu":
        return None
    if not has_triton():
        raise FailedPrecondition(
            "experts on a GPU are computed by Triton, which is not installed",
            reason="NO_TRITON",
            field="--device",
            remedy="install torch for CUDA, which brings it",
        )
    return device


def data_folder() -> Path | None:
    """Make the folder of the data socket for routers on this host; None where there is none, and TCP has to do."""
    try:
        return private_folder("collegium-data-", _SOCKET)
    except NoFolderError as error:
        _log.warning("no folder for a data socket: routers on this host come by TCP", why=str(error))
        return None


async def wait_for_routers(port: WorkerPort, limit_s: float) -> None:
    """Wait until every router has closed its link, having heard that this worker drains, or until the time is over.

    What routers send until then is answered.
    """
    until_s = time.monotonic() + limit_s
    while port.links():
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            _log.warning("routers still send here; they find out by a broken link", links=len(port.links()))
            return
        await asyncio.sleep(min(left_s, _LOOK_EVERY_S))


async def main(config: Settings, stop: lifecycle.Stop) -> None:
    """Serve until stopped."""
    telemetry.setup("worker", config)
    try:
        manifest = load_manifest(config.manifest)
    except CheckpointError as error:
        raise FailedPrecondition(str(error), reason="UNUSABLE_MANIFEST", field="--manifest") from error
    dtype = getattr(torch, manifest.dtype if config.dtype == "auto" else config.dtype)
    if config.dtype == "auto" and (told := tell_dtype(manifest.stored_dtypes, manifest.dtype)):
        _log.warning(told, manifest=str(config.manifest))
    num_threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(num_threads)
    device = choose_device(config)
    if device is None:
        await asyncio.to_thread(choose_kernel, config, manifest, dtype, num_threads)
    folder = data_folder()
    try:
        port = TcpPort(
            worker_id=f"{os.uname().nodename}/{os.getpid()}",
            bind=config.data_bind,
            unix=str(folder / _SOCKET) if folder is not None else None,
            budget_bytes=config.link_memory,
        )
    except (OSError, ValueError) as error:
        raise FailedPrecondition(
            f"--data-bind={config.data_bind} cannot be listened on: {error}",
            reason="ADDRESS_IN_USE",
            field="--data-bind",
            remedy="choose another port, or 0 for any free one",
        ) from error
    tcp_address = dict(port.addresses)["tcp"]
    events = asyncio.get_running_loop()
    try:
        buffer = await asyncio.to_thread(
            make_buffer,
            manifest,
            dtype,
            expert_memory=config.expert_memory,
            host_memory=config.host_memory,
            policy=config.eviction,
            num_load_threads=config.load_threads,
            can_prefetch=config.prefetch != "off",
            device=device,
        )
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise FailedPrecondition(
            f"the memory that --expert-memory and --host-memory ask for cannot be had: {error}",
            reason="OUT_OF_MEMORY",
            field="--expert-memory",
            remedy="lower one of them",
        ) from error
    buffer.on_load(port.wake)
    sample = make_sample(manifest, buffer)
    loop = ComputeLoop(
        port,
        buffer,
        manifest.form,
        dtype,
        d_model=manifest.d_model,
        num_experts=[len(layer.experts) for layer in manifest.layers],
        num_threads=num_threads,
        trial=PrefetchTrial() if config.prefetch == "auto" and buffer.is_prefetching else None,
        join_trial=None if config.join_wait == "off" else JoinTrial(is_fixed=config.join_wait == "on"),
        on_traced=record_spans if tracing.is_tracing() else None,
        on_end=lambda: events.call_soon_threadsafe(stop.request),  # what cannot compute is no worker: end, start anew
    )
    counters = WorkerCounters(loop, buffer, port, sample)
    service = ExpertService(
        port,
        buffer,
        manifest,
        dtype,
        data_address=rpc.advertised(tcp_address, config.data_advertise, "--data-advertise"),
        counters=counters.read,
    )
    server = rpc.Server(
        "worker",
        services=("collegium.v1.Expert",),
        options=rpc.limits(config.max_connections, config.max_streams),
    )
    expert_pb2_grpc.add_ExpertServicer_to_server(service, server.grpc)
    bound = await server.start(config.bind)
    metrics_url = metrics.serve_metrics(
        config.metrics_bind,
        advertise=config.advertise,
        prefix=config.metrics_prefix,
        max_connections=config.metrics_connections,
    )
    metrics.expose(counters.read)
    membership = Membership(
        config.balancer,
        balancer_pb2.ROLE_WORKER,
        rpc.advertised(bound, config.advertise),
        metrics_url,
        num_threads,
        model=shape_of(manifest, str(dtype).removeprefix("torch.")),
        capacity_bytes=buffer.budget_bytes,
        counters=counters.read,
        failure_domain=config.failure_domain,
        join_limit_s=config.balancer_wait_s,
    )
    lifecycle.freeze()
    async with membership:

        def on_ready() -> None:
            service.worker_id = membership.member_id
            if not service.is_draining:
                server.set_serving(loop.is_alive)
                membership.set_state(balancer_pb2.MEMBER_STATE_SERVING)

        loop.start()
        _log.info("listening", address=bound, data=tcp_address, experts=sum(len(x.experts) for x in manifest.layers))
        keeper = HomeKeeper(
            buffer,
            membership,
            on_ready,
            num_experts=[len(layer.experts) for layer in manifest.layers],
            stands_back=config.idle_start,
        )
        follower = asyncio.create_task(keeper.follow(), name="homes")
        follower.add_done_callback(lambda task: None if task.cancelled() else stop.request())
        try:
            await stop.wait()
            service.is_draining = True
            server.set_serving(False)
            membership.set_state(balancer_pb2.MEMBER_STATE_DRAINING)
            await wait_for_routers(port, config.drain_s)
        finally:
            follower.cancel()
            ended = (await asyncio.gather(follower, return_exceptions=True))[0]
            await server.stop(0.5)
            await asyncio.to_thread(loop.stop)
            await asyncio.to_thread(buffer.close)
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
    failed = loop.error or (None if isinstance(ended, asyncio.CancelledError) else ended)
    if failed is not None:
        raise failed
