"""GGUF v2/v3 files (little endian): metadata, tensor table, and a lazy Checkpoint over them.

Layout, after the GGUF specification (ggml, docs/gguf.md): magic, version, counts, key-value pairs, tensor table,
padding to `general.alignment`, tensor data. A header is believed only as far as the file's size bears it out:
every length, count, dimension and offset is checked before anything is allocated or read for it. Tensor data is
read with pread into short-lived buffers, so resident memory does not grow with the file.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.checkpoint.gguf_dequant import TENSOR_TYPES, U8, UNSUPPORTED_TYPES, TensorType, decode_blocks
from qwen_rt.checkpoint.layout import check_shapes
from qwen_rt.checkpoint.store import check_finite
from qwen_rt.config import ModelConfig
from qwen_rt.dtypes import host_dtype
from qwen_rt.errors import CheckpointError
from qwen_rt.native import extension
from qwen_rt.quant.formats import Blocks, LinearRows, Place, RawLinear, Words, all_finite, dequantize_rows
from qwen_rt.texts import Texts

_MAX_HEADER = 1 << 26  # bytes of metadata and tensor table; real ones have some 6 MB (the vocabulary)
_BLOCK_BYTES = 1 << 20  # read at a time where there are many strings
_MAX_NAME = 64  # bytes of a tensor name, from the specification
_MAX_KEY = 65535  # bytes of a metadata key, from the specification
_MAX_DIMS = 4
_MIN_PAIR = 8 + 1 + 4 + 1  # bytes of the smallest metadata pair and of the smallest tensor entry
_MIN_ENTRY = 8 + 1 + 4 + 8 + 4 + 8
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_DOWNLOAD = "the file is damaged, incomplete or not a GGUF model: download it again"


def _short(value: Any) -> str:
    """A value of an untrusted file, for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
        self.file = file

    def fail(self, message: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {message} (at byte {self.pos}); {_DOWNLOAD}")

    def take(self, n: int, what: str) -> bytes:
        if n > self.limit - self.pos:
            end = f"ends at {self.size}" if self.limit == self.size else f"may have a header of {self.limit} at most"
            self.fail(f"{what} takes {n} bytes, but the file {end}")
        data = self.file.read(n)
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

    def strings(self, n: int, what: str) -> Texts:
        """n strings, cut from large blocks: a vocabulary has hundreds of thousands."""
        start = self.pos
        pieces: list[bytes] = []
        lengths = [np.empty(0, np.int64)]
        while n > 0:
            block = self.file.read(min(_BLOCK_BYTES, self.limit - self.pos))
            data, cut, used = _cut_strings(block, n)
            self._go_to(self.pos + used)
            n -= len(cut)
            if n > 0:  # the next one begins the next block; if it cannot be read, string() says why
                one = self.string(what).encode()
                data, cut, n = data + one, np.append(cut, len(one)), n - 1
            pieces.append(data)
            lengths.append(cut)
        found = Texts(b"".join(pieces), np.cumsum(np.concatenate(lengths)))
        if not found.valid():
            self._go_to(start)
            for _ in range(len(found)):
                self.string(what)  # says of the first one that is not
        return found

    def _go_to(self, pos: int) -> None:
        self.pos = pos
        self.file.seek(pos)

    def value(self, key: str) -> Any:
        what = f"metadata {_short(key)}"
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

    def array(self, what: str) -> Sequence[Any]:
        kind = self.scalar("I", what)
        if kind == _ARRAY:
            self.fail(f"{what} is an array of arrays, which no Qwen model has")
        if kind == _STRING:
            n = self.count(what, each=8)
            return self.strings(n, what)
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
                self.fail(f"metadata key {_short(key)} is {'given twice' if key else 'empty'}")
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


def _cut_strings(block: bytes, n: int) -> tuple[bytes, NDArray[np.int64], int]:
    """At most n strings from the start of `block`, up to one cut off: joined, their lengths, the bytes they take."""
    if native := extension():
        data, sizes, used = native.gguf_strings(block, n)
        return data, np.frombuffer(sizes, np.int64), used
    pieces: list[bytes] = []
    length, at = struct.Struct("<Q").unpack_from, 0
    while len(pieces) < n and at + 8 <= len(block):
        stop = at + 8 + length(block, at)[0]
        if stop > len(block):
            break
        pieces.append(block[at + 8 : stop])
        at = stop
    return b"".join(pieces), np.fromiter(map(len, pieces), np.int64, len(pieces)), at


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
    """The key-value pairs of a .gguf file as stored; arrays become lists, those of strings Texts. CheckpointError."""
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
            reader.fail(f"general.alignment is {_short(alignment)}, not a power of two from 8 to 2^20")
        return GGUFHeader(metadata, reader.tensors(num_tensors, alignment))


# GGUF stem -> Hugging Face stem, of the model and of block N, by architecture.
_QWEN2 = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_QWEN2_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3_BLOCK = _QWEN2_BLOCK | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_QWEN = {"token_embd": "transformer.wte", "output_norm": "transformer.ln_f", "output": "lm_head"}
_QWEN_BLOCK = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.w1",  # Qwen-1 computes w1(x) * silu(w2(x))
    "ffn_gate": "mlp.w2",
    "ffn_down": "mlp.c_proj",
}
_NAMES = {
    "qwen": (_QWEN, _QWEN_BLOCK, "transformer.h"),
    "qwen2": (_QWEN2, _QWEN2_BLOCK, "model.layers"),
    "qwen3": (_QWEN2, _QWEN3_BLOCK, "model.layers"),
}
_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,4})\.(.+)")
_SHARD = re.compile(r"-00001-of-([0-9]{5})\.gguf$")


