"""GpuPlan: a step's metadata on the device, brought there in one copy, and rewritten in place for replays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_rt.backends.accelerator import pad
from qwen_rt.backends.base import BatchMeta

ALIGN = 4  # int32 words: every array starts at a multiple of 16 bytes


@dataclass(frozen=True)
class Layout:
    """Where each array lies in one int32 buffer. T rows, B sequences, tables of `max_blocks`."""

    rows: int
    seqs: int
    max_blocks: int
    extra: tuple[int, ...] = ()  # words of further int32 arrays (work lists)

    def spans(self) -> list[tuple[int, int]]:
        """(start, length) in words: slots (int64), q_start, kv_lens, row_seq, block_table, then the extra arrays."""
        sizes = (2 * self.rows, self.seqs + 1, self.seqs, self.rows, self.seqs * self.max_blocks, *self.extra)
        spans, at = [], 0
        for size in sizes:
            spans.append((at, size))
            at += -(-size // ALIGN) * ALIGN
        return spans

    def words(self) -> int:
        """Length of the buffer in int32 words."""
        start, size = self.spans()[-1]
        return start + -(-size // ALIGN) * ALIGN


@dataclass
class GpuPlan:
    """A checked step: host integers for geometry, device arrays for kernels (views of one buffer).

    slots int64 [T]; q_start int32 [B+1]; kv_lens int32 [B]; row_seq int32 [T]; block_table int32 [B, max_blocks].
    """

    q_lens: Sequence[int]
    block: int
    num_blocks: int  # one more than the highest block id in use (padding not counted)
    reach: int  # no sequence has more keys than this: geometry depends on it, never on kv_lens
    layout: Layout
    buffer: Tensor  # int32, on the device
    slots: Tensor
    q_start: Tensor
    kv_lens: Tensor
    row_seq: Tensor
    block_table: Tensor
    extra: list[Tensor]
    cache: dict[Any, Any] = field(default_factory=dict)  # what operations remember of a step (geometry, workspaces)

    @property
    def rows(self) -> int:
        """T."""
        return self.layout.rows

    @property
    def seqs(self) -> int:
        """B."""
        return self.layout.seqs

    @property
    def decode(self) -> bool:
        """Whether every sequence has one row."""
        return self.layout.rows == self.layout.seqs

    def update(self, meta: BatchMeta, dummy_block: int) -> None:
        """Rewrite a plan of `seqs` decode rows in place for the `meta` of fewer or as many; the rest becomes padding.

        ValueError when it does not fit; `meta` has been checked.
        """
        size = len(meta.q_lens)
        if size > self.seqs or max(meta.kv_lens) > self.reach:
            raise ValueError(
                f"{size} sequences of up to {max(meta.kv_lens)} keys; the plan holds {self.seqs} of {self.reach}"
            )
        words = pack(pad(meta, self.seqs, dummy_block, self.block), self.layout, self.block)
        self.buffer.copy_(pinned(words, self.buffer.device), non_blocking=True)


def make_plan(
    meta: BatchMeta,
    block: int,
    device: torch.device,
    *,
    max_blocks: int | None = None,
    work: Sequence[npt.NDArray[np.int32]] = (),
) -> GpuPlan:
    """Plan a step that has been checked. `work`: further int32 arrays.

    max_blocks: width of the tables, and the reach; None: as the longest sequence needs.
    """
    used = [-(-n // block) for n in meta.kv_lens]
    width = max(used) if max_blocks is None else max_blocks
    layout = Layout(len(meta.slots), len(meta.q_lens), width, tuple(w.size for w in work))
    words = pack(meta, layout, block, work)
    buffer = pinned(words, device).to(device, non_blocking=True)
    slots, q_start, kv_lens, row_seq, table, *extra = (buffer[at : at + size] for at, size in layout.spans())
    return GpuPlan(
        q_lens=list(meta.q_lens),
        block=block,
        num_blocks=1 + max(max(row[:n]) for row, n in zip(meta.block_table, used, strict=True)),
        reach=max(meta.kv_lens) if max_blocks is None else max_blocks * block,
        layout=layout,
        buffer=buffer,
        slots=slots.view(torch.int64),
        q_start=q_start,
        kv_lens=kv_lens,
        row_seq=row_seq,
        block_table=table.view(layout.seqs, width),
        extra=[x.view(w.shape) for x, w in zip(extra, work, strict=True)],
    )


def pack(
    meta: BatchMeta, layout: Layout, block: int, work: Sequence[npt.NDArray[np.int32]] = ()
) -> npt.NDArray[np.int32]:
    """The int32 buffer of a step on the host; table entries beyond a sequence's pages are 0, a block that exists."""
    words = np.zeros(layout.words(), np.int32)
    slots, q_start, kv_lens, row_seq, table, *extra = (words[at : at + size] for at, size in layout.spans())
    slots.view(np.int64)[:] = meta.slots
    np.cumsum(meta.q_lens, out=q_start[1:])
    kv_lens[:] = meta.kv_lens
    row_seq[:] = np.repeat(np.arange(layout.seqs, dtype=np.int32), meta.q_lens)
    wide = table.reshape(layout.seqs, layout.max_blocks)
    for row, ids, n in zip(wide, meta.block_table, meta.kv_lens, strict=True):
        used = -(-n // block)
        row[:used] = ids[:used]
    for out, array in zip(extra, work, strict=True):
        out[:] = array.reshape(-1)
    return words


def pinned(words: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    """A host tensor fit for an asynchronous copy: pinned (torch's allocator keeps it until the copy is done)."""
    tensor = torch.from_numpy(words)
    return tensor if device.type == "cpu" else tensor.pin_memory()
