"""CpuBackend: the native kernels of csrc/cpu behind the waist. Compute is float32; weights stay in their own format."""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.backends.base import (
    KV,
    Backend,
    BatchMeta,
    Caps,
    DeviceInfo,
    KVDtype,
    KVSpec,
    Packed,
    Plan,
    Probe,
    Replay,
    Rung,
    SampleRow,
    Tensor,
)
from qwen_rt.backends.checks import check_cache, host_memory
from qwen_rt.backends.cpu.capture import CpuReplay, Recorder
from qwen_rt.config import Settings
from qwen_rt.dtypes import DType, host_dtype
from qwen_rt.errors import BackendError, CheckpointError
from qwen_rt.quant.formats import Blocks, LinearFormat, RawLinear

PACK_ELEMENTS = 1 << 21  # weights in flight while packing: bounds scratch memory
WAITING_BYTES = 1 << 26  # packed in one native call while a model is loaded: a tenth of a second, or a few
ROW_MULTIPLE = 16  # packed panels hold 16 outputs

BUFFERED = 1 << 18  # elements from which on a result's memory is kept for others
MAX_RECORDED = 16  # sequences of a recorded decode step

# Instruction sets with kernels for these only, and the one that serves the other operations.
_OWN = {"avx512": ("linear", "attention", "silu_mul"), "neon": ("linear", "attention")}
_BELOW = {"avx512": "avx2", "neon": "scalar"}
# Evidence for a processor's kernels (docs/hardware.md).
_RUNGS: dict[str, Rung] = {"x86_64": "device", "AMD64": "device", "aarch64": "emulated", "arm64": "emulated"}


def _native() -> ModuleType:
    """The extension module; BackendError says how to get it."""
    try:
        from qwen_rt import _cpu
    except ImportError as e:
        raise BackendError(
            f"the native CPU extension is missing ({e}); install a C++17 compiler and the Python headers "
            "(Debian/Ubuntu: apt install g++ python3-dev), then reinstall qwen-rt"
        ) from e
    return _cpu


@dataclass
class PackedCpu:
    """A weight in the native layout (csrc/cpu/linear.h)."""

    shape: tuple[int, int]
    format: LinearFormat
    native: Any

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.native.nbytes


@dataclass
class TableCpu:
    """A table in its file (csrc/cpu/table.h)."""

    shape: tuple[int, int]
    format: LinearFormat
    native: Any
    nbytes: int = 0


@dataclass
class CpuKV:
    """The paged cache: `layers` are native views of numpy's memory, which they keep."""

    spec: KVSpec
    num_blocks: int
    layers: list[Any]


@dataclass
class _Waiting:
    """A weight to be packed from what files have; the parts are what native pack_blocks and pack_words take."""

    raw: RawLinear
    native: Any
    blocks: list[tuple[Any, ...]] = field(default_factory=list)
    words: list[tuple[Any, ...]] = field(default_factory=list)


class _Local(threading.local):
    """What goes on in this thread: what records, if anything does, and within packing() what waits to be packed."""

    recorder: Recorder | None = None
    waiting: list[_Waiting] | None = None


