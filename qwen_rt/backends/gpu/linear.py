"""Linear layers on a GPU: packing into the layout of csrc/gpu/linear.cuh, and which kernel serves how many rows.

    rows of x        matrix units (sm_75+, gfx908, gfx90a)        none (gfx906 and the like)
    1 .. 8           linear_rows ..._r8                           linear_rows_simt ..._r{1,2,4,8}
    9 .. 32          linear_rows ..._r16, _r32                    linear_tile_simt
    33 ..            linear_tile                                  linear_tile_simt
    hand-over ..     linear_dequantize by chunks, then cuBLAS/hipBLAS through torch.matmul

Grouped weights of any group that is a multiple of 16. Dense weights are kept in the compute dtype and multiplied by
torch. Launch geometry is a pure function of shapes (`choose`), so it is tested without a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from qwen_rt.backends.gpu import elementwise
from qwen_rt.backends.gpu.kernels import Kernels
from qwen_rt.backends.torch_backend import from_host, to_host
from qwen_rt.errors import CheckpointError
from qwen_rt.quant.formats import Array, LinearFormat, LinearRows, RawLinear

TILE_N = 16  # outputs of a packed tile; a tile is 1024 bytes
THREADS = 256
PACK_ELEMENTS = 1 << 24  # codes in flight on the device while packing
MAX_SPLITS = 8
GRID_Y = 65535  # most blocks along y

_SUFFIX = {torch.float16: "f16", torch.bfloat16: "bf16"}
_LINEAR = "PPPPPPPPiiii"  # y, partial, x, words, scales, zeros, mins, bias, rows, n, k, group
_REDUCE = "PPPiii"  # y, partial, bias, rows, n, splits
_GATHER = "PPPii"  # out, x, perm, rows, k
_DEQUANTIZE = "PPPPPiiiii"  # out, words, scales, zeros, mins, n, k, group, first, last
_EMBEDDING = "PPPPPPPiii"  # out, ids, words, scales, zeros, mins, perm, n, k, group

NEVER = 1 << 62

HANDOVER = {
    "sm_75": 256,
    "sm_80": 384,
    "sm_86": 512,
    "sm_89": 512,
    "sm_90": 192,
    "sm_100": 192,
    "sm_120": 512,
    "gfx906": 64,
    "gfx908": 256,
    "gfx90a": 256,
    "gfx926": 64,
    "gfx928": 64,
    "gfx936": 64,
}
"""Rows of x from which dequantising the weight and the vendor's matrix product are taken to be faster than our own.

