"""Safetensors headers, checked whole before a byte of data is read.

Layout: uint64 header length, JSON header, data. The tensors must tile the data exactly: no hole, no overlap.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qwen_rt.checkpoint.store import StoredTensor
from qwen_rt.dtypes import host_dtype
from qwen_rt.errors import CheckpointError

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
MAX_HEADER = 16 << 20  # bytes; the largest Qwen needs less than one MiB
MAX_DIMS = 8


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file. Raises CheckpointError when the header is not wholly consistent."""

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: not a valid safetensors file: {what}; fetch it again")

    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise bad(f"truncated: its header claims {length} bytes, the file has {size}")
            if length > MAX_HEADER:
                raise bad(f"absurd header length {length}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise bad("duplicate keys in the header")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise bad(f"header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise bad("header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad("__metadata__ is not a map of strings")

    data = 8 + length
    entries: dict[str, StoredTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise bad(f"{name!r} is not described by dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise bad(f"{name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}")
        if not _naturals(shape) or len(shape) > MAX_DIMS:
            raise bad(f"{name!r} has an absurd shape")
        if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data:
            raise bad(f"{name!r} lies outside of the file (truncated?)")
        if math.prod(shape) * host_dtype(dtype).itemsize != offsets[1] - offsets[0]:
            raise bad(f"{name!r} has shape {shape} of {entry['dtype']}, but {offsets[1] - offsets[0]} bytes")
        entries[name] = StoredTensor(path, data + offsets[0], dtype, tuple(shape))
        spans.append((offsets[0], offsets[1], name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise bad(f"{name!r} {'overlaps the tensor before it' if start < end else 'follows a hole'}")
        end = stop
    if end != size - data:
        raise bad(f"{size - data - end} bytes follow the last tensor")
    return entries


def _naturals(value: Any) -> bool:
    """True for a list of integers from 0 to 2^63 - 1 (booleans excluded)."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)
