"""RawLinear in a format a device takes: wider codes, the same weights."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoint_files import same

from qwen_rt.backends.contract import make_linear
from qwen_rt.dtypes import host_dtype
from qwen_rt.quant import formats
from qwen_rt.quant.formats import WEIGHT_BITS, LinearFormat, RawLinear, WeightBits, dense_format

WIDTHS = [c for n in range(1, 5) for c in itertools.combinations(WEIGHT_BITS, n)]


def made(bits: WeightBits, zeros: bool, mins: bool, perm: bool) -> RawLinear:
    fmt = LinearFormat(bits, 32, zeros, mins)
    return make_linear(fmt, 24, 160, torch.Generator().manual_seed(bits), bias=True, perm=perm)


@pytest.mark.parametrize("offered", WIDTHS)
@pytest.mark.parametrize(("zeros", "mins"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_held_is_exact_and_in_an_offered_width(
    bits: WeightBits, zeros: bool, mins: bool, offered: tuple[WeightBits, ...]
) -> None:
    raw = made(bits, zeros, mins, perm=bits == 6)
    held = raw.held(offered)
    assert held.format == raw.format.held(offered)
    if bits in offered or bits > max(offered):
        assert held is raw
        return
    assert held.format == LinearFormat(min(b for b in offered if b > bits), 32, zeros, mins)
    assert same(held.dequantize(), raw.dequantize())
    assert same(held.dequantize(3, 9), raw.dequantize(3, 9))
    part = held.rows(0, 24)
    assert part.codes is not None and part.codes.dtype == np.uint8
    assert held.bias is raw.bias and held.perm is raw.perm and held.name == raw.name


def test_dense_is_held_as_it_is() -> None:
    raw = make_linear(dense_format("float16"), 4, 32, torch.Generator(), bias=False, perm=False)
    assert raw.held((4, 8)) is raw and raw.held(()) is raw


def test_reading_does_not_change_what_is_stored() -> None:
    raw = made(5, False, False, False)
    before = raw.dequantize()
    raw.held((8,)).rows(0, 24)
    assert same(raw.dequantize(), before)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_all_finite(dtype: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(formats, "extension", lambda: None)
    limits = ml_dtypes.finfo(host_dtype(dtype))
    fine = [[0.0, -0.0, limits.max, limits.min], [limits.tiny, limits.eps, -1.0, 3.0]]
    fine = np.array(fine, host_dtype(dtype))
    assert formats.all_finite(fine) and formats.all_finite(fine.T) and formats.all_finite(fine[:0])
    assert formats.all_finite(fine[0, 0])
    many = np.zeros(300_001, host_dtype(dtype))
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        for i in (0, 1 << 17, 300_000):
            many[i] = value
            assert not formats.all_finite(many) and not formats.all_finite(many[i])
            assert formats.all_finite(many[:i]) and formats.all_finite(many[i + 1 :])
            many[i] = 0
        wide = fine.copy()
        wide[1, 2] = value
        assert not formats.all_finite(wide.T) and formats.all_finite(wide[:, ::2][0])
