"""Quantisation of a linear without calibration data, by row chunks: a scale for each group, then to nearest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from qwen_rt.errors import CheckpointError, ConfigError
from qwen_rt.quant.formats import (
    WEIGHT_BITS,
    LinearFormat,
    LinearRows,
    RawLinear,
    WeightBits,
    all_finite,
    dequantize_rows,
)
from qwen_rt.quant.packing import MAX_GROUP, fit_group

F32 = NDArray[np.float32]
F16 = NDArray[np.float16]
U8 = NDArray[np.uint8]


def recipe(quantize: str | None, head: bool, offered: Sequence[int] = WEIGHT_BITS) -> tuple[WeightBits, int] | None:
    """(bits, group size) that quantize= of load() asks of a linear of the layers or of the head; None: as stored.

    "int4": 4 bits in groups of 64 in the layers, 5 bits in groups of 32 for the head; where a device has no such width
    (`offered`), the next wider. "int8": 8 bits in groups of 128. Chosen by perplexity a byte (docs/kernels-cpu.md).
    """
    if quantize is None:
        return None
    bits = LinearFormat(8 if quantize == "int8" else 5 if head else 4).held(offered).bits
    return cast(WeightBits, bits), {4: 64, 5: 32, 6: 64, 8: MAX_GROUP}[bits]


def quantize_rtn(raw: RawLinear, bits: WeightBits, group_size: int = MAX_GROUP, symmetric: bool = True) -> RawLinear:
    """`raw` as grouped integers of 4, 5, 6 or 8 bits, computed when rows are read; bias and act-order are kept.

    The group size is the largest multiple of 16 up to `group_size` that divides K; ConfigError when there is none.
    """
    group = fit_group(raw.shape[1], group_size)
    if group is None or bits not in WEIGHT_BITS:
        raise ConfigError(
            f"{raw.name}: cannot quantise {raw.shape[1]} inputs to {bits} bits with groups of up to {group_size}; "
            "bits are 4, 5, 6 or 8, and a multiple of 16 up to the group size must divide the inputs"
        )
    fmt = LinearFormat(bits, group, has_zeros=not symmetric)

    def rows(start: int, stop: int) -> LinearRows:
        w = dequantize_rows(raw.rows(start, stop), raw.format)
        codes, scales, zeros = (quantize_symmetric if symmetric else quantize_asymmetric)(
            w.reshape(len(w), w.shape[1] // group, group), bits
        )
        if not all_finite(scales):
            raise CheckpointError(f"{raw.name}: weights too large for float16 scales, or not finite")
        return LinearRows(codes=codes.reshape(w.shape), scales=scales, zeros=zeros)

    return RawLinear(raw.name, raw.shape, fmt, rows, raw.bias, raw.perm)


def quantize_symmetric(w: F32, bits: int) -> tuple[U8, F16, None]:
    """float32 [n, G, g] -> (codes uint8 [n, G, g], scales float16 [n, G], None); the zero point is 2^(bits-1).

    8 bits: the value of largest magnitude becomes the lowest code exactly (the range is -2^(bits-1) .. 2^(bits-1)-1),
    so a scale may be negative. Fewer: the scale is searched for (fit_scale), errors weighted by the weights' magnitude:
    unweighted, large weights, which meet the large activations, lose more than the many small ones gain.
    """
    half = np.float32(1 << (bits - 1))
    codes, scales = np.empty(w.shape, np.uint8), np.empty(w.shape[:-1], np.float16)
    with np.errstate(over="ignore", invalid="ignore"):  # the scales tell
        for at in _spans(w):
            part = w[at]
            if bits == 8:
                low, high = part.min(-1), part.max(-1)
                scales[at] = np.where(-low >= high, low, high) / -half
            else:
                scales[at] = fit_scale(part, np.abs(part), bits)
            code = part * _reciprocal(scales[at])
            np.rint(code, out=code)
            code += half
            codes[at] = code.clip(0, 2 * half - 1, out=code)
    return codes, scales, None


def quantize_asymmetric(w: F32, bits: int) -> tuple[U8, F16, U8]:
    """float32 [n, G, g] -> (codes uint8 [n, G, g], scales float16 [n, G], zero points uint8 [n, G])."""
    top = np.float32((1 << bits) - 1)
    codes, scales, zeros = np.empty(w.shape, np.uint8), np.empty(w.shape[:-1], np.float16), np.empty(w.shape[:-1], "u1")
    with np.errstate(over="ignore", invalid="ignore"):  # the scales tell
        for at in _spans(w):
            part = w[at]
            high = part.max(-1).clip(0, None)
            # A zero point of at least 1: AutoGPTQ's own format stores it minus one.
            low = np.minimum(part.min(-1), -high / (top - 1))
            scales[at] = (high - low) / top
            inverse = _reciprocal(scales[at])
            zero = np.rint(-low[..., None] * inverse).clip(1, top)
            code = part * inverse
            np.rint(code, out=code)
            code += zero
            codes[at], zeros[at] = code.clip(0, top, out=code), zero[..., 0]
    return codes, scales, zeros


def fit_scale(w: F32, weight: F32, bits: int, axis: int = -1) -> F16:
    """The scale, float16, that makes the weighted squared error of symmetric codes of the groups along `axis` small.

    Tries to let the value of largest magnitude fall on codes around the lowest, for each takes the scale that is best
    for the codes which result (least squares), and keeps the best of them.
    """
    half = np.float32(1 << (bits - 1))
    product = "...k,...k->..." if axis == -1 else "k...,k...->..."
    with np.errstate(over="ignore", invalid="ignore"):  # the scales tell
        low, high = w.min(axis, keepdims=True), w.max(axis, keepdims=True)
        extreme = np.where(-low >= high, low, high)
        unit = np.divide(-half, extreme, out=np.zeros_like(extreme), where=extreme != 0)
        extreme = extreme.squeeze(axis)
        best = extreme / -half  # not finite where a weight is not, or sums are not: no candidate is better than that
        gain = np.zeros_like(extreme)
        wanted = weight * w
        codes, weighted = np.empty_like(w), np.empty_like(w)
        for share in CANDIDATES:
            np.multiply(w, unit * np.float32(share), out=codes)
            np.rint(codes, out=codes)
            codes.clip(-half, half - 1, out=codes)
            np.multiply(codes, weight, out=weighted)
            against, norm = np.einsum(product, codes, wanted), np.einsum(product, codes, weighted)
            scale = np.divide(against, norm, out=np.zeros_like(norm), where=norm != 0)
            # The error is |w|^2 - against^2 / norm, |.| the weighted norm.
            gained = scale * against
            better = gained > gain
            np.copyto(best, scale, where=better)
            np.copyto(gain, gained, where=better)
        return best.astype(np.float16)


CANDIDATES = (1.12, 1.06, 1.0, 0.94, 0.88)
"""Shares of the lowest code that fit_scale lets the largest magnitude fall on; above 1 it is clipped."""
SPAN = 1 << 17
"""Weights rounded at a time: enough for the calls to pay; what is made of them on the way stays in cache."""


def _spans(w: F32) -> Iterator[slice]:
    """Rows of w [n, G, g], about SPAN weights of them at a time."""
    step = max(1, SPAN // (w.shape[1] * w.shape[2]))
    return (slice(start, start + step) for start in range(0, len(w), step))


def _reciprocal(scales: F16) -> F32:
    """1 / the float16 scales as float32 [..., 1]; 0 where a group is all zero."""
    s = scales.astype(np.float32)[..., None]
    return np.divide(np.float32(1), s, out=np.zeros_like(s), where=s != 0)
