"""Open the router's end of a link: connect a socket, say HELLO, read WELCOME. Owns nothing afterwards."""

import socket
import ssl
import time

import torch

from collegium.link import header
from collegium.link.frame import HEADER_BYTES, FrameError, Kind, LinkClosed, LinkShape, LinkTimeout
from collegium.link.stream import PlainStream, Stream, TlsStream, read_exactly, send_all, split_host_port, unix_address
from collegium.link.tcp import SocketLink


def connect_tcp(
    address: str,
    *,
    link_id: int,
    secret: bytes,
    dtype: torch.dtype,
    d_model: int,
    deadline_s: float,
    tls: ssl.SSLContext | None = None,
) -> SocketLink:
    """Open a link to "HOST:PORT", under TLS where a context is given; see base.Connect."""
    return _open(dial_tcp(address, deadline_s, tls), "tcp", address, link_id, secret, dtype, d_model, deadline_s)


def dial_tcp(address: str, deadline_s: float, tls: ssl.SSLContext | None) -> Stream:
    """Return a blocking stream to "HOST:PORT". Raises LinkTimeout, LinkClosed where there is no connection."""
    host, port = split_host_port(address)
    try:
        sock = socket.create_connection((host, port), timeout=_left_s(deadline_s, address))
        try:
            if tls is None:
                return PlainStream(sock, is_blocking=True)
            sock.settimeout(_left_s(deadline_s, address))
            return TlsStream(tls.wrap_socket(sock, server_hostname=host), is_blocking=True)
        except BaseException:
            sock.close()
            raise
    except TimeoutError as error:
        raise LinkTimeout(f"no connection to {address} within the deadline") from error
    except OSError as error:
        raise LinkClosed(f"no connection to {address}: {error}") from error


def connect_unix(
    address: str,
    *,
    link_id: int,
    secret: bytes,
    dtype: torch.dtype,
    d_model: int,
    deadline_s: float,
    tls: ssl.SSLContext | None = None,
) -> SocketLink:
    """Open a link to a unix socket, abstract where `address` begins with "@"; see base.Connect. TLS is not used."""
    del tls  # the bytes do not leave the host
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_left_s(deadline_s, address))
        sock.connect(unix_address(address))
    except OSError as error:
        sock.close()
        if isinstance(error, TimeoutError):
            raise LinkTimeout(f"no connection to {address} within the deadline") from error
        raise LinkClosed(f"no connection to {address}: {error}") from error
    except BaseException:
        sock.close()
        raise
    return _open(PlainStream(sock, is_blocking=True), "unix", address, link_id, secret, dtype, d_model, deadline_s)


def _open(
    stream: Stream,
    transport: str,
    address: str,
    link_id: int,
    secret: bytes,
    dtype: torch.dtype,
    d_model: int,
    deadline_s: float,
) -> SocketLink:
    try:
        shape, worker_id = greet(stream, address, link_id, secret, dtype, d_model, deadline_s)
        return SocketLink(stream, transport=transport, link_id=link_id, worker_id=worker_id, shape=shape)
    except BaseException:
        stream.close()
        raise


def greet(
    stream: Stream,
    address: str,
    link_id: int,
    secret: bytes,
    dtype: torch.dtype,
    d_model: int,
    deadline_s: float,
    *,
    are_rows_apart: bool = False,
) -> tuple[LinkShape, str]:
    """Say HELLO and return (shape, worker_id) of the WELCOME. Raises LinkClosed with the worker's reason."""
    try:
        send_all(stream, header.hello(link_id, secret, dtype, d_model, are_rows_apart=are_rows_apart), deadline_s)
        common = header.read_common(read_exactly(stream, HEADER_BYTES, deadline_s))
        if common.body_bytes > max(header.WELCOME_BYTES, header.MAX_TEXT_BYTES):
            raise FrameError(f"an answer of {common.body_bytes} bytes to HELLO")
        body = read_exactly(stream, common.body_bytes, deadline_s)
        if common.kind == Kind.GOODBYE:
            raise LinkClosed(f"{address} refused the link: {body.decode(errors='replace')}")
        if common.kind != Kind.WELCOME or common.seq != link_id:
            raise FrameError(f"{common.kind.name} for link {common.seq} in answer to HELLO for link {link_id}")
        return header.read_welcome(body, dtype, d_model, are_rows_apart=are_rows_apart)
    except FrameError as error:
        raise LinkClosed(f"{address} is no worker of this protocol: {error}") from error
    except TimeoutError as error:
        raise LinkTimeout(f"{address} did not answer within the deadline") from error
    except OSError as error:
        raise LinkClosed(f"the connection to {address} broke in the handshake: {error}") from error


def _left_s(deadline_s: float, address: str) -> float:
    """Return the time that is left. Raises LinkTimeout where there is none."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise LinkTimeout(f"{address} did not answer within the deadline")
    return left_s
