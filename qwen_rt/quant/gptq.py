"""GPTQ: grouped integers whose rounding errors are made up for by the inputs not yet rounded.

Of a linear y = x W^T the squared error over calibration rows X [T, K] is, row by row of W, dw H dw^T with H = X^T X.
Columns are rounded in order; the error of column j, divided by U[j, j], is spread over the columns after it along
U[j, j:], where U is the upper Cholesky factor of H^-1 (Frantar et al., "GPTQ", 2022, algorithm 1). Differences here:

- H is cut into diagonal blocks of at most BLOCK columns, whose errors are spread within the block: cost K BLOCK^2
  instead of K^3, and no more unknowns than a few thousand rows can tell.
- The scale of a group is chosen when its first column is reached, by the weighted least squares of `fit_scale`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_rt.quant.rtn import fit_scale

BLOCK = 1280
"""Most columns of a diagonal block of H."""
ROWS = 8192
"""Rows of W treated at a time: a group of them stays in a core's cache."""
DAMPED = 2000
"""H gets this many rows' worth of its mean diagonal added to it, at most as much as it has: what few rows say of a few
thousand inputs holds for those rows only, and the errors of other texts are then no better than with rounding to
nearest."""


def quantize_gptq(w: Tensor, x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """float32 w [N, K] and calibration inputs x [T, K] -> (codes uint8 [N, K], scales float16 [N, K // group]).

    Symmetric: w ~ scale * (code - 2^(bits-1)). `group` divides K. Inputs that are zero in every row change nothing.
    """
    n, k = w.shape
    codes, scales = torch.empty(n, k, dtype=torch.uint8), torch.empty(n, k // group, dtype=torch.float16)
    step = max(group, BLOCK // group * group)
    for start in range(0, k, step):
        stop = min(start + step, k)
        part = x[:, start:stop]
        h = part.T @ part
        factor = _inverse_factor(h, min(1.0, DAMPED / len(x)))
        weight = h.diagonal().clamp_min(1e-6 * float(h.diagonal().mean()) + 1e-30)
        for a in range(0, n, ROWS):
            b = min(a + ROWS, n)
            q, s = _block(w[a:b, start:stop].T.contiguous(), factor, weight, bits, group)
            codes[a:b, start:stop], scales[a:b, start // group : stop // group] = q.T, s.T
    return codes, scales


def _inverse_factor(h: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with U^T U = (h + damping of its mean diagonal)^-1."""
    mean = float(h.diagonal().mean())
    damped = h + (damping * mean if mean > 0 else 1.0) * torch.eye(len(h))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def _block(w: Tensor, factor: Tensor, weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """w [k, rows], overwritten -> (codes uint8 [k, rows], scales float16 [k // group, rows])."""
    k, rows = w.shape
    half = 1 << (bits - 1)
    codes, scales = torch.empty(k, rows, dtype=torch.uint8), torch.empty(k // group, rows, dtype=torch.float16)
    errors = torch.empty(group, rows)
    for g, start in enumerate(range(0, k, group)):
        stop = start + group
        part = w[start:stop]
        scales[g] = fit_scale(part, weight[start:stop, None], bits, 0)
        scale = scales[g].float()
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        for i, j in enumerate(range(start, stop)):
            code = (part[i] * inverse).round_().clamp_(-half, half - 1)
            codes[j] = code + half
            torch.addcmul(part[i], code, scale, value=-1, out=errors[i]).div_(factor[j, j])
            part[i + 1 :].addr_(factor[j, j + 1 : stop], errors[i], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes, scales
