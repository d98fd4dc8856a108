"""Which links a worker has promised, and who may open them: each by its own secret, once, within its time.

Owned by no thread: every method may be called from any. Knows no transport.
"""

import hmac
import threading
import time

import torch

from collegium.link.base import ExpectedLink
from collegium.link.frame import SECRET_BYTES, FrameError


class ExpectedLinks:
    """The promises that have not been taken up."""

    def __init__(self) -> None:
        """Begin with none."""
        self._guard = threading.Lock()
        self._links: dict[int, ExpectedLink] = {}

    def add(self, link: ExpectedLink) -> None:
        """Remember a promise, and forget those whose time is over. Raises ValueError as WorkerPort.expect does."""
        _ = link.shape  # refuses what no frame can carry
        if len(link.secret) != SECRET_BYTES:
            raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(link.secret)}")
        now_s = time.monotonic()
        with self._guard:
            self._links = {link_id: old for link_id, old in self._links.items() if old.expires_s > now_s}
            if link.link_id in self._links:
                raise ValueError(f"link {link.link_id} is expected already")
            self._links[link.link_id] = link

    def claim(
        self, link_id: int, secret: bytes, dtype: torch.dtype, d_model: int, *, are_rows_apart: bool = False
    ) -> ExpectedLink:
        """Return the link that this secret opens, and never again.

        Raises FrameError, which tells a caller no more than it may know. A wrong secret takes as long to refuse as a
        right one, and does not spoil the link for the router that holds the right one.
        """
        with self._guard:
            expected = self._links.get(link_id)
            known = bytes(SECRET_BYTES) if expected is None else expected.secret
            is_right = hmac.compare_digest(known, secret)
            if expected is None or not is_right or expected.expires_s <= time.monotonic():
                raise FrameError("no such link, or its secret is wrong, used or expired")
            del self._links[link_id]
        if (dtype, d_model) != (expected.dtype, expected.d_model):
            raise FrameError(
                f"the router sends {dtype} of width {d_model}, the link is {expected.dtype} of {expected.d_model}"
            )
        if are_rows_apart != expected.are_rows_apart:
            raise FrameError(f"the link's rows {'do not ' if are_rows_apart else ''}travel apart from its frames")
        return expected
