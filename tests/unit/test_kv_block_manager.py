"""BlockManager: invariants under random use (hypothesis), and the rules of the prefix cache one by one."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen_rt.errors import OutOfMemory
from qwen_rt.kv import BlockManager

SIZE = 4


class Cache(RuleBasedStateMachine):
    """Sequences come, grow, commit and go; `memory` is what a device would hold: slot -> (salt, prefix up to it)."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(num_blocks=12, block_size=SIZE)
        self.live: list[tuple] = []  # (table, tokens appended or found, salt)
        self.memory: dict[int, tuple] = {}

    # Few distinct tokens, so that prefixes collide often.
    tokens = st.lists(st.integers(0, 1), min_size=1, max_size=14)

    @rule(tokens=tokens, salt=st.sampled_from([1.0, 3.0]), reuse=st.booleans())
    def begin(self, tokens, salt, reuse):
        fits = self.manager.can_allocate(tokens, salt)
        table = self.manager.allocate(tokens, salt, reuse)
        assert table.num_cached < len(tokens) and table.num_cached % SIZE == 0
        assert reuse or table.num_cached == 0
        rest = tokens[table.num_cached :]
        if reuse:
            assert fits == self.manager.can_append(table, len(rest))
        self.live.append((table, tokens[: table.num_cached], salt))
        self.grow(self.live[-1], rest)

    def grow(self, item, new):
        table, tokens, salt = item
        before, free = (list(table.blocks), table.num_tokens), self.manager.num_free
        if not self.manager.can_append(table, len(new)):
            with pytest.raises(OutOfMemory):
                self.manager.append(table, new)
            assert (table.blocks, table.num_tokens, self.manager.num_free) == (*before, free)
            return
        slots = self.manager.append(table, new)
        assert len(slots) == len(new)
        for slot, token in zip(slots, new, strict=True):
            tokens.append(token)
            self.memory[slot] = (salt, *tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), tokens=tokens)
    def append(self, data, tokens):
        self.grow(data.draw(st.sampled_from(self.live)), tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def commit(self, data):
        self.manager.commit(data.draw(st.sampled_from(self.live))[0])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        item = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.manager.free(item[0])
        assert item[0].blocks == [] and item[0].num_tokens == 0

    @invariant()
    def references_are_right(self):
        held = Counter(block for table, _, _ in self.live for block in table.blocks)
        assert all(self.manager._refs[b] == held[b] for b in range(self.manager.num_blocks))
        assert self.manager.num_used == len(held)
        assert self.manager.num_free + self.manager.num_used == self.manager.num_blocks
        assert not set(self.manager._free) & set(held)

    @invariant()
    def tables_lead_to_their_tokens(self):
        for table, tokens, salt in self.live:
            assert table.num_tokens == len(tokens)
            assert len(table.blocks) == -(-len(tokens) // SIZE) == len(set(table.blocks))
            for pos in range(len(tokens)):
                slot = table.blocks[pos // SIZE] * SIZE + pos % SIZE
                assert self.memory[slot] == (salt, *tokens[: pos + 1])

    @invariant()
    def only_full_blocks_are_shared(self):
        held = Counter(b for table, _, _ in self.live for b in table.blocks)
        for table, tokens, _ in self.live:
            assert all(held[b] == 1 for b in table.blocks[len(tokens) // SIZE :])


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def run(manager, tokens, salt=None):
    table = manager.allocate(tokens, salt)
    manager.append(table, tokens[table.num_cached :])
    manager.commit(table)
    return table


def test_prefix_is_found_after_free_and_the_last_token_is_left():
    manager = BlockManager(8, SIZE)
    tokens = list(range(12))
    first = run(manager, tokens)
    blocks = list(first.blocks)
    manager.free(first)
    assert manager.num_free == 8
    assert manager.match(tokens) == blocks[:2]  # the third block would leave nothing to compute
    assert manager.match([*tokens, 99]) == blocks
    again = manager.allocate([*tokens, 99])
    assert again.blocks == blocks and again.num_cached == 12


def test_prefix_is_shared_while_in_use():
    manager = BlockManager(8, SIZE)
    a = run(manager, [1] * 9)
    b = run(manager, [1] * 8 + [2])
    assert a.blocks[:2] == b.blocks[:2] and a.blocks[2] != b.blocks[2]
    assert manager.num_used == 4
    manager.free(a)
    assert manager.num_used == 3


def test_salt_keeps_prefixes_apart():
    manager = BlockManager(8, SIZE)
    run(manager, [1] * 9, salt=1.0)
    assert manager.match([1] * 9, salt=3.0) == []
    assert len(manager.match([1] * 9, salt=1.0)) == 2


def test_uncommitted_blocks_are_not_shared():
    manager = BlockManager(8, SIZE)
    table = manager.allocate([1] * 9)
    manager.append(table, [1] * 9)
    assert manager.match([1] * 9) == []
    manager.free(table)
    assert manager.match([1] * 9) == []


def test_a_prefix_depends_on_everything_before_it():
    manager = BlockManager(8, SIZE)
    run(manager, [1, 1, 1, 1, 2, 2, 2, 2])
    assert manager.match([3, 1, 1, 1, 2, 2, 2, 2, 9]) == []
    assert len(manager.match([1, 1, 1, 1, 5, 2, 2, 2, 9])) == 1


def test_least_recently_used_prefix_is_evicted_deepest_block_first():
    manager = BlockManager(4, SIZE)
    old, new = run(manager, [1] * 8), run(manager, [2] * 8)
    manager.free(old)
    manager.free(new)
    other = run(manager, [3] * 4)
    assert len(manager.match([1] * 9)) == 1  # its second block went, its first still serves
    assert len(manager.match([2] * 9)) == 2
    manager.free(other)


def test_unknown_blocks_are_taken_before_known_prefixes():
    manager = BlockManager(4, SIZE)
    kept, plain = run(manager, [1] * 8), manager.allocate([2])
    manager.append(plain, [2] * 8)
    manager.free(kept)
    manager.free(plain)
    run(manager, [3] * 8)
    assert len(manager.match([1] * 9)) == 2


def test_decode_crosses_blocks_one_token_at_a_time():
    manager = BlockManager(3, SIZE)
    table = manager.allocate([7])
    slots = [manager.append(table, [7])[0] for _ in range(12)]
    assert slots == [b * SIZE + i for b in table.blocks for i in range(SIZE)]
    with pytest.raises(OutOfMemory, match=r"1 more blocks of 4 tokens are needed and 0 of 3 are free"):
        manager.append(table, [7])


def test_prefix_cache_off():
    manager = BlockManager(4, SIZE, prefix_cache=False)
    run(manager, [1] * 8)
    assert manager.match([1] * 9) == []


def test_empty_cache_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        BlockManager(0, SIZE)
