"""Linear kernels in the emulator against float64, in both warp sizes and three thread orders; packing; dispatch.

The bound of each element is the one at the heads of csrc/gpu/linear_gemv.cu and linear_gemm.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_rt.backends.contract import make_linear
from qwen_rt.backends.gpu import linear, toolchain
from qwen_rt.backends.gpu.driver import Driver
from qwen_rt.backends.gpu.kernels import Kernels, Loaded
from qwen_rt.backends.gpu.linear import NEVER, GpuPacked, Traits
from qwen_rt.backends.torch_backend import from_host
from qwen_rt.dtypes import FLOATS
from qwen_rt.errors import CheckpointError
from qwen_rt.quant.formats import LinearFormat, LinearRows, RawLinear, dense_format

MODULES = ("linear_gemv", "linear_gemm", "elementwise")
ORDERS = ("forward", "reverse", "random")
CPU = torch.device("cpu")
F16, BF16 = torch.float16, torch.bfloat16
UNIT = {F16: 2.0**-11, BF16: 2.0**-8}
TINY = {F16: 2.0**-24, BF16: 2.0**-126}
U32 = 2.0**-24

MMA = Traits(mma=True, sms=1, handover=NEVER)
SIMT = Traits(mma=False, sms=1, handover=NEVER)
SPLIT = Traits(mma=True, sms=1000, handover=NEVER)  # never enough blocks: K is split wherever it can be
SIMT_SPLIT = replace(SPLIT, mma=False)
HAND_OVER = Traits(mma=True, sms=1, handover=1, scratch=1 << 12)

warps = pytest.mark.parametrize("warp", (32, 64))
dtypes = pytest.mark.parametrize("dtype", (F16, BF16), ids=("f16", "bf16"))


@cache
def open_kernels(warp: int, order: str) -> Kernels:
    """The kernels at a warp size, threads in an order."""
    driver = Driver.open_emu(toolchain.emu_library(warp, only=MODULES), order)  # type: ignore[arg-type]
    return Kernels(lambda module: Loaded(driver.load(module), "emulated"), lambda: 0, warp)


def in_every_order(warp: int, compute: Callable[[Kernels], Tensor]) -> Tensor:
    """`compute`'s result, which has to be the same bits in every thread order."""
    results = [compute(open_kernels(warp, order)) for order in ORDERS]
    for other in results[1:]:
        assert torch.equal(results[0].view(torch.int16), other.view(torch.int16))
    return results[0]


def rng(*key: int) -> torch.Generator:
    """Seeded by numbers."""
    return torch.Generator().manual_seed(sum(k * 1009**i for i, k in enumerate(key)) % 2**40)


@dataclass(frozen=True)
class Layer:
    """A weight, packed, and what float64 says of it; columns in the original order."""

    raw: RawLinear
    packed: GpuPacked
    weight: Tensor  # exact, float64 [N, K]
    terms: Tensor  # scale |code - zero|, or scale code + |min|

    def exact(self, x: Tensor) -> Tensor:
        """x W^T + b in float64."""
        return x.double() @ self.weight.T + self.bias

    @property
    def bias(self) -> Tensor | float:
        """The bias in float64, 0 without one."""
        return 0.0 if self.raw.bias is None else from_host(self.raw.bias).double()

    def bound(self, x: Tensor, rounded_weights: bool = False) -> Tensor:
        """The error bound of every element, as the kernels state it."""
        k, unit = self.weight.shape[1], UNIT[self.packed.dtype]
        sizes = x.double().abs() @ self.terms.T + abs(self.bias)
        if rounded_weights:
            products = x.double().abs() @ (self.weight.abs() + TINY[self.packed.dtype]).T
            sums = (k + 8) * U32 * (sizes + products) + unit * (products + sizes * (self.raw.bias is not None))
        else:
            sums = (k + 8) * U32 * sizes
        return sums + (unit * self.exact(x).abs() + TINY[self.packed.dtype]) * (1 + 2**-9)


def make_layer(
    fmt: LinearFormat, n: int, k: int, dtype: torch.dtype, bias: bool = True, perm: bool = False, seed: int = 0
) -> Layer:
    """A random layer that uses every code, zero and minimum."""
    raw = make_linear(fmt, n, k, rng(n, k, fmt.bits, fmt.group_size, seed), bias=bias, perm=perm)
    part = raw.rows(0, n)
    assert part.codes is not None and part.scales is not None
    codes = from_host(part.codes).double().view(n, -1, fmt.group_size)
    scales = from_host(part.scales).double().unsqueeze(-1)
    if part.mins is not None:
        mins = from_host(part.mins).double().unsqueeze(-1)
        weight = scales * codes + mins
        terms = scales * codes + mins.abs()
    else:
        zeros = from_host(part.zeros).double().unsqueeze(-1) if part.zeros is not None else 2.0 ** (fmt.bits - 1)
        weight = scales * (codes - zeros)
        terms = weight.abs()
    original = torch.empty(2, n, k, dtype=torch.float64)
    original[:, :, stored_order(raw)] = torch.stack((weight, terms)).flatten(2)
    return Layer(raw, linear.pack(raw, CPU, dtype), original[0], original[1])


