"""What a cluster on one machine consists of: its members, their addresses and their commands.

Owns the flags that each service is started with. Pure but for the choice of free ports.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from collegium.cli.child import Command
from collegium.cli.environment import service_env
from collegium.cli.threads import Allotment
from collegium.fabric.bounds import MAX_WORKERS
from collegium.fabric.errors import FailedPrecondition, SettingsError
from collegium.launch import ROOT

__all__ = ["HOST", "ROLES", "ClusterSpec", "Member", "check_counts", "members_of", "service_env", "worker_of"]

HOST = "127.0.0.1"
_LEAST_MAX_WORKERS = 8
_MOST_PROCESSES = {"workers": MAX_WORKERS, "routers": 256, "gateways": 256, "balancers": 16}
ROLES = ("balancer", "worker", "router", "gateway")
# As `python -m MODULE`, but no file of the working directory is taken for one of ours, or of Python's.
_LAUNCH = (sys.executable, "-P", str(Path(ROOT) / "collegium" / "launch.py"))
_MODULES = {"balancer": "balancer_svc", "worker": "expert_svc", "router": "router_svc", "gateway": "gateway"}
# Below the range from which the kernel takes ports for outgoing connections: none is taken before its owner is up.
_PORTS = range(17_000, 32_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """A cluster on one machine. flags: what each service is given beside what `up` decides, by role.

    max_workers: the most that may be asked for while it runs; 0: see most_workers.
    """

    model: Path
    manifest: Path
    num_workers: int = 2
    num_routers: int = 1
    num_gateways: int = 1
    num_balancers: int = 1
    max_workers: int = 0
    grpc_port: int = 0
    dtype: str = "float32"
    threads: Allotment = field(default_factory=lambda: Allotment(per_router=1, per_worker=1))
    redis_url: str = ""
    can_restart: bool = True
    log_level: str = "info"
    log_format: str = "text"
    flags: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    tls_ca: Path | None = None

    def __post_init__(self) -> None:
        """Check what a caller can get wrong."""
        check_counts(
            workers=self.num_workers,
            routers=self.num_routers,
            gateways=self.num_gateways,
            balancers=self.num_balancers,
        )
        if self.max_workers and not self.num_workers <= self.max_workers <= MAX_WORKERS:
            raise SettingsError(
                f"--max-workers={self.max_workers} cannot be used: give {self.num_workers} (--workers) to {MAX_WORKERS}"
            )
        if not 0 <= self.grpc_port <= 65536 - self.num_gateways:
            raise SettingsError(f"--grpc-port={self.grpc_port} cannot be used: give a port, or 0 for any free one")
        unknown = set(self.flags) - set(ROLES)
        if unknown:
            raise SettingsError(f"flags for {sorted(unknown)}: roles are {ROLES}")

    @property
    def most_workers(self) -> int:
        """The most workers that are started: by default 8, or two for each core, or those of the start."""
        return self.max_workers or max(self.num_workers, _LEAST_MAX_WORKERS, 2 * len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process to be: name, role, the address of its control service, and its command."""

    name: str
    role: str
    address: str
    command: Command


def check_counts(**counts: int) -> None:
    """Raise SettingsError for a service of which there would be none, or too many; named as their flags."""
    for name, count in counts.items():
        if count < 1:
            raise SettingsError(f"--{name}={count} cannot be used: give at least 1")
        if count > _MOST_PROCESSES[name]:
            raise SettingsError(f"--{name}={count} cannot be used: give at most {_MOST_PROCESSES[name]}")


def members_of(spec: ClusterSpec, redis_url: str) -> list[Member]:
    """Lay out all members, in the order in which they are started; each keeps its address over restarts."""
    taken: set[int] = set()
    balancers = [free_address(taken) for _ in range(spec.num_balancers)]
    router_flags = (*_model(spec), *_weights(spec), "--threads", str(spec.threads.per_router), "--drain-s", "1")
    gateway_flags = (*_model(spec), "--drain-s", "2")
    members: list[Member] = []
    for i, address in enumerate(balancers):
        name = "balancer" if len(balancers) == 1 else f"balancer-{i}"
        flags = ("--expected-workers", str(spec.num_workers), "--max-workers", str(spec.most_workers))
        members.append(_member(spec, redis_url, "balancer", name, address, flags, 1))
    known = ("--balancer", ",".join(balancers))
    members += [worker_of(spec, i, ",".join(balancers), taken) for i in range(spec.num_workers)]
    for i in range(spec.num_routers):
        flags = (*router_flags, *known)
        address = free_address(taken)
        members.append(_member(spec, redis_url, "router", f"router-{i}", address, flags, spec.threads.per_router))
    for i in range(spec.num_gateways):
        address = _fixed_address(spec.grpc_port + i) if spec.grpc_port else free_address(taken)
        members.append(_member(spec, redis_url, "gateway", f"gateway-{i}", address, (*gateway_flags, *known), 1))
    return members


def worker_of(spec: ClusterSpec, index: int, balancers: str, taken: set[int], *, is_added: bool = False) -> Member:
    """Lay out one worker, of the start or added later. balancers: their addresses; taken: ports, added to."""
    num_threads = spec.threads.per_worker
    flags = (*_weights(spec), "--balancer", balancers, "--threads", str(num_threads))
    if is_added:
        flags = (*flags, "--idle-start")
    return _member(spec, "", "worker", f"worker-{index}", free_address(taken), flags, num_threads)


def _model(spec: ClusterSpec) -> tuple[str, ...]:
    return "--model", str(spec.model)


def _weights(spec: ClusterSpec) -> tuple[str, ...]:
    return "--manifest", str(spec.manifest), "--dtype", spec.dtype


def _member(
    spec: ClusterSpec, redis_url: str, role: str, name: str, address: str, flags: Sequence[str], num_threads: int
) -> Member:
    tail = ("--log-level", spec.log_level, "--log-format", spec.log_format)
    argv = (*_LAUNCH, _MODULES[role], "--bind", address, *flags, *tail, *spec.flags.get(role, ()))
    env = service_env(num_threads) | dict(spec.env)
    if role in ("balancer", "gateway"):
        env["REDIS_URL"] = redis_url  # not a flag: it may hold a password
    return Member(name=name, role=role, address=address, command=Command(name=name, argv=argv, env=env))


def free_address(taken: set[int]) -> str:
    """Choose a port that nothing listens on and that no other member has; it is added to those taken."""
    for _ in range(1000):
        port = random.choice(_PORTS)
        if port not in taken and _is_free(port):
            taken.add(port)
            return f"{HOST}:{port}"
    raise FailedPrecondition(f"no free port between {_PORTS.start} and {_PORTS.stop} on {HOST}")


def _fixed_address(port: int) -> str:
    if not _is_free(port):
        raise FailedPrecondition(
            f"{HOST}:{port} is in use",
            reason="ADDRESS_IN_USE",
            field="--grpc-port",
            remedy="choose another port, or 0 for any free one",
        )
    return f"{HOST}:{port}"


def _is_free(port: int) -> bool:
    try:
        with socket.create_server((HOST, port)):
            return True
    except OSError:
        return False
