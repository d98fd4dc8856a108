"""A running cluster of real processes that is attacked, with the canary beside it.

Owns the processes, their Redis, everything that they log, and the list of every port that any of them listens on.
Knows no attack. A target that an attack has ended is thrown away by its keeper, which starts another one.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from collegium.cli.cluster import Cluster, ClusterSpec
from collegium.fabric.model_shape import shape_of
from collegium.model.manifest import ensure_manifest, load_manifest
from collegium.v1 import inference_pb2, inference_pb2_grpc
from tests.redis_server import RedisServer
from tests.strangers.rigs.canary import Canary, Visit
from tests.strangers.rigs.footprint import Footprint, footprint, is_alive, listening_names, listening_ports

DEMO = Path(__file__).parents[3] / "models" / "demo-lm"
MAX_MODEL_LEN = 512
VOCAB_SIZE = 4096
NUM_LAYERS = 6
LIMIT_S = 60.0  # a guard: nothing takes as long on a cluster that works
RSS_MB = 50.0  # what a process may keep of an attack
# A gRPC server's own threads come and go with its connections; they are few and bounded by the number of cores.
NUM_SPARE_THREADS = 6
# Keys and values take their memory as they are first used, and keep it.
KV_MB = 128.0
_POLL_S = 0.05
_WELL_S = 10.0
_BEGINNING = re.compile(r"\d\d:\d\d:\d\d\.\d+ [A-Z]+ |-{20}")  # of the next line of a log
_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """One way into a process. kind: "grpc", "health", "metrics" or "data"."""

    process: str
    kind: str
    address: str


def make_checkpoint(folder: Path, template: str = _TEMPLATE) -> Path:
    """Lay out the demo checkpoint with a chat template of the test's own; the weights are linked."""
    folder.mkdir(parents=True)
    for path in DEMO.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "chat_template.jinja").write_text(template)
    return folder


