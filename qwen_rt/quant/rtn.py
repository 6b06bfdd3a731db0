"""Quantisation of a linear without calibration data, by row chunks: a scale for each group, then to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from qwen_rt.errors import CheckpointError, ConfigError
from qwen_rt.quant.formats import WEIGHT_BITS, LinearFormat, LinearRows, RawLinear, WeightBits, dequantize_rows
from qwen_rt.quant.packing import MAX_GROUP, fit_group


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
            w.view(stop - start, -1, group), bits
        )
        if not scales.isfinite().all():
            raise CheckpointError(f"{raw.name}: weights too large for float16 scales, or not finite")
        return LinearRows(codes=codes.flatten(1), scales=scales, zeros=zeros)

    return RawLinear(raw.name, raw.shape, fmt, rows, raw.bias, raw.perm)


def quantize_symmetric(w: Tensor, bits: int) -> tuple[Tensor, Tensor, None]:
    """float32 [n, G, g] -> (codes uint8 [n, G, g], scales float16 [n, G], None); the zero point is 2^(bits-1).

    8 bits: the value of largest magnitude becomes the lowest code exactly (the range is -2^(bits-1) .. 2^(bits-1)-1),
    so a scale may be negative. Fewer: the scale is searched for (fit_scale), errors weighted by the weights' magnitude:
    unweighted, large weights, which meet the large activations, lose more than the many small ones gain.
    """
    half = 1 << (bits - 1)
    if bits == 8:
        low, high = w.amin(-1), w.amax(-1)
        scales = (torch.where(-low >= high, low, high) / -half).half()
    else:
        scales = fit_scale(w, w.abs(), bits)
    codes = (w * _reciprocal(scales)).round_().add_(half).clamp_(0, 2 * half - 1)
    return codes.to(torch.uint8), scales, None


def quantize_asymmetric(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [n, G, g] -> (codes uint8 [n, G, g], scales float16 [n, G], zero points uint8 [n, G])."""
    top = (1 << bits) - 1
    high = w.amax(-1).clamp_(min=0)
    # A zero point of at least 1: AutoGPTQ's own format stores it minus one.
    low = torch.minimum(w.amin(-1), -high / (top - 1))
    scales = ((high - low) / top).half()
    inverse = _reciprocal(scales)
    zeros = (-low.unsqueeze(-1) * inverse).round_().clamp_(1, top)
    codes = (w * inverse).round_().add_(zeros).clamp_(0, top)
    return codes.to(torch.uint8), scales, zeros.squeeze(-1).to(torch.uint8)


def fit_scale(w: Tensor, weight: Tensor | float, bits: int, dim: int = -1) -> Tensor:
    """The scale, float16, that makes the weighted squared error of symmetric codes of the groups along `dim` small.

    Tries to let the value of largest magnitude fall on codes around the lowest, for each takes the scale that is best
    for the codes which result (least squares), and keeps the best of them.
    """
    half = 1 << (bits - 1)
    low, high = w.amin(dim, keepdim=True), w.amax(dim, keepdim=True)
    extreme = torch.where(-low >= high, low, high)
    unit = torch.where(extreme == 0, 0.0, -half / extreme)
    best = extreme * 0  # NaN where a weight is not finite: no candidate is better than that
    gain = torch.zeros_like(extreme)
    for share in CANDIDATES:
        codes = (w * (unit * share)).round_().clamp_(-half, half - 1)
        weighted = codes * weight
        against, norm = (weighted * w).sum(dim, keepdim=True), (weighted * codes).sum(dim, keepdim=True)
        scale = torch.where(norm == 0, 0.0, against / norm)
        # The error is |w|^2 - against^2 / norm, |.| the weighted norm.
        better = scale * against > gain
        best, gain = torch.where(better, scale, best), torch.where(better, scale * against, gain)
    return best.squeeze(dim).half()


CANDIDATES = (1.12, 1.06, 1.0, 0.94, 0.88)
"""Shares of the lowest code that fit_scale lets the largest magnitude fall on; above 1 it is clipped."""


def _reciprocal(scales: Tensor) -> Tensor:
    """1 / the float16 scales as float32 [..., 1]; 0 where a group is all zero."""
    s = scales.float().unsqueeze(-1)
    return torch.where(s == 0, 0.0, 1 / s)
