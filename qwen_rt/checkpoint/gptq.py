"""AutoGPTQ linears: qweight int32 [K*bits/32, N], qzeros int32 [G, N*bits/32], scales [G, N], g_idx int32 [K].

Words hold consecutive k (qweight) or n (qzeros), lowest bits first. The zero point is the stored one plus
`zero_offset`, added after unpacking: 1 in AutoGPTQ's own format ("v1"), 0 in "gptq_v2".
"""

from __future__ import annotations

import numpy as np

from qwen_rt.checkpoint.grouped import PackedParts, check_parts, grouped_linear
from qwen_rt.checkpoint.store import TensorStore
from qwen_rt.config import QuantConfig
from qwen_rt.quant.formats import Array, RawLinear
from qwen_rt.quant.packing import unpack_words


def check(store: TensorStore, name: str, quant: QuantConfig) -> tuple[int, int]:
    """Shape [N, K] of the linear `name`, its tensors checked against `quant`. Raises CheckpointError."""
    stored = (*store[f"{name}.qweight"].shape, 0, 0)[:2]
    shape = stored[1], stored[0] * 32 // quant.bits
    check_parts(store, name, stored, shape, quant)
    return shape


def linear(
    store: TensorStore, parts: PackedParts, name: str, shape: tuple[int, int], quant: QuantConfig, bias: Array | None
) -> RawLinear:
    """The linear `name`."""
    per_word = 32 // quant.bits

    def codes(qweight: Array, start: int, stop: int) -> Array:
        return unpack_words(qweight[:, start:stop].T, quant.bits)

    def zeros(qzeros: Array, start: int, stop: int) -> Array:
        first = start // per_word
        stored = unpack_words(qzeros[:, first : -(-stop // per_word)], quant.bits)
        part = stored[:, start - first * per_word : stop - first * per_word]
        return part.T.astype(np.int16) + np.int16(quant.zero_offset)

    return grouped_linear(name, shape, quant, parts, store, codes, zeros, bias, words=True)
