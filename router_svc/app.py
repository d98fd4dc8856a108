"""Compose a router: load the model without experts, join, follow the cluster, serve, drain."""

import asyncio
from collections.abc import Callable, Mapping

import torch

from collegium.fabric import lifecycle, logs, metrics, rpc, telemetry
from collegium.fabric.errors import FailedPrecondition
from collegium.fabric.faults import Faults
from collegium.fabric.leases import Membership
from collegium.fabric.model_shape import shape_of
from collegium.model.encoder_decoder import SWITCH
from collegium.model.manifest import Manifest
from collegium.v1 import balancer_pb2, inference_pb2, router_pb2_grpc
from router_svc.counters import read_counters
from router_svc.engine import Engine
from router_svc.expert_calls import ExpertCalls
from router_svc.foresight import Foresight
from router_svc.kv_blocks import BLOCK_TOKENS, num_blocks_for
from router_svc.links import LinkKeeper
from router_svc.load_counts import LoadCounts
from router_svc.loading import load
from router_svc.router_model import RouterModel
from router_svc.service import Outboxes, RouterService
from router_svc.settings import Settings
from router_svc.token_memory import TokenMemory
from router_svc.unsafe_routing import UnsafeRouting, UnsafeRoutingError, load_unsafe_routing

_log = logs.get("router")
_REPORT_EVERY_S = 1.0


