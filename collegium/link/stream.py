"""A connected socket as links use it: whole frames out of many buffers, bytes in, waits with an end.

Owns one file descriptor and how TLS differs from plain bytes; knows no frame. `shutdown` may be called from any thread,
everything else belongs to the link's owner. The kernel does the waiting (SO_RCVTIMEO): one call, no poll before it.
"""

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

Buffers = Sequence[bytes | bytearray | memoryview | npt.NDArray[np.generic]]

_TIMEVAL = struct.Struct("@ll")
_LEAST_WAIT_US: Final = 1  # zero would mean for ever
# Callers loop until their own deadline, so waits go to the kernel in slices: a deadline further off than one slice,
# which is the usual one, then costs no system call (3 us of a round trip of 50).
_SLICE_S: Final = 0.05
_NOW: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)  # an int: an enum's "|" takes 0.5 us


class Stream(Protocol):
    """Bytes to and from one peer. Errors are OSError; an orderly end is 0 bytes read."""

    recv_into: Callable[[memoryview], int]  # raises BlockingIOError when the wait of `set_wait` is over
    can_take_back: bool  # whether bytes that a send did not take may be forgotten

    def set_wait(self, timeout_s: float) -> None:
        """Say how long the next `recv_into` may wait at most; it may wait less."""
        ...

    def send_now(self, buffers: Buffers) -> int:
        """Send what the kernel takes without waiting; return the bytes taken, 0 where it is full."""
        ...

    def send_wait(self, buffer: memoryview, timeout_s: float) -> int:
        """Send of `buffer` what the kernel takes within the time; return the bytes taken."""
        ...

    def has_buffered(self) -> bool:
        """Whether bytes are here that the kernel does not show as readable."""
        ...

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        ...

    def shutdown(self) -> None:
        """End every wait at both ends. From any thread."""
        ...

    def close(self) -> None:
        """Give back the descriptor."""
        ...


class PlainStream:
    """A TCP or unix socket. Blocking for a router's end, non-blocking for a worker's."""

    def __init__(self, sock: socket.socket, *, is_blocking: bool) -> None:
        """Take over a connected socket."""
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(is_blocking)
        self._sock = sock
        self._wait_s = 0.0
        self.can_take_back = True
        self.recv_into: Callable[[memoryview], int] = sock.recv_into
        self.fileno = sock.fileno

    def set_wait(self, timeout_s: float) -> None:
        """Set the kernel's receive timeout where it is another than before."""
        if timeout_s > _SLICE_S:
            timeout_s = _SLICE_S
        if timeout_s == self._wait_s:
            return
        self._wait_s = timeout_s
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout_s))

    def send_now(self, buffers: Buffers) -> int:
        """One sendmsg that does not wait."""
        try:
            # numpy's stubs know of the buffer protocol from Python 3.12 on.
            return self._sock.sendmsg(buffers, (), _NOW)  # pyright: ignore[reportArgumentType]
        except BlockingIOError:
            return 0

    def send_wait(self, buffer: memoryview, timeout_s: float) -> int:
        """One send that waits in the kernel."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        try:
            return self._sock.send(buffer, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def has_buffered(self) -> bool:
        """Plain sockets keep nothing back."""
        return False

    def shutdown(self) -> None:
        """Shut both directions; a peer that is gone already is no error."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the descriptor."""
        self._sock.close()


