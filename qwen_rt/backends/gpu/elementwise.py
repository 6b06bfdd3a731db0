"""The element-wise operations of the waist on a GPU: which kernel, which grid. The arithmetic stands in csrc/gpu/*.cu.

Shapes: T tokens, Hq/Hkv heads of D, H hidden, F the width of an MLP. Rows may be strided; the last dimension is
contiguous. Every function takes the backend's `Kernels` first and launches on its current stream; a malformed call is a
ValueError before anything runs, a case without a kernel is Declined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_rt.backends.gpu.kernels import Kernels
from qwen_rt.errors import Declined

BLOCK = 256
MAX_HEAD = 256  # values of a head that a warp can hold (rope_kv.cu)
MAX_GRID_Y = 65535
_VALUES = 8  # a thread moves at a time
_COMPUTE = (torch.float16, torch.bfloat16)

NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32", torch.uint8: "int8"}
"""How kernel names spell a dtype."""

Pair = tuple[Tensor, Tensor]


def rms_norm(kernels: Kernels, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Pair:
    """As Backend.rms_norm: x of weight's dtype or float32, [..., D]; residual float32 -> (normed, summed)."""
    dtype, size = weight.dtype, x.shape[-1]
    _want(dtype in _COMPUTE and x.dtype in (dtype, torch.float32), f"RMSNorm of {x.dtype} with a weight of {dtype}")
    _fits(weight.shape == (size,), f"a norm of {tuple(weight.shape)} over rows of {size}")
    x, weight = _dense_last(x), weight.contiguous()
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.dim() == 3 and residual is None and x.dtype == dtype:
        if x.numel():
            heads = kernels("norm", f"rms_norm_heads_{NAMES[dtype]}", "PPPlllliif")
            grid = (x.shape[0], _head_blocks(x.shape[1], kernels.warp), 1)
            heads(grid, BLOCK, normed, x, weight, *normed.stride()[:2], *x.stride()[:2], x.shape[1], size, eps)
        return normed, x
    rows = x.reshape(-1, size)
    name = NAMES[dtype] if x.dtype == dtype else f"f32_{NAMES[dtype]}"
    grid = (rows.shape[0], 1, 1)
    if residual is None:
        if x.numel():
            kernel = kernels("norm", f"rms_norm_{name}", "PPPPPllllif")
            kernel(grid, BLOCK, normed, rows, weight, None, None, size, rows.stride(0), 0, 0, size, eps)
        return normed, x
    _want(residual.dtype == torch.float32, f"a residual stream of {residual.dtype}")
    _fits(residual.shape == x.shape, f"a residual of {tuple(residual.shape)} for {tuple(x.shape)}")
    added = _dense_last(residual).reshape(-1, size)
    summed = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        kernel = kernels("norm", f"rms_norm_{name}", "PPPPPllllif")
        strides = (size, rows.stride(0), added.stride(0), size)
        kernel(grid, BLOCK, normed, rows, weight, added, summed, *strides, size, eps)
    return normed, summed


def rope(kernels: Kernels, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None = None) -> Pair:
    """As Backend.rope, in place: q [T,Hq,D], k [T,Hkv,D], tables float32 [T, r], q_scale of q's dtype, T values."""
    r = _check_rope(q, k, cos, sin)
    if q.shape[0]:
        kernel = kernels("rope_kv", f"rope_{NAMES[q.dtype]}", "PPPPPPPlllllllllliiii")
        q_strides, k_strides = q.stride()[:2], k.stride()[:2]
        kernel(
            (q.shape[0], _head_blocks(q.shape[1] + k.shape[1], kernels.warp), 1),
            BLOCK, q, k, q, k, cos, sin, _factors(q_scale, q), *q_strides, *k_strides, *q_strides, *k_strides,
            cos.stride(0), sin.stride(0), q.shape[1], k.shape[1], q.shape[2], r,
        )  # fmt: skip
    return q, k


def store_kv(kernels: Kernels, k: Tensor, v: Tensor, pages: Pair, affine: Pair | None, slots: Tensor) -> None:
    """Write k, v [T,Hkv,D] to slots int64 [T] of `pages`, K and V [num_blocks, Hkv, block, D] each.

    affine: (scale, min) float32 [num_blocks, Hkv, block, 2] of K and of V, for uint8 pages; else None. A negative slot
    stores nothing.
    """
    _check_pages(k, v, pages, affine, slots)
    if k.shape[0]:
        name = f"store_kv_{NAMES[pages[0].dtype]}_{NAMES[k.dtype]}"
        kernels("rope_kv", name, "PPPPPPPlllliii")(
            (k.shape[0], _head_blocks(2 * k.shape[1], kernels.warp), 1),
            BLOCK, k, v, *pages, *(affine or (None, None)), slots, *k.stride()[:2], *v.stride()[:2],
            k.shape[1], k.shape[2], pages[0].shape[2],
        )  # fmt: skip


def rope_store_kv(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, q_scale: Tensor | None,
    pages: Pair, affine: Pair | None, slots: Tensor,
) -> Tensor:  # fmt: skip
    """`rope`, then `store_kv`, in one pass, bit for bit; k itself stays as it was. Returns q, rotated in place."""
    r = _check_rope(q, k, cos, sin)
    _check_pages(k, v, pages, affine, slots)
    if q.shape[0]:
        name = f"rope_store_kv_{NAMES[pages[0].dtype]}_{NAMES[q.dtype]}"
        kernels("rope_kv", name, "PPPPPPPPPPPPlllllllllliiiii")(
            (q.shape[0], _head_blocks(q.shape[1] + 2 * k.shape[1], kernels.warp), 1),
            BLOCK, q, q, k, v, cos, sin, _factors(q_scale, q), *pages, *(affine or (None, None)), slots,
            *q.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
            q.shape[1], k.shape[1], q.shape[2], r, pages[0].shape[2],
        )  # fmt: skip
    return q


