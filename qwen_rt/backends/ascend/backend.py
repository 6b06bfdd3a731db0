"""AscendBackend: the waist over torch_npu's operators.

Compute is bfloat16 (910B) or float16; the residual stream is float32. Where the SoC lacks the fused operators (910A),
or a shape is outside what their documentation allows, plain operators of torch on the NPU do the same: kernels() says
which. Inside a step nothing comes back to the host but the sampled ids, and no operator of it falls back to the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qwen_rt.backends.accelerator import Accelerator, NotRecordable, check_blocks, padding
from qwen_rt.backends.ascend import attention, cache, elementwise, linear, probe, sampling
from qwen_rt.backends.ascend.cache import BLOCK
from qwen_rt.backends.ascend.capture import NpuReplay
from qwen_rt.backends.ascend.plan import AscendPlan, make_plan
from qwen_rt.backends.ascend.soc import Soc, soc_of
from qwen_rt.backends.base import KV, BatchMeta, Caps, KVDtype, KVSpec, Packed, Plan, Probe, Replay, SampleRow
from qwen_rt.backends.checks import check_cache, check_meta
from qwen_rt.backends.torch_backend import from_host
from qwen_rt.dtypes import DType
from qwen_rt.errors import BackendError, OutOfMemory
from qwen_rt.quant.formats import RawLinear

MASK = 2048  # side of the mask that sparse attention takes


class AscendBackend(Accelerator):
    """NPUs by torch_npu index (ASCEND_RT_VISIBLE_DEVICES applies)."""

    name = "ascend"
    recordings = "NPUGraph"
    caps = Caps(
        compute_dtypes=("bfloat16", "float16"),
        dense_dtypes=("bfloat16", "float16", "float32"),
        weight_bits=(4, 8),
        kv_dtypes=("bfloat16", "float16", "int8"),
        kv_block=BLOCK,
        capture=True,
    )

    def __init__(self, index: int = 0, compute_dtype: DType | None = None) -> None:
        self.index = index
        self._open(index)
        kinds = tuple(d for d in self.caps.compute_dtypes if d != "bfloat16" or self.soc.bfloat16)
        self.compute_dtype = compute_dtype or kinds[0]
        if self.compute_dtype not in kinds:
            offered = ", ".join(kinds)
            raise BackendError(f"{self.name}:{index} ({self.soc.name}) cannot compute in {compute_dtype}; {offered}")
        # Attention takes queries and keys of one type: the cache holds the compute dtype, or int8.
        own: KVDtype = "float16" if self.compute_dtype == "float16" else "bfloat16"
        self.caps = replace(
            self.caps,
            compute_dtypes=kinds,
            kv_dtypes=(own, "int8"),
            capture=self.soc.graphs and self.device.type == "npu",
        )
        self._fused = self.npu if self.soc.fused else None
        self._mask = torch.ones(MASK, MASK, dtype=torch.bool).triu(1).to(self.device)
        self._wide: WeakIdKeyDictionary = WeakIdKeyDictionary()  # norm weights in float32
        self._open_books()
        self._pool: Any = None

    device: torch.device
    npu: Any  # the torch_npu module: operators
    runtime: Any  # torch_npu.npu: devices, memory, graphs
    soc: Soc

    def _open(self, index: int) -> None:
        """Import torch_npu and set `device`, `npu`, `runtime` and `soc`; BackendError says why not."""
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints its warnings, and stdout may be for programs
                self.npu = importlib.import_module("torch_npu")
            self.runtime = self.npu.npu
        except Exception as e:  # a vendor's import fails in many ways
            raise BackendError(f"torch_npu does not import: {type(e).__name__}: {e}; {probe.PAIR}") from e
        try:
            count = self.runtime.device_count() if self.runtime.is_available() else 0
            if index >= count:
                raise BackendError(f"{self.name}:{index}: torch_npu sees {count} devices; see `npu-smi info`")
            self.device = torch.device("npu", index)
            self.runtime.set_device(self.device)
            self.soc = soc_of(self.runtime.get_device_name(index))
        except RuntimeError as e:
            raise BackendError(f"{self.name}:{index} does not open: {e}") from e

    @classmethod
    def probe(cls) -> Probe:
        """Every NPU, or what is missing or out of step on the way to one; nothing of torch is imported."""
        return probe.probe()

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes; what torch holds and does not use counts as free."""
        free, total = self.runtime.mem_get_info(self.device)
        return free + self.runtime.memory_reserved(self.device) - self.runtime.memory_allocated(self.device), total

    def kernels(self) -> dict[str, str]:
        """Operation -> torch_npu's operator, or "plain torch operators"."""
        plain = f"plain torch operators ({self.soc.name} has no fused one)"

        def fused(*names: str) -> str:
            return " / ".join(names) if self._fused is not None else plain

        product = "npu_weight_quant_batchmatmul; other groups, and dense: matmul"
        return {
            "embedding": "index_select",
            "linear": product if self._fused is not None else "matmul; integer weights are held dense",
            "rms_norm": fused("npu_rms_norm", "npu_add_rms_norm"),
            "rope": fused("npu_rotary_mul"),
            "store_kv": fused("npu_scatter_pa_kv_cache"),
            "attention": fused("npu_fused_infer_attention_score (head sizes of other multiples than 16: plain)"),
            "silu_mul": fused("npu_swiglu"),
            "sample": "sort, softmax and cumsum in float32",
            "capture": self._capture_report() if self.soc.graphs else f"off ({self.soc.name} has no NPUGraph)",
        }

    # -- at load ---------------------------------------------------------------------------------------------
    def pack_linear(self, raw: RawLinear) -> Packed:
        """The layout of linear.py, by row chunks. Non-finite values: CheckpointError."""
        try:
            return linear.pack(self._fused, raw, self.device, self.compute_dtype)
        except torch.OutOfMemoryError as e:
            raise OutOfMemory(f"{raw.name} of shape {raw.shape} does not fit the device: {e}") from e

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Zeroed pages, and one more for the padding of recorded steps."""
        check_cache(self, spec, num_blocks + 1)
        try:
            return cache.allocate(spec, num_blocks, self.device)
        except torch.OutOfMemoryError as e:
            raise OutOfMemory(
                f"a cache of {num_blocks} blocks needs {spec.block_bytes() * num_blocks} bytes: {e}"
            ) from e

    # -- once a step -----------------------------------------------------------------------------------------
    def plan(self, meta: BatchMeta) -> Plan:
        """Check `meta` (ValueError), and bring it to the device in one copy."""
        check_meta(meta, BLOCK)
        return make_plan(meta, BLOCK, self.device)

    # -- in a layer ------------------------------------------------------------------------------------------
    def embedding(self, ids: Tensor | NDArray[np.int64], w: Packed) -> Tensor:
        """Rows of the table. Ids on the host are checked here; on the device they are clamped to the table."""
        n = w.shape[0]
        if isinstance(ids, np.ndarray):
            ids = from_host(ids)
        if ids.dtype != torch.int64 or ids.ndim != 1:
            raise TypeError(f"embedding: ids are {ids.dtype} of shape {tuple(ids.shape)}; want int64 [T]")
        if ids.device.type == "cpu":
            if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n:
                raise ValueError(f"token ids must be within 0..{n - 1}")
            ids = (ids.pin_memory() if self.device.type == "npu" else ids).to(self.device, non_blocking=True)
        else:
            ids = ids.clamp(0, n - 1)
        return linear.embedding(ids, w)

    def linear(self, x: Tensor, w: Packed) -> Tensor:
        """x W^T + bias."""
        if x.ndim != 2 or x.shape[1] != w.shape[1]:
            raise ValueError(f"linear of {w.shape[1]} inputs given {tuple(x.shape)}")
        self._check_dtype("linear", x)
        return linear.run(self._fused, x, w)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [..., D] of the compute dtype or float32; in float32 to the end, then the compute dtype."""
        self._check_dtype("rms_norm", weight, *(() if x.dtype == torch.float32 else (x,)))
        wide = self._wide.get(weight)
        if wide is None:
            wide = self._wide[weight] = weight.float()
        return elementwise.rms_norm(self._fused, x, weight, wide, eps, residual)

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """New tensors, rotated in float32."""
        self._check_dtype("rope", q, k)
        return elementwise.rope(self._fused, q, k, *elementwise.widen(cos, sin))

    def store_kv(self, kv: KV, layer: int, k: Tensor, v: Tensor, plan: Plan) -> None:
        """Into the step's slots; an int8 cache quantises on the device."""
        check_blocks(kv, plan)
        self._check_dtype("store_kv", k, v)
        if k.shape != v.shape or k.shape != (plan.rows, kv.spec.num_kv_heads, kv.spec.head_size):
            raise ValueError(f"keys {tuple(k.shape)} do not fit {plan.rows} rows of {kv.spec}")
        cache.store(self._fused, kv, layer, k, v, plan)

    def rope_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, kv: KV, layer: int,
        plan: Plan,
    ) -> Tensor:  # fmt: skip
        """As the default; cos and sin are widened once a step."""
        self._check_dtype("rope", q, k)
        held = plan.cache.get("rope")
        if held is None or held[0] is not cos or held[1] is not sin:
            held = plan.cache["rope"] = (cos, sin, *elementwise.widen(cos, sin))
        q, k = elementwise.rope(self._fused, q, k, held[2], held[3])
        self.store_kv(kv, layer, k, v, plan)
        return q if q_scale is None else q * q_scale

    def attention(self, q: Tensor, kv: KV, layer: int, plan: Plan, scale: float, window: int | None = None) -> Tensor:
        """attention.py: npu_fused_infer_attention_score over pages."""
        self._check_queries(q, kv, plan)
        return attention.run(self._fused, q, kv, layer, plan, scale, window, self._mask)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu of the first half times the second."""
        self._check_dtype("silu_mul", gate_up)
        return elementwise.silu_mul(self._fused, gate_up)

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """Only the ids come to the host. NaN or infinite logits: BackendError."""
        if logits.shape[0] != len(rows):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} sampling rows")
        return sampling.run(logits, rows)

    # -- whole steps -----------------------------------------------------------------------------------------
    def capture(
        self, step: Callable[[Sequence[Tensor], Plan], Tensor], inputs: Sequence[Tensor], kv: KV, max_blocks: int
    ) -> Replay | None:
        """An NPUGraph of the step, or None with the reason kept for kernels()."""
        rows = inputs[0].shape[0]

        def record() -> Replay:
            if not self.caps.capture:
                raise NotRecordable("no NPUGraph")
            plan: AscendPlan = make_plan(padding(rows, kv.num_blocks, BLOCK), BLOCK, self.device, max_blocks)
            plan.num_blocks, plan.recorded = kv.num_blocks, True  # the padding's block is the one after those in use
            self._pool = self._pool or self.runtime.graph_pool_handle()
            return NpuReplay(self.runtime, step, inputs, plan, kv.num_blocks, self._pool)

        return self._recorded(rows, max_blocks, record)