def translate(arch: str, name: str) -> str | None:
    """The Hugging Face name of GGUF tensor `name` (with its .weight or .bias), or None when Qwen has no such tensor."""
    top, block, prefix = _NAMES[arch]
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if match := _BLOCK.fullmatch(stem):
        inner = block.get(match[2])
        new = inner and f"{prefix}.{match[1]}.{inner}"
    else:
        new = top.get(stem)
    return f"{new}.{kind}" if new else None


class _Data:
    """The tensor data of one open file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file, self.size = _open(path)

    def read(self, offset: int, out: U8) -> None:
        """Fill `out`, contiguous bytes, from `offset`; any number of threads may read at once."""
        view = out.reshape(-1).data
        while len(view):
            try:
                n = os.preadv(self.file.fileno(), [view[: 1 << 30]], offset)
            except (OSError, ValueError) as e:
                raise CheckpointError(f"{self.path}: cannot be read ({e}); load the model again") from e
            if n == 0:
                raise CheckpointError(f"{self.path}: ends at byte {offset}, it shrank while in use; {_DOWNLOAD}")
            view, offset = view[n:], offset + n


_CHUNK = 1 << 20  # bytes of a file decoded at a time: they and their codes stay in a core's cache


@dataclass(frozen=True)
class _Rows:
    """Rows of a tensor seen as a matrix of its innermost dimension."""

    data: _Data
    tensor: GGUFTensor

    def __call__(self, start: int, stop: int) -> LinearRows:
        """Decoded. CheckpointError if not finite."""
        tensor, kind, k = self.tensor, self.tensor.type, self.tensor.shape[-1]
        n, offset, row_bytes = self._span(start, stop)
        if kind.codec is None:
            values = np.empty((n, k), host_dtype(str(kind.format)))
            self.data.read(offset, values.view(np.uint8))
            check_finite(values, f"tensor {tensor.name!r}", self.data.path)
            return LinearRows(values=values)
        codes = np.empty((n, k), np.uint8)
        scales = np.empty((n, k // kind.format.group_size), np.float16)
        mins = np.empty_like(scales) if kind.format.has_mins else None
        step = max(1, _CHUNK // row_bytes)
        scratch = np.empty(min(step, n) * row_bytes, np.uint8)
        for i in range(0, n, step):
            j = min(i + step, n)
            raw = scratch[: (j - i) * row_bytes]
            self.data.read(offset + i * row_bytes, raw)
            decode_blocks(kind, raw, codes[i:j], scales[i:j], None if mins is None else mins[i:j])
        if not all(a is None or all_finite(a) for a in (scales, mins)):
            raise CheckpointError(
                f"{self.data.path}: tensor {tensor.name!r} has scales that are NaN, infinite or beyond float16 in rows "
                f"{start} to {stop}; {_DOWNLOAD}"
            )
        return LinearRows(codes=codes, scales=scales, mins=mins)

    def stored(self, start: int, stop: int) -> list[Blocks | Words] | None:
        """As RawLinear.stored; None of a dense type, and of a file that was closed."""
        if self.tensor.type.codec is None or self.data.file.closed:
            return None
        n, offset, _ = self._span(start, stop)
        return [Blocks(self.tensor.type.name, self.data.file.fileno(), offset, n)]

    @property
    def place(self) -> Place:
        """As RawLinear.place."""
        kind = self.tensor.type
        return Place(self.data.path, self.tensor.offset, str(kind.format) if kind.codec is None else kind.name)

    def _span(self, start: int, stop: int) -> tuple[int, int, int]:
        """Rows, where their bytes are in the file, and bytes of one."""
        total = math.prod(self.tensor.shape[:-1])
        if not 0 <= start <= stop <= total:
            raise IndexError(f"{self.tensor.name}: rows {start} to {stop} of {total}")
        row_bytes = self.tensor.nbytes // total
        return stop - start, self.tensor.offset + start * row_bytes, row_bytes


def _shards(path: Path, header: GGUFHeader) -> list[tuple[Path, GGUFHeader]]:
    """The files of a model of which `path` is the first, in order."""
    count, number = header.metadata.get("split.count", 1), header.metadata.get("split.no", 0)
    if type(count) is not int or type(number) is not int:
        raise CheckpointError(
            f"{path}: split.count {_short(count)} and split.no {_short(number)} must be integers; {_DOWNLOAD}"
        )
    if count <= 1:
        return [(path, header)]
    match = _SHARD.search(path.name)
    if number != 0 or match is None or int(match[1]) != count:
        raise CheckpointError(
            f"{path}: part {number + 1} of a model split in {count} files; keep their names "
            f"(NAME-00001-of-{count:05d}.gguf ...) in one directory and give the path of the first"
        )
    shards = [(path, header)]
    for i in range(1, count):
        sibling = path.with_name(f"{path.name[: match.start()]}-{i + 1:05d}-of-{count:05d}.gguf")
        part = read_header(sibling)
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (i, count):
            raise CheckpointError(f"{sibling}: does not say that it is part {i + 1} of {count}; {_DOWNLOAD}")
        shards.append((sibling, part))
    total = header.metadata.get("split.tensors.count")
    found = sum(len(part.tensors) for _, part in shards)
    if total is not None and total != found:
        raise CheckpointError(f"{path}: {found} tensors in {count} files, {total} were announced; {_DOWNLOAD}")
    return shards


class GGUFCheckpoint(Checkpoint):
    """A Qwen model in a .gguf file, or in several of which `path` is the first."""

    def __init__(self, path: str | Path, config: ModelConfig | None = None) -> None:
        """Read and check the headers; `config` replaces what the metadata says. CheckpointError or ConfigError."""
        path = Path(path)
        self.source = str(path)
        header = read_header(path)
        self.metadata = header.metadata
        arch = header.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in _NAMES:
            raise CheckpointError(f"{path}: architecture {_short(arch)} is not supported; {', '.join(_NAMES)} are")
        self._tensors: dict[str, tuple[_Data, GGUFTensor]] = {}
        self._files: list[_Data] = []
        try:
            for file, part in _shards(path, header):
                self._add(arch, _Data(file), part)
            self.config = config or ModelConfig.from_gguf(header.metadata | self._facts(arch))
            check_shapes(self.config, {name: t.shape for name, (_, t) in self._tensors.items()}, self.source)
        except BaseException:
            self.close()
            raise

    def _add(self, arch: str, data: _Data, header: GGUFHeader) -> None:
        self._files.append(data)
        for name, tensor in header.tensors.items():
            new = translate(arch, name)
            if new is None:
                raise CheckpointError(f"{data.path}: tensor {name!r} is no part of a {arch} model; {_DOWNLOAD}")
            if new in self._tensors:
                raise CheckpointError(f"{data.path}: tensor {name!r} is in another part as well; {_DOWNLOAD}")
            if tensor.offset + tensor.nbytes > data.size:
                raise CheckpointError(f"{data.path}: shrank while it was being opened; {_DOWNLOAD}")
            self._tensors[new] = data, tensor

    def _facts(self, arch: str) -> dict[str, Any]:
        """What the configuration needs to know and only the tensor table says."""
        table = _NAMES[arch][0]["token_embd"] + ".weight"
        if table not in self._tensors:
            raise CheckpointError(f"{self.source}: there is no tensor 'token_embd.weight'; {_DOWNLOAD}")
        return {
            "qwen_rt.vocab_size": self._tensors[table][1].shape[0],
            "qwen_rt.has_output": "lm_head.weight" in self._tensors,
        }

    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear's name and shape [N, K]."""
        return {
            name.removesuffix(".weight"): (t.shape[0], t.shape[1])
            for name, (_, t) in self._tensors.items()
            if len(t.shape) == 2
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every norm weight's name and shape."""
        return {
            name: t.shape for name, (_, t) in self._tensors.items() if len(t.shape) == 1 and not name.endswith(".bias")
        }

    def linear(self, name: str) -> RawLinear:
        """The linear `name`; its rows are decoded from the file when asked for. CheckpointError when absent."""
        data, t = self._find(f"{name}.weight", ndim=2)
        bias = self._vector(f"{name}.bias") if f"{name}.bias" in self._tensors else None
        return RawLinear(name, (t.shape[0], t.shape[1]), t.type.format, _Rows(data, t), bias)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The norm weight `name` as float32 [n]. CheckpointError when absent or not finite."""
        return self._vector(name)

    def nbytes(self) -> int:
        """Bytes of tensor data in the files."""
        return sum(t.nbytes for _, t in self._tensors.values())

    def close(self) -> None:
        """Close the files; reading rows of a RawLinear afterwards is a CheckpointError."""
        self.metadata = None
        for data in self._files:
            data.file.close()

    def _find(self, name: str, ndim: int) -> tuple[_Data, GGUFTensor]:
        found = self._tensors.get(name)
        if found is None or len(found[1].shape) != ndim:
            raise CheckpointError(
                f"{self.source}: there is no {ndim}-dimensional tensor {name!r}; see linears(), tensors()"
            )
        return found

    def _vector(self, name: str) -> NDArray[np.float32]:
        data, t = self._find(name, ndim=1)
        return dequantize_rows(_Rows(data, t)(0, 1), t.type.format).reshape(-1)
