"""Sockets that listen, and the streams of those who call. Owns no socket afterwards; knows no frame and no secret."""

import os
import socket
import ssl
from typing import Final

from collegium.link.stream import PlainStream, Stream, TlsStream, split_host_port, unix_address

_BACKLOG: Final = 128


def listen_tcp(bind: str) -> tuple[socket.socket, str]:
    """Listen on "HOST:PORT" (port 0: any); return (non-blocking socket, bound address). Raises OSError, ValueError."""
    host, port = split_host_port(bind)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    listener.setblocking(False)
    bound_host, bound_port = listener.getsockname()[:2]
    return listener, f"[{bound_host}]:{bound_port}" if family == socket.AF_INET6 else f"{bound_host}:{bound_port}"


def listen_unix(address: str) -> tuple[socket.socket, str]:
    """Listen on a path (for this user alone), on "@name", or on "@" for any abstract name. Raises OSError."""
    if address == "@":
        address = f"@collegium-{os.getpid()}-{os.urandom(8).hex()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(unix_address(address))
        if not address.startswith("@"):
            os.chmod(address, 0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener, address


def accept(listener: socket.socket, tls: ssl.SSLContext | None) -> Stream:
    """Return the non-blocking stream of one who calls; a TLS handshake is still to come. Raises OSError."""
    sock, _ = listener.accept()
    try:
        if tls is None:
            return PlainStream(sock, is_blocking=False)
        sock.setblocking(False)
        return TlsStream(tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False), is_blocking=False)
    except BaseException:
        sock.close()
        raise
