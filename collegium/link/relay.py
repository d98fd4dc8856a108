"""TLS under a native end: a thread moves bytes between a TLS connection and a socket pair whose other half is plain.

Slower than plain by a copy and a change of threads each way; the TLS is that of the ssl module.
"""

import contextlib
import select
import socket
import threading
from typing import Final

from collegium.link.stream import PlainStream, Stream

_MOST_BYTES: Final = 256 * 1024  # that wait in either direction
_TAIL_S: Final = 5.0  # what the last bytes of one side may take to reach the other


def relayed(stream: Stream, *, name: str) -> PlainStream:
    """Return a plain, non-blocking stream of what a non-blocking one carries. The thread ends with either."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    threading.Thread(target=_relay, args=(stream, ours), name=name, daemon=True).start()
    return PlainStream(theirs, is_blocking=False)


def _relay(stream: Stream, plain: socket.socket) -> None:
    inwards, outwards = bytearray(), bytearray()  # to `plain`; to `stream`
    scratch = memoryview(bytearray(64 * 1024))
    is_over = False  # `plain` has been closed; what it had sent is still to go out
    with contextlib.suppress(OSError), contextlib.closing(plain):
        while not is_over or outwards:
            wants = {stream.fileno(): 0, plain.fileno(): 0}
            if len(inwards) < _MOST_BYTES and not is_over:
                wants[stream.fileno()] |= select.POLLIN
            if outwards:
                wants[stream.fileno()] |= select.POLLOUT
            if len(outwards) < _MOST_BYTES and not is_over:
                wants[plain.fileno()] |= select.POLLIN
            if inwards and not is_over:
                wants[plain.fileno()] |= select.POLLOUT
            poll = select.poll()
            for fd, mask in wants.items():
                if mask:
                    poll.register(fd, mask)
            is_here = stream.has_buffered() and len(inwards) < _MOST_BYTES and not is_over
            events = dict(poll.poll(0 if is_here else _TAIL_S * 1000))
            if is_over and not events:
                break
            if is_here or (events.get(stream.fileno(), 0) & ~select.POLLOUT and len(inwards) < _MOST_BYTES):
                with contextlib.suppress(BlockingIOError):
                    taken = stream.recv_into(scratch)
                    if not taken:
                        break
                    inwards += scratch[:taken]
            if events.get(plain.fileno(), 0) & ~select.POLLOUT and len(outwards) < _MOST_BYTES and not is_over:
                read = plain.recv(len(scratch))
                is_over = not read
                outwards += read
            if outwards:
                del outwards[: stream.send_now((bytes(outwards),))]
            if inwards and not is_over:
                with contextlib.suppress(BlockingIOError):
                    del inwards[: plain.send(inwards)]
    stream.shutdown()
    stream.close()
