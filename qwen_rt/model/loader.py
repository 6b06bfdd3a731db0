"""Loader: checkpoint names -> packed weights, checked, converted or quantised on the way, one matrix at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qwen_rt.backends.base import Backend, Packed, format_supported
from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.checkpoint.layout import expected_shapes
from qwen_rt.checkpoint.names import model_names, verify_names
from qwen_rt.dtypes import DType, host_dtype
from qwen_rt.errors import BackendError, CheckpointError, ConfigError
from qwen_rt.model.layers import Linear, RMSNorm
from qwen_rt.model.level import level_norms, level_qkv
from qwen_rt.quant.formats import LinearRows, RawLinear, concat_rows, dense_format
from qwen_rt.quant.rtn import quantize_rtn, recipe

Progress = Callable[[str, int], None]  # called with (name, bytes packed) after each weight


class Loader:
    """Packs a checkpoint's weights for one backend; refuses a checkpoint that is not its configuration's."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        backend: Backend,
        quantize: Literal["int8", "int4"] | None = None,
        dtype: DType | None = None,
        progress: Progress | None = None,
        level_keys: bool = False,
    ) -> None:
        if quantize not in (None, "int8", "int4"):
            raise ConfigError(f"quantize={quantize!r} is not known; use None, 'int8' or 'int4'")
        self.config = checkpoint.config
        self.checkpoint = checkpoint
        self.backend = backend
        self.quantize = quantize
        self.dtype = dtype
        self.progress = progress
        self.level_keys = level_keys
        self.packed_bytes = 0
        self._biases = {name for name in expected_shapes(self.config) if name.endswith(".bias")}
        verify_names(checkpoint, *model_names(self.config))  # biases are looked at as they are read

    def linear(self, *names: str) -> Linear:
        """A layer's linears over one input, fused wherever neighbours have one format."""
        return self._fused([self._raw(name) for name in names])

    def qkv(self, *names: str, norm: str) -> Linear:
        """As linear, of queries, keys and values; `norm` is the weight of the RMSNorm before them."""
        raws = [self._raw(name) for name in names]
        if self.level_keys:
            raws = level_qkv(raws, self.checkpoint.tensor(norm), self.config)
        return self._fused(raws)

    def qk_norms(self, q: str, k: str) -> tuple[RMSNorm, RMSNorm]:
        """The RMSNorms of every head's queries and keys."""
        weights = self.checkpoint.tensor(q), self.checkpoint.tensor(k)
        if self.level_keys:
            weights = level_norms(*weights, self.config)
        return self._norm(q, weights[0]), self._norm(k, weights[1])

    def _fused(self, raws: Sequence[RawLinear]) -> Linear:
        groups: list[RawLinear] = []
        for raw in raws:
            joined = concat_rows([groups[-1], raw], f"{groups[-1].name}+{raw.name}") if groups else None
            groups[-1 if joined else len(groups) :] = [joined or raw]
        return Linear(self.backend, [self._pack(raw, self.quantize) for raw in groups])

    def table(self, name: str, is_head: bool) -> Packed:
        """The embedding or the head. Quantised when it is the head, which has a product beside the lookup."""
        pack = self.backend.pack_linear if is_head else self.backend.pack_table
        return self._pack(self._raw(name), self.quantize if is_head else None, is_head, pack)

    def norm(self, name: str) -> RMSNorm:
        """An RMSNorm whose weight is `name`."""
        return self._norm(name, self.checkpoint.tensor(name))

    def _norm(self, name: str, values: NDArray[np.float32]) -> RMSNorm:
        weight = self.backend.cast(self.backend.tensor(values), self.backend.compute_dtype)
        self._report(name, weight.nbytes)
        return RMSNorm(self.backend, weight, self.config.norm_eps)

    def _raw(self, name: str) -> RawLinear:
        raw = self.checkpoint.linear(name)
        if raw.bias is None and f"{name}.bias" in self._biases:
            raise CheckpointError(
                f"{self.checkpoint.source}: {name} has no bias, and a {self.config.arch} model needs one; "
                "the checkpoint is incomplete, download it again"
            )
        return raw.held(self.backend.caps.weight_bits)

    def _pack(
        self,
        raw: RawLinear,
        quantize: str | None,
        is_head: bool = False,
        pack: Callable[[RawLinear], Packed] | None = None,
    ) -> Packed:
        wanted = recipe(quantize, is_head, self.backend.caps.weight_bits)
        if wanted is not None and raw.format.bits > wanted[0]:
            raw = quantize_rtn(raw, *wanted)
        elif self.dtype is not None and not raw.format.grouped:
            raw = cast_dense(raw, self.dtype)
        caps = self.backend.caps
        if not format_supported(caps, raw.format):
            dense = ", ".join(caps.dense_dtypes)
            ints = ", ".join(f"int{b}" for b in caps.weight_bits)
            raise BackendError(
                f"{self.backend.name} cannot use {raw.name} as stored ({raw.format}); it takes {dense or 'no floats'} "
                f"and {ints or 'no integers'}: convert with dtype= or quantize=, or choose another device"
            )
        packed = (pack or self.backend.pack_linear)(raw)
        self._report(raw.name, packed.nbytes)
        return packed

    def _report(self, name: str, nbytes: int) -> None:
        self.packed_bytes += nbytes
        if self.progress is not None:
            self.progress(name, nbytes)


def cast_dense(raw: RawLinear, dtype: DType) -> RawLinear:
    """A dense RawLinear whose rows are read as `dtype`."""
    if raw.format.dtype == dtype:
        return raw

    def rows(start: int, stop: int) -> LinearRows:
        values = raw.rows(start, stop).values
        assert values is not None
        with np.errstate(over="ignore"):  # what is too large is infinite, and said of the weight
            return LinearRows(values=values.astype(host_dtype(dtype)))

    return replace(raw, format=dense_format(dtype), rows=rows)
