"""BlockManager: which cache block holds which tokens of which sequence. Integers only.

The life of a sequence: `allocate` (takes the cached prefix) -> `append` per step (slots for its new tokens) ->
`commit` once the step has run (full blocks become shareable) -> `free`. Only full blocks are ever shared and a full
block is never written again, so nothing needs copying on write.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from qwen_rt.errors import OutOfMemory


@dataclass
class BlockTable:
    """A sequence's hold on the cache: made by allocate(), ended by free()."""

    blocks: list[int] = field(default_factory=list)  # ids of the blocks that hold positions 0 .. num_tokens-1
    num_tokens: int = 0  # keys that have a slot
    num_cached: int = 0  # leading tokens found in the prefix cache by allocate(): not to be computed again
    chain: bytes = b""  # hash of all committed full blocks
    num_committed: int = 0  # full blocks offered for sharing
    tail: list[int] = field(default_factory=list)  # tokens after the committed blocks


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens, and remembers full blocks by the tokens they hold.

    A block is referenced (by one or more tables) or free. A free block may still hold a known prefix; it is found again
    until it is needed for something else, least recently used first.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a cache needs at least one block of one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # first is taken first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks no sequence references; those that hold a known prefix included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one sequence references."""
        return self.num_blocks - len(self._free)

    def match(self, tokens: Sequence[int], salt: Hashable = None) -> list[int]:
        """Blocks that hold a prefix of `tokens` under `salt`, at most len(tokens) - 1 tokens of it."""
        return [block for block, _ in self._walk(tokens, salt)]

    def can_allocate(self, tokens: Sequence[int], salt: Hashable = None) -> bool:
        """Whether all of `tokens` would fit now, its cached prefix counted once."""
        shared = self.match(tokens, salt)
        revived = sum(not self._refs[block] for block in shared)
        return self._blocks_for(len(tokens)) - len(shared) <= self.num_free - revived

    def allocate(self, tokens: Sequence[int], salt: Hashable = None, reuse: bool = True) -> BlockTable:
        """A table that holds the longest cached prefix of `tokens` (num_cached of them); the rest is for append().

        `salt` is whatever else the keys depend on, such as the NTK alpha: blocks are shared only between equal salts
        (salts are compared by repr). The last token is always left to compute. With `reuse` off nothing is looked up.
        """
        table = BlockTable(chain=_root(salt))
        for block, chain in self._walk(tokens, salt) if reuse else ():
            self._take(block)
            table.blocks.append(block)
            table.chain = chain
        table.num_committed = len(table.blocks)
        table.num_tokens = table.num_cached = table.num_committed * self.block_size
        return table

    def can_append(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether append() of that many tokens would succeed now."""
        return self._blocks_for(table.num_tokens + num_tokens) - len(table.blocks) <= self.num_free

    def append(self, table: BlockTable, tokens: Sequence[int]) -> list[int]:
        """Slots (block * block_size + offset) of the next `tokens`; OutOfMemory, nothing taken, if they do not fit."""
        end = table.num_tokens + len(tokens)
        need = self._blocks_for(end) - len(table.blocks)
        if need > self.num_free:
            raise OutOfMemory(
                f"the KV cache is full: {need} more blocks of {self.block_size} tokens are needed and "
                f"{self.num_free} of {self.num_blocks} are free; free a sequence first or lower max_model_len"
            )
        for _ in range(need):
            table.blocks.append(self._take_oldest())
        slots = [
            table.blocks[pos // self.block_size] * self.block_size + pos % self.block_size
            for pos in range(table.num_tokens, end)
        ]
        table.num_tokens = end
        table.tail.extend(tokens)
        return slots

    def commit(self, table: BlockTable) -> None:
        """Say that everything appended so far is in the cache: full blocks may now be shared."""
        size = self.block_size
        done = len(table.tail) // size
        for i in range(done):
            table.chain = _link(table.chain, table.tail[i * size : (i + 1) * size])
            block = table.blocks[table.num_committed]
            table.num_committed += 1
            # Another sequence may have computed the same tokens meanwhile; its block stays the known one.
            if self.prefix_cache and table.chain not in self._block_of:
                self._block_of[table.chain] = block
                self._hash_of[block] = table.chain
        del table.tail[: done * size]

    def free(self, table: BlockTable) -> None:
        """Give the blocks back and leave the table empty; what was committed can be found again until it is evicted."""
        for block in reversed(table.blocks):  # deepest first, so that a prefix outlives what follows it
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)
        vars(table).update(vars(BlockTable()))

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _walk(self, tokens: Sequence[int], salt: Hashable) -> Iterator[tuple[int, bytes]]:
        """(block, chain) of each cached full block along `tokens`, the last token left out."""
        chain, size = _root(salt), self.block_size
        for start in range(0, len(tokens) - size, size):
            chain = _link(chain, tokens[start : start + size])
            block = self._block_of.get(chain)
            if block is None:
                return
            yield block, chain

    def _take(self, block: int) -> None:
        self._refs[block] += 1
        self._free.pop(block, None)

    def _take_oldest(self) -> int:
        block = next(iter(self._free))
        known = self._hash_of.pop(block, None)
        if known is not None:
            del self._block_of[known]
        self._take(block)
        return block


def _root(salt: Hashable) -> bytes:
    return blake2b(repr(salt).encode(), digest_size=16).digest()


def _link(chain: bytes, tokens: Sequence[int]) -> bytes:
    return blake2b(chain + array("q", tokens).tobytes(), digest_size=16).digest()
