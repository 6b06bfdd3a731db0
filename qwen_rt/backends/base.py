"""The waist: the few operations a device must offer so that every Qwen runs on it.

Shapes: T tokens of the step (all sequences, concatenated), B sequences, H hidden, Hq/Hkv query/key heads, D head
size, R rows whose logits are wanted. A Tensor is the backend's own array, on its device: numpy's in host memory,
torch's where torch runs the device. Activations are `backend.compute_dtype`, the residual stream is float32 wherever
compute is float16. A kernel that cannot serve a case raises Declined
before it runs. Nothing here falls back to another device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from qwen_rt.dtypes import DType, host_dtype
from qwen_rt.quant.formats import LinearFormat, RawLinear

Tensor = Any
"""A backend's own array. The graph takes its shape and length, slices, indexes (a list, or tensor() of one), reshapes
it, and asks the backend for the rest."""

KVDtype = Literal["float32", "float16", "bfloat16", "int8"]

Rung = Literal["compiled", "emulated", "simulated", "device"]
"""The evidence ladder: compiled; emulated on the host; the vendor's package over simulated hardware; real device."""


@dataclass(frozen=True)
class DeviceInfo:
    """One usable device."""

    index: int
    name: str
    total_memory: int  # bytes
    detail: str = ""  # instruction sets, driver, compute capability ...


@dataclass(frozen=True)
class Probe:
    """What a backend found: usable devices, or the true reason there are none."""

    devices: tuple[DeviceInfo, ...] = ()
    reason: str = ""  # why not usable, and what to install; empty when usable
    rung: Rung = "compiled"
    notes: tuple[str, ...] = ()  # facts worth showing although usable (e.g. "native extension missing")

    @property
    def usable(self) -> bool:
        """True when at least one device can be used."""
        return bool(self.devices)


@dataclass(frozen=True)
class Caps:
    """What a backend can do; callers ask for these, never for its name."""

    compute_dtypes: tuple[DType, ...]  # first is the default
    dense_dtypes: tuple[DType, ...]  # dense weights it takes: kept as they are, or held in the compute dtype
    weight_bits: tuple[int, ...]  # of (4, 5, 6, 8): grouped integers it computes on; the loader widens others
    kv_dtypes: tuple[KVDtype, ...]  # first is what "auto" means
    kv_block: int  # tokens per page
    tables_in_files: bool = False  # pack_table() holds nothing of a table that its file has row by row
    capture: bool = False  # can record and replay a decode step; ask capture() for each batch size
    distributed: bool = False
    activation_bits: int = 16  # 8: activations of more than `exact_rows` rows meet grouped weights as 8-bit integers
    exact_rows: int = 0
    integer_scales: bool = False  # those rows meet integer scales, small groups by twos: contract.linear_bound
    integer_attention: tuple[KVDtype, ...] = ()  # caches that meet integers, 16-bit ones in prompts: attention_bound


@dataclass(frozen=True)
class KVSpec:
    """Shape of a paged cache. Bytes a block = block_bytes()."""

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: KVDtype

    def block_bytes(self) -> int:
        """Bytes of one block over all layers, K and V (int8 adds float32 scale and minimum per token and head)."""
        per_head = {
            "float32": 4 * self.head_size,
            "float16": 2 * self.head_size,
            "bfloat16": 2 * self.head_size,
            "int8": self.head_size + 8,
        }[self.dtype]
        return 2 * self.num_layers * self.block_size * self.num_kv_heads * per_head


@dataclass(frozen=True)
class BatchMeta:
    """One step of an engine, made once on the host; plain integers.

    Rows of the step are grouped by sequence, in order: sequence b owns rows sum(q_lens[:b]) ... + q_lens[b]. Its row i
    sits at absolute 0-based position kv_lens[b] - q_lens[b] + i and sees keys 0 .. that position (causal). A decode row
    is a sequence with q_len 1; a prefill chunk over a cached prefix has q_len < kv_len.
    """

    q_lens: Sequence[int]  # B: new tokens of each sequence in this step, >= 1
    kv_lens: Sequence[int]  # B: its keys once this step's are stored
    block_table: Sequence[Sequence[int]]  # B rows: ids of the blocks that hold positions 0 .. kv_len-1 (may be longer)
    slots: Sequence[int]  # T: block id * block_size + offset, where each new key goes

    def positions(self) -> list[int]:
        """Absolute position of each of the T rows."""
        return [p for q, n in zip(self.q_lens, self.kv_lens, strict=True) for p in range(n - q, n)]


