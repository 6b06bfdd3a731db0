"""Channels of keys brought to like sizes by powers of two, so that an 8-bit cache holds them all.

Some models' keys have a few channels hundreds of times larger than the rest (their biases are), and an 8-bit code has
one step for a whole head. Queries and keys meet in products alone, and RoPE turns channels in pairs: a pair of key
channels times 2^e and of query channels times 2^-e leaves every score as it is. The factors go into the weights once,
at load; they are exact but for float16 scales of integer weights that become subnormal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qwen_rt.config import ModelConfig
from qwen_rt.model.layers import RMSNorm
from qwen_rt.quant.formats import LinearRows, RawLinear

_SPREAD = 3.0  # standard deviations that a channel's size is its bias plus
_LIMIT = 4  # powers of two up and down


def exponents(size: Tensor, pairs: int) -> Tensor:
    """Channel sizes float [..., D], of which i and i + pairs turn together, i < pairs -> e float [..., D]."""
    low, high = size[..., :pairs], size[..., pairs : 2 * pairs]
    size = size.clone()
    size[..., :pairs] = size[..., pairs : 2 * pairs] = torch.maximum(low, high)
    largest = size.amax(-1, keepdim=True).clamp_min(1e-20)
    e = -torch.maximum(size, largest * 2.0 ** (-2 * _LIMIT)).log2()  # what is smaller takes no part in the middle
    middle = (e.amax(-1, keepdim=True) + e.amin(-1, keepdim=True)) / 2
    return (e - middle).round().clamp(-_LIMIT, _LIMIT)


def level_qkv(raws: Sequence[RawLinear], norm: Tensor, config: ModelConfig) -> list[RawLinear]:
    """The rows of q, k and v, of one linear or several in that order, with levelled keys.

    A channel's size is estimated without data: inputs of the matrix are `norm` [H] times numbers of variance 1.
    """
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_size
    first = 0
    size = torch.zeros(kv_heads * d)  # of keys
    start, stop = heads * d, (heads + kv_heads) * d
    for raw in raws:
        a, b = max(start - first, 0), min(stop - first, raw.shape[0])
        if a < b:
            spread = (raw.dequantize(a, b) * norm.float()).norm(dim=1) * _SPREAD
            at = first + a - start
            size[at : at + b - a] = spread if raw.bias is None else spread + raw.bias[a:b].abs()
        first += raw.shape[0]
    e = exponents(size.view(kv_heads, d), config.rotary_size // 2)
    of_queries = (-e).repeat_interleave(heads // kv_heads, 0)
    factors = torch.exp2(torch.cat((of_queries.flatten(), e.flatten(), torch.zeros(kv_heads * d))))
    return [scaled(raw, part) for raw, part in zip(raws, factors.split([r.shape[0] for r in raws]), strict=True)]


def level_norms(q: RMSNorm, k: RMSNorm, config: ModelConfig) -> None:
    """As level_qkv, where every head of q and k is normalised after the matrix: in the norms' weights, in place."""
    e = exponents(k.weight.float().abs(), config.rotary_size // 2)
    q.weight, k.weight = (norm.weight * torch.exp2(by).to(norm.weight.dtype) for norm, by in ((q, -e), (k, e)))


def scaled(raw: RawLinear, factors: Tensor) -> RawLinear:
    """`raw` with row i times factors[i], powers of two; itself when they are all 1."""
    if bool((factors == 1).all()):
        return raw

    def rows(start: int, stop: int) -> LinearRows:
        part, by = raw.rows(start, stop), factors[start:stop].unsqueeze(1)
        times = {
            name: (t.float() * by).to(t.dtype)
            for name in ("values", "scales", "mins")
            if (t := getattr(part, name)) is not None
        }
        return replace(part, **times)

    return replace(raw, rows=rows, bias=None if raw.bias is None else raw.bias * factors)