From bytes and operations over published rates (docs/kernels-gpu.md); unmeasured on every card until bench/gpu.py ran.
"""

_MMA = ("gfx908", "gfx90a")  # HIP parts whose matrix units mma.h drives; every sm_75 and later has them


@dataclass(frozen=True)
class Traits:
    """What of a device decides how a linear is launched."""

    mma: bool  # has the matrix units of mma.h
    sms: int  # multiprocessors (compute units)
    handover: int  # rows from which weights are dequantised for torch.matmul
    scratch: int = 1 << 25  # most elements of dequantised weight at a time: enough outputs to give every SM a tile


def traits_of(arch: str, sms: int, memory: int = 0) -> Traits:
    """Traits of "sm_90a", "gfx906", "emu32", "emu64-simt"; memory: bytes of the device, 0 = unknown."""
    if arch.startswith("emu"):
        return Traits(not arch.endswith("-simt"), sms, NEVER)
    name = arch.rstrip("af") if arch.startswith("sm_") else arch.split(":")[0]
    mma = int(name[3:]) >= 75 if arch.startswith("sm_") else name in _MMA
    return Traits(mma, sms, HANDOVER.get(name, 256 if mma else 64), 1 << 27 if memory >= 40 << 30 else 1 << 25)


# -- which kernel --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Choice:
    """How one product is done: a kernel and its grid, or the hand-over."""

    kernel: str  # "" for the hand-over
    grid: tuple[int, int, int] = (0, 0, 0)  # outputs, rows, splits of K

    @property
    def module(self) -> str:
        """The .cu file the kernel is in."""
        return "linear_gemv" if self.kernel.startswith("linear_rows") else "linear_gemm"

    @property
    def splits(self) -> int:
        """Parts of K that different blocks sum."""
        return self.grid[2]


def tile_k(bits: int) -> int:
    """Inputs of a packed tile."""
    return 512 // bits


@lru_cache(maxsize=4096)
def choose(rows: int, n: int, k: int, fmt: LinearFormat, dtype: torch.dtype, traits: Traits) -> Choice:
    """The kernel and grid for x [rows, k] and a grouped weight [n, k]."""
    if rows >= traits.handover:
        return Choice("")
    kind, tiles = f"int{fmt.bits}_{_SUFFIX[dtype]}", -(-k // tile_k(fmt.bits))
    blocks, steps = -(-n // TILE_N), 32  # steps: tiles a block should have to sum at least
    if traits.mma and rows <= 32:
        most = 8 if rows <= 8 else 32 if fmt.has_mins or rows > 16 else 16
        name, y = f"linear_rows_{kind}{'_min' if fmt.has_mins else ''}_r{most}", 1
    elif not traits.mma and rows <= 8:
        name, y = f"linear_rows_simt_{kind}_r{1 << (rows - 1).bit_length()}", 1
    else:
        y, steps = -(-rows // 64), 8
        blocks = -(-n // (128 if traits.mma else 64))
        simt, mins = ("", "_min" if fmt.has_mins else "") if traits.mma else ("simt_", "")
        name = f"linear_tile_{simt}{kind}{mins}"
    splits = 1
    if blocks * y < traits.sms:  # too few blocks to keep every multiprocessor busy
        splits = max(1, min(MAX_SPLITS, -(-2 * traits.sms // (blocks * y)), tiles // steps))
    return Choice(name, (blocks, y, splits))


# -- packing -------------------------------------------------------------------------------------------------------
@dataclass
class GpuPacked:
    """A weight on the device: dense [N, K] in the compute dtype, or grouped in the layout of csrc/gpu/linear.cuh."""

    shape: tuple[int, int]
    format: LinearFormat
    dtype: torch.dtype  # compute dtype
    dense: Tensor | None = None  # dtype [N, K]
    words: Tensor | None = None  # uint8 [ceil(N / 16), ceil(K / tile_k), 1024]
    scales: Tensor | None = None  # float16 [G, N padded to 16]
    zeros: Tensor | None = None  # uint8, alike; None when each is 2^(bits - 1)
    mins: Tensor | None = None  # float16, alike
    bias: Tensor | None = None  # float32 [N] (dense: dtype)
    perm: Tensor | None = None  # int32 [K], as RawLinear.perm

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        held = (self.dense, self.words, self.scales, self.zeros, self.mins, self.bias, self.perm)
        return sum(t.nbytes for t in held if t is not None)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n, k], one code each, n and k multiples of a tile's -> words uint8 [n / 16, k / tile_k, 1024]."""
    n, k = codes.shape
    tiles = (n // TILE_N, TILE_N, k // tile_k(bits))
    # [tile_n, row, tile_k, register j, (step of register h,) t, c / 2, c % 2]
    if bits == 8:
        return codes.view(*tiles, 4, 4, 2, 2).permute(0, 2, 1, 4, 3, 6, 5).reshape(tiles[0], tiles[2], 1024)
    nibbles = codes.view(*tiles, 4, 2, 4, 2, 2).permute(0, 2, 1, 5, 3, 7, 4, 6)  # ... row, t, j, c % 2, h, c / 2
    return (nibbles[..., 0] | nibbles[..., 1] << 4).reshape(tiles[0], tiles[2], 1024)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """The inverse of pack_codes: uint8 [n, k], padding included."""
    tiles_n, tiles = words.shape[:2]
    if bits == 8:
        codes = words.view(tiles_n, tiles, TILE_N, 4, 4, 2, 2).permute(0, 2, 1, 4, 3, 6, 5)
    else:
        x = words.view(tiles_n, tiles, TILE_N, 4, 4, 2, 2)  # row, t, j, c % 2, h
        codes = torch.stack((x & 15, x >> 4), -1).permute(0, 2, 1, 4, 6, 3, 7, 5)
    return codes.reshape(tiles_n * TILE_N, tiles * tile_k(bits))


def pack(raw: RawLinear, device: torch.device, dtype: torch.dtype) -> GpuPacked:
    """`raw` on the device, by chunks of rows. Values that are not finite (in `dtype`): CheckpointError."""
    (n, k), fmt = raw.shape, raw.format
    out = GpuPacked(raw.shape, fmt, dtype)

    def there(a: Array) -> Tensor:
        return from_host(a).to(device)

    perm = None if raw.perm is None else there(raw.perm).long()
    if raw.bias is not None:
        out.bias = _finite(raw, there(raw.bias).float(), "the bias", torch.float32 if fmt.grouped else dtype)
    step = max(TILE_N, PACK_ELEMENTS // k // TILE_N * TILE_N)
    if not fmt.grouped:
        out.dense = torch.empty((n, k), dtype=dtype, device=device)
        for start in range(0, n, step):
            part = raw.rows(start, min(start + step, n))
            assert part.values is not None
            values = _finite(raw, there(part.values), f"values of rows {start}..", dtype)
            out.dense[start : start + len(values), slice(None) if perm is None else perm] = values
        return out
    if fmt.group_size % 16 or k % fmt.group_size:
        raise CheckpointError(f"{raw.name}: {k} inputs in groups of {fmt.group_size}; groups are multiples of 16")
    padded = -(-n // TILE_N) * TILE_N
    tiles, groups = -(-k // tile_k(fmt.bits)), k // fmt.group_size
    out.words = torch.empty((padded // TILE_N, tiles, 1024), dtype=torch.uint8, device=device)
    out.scales = torch.zeros((groups, padded), dtype=torch.float16, device=device)
    out.zeros = torch.zeros((groups, padded), dtype=torch.uint8, device=device) if fmt.has_zeros else None
    out.mins = torch.zeros((groups, padded), dtype=torch.float16, device=device) if fmt.has_mins else None
    out.perm = None if perm is None else perm.int()
    usual = True  # every zero point is the one that an absent tensor means
    for start in range(0, n, step):
        stop = min(start + step, n)
        part = raw.rows(start, stop)
        assert part.codes is not None and part.scales is not None
        pad = (0, tiles * tile_k(fmt.bits) - k, 0, -(stop - start) % TILE_N)
        codes = functional.pad(there(part.codes), pad)
        out.words[start // TILE_N : -(-stop // TILE_N)] = pack_codes(codes, fmt.bits)
        for name, to in (("scales", out.scales), ("zeros", out.zeros), ("mins", out.mins)):
            stored = getattr(part, name)
            if to is None:
                continue
            on_device = there(stored)
            if name == "zeros":
                usual = usual and bool((on_device == 1 << (fmt.bits - 1)).all())
            else:
                on_device = _finite(raw, on_device, f"{name} of rows {start}..", torch.float16)
            to[:, start:stop] = on_device.T
    if usual:
        out.zeros = None
    return out


def _finite(raw: RawLinear, t: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    if not t.isfinite().all():
        raise CheckpointError(f"{raw.name}: {what} are not all finite; the file is damaged")
    narrow = t.to(dtype)
    if dtype == torch.float16 and t.dtype != dtype and not narrow.isfinite().all():
        raise CheckpointError(f"{raw.name}: {what} exceed float16; compute in bfloat16")
    return narrow


def unpack(packed: GpuPacked) -> LinearRows:
    """What was packed, for checks: codes, scales, zeros and mins of every row (dense: values)."""
    n, k = packed.shape
    if packed.dense is not None:
        return LinearRows(values=to_host(packed.dense))
    assert packed.words is not None and packed.scales is not None
    zeros = packed.zeros
    if zeros is None and packed.format.has_zeros:
        zeros = torch.full_like(packed.scales, 1 << (packed.format.bits - 1), dtype=torch.uint8)
    return LinearRows(
        codes=to_host(unpack_codes(packed.words, packed.format.bits)[:n, :k]),
        scales=to_host(packed.scales[:, :n].T),
        zeros=None if zeros is None else to_host(zeros[:, :n].T),
        mins=None if packed.mins is None else to_host(packed.mins[:, :n].T),
    )


# -- launches ------------------------------------------------------------------------------------------------------
def run(kernels: Kernels, x: Tensor, w: GpuPacked, traits: Traits) -> Tensor:
    """x [T, K] of w's dtype -> x W^T + bias [T, N], on a device of these traits."""
    rows, (n, k) = x.shape[0], w.shape
    if w.dense is not None:
        return _matmul(x, w.dense, w.bias)
    if rows == 0:
        return x.new_empty((0, n))
    x = _aligned(x)
    if w.perm is not None:
        gathered = torch.empty_like(x)
        kernels("linear_gemv", "linear_gather", _GATHER)(
            (-(-rows * k // THREADS), 1, 1), THREADS, gathered, x, w.perm, rows, k
        )
        x = gathered
    y = torch.empty((rows, n), dtype=w.dtype, device=x.device)
    choice = choose(rows, n, k, w.format, w.dtype, traits)
    if not choice.kernel:
        return _hand_over(kernels, x, w, y, traits.scratch)
    partial = None
    if choice.splits > 1:
        partial = torch.empty((choice.splits, rows, n), dtype=torch.float32, device=x.device)
    stored = (w.words, w.scales, w.zeros, w.mins)
    kernels(choice.module, choice.kernel, _LINEAR)(
        choice.grid, THREADS, y, partial, x, *stored, w.bias, rows, n, k, w.format.group_size
    )
    if partial is not None:
        reduce = kernels("linear_gemv", f"linear_reduce_{_SUFFIX[w.dtype]}", _REDUCE)
        reduce((-(-rows * n // THREADS), 1, 1), THREADS, y, partial, w.bias, rows, n, choice.splits)
    return y


def dequantize(kernels: Kernels, w: GpuPacked, first: int, last: int, out: Tensor | None = None) -> Tensor:
    """Rows [first, last) of a grouped weight in w's dtype, columns in stored order; first a multiple of 16."""
    n, k = w.shape
    assert w.words is not None and first % TILE_N == 0
    out = torch.empty((last - first, k), dtype=w.dtype, device=w.words.device) if out is None else out
    name = f"linear_dequantize_int{w.format.bits}_{_SUFFIX[w.dtype]}"
    grid = (-(-w.words.shape[1] * 64 // THREADS), -(-(last - first) // TILE_N), 1)
    kernels("linear_gemm", name, _DEQUANTIZE)(
        grid, THREADS, out, w.words, w.scales, w.zeros, w.mins, n, k, w.format.group_size, first, last
    )
    return out


def _hand_over(kernels: Kernels, x: Tensor, w: GpuPacked, y: Tensor, scratch: int) -> Tensor:
    """Dequantise `scratch` elements at a time, multiply by torch."""
    n, k = w.shape
    step = max(128, scratch // k // 128 * 128)
    buffer = torch.empty((min(step, n), k), dtype=w.dtype, device=x.device)
    bias = None if w.bias is None else w.bias.to(w.dtype)
    for start in range(0, n, step):
        stop = min(start + step, n)
        dense = dequantize(kernels, w, start, stop, buffer[: stop - start])
        _matmul(x, dense, None if bias is None else bias[start:stop], y[:, start:stop])
    return y


def _matmul(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x w^T + bias by torch, summed in float32 (on a device: cuBLAS or hipBLAS; the emulator's host in float32)."""
    if x.device.type == "cpu":
        y = functional.linear(x.float(), w.float(), None if bias is None else bias.float())
        return y.to(x.dtype) if out is None else out.copy_(y)
    if out is None:
        return functional.linear(x, w, bias)
    return torch.mm(x, w.T, out=out) if bias is None else torch.addmm(bias, x, w.T, out=out)


def embedding(kernels: Kernels, ids: Tensor, w: GpuPacked, dtype: torch.dtype) -> Tensor:
    """int64 ids [T] on the device -> rows of the table [T, K] in `dtype` (w's own); an id outside gives NaN."""
    n, k = w.shape
    if w.dense is not None:
        return elementwise.embedding(kernels, ids, w.dense, dtype)
    if dtype != w.dtype:
        raise TypeError(f"a table packed for {w.dtype} has no rows of {dtype}")
    assert w.words is not None
    out = torch.empty((ids.shape[0], k), dtype=dtype, device=ids.device)
    kernel = kernels("linear_gemm", f"packed_embedding_int{w.format.bits}_{_SUFFIX[dtype]}", _EMBEDDING)
    stored = (w.words, w.scales, w.zeros, w.mins, w.perm)
    for start in range(0, ids.shape[0], GRID_Y):
        part, to = ids[start : start + GRID_Y], out[start : start + GRID_Y]
        grid = (-(-w.words.shape[1] * 4 // THREADS), len(part), 1)
        kernel(grid, THREADS, to, part, *stored, n, k, w.format.group_size)
    return out


def _aligned(x: Tensor) -> Tensor:
    """x as the kernels read it: contiguous rows from a 16-byte boundary."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
