"""Bit packing of grouped integer weights, and the group sizes a matrix allows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qwen_rt.quant.formats import Array

MAX_GROUP = 128
"""Longest group handed to a backend: larger ones (and "one per column") are cut, with repeated scales."""


def unpack_words(words: Array, bits: int) -> NDArray[np.uint8]:
    """int32 [..., W] -> uint8 [..., W * 32 // bits], the lowest bits first (bits 4 or 8)."""
    octets = np.array(words, order="C").view(np.uint8)
    if bits == 8:
        return octets
    pairs = octets.astype("<u2")
    pairs |= pairs << np.uint16(4)
    pairs &= np.uint16(0x0F0F)
    return pairs.view(np.uint8)


def pack_words(codes: Array, bits: int) -> NDArray[np.int32]:
    """uint8 [..., C] -> int32 [..., C * bits // 32]; undoes unpack_words. C * bits must be a multiple of 32."""
    octets = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    return np.array(octets, order="C").view(np.int32)


def fit_group(length: int, wanted: int = MAX_GROUP) -> int | None:
    """The largest multiple of 16 that divides `length` and is at most `wanted`; None when there is none."""
    return next((g for g in range(wanted - wanted % 16, 0, -16) if length % g == 0), None)