class TlsStream:
    """TLS over a TCP socket. Slower than plain: the buffers of a frame are joined first."""

    def __init__(self, sock: ssl.SSLSocket, *, is_blocking: bool) -> None:
        """Take over a connected socket, its handshake done where it blocks, still to do where it does not."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(is_blocking)
        self._sock = sock
        self._is_blocking = is_blocking
        self.can_take_back = False  # a record that is half out must be finished with the same bytes
        self.recv_into: Callable[[memoryview], int] = self._recv_into
        self.fileno = sock.fileno
        self._needs_handshake = not is_blocking

    def _recv_into(self, view: memoryview) -> int:
        try:
            if self._needs_handshake:
                self._sock.do_handshake()
                self._needs_handshake = False
            return self._sock.recv_into(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, TimeoutError) as error:
            raise BlockingIOError from error
        except ssl.SSLEOFError:
            return 0

    def set_wait(self, timeout_s: float) -> None:
        """Set the socket's timeout."""
        self._sock.settimeout(max(timeout_s, _LEAST_WAIT_US / 1e6))

    def send_now(self, buffers: Buffers) -> int:
        """Encrypt and send what the kernel takes."""
        if self._is_blocking:
            self._sock.settimeout(0.0)
        return self._send(memoryview(rest_of(buffers, 0)))

    def send_wait(self, buffer: memoryview, timeout_s: float) -> int:
        """Encrypt and send, waiting where the kernel is full."""
        self._sock.settimeout(max(timeout_s, _LEAST_WAIT_US / 1e6))
        return self._send(buffer)

    def _send(self, buffer: memoryview) -> int:
        sent = 0
        try:
            while sent < len(buffer):  # a TLS record holds 16 KiB
                sent += self._sock.send(buffer[sent:])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, TimeoutError):
            pass
        except ssl.SSLEOFError as error:
            raise BrokenPipeError from error
        return sent

    def has_buffered(self) -> bool:
        """Whether decrypted bytes wait in the TLS layer."""
        return not self._needs_handshake and self._sock.pending() > 0

    def shutdown(self) -> None:
        """Shut the connection under TLS: SSLSocket's own shutdown would let a later read see ciphertext."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the descriptor."""
        self._sock.close()


def _timeval(timeout_s: float) -> bytes:
    """Return a struct timeval, never zero."""
    wait_us = max(int(min(timeout_s, _SLICE_S) * 1e6), _LEAST_WAIT_US)
    return _TIMEVAL.pack(wait_us // 1_000_000, wait_us % 1_000_000)


def is_readable(stream: Stream) -> bool:
    """Whether a read would find something now."""
    if stream.has_buffered():
        return True
    poller = select.poll()
    poller.register(stream.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def read_exactly(stream: Stream, num_bytes: int, deadline_s: float) -> bytes:
    """Read so many bytes, for a handshake: slower than a link's own reading, and for any kind of stream.

    Raises TimeoutError at the deadline (monotonic), ConnectionError where the peer has gone, OSError.
    """
    buffer = memoryview(bytearray(num_bytes))
    got = 0
    while got < num_bytes:
        _wait_for(stream, select.POLLIN, deadline_s)
        with contextlib.suppress(BlockingIOError):
            taken = stream.recv_into(buffer[got:])
            if taken == 0:
                raise ConnectionResetError("the peer closed the connection")
            got += taken
    return bytes(buffer)


def send_all(stream: Stream, data: bytes, deadline_s: float) -> None:
    """Send everything, for a handshake. Raises as `read_exactly` does."""
    while data:
        _wait_for(stream, select.POLLOUT, deadline_s)
        data = data[stream.send_now((data,)) :]


def _wait_for(stream: Stream, event: int, deadline_s: float) -> None:
    """Wait until the stream is ready, or part of what makes it ready has come."""
    if event == select.POLLIN and stream.has_buffered():
        return
    left_s = deadline_s - time.monotonic()
    poller = select.poll()
    poller.register(stream.fileno(), event)
    if not poller.poll(max(0.0, left_s) * 1e3):
        raise TimeoutError("the peer did not answer within the deadline")
    if event == select.POLLIN:
        stream.set_wait(left_s)


def rest_of(buffers: Buffers, taken: int) -> bytes:
    """Return what a send of `buffers` left, as a copy: their owner may write them again."""
    parts: list[memoryview] = []
    for buffer in buffers:
        view = (buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)).cast("B")
        if taken < len(view):
            parts.append(view[taken:])
        taken = max(0, taken - len(view))
    return b"".join(parts)


def unix_address(address: str) -> str:
    """Return the socket name of an address: "@name" is an abstract one, anything else a path."""
    return "\0" + address[1:] if address.startswith("@") else address


def split_host_port(address: str) -> tuple[str, int]:
    """Split "HOST:PORT"; an IPv6 host stands in brackets. Raises ValueError that names the address."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
