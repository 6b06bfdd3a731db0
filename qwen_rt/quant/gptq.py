"""GPTQ: grouped integers whose rounding errors are made up for by the inputs not yet rounded.

Of a linear y = x W^T the squared error over calibration rows X [T, K] is, row by row of W, dw H dw^T with H = X^T X.
Columns are rounded in order; the error of column j, divided by U[j, j], is spread over the columns after it along
U[j, j:], where U is the upper Cholesky factor of H^-1 (Frantar et al., "GPTQ", 2022, algorithm 1). Differences here:

- H is cut into diagonal blocks of at most BLOCK columns, whose errors are spread within the block: cost K BLOCK^2
  instead of K^3, and no more unknowns than a few thousand rows can tell.
- The scale of a group is chosen when its first column is reached, by the weighted least squares of `fit_scale`.
"""

from __future__ import annotations

import numpy as np

from qwen_rt.quant.formats import Array
from qwen_rt.quant.rtn import F16, F32, U8, fit_scale

BLOCK = 1280
"""Most columns of a diagonal block of H."""
ROWS = 8192
"""Rows of W treated at a time: a group of them stays in a core's cache."""
DAMPED = 2000
"""H gets this many rows' worth of its mean diagonal added to it, at most as much as it has: what few rows say of a few
thousand inputs holds for those rows only, and the errors of other texts are then no better than with rounding to
nearest."""


def quantize_gptq(w: F32, x: F32, bits: int, group: int) -> tuple[U8, F16]:
    """float32 w [N, K] and calibration inputs x [T, K] -> (codes uint8 [N, K], scales float16 [N, K // group]).

    Symmetric: w ~ scale * (code - 2^(bits-1)). `group` divides K. Inputs that are zero in every row change nothing.
    """
    n, k = w.shape
    codes, scales = np.empty((n, k), np.uint8), np.empty((n, k // group), np.float16)
    step = max(group, BLOCK // group * group)
    for start in range(0, k, step):
        stop = min(start + step, k)
        part = x[:, start:stop]
        h = part.T @ part
        factor = _inverse_factor(h, min(1.0, DAMPED / len(x)))
        diagonal = h.diagonal()
        weight = np.maximum(diagonal, 1e-6 * diagonal.mean() + np.float32(1e-30))
        for a in range(0, n, ROWS):
            b = min(a + ROWS, n)
            with np.errstate(over="ignore", invalid="ignore"):  # the scales tell
                q, s = _block(w[a:b, start:stop].T.copy(), factor, weight, bits, group)
            codes[a:b, start:stop], scales[a:b, start // group : stop // group] = q.T, s.T
    return codes, scales


def _inverse_factor(h: F32, damping: float) -> F32:
    """U, upper triangular, with U^T U = (h + damping of its mean diagonal)^-1."""
    damped = h.astype(np.float64)
    mean = damped.diagonal().mean()
    damped.flat[:: len(h) + 1] += damping * mean if mean > 0 else 1.0
    # A Cholesky factor from the other end, h = R R^T with R upper triangular, is the inverse of U.
    return _inverse(np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]).astype(np.float32)


def _inverse(upper: Array) -> Array:
    """The inverse of an upper triangular matrix, by halves: a third of the work of that of any matrix."""
    if len(upper) <= 64:
        return np.linalg.inv(upper)
    half = len(upper) // 2
    out = np.zeros_like(upper)
    out[:half, :half], out[half:, half:] = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    out[:half, half:] = out[:half, :half] @ upper[:half, half:] @ -out[half:, half:]
    return out


def _block(w: F32, factor: F32, weight: F32, bits: int, group: int) -> tuple[U8, F16]:
    """w [k, rows], overwritten -> (codes uint8 [k, rows], scales float16 [k // group, rows])."""
    k, rows = w.shape
    half = np.float32(1 << (bits - 1))
    codes, scales = np.empty((k, rows), np.uint8), np.empty((k // group, rows), np.float16)
    errors, code = np.empty((group, rows), np.float32), np.empty(rows, np.float32)
    for g, start in enumerate(range(0, k, group)):
        stop = start + group
        scales[g] = fit_scale(w[start:stop], weight[start:stop, None], bits, 0)
        scale = scales[g].astype(np.float32)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        for i, j in enumerate(range(start, stop)):
            column, error = w[j], errors[i]
            column -= factor[start:j, j] @ errors[:i]
            np.multiply(column, inverse, out=code)
            np.rint(code, out=code)
            code.clip(-half, half - 1, out=code)
            np.add(code, half, out=codes[j], casting="unsafe")
            np.multiply(code, scale, out=error)
            np.subtract(column, error, out=error)
            error /= factor[j, j]
        w[stop:] -= factor[start:stop, stop:].T @ errors
    return codes, scales
