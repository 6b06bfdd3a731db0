"""RMSNorm, RoPE, the cache write, SwiGLU, embedding and conversions on the emulator against float64."""

from __future__ import annotations

import random

import pytest
import torch
from emulated_kernels import U32, UNIT, WARPS, bits, in_every_order, open_kernels, randn, within
from torch import Tensor

from qwen_rt.backends.gpu import elementwise
from qwen_rt.backends.gpu.kernels import Kernels
from qwen_rt.backends.reference import ReferenceBackend, quantize_heads
from qwen_rt.errors import Declined

pytest.importorskip("qwen_rt._gpu", reason="the GPU launcher is not built (make build)")

DTYPES = (torch.float16, torch.bfloat16)
ORACLE = ReferenceBackend(compute_dtype="float64")

pytestmark = [
    pytest.mark.parametrize("warp", WARPS),
    pytest.mark.parametrize("dtype", DTYPES, ids=("f16", "bf16")),
]


def tiny(dtype: torch.dtype) -> float:
    """The rounding error of a result below the normal numbers: half their spacing."""
    return torch.finfo(dtype).tiny * UNIT[dtype]


# -- RMSNorm -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "size", "x_is_float", "with_residual"),
    [
        (1, 8, False, False),
        (3, 63, False, True),
        (5, 896, False, True),
        (4, 896, True, False),
        (2, 2051, True, True),
        (1, 8200, False, True),  # more than a block holds in registers
        (1, 9001, True, False),
        (7, 1, False, True),
    ],
)
def test_rms_norm(warp: int, dtype: torch.dtype, rows: int, size: int, x_is_float: bool, with_residual: bool) -> None:
    wide = (randn(rows, size + 16) * 3).to(torch.float32 if x_is_float else dtype)
    x = wide[:, 8 : 8 + size]  # strided; aligned where the row stride is
    weight = (1 + 0.3 * randn(size)).to(dtype)
    residual = (randn(rows, size, seed=1) * 5).float() if with_residual else None

    normed, summed = in_every_order(warp, lambda k: elementwise.rms_norm(k, x, weight, 1e-6, residual))

    want, _ = ORACLE.rms_norm(x.double(), weight.double(), 1e-6, None if residual is None else residual.double())
    assert normed.dtype == dtype
    assert within(normed, want, (2 * UNIT[dtype] + (size / 2 + 8) * U32) * want.abs() + 4 * tiny(dtype))
    if residual is None:
        assert summed is x
    else:
        assert summed.dtype == torch.float32
        assert torch.equal(summed, residual + x.float())


def test_rms_norm_casts_before_it_multiplies(warp: int, dtype: torch.dtype) -> None:
    """T(T(x / rms) * w) bit for bit: small integers, whose squares add up exactly in any order."""
    x = randn(3, 64).mul(3).round().to(dtype)
    weight = randn(64).to(dtype)
    scale = 1 / (x.float().square().sum(-1, keepdim=True) / 64 + 1e-6).sqrt()
    quotient = x.float() * scale
    normed, _ = in_every_order(warp, lambda k: elementwise.rms_norm(k, x, weight, 1e-6))
    assert torch.equal(normed, quotient.to(dtype) * weight)
    assert not torch.equal(normed, (quotient * weight.float()).to(dtype))  # the other order would show


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 14, 64), (5, 3, 40), (3, 9, 128), (2, 1, 37), (1, 2, 256)])
def test_rms_norm_heads(warp: int, dtype: torch.dtype, tokens: int, heads: int, size: int) -> None:
    fused = randn(tokens, heads + 3, size).to(dtype)
    x, weight = fused[:, 1:-2], (1 + 0.3 * randn(size)).to(dtype)
    before = fused.clone()
    (normed, _) = in_every_order(warp, lambda k: elementwise.rms_norm(k, x, weight, 1e-6))
    want = ORACLE.rms_norm(x.double(), weight.double(), 1e-6)[0]
    assert within(normed, want, (2 * UNIT[dtype] + (size / 2 + 8) * U32) * want.abs() + 4 * tiny(dtype))
    assert torch.equal(fused, before)