class CpuBackend(Backend):
    """Scalar, AVX2+FMA, AVX-512 VNNI and NEON kernels, chosen at run time, over a persistent thread pool."""

    name = "cpu"
    caps = Caps(
        compute_dtypes=("float32",),
        dense_dtypes=("float32", "float16", "bfloat16"),
        weight_bits=(4, 5, 6, 8),
        kv_dtypes=("float16", "float32", "bfloat16", "int8"),
        kv_block=32,
        tables_in_files=True,
        capture=True,
    )

    def __init__(self, index: int = 0, compute_dtype: DType | None = None) -> None:
        if index != 0:
            raise BackendError(f"the CPU is one device, index 0; got {index}")
        if compute_dtype not in (None, "float32"):
            raise BackendError(f"the CPU computes in float32, not {compute_dtype}; weights keep their own format")
        self.native = _native()
        self._local = _Local()
        settings = Settings.from_env()
        self.native.set_num_threads(settings.threads)
        try:
            self.native.set_isa(settings.cpu_isa or self.native.default_isa())
        except ValueError as e:
            raise BackendError(f"QWEN_RT_CPU_ISA={settings.cpu_isa}: {e}") from e
        self.native.set_activation_bits(settings.cpu_activation_bits)
        self.caps = replace(
            self.caps,
            activation_bits=16 if self.native.active_isa() == "scalar" else settings.cpu_activation_bits,
            exact_rows=self.native.EXACT_ROWS,
            integer_scales=self.native.active_isa() == "avx2" and settings.cpu_activation_bits == 8,
        )
        half: tuple[KVDtype, ...] = ("float16", "bfloat16") if self.caps.activation_bits == 8 else ()
        integers: dict[str, tuple[KVDtype, ...]] = {"avx512": ("int8", *half), "avx2": half}
        self.caps = replace(self.caps, integer_attention=integers.get(self.native.active_isa(), ()))
        self.index = index
        self.compute_dtype = "float32"

    @classmethod
    def probe(cls) -> Probe:
        """Usable when the native extension was built."""
        try:
            native = _native()
        except BackendError as e:
            return Probe(reason=str(e))
        name = platform.machine()
        try:
            with open("/proc/cpuinfo") as f:
                name = next((x.split(":", 1)[1].strip() for x in f if x.startswith("model name")), name)
        except OSError:
            pass
        detail = f"{native.default_isa()} kernels, {Settings.from_env().threads} threads"
        rung = _RUNGS.get(platform.machine(), "compiled")
        return Probe((DeviceInfo(0, name, host_memory()[1], detail),), rung=rung)

    def memory(self) -> tuple[int, int]:
        """(available, total) bytes of the machine."""
        return host_memory()

    def kernels(self) -> dict[str, str]:
        """Every operation is native; in which instruction set, and what integer weights meet."""
        isa, threads = self.native.active_isa(), self.native.num_threads()
        ops = ("embedding", "linear", "rms_norm", "rope", "store_kv", "attention", "silu_mul", "sample")
        native = {op: f"native {isa if op in _OWN.get(isa, ops) else _BELOW[isa]}, {threads} threads" for op in ops}
        rounding = "16-bit activations"
        if self.caps.activation_bits != 16:
            kinds = " by codes of up to 6 bits" if isa == "avx2" else ""
            rounding += f", {self.caps.activation_bits}-bit from {self.caps.exact_rows + 1} rows on{kinds}"
        met = "".join(
            f"; {caches} 16-bit integers"
            for dtype, caches in (("int8", "int8 caches meet"), ("float16", "in prompts 16-bit caches meet"))
            if dtype in self.caps.integer_attention
        )
        return {
            **native,
            "linear": f"{native['linear']}; integer weights meet {rounding}",
            "attention": f"{native['attention']}{met}",
            "capture": f"native calls, replayed for up to {MAX_RECORDED} sequences; larger batches run eagerly",
        }

    # -- at load ---------------------------------------------------------------------------------------------
    @contextmanager
    def packing(self) -> Iterator[None]:
        """Threads that wait let others run; what files hold waits for more of it and is packed in one native call.

        Between calls the interpreter is needed, which others may hold for long.
        """
        self.native.set_spinning(False)
        waiting = self._local.waiting = []
        try:
            yield
            self._pack_waiting(waiting)
        finally:
            self._local.waiting = None
            self.native.set_spinning(True)

    def pack_linear(self, raw: RawLinear) -> Packed:
        """Panels of 16 outputs (csrc/cpu/linear.h). Non-finite values: CheckpointError."""
        if raw.format.bits == 5 and raw.format.group_size % 32:
            raw = raw.held((8,))  # 5-bit codes are packed by 32
        (n, k), fmt = raw.shape, raw.format
        kind = f"int{fmt.bits}" if fmt.grouped else str(fmt.dtype)
        aux = "mins" if fmt.has_mins else "zeros" if fmt.has_zeros else "none"
        native = self.native.PackedLinear(kind, aux, n, k, fmt.group_size)
        if not self._pack_stored(native, raw):
            self._pack_codes(native, raw)
        if raw.bias is not None:
            native.set_bias(np.ascontiguousarray(raw.bias, np.float32))
        if raw.perm is not None:
            native.set_perm(np.ascontiguousarray(raw.perm, np.int32))
        return PackedCpu(raw.shape, fmt, native)

    def _pack_codes(self, native: Any, raw: RawLinear) -> None:
        """Pack the rows as read; says what is wrong with them."""
        for start, _, part in raw.chunks(PACK_ELEMENTS, ROW_MULTIPLE):
            if raw.format.grouped:
                stored = (part.codes, part.scales, part.zeros, part.mins)
                native.pack_grouped(start, *(None if a is None else np.ascontiguousarray(a) for a in stored))
            else:
                assert part.values is not None
                native.pack_dense(start, np.ascontiguousarray(part.values))

    def _pack_stored(self, native: Any, raw: RawLinear) -> bool:
        """Pack the rows from what the file has, read and checked natively on the way, within packing() later.

        False where there is none such.
        """
        raw.check("bias values", raw.bias)
        done, weight = 0, _Waiting(raw, native)
        for part in raw.stored(0, raw.shape[0]) or ():
            if isinstance(part, Blocks):
                weight.blocks.append((native, done, part.kind, part.file, part.offset, part.rows))
            else:
                what = (part.scales, part.zeros, part.source)
                weight.words.append((native, done, part.file, part.offset, part.stride, *what))
            done += part.rows
        if done != raw.shape[0]:
            return False
        waiting = self._local.waiting
        if waiting is None:
            self._pack_waiting([weight])
        else:
            waiting.append(weight)
            if sum(w.native.nbytes for w in waiting) >= WAITING_BYTES:
                self._pack_waiting(waiting)
                waiting.clear()
        return True

    def _pack_waiting(self, weights: list[_Waiting]) -> None:
        """Pack them; those that do not fill panels, cannot be read or have scales not finite by _pack_codes."""
        for pack, parts in (
            (self.native.pack_blocks, [part for weight in weights for part in weight.blocks]),
            (self.native.pack_words, [part for weight in weights for part in weight.words]),
        ):
            while (bad := pack(parts)) < len(parts):
                weight = next(w for w in weights if w.native is parts[bad][0])
                self._pack_codes(weight.native, weight.raw)
                parts = [part for part in parts[bad:] if part[0] is not weight.native]

    def pack_table(self, raw: RawLinear) -> Packed:
        """Left where it is, read once to see that it is finite; a table that no file has row by row is packed."""
        place = raw.place
        if place is None:
            return self.pack_linear(raw)
        try:
            native = self.native.Table(str(place.path), place.offset, *raw.shape, place.kind)
            # Reading what is not finite for packing says where.
            return TableCpu(raw.shape, raw.format, native) if native.finite() else self.pack_linear(raw)
        except RuntimeError as e:
            raise CheckpointError(str(e)) from e

    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """Zeroed pages [num_blocks, layers, 2, Hkv, block, D]; OutOfMemory says bytes needed and free."""
        check_cache(self, spec, num_blocks)
        # All layers of a block lie together: the system clears huge pages as they are first written, and a short text
        # needs one or two of them, where with a stretch for each layer it needs two a layer.
        shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, spec.block_size)
        pages = np.zeros((*shape, spec.head_size), _kv_dtype(spec.dtype))
        affine = [np.zeros(shape, np.float32) for _ in ("scale", "min")] if spec.dtype == "int8" else []
        layers = []
        for i in range(spec.num_layers):
            beside = [part[:, i, which] for which in (0, 1) for part in affine]
            layers.append(self.native.KvLayer(pages[:, i, 0], pages[:, i, 1], *beside))
        return CpuKV(spec, num_blocks, layers)

    # -- once a step -----------------------------------------------------------------------------------------
    def plan(self, meta: BatchMeta) -> Plan:
        """The step as the kernels read it; ValueError when it is not one."""
        return self.native.Step(meta.q_lens, meta.kv_lens, meta.block_table, meta.slots, self.caps.kv_block)

    # -- in a layer ------------------------------------------------------------------------------------------
    def embedding(self, ids: Tensor, w: Packed) -> Tensor:
        """Rows of the table, dequantised; ids outside it: ValueError."""
        out = self._empty(ids.shape[0], w.shape[1])
        self.native.embedding(ids, w.native, out)
        return out

    def linear(self, x: Tensor, w: Packed) -> Tensor:
        """x W^T + bias; how exact, and why, stands in csrc/cpu/linear.h."""
        out = self._empty(x.shape[0], w.shape[0])
        self.native.linear(x, w.native, out)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise (and sum with the residual first)."""
        normed = self._empty(*x.shape)
        if residual is None:
            self.native.rms_norm(x, weight, eps, normed)
            return normed, x
        summed = self._empty(*x.shape)
        self.native.rms_norm(x, weight, eps, normed, residual, summed)
        return normed, summed

    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """In place."""
        self.native.rope(q, k, cos, sin)
        return q, k

    def store_kv(self, kv: KV, layer: int, k: Tensor, v: Tensor, plan: Plan) -> None:
        """Convert or quantise into the step's slots."""
        self.native.store_kv(kv.layers[layer], k, v, plan)

    def attention(self, q: Tensor, kv: KV, layer: int, plan: Plan, scale: float, window: int | None = None) -> Tensor:
        """Paged attention, prefill and decode alike."""
        out = self._empty(*q.shape)
        self.native.attention(q, kv.layers[layer], plan, scale, window or 0, out)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up."""
        out = self._empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self.native.silu_mul(gate_up, out)
        return out

    def swiglu(self, x: Tensor, gate_up: Packed) -> Tensor:
        """Of many rows and integer weights, only the product of the two halves is written."""
        out = self._empty(x.shape[0], gate_up.shape[0] // 2)
        self.native.swiglu(x, gate_up.native, out)
        return out

    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """One id a row; NaN or infinite logits: BackendError."""
        return self.native.sample(logits, rows)

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """Weights over one input that could not be fused."""
        out = self._empty(*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
        return self._compute(_side_by_side, parts, out)

    def rope_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, kv: KV, layer: int,
        plan: Plan,
    ) -> Tensor:  # fmt: skip
        """In place but for the multiplication, which a replay of fewer rows would repeat on those it leaves out."""
        self.native.rope(q, k, cos, sin)
        self.native.store_kv(kv.layers[layer], k, v, plan)
        return q if q_scale is None else self._compute(np.multiply, (q, q_scale), self._empty(*q.shape))

    def _compute(self, function: Callable[..., Any], inputs: Sequence[Tensor], out: Tensor) -> Tensor:
        """out, after function(*inputs, out=out); where a step is recorded, after that in each replay."""
        if self._local.recorder is not None:
            self._local.recorder.add(function, inputs, out)
        else:
            function(*inputs, out=out)
        return out

    def _empty(self, *shape: int) -> NDArray[np.float32]:
        """An uninitialised array; a large one in memory that an earlier one has left (csrc/cpu/memory.h)."""
        if self._local.recorder is not None:
            return self._local.recorder.empty(shape)
        size = math.prod(shape)
        if size < BUFFERED:
            return np.empty(shape, np.float32)
        return np.frombuffer(self.native.Buffer(4 * size), np.float32).reshape(shape)

    # -- whole steps -----------------------------------------------------------------------------------------
    def capture(
        self, step: Callable[[Sequence[Tensor], Plan], Tensor], inputs: Sequence[Tensor], kv: KV, max_blocks: int
    ) -> Replay | None:
        """A recording for steps of up to MAX_RECORDED sequences; in larger ones the kernels outweigh Python by far."""
        rows = len(inputs[0])
        if rows > MAX_RECORDED:
            return None
        plan = self.native.Step([1] * rows, [1] * rows, [[0]] * rows, [0] * rows, self.caps.kv_block)
        recorder = self._local.recorder = Recorder(self.native, rows)
        try:
            return CpuReplay(step, inputs, plan, recorder)
        finally:
            self._local.recorder = None


def _side_by_side(*parts: Tensor, out: Tensor) -> None:
    np.concatenate(parts, -1, out)


def _kv_dtype(kind: KVDtype) -> np.dtype[Any]:
    return host_dtype("uint8" if kind == "int8" else kind)
