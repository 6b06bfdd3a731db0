"""What the GPTQ and AWQ readers share: the stored tensors of one linear, and the regrouping to RawLinear's rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from qwen_rt.checkpoint.store import FLOATS, TensorStore, check_finite
from qwen_rt.config import QuantConfig
from qwen_rt.errors import CheckpointError
from qwen_rt.quant.formats import Blocks, LinearFormat, LinearRows, RawLinear, Words
from qwen_rt.quant.packing import fit_group


class PackedParts:
    """The packed tensors of the linear read last.

    Both layouts pack along or across K so that a row of W is a column of the file: the tensors are read whole, once,
    and kept until their last row was asked for or another linear comes.
    """

    def __init__(self, store: TensorStore) -> None:
        self._store = store
        self._slot: tuple[str, dict[str, Tensor]] = ("", {})
        self._lock = Lock()

    def get(self, name: str, zeros: bool) -> dict[str, Tensor]:
        """qweight and scales of the linear `name`, and with `zeros` its qzeros."""
        with self._lock:
            if self._slot[0] != name:
                self._slot = ("", {})  # let go of the old before reading the new
                wanted = ("qweight", "scales", "qzeros")[: 2 + zeros]
                self._slot = (name, {p: self._store.read(f"{name}.{p}") for p in wanted})
            return self._slot[1]

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
    want: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
        "qweight": ((torch.int32,), qweight),
        "qzeros": ((torch.int32,), (groups, n * quant.bits // 32)),
        "scales": (FLOATS, (groups, n)),
        "g_idx": ((torch.int32,), (k,)),
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
    name: str, g_idx: Tensor | None, shape: tuple[int, int], quant: QuantConfig
) -> tuple[int, Tensor, Tensor | None]:
    """(group size, source group of each group, perm or None), by the rules of quant/formats.py.

    Columns are sorted by group (stable). Groups of uneven or of great length are cut into equal ones that repeat
    their scale: a short last group, group -1, and act-order all come out as one case.
    """
    k = shape[1]
    size = k if quant.group_size == -1 else quant.group_size
    plain = torch.arange(k, dtype=torch.int32) // size
    perm = None
    if g_idx is None:
        g_idx = plain
    elif not torch.equal(g_idx, plain):
        if int(g_idx.min()) < 0 or int(g_idx.max()) > int(plain[-1]):
            raise CheckpointError(f"{name}.g_idx names groups outside of 0..{int(plain[-1])}; the file is damaged")
        order = torch.argsort(g_idx, stable=True)
        g_idx = g_idx[order]
        if not torch.equal(order, torch.arange(k)):
            perm = order.int()
    group = fit_group(math.gcd(*torch.unique_consecutive(g_idx, return_counts=True)[1].tolist()))
    if group is None:
        raise CheckpointError(
            f"{name}: its groups of {k} inputs (group size {quant.group_size}) cannot be cut into equal ones of a "
            "multiple of 16 inputs; quantise the model again with a group size that divides them"
        )
    return group, g_idx[::group].long(), perm


Columns = Callable[[Tensor, int, int], Tensor]
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
    source: Tensor | None  # int64 [G]: the stored group of each; None: one after the other
    columns: Tensor | None  # int64 [K]: inputs in the order of their groups, where that is another
    words: bool  # packed along K, as quant.formats.Words is

    def __call__(self, start: int, stop: int) -> LinearRows:
        """Decoded. CheckpointError if not finite."""
        with self._parts(stop) as part:
            code = self.codes(part["qweight"], start, stop)
            scale = part["scales"][:, start:stop].t().half().contiguous()
            check_finite(scale, f"{self.name}.scales", self.path)
            zero = None if self.zeros is None else self.zeros(part["qzeros"], start, stop).to(torch.uint8)
        if self.columns is not None:
            code = code[:, self.columns]
        if self.source is not None:
            scale = scale[:, self.source]
            zero = zero[:, self.source] if zero is not None else None
        return LinearRows(codes=code, scales=scale, zeros=zero)

    def stored(self, start: int, stop: int) -> list[Blocks | Words] | None:
        """As RawLinear.stored; None where words do not hold consecutive inputs of one group."""
        if not self.words or self.columns is not None:
            return None
        with self._parts(stop) as part:
            scales = part["scales"][:, start:stop].half()
            zeros = None
            if self.zeros is not None:
                zeros = self.zeros(part["qzeros"], start, stop).to(torch.uint8).t().contiguous()
            source = torch.arange(len(scales)) if self.source is None else self.source
            return [Words(part["qweight"][:, start:stop], scales, zeros, source)]

    @contextmanager
    def _parts(self, stop: int) -> Iterator[dict[str, Tensor]]:
        """The packed tensors; forgotten after the last row."""
        yield self.parts.get(self.name, zeros=self.zeros is not None)
        if stop == self.shape[0]:
            self.parts.release(self.name)


def grouped_linear(
    name: str,
    shape: tuple[int, int],
    quant: QuantConfig,
    parts: PackedParts,
    store: TensorStore,
    codes: Columns,
    zeros: Columns,
    bias: Tensor | None,
    words: bool = False,
) -> RawLinear:
    """The RawLinear over packed tensors: `codes` of qweight, `zeros` of qzeros; `words`: codes are packed along K."""
    g_idx = store.read(f"{name}.g_idx") if f"{name}.g_idx" in store else None
    group, source, perm = regroup(name, g_idx, shape, quant)
    entry = store[f"{name}.qzeros"]
    stored = store.read(f"{name}.qzeros")
    if (stored.numpy() == int(stored[0, 0])).all():
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
        None if torch.equal(source, torch.arange(entry.shape[0])) else source,
        None if perm is None else perm.long(),
        words,
    )
    return RawLinear(name, shape, LinearFormat(quant.bits, group, has_zeros=has_zeros), rows, bias, perm)
