"""Scheduler: which sequences run in a step, and how many tokens of each. Integers only.

Continuous batching, first come first served. Every decoding sequence gets its row in every step; prompts are read in
chunks beside them, within a token budget of their own, so neither starves the other. When blocks run out, the
sequence that came last gives its blocks back and is computed again later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from qwen_rt.engine.sequence import Sequence
from qwen_rt.kv import BlockManager, BlockTable


@dataclass(frozen=True)
class Chunk:
    """The next `len(slots)` tokens of a sequence, and where their keys go."""

    seq: Sequence
    start: int
    slots: list[int]
    table: BlockTable

    @property
    def stop(self) -> int:
        """One past the last position of the chunk."""
        return self.start + len(self.slots)


class Scheduler:
    """Owns the queue, the running sequences and their blocks."""

    def __init__(self, blocks: BlockManager, max_batch: int, prefill_tokens: int) -> None:
        """`prefill_tokens` is the budget of a step for reading prompts; decoding rows come on top of it."""
        self.blocks = blocks
        self.max_batch = max_batch
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.num_preemptions = 0
        self._blocked_at = -1  # free blocks when the head of the queue last did not fit

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(seq)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, their blocks taken; empty when nothing is left to do."""
        step: list[Chunk] = []
        budget = self.prefill_tokens
        preemptions = self.num_preemptions
        position = 0
        while position < len(self.running):
            seq = self.running[position]
            size = 1 if seq.pending == 1 else min(seq.pending, budget)
            if size and not self._make_room(seq, size):
                break  # `seq` itself came last and gave its blocks back
            if size:
                step.append(self._take(seq, size))
                budget -= size if size > 1 else 0
            position += 1
        while self.waiting and budget > 0 and len(self.running) < self.max_batch:
            seq = self.waiting[0]
            # What was just preempted does not come straight back: it would take the blocks it gave up.
            if self.num_preemptions > preemptions or not self._admit(seq):
                break
            self.waiting.popleft()
            self.running.append(seq)
            step.append(self._take(seq, min(seq.pending, budget)))
            budget -= len(step[-1].slots)
        return step

    def computed(self, step: list[Chunk]) -> None:
        """Say that a step has run: its keys are in the cache."""
        for chunk in step:
            chunk.seq.computed = chunk.stop
            self.blocks.commit(chunk.table)

    def finish(self, seq: Sequence) -> None:
        """Forget a sequence, running or waiting, and free its blocks."""
        if seq.table is not None:
            self.running.remove(seq)
            self._release(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks; it waits at the head of the queue to be computed again."""
        self.running.remove(seq)
        self._release(seq)
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def make_room(self, num_tokens: int) -> None:
        """Preempt the latest sequences until `num_tokens` tokens fit, or nothing runs any more."""
        while self.running and self.blocks.num_free * self.blocks.block_size < num_tokens:
            self.preempt(self.running[-1])

    def _release(self, seq: Sequence) -> None:
        assert seq.table is not None
        self.blocks.free(seq.table)
        seq.table = None

    def _make_room(self, seq: Sequence, size: int) -> bool:
        """Preempt from the back until `size` more tokens of `seq` fit; False when it had to give way itself."""
        while seq.table is not None and not self.blocks.can_append(seq.table, size):
            self.preempt(self.running[-1])
        return seq.table is not None

    def _admit(self, seq: Sequence) -> bool:
        """Take the cached prefix of a waiting sequence if all its tokens fit, with a block to grow for all that run."""
        if self.running and self.blocks.num_free <= self._blocked_at:
            return False
        table = self.blocks.allocate(seq.ids, salt=seq.alpha)
        growth = len(self.running) * self.blocks.block_size
        if not self.blocks.can_append(table, len(seq.ids) - table.num_tokens + growth):
            self.blocks.free(table)
            self._blocked_at = self.blocks.num_free
            return False
        self._blocked_at = -1
        seq.table, seq.computed = table, table.num_cached
        if not seq.output:
            seq.cached = table.num_cached
        return True

    def _take(self, seq: Sequence, size: int) -> Chunk:
        assert seq.table is not None
        start = seq.computed
        slots = self.blocks.append(seq.table, seq.ids[start : start + size])
        return Chunk(seq, start, slots, seq.table)
