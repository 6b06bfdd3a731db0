"""AscendPlan: a step's metadata, on the host as the integers that attention wants, on the device as int32 arrays that
came in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_rt.backends.accelerator import NotRecordable, pad
from qwen_rt.backends.base import BatchMeta

_ALIGN = 16  # int32 words: every array starts at a multiple of 64 bytes


@dataclass
class Part:
    """Some sequences of a step, and where their keys lie."""

    q_lens: list[int]
    kv_lens: list[int]
    tables: list[list[int]]
    rows: Tensor | None  # int32 on the device: their rows of the step; None: all of them
    block: int
    device: torch.device

    def tokens(self) -> Tensor:
        """int32 [sum of kv_lens] on the device: the slot of every key, sequence after sequence."""
        slots = [
            (np.asarray(table, np.int32)[:, None] * self.block + np.arange(self.block, dtype=np.int32)).ravel()[:n]
            for table, n in zip(self.tables, self.kv_lens, strict=True)
        ]
        return to_device(np.concatenate(slots), self.device)


@dataclass
class AscendPlan:
    """A checked step of T rows and B sequences.

    slots, pages, offsets int32 [T]: where each key goes, and its block and place within; block_table int32 [B, width],
    beyond a sequence's pages 0, a block that exists.
    """

    q_lens: list[int]
    kv_lens: list[int]
    tables: list[list[int]]
    block: int
    num_blocks: int  # one more than the highest block id in use
    width: int
    buffer: Tensor
    slots: Tensor
    pages: Tensor
    offsets: Tensor
    block_table: Tensor
    recorded: bool = False  # of a recording: lengths change between replays
    cache: dict[Any, Any] = field(default_factory=dict)  # what operations remember within a step

    @property
    def rows(self) -> int:
        """T."""
        return self.slots.shape[0]

    @property
    def decode(self) -> bool:
        """Whether every sequence has one row."""
        return self.rows == len(self.q_lens)

    @property
    def q_ends(self) -> list[int]:
        """Row after the last of each sequence."""
        return list(accumulate(self.q_lens))

    def part(self, seqs: Sequence[int] | None = None) -> Part:
        """The sequences of those indices (None: all), kept for the step. NotRecordable within a recording."""
        if self.recorded:
            raise NotRecordable("attention gathers its keys, as many as there are")
        key = None if seqs is None else tuple(seqs)
        if key not in self.cache:
            chosen = range(len(self.q_lens)) if seqs is None else seqs
            rows = None
            if seqs is not None:
                ends = self.q_ends
                spans = [np.arange(ends[b] - self.q_lens[b], ends[b], dtype=np.int32) for b in seqs]
                rows = to_device(np.concatenate(spans), self.buffer.device)
            self.cache[key] = Part(
                [self.q_lens[b] for b in chosen],
                [self.kv_lens[b] for b in chosen],
                [self.tables[b] for b in chosen],
                rows,
                self.block,
                self.buffer.device,
            )
        return self.cache[key]

    def update(self, meta: BatchMeta, dummy_block: int) -> None:
        """Rewrite a plan of B decode rows in place for the checked `meta` of fewer or as many; the rest is padding."""
        size, seqs = len(meta.q_lens), len(self.q_lens)
        reach = self.width * self.block
        if size > seqs or max(meta.kv_lens) > reach:
            raise ValueError(f"{size} sequences of up to {max(meta.kv_lens)} keys; the plan holds {seqs} of {reach}")
        meta = pad(meta, seqs, dummy_block, self.block)
        self.kv_lens = list(meta.kv_lens)
        self.buffer.copy_(_pinned(_pack(meta, self.width, self.block), self.buffer.device), non_blocking=True)


def make_plan(meta: BatchMeta, block: int, device: torch.device, max_blocks: int | None = None) -> AscendPlan:
    """Plan a step that has been checked. max_blocks: width of the table; None: as the longest sequence needs."""
    used = [-(-n // block) for n in meta.kv_lens]
    width = max(used) if max_blocks is None else max_blocks
    buffer = to_device(_pack(meta, width, block), device)
    rows, seqs = len(meta.slots), len(meta.q_lens)
    arrays = [buffer[at : at + size] for at, size in _spans(rows, seqs, width)]
    tables = [list(row[:n]) for row, n in zip(meta.block_table, used, strict=True)]
    return AscendPlan(
        q_lens=list(meta.q_lens),
        kv_lens=list(meta.kv_lens),
        tables=tables,
        block=block,
        num_blocks=1 + max(map(max, tables)),
        width=width,
        buffer=buffer,
        slots=arrays[0],
        pages=arrays[1],
        offsets=arrays[2],
        block_table=arrays[3].view(seqs, width),
    )


def to_device(words: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """A host array on the device, through pinned memory so that nobody waits."""
    return _pinned(words, device).to(device, non_blocking=True)


def _pinned(words: npt.NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(words)
    return tensor.pin_memory() if device.type == "npu" else tensor


def _spans(rows: int, seqs: int, width: int) -> list[tuple[int, int]]:
    """(start, length) in words: slots, pages, offsets, block table."""
    spans, at = [], 0
    for size in (rows, rows, rows, seqs * width):
        spans.append((at, size))
        at += -(-size // _ALIGN) * _ALIGN
    return spans


def _pack(meta: BatchMeta, width: int, block: int) -> npt.NDArray[np.int32]:
    spans = _spans(len(meta.slots), len(meta.q_lens), width)
    start, size = spans[-1]
    words = np.zeros(start + -(-size // _ALIGN) * _ALIGN, np.int32)
    slots, pages, offsets, table = (words[at : at + n] for at, n in spans)
    slots[:] = meta.slots
    pages[:], offsets[:] = slots // block, slots % block
    wide = table.reshape(-1, width)
    for row, ids, n in zip(wide, meta.block_table, meta.kv_lens, strict=True):
        used = -(-n // block)
        row[:used] = ids[:used]
    return words
