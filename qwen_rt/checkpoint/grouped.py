"""What the GPTQ and AWQ readers share: the stored tensors of one linear, and the regrouping to RawLinear's rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from qwen_rt.checkpoint.store import TensorStore, check_finite
from qwen_rt.config import QuantConfig
from qwen_rt.dtypes import FLOATS
from qwen_rt.errors import CheckpointError
from qwen_rt.quant.formats import Array, Blocks, LinearFormat, LinearRows, RawLinear, Words
from qwen_rt.quant.packing import fit_group

HELD = 16 << 20
"""Bytes of words up to which they are read whole: a table's, read at once, would cost memory and its clearing."""


class PackedParts:
    """The packed tensors of the linear read last.

    Both layouts pack along or across K so that a row of W is a column of the file: the tensors are read whole, once,
    and kept until their last row was asked for or another linear comes.
    """

    def __init__(self, store: TensorStore) -> None:
        self.store = store
        self._slot: tuple[str, dict[str, Array]] = ("", {})
        self._lock = Lock()

    def get(self, name: str, wanted: Sequence[str]) -> dict[str, Array]:
        """At least these of the tensors qweight, scales and qzeros of the linear `name`."""
        with self._lock:
            if self._slot[0] != name:
                self._slot = (name, {})  # let go of the old before reading the new
            held = self._slot[1]
            for part in wanted:
                if part not in held:
                    held[part] = self.store.read(f"{name}.{part}")
            return held

    def release(self, name: str) -> None:
        """Forget the tensors of `name`."""
        with self._lock:
            if self._slot[0] == name:
                self._slot = ("", {})