Plan = Any  # opaque: what plan() made of a BatchMeta
# Opaque: a weight in the backend's layout; has .shape (N, K), .format (LinearFormat), .nbytes (0: left in its file).
Packed = Any
KV = Any  # opaque: the paged cache; has .spec (KVSpec), .num_blocks


@dataclass
class SampleRow:
    """How to choose one token: the processing order is logit_bias, penalties, temperature, top-k, top-p, min-p."""

    temperature: float = 0.0  # 0 = argmax (after bias and penalties; ties: lowest id)
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output (HF: divide positive, multiply negative)
    presence_penalty: float = 0.0  # over output
    frequency_penalty: float = 0.0  # over output
    logit_bias: dict[int, float] = field(default_factory=dict)
    banned: frozenset[int] = frozenset()  # ids that may not be chosen (min_tokens, ignore_eos)
    uniform: float = 0.0  # in [0,1), drawn by the engine from the sequence's seeded generator: same seed, same text
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()


class Replay(ABC):
    """A recorded decode step of `rows` sequences, one row each, to run again on new inputs without Python between
    its kernels.

    It was recorded on padding alone, reads its inputs and metadata from buffers of its own, and holds for any batch of
    1 .. rows sequences of at most `max_blocks` blocks each (sys.maxsize: any number).
    """

    rows: int
    max_blocks: int

    @abstractmethod
    def __call__(self, inputs: Sequence[NDArray[Any]], meta: BatchMeta) -> Tensor:
        """Run a step of B <= rows sequences with q_len 1: inputs [B, ...] in the order of capture() -> result [B, ...].

        The inputs lie on the host. Called outside of computing(), as sample() is: entering it may take longer than all
        that a step on the host has to do here.
        Rows B .. rows are padding: their keys go to a page that no sequence owns. The result is a view that the next
        call overwrites. Raises ValueError for a step that is not one (as plan() does) or does not fit.
        """


