"""Sizes as people write them: 512MiB, 2GiB, 1e9.

Owns the units and their reading and writing; binary and decimal ones are told apart as Kubernetes does.
"""

from __future__ import annotations

import re

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "ki": 2**10, "kib": 2**10, "mi": 2**20, "mib": 2**20, "gi": 2**30, "gib": 2**30, "ti": 2**40, "tib": 2**40,
}  # fmt: skip


class ByteSize(int):
    """A number of bytes, written as 512MiB, 2GiB, 1e9 or 4096."""

    @classmethod
    def parse(cls, text: str) -> ByteSize:
        """Read a size; ValueError names the forms that work."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\+?\d+)?)\s*([A-Za-z]*)\s*", text)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError("give a number of bytes, such as 512MiB, 2GiB or 1e9")
        number = float(match[1])
        if "." not in match[1] and "e" not in match[1].lower():
            return cls(int(match[1]) * _UNITS[match[2].lower()])
        return cls(round(number * _UNITS[match[2].lower()]))

    def __str__(self) -> str:
        """Write the size with the largest binary unit that divides it."""
        for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if self and self % factor == 0:
                return f"{self // factor}{unit}"
        return int.__repr__(self)


class MemoryBudget:
    """A limit of memory as people set it: a size, a share of a whole such as 25%, or none (empty)."""

    __slots__ = ("_share", "_size")

    def __init__(self, *, size: int = 0, share: float = 0.0):
        self._size, self._share = size, share

    @classmethod
    def parse(cls, text: str) -> MemoryBudget:
        """Read a budget; ValueError names the forms that work."""
        text = text.strip()
        if not text:
            return cls()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)
        if match is None:
            if text.endswith("%"):
                raise ValueError("give a share above 0% and up to 100%, such as 25%")
            size = ByteSize.parse(text)
            if size < 1:
                raise ValueError("give at least 1 byte, or leave it out")
            return cls(size=size)
        share = float(match[1]) / 100
        if not 0 < share <= 1:
            raise ValueError("give a share above 0% and up to 100%, such as 25%")
        return cls(share=share)

    @property
    def is_share(self) -> bool:
        """Whether it is a share of a whole."""
        return self._share > 0

    def bytes_of(self, whole: int) -> int:
        """Give the bytes, where the whole has so many; 0: no limit. A share is rounded up."""
        return self._size or -int(-whole * self._share // 1)

    def __bool__(self) -> bool:
        """Whether there is a limit."""
        return bool(self._size or self._share)

    def __eq__(self, other: object) -> bool:
        """Compare by value."""
        return isinstance(other, MemoryBudget) and (self._size, self._share) == (other._size, other._share)

    def __hash__(self) -> int:
        """Hash by value."""
        return hash((self._size, self._share))

    def __str__(self) -> str:
        """Write it as it may be read."""
        return f"{self._share * 100:g}%" if self._share else str(ByteSize(self._size)) if self._size else ""
