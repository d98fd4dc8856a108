"""Links between GPUs: frames on a TCP connection, rows by NCCL between two processes and no more (DESIGN 3.3, 3.4).

Owns the two-rank communicators of one link, one for each direction: with one for both, two sends that cross would wait
for each other in its stream. They meet over the link's own connection, never over a listening store. Knows no frame.
Unproven: written from torch's documentation and headers, and not yet run on a GPU.
"""

import os
import ssl
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final, Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, Work

from collegium.link.dial import dial_tcp, greet
from collegium.link.frame import LinkClosed, LinkError, LinkTimeout
from collegium.link.rows_apart import Landing, OpenCarrier
from collegium.link.stream import Stream, read_exactly, send_all
from collegium.link.tcp import SocketLink

ROUTER_RANK: Final = 0
WORKER_RANK: Final = 1
# Thread blocks per communicator. Rows of a decode step are KiB, and the rest of the GPU is busy computing.
_MAX_CTAS: Final = 2
# torch would otherwise end the process when a peer hangs, or when its watchdog is held up (DESIGN 3.3).
_ENVIRONMENT: Final = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}
_ITEM = struct.Struct("<HI")  # bytes of a key, bytes of its value
_MAX_VALUE_BYTES: Final = 64 * 1024


class Group(Protocol):
    """What is used here of torch's ProcessGroupNCCL; its own stub leaves out what its base class has."""

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int, /) -> Work:
        """Queue a send on the group's stream, behind the current stream's work."""
        ...

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int, /) -> Work:
        """Queue a receive likewise."""
        ...

    def abort(self) -> None:
        """End what the group has queued."""
        ...


def why_not() -> str:
    """Return why NCCL cannot be used in this process; empty where it can."""
    if not dist.is_available() or not dist.is_nccl_available():
        return "this build of torch has no NCCL"
    if not torch.cuda.is_available():
        return "this process sees no CUDA device"
    return ""


class MeetingStore(Store):
    """A torch store over one connection: what either end sets, the other can get. Nothing listens anywhere.

    Used while the communicators are made, by one thread at a time. Values are set once, so neither end need ask.
    """

    def __init__(self, stream: Stream, deadline_s: float) -> None:
        """Talk over a stream that is nobody else's until `end` is called."""
        super().__init__()
        self._stream = stream
        self._deadline_s = deadline_s
        self._values: dict[str, bytes] = {}
        self._guard = threading.RLock()
        self._has_ended = False

    def set(self, key: str, value: str | bytes) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keep a value and tell the other end."""
        raw, name = value.encode() if isinstance(value, str) else bytes(value), key.encode()
        with self._guard:
            self._values[key] = raw
            if not self._has_ended:
                send_all(self._stream, _ITEM.pack(len(name), len(raw)) + name + raw, self._deadline_s)

    def get(self, key: str) -> bytes:
        """Wait for a value until the deadline."""
        with self._guard:
            while key not in self._values:
                if self._has_ended:
                    raise LinkClosed(f"nothing more is said about {key} once a link is open")
                self._hear()
            return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # pyright: ignore
        """Wait for values until the deadline of the meeting, whatever torch's own is."""
        del timeout
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """Say whether all values are here, without waiting."""
        with self._guard:
            return all(key in self._values for key in keys)

    def end(self) -> None:
        """Give the stream back; later values stay at this end."""
        with self._guard:
            self._has_ended = True

    def _hear(self) -> None:
        name_bytes, value_bytes = _ITEM.unpack(read_exactly(self._stream, _ITEM.size, self._deadline_s))
        if value_bytes > _MAX_VALUE_BYTES:
            raise LinkClosed(f"the peer sets a value of {value_bytes} bytes")
        name = read_exactly(self._stream, name_bytes, self._deadline_s).decode()
        self._values[name] = read_exactly(self._stream, value_bytes, self._deadline_s)


class _Landing:
    """A receive on the link's own CUDA stream."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def is_complete(self) -> bool:
        """Ask the GPU; once it is done, let the current stream see the rows."""
        try:
            if not self._work.is_completed():
                return False
            self._work.wait()  # orders streams; the host does not wait
        except RuntimeError as error:
            raise OSError(str(error)) from error
        return True


class NcclCarrier:
    """Carries one link's rows between this process's GPU and the peer's."""

    def __init__(self, out: Group, back: Group, rank: int, device: torch.device) -> None:
        """`out` carries router to worker, `back` worker to router; both have been used once."""
        self.device = device
        self.device_bytes = 0  # what the communicators took, as far as can be told from outside
        self._sending, self._receiving = (out, back) if rank == ROUTER_RANK else (back, out)
        self._peer = 1 - rank
        self._is_aborted = False
        self._guard = threading.Lock()

    def send(self, rows: torch.Tensor) -> None:
        """Queue a send behind what the current stream computes; torch keeps `rows` alive until it is done."""
        try:
            self._sending.send([rows], self._peer, 0)
        except RuntimeError as error:
            raise OSError(f"NCCL cannot send: {error}") from error

    def receive(self, rows: torch.Tensor) -> Landing:
        """Queue a receive."""
        try:
            return _Landing(self._receiving.recv([rows], self._peer, 0))
        except RuntimeError as error:
            raise OSError(f"NCCL cannot receive: {error}") from error

    def abort(self) -> None:
        """Abort both communicators: kernels that wait for the peer end."""
        with self._guard:
            if self._is_aborted:
                return
            self._is_aborted = True
        for group in (self._sending, self._receiving):
            group.abort()


