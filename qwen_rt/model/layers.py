"""The parts every Qwen is made of. They hold packed weights and call the waist; T rows, Hq/Hkv heads of D."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from qwen_rt.backends.base import KV, Backend, BatchMeta, Packed, Plan, Tensor
from qwen_rt.config import ModelConfig
from qwen_rt.model.rope import Rope


@dataclass(frozen=True)
class Last:
    """The last rows of some sequences of a step: those whose final states are wanted."""

    rows: Tensor  # int64 [R] of the step's T
    plan: Plan | None  # of those rows alone, q_len 1 each; None when there are none

    @classmethod
    def of(cls, sequences: Sequence[int], meta: BatchMeta, backend: Backend) -> Last:
        """The last rows of these sequences of `meta`."""
        ends = list(accumulate(meta.q_lens))
        rows = [ends[b] - 1 for b in sequences]
        ones = BatchMeta(
            [1] * len(rows),
            [meta.kv_lens[b] for b in sequences],
            [meta.block_table[b] for b in sequences],
            [meta.slots[row] for row in rows],
        )
        return cls(backend.tensor(np.array(rows, dtype=np.int64)), backend.plan(ones) if rows else None)


class Linear:
    """One or more weights over the same input, [T, K] -> [T, N of all]; a single product where they could be fused."""

    def __init__(self, backend: Backend, parts: Sequence[Packed]) -> None:
        self.backend = backend
        self.parts = tuple(parts)

    def __call__(self, x: Tensor) -> Tensor:
        linear = self.backend.linear
        if len(self.parts) == 1:
            return linear(x, self.parts[0])
        return self.backend.concat([linear(x, part) for part in self.parts])


class RMSNorm:
    """[..., D] normalised over the last axis; with a residual, their sum is normalised."""

    def __init__(self, backend: Backend, weight: Tensor, eps: float) -> None:
        self.backend = backend
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(normed, summed)."""
        return self.backend.rms_norm(x, self.weight, self.eps, residual)


class MLP:
    """down(silu(gate x) * up x)."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: Tensor) -> Tensor:
        backend, parts = self.gate_up.backend, self.gate_up.parts
        return self.down(backend.swiglu(x, parts[0]) if len(parts) == 1 else backend.silu_mul(self.gate_up(x)))


class Attention:
    """Grouped-query attention through the paged cache; `prepare` is where generations differ."""

    def __init__(self, config: ModelConfig, layer: int, qkv: Linear, out: Linear) -> None:
        self.backend = qkv.backend
        self.layer = layer
        self.qkv = qkv
        self.out = out
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)  # of q, k and v
        self.head_size = config.head_size
        self.scale = config.head_size**-0.5
        self.window = config.window(layer)

    def store(self, x: Tensor, plan: Plan, rope: Rope, kv: KV) -> Tensor:
        """[T, H] -> queries [T, Hq, D]; keys and values go to the cache."""
        qkv = self.qkv(x).reshape(len(x), sum(self.heads), self.head_size)
        keys, values = self.heads[0], self.heads[0] + self.heads[1]
        q, k = self.prepare(qkv[:, :keys], qkv[:, keys:values])
        return self.backend.rope_store_kv(q, k, qkv[:, values:], rope.cos, rope.sin, rope.q_scale, kv, self.layer, plan)

    def attend(self, q: Tensor, plan: Plan, kv: KV) -> Tensor:
        """Queries of the plan's rows -> [rows, H]."""
        out = self.backend.attention(q, kv, self.layer, plan, self.scale, self.window)
        return self.out(out.reshape(len(out), self.heads[0] * self.head_size))

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """What happens to queries and keys before they are given their positions: nothing here."""
        return q, k


class DecoderLayer:
    """Norm, attention, norm, MLP; each sum with the residual is taken by the norm that follows it."""

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: MLP) -> None:
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self, x: Tensor, residual: Tensor | None, plan: Plan, rope: Rope, kv: KV, last: Last | None = None
    ) -> tuple[Tensor, Tensor]:
        """(this layer's last addend, the residual stream before it); with `last`, of those rows only."""
        x, residual = self.attention_norm(x, residual)
        q = self.attention.store(x, plan, rope, kv)
        if last is not None:
            q, residual, plan = q[last.rows], residual[last.rows], last.plan
            if not len(last.rows):
                return residual, residual
        x, residual = self.mlp_norm(self.attention.attend(q, plan, kv), residual)
        return self.mlp(x), residual