def silu_mul(kernels: Kernels, gate_up: Tensor) -> Tensor:
    """[T, 2F], gate first -> silu(gate) * up, [T, F]."""
    _want(gate_up.dtype in _COMPUTE, f"SwiGLU of {gate_up.dtype}")
    _fits(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"gate and up of {tuple(gate_up.shape)}")
    gate_up = _dense_last(gate_up)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        kernel = kernels("elementwise", f"silu_mul_{NAMES[out.dtype]}", "PPlli")
        kernel(_row_grid(rows, size), BLOCK, out, gate_up, size, gate_up.stride(0), size)
    return out


def embedding(kernels: Kernels, ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """int64 ids [T] -> rows of a dense table [V, H] as `dtype`; an id outside it makes its row NaN."""
    _want(dtype in _COMPUTE and table.dtype in NAMES, f"embedding of {table.dtype} as {dtype}")
    _fits(ids.dtype == torch.int64 and ids.dim() == 1, f"token ids of {ids.dtype}, {tuple(ids.shape)}")
    ids, table = ids.contiguous(), _dense_last(table)
    out = torch.empty((ids.shape[0], table.shape[1]), dtype=dtype, device=table.device)
    if out.numel():
        kernel = kernels("elementwise", f"embedding_{NAMES[table.dtype]}_{NAMES[dtype]}", "PPPllliP")
        shape = (out.stride(0), table.stride(0), table.shape[0], out.shape[1])
        kernel(_row_grid(*out.shape), BLOCK, out, ids, table, *shape, None)
    return out


# -- geometry and checks -------------------------------------------------------------------------------------------
def _row_grid(rows: int, size: int) -> tuple[int, int, int]:
    """A block for every BLOCK * _VALUES values of a row."""
    return rows, min(-(-size // (BLOCK * _VALUES)), MAX_GRID_Y), 1


def _head_blocks(heads: int, warp: int) -> int:
    """Blocks of BLOCK threads, one warp a head."""
    return -(-heads * warp // BLOCK)


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> int:
    """r, half the dims that turn."""
    r = cos.shape[-1]
    _want(q.dtype in _COMPUTE and k.dtype == q.dtype, f"RoPE of {q.dtype} and {k.dtype}")
    _want(cos.dtype == sin.dtype == torch.float32, f"RoPE tables of {cos.dtype} and {sin.dtype}")
    _want(q.shape[-1] <= MAX_HEAD, f"heads of {q.shape[-1]}: at most {MAX_HEAD}")
    _fits(q.dim() == k.dim() == 3 and q.shape[::2] == k.shape[::2], f"q {tuple(q.shape)} beside k {tuple(k.shape)}")
    _fits(cos.shape == sin.shape == (q.shape[0], r) and 2 * r <= q.shape[2], f"tables {tuple(cos.shape)} for {q.shape}")
    _fits(all(t.stride(-1) == 1 for t in (q, k)) and (r <= 1 or cos.stride(1) == sin.stride(1) == 1), "strided values")
    return r


def _check_pages(k: Tensor, v: Tensor, pages: Pair, affine: Pair | None, slots: Tensor) -> None:
    _want(k.dtype in _COMPUTE and v.dtype == k.dtype, f"keys of {k.dtype} and values of {v.dtype}")
    _want(k.shape[-1] <= MAX_HEAD, f"heads of {k.shape[-1]}: at most {MAX_HEAD}")
    _want(pages[0].dtype in (*_COMPUTE, torch.uint8), f"a cache of {pages[0].dtype}")
    _fits(k.dim() == 3 and k.shape == v.shape and k.stride(-1) == v.stride(-1) == 1, f"k {k.shape} beside v {v.shape}")
    for p in pages:
        _fits(p.dtype == pages[0].dtype and p.shape == pages[0].shape and p.is_contiguous(), "pages of K unlike V's")
    shape = pages[0].shape
    _fits(shape[1] == k.shape[1] and shape[3] == k.shape[2], f"{tuple(k.shape)} into {tuple(shape)}")
    _fits((affine is not None) == (pages[0].dtype == torch.uint8), "scales go with an int8 cache, and only with it")
    for a in affine or ():
        _fits(a.dtype == torch.float32 and a.shape == (*shape[:3], 2) and a.is_contiguous(), "scales unlike the pages")
    _fits(slots.dtype == torch.int64 and slots.shape == k.shape[:1] and slots.is_contiguous(), f"slots {slots.shape}")


def _factors(q_scale: Tensor | None, q: Tensor) -> Tensor | None:
    if q_scale is None:
        return None
    _fits(
        q_scale.dtype == q.dtype and q_scale.numel() == q.shape[0], f"{tuple(q_scale.shape)} factors of {q_scale.dtype}"
    )
    return q_scale.contiguous()


def _want(served: bool, what: str) -> None:
    """Decline a case the kernels do not serve."""
    if not served:
        raise Declined(f"no GPU kernel for {what}")


def _fits(right: bool, what: str) -> None:
    """Refuse a malformed call."""
    if not right:
        raise ValueError(f"shapes do not fit: {what}")