class Backend(ABC):
    """A device plugin. Subclasses implement the abstract operations; the rest have defaults in ReferenceBackend."""

    name: ClassVar[str]
    index: int
    caps: Caps
    compute_dtype: DType

    def __init__(self, index: int = 0, compute_dtype: DType | None = None) -> None:
        """Open device `index`; raises BackendError with the probe's reason when that is not possible."""
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def probe(cls) -> Probe:
        """Usable devices, or the reason why not. Never raises; imports nothing heavy at module level."""

    @abstractmethod
    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""

    def kernels(self) -> dict[str, str]:
        """Which kernel serves each operation ("linear": "avx2"), for report() and `qwen-rt devices`."""
        return {}

    # -- tensors: numpy arrays, unless a subclass has others (TorchBackend) ------------------------------------
    def tensor(self, x: NDArray[Any]) -> Tensor:
        """A host array on the device; its number format stays."""
        return x

    def array(self, x: Tensor) -> NDArray[Any]:
        """A tensor as a host array."""
        return x

    def cast(self, x: Tensor, dtype: DType) -> Tensor:
        """x in another float format; itself when it has that."""
        return x.astype(host_dtype(dtype), copy=False)

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors side by side, along the last axis."""
        return np.concatenate(parts, -1)

    def packing(self) -> AbstractContextManager[Any]:
        """What the weights of a model are packed within; other threads may be at work, on its vocabulary.

        pack_linear() may leave work, and what it has to say of the weights, to the end of the block.
        """
        return nullcontext()

    def computing(self) -> AbstractContextManager[Any]:
        """What the operations of a layer are called within."""
        return nullcontext()

    # -- at load ---------------------------------------------------------------------------------------------
    @abstractmethod
    def pack_linear(self, raw: RawLinear) -> Packed:
        """The backend's own layout of `raw`, read by row chunks. Non-finite weights or scales: CheckpointError.

        The result serves `linear` and `embedding` alike (a tied head is packed once).
        """

    def pack_table(self, raw: RawLinear) -> Packed:
        """As pack_linear, of a matrix that serves `embedding` alone."""
        return self.pack_linear(raw)

    @abstractmethod
    def alloc_kv(self, spec: KVSpec, num_blocks: int) -> KV:
        """A paged cache of `num_blocks` blocks; OutOfMemory says bytes needed and free."""

    # -- once a step -----------------------------------------------------------------------------------------
    @abstractmethod
    def plan(self, meta: BatchMeta) -> Plan:
        """Device-side metadata of a step; checks meta (lengths agree, slots distinct and within their blocks)."""

    # -- in a layer ------------------------------------------------------------------------------------------
    @abstractmethod
    def embedding(self, ids: Tensor | NDArray[np.int64], w: Packed) -> Tensor:
        """int64 [T] -> rows of the table, compute dtype [T, K].

        `ids` may be a host array: these are checked (ValueError) and moved. Of a tensor on a device that would have to
        wait to see them, the caller vouches for them, and an id outside the table reads no memory outside it.
        """

    @abstractmethod
    def linear(self, x: Tensor, w: Packed) -> Tensor:
        """[T, K] -> [T, N], bias included, compute dtype."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(normed, summed): summed = x + residual (x when None); normed = weight * rms-normalised summed.

        x [..., D]; weight [D]; the normalisation is over the last axis, in float32, cast to the compute dtype, then
        multiplied by the weight (the order of the original). `summed` keeps the residual's dtype.
        """

    @abstractmethod
    def rope(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate halves of the first 2*r dims of each head: q [T,Hq,D], k [T,Hkv,D], cos/sin float32 [T, r].

        May work in place.
        """

    @abstractmethod
    def store_kv(self, kv: KV, layer: int, k: Tensor, v: Tensor, plan: Plan) -> None:
        """Write k, v [T,Hkv,D] to the step's slots; an int8 cache quantises here.

        int8: per token and head, asymmetric, round to nearest: scale = (max-min)/255, code = round((x-min)/scale),
        x ~ code*scale + min (scale 0 stored as 0: a constant vector comes back exact).
        """

    def rope_store_kv(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None, kv: KV, layer: int,
        plan: Plan,
    ) -> Tensor:  # fmt: skip
        """rope of q and k, then store_kv of k and v: q rotated, and multiplied by q_scale [T,1,1] when there is one.

        k may be left rotated or as it was. A backend with one kernel for both overrides this; results are the same.
        """
        q, k = self.rope(q, k, cos, sin)
        self.store_kv(kv, layer, k, v, plan)
        return q if q_scale is None else q * q_scale

    @abstractmethod
    def attention(self, q: Tensor, kv: KV, layer: int, plan: Plan, scale: float, window: int | None = None) -> Tensor:
        """[T,Hq,D] -> [T,Hq,D], causal, reading keys only from the cache (this step's are stored already).

        Query head h uses key head h // (Hq // Hkv). With a window w, position p sees keys p-w+1 .. p.
        """

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2F], gate first -> silu(gate) * up, [T, F]."""

    def swiglu(self, x: Tensor, gate_up: Packed) -> Tensor:
        """silu_mul of linear: [T, K] and a weight of 2F outputs -> [T, F].

        A backend with one kernel for both overrides this; results are the same.
        """
        return self.silu_mul(self.linear(x, gate_up))

    @abstractmethod
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[int]:
        """float32 [R, V] -> R token ids; `logits` may be overwritten.

        Sampling inverts the cumulative distribution (float64) at `uniform`, over tokens in order of falling
        probability, ties by lower id.
        """

    # -- whole steps -----------------------------------------------------------------------------------------
    def capture(
        self, step: Callable[[Sequence[Tensor], Plan], Tensor], inputs: Sequence[Tensor], kv: KV, max_blocks: int
    ) -> Replay | None:
        """Record a decode step, or None when this one has to run eagerly (kernels()["capture"] then says why).

        step(inputs, plan): tensors [rows, ...] on the device and a plan of `rows` sequences with q_len 1 ->
        [rows, ...]; it works on the device alone: nothing is read back or moved from the host. It may run more than
        once, on padding. `inputs` are examples: shapes, dtypes and harmless values. All plans are over `kv`.
        """
        return None


def format_supported(caps: Caps, fmt: LinearFormat) -> bool:
    """True when a backend of these capabilities computes on `fmt` as it is stored."""
    return fmt.bits in caps.weight_bits if fmt.grouped else fmt.dtype in caps.dense_dtypes