def stored_order(raw: RawLinear) -> slice | Tensor:
    """An index of columns: where each stored one belongs."""
    return slice(None) if raw.perm is None else from_host(raw.perm).long()


def inputs(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of x in the compute dtype."""
    return torch.randn(rows, k, generator=rng(rows, k, seed), dtype=torch.float64).to(dtype)


def formats(bits: int, groups: tuple[int, ...]) -> Iterator[LinearFormat]:
    """Plain, with zeros, with mins; at each group."""
    for group in groups:
        for zeros, mins in ((False, False), (True, False), (False, True)):
            yield LinearFormat(bits, group, zeros, mins)  # type: ignore[arg-type]


def check(warp: int, layer: Layer, rows: int, traits: Traits, seed: int = 0, orders: bool = True) -> None:
    """A product within its bound, the same in every order."""
    x = inputs(rows, layer.raw.shape[1], layer.packed.dtype, seed)
    if orders:
        y = in_every_order(warp, lambda kernels: linear.run(kernels, x, layer.packed, traits))
    else:
        y = linear.run(open_kernels(warp, "random"), x, layer.packed, traits)
    assert y.dtype == x.dtype and y.shape == (rows, layer.raw.shape[0])
    excess = (y.double() - layer.exact(x)).abs() / layer.bound(x, rows >= traits.handover)
    assert float(excess.max()) <= 1, (str(layer.raw.format), rows, traits, float(excess.max()))


# -- products ------------------------------------------------------------------------------------------------------
@warps
@dtypes
@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("traits", (MMA, SIMT), ids=("mma", "simt"))
def test_every_format_and_number_of_rows(warp: int, dtype: torch.dtype, bits: int, traits: Traits) -> None:
    """Groups below, at and above a tile and across its edges; odd N; rows on both sides of every kernel's limit."""
    for i, fmt in enumerate(formats(bits, (16, 48, 64, 128, 256))):
        k = fmt.group_size * (3 if fmt.group_size < 128 else 1)
        layer = make_layer(fmt, (37, 16, 1)[i % 3], k, dtype, bias=i % 2 == 0, perm=i % 4 == 1)
        for rows in (1, 2, 3, 5, 8, 9, 17, 33, 65):
            check(warp, layer, rows, traits, orders=rows in (3, 17, 65))


@warps
@pytest.mark.parametrize("traits", (MMA, SIMT, SPLIT, SIMT_SPLIT), ids=("mma", "simt", "split", "simt split"))
def test_long_sums(warp: int, traits: Traits) -> None:
    """K of many tiles a warp, an uneven number of them, over several blocks; N beyond a many-row kernel's block."""
    for fmt, n, k in (
        (LinearFormat(4, 128), 20, 128 * 75),
        (LinearFormat(4, 32, has_mins=True), 17, 128 * 37 + 32),
        (LinearFormat(8, 64, has_zeros=True), 145, 64 * 34),
    ):
        layer = make_layer(fmt, n, k, F16)
        for rows in (2, 12, 34):
            # A block of the few-row kernels sums 32 tiles at least: only the first K is long enough to be split.
            few = rows <= (32 if traits.mma else 8)
            splits = 1 if traits.sms == 1 else {75: 2, 38: 1, 34: 1}[-(-k // linear.tile_k(fmt.bits))] if few else 4
            assert linear.choose(rows, n, k, fmt, F16, traits).splits >= splits
            check(warp, layer, rows, traits, orders=traits.sms > 1)


@warps
@dtypes
def test_codes_at_their_ends(warp: int, dtype: torch.dtype) -> None:
    """The largest |code - zero| both ways is exact in either type: x of one non-zero picks each weight out."""
    for bits, zero in ((4, 0), (4, 16), (8, 0), (8, 255)):
        k = 1024 // bits
        codes = np.tile((np.arange(k) % (1 << bits)).astype(np.uint8), (3, 1))
        part = LinearRows(codes=codes, scales=np.ones((3, 1), np.float16), zeros=np.full((3, 1), zero, np.uint8))
        raw = RawLinear("ends", (3, k), LinearFormat(bits, k, has_zeros=True), lambda a, b, p=part: p)  # type: ignore[arg-type]
        packed = linear.pack(raw, CPU, dtype)
        want = from_host(codes).double() - zero
        for traits, rows in ((MMA, 8), (SIMT, 8), (MMA, 64), (SIMT, 64)):
            for start in range(0, k, 64):
                x = torch.zeros(rows, k, dtype=dtype)
                picked = torch.arange(start, start + rows).remainder(k)
                x[torch.arange(rows), picked] = 1
                y = linear.run(open_kernels(warp, "random"), x, packed, traits)
                assert torch.equal(y.double(), want[:, picked].T)


@warps
def test_scales_beyond_the_range_of_half_products(warp: int) -> None:
    """scale * (code - zero) beyond 65504 never exists as a 16-bit number in the kernels for few and many rows."""
    fmt = LinearFormat(4, 128)
    layer = make_layer(fmt, 16, 256, F16)
    part = layer.raw.rows(0, 16)
    assert part.codes is not None and part.scales is not None
    big = replace(part, scales=np.full_like(part.scales, 60000.0))
    packed = linear.pack(replace(layer.raw, rows=lambda a, b: big), CPU, F16)
    x = inputs(33, 256, F16) / 2**10
    exact = x.double() @ (60000.0 * (from_host(part.codes).double() - 8)).T + layer.bias
    for rows in (1, 33):
        for traits in (MMA, SIMT):
            y = linear.run(open_kernels(warp, "forward"), x[:rows], packed, traits)
            assert float((y.double() - exact[:rows]).abs().max()) <= 2 * UNIT[F16] * float(exact.abs().max())


@warps
@dtypes
@pytest.mark.parametrize("bits", (4, 8))
def test_hand_over(warp: int, dtype: torch.dtype, bits: int) -> None:
    """Dequantised in chunks, multiplied by torch; with bias, act-order and an N that ends inside a chunk."""
    for fmt in formats(bits, (32, 128)):
        layer = make_layer(fmt, 145, 2 * fmt.group_size, dtype, perm=fmt.has_zeros)
        check(warp, layer, 3, HAND_OVER)


@warps
@dtypes
@pytest.mark.parametrize("bits", (4, 8))
def test_dequantize_and_embedding_are_the_rounded_weights(warp: int, dtype: torch.dtype, bits: int) -> None:
    """Bit for bit the float32 definition, rounded once."""
    for fmt in formats(bits, (16, 48, 128)):
        layer = make_layer(fmt, 37, 5 * fmt.group_size, dtype, bias=False, perm=fmt.group_size == 48)
        want = from_host(layer.raw.dequantize())
        order = stored_order(layer.raw)
        got = in_every_order(warp, lambda kernels, p=layer.packed: linear.dequantize(kernels, p, 16, 33))
        spread = layer.terms[:, order][16:33] * 2 * U32
        assert bool(
            (
                (got.double() - layer.weight[16:33][:, order]).abs()
                <= spread + UNIT[dtype] * want[16:33, order].abs() + TINY[dtype]
            ).all()
        )
        ids = torch.tensor([36, 0, 7, 7, -1, 37, 1 << 40])
        rows = in_every_order(warp, partial(linear.embedding, ids=ids, w=layer.packed, dtype=dtype))
        again = linear.dequantize(open_kernels(warp, "forward"), layer.packed, 0, 37)
        undone = torch.empty_like(again)
        undone[:, order] = again
        assert torch.equal(rows[:4], undone[ids[:4]])
        assert bool(rows[4:].isnan().all()), "an id outside the table has to show"


@warps
def test_a_flipped_bit_is_seen(warp: int) -> None:
    """What the bound is for: the lowest bit of any code moves the result beyond it."""
    layer = make_layer(LinearFormat(4, 128), 16, 256, F16, bias=False)
    x = torch.ones(1, 256, dtype=F16)
    x[0, 100:] = 0  # few terms: a tight bound
    words = layer.packed.words
    assert words is not None
    for byte in (0, 5, 513):
        words.view(-1)[byte] ^= 1
        with pytest.raises(AssertionError):
            y = linear.run(open_kernels(warp, "forward"), x, layer.packed, MMA)
            assert bool(((y.double() - layer.exact(x)).abs() <= layer.bound(x)).all())
        words.view(-1)[byte] ^= 1


def test_dense_weights_go_to_torch() -> None:
    """Kept in the compute dtype, summed in float32; act-order undone at packing."""
    for dtype in (F16, BF16):
        for stored in FLOATS:
            raw = make_linear(dense_format(stored), 19, 70, rng(1), bias=True, perm=True)
            packed = linear.pack(raw, CPU, dtype)
            assert packed.dense is not None and packed.dense.dtype == dtype and packed.perm is None
            assert torch.equal(packed.dense, from_host(raw.dequantize()).to(dtype))
            x = inputs(5, 70, dtype)
            y = linear.run(open_kernels(32, "forward"), x, packed, MMA)
            assert raw.bias is not None
            want = x.double() @ packed.dense.double().T + from_host(raw.bias).to(dtype).double()
            assert float((y.double() - want).abs().max()) <= UNIT[dtype] * float(want.abs().max()) + 1e-4
            rows = linear.embedding(open_kernels(32, "forward"), torch.tensor([18, 3]), packed, dtype)
            assert torch.equal(rows, packed.dense[[18, 3]])


@warps
def test_inputs_as_a_graph_makes_them(warp: int) -> None:
    """Strided and misaligned x, and no rows at all."""
    layer = make_layer(LinearFormat(4, 64), 40, 192, F16)
    wide = inputs(6, 400, F16)
    kernels = open_kernels(warp, "forward")
    for x in (wide[:, 3:195], wide.view(-1)[1 : 1 + 192 * 2].view(2, 192), wide[::2, :192]):
        assert torch.equal(linear.run(kernels, x, layer.packed, MMA), linear.run(kernels, x.clone(), layer.packed, MMA))
    assert linear.run(kernels, wide[:0, :192], layer.packed, MMA).shape == (0, 40)


# -- packing -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", (4, 8))
def test_packing_keeps_every_number(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, scales, zeros and mins come back as they were; in one chunk of rows and in many."""
    for elements in (1 << 24, 1 << 11):
        monkeypatch.setattr(linear, "PACK_ELEMENTS", elements)
        for fmt in formats(bits, (16, 32, 80, 128)):
            layer = make_layer(fmt, 53, 5 * fmt.group_size, F16, perm=True)
            got, part = linear.unpack(layer.packed), layer.raw.rows(0, 53)
            for name in ("codes", "scales", "zeros", "mins"):
                mine, stored = getattr(got, name), getattr(part, name)
                assert (mine is None) == (stored is None), name
                assert stored is None or (mine.dtype == stored.dtype and np.array_equal(mine, stored)), name
            assert layer.packed.perm is not None and layer.raw.perm is not None
            assert torch.equal(layer.packed.perm, from_host(layer.raw.perm))


@pytest.mark.parametrize("bits", (4, 8))
def test_packing_is_the_documented_layout(bits: int) -> None:
    """linear.cuh's words, registers, nibbles and bytes, computed here one code at a time."""
    tile_k = 512 // bits
    codes = torch.randint(0, 1 << bits, (32, 2 * tile_k), generator=rng(bits), dtype=torch.uint8)
    words = linear.pack_codes(codes, bits)
    assert words.shape == (2, 2, 1024)
    registers = words.view(2, 2, 16, 4, 4, 4).long()  # tile_n, tile_k, row, t, j, byte
    values = (registers << torch.tensor([0, 8, 16, 24])).sum(-1)
    for n in (0, 7, 19, 31):
        for k in range(2 * tile_k):
            step, t, c = k % tile_k // 16, k % 16 // 4, k % 4
            if bits == 4:
                j, shift = step // 2, 4 * (2 * (step % 2) + c // 2 + 4 * (c % 2))
            else:
                j, shift = step, 8 * (c // 2 + 2 * (c % 2))
            assert values[n // 16, k // tile_k, n % 16, t, j] >> shift & (1 << bits) - 1 == codes[n, k]


def test_packed_bytes() -> None:
    """4-bit weights in groups of 128 take 4.125 bits; zeros that say nothing are dropped."""
    layer = make_layer(LinearFormat(4, 128), 256, 1024, F16, bias=False)
    assert layer.packed.nbytes * 8 == 256 * 1024 * 4.125
    part = layer.raw.rows(0, 256)
    assert part.scales is not None
    same = replace(part, zeros=np.full(part.scales.shape, 8, np.uint8))
    raw = RawLinear("eights", (256, 1024), LinearFormat(4, 128, has_zeros=True), lambda a, b: same)
    packed = linear.pack(raw, CPU, F16)
    assert packed.zeros is None and packed.nbytes == layer.packed.nbytes
    assert np.array_equal(linear.unpack(packed).zeros, same.zeros)  # type: ignore[arg-type]


def test_damaged_weights_are_refused() -> None:
    """NaN and infinity wherever they are, floats too large for float16, and groups no kernel reads."""
    grouped = make_linear(LinearFormat(4, 32, has_mins=True), 20, 64, rng(2), bias=True, perm=False)
    dense = make_linear(dense_format("float32"), 20, 64, rng(3), bias=False, perm=False)

    def spoil(raw: RawLinear, name: str, value: float) -> RawLinear:
        def rows(start: int, stop: int) -> LinearRows:
            part = raw.rows(start, stop)
            bad = getattr(part, name).copy()
            bad[-1, -1] = value
            return replace(part, **{name: bad})

        return replace(raw, rows=rows)

    for value in (float("nan"), float("inf")):
        for raw, name in ((grouped, "scales"), (grouped, "mins"), (dense, "values")):
            with pytest.raises(CheckpointError, match=name):
                linear.pack(spoil(raw, name, value), CPU, F16)
    with pytest.raises(CheckpointError, match="bias"):
        linear.pack(replace(grouped, bias=np.full(20, np.nan, np.float32)), CPU, F16)
    with pytest.raises(CheckpointError, match="float16"):
        linear.pack(spoil(dense, "values", 1e6), CPU, F16)
    assert linear.pack(spoil(dense, "values", 1e6), CPU, BF16).dense is not None
    with pytest.raises(CheckpointError, match="groups"):
        linear.pack(replace(grouped, format=LinearFormat(4, 24, has_mins=True)), CPU, F16)


# -- dispatch ------------------------------------------------------------------------------------------------------
@warps
def test_every_choice_is_a_kernel_that_is_there(warp: int) -> None:
    """Every name `choose` can give exists, and its grid covers the result."""
    driver = Driver.open_emu(toolchain.emu_library(warp, only=MODULES), "forward")
    there = set(driver.load("linear_gemv").names())
    for bits in (4, 8):
        for fmt in formats(bits, (32,)):
            for dtype in (F16, BF16):
                for traits in (MMA, SIMT, SPLIT):
                    for rows in (*range(1, 70), 129, 5000):
                        choice = linear.choose(rows, 1000, 4096, fmt, dtype, traits)
                        assert choice.kernel in there
                        if "linear_rows" in choice.kernel:
                            most = int(choice.kernel.rpartition("_r")[2])
                            assert rows <= most <= (32 if fmt.has_mins and rows > 8 else 2 * max(rows, 8))
                            assert choice.grid[:2] == (63, 1) and choice.module == "linear_gemv"
                        else:
                            assert choice.grid[0] * (64 if "simt" in choice.kernel else 128) >= 1000
                            assert choice.grid[1] * 64 >= rows > (choice.grid[1] - 1) * 64
                            assert choice.module == "linear_gemm"
                        assert ("_min" in choice.kernel) == (fmt.has_mins and traits.mma)


def test_splits_keep_a_card_busy_and_blocks_fed() -> None:
    """Few outputs: K over several blocks, each with enough of it; many outputs: never."""
    h200 = linear.traits_of("sm_90a", 132, 141 << 30)
    fmt = LinearFormat(4, 128)
    assert linear.choose(1, 4096, 4096, fmt, F16, h200).splits == 1
    assert linear.choose(1, 152064, 8192, fmt, F16, h200).splits == 1
    assert linear.choose(64, 4096, 4096, fmt, F16, h200).splits == 4
    assert linear.choose(64, 49152, 8192, fmt, F16, h200).splits == 1
    assert linear.choose(1, 512, 16384, fmt, F16, h200).splits == 4


def test_traits() -> None:
    """Matrix units and the hand-over by architecture; what is not known is served without."""
    assert linear.traits_of("sm_90a", 132).handover == linear.HANDOVER["sm_90"]
    assert linear.traits_of("sm_70", 80) == Traits(False, 80, 64)
    assert linear.traits_of("sm_121", 48).mma
    assert not linear.traits_of("gfx906:sramecc+:xnack-", 60).mma
    assert linear.traits_of("gfx90a:sramecc+", 104).mma
    assert not linear.traits_of("gfx928", 120).mma
    assert linear.traits_of("emu64", 4).handover == NEVER
    assert not linear.traits_of("emu64-simt", 4).mma
    assert linear.choose(192, 4096, 4096, LinearFormat(4, 128), F16, linear.traits_of("sm_90", 132)).kernel == ""
    assert linear.traits_of("sm_90", 132, 141 << 30).scratch > linear.traits_of("sm_86", 80, 24 << 30).scratch
