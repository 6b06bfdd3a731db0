"""ReferenceBackend: every operation of the waist in slow, obvious torch on the host.

In float64 it is the oracle of the contract tests; in float32 it serves where no native kernel does; and its methods,
written for any `device` and `compute_dtype`, are the defaults a device plugin inherits and overrides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.backends.base import KV, BatchMeta, Caps, DeviceInfo, KVSpec, Packed, Plan, Probe, SampleRow
from qwen_rt.backends.checks import check_cache, check_meta, host_memory
from qwen_rt.backends.torch_backend import TorchBackend, from_host, to_host
from qwen_rt.dtypes import DType, wider
from qwen_rt.errors import BackendError
from qwen_rt.quant.formats import Array, LinearFormat, LinearRows, RawLinear, dequantize_rows

CHUNK_ELEMENTS = 1 << 22  # weights dequantised at a time
QUERY_CHUNK = 256  # query rows whose scores exist at a time

_FLOAT_KV = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class PackedReference:
    """A weight as the checkpoint stores it (one code a byte, in host memory), dequantised at use."""

    shape: tuple[int, int]
    format: LinearFormat
    stored: LinearRows
    bias: Tensor | None = None  # compute dtype [N]
    perm: Tensor | None = None  # int64 [K], as RawLinear.perm

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = [*vars(self.stored).values(), self.bias, self.perm]
        return sum(t.nbytes for t in held if t is not None)

    def rows(self, index: slice | Array) -> Tensor:
        """Rows as float32 [n, K] on the host, columns in stored order."""
        part = LinearRows(**{key: None if a is None else a[index] for key, a in vars(self.stored).items()})
        return from_host(dequantize_rows(part, self.format))


@dataclass
class ReferenceKV:
    """Pages [num_blocks, Hkv, block, D] per layer; int8 pages have (scale, min) [num_blocks, Hkv, block, 2] beside."""

    spec: KVSpec
    num_blocks: int
    k: list[Tensor]
    v: list[Tensor]
    k_affine: list[Tensor] = field(default_factory=list)
    v_affine: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class ReferencePlan:
    """A checked step: where each row's key goes, and each sequence's pages."""

    meta: BatchMeta
    num_blocks: int  # one more than the highest block id in use
    slots: Tensor  # int64 [T]
    pages: list[Tensor]  # per sequence: int64 ids of the blocks that hold its keys


class ReferenceBackend(TorchBackend):
    """Obvious torch on the host, float32 or float64."""

    name = "reference"
    caps = Caps(
        compute_dtypes=("float32", "float64"),
        dense_dtypes=("float32", "float16", "bfloat16"),
        weight_bits=(4, 5, 6, 8),
        kv_dtypes=("float32", "float16", "bfloat16", "int8"),
        kv_block=16,
    )

    def __init__(self, index: int = 0, compute_dtype: DType | None = None) -> None:
        if index != 0:
            raise BackendError(f"{self.name} has one device, index 0; got {index}")
        self.index = index
        self.device = torch.device("cpu")
        self.compute_dtype = compute_dtype or self.caps.compute_dtypes[0]
        if self.compute_dtype not in self.caps.compute_dtypes:
            offered = ", ".join(self.caps.compute_dtypes)
            raise BackendError(f"{self.name} cannot compute in {self.compute_dtype}; choose one of {offered}")

    @classmethod
    def probe(cls) -> Probe:
        """Always usable."""
        info = DeviceInfo(0, "host", host_memory()[1], "plain torch")
        return Probe((info,), rung="device", notes=("the reference is slow: it is for checking, not for use",))

    def memory(self) -> tuple[int, int]:
        """(available, total) bytes of the host."""
        return host_memory()

    def kernels(self) -> dict[str, str]:
        """Plain torch serves everything."""
        ops = ("embedding", "linear", "rms_norm", "rope", "store_kv", "attention", "silu_mul", "sample")
        return dict.fromkeys(ops, "torch (reference)")

    @property
    def _accurate(self) -> torch.dtype:
        """What sums are kept in: float32, or float64 when that is the compute dtype."""
        return getattr(torch, wider(self.compute_dtype))

    # -- at load ---------------------------------------------------------------------------------------------
    def pack_linear(self, raw: RawLinear) -> Packed:
        """Copy the stored rows, chunk by chunk. Non-finite values: CheckpointError."""
        stored = LinearRows()
        for start, stop, part in raw.chunks(CHUNK_ELEMENTS):
            for key, a in vars(part).items():
                if a is None:
                    continue
                if getattr(stored, key) is None:
                    setattr(stored, key, np.empty((raw.shape[0], *a.shape[1:]), a.dtype))
                getattr(stored, key)[start:stop] = a
        bias = None if raw.bias is None else self.tensor(raw.bias).to(self.dtype)
        perm = None if raw.perm is None else self.tensor(raw.perm).long()
        return PackedReference(raw.shape, raw.format, stored, bias, perm)

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Zeroed pages."""
        check_cache(self, spec, num_blocks)
        shape = (num_blocks, spec.num_kv_heads, spec.block_size, spec.head_size)

        def pages(dtype: torch.dtype, last: int) -> list[Tensor]:
            return [torch.zeros((*shape[:3], last), dtype=dtype, device=self.device) for _ in range(spec.num_layers)]

        if spec.dtype == "int8":
            codes = [pages(torch.uint8, spec.head_size) for _ in "kv"]
            return ReferenceKV(spec, num_blocks, *codes, *(pages(torch.float32, 2) for _ in "kv"))
        return ReferenceKV(spec, num_blocks, *(pages(_FLOAT_KV[spec.dtype], spec.head_size) for _ in "kv"))

    # -- once a step -----------------------------------------------------------------------------------------
    def plan(self, meta: BatchMeta) -> Plan:
        """Check `meta` (ValueError) and move it to the device."""
        block = self.caps.kv_block
        check_meta(meta, block)
        pages = [
            torch.tensor(table[: -(-n // block)], dtype=torch.int64, device=self.device)
            for n, table in zip(meta.kv_lens, meta.block_table, strict=True)
        ]
        num_blocks = 1 + max(int(p.max()) for p in pages)
        return ReferencePlan(meta, num_blocks, torch.tensor(meta.slots, dtype=torch.int64, device=self.device), pages)

    # -- in a layer ------------------------------------------------------------------------------------------
    def embedding(self, ids: Tensor | NDArray[np.int64], w: Packed) -> Tensor:
        """Rows of the table; ids outside it: ValueError."""
        ids = to_host(ids) if isinstance(ids, Tensor) else ids
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < w.shape[0]:
            raise ValueError(f"token ids must be within 0..{w.shape[0] - 1}")
        rows = w.rows(ids).to(self.device)
        if w.perm is not None:
            rows = torch.empty_like(rows).index_copy_(1, w.perm, rows)
        return rows.to(self.dtype)

    def linear(self, x: Tensor, w: Packed) -> Tensor:
        """Dequantise a chunk of rows, multiply, next chunk."""
        n, k = w.shape
        if x.shape[-1] != k:
            raise ValueError(f"linear of {k} inputs given {x.shape[-1]}")
        if w.perm is not None:
            x = x[:, w.perm]
        out = torch.empty((x.shape[0], n), dtype=self.dtype, device=self.device)
        step = max(1, CHUNK_ELEMENTS // k)
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            out[:, part] = x.to(self.dtype) @ w.rows(part).to(self.device, self.dtype).T
        return out if w.bias is None else out.add_(w.bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise, cast, multiply: the order of the original."""
        summed = x if residual is None else residual + x.to(residual.dtype)
        wide = summed.to(self._accurate)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return normed.to(self.dtype) * weight.to(self.dtype), summed

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate halves: dims i and i + r of the first 2r, i < r."""
        r = cos.shape[-1]
        cos, sin = (t.to(self._accurate).unsqueeze(1) for t in (cos, sin))

        def rotate(x: Tensor) -> Tensor:
            a, b = x[..., :r].to(self._accurate), x[..., r : 2 * r].to(self._accurate)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
            return torch.cat((turned, x[..., 2 * r :]), -1)

        return rotate(q), rotate(k)

    def store_kv(self, kv: KV, layer: int, k: Tensor, v: Tensor, plan: Plan) -> None:
        """Write to block slot // block_size, offset slot % block_size."""
        if plan.num_blocks > kv.num_blocks:
            raise ValueError(f"the step uses block {plan.num_blocks - 1} of a cache of {kv.num_blocks} blocks")
        block, offset = plan.slots // kv.spec.block_size, plan.slots % kv.spec.block_size
        pairs = ((k, kv.k, kv.k_affine), (v, kv.v, kv.v_affine))
        for x, pages, affine in pairs:
            if kv.spec.dtype == "int8":
                codes, scale_min = quantize_heads(x)
                pages[layer][block, :, offset], affine[layer][block, :, offset] = codes, scale_min
            else:
                pages[layer][block, :, offset] = x.to(pages[layer].dtype)

    def attention(self, q: Tensor, kv: KV, layer: int, plan: Plan, scale: float, window: int | None = None) -> Tensor:
        """Per sequence: gather its pages, score under an explicit mask, softmax, weigh the values."""
        if plan.num_blocks > kv.num_blocks:
            raise ValueError(f"the step uses block {plan.num_blocks - 1} of a cache of {kv.num_blocks} blocks")
        spec = kv.spec
        group = q.shape[1] // spec.num_kv_heads
        if group * spec.num_kv_heads != q.shape[1] or q.shape[2] != spec.head_size:
            raise ValueError(f"queries {tuple(q.shape)} do not fit {spec.num_kv_heads} key heads of {spec.head_size}")
        out = torch.empty(q.shape, dtype=self.dtype, device=self.device)

        def gather(pages: list[Tensor], affine: list[Tensor], ids: Tensor, n: int) -> Tensor:
            x = pages[layer][ids].to(self._accurate)  # [blocks, Hkv, block, D]
            if affine:
                scale_min = affine[layer][ids].to(self._accurate)
                x = x * scale_min[..., :1] + scale_min[..., 1:]
            x = x.transpose(0, 1).flatten(1, 2)[:, :n]
            return x.repeat_interleave(group, 0)  # [Hq, n, D]

        row = 0
        for q_len, kv_len, ids in zip(plan.meta.q_lens, plan.meta.kv_lens, plan.pages, strict=True):
            keys, values = gather(kv.k, kv.k_affine, ids, kv_len), gather(kv.v, kv.v_affine, ids, kv_len)
            key_pos = torch.arange(kv_len, device=self.device)
            for start in range(0, q_len, QUERY_CHUNK):
                stop = min(start + QUERY_CHUNK, q_len)
                part = q[row + start : row + stop].to(self._accurate).transpose(0, 1)  # [Hq, n, D]
                pos = torch.arange(kv_len - q_len + start, kv_len - q_len + stop, device=self.device).unsqueeze(1)
                seen = key_pos <= pos if window is None else (key_pos <= pos) & (key_pos > pos - window)
                scores = (part @ keys.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
                out[row + start : row + stop] = (scores.softmax(-1) @ values).transpose(0, 1).to(self.dtype)
            row += q_len
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu in at least float32, then the product."""
        gate, up = gate_up.to(self._accurate).chunk(2, -1)
        return (gate * torch.sigmoid(gate) * up).to(self.dtype)

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """One token per row, on the host in float64. NaN or +inf logits: BackendError."""
        if logits.shape[0] != len(rows):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sampling rows")
        return [sample_row(x, row) for x, row in zip(logits.to("cpu", torch.float64), rows, strict=True)]


def quantize_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] -> uint8 codes [..., D] and float32 (scale, min) [..., 2]: the int8 cache's asymmetric rounding."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / 255
    codes = torch.where(scale > 0, (x - low) / scale, 0.0).round_().clamp_(0, 255).to(torch.uint8)
    return codes, torch.cat((scale, low), -1)


def penalize(logits: Tensor, row: SampleRow) -> Tensor:
    """A copy of float64 logits [V] with logit_bias, then penalties, then the ban applied."""
    x = logits.clone()
    for token, bias in row.logit_bias.items():
        x[token] += bias
    if row.repetition_penalty != 1.0 and (seen := sorted({*row.prompt_ids, *row.output_ids})):
        some = x[seen]
        x[seen] = torch.where(some > 0, some / row.repetition_penalty, some * row.repetition_penalty)
    if row.output_ids and (row.presence_penalty or row.frequency_penalty):
        ids, counts = torch.tensor(list(row.output_ids)).unique(return_counts=True)
        x[ids] -= row.presence_penalty + row.frequency_penalty * counts.to(x.dtype)  # not in float32
    if row.banned:
        x[list(row.banned)] = -torch.inf
    return x


def sample_row(logits: Tensor, row: SampleRow) -> int:
    """Choose one id from float64 logits [V]: the definition of sampling every backend is tested against."""
    x = penalize(logits, row)
    top = float(x.max())
    if not top < torch.inf or top == -torch.inf:  # NaN propagates through max
        raise BackendError("the logits hold NaN or infinity, or every token is banned: the model's output is unusable")
    if row.temperature == 0:
        return int((x == top).nonzero()[0])
    order = torch.argsort(x, descending=True, stable=True)
    if row.top_k > 0:
        order = order[: row.top_k]
    p = torch.exp((x[order] - top) / row.temperature)
    p /= p.sum()
    if row.top_p < 1.0:
        keep = 1 + int((p.cumsum(0) < row.top_p).sum())
        p, order = p[:keep], order[:keep]
    if row.min_p > 0.0:
        p = p[p >= row.min_p * p[0]]
    cumulative = (p / p.sum()).cumsum(0)
    choice = int((cumulative <= row.uniform).sum())
    if choice >= len(p):  # uniform within rounding of 1
        choice = int((p > 0).sum()) - 1
    return int(order[choice])
