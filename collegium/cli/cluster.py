"""A whole cluster on one machine: start, supervise, stop. The command `collegium up` and the tests stand on it.

Owns the processes; runs in the main thread, because every leash is tied to the thread that started it. Ways of showing
things are show's; what each process is given is spec's.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.cli.child import Child, ChildFailed, Command
from collegium.cli.embedded import find_server, private_directory, server_argv, server_url
from collegium.cli.scaling import plan_scale
from collegium.cli.spec import ClusterSpec, Member, members_of, service_env, worker_of
from collegium.fabric.channels import Option, TlsTrust, blocking_channel
from collegium.fabric.errors import Cancelled, CollegiumError, DeadlineExceeded
from collegium.v1 import balancer_pb2, balancer_pb2_grpc

__all__ = ["ChildFailed", "Cluster", "ClusterSpec", "Member", "relay_to_stderr"]

REDIS = "redis"
_POLL_S = 0.05
_CHECK_S = 0.5
_SCALE_EVERY_S = 0.5
_MOST_DEATHS = 5  # within a minute before the cluster has served, or in a row of a worker that was added
# When each rank must have ended, in seconds after the stop was asked for; what has not is killed.
_STOP_RANKS = (("gateway", 3.0), ("router", 5.0), ("worker", 6.0), ("balancer", 6.8), (REDIS, 7.3))


def relay_to_stderr(name: str, line: str) -> None:
    """Show one line of a member on stderr."""
    sys.stderr.write(f"{name} | {line}\n")


class Cluster:
    """Real processes of one cluster; a context manager that starts them, waits for SERVING, and ends them all.

    Not thread-safe but for `members` and addresses; everything else belongs to the main thread. Restarts happen in
    tick(), which every wait calls.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        *,
        relay: Callable[[str, str], None] = relay_to_stderr,
        say: Callable[[str], None] = lambda _: None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._spec = spec
        self._relay = relay
        self._say = say
        self._is_interrupted = is_interrupted
        self._directory = private_directory()
        self._children: dict[str, Child] = {}
        self._roles: dict[str, str] = {}
        self._members: dict[str, Member] = {}
        self._channels: dict[str, grpc.Channel] = {}
        self._health_stubs: dict[str, Any] = {}  # asked twenty times a second while a cluster starts
        self._has_served = False
        self._scaled_s = 0.0
        self._ended: set[str] = set()  # workers that were told to end, and are not to be started again
        self._added: set[str] = set()  # workers that were added; one that fails does not fail the cluster
        self._failed_at = 0  # number of workers wanted when an added one failed: no more are started for it
        self._has_scaled = False
        self._refused = 0  # number of workers wanted that is above what is started here, said once

    @property
    def members(self) -> Sequence[Member]:
        """All members but the embedded server, in the order of their start."""
        return tuple(self._members.values())

    @property
    def names(self) -> Sequence[str]:
        """The names of all processes, the embedded server's included."""
        return tuple(self._children)

    @property
    def targets(self) -> list[str]:
        """The gateways' addresses, for a client."""
        return self.addresses("gateway")

    def addresses(self, role: str) -> list[str]:
        """Give the control addresses of a role's members."""
        return [member.address for member in self._members.values() if member.role == role]

    def address(self, name: str) -> str:
        """Give the control address of a member."""
        return self._members[name].address

    def pid(self, name: str) -> int:
        """Give the process id of a member."""
        return self._children[name].pid

    def num_starts(self, name: str) -> int:
        """Say how often a member was started."""
        return self._children[name].num_starts

    def tail(self, name: str) -> Sequence[str]:
        """Give the last lines of a member."""
        return self._children[name].tail()

    def start(self) -> None:
        """Start every process; they find each other and wait for each other by themselves."""
        redis_url = self._spec.redis_url
        if not redis_url:
            argv = server_argv(find_server(os.environ), self._directory)
            self._add(REDIS, Child(Command(name=REDIS, argv=argv, env=service_env(1)), lambda name, line: None))
            redis_url = server_url(self._directory)
        for member in members_of(self._spec, redis_url):
            self._members[member.name] = member
            self._add(member.role, Child(member.command, self._relay))
        for child in self._children.values():
            child.start()

    def tick(self) -> None:
        """Look after the children once: note deaths, restart what is due.

        Raises ChildFailed when one has died too often, could not start, or was told something wrong, but only before
        the cluster has served: then one that dies waits longer each time, and the others serve.
        """
        now_s = time.monotonic()
        if self._has_served and now_s - self._scaled_s >= _SCALE_EVERY_S:
            self._scaled_s = now_s
            self._scale()
        for child in list(self._children.values()):
            if child.name in self._ended:
                if not child.is_running:
                    self._remove(child)
                continue
            if child.is_running and child.lost_at_s is not None:
                self._note_return(child, child.lost_at_s)
            if child.is_running or child.num_starts == 0:
                continue
            if child.restart_at_s is None:
                self._note_death(child, now_s)
            elif child.restart_at_s <= now_s:
                self._restart(child, now_s)

    def wait_until(self, condition: Callable[[], bool], limit_s: float, what: str = "the condition") -> None:
        """Supervise until a condition holds; DeadlineExceeded after limit_s, Cancelled when interrupted."""
        deadline_s = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline_s:
                raise DeadlineExceeded(f"{what} did not come true within {limit_s:.0f} s")
            if self._is_interrupted():
                raise Cancelled("asked to stop")
            self.tick()
            time.sleep(_POLL_S)

    def wait_until_serving(self, *names: str, limit_s: float = 60.0) -> None:
        """Supervise until members (all of them where none is named) say SERVING."""
        start_s = time.monotonic()
        missing = list(names) or list(self._members)

        def all_serve() -> bool:
            for name in list(missing):
                if self.is_serving(name):
                    missing.remove(name)
                    self._say(f"{name} SERVING at {self.address(name)} after {time.monotonic() - start_s:.1f} s")
            return not missing

        try:
            self.wait_until(all_serve, limit_s)
        except DeadlineExceeded as error:
            raise DeadlineExceeded(f"not SERVING within {limit_s:.0f} s: {', '.join(missing)}") from error
        self._has_served = self._has_served or not names

    def is_serving(self, name: str, service: str = "") -> bool:
        """Ask a member's health service once."""
        child = self._children[name]
        if not child.is_running:
            return False
        if name not in self._health_stubs:
            self._health_stubs[name] = health_pb2_grpc.HealthStub(self._channel(self._members[name]))
        try:
            response: health_pb2.HealthCheckResponse = self._health_stubs[name].Check(
                health_pb2.HealthCheckRequest(service=service), timeout=_CHECK_S
            )
        except grpc.RpcError:
            return False
        is_serving = response.status == health_pb2.HealthCheckResponse.SERVING
        child.has_served = child.has_served or is_serving
        return is_serving

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a member and give its process id; after SIGKILL, the process is gone on return."""
        child = self._children[name]
        pid = child.pid
        child.send(number)
        if number == signal.SIGKILL:
            child.wait(5.0)
        return pid

    def stop(self) -> None:
        """End every process in order, within 8 s; a process that does not end is killed. Idempotent."""
        start_s = time.monotonic()
        try:
            for rank, limit_s in _STOP_RANKS:
                children = [child for child in self._children.values() if self._roles[child.name] == rank]
                for child in children:
                    # What never served has nothing to hand over.
                    child.send(signal.SIGTERM if child.has_served or child.num_starts > 1 else signal.SIGKILL)
                for child in children:
                    if not child.wait(start_s + limit_s - time.monotonic()):
                        self._say(f"{child.name} did not end in time and is killed")
                        child.send(signal.SIGKILL)
        finally:
            self.kill_all()

    def kill_all(self) -> None:
        """End every process at once and give everything back. Idempotent."""
        for child in self._children.values():
            child.send(signal.SIGKILL)
        for child in self._children.values():
            child.wait(1.0)
            child.close()
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()
        self._health_stubs.clear()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Cluster:
        """Start and wait for SERVING; on failure nothing is left behind."""
        try:
            self.start()
            self.wait_until_serving()
        except BaseException:
            self.kill_all()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    def _scale(self) -> None:
        """Start and end workers as the balancer says, within --max-workers.

        A balancer that does not answer asks for nothing.
        """
        view = self._view()
        if view is None:
            return
        if not self._has_scaled:  # what an earlier run was told, in a memory that outlived it, is over
            self._has_scaled = True
            if view.wanted_workers not in (0, self._spec.num_workers):
                self._say(f"an earlier run wanted {view.wanted_workers} workers, this one {self._spec.num_workers}")
                self._ask_for(self._spec.num_workers)
                return
        running = {
            m.name: m.address for m in self._members.values() if m.role == "worker" and m.name not in self._ended
        }
        most = self._spec.most_workers
        if view.wanted_workers > most and self._refused != view.wanted_workers:
            self._refused = view.wanted_workers
            self._say(f"{view.wanted_workers} workers are wanted; at most {most} are started: see --max-workers")
        plan = plan_scale(view, running, most)
        for name in plan.to_end:
            self._say(f"{name} has no experts left and is ended: {view.wanted_workers} workers are wanted")
            self._ended.add(name)
            self._children[name].send(signal.SIGTERM)
        self._failed_at = self._failed_at if self._failed_at == view.wanted_workers else 0
        for _ in range(plan.num_to_start):
            if not self._failed_at:
                self._add_worker(view.wanted_workers)

    def _add_worker(self, num_wanted: int) -> None:
        index = next(i for i in itertools.count() if f"worker-{i}" not in self._children)
        taken = {int(member.address.rpartition(":")[2]) for member in self._members.values()}
        try:
            member = worker_of(self._spec, index, ",".join(self.addresses("balancer")), taken, is_added=True)
            child = Child(member.command, self._relay)
            child.start()
        except (OSError, CollegiumError) as error:
            self._failed_at = num_wanted
            self._say(f"worker-{index} cannot be started: {error}; no more are added until another number is wanted")
            return
        self._members[member.name] = member
        self._add("worker", child)
        self._added.add(member.name)
        self._say(f"{member.name} started: {num_wanted} workers are wanted")

    def _ask_for(self, num_workers: int) -> None:
        for member in self._members.values():
            if member.role == "balancer" and self._children[member.name].is_running:
                stub: Any = balancer_pb2_grpc.BalancerStub(self._channel(member))
                with contextlib.suppress(grpc.RpcError):
                    stub.Scale(balancer_pb2.ScaleRequest(num_workers=num_workers), timeout=_CHECK_S)
                    return

    def _view(self) -> balancer_pb2.WatchPlacementResponse | None:
        for member in self._members.values():
            if member.role == "balancer" and self._children[member.name].is_running:
                stub: Any = balancer_pb2_grpc.BalancerStub(self._channel(member))
                try:
                    return stub.GetPlacement(balancer_pb2.GetPlacementRequest(), timeout=_CHECK_S).view
                except grpc.RpcError:
                    continue
        return None

    def _remove(self, child: Child) -> None:
        child.close()
        self._say(f"{child.name} has ended")
        member = self._members.pop(child.name)
        self._health_stubs.pop(member.name, None)
        channel = self._channels.pop(member.name, None)
        if channel is not None:
            channel.close()
        del self._children[child.name], self._roles[child.name]
        self._ended.discard(child.name)
        self._added.discard(child.name)

    def _add(self, role: str, child: Child) -> None:
        self._children[child.name] = child
        self._roles[child.name] = role

    def _note_death(self, child: Child, now_s: float) -> None:
        status = child.exit_status
        assert status is not None
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
        if self._has_served and not self._spec.can_restart:
            child.restart_at_s = math.inf
            self._say(f"{child.name} {how}; it is not restarted")
            return
        pause_s = child.policy.after_death(now_s)
        is_added = child.name in self._added
        # A process that ends by itself before it ever served, or that was told something wrong, will do so again; and
        # so may one that dies again and again. Once the cluster has served, none of that is a reason to end the others.
        has_failed_early = status == 2 or (status >= 0 and not child.has_served)
        if is_added and (has_failed_early or child.policy.num_deaths >= _MOST_DEATHS):
            self._say(f"{child.name} {how}; it was added, and is left out")
            view = self._view()
            self._failed_at = view.wanted_workers if view is not None else 0
            self._ended.add(child.name)
            return
        is_hopeless = has_failed_early or child.policy.num_recent >= _MOST_DEATHS or not self._spec.can_restart
        if is_hopeless and not self._has_served:
            child.close()
            raise ChildFailed(
                f"{child.name} {how}",
                last_lines=child.tail(),
                has_relayed_lines=child.name != REDIS,
                exit_status=status,
            )
        child.restart_at_s = now_s + pause_s
        if child.has_served and child.lost_at_s is None:
            child.lost_at_s = now_s
        self._say(f"{child.name} {how}; it is started again in {pause_s:.1f} s{_row(child.policy.num_deaths)}")

    def _restart(self, child: Child, now_s: float) -> None:
        try:
            child.start()
        except OSError as error:  # no memory, process or descriptor is left: that may pass
            pause_s = child.policy.after_death(now_s)
            child.restart_at_s = now_s + pause_s
            self._say(f"{child.name} cannot be started: {error}; it is tried again in {pause_s:.1f} s")
        else:
            self._say(f"{child.name} started again, process {child.pid}")

    def _note_return(self, child: Child, lost_at_s: float) -> None:
        if self.is_serving(child.name):
            child.lost_at_s = None
            self._say(f"{child.name} SERVING again after {time.monotonic() - lost_at_s:.1f} s")

    def _channel(self, member: Member) -> grpc.Channel:
        if member.name not in self._channels:
            options: list[Option] = [("grpc.max_reconnect_backoff_ms", 250)]
            tls = None
            if member.role == "gateway" and self._spec.tls_ca is not None:
                options.append(("grpc.ssl_target_name_override", "localhost"))
                tls = TlsTrust(ca=self._spec.tls_ca)
            made = blocking_channel(member.address, tls=tls, options=options)
            self._channels[member.name] = made
        return self._channels[member.name]


def _row(num_deaths: int) -> str:
    return f" (death {num_deaths} in a row)" if num_deaths > 1 else ""
