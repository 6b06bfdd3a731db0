"""Attention: which of three ways serves a step, and the calls of npu_fused_infer_attention_score.

    decode      BSH, one query row a sequence, pages and host lengths; int8 pages through antiquant mode 5
    rows        TND: rows of all sequences in one call, pages and host lengths, right-bottom causal mask (sparse mode 3)
                or band (sparse mode 4: position p sees p - pre_tokens .. p) for windows
    gathered    keys copied out of their pages (and dequantised), then TND without pages: prefill over an int8 cache,
                which antiquantisation does not serve with pages
    plain       gathered keys, matmul and softmax in float32: SoCs and head sizes the fused operator does not serve

What the operator's page asks for (aclnnFusedInferAttentionScoreV3, Atlas A2): heads up to 256, at most 64 query heads a
key head, head sizes in multiples of 16 (int8 pages: 32) up to 512, TND up to 256; pages [blocks, block, Hkv * D] with
Hkv * D <= 65535, a block of at most 128 with TND; sparse modes 2 to 4 with one 2048 x 2048 mask; with one query row
in BSH neither sparse mode nor pre_tokens has an effect, so windows go through TND.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qwen_rt.backends.ascend.cache import AscendKV, gather
from qwen_rt.backends.ascend.plan import AscendPlan, Part

QUERY_CHUNK = 256  # query rows whose scores exist at a time (plain)


def served(heads: int, kv_heads: int, size: int, int8: bool) -> bool:
    """Whether the fused operator takes these heads."""
    return (
        size % (32 if int8 else 16) == 0
        and size <= 256
        and heads <= 256
        and heads // kv_heads <= 64
        and kv_heads * size <= 65535
    )


def run(
    npu: Any, q: Tensor, kv: AscendKV, layer: int, plan: AscendPlan, scale: float, window: int | None, mask: Tensor
) -> Tensor:
    """As Backend.attention. npu None: plain operators only; mask: bool [2048, 2048], True above the diagonal."""
    int8 = bool(kv.affine)
    widest = 128 if int8 and q.dtype == torch.bfloat16 else 256  # gathered() may double it
    if npu is None or q.shape[2] > widest or not served(q.shape[1], kv.spec.num_kv_heads, q.shape[2], int8):
        return plain(q, kv, layer, plan.part(), scale, window)
    if not int8:
        if plan.decode and window is None:
            return decode(npu, q, kv, layer, plan.kv_lens, plan.block_table, scale)
        return rows(npu, q, kv, layer, plan, scale, window, mask)
    single = [b for b, n in enumerate(plan.q_lens) if n == 1]
    if window is not None or not single:
        return gathered(npu, q, kv, layer, plan.part(), scale, window, mask)
    if plan.decode:
        return decode(npu, q, kv, layer, plan.kv_lens, plan.block_table, scale)
    several = [b for b, n in enumerate(plan.q_lens) if n > 1]
    first, rest = plan.part(single), plan.part(several)
    assert first.rows is not None and rest.rows is not None
    table = _table(plan, single)
    found = (
        decode(npu, q.index_select(0, first.rows), kv, layer, first.kv_lens, table, scale),
        gathered(npu, q.index_select(0, rest.rows), kv, layer, rest, scale, None, mask),
    )
    out = q.new_empty(q.shape)
    for part, x in zip((first, rest), found, strict=True):
        assert part.rows is not None
        out.index_put_((part.rows.long(),), x)
    return out


def _table(plan: AscendPlan, seqs: list[int]) -> Tensor:
    """Rows of the block table, kept for the step."""
    key = ("table", tuple(seqs))
    if key not in plan.cache:
        index = torch.tensor(seqs, dtype=torch.int32).to(plan.buffer.device)
        plan.cache[key] = plan.block_table.index_select(0, index)
    return plan.cache[key]


def _pages(kv: AscendKV, layer: int) -> tuple[Tensor, Tensor]:
    return kv.k[layer].flatten(2), kv.v[layer].flatten(2)


def _heads(q: Tensor, kv: AscendKV, scale: float) -> dict[str, Any]:
    return {"num_heads": q.shape[1], "num_key_value_heads": kv.spec.num_kv_heads, "scale": scale}


def decode(npu: Any, q: Tensor, kv: AscendKV, layer: int, kv_lens: list[int], table: Tensor, scale: float) -> Tensor:
    """One row a sequence: q [B, Hq, D] -> [B, Hq, D]."""
    k, v = _pages(kv, layer)
    extra: dict[str, Any] = {}
    if kv.affine:
        k_scale, k_offset, v_scale, v_offset = kv.affine[layer].unbind(0)
        extra = {
            "key_antiquant_scale": k_scale,
            "key_antiquant_offset": k_offset,
            "value_antiquant_scale": v_scale,
            "value_antiquant_offset": v_offset,
            "key_antiquant_mode": 5,
            "value_antiquant_mode": 5,
        }
    out = npu.npu_fused_infer_attention_score(
        q.contiguous().view(q.shape[0], 1, -1), k, v, actual_seq_lengths_kv=kv_lens, block_table=table,
        block_size=kv.spec.block_size, input_layout="BSH", **_heads(q, kv, scale), **extra,
    )[0]  # fmt: skip
    return out.view(q.shape)


def _sparse(window: int | None) -> dict[str, Any]:
    return {"sparse_mode": 3} if window is None else {"sparse_mode": 4, "pre_tokens": window - 1, "next_tokens": 0}


def rows(
    npu: Any, q: Tensor, kv: AscendKV, layer: int, plan: AscendPlan, scale: float, window: int | None, mask: Tensor
) -> Tensor:
    """Any rows over a 16-bit cache: q [T, Hq, D] -> [T, Hq, D]."""
    k, v = _pages(kv, layer)
    return npu.npu_fused_infer_attention_score(
        q.contiguous(), k, v, actual_seq_lengths=plan.q_ends, actual_seq_lengths_kv=plan.kv_lens, atten_mask=mask,
        block_table=plan.block_table, block_size=plan.block, input_layout="TND", **_heads(q, kv, scale),
        **_sparse(window),
    )[0]  # fmt: skip


def gathered(
    npu: Any, q: Tensor, kv: AscendKV, layer: int, part: Part, scale: float, window: int | None, mask: Tensor
) -> Tensor:
    """Any rows over keys copied out of their pages.

    A dequantised value has more digits than bfloat16: it is given as the sum of two, side by side in a head of twice
    the size, and so are the results.
    """
    two = bool(kv.affine) and q.dtype == torch.bfloat16
    k, v = gather(kv, layer, part, torch.float32 if two else q.dtype)
    if two:
        q, k, v = torch.cat((q, q), -1), _two_parts(k), _two_parts(v)
    out = npu.npu_fused_infer_attention_score(
        q.contiguous(), k, v, actual_seq_lengths=list(accumulate(part.q_lens)),
        actual_seq_lengths_kv=list(accumulate(part.kv_lens)), atten_mask=mask, input_layout="TND",
        **_heads(q, kv, scale), **_sparse(window),
    )[0]  # fmt: skip
    if not two:
        return out
    high, low = out.chunk(2, -1)
    return high + low


def _two_parts(x: Tensor) -> Tensor:
    """float32 [..., D] -> bfloat16 [..., 2 D]: x rounded, then what that lost."""
    high = x.to(torch.bfloat16)
    return torch.cat((high, (x - high.float()).to(torch.bfloat16)), -1)


def plain(q: Tensor, kv: AscendKV, layer: int, part: Part, scale: float, window: int | None) -> Tensor:
    """Scores, softmax and sums as operators of their own, in float32."""
    keys, values = gather(kv, layer, part, torch.float32)
    hkv, out, row, at = kv.spec.num_kv_heads, [], 0, 0
    for q_len, kv_len in zip(part.q_lens, part.kv_lens, strict=True):
        k = keys[at : at + kv_len].permute(1, 2, 0).contiguous()  # [Hkv, D, keys]
        v = values[at : at + kv_len].transpose(0, 1).contiguous()
        key_pos = torch.arange(kv_len, dtype=torch.int32, device=q.device)
        for start in range(0, q_len, QUERY_CHUNK):
            n = min(QUERY_CHUNK, q_len - start)
            x = q[row + start : row + start + n].float().unflatten(1, (hkv, -1)).permute(1, 2, 0, 3)  # [Hkv, g, n, D]
            group = x.shape[1]
            scores = (x.reshape(hkv, group * n, -1) @ k * scale).view(hkv, group, n, kv_len)
            first = kv_len - q_len + start
            pos = torch.arange(first, first + n, dtype=torch.int32, device=q.device).unsqueeze(1)
            hidden = key_pos > pos
            if window is not None:
                hidden = torch.logical_or(hidden, key_pos <= pos - window)
            p = scores.masked_fill(hidden, -torch.inf).softmax(-1).view(hkv, group * n, kv_len)
            out.append((p @ v).view(hkv * group, n, -1).transpose(0, 1).to(q.dtype))
        row, at = row + q_len, at + kv_len
    return out[0].contiguous() if len(out) == 1 else torch.cat(out)