def opener(rank: int, device: torch.device) -> OpenCarrier:
    """Return what opens carriers on `device`; a worker's TcpPort takes one of rank WORKER_RANK.

    Raises LinkError where this process cannot use NCCL.
    """
    reason = why_not()
    if reason:
        raise LinkError(f"transport nccl cannot be used: {reason}")

    def open_carrier(stream: Stream, deadline_s: float) -> NcclCarrier:
        return _meet(stream, rank, device, deadline_s)

    return open_carrier


def connect(
    address: str,
    *,
    link_id: int,
    secret: bytes,
    dtype: torch.dtype,
    d_model: int,
    deadline_s: float,
    tls: ssl.SSLContext | None = None,
) -> SocketLink:
    """Open a link whose rows stay on the current CUDA device; see base.Connect.

    Raises LinkError where this process cannot use NCCL, ValueError with `tls`, which would leave the rows in the clear.
    """
    if tls is not None:
        raise ValueError("rows that travel by NCCL cannot be put under TLS; use transport tcp")
    reason = why_not()
    if reason:
        raise LinkError(f"transport nccl cannot be used: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    return connect_apart(
        address, link_id, secret, dtype, d_model, deadline_s, opener(ROUTER_RANK, device), transport="nccl"
    )


def connect_apart(
    address: str,
    link_id: int,
    secret: bytes,
    dtype: torch.dtype,
    d_model: int,
    deadline_s: float,
    open_carrier: OpenCarrier,
    *,
    transport: str,
) -> SocketLink:
    """Open a link over TCP whose rows travel by what `open_carrier` makes."""
    stream = dial_tcp(address, deadline_s, None)
    try:
        shape, worker_id = greet(stream, address, link_id, secret, dtype, d_model, deadline_s, are_rows_apart=True)
        carrier = open_carrier(stream, deadline_s)
        return SocketLink(
            stream, transport=transport, link_id=link_id, worker_id=worker_id, shape=shape, carrier=carrier
        )
    except BaseException:
        stream.close()
        raise


def _meet(stream: Stream, rank: int, device: torch.device, deadline_s: float) -> NcclCarrier:
    """Make both communicators and use each once, so that no later send or receive has to wait for the peer."""
    from torch.distributed import ProcessGroupNCCL  # not in a build without CUDA

    os.environ.update(_ENVIRONMENT)
    store = MeetingStore(stream, deadline_s)
    groups: list[Group] = []

    def meet() -> None:
        with torch.cuda.device(device):
            for name, sender in (("out", ROUTER_RANK), ("back", WORKER_RANK)):
                options = ProcessGroupNCCL.Options()
                options.config.min_ctas, options.config.max_ctas = 1, _MAX_CTAS
                group = cast(Group, ProcessGroupNCCL(PrefixStore(name, store), rank, 2, options))
                groups.append(group)
                hello = torch.zeros(1, device=device)
                work = group.send([hello], 1 - rank, 0) if rank == sender else group.recv([hello], 1 - rank, 0)
                work.wait()
            torch.cuda.synchronize(device)

    before_bytes, _ = torch.cuda.mem_get_info(device)
    try:
        _within(meet, deadline_s)
    except BaseException:
        for group in groups:
            group.abort()
        raise
    finally:
        store.end()
    carrier = NcclCarrier(groups[0], groups[1], rank, device)
    carrier.device_bytes = max(0, before_bytes - torch.cuda.mem_get_info(device)[0])
    return carrier


def _within(call: Callable[[], None], deadline_s: float) -> None:
    """Run a call that cannot be interrupted; stop waiting for it at the deadline."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # handed to the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="nccl-meeting", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline_s - time.monotonic()))
    if thread.is_alive():
        raise LinkTimeout("the peer did not come to the NCCL meeting within the deadline")
    if errors:
        error = errors[0]
        if isinstance(error, LinkError):
            raise error
        raise LinkClosed(f"NCCL could not connect: {error}") from error
