"""Sampling on a GPU: what the host prepares for csrc/gpu/sample.cu, in one copy, and the launches; ids come back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.backends.adjust import changes
from qwen_rt.backends.base import SampleRow
from qwen_rt.backends.gpu.kernels import Kernels
from qwen_rt.errors import BackendError

CHUNK = 4096  # tokens a block of the first passes reads
BUCKETS = 2048  # of the histogram (sample.cu)
BLOCK = 256
MAX_ROWS = 65535  # rows a launch

_COLDEST = 1e-30  # a lower temperature is as good as this one: the scale stays finite in float32


def run(kernels: Kernels, logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """As Backend.sample: float32 logits [R, V], overwritten where they are adjusted -> R ids.

    NaN or infinite logits, or nothing left to choose: BackendError. Ids outside the vocabulary: ValueError.
    """
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[0] != len(rows) or logits.shape[1] == 0:
        raise ValueError(f"sample: logits are {logits.dtype} {tuple(logits.shape)} for {len(rows)} rows")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    chosen: list[int] = []
    for start in range(0, len(rows), MAX_ROWS):
        part = slice(start, start + MAX_ROWS)
        chosen += launch(kernels, logits[part], rows[part]).tolist()
    if min(chosen, default=0) < 0:
        raise BackendError("the logits hold NaN or infinity, or every token is banned: the model's output is unusable")
    return chosen


def launch(kernels: Kernels, logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """The ids, int32 [R] on the device, before anyone waits for them; -1 for an unusable row."""
    count, vocab = logits.shape
    device, stride, chunks = logits.device, logits.stride(0), -(-vocab // CHUNK)
    pairs = changes(rows, vocab)
    settings, penalties, bias, at, ids, flags = to_device(
        device, settings_of(rows), penalties_of(rows), pairs.bias, pairs.rows, pairs.ids, pairs.flags
    )
    if len(pairs.ids):
        adjust = kernels("sample", "sample_adjust", "PPPPPPli")
        grid = (-(-len(pairs.ids) // BLOCK), 1, 1)
        adjust(grid, BLOCK, logits, at, ids, flags, bias, penalties, stride, len(pairs.ids))
    tops = torch.empty((count, chunks), dtype=torch.int64, device=device)
    masses = torch.empty((count, BUCKETS), dtype=torch.int64, device=device)
    counts = torch.empty((count, BUCKETS), dtype=torch.int32, device=device)
    chosen = torch.empty(count, dtype=torch.int32, device=device)
    top = kernels("sample", "sample_top", "PPPPlii")
    top((chunks, count, 1), BLOCK, logits, tops, masses, counts, stride, vocab, CHUNK)
    if any(row.temperature for row in rows):
        histogram = kernels("sample", "sample_histogram", "PPPPPlii")
        histogram((chunks, count, 1), BLOCK, logits, tops, masses, counts, settings, stride, vocab, CHUNK)
    pick = kernels("sample", "sample_pick", "PPPPPPlii")
    pick((count, 1, 1), pick_block(vocab), chosen, logits, tops, masses, counts, settings, stride, vocab, chunks)
    return chosen


def pick_block(vocab: int) -> int:
    """Threads of the block that has a row to itself: 128 to 512, in step with the row's length."""
    return min(512, max(128, vocab // 64 // 128 * 128))


def settings_of(rows: Sequence[SampleRow]) -> NDArray[np.float64]:
    """[R, 5]: log2(e) / temperature (0: greedy), top_k, top_p, -log2(min_p), uniform."""
    return np.array(
        [
            (
                math.log2(math.e) / max(row.temperature, _COLDEST) if row.temperature > 0 else 0.0,
                row.top_k,
                row.top_p,
                max(0.0, -math.log2(row.min_p)) if row.min_p > 0 else math.inf,
                row.uniform,
            )
            for row in rows
        ],
        dtype=np.float64,
    )


def penalties_of(rows: Sequence[SampleRow]) -> NDArray[np.float64]:
    """[R, 3]: repetition, presence, frequency."""
    return np.array(
        [(row.repetition_penalty, row.presence_penalty, row.frequency_penalty) for row in rows], dtype=np.float64
    )


def to_device(device: torch.device, *arrays: NDArray[np.float64] | NDArray[np.int32]) -> list[Tensor]:
    """The arrays on the device, by one copy; each starts at a multiple of 8 bytes."""
    starts = [0]
    for a in arrays:
        starts.append(starts[-1] + -(-a.nbytes // 8) * 8)
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type != "cpu")
    flat = host.numpy()
    for a, start in zip(arrays, starts, strict=False):
        flat[start : start + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    dtypes = {np.dtype(np.float64): torch.float64, np.dtype(np.int32): torch.int32}
    return [there[start : start + a.nbytes].view(dtypes[a.dtype]) for a, start in zip(arrays, starts, strict=False)]