def check_parts(
    store: TensorStore, name: str, qweight: tuple[int, ...], shape: tuple[int, int], quant: QuantConfig
) -> None:
    """Check shapes and dtypes of a quantised linear's tensors from headers alone. Raises CheckpointError."""
    n, k = shape
    groups = 1 if quant.group_size == -1 else math.ceil(k / quant.group_size)
    want: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "qweight": (("int32",), qweight),
        "qzeros": (("int32",), (groups, n * quant.bits // 32)),
        "scales": (FLOATS, (groups, n)),
        "g_idx": (("int32",), (k,)),
        "bias": (FLOATS, (n,)),
    }
    stored = store[f"{name}.qweight"].shape
    if len(stored) != 2 or 0 in stored:
        raise CheckpointError(f"{name}.qweight has shape {list(stored)}; it must be a matrix that is not empty")
    if n * quant.bits % 32:
        raise CheckpointError(f"{name}: {n} outputs do not fill whole int32 words of zero points")
    for part, (dtypes, expected) in want.items():
        full = f"{name}.{part}"
        if full not in store:
            if part in ("g_idx", "bias"):
                continue
            raise CheckpointError(f"{full} is missing: the linear {name} is incomplete, fetch the checkpoint again")
        entry = store[full]
        if entry.dtype not in dtypes or entry.shape != expected:
            raise CheckpointError(
                f"{entry.path}: {full} is {entry.dtype} {list(entry.shape)}; with {quant.bits} bits and group size "
                f"{quant.group_size} it must be {dtypes[0]} {list(expected)}"
            )


def regroup(
    name: str, g_idx: Array | None, shape: tuple[int, int], quant: QuantConfig
) -> tuple[int, Array, Array | None]:
    """(group size, source group of each group, perm or None), by the rules of quant/formats.py.

    Columns are sorted by group (stable). Groups of uneven or of great length are cut into equal ones that repeat
    their scale: a short last group, group -1, and act-order all come out as one case.
    """
    k = shape[1]
    size = k if quant.group_size == -1 else quant.group_size
    plain = np.arange(k, dtype=np.int32) // size
    perm = None
    if g_idx is None:
        g_idx = plain
    elif not np.array_equal(g_idx, plain):
        if int(g_idx.min()) < 0 or int(g_idx.max()) > int(plain[-1]):
            raise CheckpointError(f"{name}.g_idx names groups outside of 0..{int(plain[-1])}; the file is damaged")
        order = np.argsort(g_idx, kind="stable")
        g_idx = g_idx[order]
        if not np.array_equal(order, np.arange(k)):
            perm = order.astype(np.int32)
    group = fit_group(math.gcd(*np.unique(g_idx, return_counts=True)[1].tolist()))
    if group is None:
        raise CheckpointError(
            f"{name}: its groups of {k} inputs (group size {quant.group_size}) cannot be cut into equal ones of a "
            "multiple of 16 inputs; quantise the model again with a group size that divides them"
        )
    return group, g_idx[::group].astype(np.int64), perm


Columns = Callable[[Array, int, int], Array]
"""(packed tensor, first, last) -> one value an element, [last - first, rows of the tensor]."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a matrix whose outputs are columns of the packed tensors `parts` keeps."""

    name: str
    shape: tuple[int, int]
    path: Path
    parts: PackedParts
    codes: Columns
    zeros: Columns | None  # None: the implied zero point
    source: Array | None  # int64 [G]: the stored group of each; None: one after the other
    columns: Array | None  # int64 [K]: inputs in the order of their groups, where that is another
    words: bool  # packed along K, as quant.formats.Words is

    def __call__(self, start: int, stop: int) -> LinearRows:
        """Decoded. CheckpointError if not finite."""
        with self._parts(stop, codes=True) as part:
            code = self.codes(*self._words(part, start, stop))
            scale = np.ascontiguousarray(_half(part["scales"][:, start:stop]).T)
            check_finite(scale, f"{self.name}.scales", self.path)
            zero = None if self.zeros is None else self.zeros(part["qzeros"], start, stop).astype(np.uint8, "C")
        if self.columns is not None:
            code = code.take(self.columns, 1)
        if self.source is not None:
            scale = scale.take(self.source, 1)
            zero = zero.take(self.source, 1) if zero is not None else None
        return LinearRows(codes=code, scales=scale, zeros=zero)

    def stored(self, start: int, stop: int) -> list[Blocks | Words] | None:
        """As RawLinear.stored; None where words do not hold consecutive inputs of one group."""
        if not self.words or self.columns is not None:
            return None
        store, qweight = self.parts.store, f"{self.name}.qweight"
        with self._parts(stop, codes=False) as part:
            scales = _half(part["scales"][:, start:stop])
            zeros = None
            if self.zeros is not None:
                zeros = self.zeros(part["qzeros"], start, stop).T.astype(np.uint8, "C")
            source = np.arange(len(scales)) if self.source is None else self.source
        offset = store[qweight].offset + start * 4
        return [Words(store.descriptor(qweight), offset, store[qweight].shape[1], scales, zeros, source)]

    @contextmanager
    def _parts(self, stop: int, codes: bool) -> Iterator[dict[str, Array]]:
        """The packed tensors; forgotten after the last row."""
        wanted = ["qweight", "scales"] if codes and not self._in_strips else ["scales"]
        yield self.parts.get(self.name, wanted if self.zeros is None else [*wanted, "qzeros"])
        if stop == self.shape[0]:
            self.parts.release(self.name)

    @property
    def _in_strips(self) -> bool:
        return self.words and self.parts.store[f"{self.name}.qweight"].nbytes > HELD

    def _words(self, part: dict[str, Array], start: int, stop: int) -> tuple[Array, int, int]:
        """Words that hold outputs [start, stop), and which those are among what they hold."""
        if self._in_strips:
            return self.parts.store.columns(f"{self.name}.qweight", start, stop), 0, stop - start
        return part["qweight"], start, stop


def _half(scales: Array) -> NDArray[np.float16]:
    """As float16; not finite where it was not, or is beyond that."""
    with np.errstate(over="ignore", invalid="ignore"):
        return scales.astype(np.float16, copy=False)


def grouped_linear(
    name: str,
    shape: tuple[int, int],
    quant: QuantConfig,
    parts: PackedParts,
    store: TensorStore,
    codes: Columns,
    zeros: Columns,
    bias: Array | None,
    words: bool = False,
) -> RawLinear:
    """The RawLinear over packed tensors: `codes` of qweight, `zeros` of qzeros; `words`: codes are packed along K."""
    g_idx = store.read(f"{name}.g_idx") if f"{name}.g_idx" in store else None
    group, source, perm = regroup(name, g_idx, shape, quant)
    entry = store[f"{name}.qzeros"]
    stored = store.read(f"{name}.qzeros")
    if (stored == stored[0, 0]).all():
        stored = stored[:1, :1]  # one word says what all say
    every_zero = zeros(stored, 0, stored.shape[1] * 32 // quant.bits)
    if int(every_zero.max()) > 255:
        raise CheckpointError(f"{entry.path}: {name} has a zero point of 256, more than 8 bits hold; quantise it again")
    # The data decide, not the config's "sym": a wrong flag would be silent garbage.
    has_zeros = bool((every_zero != 1 << (quant.bits - 1)).any())
    rows = _Rows(
        name,
        shape,
        entry.path,
        parts,
        codes,
        zeros if has_zeros else None,
        None if np.array_equal(source, np.arange(entry.shape[0])) else source,
        None if perm is None else perm.astype(np.intp),
        words,
    )
    return RawLinear(name, shape, LinearFormat(quant.bits, group, has_zeros=has_zeros), rows, bias, perm)
