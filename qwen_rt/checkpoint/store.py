"""TensorStore: named tensors at known places of files, read span by span.

Reads are positioned reads into fresh memory rather than a map: resident memory is what the caller asked for, and a
file cut short under our feet is an error instead of a bus fault.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from qwen_rt.dtypes import host_dtype
from qwen_rt.errors import CheckpointError
from qwen_rt.native import extension
from qwen_rt.quant.formats import Array, all_finite

POOLED = 1 << 18  # bytes from which on what is read takes the place of what was read before


@dataclass(frozen=True)
class StoredTensor:
    """Where a row-major little-endian tensor lies; readers have checked that it lies within its file."""

    path: Path
    offset: int  # bytes from the start of the file
    dtype: str  # as dtypes.host_dtype calls it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * host_dtype(self.dtype).itemsize


class TensorStore:
    """The tensors of one checkpoint; files are opened at the first read."""

    def __init__(self, entries: dict[str, StoredTensor]) -> None:
        self.entries = entries
        self._files: dict[Path, FileIO] = {}
        self._lock = Lock()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __getitem__(self, name: str) -> StoredTensor:
        return self.entries[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows [start, stop) of the first axis (all by default), as stored; not for scalars. CheckpointError."""
        entry = self.entries[name]
        stop = entry.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {name}, which has {entry.shape[0]}")
        dtype = host_dtype(entry.dtype)
        out = _memory((stop - start, *entry.shape[1:]), dtype)
        if out.size:
            row = math.prod(entry.shape[1:]) * dtype.itemsize
            self._fill(entry, out.reshape(-1).view(np.uint8).data, entry.offset + start * row, name)
        return out

    def columns(self, name: str, start: int, stop: int) -> Array:
        """Columns [start, stop) of a matrix, as stored. CheckpointError."""
        entry = self.entries[name]
        rows, width = entry.shape
        if not 0 <= start <= stop <= width:
            raise IndexError(f"columns {start}:{stop} of {name}, which has {width}")
        dtype = host_dtype(entry.dtype)
        out = _memory((rows, stop - start), dtype)
        for i in range(rows if out.size else 0):
            self._fill(entry, out[i].view(np.uint8).data, entry.offset + (i * width + start) * dtype.itemsize, name)
        return out

    def floats(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """read(), refusing a value that is not finite."""
        values = self.read(name, start, stop)
        check_finite(values, name, self.entries[name].path)
        return values

    def descriptor(self, name: str) -> int:
        """The open file that has a tensor, until close(). CheckpointError."""
        path = self.entries[name].path
        try:
            with self._lock:
                if path not in self._files:
                    self._files[path] = FileIO(path)
                return self._files[path].fileno()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read {name}: {error}") from error

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def _fill(self, entry: StoredTensor, view: memoryview, offset: int, name: str) -> None:
        fd = self.descriptor(name)
        try:
            done = 0
            while done < len(view):
                got = os.preadv(fd, [view[done:]], offset + done)
                if not got:
                    raise CheckpointError(f"{entry.path}: ended inside {name}; the file changed while it was read")
                done += got
        except OSError as error:
            raise CheckpointError(f"{entry.path}: cannot read {name}: {error}") from error


def _memory(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised array; a large one where an earlier one was, if native code keeps such memory.

    Fresh memory is cleared by the system, page by page, which takes longer than reading a file into it.
    """
    size = math.prod(shape) * dtype.itemsize
    native = extension()
    if native is None or size < POOLED:
        return np.empty(shape, dtype)
    return np.frombuffer(native.Buffer(size), dtype).reshape(shape)


def check_finite(values: Array, name: str, source: object) -> None:
    """Raise CheckpointError naming the tensor when a value is NaN or infinite."""
    if not all_finite(values):
        with np.errstate(invalid="ignore"):
            count = np.count_nonzero(~np.isfinite(values))
        raise CheckpointError(
            f"{source}: {name} has {count} NaN or infinite values; the file is damaged, fetch it again"
        )
