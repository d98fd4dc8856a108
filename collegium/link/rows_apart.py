"""Rows that do not ride in the frames: the seam between a link and what carries its rows from device to device.

A frame's header travels first, on the link's own connection; only then is the receive of its rows posted, so nothing
waits on the device for rows that nobody has announced. Knows no transport.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from collegium.link.stream import Stream


class Landing(Protocol):
    """Rows on their way into a tensor."""

    def is_complete(self) -> bool:
        """Whether all of them are there; never waits. Raises OSError where they will not come."""
        ...


class RowCarrier(Protocol):
    """Carries rows both ways between the two ends of one link, each way in the order of the frames.

    `send` and `receive` belong to the link's owner and never wait for the peer; `abort` may be called from any thread.
    """

    device: torch.device

    def send(self, rows: torch.Tensor) -> None:
        """Begin to send contiguous rows [R, D] on `device`; they are not written again until the peer has them.

        Raises OSError where the peer cannot be reached.
        """
        ...

    def receive(self, rows: torch.Tensor) -> Landing:
        """Begin to receive what the peer's last unread header announced into contiguous rows [R, D]. Raises OSError."""
        ...

    def abort(self) -> None:
        """End whatever hangs. Idempotent."""
        ...


# Called once the secret has been found right, in a thread of its own: (stream, deadline_s) -> carrier. The stream is
# the caller's alone until it returns. Raises LinkError or OSError.
OpenCarrier = Callable[[Stream, float], RowCarrier]
