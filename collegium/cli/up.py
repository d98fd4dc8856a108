"""The command `collegium up`: a whole cluster on this machine until Ctrl-C.

Owns the order of things: manifest, processes, a first completion through the SDK, serving, the end. Data goes to
stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from collegium.cli.child import ChildFailed
from collegium.cli.preflight import (
    check_cluster_name,
    check_expert_memory,
    check_kv_memory,
    check_logs,
    check_model_dir,
    check_prompt,
    check_tls,
)
from collegium.cli.show import Demand
from collegium.cli.spec import ClusterSpec, check_counts
from collegium.cli.target import SharedExperts, read_shared_experts, typed
from collegium.cli.threads import parse_threads
from collegium.fabric import streams
from collegium.fabric.api_keys import read_keys
from collegium.fabric.byte_size import MemoryBudget
from collegium.fabric.errors import Cancelled, CollegiumError, FailedPrecondition, InvalidArgument, SettingsError
from collegium.fabric.redis_url import check_redis_url
from collegium.fabric.signals import heeded
from collegium.model.cache_root import cache_notice
from collegium.model.manifest import ManifestPathError, ensure_manifest, load_manifest
from collegium.model.served_dtype import tell_dtype

DEFAULT_PORT = 50051
_START_LIMIT_S = 600.0


def up(
    model_dir: Annotated[Path, typer.Argument(help="Folder of the checkpoint.", show_default=False)],
    workers: Annotated[int, typer.Option(help="Expert workers.")] = 2,
    max_workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Most workers that `collegium scale` may ask for; 0: two for each core, at least 8 and --workers.",
        ),
    ] = 0,
    routers: Annotated[int, typer.Option(help="Routers.")] = 1,
    gateways: Annotated[int, typer.Option(help="Gateways.")] = 1,
    balancers: Annotated[int, typer.Option(help="Balancers, of which one leads.")] = 1,
    grpc_port: Annotated[
        int, typer.Option(help="Port of the first gateway; further ones take the next ports; 0: any free ones.")
    ] = DEFAULT_PORT,
    dtype: Annotated[
        str,
        typer.Option(help="float32, bfloat16, or auto: bfloat16 where all experts are stored in it, else float32."),
    ] = "auto",
    threads: Annotated[
        str, typer.Option(help="auto, a number of threads to share out, or router=N,worker=N.")
    ] = "auto",
    once: Annotated[bool, typer.Option("--once", help="End after the first completion.")] = False,
    no_restart: Annotated[bool, typer.Option("--no-restart", help="Leave dead services dead.")] = False,
    prompt: Annotated[str, typer.Option(help="Prompt of the first completion.")] = (
        "This package contains a library for reading and writing image files. It"
    ),
    max_tokens: Annotated[int, typer.Option(min=0, help="Length of the first completion; 0: none.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="Temperature of the first completion; 0: greedy.")] = 0.6,
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest tokens that the first completion chooses from.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first completion.")] = 6,
    kv_memory: Annotated[str, typer.Option(help="Memory of each router for keys and values, such as 1GiB.")] = "",
    max_model_len: Annotated[int, typer.Option(min=0, help="Longest prompt and output; 0: the model's own.")] = 0,
    max_batch_tokens: Annotated[int, typer.Option(min=0, help="Rows of one step; 0: the router's default.")] = 0,
    device: Annotated[str, typer.Option(help="torch device of the routers.")] = "cpu",
    expert_memory: Annotated[
        str,
        typer.Option(
            help="Memory of each worker for experts' weights, such as 2GiB, or a share of all experts, such as 25%."
        ),
    ] = "",
    host_memory: Annotated[
        str, typer.Option(help="Memory of each worker between expert memory and the disk, a size or a share.")
    ] = "",
    eviction: Annotated[str, typer.Option(help="Which expert makes room for a missed one.")] = "ewma",
    shared_experts: SharedExperts = "router",
    prefetch: Annotated[
        str, typer.Option(help="Load what the next layer is likely to need: on, off, or auto: while it pays.")
    ] = "auto",
    rebalance_s: Annotated[
        float, typer.Option(min=0, help="Time between looks at the load, in s; 0: experts stay where they are.")
    ] = 10.0,
    unsafe_routing: Annotated[
        Path | None, typer.Option(help="For experiments: a trace whose experts replace the gate's choices.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(envvar="COLLEGIUM_TLS_CERT", help="The gateways' certificate chain, PEM.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(envvar="COLLEGIUM_TLS_KEY", help="Its private key, PEM.")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="Who signed it, for `up`'s own calls to localhost; default: itself.")
    ] = None,
    api_keys: Annotated[
        Path | None, typer.Option(envvar="COLLEGIUM_API_KEYS", help="File of accepted API keys, one a line.")
    ] = None,
    cluster: Annotated[
        str,
        typer.Option(envvar="COLLEGIUM_CLUSTER", help="Name that keeps clusters apart in the Redis of REDIS_URL."),
    ] = "default",
    log_level: Annotated[str, typer.Option(help="Least level that services log.")] = "warning",
    log_format: Annotated[str, typer.Option(help="Form of services' log lines: text or json.")] = "text",
) -> None:
    """Start a whole cluster on this machine, stream a completion, and serve until Ctrl-C.

    Starts a Redis-compatible server (unless REDIS_URL names one), a balancer, workers, routers and gateways, each a
    process of its own that is started again when it dies, and ends them all in order.
    """
    streams.outlive_readers()
    interrupts = _Interrupts()
    router_flags = _given(
        ("--kv-memory", kv_memory),
        ("--max-model-len", max_model_len),
        ("--max-batch-tokens", max_batch_tokens),
        ("--device", device),
        ("--prefetch", prefetch),
        ("--unsafe-routing", unsafe_routing),
    )
    worker_flags = _given(
        ("--expert-memory", expert_memory),
        ("--host-memory", host_memory),
        ("--eviction", eviction),
        ("--prefetch", prefetch),
    )
    balancer_flags = [f"--rebalance-s={rebalance_s}", f"--cluster={cluster}"]
    gateway_flags = _given(("--tls-cert", tls_cert), ("--tls-key", tls_key), ("--api-keys", api_keys))
    try:
        check_model_dir(model_dir)
        check_tls(tls_cert, tls_key, tls_ca)
        check_logs(log_level, log_format)
        check_kv_memory(kv_memory)
        budget = check_expert_memory(expert_memory, host_memory, eviction, prefetch)
        check_prompt(prompt, max_tokens)
        check_cluster_name(cluster)
        keys = [] if api_keys is None else read_keys(api_keys)
        redis_url = os.environ.get("REDIS_URL", "")
        if redis_url:
            check_redis_url(redis_url)
        check_counts(workers=workers, routers=routers, gateways=gateways, balancers=balancers)
        if dtype not in ("auto", "float32", "bfloat16"):
            raise SettingsError(f"--dtype={dtype!r} cannot be used: give float32, bfloat16 or auto")
        try:
            allotment = parse_threads(threads, num_cores=num_cores(), num_routers=routers, num_workers=workers)
        except ValueError as error:
            raise SettingsError(f"--threads={threads!r} cannot be used: {error}") from None
        if notice := cache_notice():
            say(notice)
        manifest = make_manifest(model_dir, interrupts, shares=read_shared_experts(shared_experts))
        resolved = resolve_dtype(dtype, manifest)
        if dtype == "auto" and (told := tell_dtype(load_manifest(manifest).stored_dtypes, resolved)):
            say(told)
        if budget:
            say(tell_budget(budget, manifest, resolved))
        spec = ClusterSpec(
            model=model_dir,
            manifest=manifest,
            num_workers=workers,
            max_workers=max_workers,
            num_routers=routers,
            num_gateways=gateways,
            num_balancers=balancers,
            grpc_port=grpc_port,
            dtype=resolved,
            threads=allotment,
            redis_url=redis_url,
            can_restart=not no_restart,
            log_level=log_level,
            log_format=log_format,
            flags={
                "worker": worker_flags,
                "router": router_flags,
                "gateway": gateway_flags,
                "balancer": balancer_flags,
            },
            tls_ca=tls_ca or tls_cert,
        )
        demand = Demand(prompt=typed(prompt), max_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed)
        with claim_name(redis_url, cluster, interrupts):
            has_shown = run_cluster(
                spec, interrupts, demand if max_tokens > 0 else None, once=once, api_key=next(iter(keys), None)
            )
        if once and not has_shown:
            raise typer.Exit(1)
    except Cancelled:
        raise KeyboardInterrupt from None  # which every command ends with in the same way
    except ChildFailed as error:
        say(error.summary if error.has_relayed_lines else error.message)
        raise typer.Exit(2 if error.exit_status == 2 else 1) from None
    except SettingsError as error:
        say(str(error))
        raise typer.Exit(2) from None
    except CollegiumError as error:
        say(error.message)
        raise typer.Exit(1) from None


class _Interrupts:
    """SIGINT, SIGTERM and SIGHUP as a flag; the second one ends this process, and with it every leash, at once.

    Those that whoever started this process had it ignore stay ignored.
    """

    def __init__(self) -> None:
        self.is_set = False
        for number in heeded():
            signal.signal(number, self._on_signal)

    def __call__(self) -> bool:
        """Say whether one came."""
        return self.is_set

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            os._exit(128 + number)
        self.is_set = True


def claim_name(redis_url: str, cluster: str, is_interrupted: Callable[[], bool]) -> AbstractContextManager[object]:
    """Take the cluster's name in a Redis that others may use; there is nothing to take in one of our own."""
    if not redis_url:
        return contextlib.nullcontext()
    from collegium.cli.claim import Claim

    return Claim(redis_url, cluster, say=say, is_interrupted=is_interrupted)