def test_rms_norm_of_zeros(warp: int, dtype: torch.dtype) -> None:
    zeros, weight = torch.zeros(4, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    (normed, _) = in_every_order(warp, lambda k: elementwise.rms_norm(k, zeros, weight, 1e-6))
    assert torch.equal(normed, zeros)


def test_rms_norm_declines(warp: int, dtype: torch.dtype) -> None:
    kernels = open_kernels(warp, "forward")
    with pytest.raises(Declined):
        elementwise.rms_norm(kernels, torch.zeros(1, 8), torch.zeros(8), 1e-6)
    with pytest.raises(ValueError):
        elementwise.rms_norm(kernels, torch.zeros(1, 8, dtype=dtype), torch.zeros(9, dtype=dtype), 1e-6)


# -- RoPE and the cache --------------------------------------------------------------------------------------------
ROPE_SHAPES = [  # tokens, query heads, key heads, D, r
    (1, 14, 2, 64, 32),
    (3, 5, 5, 128, 64),
    (5, 3, 1, 80, 40),
    (2, 6, 2, 96, 24),  # part of the dims turn
    (4, 2, 2, 10, 5),
    (3, 1, 1, 98, 49),
    (2, 2, 1, 256, 128),
    (1, 1, 1, 8, 1),
]


class Step:
    """Rows of a fused QKV projection, their tables and slots."""

    def __init__(self, dtype: torch.dtype, tokens: int, hq: int, hkv: int, size: int, r: int, block: int = 16) -> None:
        self.heads, self.size, self.block = (hq, hkv), size, block
        self.fused = randn(tokens, (hq + 2 * hkv) * size).to(dtype)
        angle = randn(tokens, r).float() * 50
        self.cos, self.sin = angle.cos(), angle.sin()
        self.num_blocks = 3
        free = torch.randperm(self.num_blocks * block, generator=torch.Generator().manual_seed(tokens))
        self.slots = free[:tokens].contiguous()

    def qkv(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hq, hkv = self.heads
        q, k, v = fused.view(fused.shape[0], -1, self.size).split((hq, hkv, hkv), 1)
        return q, k, v

    def pages(self, kind: torch.dtype) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """K and V pages of a value that no store leaves behind, and for int8 their scales."""
        shape = (self.num_blocks, self.heads[1], self.block)
        if kind == torch.uint8:
            k, v = (torch.full((*shape, self.size), 77, dtype=kind) for _ in "kv")
            ka, va = (torch.full((*shape, 2), -7.0) for _ in "kv")
            return (k, v), (ka, va)
        k, v = (torch.full((*shape, self.size), -77.0, dtype=kind) for _ in "kv")
        return (k, v), None


def turned_bound(x: Tensor, cos: Tensor, sin: Tensor, want: Tensor) -> Tensor:
    """3 u32 (|a cos| + |b sin|) and a rounding to the dtype of x; nothing for dims that do not turn."""
    r = cos.shape[1]
    a, b, c, s = (t.double().abs() for t in (x[..., :r], x[..., r : 2 * r], cos[:, None], sin[:, None]))
    turned = torch.cat((a * c + b * s, b * c + a * s), -1)
    bound = 3 * U32 * turned + UNIT[x.dtype] * want[..., : 2 * r].abs() + tiny(x.dtype)
    return torch.cat((bound, torch.zeros_like(want[..., 2 * r :])), -1)


@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
def test_rope(warp: int, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    step = Step(dtype, *shape)
    q, k, v = step.qkv(step.fused)

    def compute(kernels: Kernels) -> list[Tensor]:
        fused = step.fused.clone()
        mine = step.qkv(fused)
        elementwise.rope(kernels, mine[0], mine[1], step.cos, step.sin)
        return [fused]

    got = step.qkv(in_every_order(warp, compute)[0])
    want = ORACLE.rope(q.double(), k.double(), step.cos, step.sin)
    for x, y, exact in zip((q, k), got[:2], want, strict=True):
        assert within(y, exact, turned_bound(x, step.cos, step.sin, exact))
    assert torch.equal(got[2], v)


def test_rope_to_another_place(warp: int, dtype: torch.dtype) -> None:
    """The kernel's out pointers: unlike the inputs, with strides of their own; dims that do not turn are copied."""
    step = Step(dtype, 3, 2, 1, 24, 8)
    q, k, _ = step.qkv(step.fused)
    before = step.fused.clone()

    def compute(kernels: Kernels) -> list[Tensor]:
        q_out, k_out = torch.zeros(3, 2, 32, dtype=dtype)[..., :24], torch.zeros(3, 1, 24, dtype=dtype)
        name = "rope_f16" if dtype == torch.float16 else "rope_bf16"
        kernels("rope_kv", name, "PPPPPPPlllllllllliiii")(
            (3, 1, 1), 256, q, k, q_out, k_out, step.cos, step.sin, None, *q.stride()[:2], *k.stride()[:2],
            *q_out.stride()[:2], *k_out.stride()[:2], step.cos.stride(0), step.sin.stride(0), 2, 1, 24, 8,
        )  # fmt: skip
        return [q_out, k_out]

    got = in_every_order(warp, compute)
    in_place = step.fused.clone()
    q2, k2, _ = step.qkv(in_place)
    elementwise.rope(open_kernels(warp, "forward"), q2, k2, step.cos, step.sin)
    assert torch.equal(got[0], q2)
    assert torch.equal(got[1], k2)
    assert torch.equal(step.fused, before)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.uint8], ids=("f16", "bf16", "int8"))
@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
def test_store(warp: int, dtype: torch.dtype, shape: tuple[int, int, int, int, int], kind: torch.dtype) -> None:
    """What the reference stores, bit for bit; int8 codes too, since both divide in IEEE float32. Nothing else moves."""
    step = Step(dtype, *shape)
    _, k, v = step.qkv(step.fused)
    if kind == torch.float16:
        k *= 1e4  # a bfloat16 key may be beyond float16

    def compute(kernels: Kernels) -> list[Tensor]:
        pages, affine = step.pages(kind)
        elementwise.store_kv(kernels, k, v, pages, affine, step.slots)
        return [*pages, *(affine or ())]

    got = in_every_order(warp, compute)
    pages, affine = step.pages(kind)
    block, offset = step.slots // step.block, step.slots % step.block
    for i, x in enumerate((k, v)):
        if affine is None:
            pages[i][block, :, offset] = x.to(kind)
        else:
            pages[i][block, :, offset], affine[i][block, :, offset] = quantize_heads(x)
    for a, b in zip(got, (*pages, *(affine or ())), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_store_of_ties_constants_and_damage(warp: int, dtype: torch.dtype) -> None:
    """Codes halfway between two go to the even one; a constant comes back exact; NaN and infinity as NaN."""
    k = torch.zeros(5, 1, 64, dtype=dtype)
    k[0, 0, :2] = torch.tensor([0.0, 255.0])
    k[0, 0, 2:] = torch.arange(62) + 0.5  # scale 1: every code is a tie
    k[1] = -3.75
    k[2] = 1.0
    k[2, 0, 5] = torch.nan
    k[3, 0, 63] = torch.inf
    k[4, 0, 0] = -torch.inf
    pages = tuple(torch.full((1, 1, 16, 64), 9, dtype=torch.uint8) for _ in "kv")
    affine = tuple(torch.zeros(1, 1, 16, 2) for _ in "kv")

    def compute(kernels: Kernels) -> list[Tensor]:
        elementwise.store_kv(kernels, k, k, (pages[0], pages[1]), (affine[0], affine[1]), torch.arange(5))
        return [pages[0].clone(), affine[0].clone()]

    codes, scale_min = in_every_order(warp, compute)
    assert torch.equal(codes[0, 0, 0, 2:].float(), (torch.arange(62) + 0.5).round())
    assert scale_min[0, 0, 1].tolist() == [0.0, -3.75]
    read = codes[0, 0].float() * scale_min[0, 0, :, :1] + scale_min[0, 0, :, 1:]
    assert (read[1] == -3.75).all()
    assert read[2:5].isnan().all()
    assert (codes[0, 0, 5:] == 9).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.uint8], ids=("f16", "bf16", "int8"))
