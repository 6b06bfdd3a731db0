"""GGUF v2/v3 files (little endian): metadata, tensor table, and a lazy Checkpoint over them.

Layout, after the GGUF specification (ggml, docs/gguf.md): magic, version, counts, key-value pairs, tensor table,
padding to `general.alignment`, tensor data. A header is believed only as far as the file's size bears it out:
every length, count, dimension and offset is checked before anything is allocated or read for it. Tensor data is
read with pread into short-lived buffers, so resident memory does not grow with the file.
"""

from __future__ import annotations

import math
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from qwen_rt.checkpoint.gguf_dequant import TENSOR_TYPES, UNSUPPORTED_TYPES, TensorType
from qwen_rt.errors import CheckpointError

_MAX_HEADER = 1 << 26  # bytes of metadata and tensor table; real ones have some 6 MB (the vocabulary)
_MAX_NAME = 64  # bytes of a tensor name, from the specification
_MAX_KEY = 65535  # bytes of a metadata key, from the specification
_MAX_DIMS = 4
_MIN_PAIR = 8 + 1 + 4 + 1  # bytes of the smallest metadata pair and of the smallest tensor entry
_MIN_ENTRY = 8 + 1 + 4 + 8 + 4 + 8
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_DOWNLOAD = "the file is damaged, incomplete or not a GGUF model: download it again"


@dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table, checked against the file."""

    name: str
    shape: tuple[int, ...]  # outermost first: [N, K] of a matrix (the file stores the reverse)
    type: TensorType
    offset: int  # bytes from the start of the file
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Everything before the tensor data."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


class _Reader:
    """A cursor over the header of one file that refuses to pass the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size, self.pos = path, size, 0
        self.limit = min(size, _MAX_HEADER)
        self.read = file.read

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {message} (at byte {self.pos}); {_DOWNLOAD}")

    def take(self, n: int, what: str) -> bytes:
        if n > self.limit - self.pos:
            end = f"ends at {self.size}" if self.limit == self.size else f"may have a header of {self.limit} at most"
            self.fail(f"{what} takes {n} bytes, but the file {end}")
        data = self.read(n)
        if len(data) != n:
            self.fail(f"{what} could not be read, the file shrank while it was being read")
        self.pos += n
        return data

    def scalar(self, fmt: str, what: str) -> Any:
        return struct.unpack("<" + fmt, self.take(struct.calcsize("<" + fmt), what))[0]

    def count(self, what: str, each: int) -> int:
        """A u64 number of items of at least `each` bytes: no more than the rest of the header can hold."""
        n = self.scalar("Q", what)
        if n > (self.limit - self.pos) // each:
            self.fail(f"{what} is {n}, more than {self.limit - self.pos} remaining bytes of header can hold")
        return n

    def string(self, what: str, longest: int = _MAX_HEADER) -> str:
        n = self.scalar("Q", what)
        if n > longest:
            self.fail(f"{what} has a length of {n}, at most {longest} bytes are allowed")
        raw = self.take(n, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as e:
            self.fail(f"{what} is not UTF-8 ({e.reason})")

    def value(self, key: str) -> Any:
        what = f"metadata {key!r}"
        kind = self.scalar("I", what)
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            self.fail(f"{what} has the unknown value type {kind}")
        value = self.scalar(_SCALARS[kind], what)
        if kind == _BOOL:
            if value > 1:
                self.fail(f"{what} is a bool of value {value}")
            return bool(value)
        return value

    def array(self, what: str) -> list[Any]:
        kind = self.scalar("I", what)
        if kind == _ARRAY:
            self.fail(f"{what} is an array of arrays, which no Qwen model has")
        if kind == _STRING:
            n = self.count(what, each=8)
            return [self.string(what) for _ in range(n)]
        if kind not in _SCALARS:
            self.fail(f"{what} is an array of the unknown value type {kind}")
        item = np.dtype("<" + _SCALARS[kind])
        n = self.count(what, each=item.itemsize)
        values = np.frombuffer(self.take(n * item.itemsize, what), item)
        if kind == _BOOL:
            if n and values.max() > 1:
                self.fail(f"{what} has a bool of value {values.max()}")
            values = values.astype(bool)
        return values.tolist()

    def metadata(self, n: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for i in range(n):
            key = self.string(f"key {i} of {n}", _MAX_KEY)
            if not key or key in out:
                self.fail(f"metadata key {key!r} is {'given twice' if key else 'empty'}")
            out[key] = self.value(key)
        return out

    def tensors(self, n: int, alignment: int) -> dict[str, GGUFTensor]:
        """The tensor table; offsets become absolute and are checked for range, alignment and overlap."""
        table: dict[str, tuple[tuple[int, ...], TensorType, int, int]] = {}
        for i in range(n):
            name = self.string(f"name of tensor {i} of {n}", _MAX_NAME)
            if not name or name in table:
                self.fail(f"tensor name {name!r} is {'given twice' if name else 'empty'}")
            table[name] = self._entry(name, alignment)
        base = -(-self.pos // alignment) * alignment
        end, last = base, "the header"
        out: dict[str, GGUFTensor] = {}
        for name, (shape, kind, offset, nbytes) in sorted(table.items(), key=lambda item: item[1][2]):
            start = base + offset
            if start < end:
                self.fail(f"tensor {name!r} overlaps {last}")
            end, last = start + nbytes, f"tensor {name!r}"
            if end > self.size:
                self.fail(f"tensor {name!r} takes bytes {start} to {end}, but the file ends at {self.size}")
            out[name] = GGUFTensor(name, shape, kind, start, nbytes)
        return out

    def _entry(self, name: str, alignment: int) -> tuple[tuple[int, ...], TensorType, int, int]:
        """(shape, type, relative offset, bytes) of one tensor."""
        what = f"tensor {name!r}"
        ndim = self.scalar("I", what)
        if not 1 <= ndim <= _MAX_DIMS:
            self.fail(f"{what} has {ndim} dimensions, 1 to {_MAX_DIMS} are allowed")
        dims = struct.unpack(f"<{ndim}Q", self.take(8 * ndim, what))
        kind_id, offset = self.scalar("I", what), self.scalar("Q", what)
        kind = TENSOR_TYPES.get(kind_id)
        if kind is None:
            known = ", ".join(t.name for t in TENSOR_TYPES.values())
            raise CheckpointError(
                f"{self.path}: {what} has type {UNSUPPORTED_TYPES.get(kind_id, kind_id)}, which is not supported; "
                f"use a file made of {known}"
            )
        if 0 in dims or dims[0] % kind.block or math.prod(dims) // kind.block * kind.nbytes > self.size:
            self.fail(f"{what} cannot have dimensions {list(dims)} of {kind.name} in a file of {self.size} bytes")
        if offset % alignment:
            self.fail(f"{what} has offset {offset}, not a multiple of the alignment {alignment}")
        return dims[::-1], kind, offset, math.prod(dims) // kind.block * kind.nbytes


def _open(path: Path) -> tuple[BinaryIO, int]:
    """A regular file and its size."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{path}: not a regular file; give the path of a .gguf file")
        return path.open("rb"), info.st_size
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be opened ({e.strerror}); check the path and its permissions") from e


def _start(path: Path, file: BinaryIO, size: int) -> tuple[_Reader, int, dict[str, Any]]:
    """A reader placed at the tensor table, the number of tensors, the metadata."""
    reader = _Reader(path, file, size)
    if reader.take(4, "the magic number") != b"GGUF":
        reader.fail("the file does not start with 'GGUF'")
    version = reader.scalar("I", "the version")
    if version in (0x02000000, 0x03000000):
        raise CheckpointError(f"{path}: a big-endian GGUF file; convert it to little endian (gguf-convert-endian)")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version} is not supported (2 and 3 are); convert the model again")
    num_tensors = reader.count("the number of tensors", each=_MIN_ENTRY)
    num_pairs = reader.count("the number of metadata pairs", each=_MIN_PAIR)
    return reader, num_tensors, reader.metadata(num_pairs)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The key-value pairs of a .gguf file, keys and values as stored; arrays become lists. Raises CheckpointError."""
    file, size = _open(Path(path))
    with file:
        return _start(Path(path), file, size)[2]


def read_header(path: str | Path) -> GGUFHeader:
    """Metadata and the checked tensor table of one .gguf file. Raises CheckpointError."""
    file, size = _open(Path(path))
    with file:
        reader, num_tensors, metadata = _start(Path(path), file, size)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            reader.fail(f"general.alignment is {alignment!r}, not a power of two from 8 to 2^20")
        return GGUFHeader(metadata, reader.tensors(num_tensors, alignment))
