"""The paged cache, and writing to it.

Pages are [blocks, 128, Hkv, D], the "Norm" layout of npu_scatter_pa_kv_cache, which npu_fused_infer_attention_score
reads as [blocks, 128, Hkv * D]. int8 pages have float32 scales and offsets beside, [blocks, Hkv, 128] each, as its
antiquant mode 5 (per token and head, paged) takes them:

    x ~ (code + offset) * scale      code = round((x - min) / scale) - 128, scale = (max - min) / 255,
                                     offset = min / scale + 128; a constant vector: code 0, offset min, scale 1

Source: aclnnScatterPaKvCache and aclnnFusedInferAttentionScoreV3 in CANN's operator library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qwen_rt.backends.ascend.plan import AscendPlan, Part
from qwen_rt.backends.base import KVSpec

BLOCK = 128  # tokens a page: the only size that every layout of attention takes
FLOAT_KV = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class AscendKV:
    """Pages per layer; the page after the last belongs to no sequence: padding rows of a recorded step write there."""

    spec: KVSpec
    num_blocks: int
    k: list[Tensor]  # [num_blocks + 1, BLOCK, Hkv, D]
    v: list[Tensor]
    affine: list[Tensor] = field(
        default_factory=list
    )  # float32 [4, num_blocks + 1, Hkv, BLOCK]: k scale, k offset, v ...


def allocate(spec: KVSpec, num_blocks: int, device: torch.device) -> AscendKV:
    """Zeroed pages."""
    shape = (num_blocks + 1, BLOCK, spec.num_kv_heads, spec.head_size)
    dtype = torch.int8 if spec.dtype == "int8" else FLOAT_KV[spec.dtype]
    k, v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)] for _ in "kv")
    kv = AscendKV(spec, num_blocks, k, v)
    if spec.dtype == "int8":
        beside = (4, num_blocks + 1, spec.num_kv_heads, BLOCK)
        kv.affine = [torch.zeros(beside, device=device) for _ in range(spec.num_layers)]
    return kv


def store(npu: Any, kv: AscendKV, layer: int, k: Tensor, v: Tensor, plan: AscendPlan) -> None:
    """k, v [T, Hkv, D] to the step's slots."""
    if kv.affine:
        heads = kv.spec.num_kv_heads
        codes, affine = quantize(torch.cat((k, v), 1))  # [T, 2 Hkv, D], [2, T, 2 Hkv]
        k, v = codes[:, :heads], codes[:, heads:]
        rows = torch.cat((affine[..., :heads], affine[..., heads:]))  # [4, T, Hkv] in the order of AscendKV.affine
        kv.affine[layer].view(-1).index_put_((_affine_index(kv, plan),), rows.reshape(-1))
    if npu is None:
        for pages, x in ((kv.k[layer], k), (kv.v[layer], v)):
            pages.view(-1, *pages.shape[2:]).index_put_((plan.slots.long(),), x.contiguous())
    else:
        npu.npu_scatter_pa_kv_cache(
            k.contiguous(), v.contiguous(), kv.k[layer], kv.v[layer], plan.slots, cache_mode="Norm"
        )


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> int8 codes [..., D], and (scale, offset) float32 [2, ...]."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / 255
    flat = step == 0
    scale = torch.where(flat, torch.ones_like(step), step)
    codes = ((x - low) / scale).round_().clamp_(0, 255) - 128
    codes = torch.where(flat, torch.zeros_like(codes), codes).to(torch.int8)
    offset = torch.where(flat, low, low / scale + 128)
    return codes, torch.stack((scale.squeeze(-1), offset.squeeze(-1)))


def gather(kv: AscendKV, layer: int, part: Part, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [sum of kv_lens, Hkv, D] of `part` in the compute dtype, sequence after sequence."""
    tokens = part.tokens()
    heads = kv.spec.num_kv_heads
    found = [pages.view(-1, *pages.shape[2:]).index_select(0, tokens) for pages in (kv.k[layer], kv.v[layer])]
    if not kv.affine:
        return found[0].to(dtype), found[1].to(dtype)
    page = torch.div(tokens, BLOCK, rounding_mode="floor")
    index = _positions(page, tokens - page * BLOCK, heads)
    flat = kv.affine[layer].view(4, -1).index_select(1, index.view(-1)).view(4, -1, heads, 1)
    k, v = ((x.float() + flat[2 * i + 1]) * flat[2 * i] for i, x in enumerate(found))
    return k.to(dtype), v.to(dtype)


def _positions(page: Tensor, offset: Tensor, heads: int) -> Tensor:
    """int32 [T, heads]: where (block, head, offset) lies in an array [blocks, heads, BLOCK]."""
    head = torch.arange(heads, dtype=torch.int32, device=page.device) * BLOCK
    return (page * (heads * BLOCK) + offset).unsqueeze(1) + head


def _affine_index(kv: AscendKV, plan: AscendPlan) -> Tensor:
    """int64 [4 * T * Hkv]: the step's places in AscendKV.affine, flat; one for all layers."""
    size = kv.affine[0][0].numel()
    key = ("affine", size)
    if key not in plan.cache:
        one = _positions(plan.pages, plan.offsets, kv.spec.num_kv_heads).view(1, -1)
        arrays = torch.arange(4, dtype=torch.int32, device=one.device).view(4, 1) * size
        plan.cache[key] = (arrays + one).view(-1).long()
    return plan.cache[key]
