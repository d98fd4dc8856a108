"""Ports and links for the tests of collegium.link, over any transport that needs no GPU.

The test's own thread owns the port and, but for opening a link, the router's end too: nothing has to be timed.
"""

import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from collegium.link.base import Arrival, ExpectedLink, HintArrival, RouterLink, WorkerPort
from collegium.link.connect import connect
from collegium.link.frame import Dispatch, Hint, Reply
from collegium.link.tcp_port import TcpPort

D = 8
SOON_S = 30.0  # longer than any step of a test takes; a test that waits this long has failed
SECRET = b"0123456789abcdef"
TRANSPORTS = ("tcp", "unix", "tls")


def soon() -> float:
    """A deadline that only a broken test reaches."""
    return time.monotonic() + SOON_S


def expected(link_id: int = 1, **changes: object) -> ExpectedLink:
    """A promise of a small float32 link."""
    fields: dict[str, object] = {
        "link_id": link_id,
        "secret": SECRET,
        "router_id": f"router-{link_id}",
        "dtype": torch.float32,
        "reply_dtype": torch.float32,
        "d_model": D,
        "max_rows": 64,
        "num_credits": 2,
        "expires_s": soon(),
    }
    return ExpectedLink(**(fields | changes))  # type: ignore[arg-type]


def dispatch(seq: int = 1, num_rows: int = 3, **changes: object) -> Dispatch:
    """Two experts: the first takes every row, the second the first row; row r holds the number seq * 1000 + r."""
    rows = torch.arange(num_rows, dtype=torch.float32) + 1000.0 * seq  # [R]
    fields: dict[str, object] = {
        "seq": seq,
        "layer": 5,
        "step": 6,
        "epoch": 7,
        "micro_batch": 2,
        "deadline_s": soon(),
        "experts": np.array([3, 9], dtype=np.uint16),
        "counts": np.array([num_rows, 1], dtype=np.uint16),
        "pair_rows": np.array([*range(num_rows), 0], dtype=np.uint32),
        "pair_weights": np.linspace(0.0, 1.0, num_rows + 1, dtype=np.float32),
        "x": rows[:, None].expand(num_rows, D).contiguous(),  # [R, D]
        "traceparent": "",
    }
    return Dispatch(**(fields | changes))  # type: ignore[arg-type]


def hint(layer: int = 6, num_groups: int = 3, **changes: object) -> Hint:
    """Experts 0, 1, 2 .. of a layer, expected by 1, 2, 3 .. tokens."""
    fields: dict[str, object] = {
        "layer": layer,
        "experts": np.arange(num_groups, dtype=np.uint16),
        "counts": np.arange(1, num_groups + 1, dtype=np.uint16),
    }
    return Hint(**(fields | changes))  # type: ignore[arg-type]


def gather_hints(port: WorkerPort, num: int) -> list[HintArrival]:
    """Poll until so many hints have come in."""
    hints: list[HintArrival] = []

    def has_all() -> bool:
        hints.extend(port.hints())
        return len(hints) >= num

    pump(port, has_all)
    return hints


def gather(port: WorkerPort, num: int) -> list[Arrival]:
    """Poll until so many dispatches have arrived."""
    arrivals: list[Arrival] = []
    deadline_s = soon()
    while len(arrivals) < num:
        assert time.monotonic() < deadline_s, f"{len(arrivals)} of {num} dispatches arrived"
        arrivals += port.poll(1.0)
    return arrivals


def pump(port: WorkerPort, until: Callable[[], bool]) -> None:
    """Poll until something has come true."""
    deadline_s = soon()
    while not until():
        assert time.monotonic() < deadline_s, "what the test waits for did not happen"
        port.poll(0.01)


def doubled(arrival: Arrival, **changes: object) -> Reply:
    """The answer of a worker that doubles every row."""
    fields: dict[str, object] = {"seq": arrival.dispatch.seq, "y": arrival.dispatch.x * 2}
    return Reply(**(fields | changes))  # type: ignore[arg-type]


class Other:
    """A call in another thread, its result or its exception."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Begin at once."""
        self.result: object = None
        self.error: BaseException | None = None
        self._call = call
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except BaseException as error:  # for the test to look at
            self.error = error

    @property
    def is_done(self) -> bool:
        """Whether the call has returned or raised."""
        return not self._thread.is_alive()

    def join(self) -> object:
        """Return what the call returned, or raise what it raised."""
        self._thread.join(SOON_S)
        assert self.is_done, "the other thread still waits"
        if self.error is not None:
            raise self.error
        return self.result


@dataclass
class Rig:
    """One worker's port over one transport, and the links that the test opens to it."""

    transport: str  # "tcp", "unix", or "tls" for tcp under TLS
    port: TcpPort
    tls: ssl.SSLContext | None = None
    opened: list[RouterLink] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where the port listens."""
        return self.port.addresses[0][1]

    @property
    def name(self) -> str:
        """The transport's name, as a link gives it."""
        return "tcp" if self.transport == "tls" else self.transport

    def connect(self, link_id: int = 1, secret: bytes = SECRET, **changes: object) -> RouterLink:
        """Open a link that is expected (or not), while this thread polls the port."""
        fields: dict[str, object] = {"dtype": torch.float32, "d_model": D, "deadline_s": soon(), "tls": self.tls}
        other = Other(
            lambda: connect(self.name, self.address, link_id=link_id, secret=secret, **(fields | changes))  # type: ignore[arg-type]
        )
        pump(self.port, lambda: other.is_done)
        link = other.join()
        self.opened.append(link)  # type: ignore[arg-type]
        return link  # type: ignore[return-value]

    def link(self, link_id: int = 1, **changes: object) -> RouterLink:
        """Promise a link and open it."""
        promise = expected(link_id, **changes)
        self.port.expect(promise)
        return self.connect(link_id, dtype=promise.dtype, d_model=promise.d_model)

    def close(self) -> None:
        """End everything."""
        for link in self.opened:
            link.close()
        self.port.close()


def make_rig(transport: str, folder: Path) -> Rig:
    """Open a port of a transport; skips the test where TLS has no certificate to use."""
    if transport == "unix":
        return Rig(transport, TcpPort(worker_id="worker-a", unix="@"))
    if transport == "tcp":
        return Rig(transport, TcpPort(worker_id="worker-a", bind="127.0.0.1:0"))
    server, client = tls_contexts(folder)
    return Rig(transport, TcpPort(worker_id="worker-a", bind="127.0.0.1:0", tls=server), tls=client)


def tls_contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return (server's, client's) contexts around a certificate for 127.0.0.1, made once in `folder`."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    if not certificate.exists():
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl command to make a certificate")
        command = [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", str(key), "-out", str(certificate),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))
