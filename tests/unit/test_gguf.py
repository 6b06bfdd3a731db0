"""The GGUF reader: metadata, tensor table, names, splits, and a clear error for each way a file can lie."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from assets import demo_gguf
from checkpoint_files import same
from gguf_files import TYPE_IDS, assemble, entry, gguf_bytes, pair, random_tensor, string, tiny_model

from qwen_rt.checkpoint import gguf as reader
from qwen_rt.checkpoint.gguf import GGUFCheckpoint, read_header, read_metadata
from qwen_rt.errors import CheckpointError

ARCHS = ["qwen", "qwen2", "qwen3"]


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """write(bytes, name="model.gguf") -> the path of a file with this content."""

    def to(content: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return to


# -- what is read ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [2, 3])
def test_metadata_of_every_value_type(write: Any, version: int) -> None:
    values = {
        "u8": (255, 0), "i8": (-128, 1), "u16": (65535, 2), "i16": (-32768, 3), "u32": (4294967295, 4),
        "i32": (-2147483648, 5), "f32": (0.15625, 6), "bool": (True, 7), "string": ("Ġ你好 🙂\0", 8),
        "u64": ((1 << 64) - 1, 10), "i64": (-(1 << 63), 11), "f64": (0.1, 12),
    }  # fmt: skip
    pairs = [pair(k, v, kind) for k, (v, kind) in values.items()]
    pairs += [pair(f"{k}[]", [v] * 3, item_kind=kind) for k, (v, kind) in values.items()]
    pairs += [pair("empty", ""), pair("none", [], item_kind=8)]
    got = read_metadata(write(assemble(pairs, [], version=version)))
    want = {k: v for k, (v, _) in values.items()} | {f"{k}[]": [v] * 3 for k, (v, _) in values.items()}
    assert got == want | {"empty": "", "none": []}
    assert type(got["bool"]) is bool and type(got["bool[]"][0]) is bool and type(got["u8[]"][0]) is int


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("block", [1, 9, 40, 1 << 20])
def test_strings_are_the_same_however_they_are_cut_into_blocks(
    write: Any, block: int, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_BLOCK_BYTES", block)
    if not native:
        monkeypatch.setattr(reader, "extension", lambda: None)
    words = ["", "a", "你好", "x" * 50, "🙂" * 30, "", "end"]
    path = write(assemble([pair("words", words), pair("after", 7)], [], b""))
    assert read_metadata(path) == {"words": words, "after": 7}
    broken = assemble([pair("words", ["fine", "bad!", "fine"]), pair("after", 7)], [], b"")
    with pytest.raises(CheckpointError, match="'words' is not UTF-8"):
        read_metadata(write(broken.replace(b"bad!", b"ba\xff!")))


@pytest.mark.parametrize(
    "tail",
    [b"", b"\1", bytes(7), b"\xff" * 8, b"\xff" * 64, struct.pack("<Q", 1), struct.pack("<Q", 2) + b"\xc3",
     struct.pack("<Q", (1 << 64) - 8) + b"abc"],
)  # fmt: skip
def test_strings_end_before_one_that_is_cut_off(tail: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    good = ["", "a", "你好", "\0"]
    data = b"".join(map(string, good))
    for _ in "native, Python":
        for n in range(7):
            joined, lengths, used = reader._cut_strings(data + tail, n)
            assert joined == "".join(good[:n]).encode() and used == sum(len(string(s)) for s in good[:n])
            assert lengths.tolist() == [len(s.encode()) for s in good[:n]]
        monkeypatch.setattr(reader, "extension", lambda: None)


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf")
    path = tmp_path / "theirs.gguf"
    writer = package.GGUFWriter(path, "qwen2")
    writer.add_string("a.name", "值")
    writer.add_array("a.list", ["x", "y"])
    writer.add_custom_alignment(64)
    first, second = np.arange(15, dtype=np.float32).reshape(3, 5), np.arange(7, dtype=np.float16)
    writer.add_tensor("first", first)
    writer.add_tensor("second", second)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    header = read_header(path)
    assert header.metadata["a.name"] == "值" and header.metadata["a.list"] == ["x", "y"]
    content = path.read_bytes()
    for name, array in (("first", first), ("second", second)):
        t = header.tensors[name]
        assert (t.shape, t.nbytes) == (array.shape, array.nbytes) and t.offset % 64 == 0
        assert content[t.offset : t.offset + t.nbytes] == array.tobytes()


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("version", [2, 3])
def test_a_model_has_hugging_face_names_shapes_and_biases(write: Any, arch: str, version: int) -> None:
    metadata, tensors = tiny_model(arch)
    ckpt = GGUFCheckpoint(write(gguf_bytes(metadata, tensors, version)))
    assert (ckpt.config.arch, ckpt.config.vocab_size, ckpt.config.tied_head) == (arch, 12, False)
    assert ckpt.nbytes() == sum(len(raw) for _, _, raw in tensors.values())
    block = {
        "qwen": {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.w1": "ffn_up", "mlp.w2": "ffn_gate",
                 "mlp.c_proj": "ffn_down"},
    }.get(arch, {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    })  # fmt: skip
    norms = {"ln_1": "attn_norm", "ln_2": "ffn_norm"} if arch == "qwen" else {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    if arch == "qwen3":
        norms |= {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    layers = "transformer.h" if arch == "qwen" else "model.layers"
    linears = {f"{layers}.{i}.{hf}": f"blk.{i}.{name}" for i in range(2) for hf, name in block.items()}
    linears |= {"transformer.wte" if arch == "qwen" else "model.embed_tokens": "token_embd", "lm_head": "output"}
    others = {f"{layers}.{i}.{hf}.weight": f"blk.{i}.{name}" for i in range(2) for hf, name in norms.items()}
    others["transformer.ln_f.weight" if arch == "qwen" else "model.norm.weight"] = "output_norm"

    def values(name: str) -> np.ndarray:
        shape, _, raw = tensors[name]
        return np.frombuffer(raw, np.float32).reshape(shape)

    assert ckpt.linears() == {hf: tensors[f"{name}.weight"][0] for hf, name in linears.items()}
    assert ckpt.tensors() == {hf: tensors[f"{name}.weight"][0] for hf, name in others.items()}
    for hf, name in linears.items():
        lin = ckpt.linear(hf)
        assert same(lin.dequantize(), values(f"{name}.weight"))
        assert (lin.bias is not None) == (f"{name}.bias" in tensors)
        if lin.bias is not None:
            assert same(lin.bias, values(f"{name}.bias"))
    for hf, name in others.items():
        assert same(ckpt.tensor(hf), values(f"{name}.weight"))


def test_no_output_matrix_means_a_tied_head(write: Any) -> None:
    metadata, tensors = tiny_model()
    del tensors["output.weight"]
    ckpt = GGUFCheckpoint(write(gguf_bytes(metadata, tensors)))
    assert ckpt.config.tied_head and "lm_head" not in ckpt.linears()


def test_absent_names_and_the_wrong_kind_of_tensor(write: Any) -> None:
    metadata, tensors = tiny_model()
    ckpt = GGUFCheckpoint(write(gguf_bytes(metadata, tensors)))
    for ask, name in [
        (ckpt.linear, "model.layers.2.mlp.up_proj"),
        (ckpt.linear, "model.norm"),
        (ckpt.tensor, "lm_head.weight"),
        (ckpt.tensor, "model.norm"),
    ]:
        with pytest.raises(CheckpointError, match=name):
            ask(name)


def test_alignment_is_the_files(write: Any) -> None:
    metadata, tensors = tiny_model()
    path = write(gguf_bytes(metadata | {"general.alignment": 4096}, tensors))
    assert all(t.offset % 4096 == 0 for t in read_header(path).tensors.values())
    assert np.isfinite(GGUFCheckpoint(path).tensor("model.norm.weight")).all()


# -- splits ----------------------------------------------------------------------------------------------------------
def split(path: Path, count: int = 3) -> list[Path]:
    """A tiny model in `count` files."""
    metadata, tensors = tiny_model()
    names, out = list(tensors), []
    for i in range(count):
        part = {"split.no": i, "split.count": count, "split.tensors.count": len(names)}
        file = path / f"tiny-{i + 1:05d}-of-{count:05d}.gguf"
        file.write_bytes(gguf_bytes((metadata if i == 0 else {}) | part, {n: tensors[n] for n in names[i::count]}))
        out.append(file)
    return out


def test_a_split_model_reads_as_one(tmp_path: Path, write: Any) -> None:
    ckpt = GGUFCheckpoint(split(tmp_path)[0])
    whole = GGUFCheckpoint(write(gguf_bytes(*tiny_model())))
    assert ckpt.linears() == whole.linears() and ckpt.nbytes() == whole.nbytes()
    for name in whole.linears():
        assert same(ckpt.linear(name).dequantize(), whole.linear(name).dequantize())


def test_broken_splits(tmp_path: Path) -> None:
    files = split(tmp_path)
    with pytest.raises(CheckpointError, match="path of the first"):
        GGUFCheckpoint(files[0].rename(tmp_path / "renamed.gguf"))
    files = split(tmp_path)
    for wrong, message in [(files[2], "part 2 of 3"), (None, "00002-of-00003")]:
        content = wrong.read_bytes() if wrong else b""
        files[1].write_bytes(content) if wrong else files[1].unlink()
        with pytest.raises(CheckpointError, match=message):
            GGUFCheckpoint(files[0])


# -- files that lie --------------------------------------------------------------------------------------------------
ONE = [pair("general.architecture", "qwen2")]
F32, Q4_0 = TYPE_IDS["F32"], TYPE_IDS["Q4_0"]


def table(*entries: bytes, data: int = 256) -> bytes:
    return assemble(ONE, list(entries), bytes(data))


MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "magic"),
    "short magic": (b"GGU", "magic"),
    "another format": (assemble(ONE, [], magic=b"GGML"), "start with 'GGUF'"),
    "version 1": (assemble(ONE, [], version=1), "version 1"),
    "version 4": (assemble(ONE, [], version=4), "version 4"),
    "big endian": (assemble(ONE, [], version=0x03000000), "big-endian"),
    "ends after the version": (b"GGUF\3\0\0\0", "number of tensors"),
    "2^64-1 tensors": (assemble(ONE, [], num_tensors=(1 << 64) - 1), "number of tensors is 18446744073709551615"),
    "2^40 pairs": (assemble(ONE, [], num_pairs=1 << 40), "number of metadata pairs"),
    "one pair too many": (assemble(ONE, [], num_pairs=3), "key '' is empty"),
    "key of 2^63 bytes": (assemble([struct.pack("<Q", 1 << 63) + bytes(32)], []), "length of 9223372036854775808"),
    "empty key": (assemble([pair("", 1), bytes(32)], []), "is empty"),
    "key given twice": (assemble([*ONE, pair("x", 1), pair("x", 2)], []), "'x' is given twice"),
    "key not UTF-8": (assemble([pair(b"\xff\xfe", 1)], []), "not UTF-8"),
    "string not UTF-8": (assemble([pair("x", b"\xc3", 8)], []), "'x' is not UTF-8"),
    "overlong UTF-8": (assemble([pair("x", b"\xc0\x80", 8)], []), "'x' is not UTF-8"),
    "string past the end": (assemble([string("x") + struct.pack("<IQ", 8, 1 << 20)], []), "'x' takes 1048576 bytes"),
    "unknown value type": (assemble([string("x") + struct.pack("<IQ", 13, 0)], []), "value type 13"),
    "bool of 2": (assemble([string("x") + struct.pack("<IBQ", 7, 2, 0)], []), "bool of value 2"),
    "bools of 7": (assemble([string("x") + struct.pack("<IIQBBQ", 9, 7, 2, 1, 7, 0)], []), "bool of value 7"),
    "array of arrays": (assemble([string("x") + struct.pack("<IIQ", 9, 9, 1)], []), "array of arrays"),
    "array of unknown": (assemble([string("x") + struct.pack("<IIQ", 9, 99, 1)], []), "value type 99"),
    "2^62 numbers": (assemble([string("x") + struct.pack("<IIQ", 9, 4, 1 << 62)], []), "'x' is 4611686018427387904"),
    "2^62 strings": (assemble([string("x") + struct.pack("<IIQ", 9, 8, 1 << 62)], []), "'x' is 4611686018427387904"),
    "alignment 0": (assemble([pair("general.alignment", 0)], []), "general.alignment is 0"),
    "alignment 48": (assemble([pair("general.alignment", 48)], []), "general.alignment is 48"),
    "alignment 2^31": (assemble([pair("general.alignment", 1 << 31)], []), "general.alignment is 2147483648"),
    "alignment of text": (assemble([pair("general.alignment", "32")], []), "general.alignment is '32'"),
    "name too long": (table(entry("n" * 65, (1,), F32, 0)), "length of 65"),
    "name empty": (table(entry("", (1,), F32, 0)), "is empty"),
    "name twice": (table(entry("a", (8,), F32, 0), entry("a", (8,), F32, 32)), "'a' is given twice"),
    "no dimension": (table(entry("a", (), F32, 0)), "0 dimensions"),
    "five dimensions": (table(entry("a", (1,) * 5, F32, 0)), "5 dimensions"),
    "2^32-1 dimensions": (table(entry("a", (1,), F32, 0, ndim=0xFFFFFFFF)), "4294967295 dimensions"),
    "dimension 0": (table(entry("a", (4, 0), F32, 0)), r"\[0, 4\] of F32"),
    "2^63 elements": (table(entry("a", (1 << 31, 1 << 32), F32, 0)), "cannot have dimensions"),
    "product wraps to 0": (table(entry("a", (1 << 32, 1 << 32), F32, 0)), "cannot have dimensions"),
    "product wraps to 64": (table(entry("a", ((1 << 63) + 32, 2), F32, 0)), "cannot have dimensions"),
    "part of a block": (table(entry("a", (2, 48), Q4_0, 0)), r"\[48, 2\] of Q4_0"),
    "type unknown": (table(entry("a", (8,), 1234, 0)), "type 1234"),
    "type unsupported": (table(entry("a", (256,), 23, 0)), "IQ4_XS, which is not supported; .*Q4_K"),
    "offset not aligned": (table(entry("a", (8,), F32, 4)), "offset 4"),
    "offset past the end": (table(entry("a", (8,), F32, 1 << 20)), "the file ends at"),
    "offset 2^64-32": (table(entry("a", (8,), F32, (1 << 64) - 32)), "the file ends at"),
    "data past the end": (table(entry("a", (8,), F32, 0), entry("b", (57,), F32, 32)), "'b' takes bytes"),
    "overlap": (table(entry("a", (9,), F32, 0), entry("b", (8,), F32, 32)), "'b' overlaps tensor 'a'"),
    "same place": (table(entry("a", (8,), F32, 32), entry("b", (8,), F32, 32)), "overlaps"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_a_clear_error_before_memory_is_spent(write: Any, case: str) -> None:
    content, message = MALFORMED[case]
    path = write(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as error:
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert peak < 1 << 20


@pytest.mark.parametrize(("kind", "n"), [(8, 1 << 27), (4, 1 << 27), (0, 1 << 27)])
def test_a_huge_file_may_not_have_a_huge_header(write: Any, kind: int, n: int) -> None:
    """A sparse file of 4 GiB would bear out these lengths; no header of a model is that long."""
    path = write(assemble([string("x") + struct.pack("<IIQ", 9, kind, n)], []))
    os.truncate(path, 1 << 32)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"more than .* bytes of header can hold"):
            read_metadata(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_header_pieces_are_valid_when_put_together_well(write: Any) -> None:
    """The malformed cases differ from these by their defect only."""
    good = table(entry("a", (8,), F32, 0), entry("b", (2, 32), Q4_0, 32), entry("c", (32,), F32, 96))
    header = read_header(write(good))
    assert {n: (t.shape, t.type.name, t.nbytes) for n, t in header.tensors.items()} == {
        "a": ((8,), "F32", 32),
        "b": ((2, 32), "Q4_0", 36),
        "c": ((32,), "F32", 128),
    }
    assert header.metadata == {"general.architecture": "qwen2"}


def test_every_truncation_is_an_error(write: Any) -> None:
    content = gguf_bytes(*tiny_model(layers=1, hidden=8, heads=2, kv_heads=1, ffn=8))
    end = max(t.offset + t.nbytes for t in read_header(write(content)).tensors.values())
    for length in range(0, end, 7):
        with pytest.raises(CheckpointError):
            GGUFCheckpoint(write(content[:length]))


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    for path in (tmp_path / "absent.gguf", tmp_path, tmp_path / "pipe.gguf"):
        with pytest.raises(CheckpointError, match=str(path)):
            GGUFCheckpoint(path)


def change(name: str, shape: tuple[int, ...] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tiny model with one tensor added, reshaped or (None) left out."""
    metadata, tensors = tiny_model()
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = shape, "F32", random_tensor(np.random.default_rng(0), "F32", shape)
    return metadata, tensors


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("token_embd.weight", None, "token_embd.weight"),
        ("blk.1.ffn_up.weight", None, "1 missing: model.layers.1.mlp.up_proj.weight"),
        ("blk.0.attn_q.bias", None, "missing: model.layers.0.self_attn.q_proj.bias"),
        ("output_norm.weight", None, "missing: model.norm.weight"),
        ("blk.2.ffn_up.weight", (64, 32), "not part of the model: model.layers.2.mlp.up_proj.weight"),
        ("blk.0.attn_output.bias", (32,), "not part of the model: model.layers.0.self_attn.o_proj.bias"),
        ("blk.0.ffn_up.weight", (64, 31), r"mlp.up_proj.weight is \[64, 31\], expected \[64, 32\]"),
        ("blk.0.ffn_up.weight", (64, 32, 1), r"expected \[64, 32\]"),
        ("token_embd.weight", (12,), r"expected \[12, 32\]"),
        ("output.weight", (11, 32), r"lm_head.weight is \[11, 32\]"),
        ("blk.0.attn_q_norm.weight", (8,), "'blk.0.attn_q_norm.weight' is no part of a qwen2 model"),
        ("blk.00.ffn_up.weight", (64, 32), "'blk.00.ffn_up.weight' is no part"),
        ("rope_freqs.weight", (4,), "'rope_freqs.weight' is no part"),
        ("output.scale", (1,), "'output.scale' is no part"),
    ],
)
def test_missing_extra_and_misshapen_tensors(
    write: Any, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        GGUFCheckpoint(write(gguf_bytes(*change(name, shape))))


def test_another_architecture(write: Any) -> None:
    for arch in ("llama", ["qwen2"], 7):
        metadata, tensors = tiny_model()
        with pytest.raises(CheckpointError, match="not supported; qwen, qwen2, qwen3 are"):
            GGUFCheckpoint(write(gguf_bytes(metadata | {"general.architecture": arch}, tensors)))


def test_a_norm_or_bias_that_is_not_finite(write: Any) -> None:
    metadata, tensors = tiny_model()
    tensors["output_norm.weight"] = (32,), "F32", np.full(32, np.nan, np.float32).tobytes()
    tensors["blk.0.attn_q.bias"] = (32,), "F32", np.full(32, np.inf, np.float32).tobytes()
    ckpt = GGUFCheckpoint(write(gguf_bytes(metadata, tensors)))
    with pytest.raises(CheckpointError, match="output_norm"):
        ckpt.tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"attn_q\.bias"):
        ckpt.linear("model.layers.0.self_attn.q_proj")


