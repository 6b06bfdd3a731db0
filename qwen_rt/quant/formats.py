"""RawLinear: a weight matrix as a checkpoint stores it, readable by rows, before any device has packed it.

Two kinds. Dense: `values[n, k]` in float32/float16/bfloat16. Grouped integer, bits 4, 5, 6 or 8, groups of
`group_size` consecutive k:

    w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g])        zeros given (integers), or absent: 2^(bits-1)
    w[n, k] = scales[n, g] * codes[n, k] + mins[n, g]           mins given (GGUF K-quants and Q4_1/Q5_1)

with g = k // group_size. Codes are unsigned, 0..2^bits-1, one a byte here whatever their width (a signed format adds
2^(bits-1) to its codes); packing them tighter is the backend's.
Act-order (GPTQ g_idx not sorted): columns are stored already sorted by group and `perm` tells which input
feature column j multiplies: y = x[:, perm] @ W.T + bias. The matrix is never materialised whole unless a
caller asks for all rows, so a 72B head can be packed with a few megabytes of scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from qwen_rt.dtypes import DType, is_float
from qwen_rt.errors import CheckpointError
from qwen_rt.native import extension

Array = NDArray[Any]

WeightBits = Literal[4, 5, 6, 8]
"""Widths of the codes of grouped integers."""

WEIGHT_BITS: tuple[WeightBits, ...] = (4, 5, 6, 8)


@dataclass(frozen=True)
class LinearFormat:
    """What a weight matrix is made of. `bits` 4/5/6/8 = grouped integer, 16/32 = dense of `dtype`."""

    bits: Literal[4, 5, 6, 8, 16, 32]
    group_size: int = 0  # > 0 for grouped integer; a multiple of 16
    has_zeros: bool = False
    has_mins: bool = False
    dtype: DType | None = None  # dense only

    @property
    def grouped(self) -> bool:
        """True for the integer formats."""
        return self.bits <= 8

    def held(self, offered: Sequence[int]) -> LinearFormat:
        """What a device that takes codes of `offered` widths holds exactly: the narrowest of them that is wide enough.

        Itself when it is dense, or wider than all.
        """
        wide = [b for b in WEIGHT_BITS if b in offered and b >= self.bits]
        return replace(self, bits=wide[0]) if wide else self

    def __str__(self) -> str:
        if not self.grouped:
            return str(self.dtype)
        kind = "+min" if self.has_mins else "+zero" if self.has_zeros else ""
        return f"int{self.bits}-g{self.group_size}{kind}"


@dataclass
class LinearRows:
    """Rows [start, stop) of a RawLinear. Dense: `values` [n, K]. Grouped: the others."""

    values: Array | None = None
    codes: Array | None = None  # uint8 [n, K], one code a byte
    scales: Array | None = None  # float16 [n, G]
    zeros: Array | None = None  # uint8 [n, G] or None
    mins: Array | None = None  # float16 [n, G] or None


@dataclass(frozen=True)
class Blocks:
    """Rows as a GGUF file has them: whole blocks of one type, row after row."""

    kind: str
    file: int  # an open descriptor
    offset: int  # bytes from the start of the file
    rows: int


@dataclass(frozen=True)
class Words:
    """Rows as AutoGPTQ has them, a column each of int32 [K * bits / 32, stride]: consecutive k, lowest bits first."""

    file: int  # an open descriptor
    offset: int  # bytes from the start of the file to the first row's first word
    stride: int
    scales: Array  # float16 [stored groups, n]
    zeros: Array | None  # uint8 [stored groups, n]
    source: Array  # int64 [G]: which stored group each group is

    @property
    def rows(self) -> int:
        """How many."""
        return self.scales.shape[1]


@dataclass(frozen=True)
class Place:
    """Where a file has a matrix, row after row."""

    path: Path
    offset: int  # bytes from the start of the file
    kind: str  # "float32", "float16", "bfloat16", or a GGUF type


@dataclass
class RawLinear:
    """A linear layer (or embedding table) of shape [N, K] whose rows are read on demand."""

    name: str
    shape: tuple[int, int]  # N outputs, K inputs
    format: LinearFormat
    rows: Callable[[int, int], LinearRows]  # rows(start, stop); cheap to call many times with small spans
    bias: Array | None = None  # float32 [N]
    perm: Array | None = None  # int32 [K], see above; None = identity

    def chunks(self, elements: int, multiple: int = 1) -> Iterator[tuple[int, int, LinearRows]]:
        """(start, stop, rows) over the matrix, about `elements` weights at a time, in multiples of `multiple` rows.

        What packing reads: NaN or infinite weights, scales, minimums or bias are a CheckpointError.
        """

        self.check("bias values", self.bias)
        for start, stop in self.spans(elements, multiple):
            part = self.rows(start, stop)
            for what, t in vars(part).items():
                self.check(f"{what} of rows {start} to {stop}", t)
            yield start, stop, part

    def spans(self, elements: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """(start, stop) over the rows, as chunks() cuts them."""
        n, k = self.shape
        step = max(multiple, elements // k // multiple * multiple)
        return ((start, min(start + step, n)) for start in range(0, n, step))

    def check(self, what: str, t: Array | None) -> None:
        """CheckpointError when floats of this linear, named by `what`, hold NaN or infinity."""
        if t is not None and is_float(t.dtype) and not all_finite(t):
            raise CheckpointError(f"{self.name}: {what} hold NaN or infinity; the file is damaged")

    def stored(self, start: int, stop: int) -> list[Blocks | Words] | None:
        """Rows [start, stop) as their file has them: each tensor's part, in order.

        None where the file has them in another way or they were changed since. Nothing of them has been checked; rows()
        does that.
        """
        stored = getattr(self.rows, "stored", None)
        return stored(start, stop) if stored else None

    @property
    def place(self) -> Place | None:
        """Where the rows lie, as they are, in one file; None as for stored(). Nothing of them has been checked."""
        return getattr(self.rows, "place", None)

    def held(self, offered: Sequence[int]) -> RawLinear:
        """The same weights, exactly, in format.held(offered): wider codes around a zero point moved with them."""
        fmt = self.format.held(offered)
        if fmt == self.format:
            return self
        implied = not (fmt.has_zeros or fmt.has_mins)
        shift = (1 << (fmt.bits - 1)) - (1 << (self.format.bits - 1)) if implied else 0

        def rows(start: int, stop: int) -> LinearRows:
            part = self.rows(start, stop)
            assert part.codes is not None
            return replace(part, codes=part.codes + shift) if shift else part

        return replace(self, format=fmt, rows=rows)

    def dequantize(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """Rows [start, stop) as float32 [n, K], input features in their original order (perm undone)."""
        part = self.rows(start, self.shape[0] if stop is None else stop)
        w = dequantize_rows(part, self.format)
        if self.perm is not None:
            out = np.empty_like(w)
            out[:, self.perm] = w
            w = out
        return w


def dense_format(dtype: str) -> LinearFormat:
    """The format of a matrix of that float type."""
    return LinearFormat(32 if dtype == "float32" else 16, dtype=cast(DType, dtype))


def all_finite(a: Array) -> bool:
    """True when a float array holds no NaN and no infinity."""
    integer, exponent = _EXPONENT[a.dtype.name]
    bits = np.ascontiguousarray(a).view(integer)
    if native := extension():
        return native.all_finite(bits, exponent)
    return not ((bits & exponent) == exponent).any()


_EXPONENT = {  # bits that are all set in NaN and infinity, and nowhere else
    "float16": (np.int16, 0x7C00),
    "bfloat16": (np.int16, 0x7F80),
    "float32": (np.int32, 0x7F800000),
    "float64": (np.int64, 0x7FF0000000000000),
}


def dequantize_rows(part: LinearRows, fmt: LinearFormat) -> NDArray[np.float32]:
    """LinearRows -> float32 [n, K] in stored column order; the definition every kernel is tested against."""
    if not fmt.grouped:
        assert part.values is not None
        return part.values.astype(np.float32, copy=False)
    assert part.codes is not None and part.scales is not None
    n, k = part.codes.shape
    q = part.codes.reshape(n, -1, fmt.group_size).astype(np.float32)
    s = _wide(part.scales)
    with np.errstate(invalid="ignore", over="ignore"):  # scales of a damaged file: who packs them says so
        if part.mins is not None:
            q *= s
            q += _wide(part.mins)
        else:
            q -= _wide(part.zeros) if part.zeros is not None else np.float32(1 << (fmt.bits - 1))
            q *= s
    return q.reshape(n, k)


def _wide(a: Array) -> NDArray[np.float32]:
    """A value for each group [n, G] as float32 [n, G, 1]."""
    return a.astype(np.float32)[..., None]


@dataclass
class _Joined:
    """The rows of several linears, one under the other."""

    parts: Sequence[RawLinear]

    def __call__(self, start: int, stop: int) -> LinearRows:
        pieces = [p.rows(a, b) for p, a, b in self._pieces(start, stop)]
        if len(pieces) == 1:
            return pieces[0]

        def join(field: str) -> Array | None:
            got = [getattr(x, field) for x in pieces]
            return None if got[0] is None else np.concatenate(got)

        return LinearRows(join("values"), join("codes"), join("scales"), join("zeros"), join("mins"))

    def stored(self, start: int, stop: int) -> list[Blocks | Words] | None:
        """As RawLinear.stored."""
        pieces = [p.stored(a, b) for p, a, b in self._pieces(start, stop)]
        return None if None in pieces else [part for piece in pieces for part in piece or ()]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[RawLinear, int, int]]:
        first = 0
        for p in self.parts:
            a, b = max(start - first, 0), min(stop - first, p.shape[0])
            if a < b:
                yield p, a, b
            first += p.shape[0]


def concat_rows(parts: Sequence[RawLinear], name: str) -> RawLinear | None:
    """One RawLinear whose rows are those of `parts` in order (fused QKV, gate+up).

    None when they cannot be one matrix: formats, input sizes or act-order differ.
    """
    first = parts[0]
    for p in parts[1:]:
        same_perm = (p.perm is None and first.perm is None) or (
            p.perm is not None and first.perm is not None and np.array_equal(p.perm, first.perm)
        )
        if p.format != first.format or p.shape[1] != first.shape[1] or not same_perm:
            return None
    bias: Array | None = None
    if any(p.bias is not None for p in parts):
        bias = np.concatenate([np.zeros(p.shape[0], np.float32) if p.bias is None else p.bias for p in parts])
    shape = sum(p.shape[0] for p in parts), first.shape[1]
    return RawLinear(name, shape, first.format, _Joined(parts), bias, first.perm)
