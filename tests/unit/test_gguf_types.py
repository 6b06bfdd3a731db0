"""Every GGUF tensor type against the gguf package, and the errors of damaged scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import same
from gguf_files import TYPE_IDS, gguf_bytes, random_tensor, tiny_model

from qwen_rt.backends import cpu
from qwen_rt.checkpoint import gguf as reader
from qwen_rt.checkpoint import gguf_dequant
from qwen_rt.checkpoint.gguf import GGUFCheckpoint
from qwen_rt.checkpoint.gguf_dequant import TENSOR_TYPES
from qwen_rt.errors import CheckpointError
from qwen_rt.native import extension
from qwen_rt.quant.formats import LinearRows, RawLinear, concat_rows

oracle = pytest.importorskip("gguf", reason="the gguf package is the oracle of these tests: pip install gguf")

EXACT = ("F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0")  # one product of the same float32 numbers
ONE_SCALE = ("Q4_1", "Q5_1")  # exact scales; product and sum may be fused or not
needs_extension = pytest.mark.skipif(extension() is None, reason="the native extension is not built")
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
    want = want.astype(np.float64).reshape(shape)
    got = lin.dequantize().astype(np.float64)
    assert np.abs(want).max() > 1
    if kind in EXACT:
        assert same(got, want)
        return
    part = lin.rows(0, 32)
    q = part.codes.astype(np.float64).reshape(32, -1, lin.format.group_size)
    scales = part.scales.astype(np.float64)[..., None]
    if lin.format.has_mins:
        terms = np.abs(scales * q) + np.abs(part.mins.astype(np.float64))[..., None]
    else:
        terms = np.abs(scales * (q - (1 << (lin.format.bits - 1))))
    # Half a float16 unit for each rounded product (seen from the rounded side), and float32 arithmetic on both sides.
    unit = 0.0 if kind in ONE_SCALE else 2.0**-11
    assert (np.abs(got - want) <= terms.reshape(shape) * (unit + 2.0**-21)).all()


@pytest.mark.parametrize("kind", GROUPED)
def test_subnormal_scales_are_exact(kind: str, tmp_path: Path) -> None:
    """Products of a subnormal d are multiples of 2^-24, so float16 holds them as they are."""
    t = TENSOR_TYPES[TYPE_IDS[kind]]
    raw = np.frombuffer(random_tensor(np.random.default_rng(3), kind, (32, 512)), np.uint8).copy()
    blocks = raw.view(t.codec[0])
    for field in {"d", "m", "dmin"} & set(FIELDS[kind]):
        blocks[field] = (2.0 ** -np.arange(20, 25))[np.arange(len(blocks)) % 5]
    got = one_linear(tmp_path, kind, raw.tobytes()).dequantize()
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
                assert same(a, b[start:stop]) and a.flags.c_contiguous
    for start, stop in [(-1, 2), (0, 33), (4, 3)]:
        with pytest.raises(IndexError):
            lin.rows(start, stop)


BITS = {"Q2_K": 4, "Q3_K": 4, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q6_K": 6, "Q8_0": 8}


@pytest.mark.parametrize("kind", GROUPED)
def test_held_as_the_bits_it_is_stored_in_or_exactly_wider(kind: str, tmp_path: Path) -> None:
    lin = one_linear(tmp_path, kind, random_tensor(np.random.default_rng(4), kind, (32, 512)))
    assert lin.format.bits == BITS[kind]
    wide = lin.held((8,))
    assert wide.format.bits == 8 and same(wide.dequantize(), lin.dequantize())


@pytest.mark.parametrize("kind", GROUPED)
def test_codes_fit_their_bits(kind: str, tmp_path: Path) -> None:
    lin = one_linear(tmp_path, kind, random_tensor(np.random.default_rng(2), kind, (32, 512)))
    part = lin.rows(0, 32)
    assert part.codes.dtype == np.uint8 and part.scales.dtype == np.float16
    assert int(part.codes.max()) < 1 << lin.format.bits
    assert part.scales.shape == (32, 512 // lin.format.group_size)
    assert (part.mins is not None) == lin.format.has_mins


@needs_extension
@pytest.mark.parametrize("kind", GROUPED)
def test_native_decoding_gives_the_bytes_of_the_definition(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


@needs_extension
def test_native_decoding_checks_its_arguments() -> None:
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


class BlocksOnly:
    """Rows that refuse to be read as codes."""

    def __init__(self, raw: RawLinear, elements: int) -> None:
        self.raw, self.elements = raw, elements

    def stored(self, start: int, stop: int) -> list[Any] | None:
        """Cut into parts of about so many elements."""
        parts = replace(self.raw, shape=(stop, self.raw.shape[1])).spans(self.elements, 16)
        return [part for a, b in parts for part in self.raw.stored(a, b) or ()]

    def __call__(self, start: int, stop: int) -> LinearRows:
        raise AssertionError("read as codes")


def packed_twice(raw: RawLinear, elements: int) -> list[np.ndarray]:
    """Every row of the table, packed from blocks and packed from codes."""
    backend = cpu.CpuBackend()
    ids = np.arange(raw.shape[0])
    ways = (BlocksOnly(raw, elements), lambda start, stop: raw.rows(start, stop))
    return [backend.embedding(ids, backend.pack_linear(replace(raw, rows=way))) for way in ways]


@needs_extension
@pytest.mark.parametrize("kind", GROUPED)
def test_packing_blocks_gives_what_packing_codes_gives(kind: str, tmp_path: Path) -> None:
    raw = one_linear(tmp_path, kind, random_tensor(np.random.default_rng(9), kind, (32, 512)))
    from_blocks, from_codes = packed_twice(raw, 16 * 512)
    assert same(from_blocks, from_codes) and same(from_codes, raw.dequantize())


@needs_extension
@pytest.mark.parametrize("elements", [1, 40 * 32, 1 << 20])
def test_packing_blocks_of_joined_linears(tmp_path: Path, elements: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(*tiny_model(kinds=("Q4_0",), ffn=96, vocab=20)))
    checkpoint = GGUFCheckpoint(path)
    names = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", "lm_head"]
    joined = concat_rows([checkpoint.linear(name) for name in names], "all")
    from_blocks, from_codes = packed_twice(joined, elements)
    assert same(from_blocks, from_codes)
    # A part that ends within a panel, before another: only codes can be joined there.
    joined = concat_rows([checkpoint.linear(name) for name in reversed(names)], "all")
    backend = cpu.CpuBackend()
    got = backend.embedding(np.arange(joined.shape[0]), backend.pack_linear(joined))
    assert same(got, joined.dequantize())


@needs_extension
def test_packing_blocks_refuses_what_reading_codes_refuses(tmp_path: Path) -> None:
    for scale in (np.nan, np.inf):
        data = bytearray(random_tensor(np.random.default_rng(1), "Q4_0", (32, 512)))
        data[-18:-16] = np.float16(scale).tobytes()
        raw = one_linear(tmp_path, "Q4_0", bytes(data))
        with pytest.raises(CheckpointError, match=r"ffn_down.*scales that are NaN, infinite"):
            cpu.CpuBackend().pack_linear(raw)
    raw = one_linear(tmp_path, "Q4_0", random_tensor(np.random.default_rng(1), "Q4_0", (32, 512)))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="shrank"):
        cpu.CpuBackend().pack_linear(raw)


@needs_extension
@pytest.mark.parametrize("waiting", [0, 1 << 15, 1 << 26])
def test_blocks_that_wait_for_others_are_packed_alike(
    tmp_path: Path, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "WAITING_BYTES", waiting)
    random = np.random.default_rng(3)
    raws = []
    for i, (kind, rows) in enumerate((("Q4_0", 32), ("Q8_0", 31), ("Q4_0", 24), ("Q4_0", 8), ("Q6_K", 17))):
        (tmp_path / str(i)).mkdir()
        raw = one_linear(tmp_path / str(i), kind, random_tensor(random, kind, (32, 512)))
        raws.append(replace(raw, shape=(rows, 512)))
    joined = concat_rows(raws[2:4], "both")  # its parts end within a panel: for reading codes
    assert joined is not None
    raws.append(joined)
    backend = cpu.CpuBackend()
    with backend.packing():
        packed = [backend.pack_linear(raw) for raw in raws]
    for raw, w in zip(raws, packed, strict=True):
        assert same(backend.embedding(np.arange(raw.shape[0]), w), raw.dequantize())


@needs_extension
def test_what_is_wrong_with_blocks_that_wait_is_said_at_the_end(tmp_path: Path) -> None:
    data = bytearray(random_tensor(np.random.default_rng(1), "Q4_0", (32, 512)))
    data[-18:-16] = np.float16(np.nan).tobytes()
    raw, backend = one_linear(tmp_path, "Q4_0", bytes(data)), cpu.CpuBackend()
    with pytest.raises(CheckpointError, match=r"ffn_down.*scales that are NaN, infinite"), backend.packing():
        backend.pack_linear(raw)
    with pytest.raises(KeyError), backend.packing():  # what was to be packed is forgotten
        backend.pack_linear(raw)
        raise KeyError
    with backend.packing():
        pass


@needs_extension
def test_native_packing_of_blocks_checks_its_arguments(tmp_path: Path) -> None:
    native = extension()
    w = native.PackedLinear("int4", "none", 40, 64, 32)
    (tmp_path / "blocks").write_bytes(bytes(40 * 36))
    with open(tmp_path / "blocks", "rb") as opened:
        file = opened.fileno()
        good = [
            (w, start, "Q4_0", file, offset, rows) for start, offset, rows in ((0, 0, 40), (32, 1152, 8), (16, 5, 16))
        ]
        assert native.pack_blocks(good) == 3 and native.pack_blocks([]) == 0
        for start, rows in ((8, 32), (0, 8), (16, 17)):  # no whole panels
            assert native.pack_blocks([(w, start, "Q4_0", file, 0, rows), *good]) == 0
        assert native.pack_blocks([*good, (w, 0, "Q4_0", file, 1, 40), *good]) == 3  # the file ends before
        assert native.pack_blocks([*good, (w, 0, "Q4_0", 1 << 20, 0, 40)]) == 3  # no such file
        for what, args in (
            ("not made of Q9", (0, "Q9", file, 0, 40)),
            ("not made of Q4_1", (0, "Q4_1", file, 0, 40)),
            ("not made of Q8_0", (0, "Q8_0", file, 0, 40)),
            ("not made of Q3_K", (0, "Q3_K", file, 0, 40)),
            ("out of range", (-16, "Q4_0", file, 0, 40)),
            ("out of range", (16, "Q4_0", file, 0, 40)),
            ("out of range", (1 << 62, "Q4_0", file, 0, 40)),
            ("out of range", (0, "Q4_0", file, 0, 0)),
            ("out of range", (0, "Q4_0", file, 0, 1 << 62)),
            ("offset out of range", (0, "Q4_0", file, -1, 40)),
            ("offset out of range", (0, "Q4_0", file, 1 << 62, 40)),
        ):
            with pytest.raises(ValueError, match=what):
                native.pack_blocks([(w, *args)])