def plan_memory(config: Settings, model: RouterModel) -> tuple[int, int]:
    """Share out the KV memory: (number of blocks, longest sequence).

    Raises FailedPrecondition where the length that was asked for does not fit.
    """
    per_block = model.cache_bytes_per_token() * BLOCK_TOKENS
    if config.max_model_len > model.max_positions:
        raise FailedPrecondition(
            f"--max-model-len {config.max_model_len} is more than the model's {model.max_positions} positions, "
            "the rotary scaling of its config.json included",
            reason="MODEL_LEN_TOO_LARGE",
            field="--max-model-len",
            remedy=f"give at most {model.max_positions}, or leave it out; if the model's card tells of longer texts, "
            "add the rope_scaling that it names to config.json",
        )
    longest = config.max_model_len or model.max_positions
    num_parts = 1 if model.both is None else 2  # a source beside a target, each as long as that
    num_blocks = min(config.kv_memory // per_block, config.max_num_seqs * num_parts * num_blocks_for(longest))
    if num_blocks < num_parts * num_blocks_for(longest):
        if config.max_model_len or num_blocks < num_parts:
            raise FailedPrecondition(
                f"--kv-memory {config.kv_memory} holds {num_blocks * BLOCK_TOKENS} tokens, "
                f"one sequence may have {longest}" + (" and as many of its source" if model.both else ""),
                reason="KV_MEMORY_TOO_SMALL",
                field="--kv-memory",
                remedy=f"give at least {num_parts * num_blocks_for(longest) * per_block} bytes, or lower "
                "--max-model-len",
            )
        longest = num_blocks // num_parts * BLOCK_TOKENS
        say = _log.info if model.model_type == SWITCH else _log.warning  # whose positions have no bound but this
        say("--kv-memory is less than one longest sequence; sequences are shortened", max_model_len=longest)
    return num_blocks, longest


def read_unsafe_routing(config: Settings, model: RouterModel) -> UnsafeRouting | None:
    """Read the routing that replaces the gates', where it was asked for. Raises FailedPrecondition."""
    if config.unsafe_routing is None:
        return None
    if model.both is not None:
        raise FailedPrecondition(
            "routing cannot be played on a model with an encoder: a trace has rows of two kinds",
            reason="UNUSABLE_ROUTING",
            field="--unsafe-routing",
            remedy="leave it out",
        )
    try:
        routing = load_unsafe_routing(config.unsafe_routing, num_experts=model.num_experts, top_k=model.top_k)
    except UnsafeRoutingError as error:
        raise FailedPrecondition(str(error), reason="UNUSABLE_ROUTING", field="--unsafe-routing") from error
    _log.warning(
        "UNSAFE ROUTING: experts are played from a file and EVERY ANSWER IS WORTHLESS", file=str(config.unsafe_routing)
    )
    return routing


def describe(config: Settings, model: RouterModel, manifest: Manifest, max_model_len: int) -> inference_pb2.Model:
    """Make the public description of the model."""
    return inference_pb2.Model(
        name=config.model_name or config.model.resolve().name,
        architecture=model.model_type,
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        eos_ids=model.eos_ids,
        num_moe_layers=len(model.moe_layers),
        num_experts=model.num_experts,
        top_k=model.top_k,
        dtype=str(model.dtype).removeprefix("torch."),
        digest=manifest.digest,
        parts=manifest.parts,
        is_encoder_decoder=model.both is not None,
        decoder_start_id=0 if model.both is None else model.both.start_id,
        forced_id=model.forced_id,
    )


def expert_bytes(manifest: Manifest, model: RouterModel) -> list[int]:
    """Bytes of one expert in a worker's memory, by MoE layer."""
    return [manifest.num_params * model.dtype.itemsize for _ in manifest.layers]


async def main(config: Settings, stop: lifecycle.Stop) -> None:
    """Serve until stopped."""
    telemetry.setup("router", config)
    torch.set_num_threads(config.threads or torch.get_num_threads())
    server = rpc.Server(
        "router",
        services=("collegium.v1.Router",),
        options=rpc.limits(config.max_connections, config.max_streams),
    )
    loop = asyncio.get_running_loop()
    outboxes = Outboxes(loop)
    service = RouterService(outboxes, max_gateways=config.max_gateways, max_traces=config.max_traces)
    router_pb2_grpc.add_RouterServicer_to_server(service, server.grpc)
    bound = await server.start(config.bind)
    metrics_url = metrics.serve_metrics(
        config.metrics_bind,
        advertise=config.advertise,
        prefix=config.metrics_prefix,
        max_connections=config.metrics_connections,
    )
    model, manifest = await asyncio.to_thread(load, config)
    metrics.registry().model_name = config.model_name or config.model.resolve().name
    num_blocks, max_model_len = plan_memory(config, model)
    unsafe_routing = read_unsafe_routing(config, model)
    keeper: LinkKeeper | None = None
    # What gates and tokens foretell says nothing about choices that are played.
    can_foretell = config.prefetch != "off" and unsafe_routing is None
    calls = ExpertCalls(
        num_layers=len(model.moe_layers),
        num_experts=model.num_experts,
        timeout_s=config.expert_timeout_s,
        on_lost=lambda worker_id, why: keeper.on_lost(worker_id, why) if keeper is not None else None,
        num_ahead=config.prefetch_layers,
        foresight=Foresight(model.moe_blocks(), top_k=model.num_routed, device=model.device) if can_foretell else None,
        # An encoder's layers come first, and a decoder's token says nothing of their choices.
        memory=TokenMemory(num_layers=min(config.prefetch_layers, len(model.moe_layers)))
        if can_foretell and model.both is None
        else None,
    )
    num_threads = config.threads or torch.get_num_threads()
    engine = Engine(
        model,
        calls,
        outboxes.deliver,
        num_blocks=num_blocks,
        max_batch_tokens=config.max_batch_tokens,
        max_num_seqs=config.max_num_seqs,
        num_threads=num_threads,
        expert_wait_s=config.expert_wait_s,
        on_end=lambda: loop.call_soon_threadsafe(stop.request),  # without an engine: end, and be started anew
        unsafe_routing=unsafe_routing,
        num_micro_batches=config.micro_batches,
        max_queued_seqs=config.max_queued_seqs,
        max_queued_tokens=config.max_queued_tokens,
        shared_step_s=config.shared_step_ms / 1e3,
    )
    commands = engine.commands

    def read() -> Mapping[str, float]:
        return read_counters(engine.scheduler, engine.totals, commands, calls)

    membership = Membership(
        config.balancer,
        balancer_pb2.ROLE_ROUTER,
        rpc.advertised(bound, config.advertise),
        metrics_url,
        num_threads,
        model=shape_of(manifest, str(model.dtype).removeprefix("torch.")),
        counters=read,
        join_limit_s=config.balancer_wait_s,
    )
    lifecycle.freeze()
    async with membership:
        service.router_id = membership.member_id
        description = describe(config, model, manifest, max_model_len)
        service.open(commands, engine.listeners, description, expert_bytes(manifest, model))

        def on_change() -> None:
            is_serving = bool(calls.worker_ids) and calls.epoch > 0 and commands.is_served and not service.is_draining
            server.set_serving(is_serving)
            if not service.is_draining:
                membership.set_state(
                    balancer_pb2.MEMBER_STATE_SERVING if is_serving else balancer_pb2.MEMBER_STATE_JOINING
                )

        keeper = LinkKeeper(
            calls,
            dtype=model.dtype,
            digest=manifest.digest,
            parts=manifest.parts,
            max_rows=config.max_batch_tokens,
            transport=config.link_transport,
            d_model=manifest.d_model,
            num_experts=[len(layer.experts) for layer in manifest.layers],
            on_change=on_change,
        )
        keeper.router_id = membership.member_id
        metrics.expose(read)
        engine.start()
        _log.info("loaded", model=str(config.model), kv_blocks=num_blocks, max_model_len=max_model_len, address=bound)
        follower = asyncio.create_task(_follow(membership, keeper, service, on_change), name="follow")
        reporter = asyncio.create_task(_report(membership, calls.loads), name="load-report")
        for task in (follower, reporter):
            task.add_done_callback(lambda task: None if task.cancelled() else stop.request())
        try:
            await stop.wait()
            service.is_draining = True
            service.end_traces()
            if not commands.is_served:
                outboxes.end_all()
            on_change()
            membership.set_state(balancer_pb2.MEMBER_STATE_DRAINING)
            await asyncio.to_thread(commands.wait_idle, config.drain_s)
        finally:
            follower.cancel()
            reporter.cancel()
            ended = await asyncio.gather(follower, reporter, return_exceptions=True)
            outboxes.end_all()
            await server.stop(1.0)
            await asyncio.to_thread(engine.stop)
            await keeper.close()
    if failed := engine.error or _failure(ended[0]) or _failure(ended[1]):
        raise failed


def _failure(ended: BaseException | None) -> BaseException | None:
    return None if isinstance(ended, asyncio.CancelledError) else ended


async def _report(membership: Membership, loads: LoadCounts) -> None:
    """Tell the balancer what the gates chose, as long as anything new was chosen."""
    told, faults = -1, Faults(_log, "reporting the load")
    while True:
        await asyncio.sleep(_REPORT_EVERY_S)
        try:
            counted = int(loads.activations.sum())
            if counted != told and await membership.report_load(loads.to_message(membership.member_id)):
                told = counted
            faults.clear()
        except Exception as error:
            await asyncio.sleep(faults.note(error))


async def _follow(
    membership: Membership, keeper: LinkKeeper, service: RouterService, on_change: Callable[[], None]
) -> None:
    def take(view: balancer_pb2.WatchPlacementResponse) -> None:
        service.router_id = keeper.router_id = membership.member_id
        keeper.take(view)
        on_change()

    await membership.follow(take)
