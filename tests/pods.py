"""The services of one cluster as pods run them: each a process of its own, on ports that it keeps, ended by SIGTERM.

Owns the processes and their ports; probes them as a kubelet does. Restarts nothing by itself: the test decides.
"""

from __future__ import annotations

import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.cli.child import Child, Command
from collegium.cli.spec import ClusterSpec, Member, free_address, members_of
from collegium.fabric.channels import channel_options
from collegium.fabric.signals import SUPERVISED_ENV

LIMIT_S = 100.0  # longer than any step takes; a test that waits this long has failed
_POLL_S = 0.02


class Pod:
    """One service. Settings beside the spec's may change from one start to the next."""

    def __init__(self, member: Member, *, taken: set[int]) -> None:
        self.name, self.role, self.address = member.name, member.role, member.address
        self.health, self.metrics = free_address(taken), free_address(taken)
        own = ["--health-bind", self.health, "--metrics-bind", self.metrics]
        if member.role == "worker":
            own += ["--data-bind", free_address(taken)]
        self._argv = (*member.command.argv, *own)
        # A supervised service ends without tidying up; one in a pod does not.
        self._env = {name: value for name, value in member.command.env.items() if name != SUPERVISED_ENV}
        self._child: Child | None = None

    @property
    def is_running(self) -> bool:
        """Whether its process is there."""
        return self._child is not None and self._child.is_running

    def start(self, *flags: str) -> None:
        """Start it; flags beat those of the spec, for this start."""
        assert not self.is_running
        command = Command(name=self.name, argv=(*self._argv, *flags), env=self._env)
        self._child = Child(command, lambda name, line: None)
        self._child.start()

    def terminate(self) -> None:
        """Send SIGTERM, as the end of a pod begins; returns at once."""
        assert self._child is not None
        self._child.send(signal.SIGTERM)

    def wait_for_end(self) -> int:
        """Wait for the end of a process that was asked to end; gives its exit status, negative for a signal."""
        assert self._child is not None
        assert self._child.wait(LIMIT_S), f"{self.name} would have to be killed:\n{self.tail()}"
        self._child.close()
        status = self._child.exit_status
        assert status is not None
        return status

    def kill(self) -> None:
        """End the process at once, if there is one."""
        if self._child is not None:
            self._child.send(signal.SIGKILL)
            self._child.wait(5.0)
            self._child.close()

    def tail(self) -> str:
        """Its last lines."""
        return "" if self._child is None else "\n".join(self._child.tail())

    def is_serving(self) -> bool:
        """Probe readiness once."""
        with grpc.insecure_channel(self.health, options=channel_options()) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
            except grpc.RpcError:
                return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def counters(self) -> dict[str, float]:
        """Read the metrics page: values by series."""
        with urllib.request.urlopen(f"http://{self.metrics}/metrics", timeout=10) as page:
            lines: list[str] = page.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {series: float(value) for series, _, value in pairs}

    def counter(self, series: str) -> float:
        """Read one number of the metrics page; 0 where nothing was counted yet."""
        return self.counters().get(series, 0.0)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition while the process runs."""
        deadline_s = time.monotonic() + LIMIT_S
        while not condition():
            assert self.is_running, f"{self.name} has ended while {what} was waited for:\n{self.tail()}"
            assert time.monotonic() < deadline_s, f"{self.name}: {what} did not come true:\n{self.tail()}"
            time.sleep(_POLL_S)

    def wait_until_serving(self) -> None:
        """Wait until the probes say that it is ready."""
        self.wait_until(self.is_serving, "readiness")


class Pods:
    """All pods of a cluster, by name and in the order in which they were laid out."""

    def __init__(self, spec: ClusterSpec, redis_url: str) -> None:
        members = members_of(spec, redis_url)
        taken = {int(member.address.rpartition(":")[2]) for member in members}
        self._pods = {member.name: Pod(member, taken=taken) for member in members}

    def __getitem__(self, name: str) -> Pod:
        """Give one by its name, such as "worker-0"."""
        return self._pods[name]

    def __iter__(self) -> Iterator[Pod]:
        """Iterate over all."""
        return iter(self._pods.values())

    def of(self, role: str) -> Sequence[Pod]:
        """Give those of a role."""
        return [pod for pod in self if pod.role == role]

    def sum(self, role: str, series: str) -> float:
        """Add up one counter over the processes of a role that run."""
        return sum(pod.counter(series) for pod in self.of(role) if pod.is_running)


@contextmanager
def running_pods(spec: ClusterSpec, redis_url: str, flags: Callable[[Pod], Sequence[str]]) -> Iterator[Pods]:
    """Start every pod with its flags and wait until all are ready; none is left in the end."""
    pods = Pods(spec, redis_url)
    try:
        for pod in pods:
            pod.start(*flags(pod))
        for pod in pods:
            pod.wait_until_serving()
        yield pods
    finally:
        for pod in pods:
            pod.kill()
