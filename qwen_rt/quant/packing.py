"""Bit packing of grouped integer weights, and the group sizes a matrix allows."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_GROUP = 128
"""Longest group handed to a backend: larger ones (and "one per column") are cut, with repeated scales."""


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., W] -> uint8 [..., W * 32 // bits], the lowest bits first (bits 4 or 8)."""
    octets = _packed(words).view(torch.uint8)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., C] -> int32 [..., C * bits // 32]; undoes unpack_words. C * bits must be a multiple of 32."""
    octets = codes if bits == 8 else codes[..., 0::2] | codes[..., 1::2] << 4
    return _packed(octets).view(torch.int32)


def _packed(t: Tensor) -> Tensor:
    """A copy with row-major strides; .contiguous() keeps odd strides of axes of length 1, which view(dtype) refuses."""
    return t.clone(memory_format=torch.contiguous_format)


def fit_group(length: int, wanted: int = MAX_GROUP) -> int | None:
    """The largest multiple of 16 that divides `length` and is at most `wanted`; None when there is none."""
    return next((g for g in range(wanted - wanted % 16, 0, -16) if length % g == 0), None)
