"""Translate the router's monotonic clock into the worker's, so that a deadline means the same at both ends.

Pure. The offset is the least of (received - sent) over the link's frames: it holds one frame's transit, never a queue.
"""

from typing import Final

DRIFT: Final = 1e-3  # twice what a kernel may slew a clock; the offset may rise by this share of the time that passes


class ClockOffset:
    """The reader's clock minus the sender's, kept from the stamps of the frames. Owned by the link's reader."""

    __slots__ = ("_offset_us", "_updated_us")

    def __init__(self, sent_us: int, received_us: int) -> None:
        """Begin with the first frame, the HELLO, however long it waited to be read: later frames correct it."""
        self._offset_us = received_us - sent_us
        self._updated_us = received_us

    def heard(self, sent_us: int, received_us: int) -> None:
        """Take in one frame: an offset that is less counts at once, one that is more only as fast as clocks drift.

        So a stopped reader that wakes to stale frames sees them as old, and still follows a clock that runs away.
        """
        sample_us = received_us - sent_us
        if sample_us > self._offset_us:
            rise_us = int((received_us - self._updated_us) * DRIFT)
            if rise_us == 0:
                return
            sample_us = min(sample_us, self._offset_us + rise_us)
        self._offset_us = sample_us
        self._updated_us = received_us

    def to_local_us(self, remote_us: int) -> int:
        """Return the reader's time of an instant of the sender's clock."""
        return remote_us + self._offset_us
