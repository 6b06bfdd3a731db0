"""GPTQ: errors over inputs against rounding to nearest, and the algorithm against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoint_files import same

from qwen_rt.quant import gptq
from qwen_rt.quant.gptq import quantize_gptq
from qwen_rt.quant.rtn import F16, F32, U8, fit_scale, quantize_symmetric


def normal(*shape: int, seed: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def inputs(rows: int, k: int, seed: int = 0) -> F32:
    """Correlated inputs with a few large columns, as activations are."""
    g = np.random.default_rng(seed)
    x = g.standard_normal((rows, k // 4), np.float32) @ g.standard_normal((k // 4, k), np.float32)
    x[:, ::17] *= 8
    return x + g.standard_normal((rows, k), np.float32)


def restored(codes: U8, scales: F16, bits: int) -> F32:
    n, k = codes.shape
    steps = (codes.astype(np.float32) - (1 << bits - 1)).reshape(n, scales.shape[1], -1)
    return (steps * scales.astype(np.float32)[..., None]).reshape(n, k)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_products_are_nearer_than_by_rounding_to_nearest(bits: int, group: int) -> None:
    w = normal(24, 192, seed=1)
    x, other = np.split(inputs(800, 192), 2)
    codes, scales = quantize_gptq(w, x, bits, group)
    assert codes.dtype == np.uint8 and scales.dtype == np.float16 and scales.shape == (24, 192 // group)
    assert int(codes.max()) < 1 << bits
    plain, s, _ = quantize_symmetric(w.reshape(24, -1, group), bits)
    for held_out in (x, other):
        mine = np.linalg.norm(held_out @ (restored(codes, scales, bits) - w).T)
        theirs = np.linalg.norm(held_out @ (restored(plain.reshape(w.shape), s, bits) - w).T)
        assert mine < 0.7 * theirs


@pytest.mark.parametrize(("damped", "share"), [(2000, 1.0), (30, 0.15)])
def test_against_the_definition(monkeypatch: pytest.MonkeyPatch, damped: int, share: float) -> None:
    """Column by column in float64: after each rounding, the least squares of all columns that are left."""
    w = normal(6, 32, seed=2)
    x = inputs(200, 32)
    monkeypatch.setattr(gptq, "DAMPED", damped)
    codes, scales = quantize_gptq(w, x, 4, 16)
    h = (x.T @ x).astype(np.float64)
    h += share * h.diagonal().mean() * np.eye(32)
    left = w.astype(np.float64)
    for j in range(32):
        scale = scales[:, j // 16].astype(np.float64)
        if j % 16 == 0:  # the group's scale is chosen from the weights as they are now
            again = fit_scale(left[:, j : j + 16].astype(np.float32), (x.T @ x).diagonal()[j : j + 16], 4)
            assert np.allclose(again.astype(np.float64), scale, rtol=2e-3)
        code = np.rint(left[:, j] / scale).clip(-8, 7)
        assert np.abs(code + 8 - codes[:, j]).max() <= 0
        error = left[:, j] - code * scale
        inverse = np.linalg.inv(h[j:, j:])
        left[:, j:] -= (error / inverse[0, 0])[:, None] * inverse[0]
    assert np.isfinite(left).all()


def test_blocks_and_row_chunks_change_nothing_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(20, 96, seed=3)
    x = inputs(150, 96)
    whole = quantize_gptq(w, x, 4, 16)
    monkeypatch.setattr(gptq, "ROWS", 7)
    for a, b in zip(whole, quantize_gptq(w, x, 4, 16), strict=True):
        assert same(a, b)
    monkeypatch.setattr(gptq, "BLOCK", 50)  # 48 columns: two independent blocks
    halves = [quantize_gptq(w[:, i : i + 48].copy(), x[:, i : i + 48].copy(), 4, 16) for i in (0, 48)]
    codes, scales = quantize_gptq(w, x, 4, 16)
    assert same(codes, np.concatenate([h[0] for h in halves], 1))
    assert same(scales, np.concatenate([h[1] for h in halves], 1))


def test_dead_inputs_and_zero_weights() -> None:
    w, x = normal(4, 64, seed=4), normal(100, 64, seed=5)
    x[:, 5:9] = 0
    w[1] = 0
    codes, scales = quantize_gptq(w, x, 4, 32)
    assert same(restored(codes, scales, 4)[1], np.zeros(64, np.float32))
    assert np.abs(restored(codes, scales, 4) - w).max() < 2
    x[:] = 0  # nothing was seen: no error is worth spreading
    codes, scales = quantize_gptq(w, x, 4, 32)
    assert np.isfinite(scales).all() and np.abs(restored(codes, scales, 4) - w).max() < 1
