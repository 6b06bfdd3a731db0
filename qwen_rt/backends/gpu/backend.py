"""GpuBackend: the waist over the kernels of csrc/gpu. CUDA, DCU and the emulated devices differ only in how they open.

Compute is float16 or bfloat16 with float32 sums; the residual stream is float32. Inside a step nothing comes back to
the host but the sampled ids. Shapes are checked here, before a kernel sees a pointer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen_rt.backends.accelerator import Accelerator, check_blocks, padding
from qwen_rt.backends.base import KV, BatchMeta, Caps, KVDtype, KVSpec, Packed, Plan, Replay, SampleRow
from qwen_rt.backends.checks import check_meta
from qwen_rt.backends.gpu import attention, elementwise, linear, sampling
from qwen_rt.backends.gpu.capture import Graph, GraphReplay
from qwen_rt.backends.gpu.kernels import Kernels, Loaded
from qwen_rt.backends.gpu.plan import make_plan
from qwen_rt.backends.torch_backend import from_host
from qwen_rt.dtypes import DType
from qwen_rt.errors import BackendError, OutOfMemory
from qwen_rt.quant.formats import RawLinear, dense_format

_KV = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.uint8}


@dataclass
class GpuKV:
    """Pages [num_blocks + 1, Hkv, block, D] per layer; int8 pages have (scale, min) [..., block, 2] float32 beside.

    The page after the last belongs to no sequence: padding rows of a recorded step write there.
    """

    spec: KVSpec
    num_blocks: int
    k: list[Tensor]
    v: list[Tensor]
    k_affine: list[Tensor] = field(default_factory=list)
    v_affine: list[Tensor] = field(default_factory=list)

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer."""
        return self.k[layer], self.v[layer]

    def affine(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """(scale, min) of K and of V, for int8 pages."""
        return (self.k_affine[layer], self.v_affine[layer]) if self.k_affine else None


class GpuBackend(Accelerator):
    """What all GPUs share; a subclass opens its device and says how a module gets there."""

    caps = Caps(
        compute_dtypes=("float16", "bfloat16"),
        dense_dtypes=("float16", "bfloat16", "float32"),
        weight_bits=(4, 8),
        kv_dtypes=("float16", "bfloat16", "int8"),
        kv_block=16,
        capture=True,
    )
    warp: ClassVar[int]

    def __init__(self, index: int = 0, compute_dtype: DType | None = None) -> None:
        """Open device `index`. The first kernels are built now, so that a device without any way to get them fails
        here, with every route's reason (BackendError)."""
        self.index = index
        self._open(index)
        offered = self._compute_dtypes()
        self.compute_dtype = compute_dtype or offered[0]
        if self.compute_dtype not in offered:
            raise BackendError(
                f"{self.name}:{index} cannot compute in {self.compute_dtype}; choose {', '.join(offered)}"
            )
        # The cache holds what the kernels compute in by default; the other 16-bit type is there to be asked for.
        own: KVDtype = "float16" if self.compute_dtype == "float16" else "bfloat16"
        kv_dtypes = (own, *(d for d in self.caps.kv_dtypes if d != own))
        self.caps = replace(type(self).caps, compute_dtypes=offered, kv_dtypes=kv_dtypes)
        self.device_kernels = Kernels(self._load, self._stream, self.warp)
        self.traits = self._traits()
        self._open_books()
        try:
            self.device_kernels.module("elementwise")
        except BackendError as e:
            raise BackendError(f"{self.name}:{index} has no kernels: {e}") from e

    # -- what a device provides --------------------------------------------------------------------------------
    device: torch.device
    arch: str

    @abstractmethod
    def _open(self, index: int) -> None:
        """Set `device` and `arch` and get hold of the driver; BackendError says why not."""

    def _compute_dtypes(self) -> tuple[DType, ...]:
        """Compute dtypes of the opened device, the default first."""
        return type(self).caps.compute_dtypes

    def _traits(self) -> linear.Traits:
        """What decides how a linear is launched."""
        p = torch.cuda.get_device_properties(self.device)
        return linear.traits_of(self.arch, p.multi_processor_count, p.total_memory)

    @abstractmethod
    def _load(self, module: str) -> Loaded:
        """Build or find a module's image and load it; BackendError lists every route's reason."""

    @abstractmethod
    def _stream(self) -> int:
        """The stream that torch's work goes to now."""

    @abstractmethod
    def _graph(self) -> Graph:
        """A new, empty graph."""

    def kernels(self) -> dict[str, str]:
        """Operation -> kernel, and how it came here; `capture` says what is recorded and what is not, and why."""
        routes = self.device_kernels.routes()

        def about(*modules: str) -> str:
            told = dict.fromkeys(routes.get(m, "built at first use") for m in modules)
            return f"{self.arch} {'/'.join(modules)}.cu: {'; '.join(told)}"

        return {
            "embedding": about("elementwise"),
            "linear": f"{about('linear_gemv', 'linear_gemm')}; dense: torch.matmul",
            "rms_norm": about("norm"),
            "rope": about("rope_kv"),
            "store_kv": about("rope_kv"),
            "attention": about("attention_decode", "attention_prefill"),
            "silu_mul": about("elementwise"),
            "sample": about("sample"),
            "capture": self._capture_report(),
        }

    # -- at load ---------------------------------------------------------------------------------------------
    def pack_linear(self, raw: RawLinear) -> Packed:
        """The layout of csrc/gpu/linear.cuh, packed on the device by row chunks. Non-finite values: CheckpointError."""
        packed = linear.pack(raw, self.device, self.dtype)
        if packed.dense is not None:  # dense weights are held in the compute dtype: say so in reports
            packed.format = dense_format(self.compute_dtype)
        return packed

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Zeroed pages, and one more for the padding of recorded steps."""
        if spec.dtype not in self.caps.kv_dtypes or spec.block_size != self.caps.kv_block:
            raise BackendError(
                f"{self.name} keeps caches of {', '.join(self.caps.kv_dtypes)} in blocks of {self.caps.kv_block}; "
                f"asked for {spec.dtype} in blocks of {spec.block_size}"
            )
        if spec.head_size > elementwise.MAX_HEAD:
            raise BackendError(f"{self.name} serves heads of up to {elementwise.MAX_HEAD}; asked for {spec.head_size}")
        need, (free, _) = spec.block_bytes() * (num_blocks + 1), self.memory()
        if need > free:
            raise OutOfMemory(
                f"a cache of {num_blocks} blocks needs {need} bytes and {free} are free; "
                "lower max_model_len or choose kv_cache='int8'"
            )
        shape = (num_blocks + 1, spec.num_kv_heads, spec.block_size)

        def pages(dtype: torch.dtype, last: int) -> list[Tensor]:
            return [torch.zeros((*shape, last), dtype=dtype, device=self.device) for _ in range(spec.num_layers)]

        try:
            k, v = (pages(_KV[spec.dtype], spec.head_size) for _ in "kv")
            affine = [pages(torch.float32, 2) for _ in "kv"] if spec.dtype == "int8" else []
        except torch.OutOfMemoryError as e:
            raise OutOfMemory(f"a cache of {num_blocks} blocks needs {need} bytes: {e}") from e
        return GpuKV(spec, num_blocks, k, v, *affine)

    # -- once a step -----------------------------------------------------------------------------------------
    def plan(self, meta: BatchMeta) -> Plan:
        """Check `meta` (ValueError), and bring it to the device in one copy."""
        check_meta(meta, self.caps.kv_block)
        return make_plan(meta, self.caps.kv_block, self.device)

    # -- in a layer ------------------------------------------------------------------------------------------
    def embedding(self, ids: Tensor | NDArray[np.int64], w: Packed) -> Tensor:
        """Rows of the table. Ids on the host are checked here; on a device, one outside the table gives NaN."""
        n = w.shape[0]
        # In a recording, the emulator's tensors are on their device, as a card's always are.
        host = isinstance(ids, np.ndarray) or (ids.device.type == "cpu" and self.device_kernels.recorder is None)
        if isinstance(ids, np.ndarray):
            ids = from_host(ids)
        if ids.dtype != torch.int64 or ids.ndim != 1:
            raise TypeError(f"embedding: ids are {ids.dtype} of shape {tuple(ids.shape)}; want int64 [T]")
        if host:
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n:
                raise ValueError(f"token ids must be within 0..{n - 1}")
            if self.device.type != "cpu":
                ids = ids.pin_memory().to(self.device, non_blocking=True)
        return linear.embedding(self.device_kernels, ids, w, self.dtype)

    def linear(self, x: Tensor, w: Packed) -> Tensor:
        """x W^T + bias (csrc/gpu/linear.cuh); dense weights go to cuBLAS/hipBLAS through torch."""
        if x.ndim != 2 or x.shape[1] != w.shape[1]:
            raise ValueError(f"linear of {w.shape[1]} inputs given {tuple(x.shape)}")
        self._check_dtype("linear", x)
        return linear.run(self.device_kernels, x, w, self.traits)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """csrc/gpu/norm.cu: x [T, D] of the compute dtype or float32, or heads [T, H, D]."""
        self._check_dtype("rms_norm", weight, *(() if x.dtype == torch.float32 else (x,)))
        return elementwise.rms_norm(self.device_kernels, x, weight, eps, residual)

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """csrc/gpu/rope_kv.cu, in place."""
        self._check_dtype("rope", q, k)
        return elementwise.rope(self.device_kernels, q, k, cos, sin)

    def store_kv(self, kv: KV, layer: int, k: Tensor, v: Tensor, plan: Plan) -> None:
        """csrc/gpu/rope_kv.cu: convert or quantise into the step's slots."""
        check_blocks(kv, plan)
        self._check_dtype("store_kv", k, v)
        elementwise.store_kv(self.device_kernels, k, v, kv.pages(layer), kv.affine(layer), plan.slots)

    def rope_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, kv: KV, layer: int,
        plan: Plan,
    ) -> Tensor:  # fmt: skip
        """csrc/gpu/rope_kv.cu: both in one pass, q in place."""
        check_blocks(kv, plan)
        self._check_dtype("rope_store_kv", q, k, v)
        pages, affine = kv.pages(layer), kv.affine(layer)
        return elementwise.rope_store_kv(self.device_kernels, q, k, v, cos, sin, q_scale, pages, affine, plan.slots)

    def attention(self, q: Tensor, kv: KV, layer: int, plan: Plan, scale: float, window: int | None = None) -> Tensor:
        """csrc/gpu/attention_*.cu: decode split over the context, prefill in tiles on the matrix units."""
        self._check_queries(q, kv, plan)
        return attention.run(self.device_kernels, q, kv, layer, plan, scale, window)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """csrc/gpu/elementwise.cu."""
        self._check_dtype("silu_mul", gate_up)
        return elementwise.silu_mul(self.device_kernels, gate_up)

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """csrc/gpu/sample.cu; only the ids come to the host. NaN or infinite logits: BackendError."""
        if logits.shape[0] != len(rows):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sampling rows")
        return sampling.run(self.device_kernels, logits, rows)

    # -- whole steps -----------------------------------------------------------------------------------------
    def capture(
        self, step: Callable[[Sequence[Tensor], Plan], Tensor], inputs: Sequence[Tensor], kv: KV, max_blocks: int
    ) -> Replay | None:
        """A graph of the step, or None with the reason kept for kernels()."""
        rows = inputs[0].shape[0]

        def record() -> Replay:
            meta = padding(rows, kv.num_blocks, self.caps.kv_block)
            plan = make_plan(meta, self.caps.kv_block, self.device, max_blocks=max_blocks)
            return GraphReplay(self._graph(), step, inputs, plan, kv.num_blocks)

        return self._recorded(rows, max_blocks, record)
