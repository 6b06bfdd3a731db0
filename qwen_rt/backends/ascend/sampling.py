"""Sampling on an NPU with plain operators: one upload of what the rows ask for, one download of the ids.

Greedy rows are a maximum and the lowest id that has it. Others are sorted (stably: ties by lower id) and their
distribution inverted as reference.sample_row does it, over the longest top-k when every row has one, else over the
whole vocabulary. All in float32: torch_npu casts float64 to it, with a warning. A uniform number within some 1e-6 of a
boundary of the distribution may therefore take the neighbouring token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qwen_rt.backends.adjust import changes
from qwen_rt.backends.base import SampleRow
from qwen_rt.errors import BackendError

COLDEST = 1e-30  # a lower temperature is as good as this one, and the quotient stays a number


def run(logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """As Backend.sample: float32 logits [R, V], overwritten where they are adjusted -> R ids."""
    if logits.dtype != torch.float32 or logits.dim() != 2 or logits.shape[0] != len(rows) or logits.shape[1] == 0:
        raise ValueError(f"sample: logits are {logits.dtype} {tuple(logits.shape)} for {len(rows)} rows")
    if not rows:
        return []
    logits = logits.contiguous()
    _adjust(logits, rows)
    top = logits.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    chosen = torch.where(logits == top, ids, logits.shape[1]).amin(-1)
    drawn = [i for i, row in enumerate(rows) if row.temperature > 0]
    if drawn:
        at = _upload(np.array(drawn, np.int64), logits)
        some = logits if len(drawn) == len(rows) else logits.index_select(0, at)
        chosen.index_put_((at,), _draw(some, [rows[i] for i in drawn]).to(torch.int32))
    # NaN and infinity fail one of these comparisons; a row of -inf the second.
    usable = torch.logical_and((logits < torch.inf).all(-1), top.squeeze(-1) > -torch.inf)
    found = torch.where(usable, chosen, -1).tolist()
    if min(found) < 0:
        raise BackendError("the logits hold NaN or infinity, or every token is banned: the model's output is unusable")
    return found


def _adjust(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """logit_bias, then penalties, then bans."""
    vocab = logits.shape[1]
    pairs = changes(rows, vocab)
    if not len(pairs.ids):
        return
    of = [rows[i] for i in pairs.rows]
    seen, banned, count = pairs.flags & 1 == 1, pairs.flags & 2 == 2, pairs.flags >> 2
    repetition = np.where(seen, [row.repetition_penalty for row in of], 1.0)
    less = np.where(
        count > 0, [row.presence_penalty for row in of] + count * [row.frequency_penalty for row in of], 0.0
    )
    table = _upload(np.stack((pairs.bias, repetition, np.where(banned, np.inf, less))).astype(np.float32), logits)
    index = _upload(pairs.rows.astype(np.int64) * vocab + pairs.ids, logits)
    flat = logits.view(-1)
    x = flat.index_select(0, index) + table[0]
    x = torch.where(x > 0, x / table[1], x * table[1]) - table[2]
    flat.index_put_((index,), x)


def _draw(logits: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """int64 ids [R] by inversion of each row's distribution at its uniform number."""
    vocab = logits.shape[1]
    limits = [row.top_k if 0 < row.top_k < vocab else vocab for row in rows]
    values, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    longest = max(limits)
    values, order = values[:, :longest], order[:, :longest]
    asked = [
        [max(row.temperature, COLDEST), row.top_p if row.top_p < 1 else 2.0, row.min_p, row.uniform] for row in rows
    ]
    temperature, top_p, min_p, uniform = _upload(np.array(asked, np.float32), logits).split(1, 1)
    place = torch.arange(longest, dtype=torch.int32, device=logits.device)
    limit = _upload(np.array(limits, np.int32)[:, None], logits)
    p = ((values - values[:, :1]) / temperature).masked_fill(place >= limit, -torch.inf).softmax(-1)
    reached = (p.cumsum(-1) < top_p).sum(-1, keepdim=True)  # a top_p of 2 keeps everything
    p = torch.where(torch.logical_and(place <= reached, p >= min_p * p[:, :1]), p, 0.0)
    cumulative = (p / p.sum(-1, keepdim=True)).cumsum(-1).clamp(max=1.0)
    choice = (cumulative <= uniform).sum(-1, keepdim=True)
    last = (p > 0).sum(-1, keepdim=True) - 1  # uniform within rounding of 1
    row = torch.arange(len(rows), device=logits.device)
    return order[row, torch.minimum(choice, last).squeeze(1)]


def _upload(array: np.ndarray, like: Tensor) -> Tensor:
    host = torch.from_numpy(np.ascontiguousarray(array))
    if like.device.type == "npu":
        host = host.pin_memory()
    return host.to(like.device, non_blocking=True)
