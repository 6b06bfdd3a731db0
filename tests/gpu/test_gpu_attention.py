"""Attention kernels in the emulator against float64, at both warp sizes, and the geometry of their launches.

The bound of each element is the one at the head of csrc/gpu/attention_mma.cuh (matrix unit) or attention_decode.cu
(SIMT). Pages no sequence owns, and the rest of each last page, are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen_rt.backends.gpu import attention, toolchain
from qwen_rt.backends.gpu.driver import Driver, Order
from qwen_rt.backends.gpu.kernels import Kernels, Loaded
from qwen_rt.backends.reference import quantize_heads
from qwen_rt.errors import Declined

pytest.importorskip("qwen_rt._gpu", reason="the GPU launcher is not built (make build)")

ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")
WARPS = (32, 64)
MODULES = ("attention_decode", "attention_prefill")
U32 = 2.0**-24
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
F16, BF16, INT8 = torch.float16, torch.bfloat16, torch.uint8


@dataclass(frozen=True)
class Scene:
    """A step: sequences of (new rows, keys), and the cache it reads."""

    seqs: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (4, 2)
    size: int = 64
    dtype: torch.dtype = F16
    cache: torch.dtype = F16
    window: int | None = None
    block: int = 16
    scale: float = 0.0  # 0: size ** -0.5
    values: float = 1.0  # size of the values
    reach: int = 0  # 0: the longest sequence


@dataclass(frozen=True)
class Data:
    """A scene's tensors, the answer in float64, and what its error is bounded by."""

    q: Tensor
    pages: tuple[Tensor, Tensor]
    affine: tuple[Tensor, Tensor] | None
    q_start: Tensor
    kv_lens: Tensor
    table: Tensor
    want: Tensor
    rounding: Tensor  # of P to 16 bits: matrix units only
    bound: Tensor


