"""NullBackend: records every call and computes nothing; scheduler and graph tests need no arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qwen_rt.backends.base import Backend, BatchMeta, Caps, DeviceInfo, KVSpec, Probe, SampleRow
from qwen_rt.backends.checks import check_meta
from qwen_rt.dtypes import FLOATS, DType, host_dtype
from qwen_rt.quant.formats import Array, LinearFormat, RawLinear


class Call(NamedTuple):
    """One recorded call: the operation and the shapes (or plain values) of its arguments."""

    op: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class NullPacked:
    """A weight's shape and format; no values were read."""

    shape: tuple[int, int]
    format: LinearFormat
    nbytes: int = 0


@dataclass(frozen=True)
class NullKV:
    """A cache's shape; it stores nothing."""

    spec: KVSpec
    num_blocks: int


class NullBackend(Backend):
    """Returns zeros of the right shapes; `sample` gives `tokens` in a cycle. `calls` lists what was asked of it."""

    name = "null"
    caps = Caps(
        compute_dtypes=FLOATS,
        dense_dtypes=FLOATS,
        weight_bits=(4, 5, 6, 8),
        kv_dtypes=("float32", "float16", "bfloat16", "int8"),
        kv_block=16,
    )

    def __init__(self, index: int = 0, compute_dtype: DType | None = None, *, tokens: Iterable[int] = (0,)):
        """`tokens`: the ids that `sample` returns, row after row, over and over."""
        self.index = index
        self.compute_dtype = compute_dtype or self.caps.compute_dtypes[0]
        self.calls: list[Call] = []
        self._tokens = itertools.cycle(tokens)

    @classmethod
    def probe(cls) -> Probe:
        """Always usable; it computes nothing, so "auto" never takes it."""
        return Probe((DeviceInfo(0, "null", 1 << 40),), notes=("computes nothing: zeros and scripted tokens only",))

    def memory(self) -> tuple[int, int]:
        """A terabyte, all of it free."""
        return 1 << 40, 1 << 40

    def ops(self) -> list[str]:
        """Names of the recorded calls, in order."""
        return [c.op for c in self.calls]

    def _record(self, op: str, *args: Any) -> None:
        self.calls.append(Call(op, tuple(tuple(a.shape) if isinstance(a, np.ndarray) else a for a in args)))

    def _zeros(self, *shape: int) -> Array:
        return np.zeros(shape, host_dtype(self.compute_dtype))

    def pack_linear(self, raw: RawLinear) -> NullPacked:
        """The shape and format of `raw`; reads no row."""
        self._record("pack_linear", raw.name, raw.shape)
        return NullPacked(raw.shape, raw.format)

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> NullKV:
        """The shape of a cache."""
        self._record("alloc_kv", spec, num_blocks)
        return NullKV(spec, num_blocks)

    def plan(self, meta: BatchMeta) -> BatchMeta:
        """`meta` itself, once it has been checked as every backend checks it. Raises ValueError."""
        check_meta(meta, self.caps.kv_block)
        self._record("plan", meta)
        return meta

    def embedding(self, ids: Array, w: NullPacked) -> Array:
        """Zeros [T, K]."""
        self._record("embedding", ids, w.shape)
        return self._zeros(ids.shape[0], w.shape[1])

    def linear(self, x: Array, w: NullPacked) -> Array:
        """Zeros [T, N]; ValueError when x is not [T, K]."""
        self._record("linear", x, w.shape)
        if x.ndim != 2 or x.shape[1] != w.shape[1]:
            raise ValueError(f"linear: x is {tuple(x.shape)}, the weight takes [T, {w.shape[1]}]")
        return self._zeros(x.shape[0], w.shape[0])

    def rms_norm(self, x: Array, weight: Array, eps: float, residual: Array | None = None) -> tuple[Array, Array]:
        """(zeros of x's shape, residual or x)."""
        self._record("rms_norm", x, weight, eps, residual)
        return self._zeros(*x.shape), x if residual is None else residual

    def rope(self, q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
        """q and k as they came."""
        self._record("rope", q, k, cos, sin)
        return q, k

    def store_kv(self, kv: NullKV, layer: int, k: Array, v: Array, plan: BatchMeta) -> None:
        """Stores nothing."""
        self._record("store_kv", layer, k, v)

    def attention(
        self, q: Array, kv: NullKV, layer: int, plan: BatchMeta, scale: float, window: int | None = None
    ) -> Array:
        """Zeros [T, Hq, D]."""
        self._record("attention", layer, q, scale, window)
        return self._zeros(*q.shape)

    def silu_mul(self, gate_up: Array) -> Array:
        """Zeros [T, F]."""
        self._record("silu_mul", gate_up)
        return self._zeros(gate_up.shape[0], gate_up.shape[1] // 2)

    def sample(self, logits: Array, rows: Sequence[SampleRow]) -> list[int]:
        """The next scripted tokens, one a row."""
        self._record("sample", logits, list(rows))
        return [next(self._tokens) for _ in rows]