@pytest.mark.parametrize("shape", [ROPE_SHAPES[i] for i in (0, 2, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=("", "logn"))
def test_rope_and_store_in_one(
    warp: int, dtype: torch.dtype, shape: tuple[int, int, int, int, int], kind: torch.dtype, scaled: bool
) -> None:
    """The same bits as one after the other, k left alone, a row with a negative slot left out."""
    step = Step(dtype, *shape)
    tokens = shape[0]
    step.slots[tokens - 1] = -1
    scale = (1 + randn(tokens).abs()).to(dtype) if scaled else None

    def compute(kernels: Kernels) -> list[Tensor]:
        fused = step.fused.clone()
        pages, affine = step.pages(kind)
        elementwise.rope_store_kv(kernels, *step.qkv(fused), step.cos, step.sin, scale, pages, affine, step.slots)
        return [fused, *pages, *(affine or ())]

    fused, *got = in_every_order(warp, compute)
    apart = step.fused.clone()
    q, k, v = step.qkv(apart)
    kernels = open_kernels(warp, "forward")
    elementwise.rope(kernels, q, k, step.cos, step.sin)
    pages, affine = step.pages(kind)
    kept = step.slots[: tokens - 1]
    elementwise.store_kv(kernels, k[: tokens - 1], v[: tokens - 1], pages, affine, kept)
    for a, b in zip(got, (*pages, *(affine or ())), strict=True):
        assert torch.equal(bits(a), bits(b))
    q_got, k_got, v_got = step.qkv(fused)
    assert torch.equal(q_got, q if scale is None else q * scale.view(-1, 1, 1))
    assert torch.equal(k_got, step.qkv(step.fused)[1])
    assert torch.equal(v_got, v)


def test_random_steps(warp: int, dtype: torch.dtype) -> None:
    """Odd shapes: RoPE within its bound, then an int8 cache that reads back within half a step."""
    g = random.Random(warp)
    for _ in range(8):
        size = g.randint(1, 256)
        step = Step(dtype, g.randint(1, 5), g.randint(1, 9), g.randint(1, 4), size, g.randint(0, size // 2), 32)
        q, k, v = step.qkv(step.fused.clone())
        want = ORACLE.rope(q.double(), k.double(), step.cos, step.sin)
        x = (q.clone(), k.clone())
        kernels = open_kernels(warp, g.choice(("forward", "reverse", "random")))
        pages, affine = step.pages(torch.uint8)
        elementwise.rope_store_kv(kernels, q, k, v, step.cos, step.sin, None, pages, affine, step.slots)
        assert within(q, want[0], turned_bound(x[0], step.cos, step.sin, want[0]))
        assert affine is not None
        block, offset = step.slots // step.block, step.slots % step.block
        for i, exact in enumerate((want[1], v.double())):
            scale_min = affine[i][block, :, offset].double()
            read = pages[i][block, :, offset].double() * scale_min[..., :1] + scale_min[..., 1:]
            span = exact.amax(-1, keepdim=True) - exact.amin(-1, keepdim=True)
            moved = turned_bound(x[1], step.cos, step.sin, exact) if i == 0 else torch.zeros_like(exact)
            bound = span / 510 + 2 * moved.amax(-1, keepdim=True) + 8 * U32 * exact.abs().amax(-1, keepdim=True)
            assert within(read, exact, bound)


def test_rope_and_store_refuse(warp: int, dtype: torch.dtype) -> None:
    step = Step(dtype, 2, 2, 1, 16, 8)
    q, k, v = step.qkv(step.fused)
    kernels = open_kernels(warp, "forward")
    with pytest.raises(ValueError):
        elementwise.rope(kernels, q, k, step.cos[:1], step.sin[:1])
    with pytest.raises(Declined):
        elementwise.rope(kernels, q.double(), k.double(), step.cos, step.sin)
    pages, affine = step.pages(torch.uint8)
    with pytest.raises(ValueError):
        elementwise.store_kv(kernels, k, v, pages, None, step.slots)
    with pytest.raises(ValueError):
        elementwise.store_kv(kernels, k[..., :8], v[..., :8], pages, affine, step.slots)
    wide = Step(dtype, 1, 1, 1, 264, 4)
    with pytest.raises(Declined):
        elementwise.rope(kernels, *wide.qkv(wide.fused)[:2], wide.cos, wide.sin)


# -- the rest ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (1, 4864), (3, 37), (5, 64), (2, 2059)])
@pytest.mark.parametrize("spread", [1.0, 1e-4, 30.0, 300.0])
def test_silu_mul(warp: int, dtype: torch.dtype, rows: int, size: int, spread: float) -> None:
    gate_up = randn(rows, 2 * size)
    gate_up[:, :size] *= spread
    gate_up = gate_up.to(dtype)
    (got,) = in_every_order(warp, lambda k: elementwise.silu_mul(k, gate_up))
    want = ORACLE.silu_mul(gate_up.double())
    gate, up = gate_up.double().chunk(2, 1)
    bound = ((10 + 1.25 * gate.abs()) * U32 + UNIT[dtype]) * want.abs() + tiny(dtype) + up.abs() * 1e-35
    assert within(got, want, bound)


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [8, 100, 2051])
def test_embedding(warp: int, dtype: torch.dtype, table_dtype: torch.dtype, size: int) -> None:
    table = (randn(93, size) * 100).to(table_dtype)
    ids = torch.tensor([0, 92, 5, 5, 17])
    (got,) = in_every_order(warp, lambda k: elementwise.embedding(k, ids, table, dtype))
    assert torch.equal(got, table[ids].to(dtype))
    for bad in (-1, 93, 2**40):
        (row,) = in_every_order(warp, lambda k, bad=bad: elementwise.embedding(k, torch.tensor([3, bad]), table, dtype))
        assert torch.equal(row[0], table[3].to(dtype))
        assert row[1].isnan().all()


def test_embedding_counts_bad_ids(warp: int, dtype: torch.dtype) -> None:
    table, ids = randn(7, 24).to(dtype), torch.tensor([6, 7, -5, 0])
    name = "embedding_f16_f16" if dtype == torch.float16 else "embedding_bf16_bf16"

    def compute(kernels: Kernels) -> list[Tensor]:
        out, bad = torch.empty(4, 24, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        kernels("elementwise", name, "PPPllliP")((4, 2, 1), 256, out, ids, table, 24, 24, 7, 24, bad)
        return [bad]

    assert in_every_order(warp, compute)[0].tolist() == [2]
