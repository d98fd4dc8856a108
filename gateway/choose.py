"""Choose the router for a request: one that has the prompt's beginning cached, else the least loaded.

Owns the table of which router saw which beginning. Pure; the event loop's thread owns the table. Prefix affinity as in
SGLang's router: worth it while the router is not much busier than the others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

# Beginnings are remembered in runs of this many ids, the order of a KV block's size.
RUN_TOKENS = 32
_MAX_ENTRIES = 65_536
# Prompt tokens that weigh as much as one more sequence to decode: one chunk of a prefill costs about one step.
_TOKENS_PER_SEQUENCE = 256
# A router with the prefix may be this many sequences busier than the least busy one.
_MAX_EXTRA_PRESSURE = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A router that can serve, as its last frame and our own count show it."""

    address: str
    num_sequences: int
    waiting_tokens: int

    @property
    def pressure(self) -> float:
        """Its load, in sequences."""
        return self.num_sequences + self.waiting_tokens / _TOKENS_PER_SEQUENCE


class PrefixTable:
    """Which router was last given a prompt that begins so. Forgets the longest unused."""

    __slots__ = ("_entries", "_max_entries")

    def __init__(self, max_entries: int = _MAX_ENTRIES) -> None:
        self._entries: OrderedDict[int, str] = OrderedDict()
        self._max_entries = max_entries

    def note(self, prompt_ids: Sequence[int], address: str) -> None:
        """Remember that a router computes this prompt."""
        for key in _keys(prompt_ids):
            self._entries[key] = address
            self._entries.move_to_end(key)
        while len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def find(self, prompt_ids: Sequence[int]) -> str | None:
        """Give the router that saw the longest beginning of this prompt."""
        found: str | None = None
        for key in _keys(prompt_ids):
            address = self._entries.get(key)
            if address is None:
                break
            found = address
        return found

    def forget(self, address: str) -> None:
        """Drop a router: its cache is gone."""
        for key in [key for key, owner in self._entries.items() if owner == address]:
            del self._entries[key]


def choose(candidates: Sequence[Candidate], preferred: str | None) -> Candidate:
    """Choose among at least one candidate; `preferred` has the prefix. Ties go to the first address."""
    least = min(candidates, key=lambda c: (c.pressure, c.address))
    for candidate in candidates:
        if candidate.address == preferred and candidate.pressure <= least.pressure + _MAX_EXTRA_PRESSURE:
            return candidate
    return least


def _keys(prompt_ids: Sequence[int]) -> list[int]:
    keys: list[int] = []
    key = 0
    for start in range(0, len(prompt_ids) - RUN_TOKENS + 1, RUN_TOKENS):
        key = hash((key, tuple(prompt_ids[start : start + RUN_TOKENS])))
        keys.append(key)
    return keys
