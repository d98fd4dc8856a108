"""KV blocks: who holds which, which may be shared, which may be taken back.

Owns block ids, reference counts and the index of full blocks by content. Holds no tensor; pure. One thread owns a pool.
A block is a run of BLOCK_TOKENS cached positions. A full block is known by the hash of everything up to its end, so
that a prompt which begins like an earlier one finds that part computed. Blocks that nobody holds stay in the index
until their room
is needed, the least recently released first. The scheme is vLLM's automatic prefix caching (docs: "Automatic Prefix
Caching").

Example: blocks of 16, prompt of 40 tokens: 3 blocks, 2 of them full and shareable.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

BLOCK_TOKENS = 16

ROOT = b""
SOURCE = b"source"  # what the names of a source's blocks begin with


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name a full block by its content and all before it."""
    return hashlib.blake2b(parent + array("I", tokens).tobytes(), digest_size=16).digest()


def num_blocks_for(num_tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-num_tokens // BLOCK_TOKENS)


class BlockPool:
    """All KV blocks of a router."""

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError("a router needs at least one KV block")
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently released first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def can_allocate(self, count: int) -> bool:
        """Whether so many blocks can be had now."""
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take blocks, forgetting what they held. Raises ValueError where there are too few."""
        if not self.can_allocate(count):
            raise ValueError(f"{count} KV blocks wanted, {self.num_free} free")
        blocks: list[int] = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            name = self._hash_of.pop(block, None)
            if name is not None:
                del self._block_of[name]
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def find(self, names: Sequence[bytes]) -> list[int]:
        """List the blocks of the longest known run of names, without taking them."""
        found: list[int] = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Take a reference to blocks that `find` gave."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def num_unheld(self, blocks: Sequence[int]) -> int:
        """How many of these blocks `share` would take from the free ones."""
        return sum(self._references[block] == 0 for block in blocks)

    def name(self, block: int, name: bytes) -> None:
        """Make a full block findable. The first block of a name keeps it; another of the same content stays private."""
        if name not in self._block_of and block not in self._hash_of:
            self._block_of[name] = block
            self._hash_of[block] = name

    def forget(self, blocks: Sequence[int]) -> None:
        """Make held blocks unfindable: what they hold is not to be trusted. Whoever holds them keeps them."""
        for block in blocks:
            name = self._hash_of.pop(block, None)
            if name is not None:
                del self._block_of[name]

    def release(self, blocks: Sequence[int]) -> None:
        """Give references back. The tail of a sequence goes first, so that its beginning stays findable longest."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] < 0:
                raise ValueError(f"KV block {block} was released twice")
            if self._references[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)
