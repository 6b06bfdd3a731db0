"""The logits that bias, penalties and bans change, as arrays on the host: what a device's sampling begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_rt.backends.base import SampleRow


@dataclass(frozen=True)
class Pairs:
    """The logits that bias, penalties or bans change, each (row, id) once."""

    rows: NDArray[np.int32]
    ids: NDArray[np.int32]
    flags: NDArray[np.int32]  # count << 2 | banned << 1 | seen
    bias: NDArray[np.float64]


_NO_IDS = np.zeros(0, dtype=np.int32)
_UNCHANGED = Pairs(_NO_IDS, _NO_IDS, _NO_IDS, np.zeros(0))


def changes(rows: Sequence[SampleRow], vocab: int) -> Pairs:
    """The logits of these rows that change, each once. An id outside [0, vocab): ValueError."""
    found = [p for i, row in enumerate(rows) if (p := _row_changes(i, row))]
    if not found:
        return _UNCHANGED
    pairs = Pairs(
        np.concatenate([p.rows for p in found]),
        np.concatenate([p.ids for p in found]),
        np.concatenate([p.flags for p in found]),
        np.concatenate([p.bias for p in found]),
    )
    if not 0 <= pairs.ids.min() <= pairs.ids.max() < vocab:
        raise ValueError(f"token ids must be within 0..{vocab - 1}")
    return pairs


def _row_changes(index: int, row: SampleRow) -> Pairs | None:
    """One row's part; None, at no cost, for a row that keeps its logits."""
    counted = row.presence_penalty != 0.0 or row.frequency_penalty != 0.0
    repeated = row.repetition_penalty != 1.0
    if not (
        row.logit_bias or row.banned or (row.output_ids and (counted or repeated)) or (row.prompt_ids and repeated)
    ):
        return None
    none = np.zeros(0, dtype=np.int64)
    output = np.asarray(row.output_ids, dtype=np.int64) if (counted or repeated) and row.output_ids else none
    prompt = np.asarray(row.prompt_ids, dtype=np.int64) if repeated and row.prompt_ids else none
    biased = np.fromiter(row.logit_bias, dtype=np.int64, count=len(row.logit_bias))
    banned = np.fromiter(row.banned, dtype=np.int64, count=len(row.banned))
    ids = np.unique(np.concatenate((output, prompt, biased, banned)))
    flags, bias = np.zeros(len(ids), dtype=np.int64), np.zeros(len(ids))
    if counted:
        flags += 4 * np.bincount(np.searchsorted(ids, output), minlength=len(ids))
    if repeated:
        flags[np.searchsorted(ids, output)] |= 1
        flags[np.searchsorted(ids, prompt)] |= 1
    flags[np.searchsorted(ids, banned)] |= 2
    bias[np.searchsorted(ids, biased)] = np.fromiter(row.logit_bias.values(), dtype=np.float64, count=len(biased))
    at = np.full(len(ids), index, dtype=np.int32)
    return Pairs(at, ids.astype(np.int32), flags.astype(np.int32), bias)
