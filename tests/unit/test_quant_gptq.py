"""GPTQ: errors over inputs against rounding to nearest, and the algorithm against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen_rt.quant import gptq
from qwen_rt.quant.gptq import quantize_gptq
from qwen_rt.quant.rtn import fit_scale, quantize_symmetric

torch.set_num_threads(1)


def inputs(rows: int, k: int, seed: int = 0) -> Tensor:
    """Correlated inputs with a few large columns, as activations are."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k // 4, generator=g) @ torch.randn(k // 4, k, generator=g)
    x[:, ::17] *= 8
    return x + torch.randn(rows, k, generator=g)


def restored(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    return ((codes.float() - (1 << bits - 1)).view(n, scales.shape[1], -1) * scales.float()[..., None]).view(n, k)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, 64])
def test_products_are_nearer_than_by_rounding_to_nearest(bits: int, group: int) -> None:
    w = torch.randn(24, 192, generator=torch.Generator().manual_seed(1))
    x, other = inputs(800, 192).split(400)
    codes, scales = quantize_gptq(w, x, bits, group)
    assert codes.dtype == torch.uint8 and scales.dtype == torch.float16 and scales.shape == (24, 192 // group)
    assert int(codes.max()) < 1 << bits
    plain, s, _ = quantize_symmetric(w.view(24, -1, group), bits)
    for held_out in (x, other):
        mine = (held_out @ (restored(codes, scales, bits) - w).T).norm()
        theirs = (held_out @ (restored(plain.flatten(1), s, bits) - w).T).norm()
        assert mine < 0.7 * theirs


@pytest.mark.parametrize(("damped", "share"), [(2000, 1.0), (30, 0.15)])
def test_against_the_definition(monkeypatch: pytest.MonkeyPatch, damped: int, share: float) -> None:
    """Column by column in float64: after each rounding, the least squares of all columns that are left."""
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    x = inputs(200, 32)
    monkeypatch.setattr(gptq, "DAMPED", damped)
    codes, scales = quantize_gptq(w, x, 4, 16)
    h = (x.T @ x).double()
    h += share * h.diagonal().mean() * torch.eye(32)
    left = w.double().clone()
    for j in range(32):
        scale = scales[:, j // 16].double()
        if j % 16 == 0:  # the group's scale is chosen from the weights as they are now
            again = fit_scale(left[:, j : j + 16].float(), (x.T @ x).diagonal()[j : j + 16], 4)
            assert torch.allclose(again.float(), scales[:, j // 16].float(), rtol=2e-3)
        code = (left[:, j] / scale).round().clamp(-8, 7)
        assert (code + 8 - codes[:, j]).abs().max() <= 0
        error = left[:, j] - code * scale
        inverse = torch.linalg.inv(h[j:, j:])
        left[:, j:] -= (error / inverse[0, 0])[:, None] * inverse[0]
    assert torch.isfinite(left).all()


def test_blocks_and_row_chunks_change_nothing_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(20, 96, generator=torch.Generator().manual_seed(3))
    x = inputs(150, 96)
    whole = quantize_gptq(w, x, 4, 16)
    monkeypatch.setattr(gptq, "ROWS", 7)
    for a, b in zip(whole, quantize_gptq(w, x, 4, 16), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(gptq, "BLOCK", 50)  # 48 columns: two independent blocks
    halves = [quantize_gptq(w[:, i : i + 48].contiguous(), x[:, i : i + 48].contiguous(), 4, 16) for i in (0, 48)]
    codes, scales = quantize_gptq(w, x, 4, 16)
    assert torch.equal(codes, torch.cat([h[0] for h in halves], 1))
    assert torch.equal(scales, torch.cat([h[1] for h in halves], 1))


def test_dead_inputs_and_zero_weights() -> None:
    w, x = torch.randn(4, 64), torch.randn(100, 64)
    x[:, 5:9] = 0
    w[1] = 0
    codes, scales = quantize_gptq(w, x, 4, 32)
    assert torch.equal(restored(codes, scales, 4)[1], torch.zeros(64))
    assert (restored(codes, scales, 4) - w).abs().max() < 2
    codes, scales = quantize_gptq(w, torch.zeros(10, 64), 4, 32)  # nothing was seen: no error is worth spreading
    assert torch.isfinite(scales).all() and (restored(codes, scales, 4) - w).abs().max() < 1