def run_cluster(
    spec: ClusterSpec,
    is_interrupted: Callable[[], bool],
    demand: Demand | None,
    *,
    once: bool,
    api_key: str | None = None,
) -> bool:
    """Run a cluster until it is interrupted, or until the first completion with once; returns whether that came."""
    from collegium.cli.cluster import Cluster
    from collegium.cli.first_completion import show_completion
    from collegium.cli.show import address_table, console

    cluster = Cluster(spec, say=say, is_interrupted=is_interrupted)
    start_s = time.monotonic()
    say(
        f"starting {_count(spec.num_workers, 'worker')}, {_count(spec.num_routers, 'router')} and "
        f"{_count(spec.num_gateways, 'gateway')} in {spec.dtype}, {_count(spec.threads.per_router, 'thread')} per "
        f"router, {spec.threads.per_worker} per worker"
    )
    try:
        cluster.start()
        cluster.wait_until_serving(limit_s=_START_LIMIT_S)
        say(f"the cluster is SERVING after {time.monotonic() - start_s:.1f} s")
        has_shown = demand is None or show_completion(cluster, spec, demand, say, api_key=api_key)
        rows = [(member.name, member.address, cluster.pid(member.name)) for member in cluster.members]
        threads = {"router": spec.threads.per_router, "worker": spec.threads.per_worker}
        console(sys.stdout).print(address_table(rows, threads))
        if not once:
            say(f"serving at {', '.join(cluster.targets)} until Ctrl-C")
            with contextlib.suppress(Cancelled):  # the usual end
                cluster.wait_until(lambda: False, math.inf)
    finally:
        if is_interrupted():
            say("stopping")
        cluster.stop()
    say("every process has ended")
    return has_shown


