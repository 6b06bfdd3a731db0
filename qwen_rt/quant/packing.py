"""Bit packing of grouped integer weights, and the group sizes a matrix allows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_GROUP = 128
"""Longest group handed to a backend: larger ones (and "one per column") are cut, with repeated scales."""


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] of the host -> uint8 [..., W * 32 // bits], the lowest bits first (bits 4 or 8)."""
    octets = np.array(words.numpy(), order="C").view(np.uint8)  # numpy: see formats.all_finite
    if bits == 8:
        return torch.from_numpy(octets)
    pairs = octets.astype("<u2")
    pairs |= pairs << np.uint16(4)
    pairs &= np.uint16(0x0F0F)
    return torch.from_numpy(pairs.view(np.uint8))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., C] -> int32 [..., C * bits // 32]; undoes unpack_words. C * bits must be a multiple of 32."""
    octets = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    # A copy with row-major strides; .contiguous() keeps odd ones of axes of length 1, which view(dtype) refuses.
    return octets.clone(memory_format=torch.contiguous_format).view(torch.int32)


def fit_group(length: int, wanted: int = MAX_GROUP) -> int | None:
    """The largest multiple of 16 that divides `length` and is at most `wanted`; None when there is none."""
    return next((g for g in range(wanted - wanted % 16, 0, -16) if length % g == 0), None)
