"""Fuzzing the .bin reader: a clear error or readable tensors, nothing else, and no code from the file is run."""

from __future__ import annotations

import pickletools
import random
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from checkpoint_files import HF_CONFIGS, random_state
from test_fuzz_safetensors import mutate_bytes

from qwen_rt.checkpoint.store import TensorStore
from qwen_rt.checkpoint.torch_bin import read_index
from qwen_rt.errors import CheckpointError

OPCODES = [ord(o.code) for o in pickletools.opcodes]


def read_all(path: Path) -> None:
    entries = read_index(path)
    store = TensorStore(entries)
    for name, entry in entries.items():
        if entry.shape:
            assert store.read(name).nbytes == entry.nbytes
    store.close()


def attempt(path: Path, content: bytes, seen: Counter[str]) -> None:
    path.write_bytes(content)
    try:
        read_all(path)
        seen["read"] += 1
    except CheckpointError as error:
        assert str(path) in str(error)
        seen["refused"] += 1


@pytest.mark.parametrize("part", range(2))
def test_mutated_files(tmp_path: Path, part: int) -> None:
    draw = random.Random(part)
    path = tmp_path / "pytorch_model.bin"
    state = {n: t for n, t in random_state(HF_CONFIGS["qwen2"]).items() if ".0." in n}
    torch.save(state, path)
    content = path.read_bytes()
    directory = content.rindex(b"PK\x05\x06")
    start = int.from_bytes(content[directory + 16 : directory + 20], "little")  # of the central directory
    seen: Counter[str] = Counter()
    for _ in range(400):
        if draw.random() < 0.5:  # the pickle is the first record
            new = mutate_bytes(content, draw, 4000)
        else:
            new = content[:start] + mutate_bytes(content[start:], draw, len(content) - start)
        attempt(path, new, seen)
    assert seen["refused"] > 200 and seen["read"] > 5


@pytest.mark.parametrize("part", range(2))
def test_mutated_pickles(tmp_path: Path, part: int) -> None:
    """The zip stays whole, so that every mutation reaches the interpreter of the pickle."""
    draw = random.Random(part)
    path = tmp_path / "pytorch_model.bin"
    torch.save({f"a.{i}": torch.ones(i + 1, 4) for i in range(4)}, path, pickle_protocol=2 + 2 * part)
    with zipfile.ZipFile(path) as archive:
        records = {i.filename: archive.read(i) for i in archive.infolist()}
    name = next(n for n in records if n.endswith("data.pkl"))
    seen: Counter[str] = Counter()
    for _ in range(500):
        data = mutate_bytes(records[name], draw, len(records[name]))
        if draw.random() < 0.5:
            at = draw.randrange(len(records[name]))
            data = records[name][:at] + bytes([draw.choice(OPCODES)]) + records[name][at + draw.randint(0, 1) :]
        with zipfile.ZipFile(path, "w") as archive:
            for record, content in records.items():
                archive.writestr(record, data if record == name else content)
        attempt(path, path.read_bytes(), seen)
    assert seen["refused"] > 250 and seen["read"] > 5


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # LONG_BINPUT far out
        b"\x80\x02" + b"(" * 100000 + b"t" * 100000 + b".",  # a deep tuple
        b"\x80\x02}(" + b"K\x01" * 3 + b"u.",  # an odd number of items
        b"\x80\x02])q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s.",  # a key whose hash takes 2^60 steps
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",  # BINBYTES8 of 2^64 bytes
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",  # BYTEARRAY8 of a terabyte
        b"\x80\x02X\xff\xff\xff\x7fa.",  # a string longer than the file
        b"I" + b"9" * 100000 + b"\n.",  # a number of 100,000 digits
        b"\x80\x02ccollections\nOrderedDict\n.",
        b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.",
        b"\x80\x02U\x07storageQ.",
        b".",
        b"",
    ],
)
def test_hostile_pickles(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
    with pytest.raises(CheckpointError, match=str(path)):
        read_index(path)
