"""No file, however damaged, may do worse to the GGUF reader than a CheckpointError or a ConfigError, or cost memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from gguf_files import TYPE_IDS, assemble, entry, gguf_bytes, pair, string, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_rt.checkpoint.gguf import GGUFCheckpoint, read_metadata
from qwen_rt.errors import CheckpointError, ConfigError

KINDS = tuple(TYPE_IDS)
SEEDS = [
    gguf_bytes(*tiny_model(arch, KINDS[i:] + KINDS[:i], layers=1, ffn=256, vocab=4), version)
    for i, (arch, version) in enumerate([("qwen2", 3), ("qwen", 3), ("qwen3", 2), ("qwen2", 2)])
]
EDGES = [0, 1, 2, 7, 9, 31, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1]


def exercise(path: Path) -> bool:
    """Everything a loader does with a file; True when it was taken for a good one."""
    try:
        read_metadata(path)
        ckpt = GGUFCheckpoint(path)
    except (CheckpointError, ConfigError):
        return False
    good = True
    for name, (n, k) in ckpt.linears().items():
        try:
            assert ckpt.linear(name).dequantize(max(0, n - 3), n).shape == (min(3, n), k)
        except CheckpointError:
            good = False
    for name, shape in ckpt.tensors().items():
        try:
            assert ckpt.tensor(name).shape == shape
        except CheckpointError:
            good = False
    ckpt.close()
    return good


def mutate(rng: random.Random, content: bytes, header: int) -> bytes:
    """One to three random injuries, most of them in the header."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(header, len(data)) if rng.random() < 0.8 else len(data))
        match rng.randrange(6):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                width = rng.choice([4, 8])
                data[at : at + width] = (rng.choice(EDGES) % (1 << 8 * width)).to_bytes(width, "little")
            case 3:
                del data[rng.choice([at, max(at, len(data) - rng.randrange(1, 64))]) :]
            case 4:
                start = rng.randrange(len(data))
                data[at : at + rng.choice([0, 8, 40])] = data[start : start + rng.randrange(1, 64)]
            case 5:
                del data[at : at + rng.randrange(1, 40)]
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_the_files_to_injure_are_good(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(SEEDS[seed])
    assert exercise(path)


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_injured_files(seed: int, tmp_path: Path) -> None:
    """Memory is bounded by the file: 64 times its few kilobytes, where a believed length would ask for gigabytes."""
    content, rng, path = SEEDS[seed], random.Random(seed), tmp_path / "model.gguf"
    header = content.index(b"output.weight") + 64
    path.write_bytes(content)
    tracemalloc.start()
    try:
        outcomes = []
        for i in range(2000):
            injured = mutate(rng, content, header)
            path.write_bytes(injured)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                outcomes.append(exercise(path))
            except Exception as e:
                pytest.fail(f"seed {seed}, case {i}: {type(e).__name__}: {e}\n{injured[:header]!r}")
            assert tracemalloc.get_traced_memory()[1] - before < 64 * len(content), f"seed {seed}, case {i}"
    finally:
        tracemalloc.stop()
    assert outcomes.count(False) > 300 and outcomes.count(True) > 60  # the injuries are neither all fatal nor all idle


FUZZ = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
texts = st.text(max_size=12)
numbers = st.integers(0, (1 << 64) - 1)
values: st.SearchStrategy[Any] = st.one_of(
    st.booleans(), st.integers(-(1 << 63), (1 << 64) - 1), st.floats(allow_nan=False), texts
)
lists = st.one_of(
    st.lists(texts, min_size=1, max_size=5),
    st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
)
names = st.sampled_from(["token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.0.ffn_up.weight", "x"])


@FUZZ
@given(metadata=st.dictionaries(texts.filter(bool), values | lists, max_size=6), version=st.sampled_from([2, 3]))
def test_any_metadata_comes_back(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any], version: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "metadata.gguf"
    path.write_bytes(assemble([pair(k, v) for k, v in metadata.items()], [], version=version))
    assert read_metadata(path) == metadata


@FUZZ
@given(body=st.binary(max_size=400), tensors=st.integers(0, 3), pairs=st.integers(0, 3), version=st.integers(1, 4))
def test_any_bytes_after_the_magic(
    tmp_path_factory: pytest.TempPathFactory, body: bytes, tensors: int, pairs: int, version: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body)
    assert not exercise(path)


@FUZZ
@given(
    pairs=st.lists(
        st.tuples(texts, st.integers(0, 14), st.integers(0, 14), numbers, st.binary(max_size=40)), max_size=3
    ),
    entries=st.lists(
        st.tuples(names, st.lists(numbers | st.integers(0, 300), max_size=5), st.integers(0, 40), numbers), max_size=3
    ),
)
def test_any_tensor_table(tmp_path_factory: pytest.TempPathFactory, pairs: list[Any], entries: list[Any]) -> None:
    """Headers whose grammar is right and whose numbers are arbitrary."""
    path = tmp_path_factory.getbasetemp() / "table.gguf"
    kvs = [pair("general.architecture", "qwen2")]
    kvs += [string(key) + struct.pack("<IIQ", kind, item, n) + raw for key, kind, item, n, raw in pairs]
    lines = [entry(name, tuple(dims), kind, offset) for name, dims, kind, offset in entries]
    path.write_bytes(assemble(kvs, lines, bytes(512)))
    assert not exercise(path)


@FUZZ
@given(key=st.sampled_from(sorted(tiny_model()[0])), value=values | lists)
def test_any_value_of_a_configuration_key(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    metadata, tensors = tiny_model(layers=1)
    path = tmp_path_factory.getbasetemp() / "config.gguf"
    path.write_bytes(gguf_bytes(metadata | {key: value}, tensors))
    exercise(path)
