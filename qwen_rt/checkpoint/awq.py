"""AWQ linears, GEMM layout: qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]; 4 bits.

Each word holds eight consecutive n in the order ORDER, lowest bits first; zero points are stored as they are.
"""

from __future__ import annotations

import numpy as np

from qwen_rt.checkpoint.grouped import PackedParts, check_parts, grouped_linear
from qwen_rt.checkpoint.store import TensorStore
from qwen_rt.config import QuantConfig
from qwen_rt.quant.formats import Array, RawLinear
from qwen_rt.quant.packing import unpack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of a word is column ORDER[i] of its eight."""


def check(store: TensorStore, name: str, quant: QuantConfig) -> tuple[int, int]:
    """Shape [N, K] of the linear `name`, its tensors checked against `quant`. Raises CheckpointError."""
    stored = (*store[f"{name}.qweight"].shape, 0, 0)[:2]
    shape = stored[1] * 8, stored[0]
    check_parts(store, name, stored, shape, quant)
    return shape


def linear(
    store: TensorStore, parts: PackedParts, name: str, shape: tuple[int, int], quant: QuantConfig, bias: Array | None
) -> RawLinear:
    """The linear `name`."""
    place = np.argsort(ORDER)

    def unpack(words: Array, start: int, stop: int) -> Array:
        first = start // 8
        nibbles = unpack_words(words[:, first : -(-stop // 8)], 4).reshape(len(words), -1, 8)
        columns = nibbles.take(place, 2).reshape(len(words), -1)[:, start - first * 8 : stop - first * 8]
        return np.ascontiguousarray(columns.T)

    return grouped_linear(name, shape, quant, parts, store, unpack, unpack, bias)
