"""Who holds which block of the KV cache, and which free blocks still hold something worth finding again.

A full block is named by a digest of its tokens and of the digest of the block before it, so that a name stands for
everything from the first token on. The digest has 256 bits: two different prefixes do not share a name, and nothing
else needs to be compared. A block can be found by others only after the step that wrote it has run (``publish``).

Every block is in exactly one place:

- held: ``references > 0``; several sequences may hold a published block;
- idle: nobody holds it, but it is published; the one that was let go longest ago is overwritten first;
- blank: nobody holds it, and nothing in it can be found; taken before an idle one.

Only full blocks are shared, and a sequence writes only behind what it found (it starts at the first position after the
shared blocks), so a shared block is never written and no copy-on-write is needed.

Plain Python, no tensors; every operation takes constant time per block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

#: bytes of a digest
DIGEST_SIZE = 32


def digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full block: of its tokens and all before them.

    Args:
        parent: digest of the block before it; empty for the first one.
        tokens: of this block.
    """
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=DIGEST_SIZE).digest()


class BlockManager:
    """Hands out blocks and finds published ones."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._names: list[bytes | None] = [None] * num_blocks
        self._by_name: dict[bytes, int] = {}
        # the lowest block is handed out first
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        #: idle blocks that were overwritten, and so cannot be found any more
        self.evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Free blocks that can still be found."""
        return len(self._idle)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The published blocks of the longest run of leading names that are known."""
        blocks = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def take(self, found: Sequence[int], fresh: int, spare: int = 0) -> list[int] | None:
        """Holds the ``found`` blocks and ``fresh`` others.

        Nothing changes, and the answer is None, if fewer than ``spare`` free blocks would be left.

        Returns:
            The fresh blocks.
        """
        idle = sum(1 for block in found if self._references[block] == 0)
        if fresh + spare > self.num_free - idle:
            return None
        for block in found:
            if self._references[block] == 0:
                del self._idle[block]
            self._references[block] += 1
        return [self._take_one() for _ in range(fresh)]

    def _take_one(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            self.evictions += 1
        self._references[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Lets go of the blocks of one sequence, given in order of position.

        The last ones are overwritten first: without the blocks before it, a block cannot be found.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._names[block] is None:
                    self._blank.append(block)
                else:
                    self._idle[block] = None

    def publish(self, block: int, name: bytes) -> None:
        """Lets others find a held block, which is full and written.

        If another block has this name already, that one stays the one to be found.
        """
        if name not in self._by_name:
            self._by_name[name] = block
            self._names[block] = name

    def reset(self) -> None:
        """Forgets all published blocks; those that are held stay held."""
        for block in self._by_name.values():
            self._names[block] = None
        self._by_name.clear()
        self._blank.extend(self._idle)
        self._idle.clear()

    def _forget(self, block: int) -> None:
        name = self._names[block]
        assert name is not None
        del self._by_name[name]
        self._names[block] = None

    def check(self) -> None:
        """Checks that every block is in exactly one place; for tests.

        Raises:
            AssertionError: it is not.
        """
        held = [b for b, count in enumerate(self._references) if count > 0]
        places = sorted([*held, *self._idle, *self._blank])
        assert places == list(range(self.num_blocks)), f"blocks are lost or in two places: {places}"
        assert all(count >= 0 for count in self._references), "a block was released more often than taken"
        named = {b: name for b, name in enumerate(self._names) if name is not None}
        assert {name: b for b, name in named.items()} == self._by_name, "names and blocks disagree"
        assert all(b in named for b in self._idle), "an idle block has no name"
        assert not any(b in named for b in self._blank), "a blank block has a name"
