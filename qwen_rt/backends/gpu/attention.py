"""Paged attention on a GPU: which kernel serves which rows, launch geometry and workspaces.

The arithmetic and what a block works on stand in csrc/gpu/attention_common.cuh. The rows of a sequence at one key head
are flattened as (query, query head of the group); an item of work is (sequence, first flattened row). Sequences with
few rows go to the decode kernels, split over the context, the others to the prefill kernels: at most two launches and
a merge a layer. Nothing here looks at a sequence's number of keys, so that a recorded step stays right when it grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwen_rt.backends.gpu.kernels import Kernels
from qwen_rt.backends.gpu.plan import GpuPlan, pinned
from qwen_rt.errors import Declined

SPLIT_ROWS = 16  # rows of a decode item: kSplitRows
SPLIT_KEYS = 128  # a split has a multiple of this many keys: kSplitKeys
TILE_ROWS = 64  # rows of a prefill item
TILE_ROWS_ANY = 32  # of the kernels for any head size
MAX_HEAD = 256
WARPS = 4  # of a block
MERGE_THREADS = 128
MAX_GRID_YZ = 65535
TARGET_BLOCKS = 1024
"""Blocks a decode launch aims at: about four rounds of two blocks on each of some 130 multiprocessors. More splits than
that only add partial results to write and read."""
MAX_SPLITS = 128

_COMPUTE = {torch.float16: "f16", torch.bfloat16: "bf16"}
_CACHE = {torch.float16: "kv16", torch.bfloat16: "kv16", torch.uint8: "kv8"}
_PREFILL = "PPlPPPPPPPPiiiiiiif"
_DECODE = _PREFILL + "PPi"
_MERGE = "PPPPPiii"


class Pages(Protocol):
    """A paged cache: [num_blocks, Hkv, block, D] a layer, and for uint8 pages float32 (scale, min) [..., block, 2]."""

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer."""
        ...

    def affine(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """(scale, min) of K and of V; None for 16-bit pages."""
        ...


def size_class(head_size: int) -> str:
    """Which instance of a kernel serves a head size: "d64", "d128" (vector loads, matrix unit) or "any"."""
    if not 1 <= head_size <= MAX_HEAD:
        raise Declined(f"attention kernels serve head sizes 1..{MAX_HEAD}, not {head_size}")
    if head_size % 8 or head_size > 128:
        return "any"
    return "d64" if head_size <= 64 else "d128"


def work_items(q_lens: Sequence[int], group: int, head_size: int) -> tuple[npt.NDArray[np.int32], ...]:
    """(decode, prefill): int32 [items, 2] of (sequence, first flattened row), each row of the step in one item.

    A sequence of one query, or of at most SPLIT_ROWS flattened rows, goes to decode. Prefill items come with their last
    rows first: those see most keys, and the short ones fill the end of the launch.
    """
    tile = TILE_ROWS_ANY if size_class(head_size) == "any" else TILE_ROWS
    decode: list[tuple[int, int]] = []
    prefill: list[tuple[int, int]] = []
    for seq, q_len in enumerate(q_lens):
        rows = q_len * group
        if q_len == 1 or rows <= SPLIT_ROWS:
            decode += [(seq, first) for first in range(0, rows, SPLIT_ROWS)]
        else:
            prefill += [(seq, first) for first in range(0, rows, tile)]
    prefill.sort(key=lambda item: -item[1])
    return tuple(np.array(items, np.int32).reshape(-1, 2) for items in (decode, prefill))


def max_item_rows(q_lens: Sequence[int], group: int) -> int:
    """Most rows a decode item of the step has."""
    rows = [n * group for n in q_lens if n == 1 or n * group <= SPLIT_ROWS]
    return min(SPLIT_ROWS, max(rows, default=0))


def num_splits(items: int, num_kv_heads: int, reach: int, window: int | None = None) -> int:
    """Parts of the context a decode launch works on at once. reach: no sequence has more keys.

    Enough blocks to fill a device, but no split below SPLIT_KEYS keys; 1 when that fills it already.
    """
    keys = reach if window is None else min(reach, window + SPLIT_ROWS)
    wanted = -(-TARGET_BLOCKS // max(1, items * num_kv_heads))
    return max(1, min(wanted, -(-keys // SPLIT_KEYS), MAX_SPLITS))


def workspace_floats(splits: int, items: int, num_kv_heads: int, max_rows: int, head_size: int) -> tuple[int, int]:
    """Sizes of part_out and part_stat, in float32; (0, 0) for one split."""
    slots = 0 if splits == 1 else splits * items * num_kv_heads * max_rows
    return slots * head_size, slots * 2


@dataclass(frozen=True)
class Geometry:
    """The launches of one layer of a step; the same for every layer with the same heads and window."""

    decode: Tensor | None  # int32 [items, 2] on the device
    prefill: Tensor | None
    splits: int
    max_rows: int
    part_out: Tensor | None  # float32, when splits > 1
    part_stat: Tensor | None


def make_geometry(
    q_lens: Sequence[int],
    reach: int,
    heads: tuple[int, int],
    head_size: int,
    window: int | None,
    device: torch.device,
) -> Geometry:
    """Geometry of a step: work lists and workspaces on `device`. heads: (Hq, Hkv)."""
    num_heads, num_kv_heads = heads
    group = num_heads // num_kv_heads
    decode, prefill = work_items(q_lens, group, head_size)
    if num_kv_heads > MAX_GRID_YZ or len(decode) > MAX_GRID_YZ:
        raise Declined(f"{len(decode)} decode rows at {num_kv_heads} key heads exceed a grid of {MAX_GRID_YZ}")
    splits = num_splits(len(decode), num_kv_heads, reach, window)
    max_rows = max_item_rows(q_lens, group)
    sizes = workspace_floats(splits, len(decode), num_kv_heads, max_rows, head_size)
    part_out, part_stat = (torch.empty(n, dtype=torch.float32, device=device) if n else None for n in sizes)
    lists = [pinned(items, device).to(device, non_blocking=True) if len(items) else None for items in (decode, prefill)]
    return Geometry(lists[0], lists[1], splits, max_rows, part_out, part_stat)


def attend(
    kernels: Kernels,
    out: Tensor,
    q: Tensor,
    pages: tuple[Tensor, Tensor],
    affine: tuple[Tensor, Tensor] | None,
    geometry: Geometry,
    q_start: Tensor,
    kv_lens: Tensor,
    block_table: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Launch a layer's attention. out, q [T, Hq, D]: out contiguous, q with heads next to each other, rows strided.

    pages, affine: K's and V's, see Pages. q_start int32 [B+1], kv_lens int32 [B], block_table int32 [B, width].
    Nothing is checked that only a device could see.
    """
    num_heads, head_size = q.shape[1:]
    k, v = pages
    num_kv_heads, block = k.shape[1:3]
    if k.dtype not in _CACHE or q.dtype not in _COMPUTE or out.dtype != q.dtype:
        raise Declined(f"no attention kernel for {q.dtype} queries over a cache of {k.dtype}")
    if (k.dtype == torch.uint8) != (affine is not None):
        raise ValueError("uint8 pages, and they only, come with (scale, min)")
    if num_heads % num_kv_heads or k.shape[3] != head_size or v.shape != k.shape:
        raise ValueError(f"queries {tuple(q.shape)} do not fit pages {tuple(k.shape)} and {tuple(v.shape)}")
    if block < 16 or block & (block - 1):
        raise Declined(f"attention kernels read pages of 16, 32, ... tokens, not {block}")
    if not (out.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        raise ValueError("attention writes contiguous rows and reads contiguous pages")
    if window is not None and window < 1:
        raise ValueError(f"a window has at least one key, not {window}")
    instance = size_class(head_size)
    straight = q.stride(2) == 1 and q.stride(1) == head_size
    if not straight or (instance != "any" and (q.stride(0) % 8 or q.data_ptr() % 16)):
        q = q.contiguous()
    name = f"{_COMPUTE[q.dtype]}_{_CACHE[k.dtype]}_{instance}"
    k_affine, v_affine = affine or (None, None)

    def arguments(work: Tensor) -> list[Any]:
        return [
            out, q, q.stride(0), k, v, k_affine, v_affine, work, q_start, kv_lens, block_table, block_table.shape[1],
            num_heads, num_kv_heads, head_size, block.bit_length() - 1, window or 0, int(k.dtype == torch.bfloat16),
            scale,
        ]  # fmt: skip

    if geometry.prefill is not None:
        kernel = kernels("attention_prefill", f"attention_prefill_{name}", _PREFILL)
        kernel((len(geometry.prefill), num_kv_heads, 1), WARPS * kernels.warp, *arguments(geometry.prefill))
    if geometry.decode is not None:
        items, g = len(geometry.decode), geometry
        kernel = kernels("attention_decode", f"attention_decode_{name}", _DECODE)
        grid = (g.splits, num_kv_heads, items)
        kernel(grid, WARPS * kernels.warp, *arguments(geometry.decode), g.part_out, g.part_stat, g.max_rows)
        if g.splits > 1:
            merge = kernels("attention_decode", f"attention_merge_{_COMPUTE[q.dtype]}", _MERGE)
            sizes = (g.splits, num_heads, head_size)
            merge(
                (g.max_rows, num_kv_heads, items),
                MERGE_THREADS, out, g.part_out, g.part_stat, geometry.decode, q_start, *sizes,
            )  # fmt: skip


def run(
    kernels: Kernels,
    q: Tensor,
    kv: Pages,
    layer: int,
    plan: GpuPlan,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """[T, Hq, D] -> [T, Hq, D] over the cache, as Backend.attention; geometry is made once a step and kept in `plan`.

    Declined when no kernel serves the head size, dtypes or page size.
    """
    pages = kv.pages(layer)
    heads, head_size = (q.shape[1], pages[0].shape[1]), q.shape[2]
    if heads[0] % heads[1]:
        raise ValueError(f"{heads[0]} query heads for {heads[1]} key heads")
    key = ("attention", heads, head_size, window)
    geometry = plan.cache.get(key)
    if geometry is None:
        geometry = make_geometry(plan.q_lens, plan.reach, heads, head_size, window, q.device)
        plan.cache[key] = geometry
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    attend(
        kernels, out, q, pages, kv.affine(layer), geometry,
        plan.q_start, plan.kv_lens, plan.block_table, scale, window,
    )  # fmt: skip
    return out
