"""Every GGUF tensor type against the gguf package, and the errors of damaged scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import TYPE_IDS, gguf_bytes, random_tensor, tiny_model

from qwen_rt.checkpoint import gguf as reader
from qwen_rt.checkpoint import gguf_dequant
from qwen_rt.checkpoint.gguf import GGUFCheckpoint
from qwen_rt.checkpoint.gguf_dequant import TENSOR_TYPES
from qwen_rt.errors import CheckpointError
from qwen_rt.native import extension
from qwen_rt.quant.formats import RawLinear

oracle = pytest.importorskip("gguf", reason="the gguf package is the oracle of these tests: pip install gguf")

EXACT = ("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0")  # one product of the same float32 numbers
ONE_SCALE = ("Q4_1", "Q5_1")  # exact scales; product and sum may be fused or not
GROUPED = [t.name for t in TENSOR_TYPES.values() if t.codec]
FIELDS = {name: TENSOR_TYPES[TYPE_IDS[name]].codec[0].names for name in GROUPED}


def one_linear(tmp_path: Path, kind: str, raw: bytes, shape: tuple[int, int] = (32, 512)) -> RawLinear:
    """blk.1.ffn_down of a tiny model, with the given data."""
    metadata, tensors = tiny_model(ffn=shape[1])
    tensors["blk.1.ffn_down.weight"] = shape, kind, raw
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(metadata, tensors))
    return GGUFCheckpoint(path).linear("model.layers.1.mlp.down_proj")


@pytest.mark.parametrize("kind", TYPE_IDS)
def test_block_size_is_ggmls(kind: str) -> None:
    t = TENSOR_TYPES[TYPE_IDS[kind]]
    assert oracle.GGML_QUANT_SIZES[oracle.GGMLQuantizationType[kind]] == (t.block, t.nbytes)
    assert oracle.GGMLQuantizationType[kind] == TYPE_IDS[kind]


@pytest.mark.parametrize("kind", TYPE_IDS)
def test_values_are_those_of_the_gguf_package(kind: str, tmp_path: Path) -> None:
    shape = (32, 512)
    raw = random_tensor(np.random.default_rng(7), kind, shape)
    lin = one_linear(tmp_path, kind, raw)
    want = oracle.quants.dequantize(np.frombuffer(raw, np.uint8).reshape(32, -1), oracle.GGMLQuantizationType[kind])
    want = torch.from_numpy(want.astype(np.float64)).view(shape)
    got = lin.dequantize().double()
    assert want.abs().max() > 1
    if kind in EXACT:
        assert torch.equal(got, want)
        return
    part = lin.rows(0, 32)
    q = part.codes.double().view(32, -1, lin.format.group_size)
    if lin.format.has_mins:
        terms = (part.scales.double()[..., None] * q).abs() + part.mins.double()[..., None].abs()
    else:
        terms = (part.scales.double()[..., None] * (q - (1 << (lin.format.bits - 1)))).abs()
    # Half a float16 unit for each rounded product (seen from the rounded side), and float32 arithmetic on both sides.
    unit = 0.0 if kind in ONE_SCALE else 2.0**-11
    assert ((got - want).abs() <= terms.view(shape) * (unit + 2.0**-21)).all()


@pytest.mark.parametrize("kind", GROUPED)
def test_subnormal_scales_are_exact(kind: str, tmp_path: Path) -> None:
    """Products of a subnormal d are multiples of 2^-24, so float16 holds them as they are."""
    t = TENSOR_TYPES[TYPE_IDS[kind]]
    raw = np.frombuffer(random_tensor(np.random.default_rng(3), kind, (32, 512)), np.uint8).copy()
    blocks = raw.view(t.codec[0])
    for field in {"d", "m", "dmin"} & set(FIELDS[kind]):
        blocks[field] = (2.0 ** -np.arange(20, 25))[np.arange(len(blocks)) % 5]
    got = one_linear(tmp_path, kind, raw.tobytes()).dequantize().numpy()
    want = oracle.quants.dequantize(raw.reshape(32, -1), oracle.GGMLQuantizationType[kind]).reshape(32, 512)
    assert np.abs(want).max() > 0
    assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite_are_refused(kind: str, bad: float, tmp_path: Path) -> None:
    t = TENSOR_TYPES[TYPE_IDS[kind]]
    for field in {"d", "m", "dmin"} & set(FIELDS[kind]):
        raw = np.frombuffer(random_tensor(np.random.default_rng(0), kind, (32, 512)), np.uint8).copy()
        blocks = raw.view(t.codec[0])
        blocks[field][-1] = bad
        lin = one_linear(tmp_path, kind, raw.tobytes())
        lin.rows(0, 31)
        with pytest.raises(CheckpointError, match=r"ffn_down.*rows 31 to 32"):
            lin.rows(31, 32)


@pytest.mark.parametrize("kind", [k for k in GROUPED if k.endswith("K")])
def test_a_product_beyond_float16_is_refused(kind: str, tmp_path: Path) -> None:
    raw = np.full(32 * 512 // 256 * TENSOR_TYPES[TYPE_IDS[kind]].nbytes, 0x7F, np.uint8)
    blocks = raw.view(TENSOR_TYPES[TYPE_IDS[kind]].codec[0])
    for field in {"d", "dmin"} & set(FIELDS[kind]):
        blocks[field] = 65504
    with pytest.raises(CheckpointError, match="beyond float16"):
        one_linear(tmp_path, kind, raw.tobytes()).rows(0, 32)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_dense_values_that_are_not_finite_are_refused(kind: str, tmp_path: Path) -> None:
    raw = bytearray(random_tensor(np.random.default_rng(0), kind, (32, 512)))
    raw[-2:] = b"\xff\x7f"
    lin = one_linear(tmp_path, kind, bytes(raw))
    lin.rows(0, 31)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down"):
        lin.rows(30, 32)


@pytest.mark.parametrize("kind", TYPE_IDS)
def test_any_span_equals_the_rows_of_the_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lin = one_linear(tmp_path, kind, random_tensor(np.random.default_rng(1), kind, (32, 512)))
    whole = lin.rows(0, 32)
    monkeypatch.setattr(reader, "_CHUNK", 3 * 512)  # a few rows a chunk, the last one short
    for start, stop in [(0, 32), (0, 1), (5, 22), (31, 32), (7, 7)]:
        part = lin.rows(start, stop)
        for field in ("values", "codes", "scales", "zeros", "mins"):
            a, b = getattr(part, field), getattr(whole, field)
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.equal(a, b[start:stop]) and a.is_contiguous()
    for start, stop in [(-1, 2), (0, 33), (4, 3)]:
        with pytest.raises(IndexError):
            lin.rows(start, stop)


BITS = {"Q2_K": 4, "Q3_K": 4, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q6_K": 6, "Q8_0": 8}


@pytest.mark.parametrize("kind", GROUPED)
def test_held_as_the_bits_it_is_stored_in_or_exactly_wider(kind: str, tmp_path: Path) -> None:
    lin = one_linear(tmp_path, kind, random_tensor(np.random.default_rng(4), kind, (32, 512)))
    assert lin.format.bits == BITS[kind]
    wide = lin.held((8,))
    assert wide.format.bits == 8 and torch.equal(wide.dequantize(), lin.dequantize())


@pytest.mark.parametrize("kind", GROUPED)
def test_codes_fit_their_bits(kind: str, tmp_path: Path) -> None:
    lin = one_linear(tmp_path, kind, random_tensor(np.random.default_rng(2), kind, (32, 512)))
    part = lin.rows(0, 32)
    assert part.codes.dtype == torch.uint8 and part.scales.dtype == torch.float16
    assert int(part.codes.max()) < 1 << lin.format.bits
    assert part.scales.shape == (32, 512 // lin.format.group_size)
    assert (part.mins is not None) == lin.format.has_mins


@pytest.mark.parametrize("kind", GROUPED)
def test_native_decoding_gives_the_bytes_of_the_definition(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if extension() is None:
        pytest.skip("the native extension is not built")
    t = TENSOR_TYPES[TYPE_IDS[kind]]
    n, k, groups = 70, 4 * t.block * 8, 4 * t.block * 8 // t.format.group_size
    raw = np.frombuffer(random_tensor(np.random.default_rng(5), kind, (n, k)), np.uint8)

    def decoded() -> list[np.ndarray]:
        codes, scales = np.full((n, k), 255, np.uint8), np.full((n, groups), np.nan, np.float16)
        mins = np.full_like(scales, np.nan) if t.format.has_mins else None
        gguf_dequant.decode_blocks(t, raw, codes, scales, mins)
        return [codes, *(a.view(np.uint16) for a in (scales, mins) if a is not None)]

    native = decoded()
    monkeypatch.setattr(gguf_dequant, "extension", lambda: None)
    for got, want in zip(native, decoded(), strict=True):
        assert np.array_equal(got, want)


def test_native_decoding_checks_its_arguments() -> None:
    if extension() is None:
        pytest.skip("the native extension is not built")
    native = extension().gguf_decode
    raw, codes, scales = np.zeros(36, np.uint8), np.zeros(64, np.uint8), np.zeros(2, np.float16)
    native("Q4_0", raw, codes, scales, None)
    for what, args in (
        ("no quantised type", ("Q9", raw, codes, scales, None)),
        ("mins do not match", ("Q4_1", raw, codes, scales, None)),
        ("whole blocks", ("Q4_0", raw, codes[:33], scales, None)),
        ("data must have 36 bytes", ("Q4_0", raw[:35], codes, scales, None)),
        ("scales must have 4 bytes", ("Q4_0", raw, codes, scales[:1], None)),
        ("codes must be contiguous", ("Q4_0", raw, np.zeros(128, np.uint8)[::2], scales, None)),
    ):
        with pytest.raises(ValueError, match=what):
            native(*args)
