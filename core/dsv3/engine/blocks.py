"""Blocks of cache memory: who holds which, which are free, and which hold a known beginning of a text. No torch.

A block has one number in all layers. One that is full of accepted tokens gets a key that stands for these tokens and all before
them, and can then be shared by requests that begin alike. When nobody holds it, it stays findable until its memory is needed.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence


class PrefixKeys:
    """Keys of blocks: a SHA-256 chain over tokens. Its root is random, so that nobody can compute a key outside this process;
    salt keeps those apart who must not learn from the speed of an answer what others asked."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._root = secrets.token_bytes(32)

    def extend(self, keys: list[bytes], tokens: Sequence[int], salt: bytes) -> None:
        """Append the keys of the full blocks of tokens that `keys` does not have yet."""
        for at in range(len(keys) * self.size, len(tokens) // self.size * self.size, self.size):
            before = keys[-1] if keys else hashlib.sha256(self._root + salt).digest()
            keys.append(hashlib.sha256(before + array("q", tokens[at : at + self.size]).tobytes()).digest())


class BlockPool:
    """`total` blocks of `size` tokens each. Free blocks are taken in the order in which they were released."""

    def __init__(self, total: int, size: int) -> None:
        self.total, self.size = total, size
        self._free: dict[int, None] = dict.fromkeys(range(total))  # in order, and any of them is removed at once
        self._holders: dict[int, int] = {}
        self._found: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds, those that can still be found among them."""
        return len(self._free)

    @property
    def known(self) -> int:
        """Blocks that can be found."""
        return len(self._found)

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def grow(self, total: int) -> None:
        self._free.update(dict.fromkeys(range(self.total, total)))
        self.total = max(self.total, total)

    def take(self, count: int) -> list[int]:
        """Blocks for new content; what they held is forgotten. There must be that many, see `free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} are free")
        taken = []
        for _ in range(count):
            block = next(iter(self._free))
            del self._free[block]
            self._forget(block)
            self._holders[block] = 1
            taken.append(block)
        return taken

    def knows(self, key: bytes) -> bool:
        """Whether the block of a key can be found."""
        return key in self._found

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Hold the blocks of the longest beginning that is known."""
        held: list[int] = []
        for key in keys:
            block = self._found.get(key)
            if block is None:
                break
            self._free.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
            held.append(block)
        return held

    def name(self, blocks: Sequence[int], keys: Sequence[bytes]) -> None:
        """Make blocks findable. Where another block has the key already, it stays the one."""
        for block, key in zip(blocks, keys, strict=False):
            if block not in self._keys and key not in self._found:
                self._found[key], self._keys[block] = block, key

    def release(self, blocks: Sequence[int]) -> None:
        """Hold them no more. The last goes first: a beginning, which more requests share, is forgotten last."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                del self._holders[block]
                self._free[block] = None

    def forget_all(self) -> None:
        """No block is found any more; who holds one keeps it."""
        self._found.clear()
        self._keys.clear()

    def _forget(self, block: int) -> None:
        key = self._keys.pop(block, None)
        if key is not None:
            del self._found[key]

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """AssertionError unless every block is either free or held, as often as `held` (the blocks of every request) says."""
        counted = Counter(block for blocks in held for block in blocks)
        assert counted == Counter(self._holders), f"held {dict(counted)}, counted {self._holders}"
        assert not counted.keys() & self._free.keys(), "a block is free and held"
        assert len(self._free) + len(counted) == self.total, "a block is lost"
        assert {block: key for key, block in self._found.items()} == self._keys, "a key leads to another block"