class Target:
    """A cluster under attack, as a context manager. Belongs to the main thread but for its channels and the canary."""

    def __init__(self, folder: Path, *, canary_pause_s: float = 0.01) -> None:
        """canary_pause_s: between its requests; leaves the cores to what is measured."""
        self._canary_pause_s = canary_pause_s
        checkpoint = make_checkpoint(folder / "checkpoint")
        manifest = ensure_manifest(checkpoint, out=folder / "manifest.json")
        loaded = load_manifest(manifest)
        self.shape, self.d_model = shape_of(loaded, "float32"), loaded.d_model
        self.lines: list[tuple[str, str]] = []
        self.redis = RedisServer(_made(folder / "redis"))
        health = ("--health-bind", "127.0.0.1:0")
        self.cluster = Cluster(
            ClusterSpec(
                model=checkpoint,
                manifest=manifest,
                redis_url=self.redis.url,
                log_level="warning",
                flags=dict.fromkeys(("gateway", "worker", "balancer"), health)
                | {"router": (*health, "--kv-memory", f"{KV_MB:.0f}MiB")},
            ),
            relay=lambda name, line: self.lines.append((name, line)),
        )
        self.pids: dict[str, int] = {}
        self.ports: Sequence[Port] = ()
        self._canary: Canary | None = None

    def __enter__(self) -> Target:
        """Start everything and let the canary learn its answers."""
        self.redis.start()
        try:
            self.cluster.__enter__()
            self.note_processes()
            self._warm_up()
            self._canary = Canary(self.cluster.targets, pause_s=self._canary_pause_s)
        except BaseException:
            self.close()
            raise
        return self

    def _warm_up(self) -> None:
        """Have the gateway make what it makes once: processes that render and tokenise, and threads."""
        with self.channel("gateway-0") as channel:
            stub: Any = inference_pb2_grpc.InferenceStub(channel)
            message = inference_pb2.ChatMessage(role="user", content=b"hello")
            chat = inference_pb2.ChatPrompt(messages=[message])
            stopping = inference_pb2.Stopping(max_tokens=1)
            calls = [
                stub.Generate(inference_pb2.GenerateRequest(stopping=stopping, **prompt), timeout=LIMIT_S)
                for prompt in (*({"chat": chat}, {"text": b"hello " * 1500}) * 4, {"text": b"hello " * 20_000})
            ]
            for call in calls:
                with contextlib.suppress(grpc.RpcError):
                    list(call)

    def __exit__(self, *_: object) -> None:
        """End everything."""
        self.close()

    def close(self) -> None:
        """End everything at once: nothing that was attacked is asked to end well."""
        if self._canary is not None:
            self._canary.close()
        self.cluster.kill_all()
        self.redis.kill()

    @property
    def canary(self) -> Canary:
        """The innocent caller."""
        assert self._canary is not None
        return self._canary

    def wait_for_canary(self, num_visits: int) -> list[Visit]:
        """Wait until the canary got so many answers to questions that it puts from now on; fails if a process ends."""
        return self.canary.wait_for(num_visits, LIMIT_S, self.check_alive)

    def check_alive(self) -> None:
        """Raise AssertionError if a process has ended."""
        dead = self.dead()
        assert not dead, "\n".join(dead)

    def note_processes(self) -> None:
        """Learn which processes there are and where they listen; after a restart that the attack is allowed."""
        self.pids = {member.name: self.cluster.pid(member.name) for member in self.cluster.members}
        known = {member.name: int(member.address.rpartition(":")[2]) for member in self.cluster.members}
        self.ports = [
            Port(process=name, kind="grpc" if port == known[name] else kind_of(port), address=f"127.0.0.1:{port}")
            for name, pid in self.pids.items()
            for port in listening_ports(pid)
        ]
        kinds = {name: sorted(port.kind for port in self.ports if port.process == name) for name in self.pids}
        for name, found in kinds.items():
            wanted = ["grpc", "health", "metrics"]
            assert found == (["data", *wanted] if name.startswith("worker") else wanted), kinds

    def of(self, kind: str, process: str = "") -> list[Port]:
        """List the ports of a kind, of one process where it is named."""
        return [port for port in self.ports if port.kind == kind and process in ("", port.process)]

    def data_names(self, process: str) -> Sequence[str]:
        """List the unix sockets that a worker listens on."""
        return listening_names(self.pids[process])

    def address(self, process: str) -> str:
        """Return the control address of a process."""
        return self.cluster.address(process)

    def channel(self, process: str) -> grpc.Channel:
        """Open a channel to a process, for the caller to close."""
        return grpc.insecure_channel(self.address(process), options=_UNLIMITED)

    def footprints(self) -> dict[str, Footprint]:
        """Read what every process holds now."""
        return {name: footprint(pid) for name, pid in self.pids.items()}

    def dead(self) -> list[str]:
        """Name the processes that have ended, with their last lines."""
        return [f"{name} has ended:\n{self.said(name)}" for name, pid in self.pids.items() if not is_alive(pid)]

    def said(self, process: str, num_lines: int = 12) -> str:
        """Return the last lines of a process."""
        return "\n".join(line for name, line in self.lines if name == process)[-150 * num_lines :]

    def tracebacks(self, since: int) -> list[str]:
        """Return what was logged as a fault of the server's own from line `since` on, each with its whole traceback."""
        found: list[str] = []
        for name in self.pids:
            said = [line for who, line in self.lines[since:] if who == name]
            for at, line in enumerate(said):
                if "Traceback (most recent call last)" in line or "panicked at" in line:
                    rest = itertools.takewhile(lambda text: not _BEGINNING.match(text), said[at:])
                    found.append(f"{name}: {said[max(0, at - 1)]}\n" + "\n".join(rest))
        return found

    def watch(self, seconds: float) -> None:
        """Look on for a while; fails as soon as a process has ended."""
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self.check_alive()
            time.sleep(_POLL_S)

    def is_well(self) -> bool:
        """True if every process lives and the cluster answers."""
        until_s = time.monotonic() + _WELL_S
        while not all(self.cluster.is_serving(name) for name in self.pids):
            if self.dead() or time.monotonic() > until_s:
                return False
        return not any(one.error for one in self.wait_for_canary(1))

    def excess(self, before: Mapping[str, Footprint], spared: Collection[str] = ()) -> list[str]:
        """Say by how much processes hold more than they did; nothing if they hold no more."""
        found: list[str] = []
        for name, now in self.footprints().items():
            was = before.get(name)
            if was is None or name in spared:
                continue
            if now.rss_mb > was.rss_mb + RSS_MB + (KV_MB if name.startswith("router") else 0.0):
                found.append(f"{name}: {now.rss_mb:.0f} MiB, before {was.rss_mb:.0f} MiB")
            if now.num_descriptors > was.num_descriptors:
                found.append(f"{name}: {now.num_descriptors} descriptors, before {was.num_descriptors}")
            if now.num_threads > was.num_threads + NUM_SPARE_THREADS:
                found.append(f"{name}: {now.num_threads} threads, before {was.num_threads}")
        return found

    def wait_until_back(
        self, before: Mapping[str, Footprint], limit_s: float, spared: Collection[str] = ()
    ) -> list[str]:
        """Wait until no process holds more than before; return what is left after the limit."""
        until_s = time.monotonic() + limit_s
        while (found := self.excess(before, spared)) and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        return found


class Keeper:
    """Hands out one target as long as it is well, then another one: an attack fails for itself alone."""

    def __init__(self, make_folder: Callable[[], Path]) -> None:
        self._make_folder = make_folder
        self._target: Target | None = None
        self._why_not = ""  # it could not be started: nobody waits for that again

    def target(self) -> Target:
        """Return a target that is well."""
        if self._target is not None and not self._is_well():
            self.close()
        if self._target is None:
            assert not self._why_not, self._why_not
            made = Target(self._make_folder())
            try:
                made.__enter__()
            except Exception as error:
                self._why_not = f"no target could be started: {str(error)[:2000]}"
                raise
            self._target = made
        return self._target

    def close(self) -> None:
        """End the target, if there is one."""
        if self._target is not None:
            self._target.close()
            self._target = None

    def _is_well(self) -> bool:
        assert self._target is not None
        try:
            return self._target.is_well()
        except AssertionError:
            return False


def kind_of(port: int) -> str:
    """Find out what a port speaks that is not a control port."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        read_page(port, timeout_s=LIMIT_S)
        return "metrics"
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            stub.Check(health_pb2.HealthCheckRequest(service="live"), timeout=LIMIT_S)
        except grpc.RpcError:
            return "data"
        return "health"


def read_page(port: int, timeout_s: float = 5.0) -> bytes:
    """Read a metrics page. OSError or HTTPException where there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException(f"status {response.status}")
        return response.read()
    finally:
        connection.close()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
