"""A third-party backend in one file: numpy on the host, dequantised weights, a slot-major cache.

It inherits sampling and memory() from the reference and does everything else its own way, as a device plugin would.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qwen_rt.backends.base import BatchMeta, Caps, DeviceInfo, KVSpec, Probe
from qwen_rt.backends.reference import ReferenceBackend, check_meta, host_memory
from qwen_rt.errors import CheckpointError, OutOfMemory
from qwen_rt.quant.formats import LinearFormat, RawLinear

F = np.float32


@dataclass
class Weight:
    """A dequantised weight [N, K] in the original column order."""

    shape: tuple[int, int]
    format: LinearFormat
    values: np.ndarray
    bias: np.ndarray | None
    nbytes: int


@dataclass
class Cache:
    """Per layer float32 [2, slots, Hkv, D]: keys and values lie by slot, so that a page is a run of rows."""

    spec: KVSpec
    num_blocks: int
    layers: list[np.ndarray]


@dataclass(frozen=True)
class Step:
    """A step's rows, and per sequence the slots of all its keys."""

    q_lens: list[int]
    slots: np.ndarray
    history: list[np.ndarray]


def out(x: np.ndarray) -> Tensor:
    """A float32 array as the tensor the graph goes on with."""
    return torch.from_numpy(np.ascontiguousarray(x, dtype=F))


class NumpyBackend(ReferenceBackend):
    """numpy, float32."""

    name = "numpy"
    caps = Caps(
        compute_dtypes=(torch.float32,),
        dense_dtypes=(torch.float32, torch.float16, torch.bfloat16),
        weight_bits=(4, 8),
        kv_dtypes=("float32",),
        kv_block=8,
    )

    @classmethod
    def probe(cls) -> Probe:
        """Usable wherever numpy is."""
        return Probe((DeviceInfo(0, "host", host_memory()[1], f"numpy {np.__version__}"),), rung="device")

    def kernels(self) -> dict[str, str]:
        """numpy serves everything but sampling."""
        return {op: "torch (reference)" if op == "sample" else "numpy" for op in super().kernels()}

    def pack_linear(self, raw: RawLinear) -> Weight:
        """Dequantise; non-finite values are a damaged file."""
        values = raw.dequantize().numpy()
        bias = None if raw.bias is None else raw.bias.float().numpy()
        if not np.isfinite(values).all() or (bias is not None and not np.isfinite(bias).all()):
            raise CheckpointError(f"{raw.name}: the weights are not all finite; the file is damaged")
        return Weight(raw.shape, raw.format, values, bias, values.nbytes)

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> Cache:
        """One array a layer."""
        if (need := spec.block_bytes() * num_blocks) > (free := self.memory()[0]):
            raise OutOfMemory(f"a cache of {num_blocks} blocks needs {need} bytes and {free} are free")
        shape = (2, num_blocks * spec.block_size, spec.num_kv_heads, spec.head_size)
        return Cache(spec, num_blocks, [np.zeros(shape, F) for _ in range(spec.num_layers)])

    def plan(self, meta: BatchMeta) -> Step:
        """Turn block tables into slots once, so that attention only indexes."""
        block = self.caps.kv_block
        check_meta(meta, block)
        pages = (np.asarray(table)[:, None] * block + np.arange(block) for table in meta.block_table)
        history = [page.ravel()[:n] for page, n in zip(pages, meta.kv_lens, strict=True)]
        return Step(list(meta.q_lens), np.asarray(meta.slots), history)

    def embedding(self, ids: Tensor, w: Weight) -> Tensor:
        """Rows of the table."""
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < w.shape[0]:
            raise ValueError(f"token ids must be within 0..{w.shape[0] - 1}")
        return out(w.values[ids.numpy()])

    def linear(self, x: Tensor, w: Weight) -> Tensor:
        """One product; columns were put in order at load."""
        y = x.numpy() @ w.values.T
        return out(y if w.bias is None else y + w.bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Over the last axis."""
        a = x.numpy() if residual is None else residual.numpy() + x.numpy()
        mean = np.einsum("...d,...d->...", a, a)[..., None] / F(a.shape[-1])
        return out(a / np.sqrt(mean + F(eps)) * weight.numpy()), out(a)

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Halves as the parts of a complex number, turned by cos + i sin."""
        turn = (cos.numpy() + 1j * sin.numpy())[:, None]
        for x in (q.numpy(), k.numpy()):  # views: in place
            r = turn.shape[-1]
            z = (x[..., :r] + 1j * x[..., r : 2 * r]) * turn
            x[..., :r], x[..., r : 2 * r] = z.real, z.imag
        return q, k

    def store_kv(self, kv: Cache, layer: int, k: Tensor, v: Tensor, plan: Step) -> None:
        """Rows to slots; a slot beyond the cache is numpy's IndexError."""
        kv.layers[layer][0, plan.slots], kv.layers[layer][1, plan.slots] = k.numpy(), v.numpy()

    def attention(
        self, q: Tensor, kv: Cache, layer: int, plan: Step, scale: float, window: int | None = None
    ) -> Tensor:
        """Per sequence, all heads of a group at once: [Hkv, group, rows, D] against [Hkv, keys, D]."""
        results = []
        for rows, slots in zip(q.split(plan.q_lens), plan.history, strict=True):
            n, total = len(rows), len(slots)
            keys, values = kv.layers[layer][:, slots].transpose(0, 2, 1, 3)[:, :, None]
            x = rows.numpy().reshape(n, kv.spec.num_kv_heads, -1, q.shape[2]).transpose(1, 2, 0, 3)
            ahead = np.arange(total) - np.arange(total - n, total)[:, None]
            scores = x @ keys.swapaxes(-1, -2) * F(scale)
            scores[..., (ahead > 0) | (ahead <= -(window or total))] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads = (p / p.sum(-1, keepdims=True)) @ values
            results.append(heads.transpose(2, 0, 1, 3).reshape(n, *q.shape[1:]))
        return out(np.concatenate(results))

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Clipped where exp would overflow float32 and the result is nothing anyway."""
        gate, up = np.split(gate_up.numpy(), 2, axis=1)
        return out(gate / (1 + np.exp(-np.clip(gate, -88, None))) * up)
