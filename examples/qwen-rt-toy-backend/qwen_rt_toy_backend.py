"""A third-party backend in one file: numpy on the host, dequantised weights, a slot-major cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qwen_rt.backends.base import Backend, BatchMeta, Caps, DeviceInfo, KVSpec, Plan, Probe, SampleRow
from qwen_rt.backends.checks import check_cache, check_meta, host_memory
from qwen_rt.dtypes import DType
from qwen_rt.errors import BackendError
from qwen_rt.quant.formats import Array, LinearFormat, RawLinear


@dataclass
class Weight:
    """A dequantised weight [N, K] in the original column order."""

    shape: tuple[int, int]
    format: LinearFormat
    values: Array
    bias: Array | float
    nbytes: int


@dataclass
class Cache:
    """Per layer float32 [2, slots, Hkv, D]: keys and values lie by slot, so that a page is a run of rows."""

    spec: KVSpec
    num_blocks: int
    layers: list[Array]


class NumpyBackend(Backend):
    """numpy, float32."""

    name = "numpy"
    caps = Caps(("float32",), ("float32", "float16", "bfloat16"), (4, 8), ("float32",), kv_block=8)

    def __init__(self, index: int = 0, compute_dtype: DType | None = None) -> None:
        if index or compute_dtype not in (None, "float32"):
            raise BackendError(f"numpy is one device and computes in float32; got {index} and {compute_dtype}")
        self.index, self.compute_dtype = index, "float32"

    @classmethod
    def probe(cls) -> Probe:
        """Usable wherever numpy is."""
        return Probe((DeviceInfo(0, "host", host_memory()[1], f"numpy {np.__version__}"),), rung="device")

    def memory(self) -> tuple[int, int]:
        """The host's."""
        return host_memory()

    def kernels(self) -> dict[str, str]:
        """numpy serves everything."""
        return dict.fromkeys("embedding linear rms_norm rope store_kv attention silu_mul sample".split(), "numpy")

    def pack_linear(self, raw: RawLinear) -> Weight:
        """Dequantise; non-finite values are a damaged file."""
        values = raw.dequantize()
        raw.check("weights", values)
        raw.check("bias values", raw.bias)
        return Weight(raw.shape, raw.format, values, 0.0 if raw.bias is None else raw.bias, values.nbytes)

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> Cache:
        """One array a layer."""
        check_cache(self, spec, num_blocks)
        shape = (2, num_blocks * spec.block_size, spec.num_kv_heads, spec.head_size)
        return Cache(spec, num_blocks, [np.zeros(shape, "float32") for _ in range(spec.num_layers)])

    def plan(self, meta: BatchMeta) -> Plan:
        """(first rows of sequences but the first, slots of the rows, slots of each sequence's keys): to index only."""
        block = self.caps.kv_block
        check_meta(meta, block)
        pages = (np.asarray(table)[:, None] * block + np.arange(block) for table in meta.block_table)
        history = [page.ravel()[:n] for page, n in zip(pages, meta.kv_lens, strict=True)]
        return np.cumsum(meta.q_lens)[:-1], np.asarray(meta.slots), history

    def embedding(self, ids: Array, w: Weight) -> Array:
        """Rows of the table."""
        if ids.size and not 0 <= ids.min() <= ids.max() < w.shape[0]:
            raise ValueError(f"token ids must be within 0..{w.shape[0] - 1}")
        return w.values[ids]

    def linear(self, x: Array, w: Weight) -> Array:
        """One product; columns were put in order at load."""
        return x @ w.values.T + w.bias

    def rms_norm(self, x: Array, weight: Array, eps: float, residual: Array | None = None) -> tuple[Array, Array]:
        """Over the last axis."""
        a = x if residual is None else residual + x
        return a / np.sqrt((a * a).mean(-1, keepdims=True) + eps) * weight, a

    def rope(self, q: Array, k: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
        """Halves as the parts of a complex number, turned by cos + i sin, in place."""
        turn, r = (cos + 1j * sin)[:, None], cos.shape[-1]
        for x in (q, k):
            z = (x[..., :r] + 1j * x[..., r : 2 * r]) * turn
            x[..., :r], x[..., r : 2 * r] = z.real, z.imag
        return q, k

    def store_kv(self, kv: Cache, layer: int, k: Array, v: Array, plan: Plan) -> None:
        """Rows to slots; a slot beyond the cache is numpy's IndexError."""
        kv.layers[layer][0, plan[1]], kv.layers[layer][1, plan[1]] = k, v

    def attention(self, q: Array, kv: Cache, layer: int, plan: Plan, scale: float, window: int | None = None) -> Array:
        """Per sequence, all heads of a group at once: [Hkv, group, rows, D] against [Hkv, keys, D]."""
        results = []
        for rows, slots in zip(np.split(q * scale, plan[0]), plan[2], strict=True):
            n, total = len(rows), len(slots)
            keys, values = kv.layers[layer][:, slots].transpose(0, 2, 1, 3)[:, :, None]
            x = rows.reshape(n, kv.spec.num_kv_heads, -1, q.shape[2]).transpose(1, 2, 0, 3)
            ahead = np.arange(total) - np.arange(total - n, total)[:, None]
            scores = x @ keys.swapaxes(-1, -2)
            scores[..., (ahead > 0) | (ahead <= -(window or total))] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads = (p / p.sum(-1, keepdims=True)) @ values
            results.append(heads.transpose(2, 0, 1, 3).reshape(q[:n].shape))
        return np.concatenate(results)

    def silu_mul(self, gate_up: Array) -> Array:
        """Clipped where exp would overflow float32 and the result is nothing anyway."""
        gate, up = np.split(gate_up, 2, axis=1)
        return gate / (1 + np.exp(-np.clip(gate, -88, None))) * up

    def sample(self, logits: Array, rows: Sequence[SampleRow]) -> list[int]:
        """Row by row, in float64."""
        return [choose(x.astype(float), row) for x, row in zip(logits, rows, strict=True)]


def choose(x: Array, row: SampleRow) -> int:
    """An id from float64 logits [V], overwritten: bias, penalties, bans, then temperature, top-k, top-p and min-p."""
    x[list(row.logit_bias)] += list(row.logit_bias.values())
    seen = list({*row.prompt_ids, *row.output_ids})
    x[seen] = np.where(x[seen] > 0, x[seen] / row.repetition_penalty, x[seen] * row.repetition_penalty)
    counts = np.bincount(np.asarray(row.output_ids, int), minlength=len(x))
    x -= row.presence_penalty * (counts > 0) + row.frequency_penalty * counts
    x[list(row.banned)] = -np.inf
    if not -np.inf < (top := x.max()) < np.inf:
        raise BackendError("the logits hold NaN or infinity, or every token is banned")
    order = np.argsort(-x, kind="stable")[: (row.top_k or None) if row.temperature else 1]
    p = np.exp((x[order] - top) / (row.temperature or 1))
    p /= p.sum()
    p = p[: 1 + (p.cumsum() < row.top_p).sum()] if row.top_p < 1 else p
    p = p[p >= row.min_p * p[0]]
    below = ((p / p.sum()).cumsum() <= row.uniform).sum()
    return int(order[min(below, (p > 0).sum() - 1)])  # the last for a number within rounding of 1
