"""Channels of keys brought to like sizes by powers of two, so that an 8-bit cache holds them all.

Some models' keys have a few channels hundreds of times larger than the rest (their biases are), and an 8-bit code has
one step for a whole head. Queries and keys meet in products alone, and RoPE turns channels in pairs: a pair of key
channels times 2^e and of query channels times 2^-e leaves every score as it is. The factors go into the weights once,
at load; they are exact but for float16 scales of integer weights that become subnormal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from qwen_rt.config import ModelConfig
from qwen_rt.quant.formats import LinearRows, RawLinear

_SPREAD = 3.0  # standard deviations that a channel's size is its bias plus
_LIMIT = 4  # powers of two up and down


Floats = NDArray[np.float32]


def exponents(size: Floats, pairs: int) -> Floats:
    """Channel sizes float [..., D], of which i and i + pairs turn together, i < pairs -> e float [..., D]."""
    low, high = size[..., :pairs], size[..., pairs : 2 * pairs]
    size = size.copy()
    size[..., :pairs] = size[..., pairs : 2 * pairs] = np.maximum(low, high)
    largest = np.maximum(size.max(-1, keepdims=True), np.float32(1e-20))
    least = largest * np.float32(2.0 ** (-2 * _LIMIT))  # what is smaller takes no part in the middle
    e = -np.log2(np.maximum(size, least))
    middle = (e.max(-1, keepdims=True) + e.min(-1, keepdims=True)) / np.float32(2)
    return np.rint(e - middle).clip(-_LIMIT, _LIMIT)


def level_qkv(raws: Sequence[RawLinear], norm: Floats, config: ModelConfig) -> list[RawLinear]:
    """The rows of q, k and v, of one linear or several in that order, with levelled keys.

    A channel's size is estimated without data: inputs of the matrix are `norm` [H] times numbers of variance 1.
    """
    heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_size
    first = 0
    size = np.zeros(kv_heads * d, np.float32)  # of keys
    start, stop = heads * d, (heads + kv_heads) * d
    for raw in raws:
        a, b = max(start - first, 0), min(stop - first, raw.shape[0])
        if a < b:
            spread = np.linalg.norm(raw.dequantize(a, b) * norm, axis=1) * np.float32(_SPREAD)
            at = first + a - start
            size[at : at + b - a] = spread if raw.bias is None else spread + np.abs(raw.bias[a:b])
        first += raw.shape[0]
    e = exponents(size.reshape(kv_heads, d), config.rotary_size // 2)
    of_queries = np.repeat(-e, heads // kv_heads, axis=0)
    factors = np.exp2(np.concatenate((of_queries.ravel(), e.ravel(), np.zeros(kv_heads * d, np.float32))))
    parts = np.split(factors, list(accumulate(raw.shape[0] for raw in raws))[:-1])
    return [scaled(raw, part) for raw, part in zip(raws, parts, strict=True)]


def level_norms(q: Floats, k: Floats, config: ModelConfig) -> tuple[Floats, Floats]:
    """As level_qkv, where every head of q and k is normalised after the matrix: of the weights of these norms [D]."""
    e = exponents(np.abs(k), config.rotary_size // 2)
    return q * np.exp2(-e), k * np.exp2(e)


def scaled(raw: RawLinear, factors: Floats) -> RawLinear:
    """`raw` with row i times factors[i], powers of two; itself when they are all 1."""
    if (factors == 1).all():
        return raw

    def rows(start: int, stop: int) -> LinearRows:
        part, by = raw.rows(start, stop), factors[start:stop, None]
        times = {
            name: (a.astype(np.float32) * by).astype(a.dtype)
            for name in ("values", "scales", "mins")
            if (a := getattr(part, name)) is not None
        }
        return replace(part, **times)

    return replace(raw, rows=rows, bias=None if raw.bias is None else raw.bias * factors)
