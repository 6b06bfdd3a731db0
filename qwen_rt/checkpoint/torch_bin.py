"""PyTorch .bin files (zip format of torch.save) as data: the pickle is interpreted, never executed.

Only what a state dict is made of is understood (containers, numbers, strings, storages, rebuilt tensors); the name of
anything else is an error before it is looked up. Tensors become spans of the file, so nothing is read at opening.
"""

from __future__ import annotations

import pickletools
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_rt.checkpoint.store import StoredTensor
from qwen_rt.dtypes import host_dtype
from qwen_rt.errors import CheckpointError

STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
CALLS = {  # what a REDUCE may name
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}
MAX_PICKLE = 16 << 20  # bytes; a state dict's pickle holds names and shapes only
PUSHES = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
}
PUSH_ARG = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip


@dataclass(frozen=True)
class _Global:
    name: str  # "module name", never imported


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]


def read_index(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a .bin file. Raises CheckpointError for a malformed file or a pickle that is not plain data."""
    records, pickle = _read_zip(path)
    try:
        state = _interpret(pickle, path)
    except CheckpointError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _bad(path, f"its pickle is damaged ({type(error).__name__}: {error})") from error
    if not isinstance(state, dict):
        raise _bad(path, "it does not hold a state dict")
    entries = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise _bad(path, f"{name!r} is not a tensor")
        if value.storage.key not in records:
            raise _bad(path, f"the data of {name!r} is missing")
        start, size = records[value.storage.key]
        width = host_dtype(value.storage.dtype).itemsize
        entry = StoredTensor(path, start + value.offset * width, value.storage.dtype, value.shape)
        if value.storage.numel * width > size or value.offset * width + entry.nbytes > value.storage.numel * width:
            raise _bad(path, f"{name!r} reaches beyond its storage")
        entries[name] = entry
    return entries


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a usable PyTorch checkpoint: {what}")


def _read_zip(path: Path) -> tuple[dict[str, tuple[int, int]], bytes]:
    """(storage key -> (file offset, bytes), the pickle)."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                raise _bad(
                    path, "not the zip format of torch.save (PyTorch >= 1.6); load and save it again with PyTorch"
                )
            spans: list[tuple[int, int, str]] = []
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    if (
                        info.compress_type != zipfile.ZIP_STORED
                        or info.flag_bits & 1
                        or info.file_size != info.compress_size
                    ):
                        raise _bad(path, f"record {info.filename!r} is compressed or encrypted")
                    file.seek(info.header_offset)
                    local = file.read(30)
                    if len(local) < 30 or local[:4] != b"PK\x03\x04":
                        raise _bad(path, f"record {info.filename!r} has no local header")
                    start = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
                    if start + info.file_size > size:
                        raise _bad(path, f"record {info.filename!r} lies outside of the file (truncated?)")
                    spans.append((start, info.file_size, info.filename))
            end = 0
            for start, length, name in sorted(spans):
                if start < end:
                    raise _bad(path, f"record {name!r} overlaps another")
                end = start + length
            places = {name: (start, length) for start, length, name in spans}
            if len(places) != len(spans):
                raise _bad(path, "two records have the same name")
            pickles = [name for name in places if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise _bad(path, "it has no data.pkl")
            root = pickles[0].removesuffix("data.pkl")
            if places[pickles[0]][1] > MAX_PICKLE:
                raise _bad(path, "its data.pkl is absurdly large")

            def content(name: str) -> bytes:
                file.seek(places[name][0])
                return file.read(places[name][1])

            order = f"{root}byteorder"
            if order in places and places[order][1] <= 16 and content(order) != b"little":
                raise _bad(path, "its tensors are big-endian")
            prefix = f"{root}data/"
            return {n.removeprefix(prefix): p for n, p in places.items() if n.startswith(prefix)}, content(pickles[0])
    except CheckpointError:
        raise
    except (OSError, zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, struct.error, NotImplementedError) as error:
        raise _bad(path, f"damaged zip ({error})") from error


def _interpret(data: bytes, path: Path) -> Any:
    """Run the pickle's stack machine over plain data; returns the object it describes."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    arg: Any
    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name
        if name in PUSH_ARG:
            stack.append(arg)
        elif name in PUSHES:
            stack.append(PUSHES[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            items = tuple(stack[-count:])
            if len(items) != count:
                raise IndexError("stack underflow")
            del stack[-count:]
            stack.append(items)
        elif name in ("APPEND", "APPENDS"):
            values = [stack.pop()] if name == "APPEND" else since_mark()
            if not isinstance(stack[-1], list):
                raise TypeError("APPEND to something else than a list")
            stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            pairs = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else since_mark()
            if not isinstance(stack[-1], dict) or len(pairs) % 2:
                raise TypeError("SETITEM on something else than a dict")
            for key, value in zip(pairs[0::2], pairs[1::2], strict=True):
                if not isinstance(key, str | int):
                    raise TypeError("a key that is not a string")
                if key in stack[-1]:
                    raise ValueError(f"two entries named {key!r}")
                stack[-1][key] = value
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                arg = f"{module} {attribute}"
            known = arg in CALLS or (arg.startswith("torch ") and arg[6:] in STORAGES)
            if not known:
                raise _bad(
                    path, f"its pickle names {arg.replace(' ', '.')!r}, which is not plain weights; nothing was run"
                )
            stack.append(_Global(arg))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            args, call = stack.pop(), stack.pop()
            stack.append(_rebuild(call, args))
        elif name == "BUILD":
            stack.pop()  # a state dict's own attributes (_metadata): not needed
            if not isinstance(stack[-1], dict):
                raise TypeError("BUILD on something else than a dict")
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise _bad(path, f"its pickle uses {name}, which plain weights do not; nothing was run")
    raise ValueError("no STOP")


def _storage(pid: Any) -> _Storage:
    """The persistent id ("storage", type, key, location, elements)."""
    kind, storage, key, _, numel = pid
    if kind != "storage" or not isinstance(storage, _Global) or not isinstance(key, str) or not _natural(numel):
        raise ValueError("bad storage")
    return _Storage(STORAGES[storage.name.removeprefix("torch ")], key, numel)


def _rebuild(call: Any, args: Any) -> Any:
    """What the three allowed calls would have made."""
    if not isinstance(call, _Global) or not isinstance(args, tuple):
        raise TypeError("REDUCE of something else than a known name")
    if call.name == "collections OrderedDict" and not args:
        return {}
    if call.name == "torch._utils _rebuild_parameter" and isinstance(args[0], _Tensor):
        return args[0]
    if call.name != "torch._utils _rebuild_tensor_v2":
        raise TypeError("bad call")
    storage, offset, shape, stride = args[:4]
    if not isinstance(storage, _Storage) or not all(isinstance(x, tuple) for x in (shape, stride)):
        raise TypeError("bad tensor")
    if len(shape) != len(stride) or not all(_natural(x) for x in (offset, *shape, *stride)):
        raise ValueError("bad tensor")
    step = 1
    for n, s in zip(reversed(shape), reversed(stride), strict=True):
        if n > 1 and s != step:
            raise ValueError("a tensor that is not contiguous: save it with .contiguous()")
        step *= n
    return _Tensor(storage, offset, shape)


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
