"""Norms, rotation and SwiGLU: the fused operators where the SoC has them, plain ones where not. All in float32 inside.

npu_rms_norm(x, gamma, eps): x / rms(x) * gamma over gamma's axes; float32 x takes float32 gamma, 16-bit x either.
npu_add_rms_norm(x1, x2, gamma, eps): (norm of the sum, 1 / rms, the sum); one dtype for all.
npu_rotary_mul(x, r1, r2), mode "half": x * r1 + (-second half, first half) * r2; x [B, S, N, D] with D even and below
896, N and B below 1000, r1 and r2 [1, S, 1, D] of x's dtype.
npu_swiglu(x, dim): silu of the first half times the second.
Source: op-plugin docs/context, pages of the same names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_ROTATED, MAX_HEADS = 894, 999  # of npu_rotary_mul


def rms_norm(
    npu: Any, x: Tensor, weight: Tensor, wide_weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As Backend.rms_norm. weight in the compute dtype, wide_weight the same in float32; npu None: plain operators."""
    if npu is None:
        summed = x if residual is None else residual + x.to(residual.dtype)
        wide = summed.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * wide_weight).to(weight.dtype), summed
    if residual is None:
        gamma = wide_weight if x.dtype == torch.float32 else weight
        return npu.npu_rms_norm(x, gamma, eps)[0].to(weight.dtype), x
    normed, _, summed = npu.npu_add_rms_norm(residual, x.to(residual.dtype), wide_weight, eps)
    return normed.to(weight.dtype), summed


def widen(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [T, r] as rotation takes them: [1, T, 1, 2r], for both halves."""
    return tuple(torch.cat((t, t), -1)[None, :, None] for t in (cos, sin))  # type: ignore[return-value]


def rope(npu: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [T, Hq, D] and k [T, Hkv, D] together by widen()'s cos and sin; float32 between."""
    heads, rotated = q.shape[1], cos.shape[-1]
    wide = torch.cat((q[..., :rotated], k[..., :rotated]), 1).float().unsqueeze(0)
    if npu is None or rotated > MAX_ROTATED or wide.shape[2] > MAX_HEADS:
        first, second = wide.chunk(2, -1)
        turned = wide * cos + torch.cat((-second, first), -1) * sin
    else:
        turned = npu.npu_rotary_mul(wide, cos, sin)

    def narrow(x: Tensor, part: Tensor) -> Tensor:
        part = part.to(x.dtype, memory_format=torch.contiguous_format)
        return part if rotated == x.shape[2] else torch.cat((part, x[..., rotated:]), -1)

    return narrow(q, turned[0, :, :heads]), narrow(k, turned[0, :, heads:])


def silu_mul(npu: Any, gate_up: Tensor) -> Tensor:
    """[T, 2F], gate first -> [T, F]."""
    if npu is not None:
        return npu.npu_swiglu(gate_up, dim=-1)
    gate, up = gate_up.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
