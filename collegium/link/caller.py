"""A connection to a worker's port that has not shown its secret yet. Owned by the port's thread; never blocks."""

import contextlib
import time
from typing import Final

from collegium.link import header
from collegium.link.frame import HEADER_BYTES, FrameError, Kind, LinkClosed
from collegium.link.stream import Stream

HELLO_WITHIN_S: Final = 5.0


class Caller:
    """Reads one HELLO, and gives up after HELLO_WITHIN_S."""

    __slots__ = ("_got", "buffer", "expires_s", "stream", "transport")

    def __init__(self, stream: Stream, transport: str) -> None:
        """Take over a non-blocking stream."""
        self.stream, self.transport = stream, transport
        self.buffer = memoryview(bytearray(HEADER_BYTES + header.HELLO_BYTES))
        self.expires_s = time.monotonic() + HELLO_WITHIN_S
        self._got = 0

    def read(self) -> bool:
        """Read on; return whether the HELLO is whole. Raises FrameError as soon as it cannot be one, LinkClosed."""
        with contextlib.suppress(BlockingIOError):
            taken = self.stream.recv_into(self.buffer[self._got :])
            if taken == 0:
                raise LinkClosed("the caller went away")
            self._got += taken
        if self._got >= HEADER_BYTES:
            common = header.read_common(self.buffer)
            if common.kind != Kind.HELLO or common.body_bytes != header.HELLO_BYTES:
                raise FrameError(f"a link begins with HELLO, not {common.kind.name} of {common.body_bytes} bytes")
        return self._got == len(self.buffer)

    @property
    def link_id(self) -> int:
        """The link that the caller asks for, once `read` has returned True."""
        return header.read_common(self.buffer).seq

    @property
    def wants_rows_apart(self) -> bool:
        """Whether the caller's rows are to travel beside the frames."""
        return header.read_common(self.buffer).flags != 0

    @property
    def sent_us(self) -> int:
        """When the HELLO was sent, by the caller's clock."""
        return header.sent_us(self.buffer)

    def farewell(self, reason: str) -> None:
        """Tell the caller why it is turned away, where that can be told at once."""
        with contextlib.suppress(OSError):
            self.stream.send_now((header.goodbye(reason),))