def make_manifest(model_dir: Path, is_interrupted: Callable[[], bool], *, shares: bool = False) -> Path:
    """Find or make the manifest of a checkpoint, with progress on stderr; shares: workers compute shared experts."""
    said_s = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said_s
        if is_interrupted():
            raise Cancelled("asked to stop")
        if time.monotonic() - said_s > 1.0:
            said_s = time.monotonic()
            say(f"reading the checkpoint for its manifest: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    try:
        return ensure_manifest(model_dir, progress=progress, shares=shares)
    except ManifestPathError as error:
        raise FailedPrecondition(str(error), reason="MANIFEST_PATH", field="XDG_CACHE_HOME") from error
    except ValueError as error:  # CheckpointError, UnsupportedModelError
        raise InvalidArgument(str(error), reason="CHECKPOINT", field="MODEL_DIR") from error


def resolve_dtype(dtype: str, manifest: Path) -> str:
    """Turn auto into the type that every service would choose by the manifest."""
    return load_manifest(manifest).dtype if dtype == "auto" else dtype


def tell_budget(budget: MemoryBudget, manifest: Path, dtype: str) -> str:
    """Say what each worker's expert memory holds, beside what one token touches."""
    facts = load_manifest(manifest)
    expert_bytes = facts.num_params * (4 if dtype == "float32" else 2)
    num_experts = sum(len(layer.experts) for layer in facts.layers)
    cycle = len(facts.layers) * facts.top_k * expert_bytes
    given = budget.bytes_of(num_experts * expert_bytes)
    return (
        f"expert memory of each worker: {given / 2**20:.1f} MiB of the {num_experts * expert_bytes / 2**20:.1f} MiB of "
        f"all {num_experts} experts; one token touches {cycle / 2**20:.1f} MiB over all layers and workers"
    )


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def say(text: str) -> None:
    """Write one line of progress to stderr."""
    sys.stderr.write(f"up | {text}\n")
    sys.stderr.flush()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _given(*flags: tuple[str, object]) -> list[str]:
    return [f"{flag}={value}" for flag, value in flags if value]
