"""Metrics pages of this machine's own processes, read past any proxy that the shell names."""

from __future__ import annotations

import urllib.request

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def read_page(url: str, timeout_s: float = 5.0) -> str:
    """Return the text of a page. Raises OSError where there is none in time."""
    with _direct.open(url, timeout=timeout_s) as page:
        return page.read().decode()
