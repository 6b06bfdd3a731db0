"""Round-to-nearest quantisation and packing."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoint_files import same
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rt.dtypes import host_dtype
from qwen_rt.errors import CheckpointError, ConfigError
from qwen_rt.quant.formats import Array, LinearFormat, LinearRows, RawLinear, dense_format
from qwen_rt.quant.packing import fit_group, pack_words, unpack_words
from qwen_rt.quant.rtn import quantize_rtn


def dense(w: Array, bias: Array | None = None, perm: Array | None = None) -> RawLinear:
    fmt = dense_format(w.dtype.name)
    return RawLinear("a.linear", (w.shape[0], w.shape[1]), fmt, lambda a, b: LinearRows(w[a:b]), bias, perm)


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_by_hand(bits: int) -> None:
    codes = np.array([[1, 2, 3, 4, 5, 6, 7, 15]], np.uint8)
    word = {4: [0xF7654321 - (1 << 32)], 8: [0x04030201, 0x0F070605]}[bits]
    assert pack_words(codes, bits).tolist() == [word]
    assert same(unpack_words(pack_words(codes, bits), bits), codes)


@pytest.mark.parametrize("shape", [(1, 16), (3, 8), (2, 1, 24)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_of_any_strides(bits: int, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, shape, np.uint8)
    strided = codes.swapaxes(-1, -2).copy().swapaxes(-1, -2)
    assert same(unpack_words(pack_words(strided, bits), bits), codes)
    words = pack_words(codes, bits)
    assert same(unpack_words(words.swapaxes(-1, -2).copy().swapaxes(-1, -2), bits), codes)
    wide = words.repeat(3, -1)
    for i in range(words.shape[-1]):
        part = np.split(unpack_words(words, bits), words.shape[-1], -1)[i]
        assert same(unpack_words(wide[..., 3 * i : 3 * i + 1], bits), part)


def test_fit_group() -> None:
    assert [fit_group(k) for k in (4096, 29568, 96, 160, 48, 16, 24, 4097)] == [128, 128, 96, 80, 48, 16, None, None]
    assert fit_group(4096, 100) == 64
    assert fit_group(4096, 15) is None
    assert fit_group(96, 96) == 96


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 5, 6, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([16, 32, 64, 128]),
    scale=st.floats(1e-3, 1e3),
    shift=st.sampled_from([0.0, 3.0, -3.0]),
    seed=st.integers(0, 999),
)
def test_error_is_within_half_a_step(
    bits: int, symmetric: bool, group: int, scale: float, shift: float, seed: int
) -> None:
    w = (normal(5, 128, seed=seed) + np.float32(shift)) * np.float32(scale)
    raw = quantize_rtn(dense(w), bits, group, symmetric)
    assert raw.format == LinearFormat(bits, group, has_zeros=not symmetric)
    part = raw.rows(0, 5)
    assert part.scales is not None and part.codes is not None
    step = np.abs(part.scales.astype(np.float32)).repeat(group, 1)
    if symmetric and bits < 8:  # the scale was searched for: no worse than that which the largest value sets
        x = w.reshape(5, -1, group)
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        plain = (np.where(-low >= high, low, high) / -(1 << bits - 1)).astype(np.float16).astype(np.float32)
        codes = np.rint(x / plain).clip(-(1 << bits - 1), (1 << bits - 1) - 1)
        mine = np.square(raw.dequantize().reshape(x.shape) - x) * np.abs(x)
        theirs = np.square(codes * plain - x) * np.abs(x)
        # Both scales are rounded to float16, by 2^-11: errors e move by up to 2^-11 |x|, weighted squares as follows.
        slack = 2.0**-10 * (np.square(x) * np.abs(plain)).sum(-1) + 2.0**-22 * (np.abs(x) ** 3).sum(-1)
        assert (mine.sum(-1) <= theirs.sum(-1) + slack + 1e-9).all()
        inside = (part.codes > 0) & (part.codes < (1 << bits) - 1)
        assert (np.abs(raw.dequantize() - w) <= step * 0.5001 + np.abs(w) * 2.0**-20)[inside].all()
        return
    # Half a step; a code clipped at the far end of the symmetric range, or by the rounding of the zero point, may be
    # a whole step off; the float16 rounding of the scale (2^-11, or 2^-25 when subnormal) counts once a code.
    error = np.abs(raw.dequantize() - w)
    assert (error <= step + np.maximum(step * 2.0**-11, 2.0**-25) * (1 << bits)).all()
    inside = (part.codes > 0) & (part.codes < (1 << bits) - 1)
    assert (error <= step * 0.5001 + np.abs(w) * 2.0**-20)[inside].all()


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_values_on_the_grid_come_back_exactly(bits: int) -> None:
    half = 1 << bits - 1
    codes = np.tile(np.arange(-half, half), 128 // (2 * half) + 1)[:128]  # 8 bits: the lower half
    w = codes.astype(np.float32) * np.array([[0.5], [-2.0], [0.0]], np.float32)
    assert same(quantize_rtn(dense(w), bits, 128).dequantize(), w)


def test_asymmetric_zero_points_leave_room_for_the_stored_offset() -> None:
    w = np.random.default_rng(0).random((4, 128), np.float32) + 1  # all positive: the natural zero point would be 0
    for bits in (4, 5, 6, 8):
        part = quantize_rtn(dense(w), bits, 32, symmetric=False).rows(0, 4)
        assert part.zeros is not None and int(part.zeros.min()) >= 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_bias_and_order_are_kept(dtype: str) -> None:
    w, bias = normal(40, 96).astype(host_dtype(dtype)), normal(40, seed=1)
    perm = np.random.default_rng(2).permutation(96).astype(np.int32)
    raw = quantize_rtn(dense(w, bias, perm), 8)
    assert raw.format.group_size == 96 and raw.bias is bias and raw.perm is perm and raw.name == "a.linear"
    whole = raw.dequantize()
    assert same(np.concatenate([raw.dequantize(a, a + 8) for a in range(0, 40, 8)]), whole)
    assert np.allclose(whole[:, perm], w.astype(np.float32), atol=0.05)


def test_grouped_input_with_minima() -> None:
    draw = np.random.default_rng(0)
    codes = draw.integers(0, 16, (6, 64), np.uint8)
    scales, mins = draw.random((6, 2)).astype(np.float16), -draw.random((6, 2)).astype(np.float16)
    fmt = LinearFormat(4, 32, has_mins=True)
    raw = RawLinear("x", (6, 64), fmt, lambda a, b: LinearRows(None, codes[a:b], scales[a:b], None, mins[a:b]))
    again = quantize_rtn(raw, 8, 32, symmetric=False)
    assert np.allclose(again.dequantize(), raw.dequantize(), atol=16 / 255)


@pytest.mark.parametrize(("bits", "group", "k"), [(3, 128, 128), (4, 8, 128), (4, 128, 24), (8, 128, 130)])
def test_what_cannot_be_quantised(bits: int, group: int, k: int) -> None:
    with pytest.raises(ConfigError, match=r"a\.linear: cannot quantise"):
        quantize_rtn(dense(np.ones((2, k), np.float32)), bits, group)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [1e9, 3e38, float("nan"), float("inf")])
def test_weights_too_large(value: float, symmetric: bool) -> None:
    w = np.ones((4, 64), np.float32)
    w[2, 3] = value
    raw = quantize_rtn(dense(w), 4, 32, symmetric)
    raw.rows(0, 2)
    with pytest.raises(CheckpointError, match=r"a\.linear: weights too large"):
        raw.rows(2, 3)