def _paged(x: list[Tensor], tables: list[list[int]], num_blocks: int, block: int, fill: float) -> Tensor:
    """Sequences [keys, Hkv, n] -> pages [num_blocks, Hkv, block, n], the rest filled."""
    shape = (num_blocks, x[0].shape[1], block, x[0].shape[2])
    whole = x[0].dtype == torch.uint8
    pages = torch.randint(0, 256, shape).to(torch.uint8) if whole else torch.full(shape, fill, dtype=x[0].dtype)
    for keys, ids in zip(x, tables, strict=True):
        for p in range(keys.shape[0]):
            pages[ids[p // block], :, p % block] = keys[p]
    return pages


@cache
def data(s: Scene) -> Data:
    g = torch.Generator().manual_seed(len(s.seqs) * 1000 + s.size)
    (hq, hkv), d = s.heads, s.size
    rows, scale = sum(n for n, _ in s.seqs), s.scale or s.size**-0.5
    fused = torch.randn(rows, (hq + 2 * hkv) * d, generator=g).to(s.dtype)  # q lies in wider rows
    q = fused[:, : hq * d].unflatten(1, (hq, d))
    need = [-(-n // s.block) for _, n in s.seqs]
    num_blocks = sum(need) + 2
    ids = torch.randperm(num_blocks, generator=g).tolist()
    tables = [[ids.pop() for _ in range(n)] for n in need]
    width = max(need) + 1
    table = torch.tensor([[*t, *[-1 << 20] * (width - len(t))] for t in tables], dtype=torch.int32)  # poison
    stored: list[list[Tensor]] = [[], []]
    pairs: list[list[Tensor]] = [[], []]
    exact: list[list[Tensor]] = [[], []]
    spread: list[list[Tensor]] = [[], []]  # |mid| + 128 step
    for _, n in s.seqs:
        for i, size in enumerate((1.0, s.values)):
            # Magnitudes differ between keys, as scales of int8 pages do.
            x = torch.randn(n, hkv, d, generator=g) * size * (0.25 + torch.rand(n, hkv, 1, generator=g))
            if s.cache == INT8:
                codes, pair = quantize_heads(x)
                stored[i].append(codes)
                pairs[i].append(pair)
                step, low = pair.double().split(1, -1)
                exact[i].append(codes.double() * step + low)
                spread[i].append(((low + 128 * step).abs() + 128 * step).squeeze(-1))
            else:
                stored[i].append(x.to(s.cache))
                exact[i].append(x.to(s.cache).to(s.dtype).double())
    pages = [_paged(x, tables, num_blocks, s.block, torch.nan) for x in stored]
    affine = None
    if s.cache == INT8:
        k_pairs, v_pairs = (_paged(x, tables, num_blocks, s.block, torch.nan) for x in pairs)
        affine = (k_pairs, v_pairs)
    want, rounding, bound, row = [], [], [], 0
    for b, (n, total) in enumerate(s.seqs):
        x = q[row : row + n].double().transpose(0, 1)  # [Hq, n, D]
        k, v = (e[b].repeat_interleave(hq // hkv, 1).transpose(0, 1) for e in exact)  # [Hq, keys, D]
        pos, at = torch.arange(total - n, total).unsqueeze(1), torch.arange(total)
        seen = (at <= pos) & (at > pos - (s.window or total))
        p = (x @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        size = x.abs() @ k.abs().transpose(1, 2)
        weight = v.abs()
        if s.cache == INT8:
            k_spread, v_spread = (e[b].repeat_interleave(hq // hkv, 1).T for e in spread)
            size = x.abs().sum(-1, keepdim=True) * k_spread.unsqueeze(1)
            weight = v_spread.unsqueeze(-1)
        top = (size * scale).masked_fill(~seen, 0).amax(-1, keepdim=True)
        mass = (p @ weight).expand(hq, n, d)
        want.append((p @ v).transpose(0, 1))
        rounding.append((2 * UNIT[s.dtype] * mass).transpose(0, 1))
        seen_keys = min(total, s.window or total)
        sums = (4 * (d + 12) * U32 * top + (seen_keys + 96) * U32) * mass
        tiny = 2.0**-37 * seen_keys * weight.amax() + torch.finfo(s.dtype).tiny * UNIT[s.dtype]
        bound.append((sums + tiny).transpose(0, 1) + UNIT[s.dtype] * want[-1].abs())
        row += n
    start = torch.tensor([0, *(n for n, _ in s.seqs)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lens = torch.tensor([n for _, n in s.seqs], dtype=torch.int32)
    return Data(q, (pages[0], pages[1]), affine, start, lens, table, *(torch.cat(x) for x in (want, rounding, bound)))


@cache
def open_kernels(library: Path, order: Order = "forward") -> Kernels:
    driver = Driver.open_emu(library, order)
    return Kernels(lambda module: Loaded(driver.load(module), "emulated"), lambda: 0, driver.facts.warp)


def play(s: Scene, library: Path, order: Order = "forward") -> Tensor:
    x = data(s)
    out = torch.full(x.want.shape, torch.nan, dtype=s.dtype)
    reach = s.reach or max(n for _, n in s.seqs)
    geometry = attention.make_geometry([n for n, _ in s.seqs], reach, s.heads, s.size, s.window, torch.device("cpu"))
    if geometry.part_out is not None and geometry.part_stat is not None:
        geometry.part_out.fill_(torch.nan)  # a split without keys writes no sums, and they are not read
        geometry.part_stat.fill_(torch.nan)
    scale = s.scale or s.size**-0.5
    attention.attend(
        open_kernels(library, order), out, x.q, x.pages, x.affine, geometry, x.q_start, x.kv_lens, x.table, scale,
        s.window,
    )  # fmt: skip
    return out


def in_every_order(s: Scene, library: Path) -> Tensor:
    """The result in forward order; the other two have to give the same bits."""
    got = [play(s, library, order) for order in ORDERS]
    assert all(torch.equal(got[0], other) for other in got[1:]), "the result depends on the order of threads"
    return got[0]


def check(s: Scene, got: Tensor, matrix: bool) -> None:
    x = data(s)
    error, limit = (got.double() - x.want).abs(), x.bound + (x.rounding if matrix else 0)
    assert not got.isnan().any(), "NaN from a page that is not the sequence's, or a row that was not written"
    worst = int((error / limit).argmax())
    assert (error <= limit).all(), f"error {error.flatten()[worst]:.3g}, bound {limit.flatten()[worst]:.3g}"


DECODE = {
    "GQA 14/2, contexts 1..300": Scene(((1, 1), (1, 15), (1, 16), (1, 17), (1, 64), (1, 129), (1, 300)), (14, 2)),
    "MHA 5/5 of 80, pages of 32": Scene(((1, 33), (1, 260)), (5, 5), 80, block=32),
    "7/1 of 128, bfloat16": Scene(((1, 300), (1, 31)), (7, 1), 128, BF16, BF16),
    "3/1 of 40": Scene(((1, 100),), (3, 1), 40),
    "groups of 20: two items a sequence": Scene(((1, 50), (1, 140)), (20, 1)),
    "int8, 14/2": Scene(((1, 1), (1, 40), (1, 300)), (14, 2), 64, F16, INT8),
    "int8, 7/1 of 128, bfloat16": Scene(((1, 161),), (7, 1), 128, BF16, INT8),
    "int8, 5/5 of 80": Scene(((1, 70),), (5, 5), 80, F16, INT8),
    "int8, small values": Scene(((1, 90),), (4, 2), 64, F16, INT8, values=1e-3),
    "window 33": Scene(((1, 300), (1, 20), (1, 34)), window=33),
    "window 1, int8": Scene(((1, 300), (1, 1)), window=1, cache=INT8),
    "a few rows each": Scene(((4, 130), (2, 2), (3, 257)), (4, 2)),
    "sharp softmax": Scene(((1, 200),), (6, 2), 128, scale=2.0),
    "float16 queries over bfloat16 pages": Scene(((1, 60),), (4, 4), cache=BF16),
    "a grid for 4096 keys": Scene(((1, 10), (1, 200)), (4, 2), 64, reach=4096),
}
ANY = {
    "decode of 33": Scene(((1, 50), (1, 140)), (6, 2), 33),
    "decode of 256, int8, bfloat16": Scene(((1, 150), (3, 20)), (3, 1), 256, BF16, INT8),
    "decode of 33, int8, window": Scene(((1, 150),), (2, 1), 33, cache=INT8, window=40),
    "prefill of 33": Scene(((20, 50), (1, 9)), (4, 2), 33, BF16, BF16),
    "prefill of 256, int8": Scene(((17, 40),), (1, 1), 256, cache=INT8),
}
PREFILL = {
    "chunks beside decode rows, 14/2": Scene(((20, 20), (1, 150), (13, 77), (2, 3)), (14, 2)),
    "MHA 5/5 of 80, over a prefix": Scene(((70, 210),), (5, 5), 80),
    "7/1 of 128, bfloat16": Scene(((30, 95),), (7, 1), 128, BF16, BF16),
    "3/1 of 40, pages of 32": Scene(((65, 65),), (3, 1), 40, block=32),
    "int8, 4/2": Scene(((40, 133), (33, 33)), (4, 2), 64, F16, INT8),
    "int8, 2/1 of 128, bfloat16": Scene(((20, 70),), (2, 1), 128, BF16, INT8),
    "int8, small values": Scene(((33, 60),), (2, 2), 64, F16, INT8, values=1e-3),
    "window 9": Scene(((100, 180), (20, 20)), (1, 1), window=9),
    "window 70, int8": Scene(((90, 200),), (2, 2), window=70, cache=INT8),
    "bfloat16 queries over float16 pages": Scene(((20, 40),), (1, 1), dtype=BF16, cache=F16),
    "sharp softmax": Scene(((33, 120),), (2, 2), scale=2.0),
}


@pytest.fixture(scope="module", params=WARPS, ids="warp{}".format)
def library(request: pytest.FixtureRequest) -> Path:
    """The kernels at warp 32 and 64, with that warp's matrix unit."""
    return toolchain.emu_library(request.param, only=MODULES)


@pytest.mark.parametrize("scene", [*DECODE.values(), *PREFILL.values()], ids=[*DECODE, *PREFILL])
def test_matrix_unit(library: Path, scene: Scene) -> None:
    check(scene, in_every_order(scene, library), matrix=True)


@pytest.mark.parametrize("scene", ANY.values(), ids=ANY)
def test_any_head_size(library: Path, scene: Scene) -> None:
    check(scene, in_every_order(scene, library), matrix=False)


@pytest.fixture(scope="module", params=WARPS, ids="warp{}".format)
def simt_library(request: pytest.FixtureRequest) -> Path:
    """The attention kernels as a device without a matrix unit has them."""
    return toolchain.emu_library(request.param, mma=False, only=MODULES)


SIMT = [k for k in (*DECODE, *PREFILL) if "pages" in k or "int8" in k or "14/2" in k or "window" in k]


@pytest.mark.parametrize("name", SIMT)
def test_without_a_matrix_unit(simt_library: Path, name: str) -> None:
    """The same kernels where there is none: float32 throughout."""
    scene = {**DECODE, **PREFILL}[name]
    check(scene, in_every_order(scene, simt_library), matrix=False)


def test_constant_int8_values_come_back_exact(library: Path) -> None:
    """Scale 0: attention returns the constant whatever the softmax."""
    for q_len in (1, 20):
        s = Scene(((q_len, 37),), (2, 1), 64, F16, INT8)
        x = data(s)
        assert x.affine is not None
        x.affine[1][..., 0], x.affine[1][..., 1] = 0.0, -3.75
        try:
            got = play(s, library)
        finally:
            data.cache_clear()
        assert got.unique().tolist() == [-3.75]


def test_a_sequence_without_keys_gives_zeros(library: Path) -> None:
    """As padding of a recorded step may be."""
    for reach in (16, 4096):  # one split, and several
        out = torch.full((1, 2, 64), torch.nan, dtype=F16)
        geometry = attention.make_geometry([1], reach, (2, 1), 64, None, torch.device("cpu"))
        pages = torch.full((1, 1, 16, 64), torch.nan, dtype=F16)
        ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0], [[0]])]
        attention.attend(
            open_kernels(library), out, torch.ones_like(out), (pages, pages), None, geometry, *ints, 1.0, None,
        )  # fmt: skip
        assert not out.any()


def test_every_row_is_in_one_item() -> None:
    for group, size in ((1, 64), (7, 128), (20, 33), (8, 256)):
        q_lens = [1, 3, 200, 16, 1, 65]
        decode, prefill = attention.work_items(q_lens, group, size)
        tile = 64 if size in (64, 128) else 32
        rows = {(b, r) for b, n in enumerate(q_lens) for r in range(n * group)}
        covered = [
            (b, r)
            for items, most in ((decode, 16), (prefill, tile))
            for b, first in items.tolist()
            for r in range(first, min(first + most, q_lens[b] * group))
        ]
        assert len(covered) == len(set(covered)) and set(covered) == rows
        assert {b for b, _ in decode.tolist()} == {b for b, n in enumerate(q_lens) if n == 1 or n * group <= 16}
        few = [n * group for n in q_lens if n * group <= 16 or n == 1]
        assert attention.max_item_rows(q_lens, group) == min(16, max(few))


def test_splits_fill_a_device_and_no_more() -> None:
    assert attention.num_splits(32, 32, 4096) == 1  # 1024 blocks already
    assert attention.num_splits(32, 8, 4096) == 4
    assert attention.num_splits(1, 8, 4096) == 32  # of 128 keys
    assert attention.num_splits(1, 1, 100) == 1
    assert attention.num_splits(1, 1, 10**6) == attention.MAX_SPLITS
    assert attention.num_splits(1, 1, 10**6, window=200) == 2
    assert attention.workspace_floats(1, 4, 2, 7, 64) == (0, 0)
    assert attention.workspace_floats(3, 4, 2, 7, 64) == (3 * 4 * 2 * 7 * 64, 3 * 4 * 2 * 7 * 2)


def test_what_no_kernel_serves_is_declined() -> None:
    q, pages = torch.zeros(1, 2, 64, dtype=F16), torch.zeros(1, 1, 16, 64, dtype=F16)
    geometry = attention.make_geometry([1], 16, (2, 1), 64, None, torch.device("cpu"))
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [1], [[0]])]

    def attend(q: Tensor, pages: Tensor, window: int | None = None) -> None:
        def none(module: str) -> Loaded:
            raise AssertionError("a kernel was asked for")

        kernels = Kernels(none, lambda: 0, 32)
        attention.attend(kernels, torch.empty_like(q), q, (pages, pages), None, geometry, *ints, 1.0, window)

    with pytest.raises(Declined, match="float32"):
        attend(q.float(), pages)
    with pytest.raises(Declined, match="head sizes"):
        attend(torch.zeros(1, 2, 264, dtype=F16), torch.zeros(1, 1, 16, 264, dtype=F16))
    with pytest.raises(Declined, match="pages of"):
        attend(q, torch.zeros(1, 1, 24, 64, dtype=F16))
    with pytest.raises(ValueError, match="do not fit"):
        attend(q, torch.zeros(1, 1, 16, 32, dtype=F16))
    with pytest.raises(ValueError, match="scale, min"):
        attend(q, torch.zeros(1, 1, 16, 64, dtype=INT8))
    with pytest.raises(ValueError, match="window"):
        attend(q, pages, 0)