def test_a_file_that_shrinks_or_is_closed_while_in_use(write: Any) -> None:
    path = write(gguf_bytes(*tiny_model()))
    ckpt = GGUFCheckpoint(path)
    lin = ckpt.linear("lm_head")
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match="shrank"):
        lin.rows(0, 12)
    ckpt.close()
    with pytest.raises(CheckpointError, match="closed"):
        lin.rows(0, 12)


def test_threads_may_read_at_once(write: Any) -> None:
    ckpt = GGUFCheckpoint(write(gguf_bytes(*tiny_model(kinds=("Q8_0", "Q4_0", "Q5_1")))))
    want = {name: ckpt.linear(name).dequantize() for name in ckpt.linears()}
    wrong: list[str] = []

    def read() -> None:
        for _ in range(5):
            wrong.extend(n for n in want if not same(ckpt.linear(n).dequantize(), want[n]))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# -- the real model --------------------------------------------------------------------------------------------------
def test_the_demo_model_is_what_the_gguf_package_reads() -> None:
    package = pytest.importorskip("gguf")
    demo = demo_gguf()
    ckpt = GGUFCheckpoint(demo)
    assert (len(ckpt.linears()), len(ckpt.tensors()), ckpt.config.num_layers) == (170, 49, 24)
    theirs = {t.name: t for t in package.GGUFReader(demo).tensors}
    seen = set()
    for hf, name in [
        ("model.embed_tokens", "token_embd"),
        ("lm_head", "output"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
        ("model.layers.5.mlp.down_proj", "blk.5.ffn_down"),
        ("model.layers.23.self_attn.v_proj", "blk.23.attn_v"),
    ]:
        t = theirs[f"{name}.weight"]
        seen.add(t.tensor_type.name)
        n = t.data.shape[0]
        rows = slice(n - 60, n)
        want = package.quants.dequantize(t.data[rows], t.tensor_type)
        got = ckpt.linear(hf).dequantize(n - 60, n)
        # A K-quant's scale is rounded to float16; a weight of it is off by that part of the largest term of its group.
        assert np.abs(got - want).max() <= np.abs(want).max() * 2.0**-9, hf
        if not t.tensor_type.name.endswith("K"):
            assert same(got, want), hf
    assert seen >= {"Q5_0", "Q8_0", "Q6_K", "Q4_K"}


def test_reading_the_demo_model_takes_no_memory_of_its_size() -> None:
    """All 491 MB pass through; resident memory grows by scratch only (the map of a page would count)."""
    code = f"""
import resource
from qwen_rt.checkpoint.gguf import GGUFCheckpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
ckpt = GGUFCheckpoint({str(demo_gguf())!r})
before, codes = peak(), 0
for name, (n, _) in ckpt.linears().items():
    lin = ckpt.linear(name)
    for i in range(0, n, 2048):
        codes += lin.rows(i, min(i + 2048, n)).codes.size
print(codes, peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    codes, grown = map(int, run.stdout.split())
    assert codes == 630_095_872 and grown < 100
