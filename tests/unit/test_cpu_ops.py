"""The native CPU operations, each instruction set against float64 over odd shapes, strides and pages."""

from __future__ import annotations

import math
import platform
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_rt.backends.base import SampleRow
from qwen_rt.backends.reference import sample_row
from qwen_rt.backends.torch_backend import to_host
from qwen_rt.errors import BackendError

native = pytest.importorskip("qwen_rt._cpu", reason="the native extension is not built (make build)")


class Cpu:
    """The extension, given the memory of torch tensors as the arrays it takes."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: getattr(native, name)(*(to_host(a) if isinstance(a, Tensor) else a for a in args))


cpu = Cpu()

EPS = 2.0**-24
KV_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.uint8}


ISAS = ["scalar", "neon"] if platform.machine() in ("aarch64", "arm64") else ["scalar", "avx2", "avx512"]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on one instruction set."""
    before = cpu.active_isa()
    try:
        cpu.set_isa(request.param)
    except ValueError as e:
        pytest.skip(str(e))
    yield request.param
    cpu.set_isa(before)


@pytest.fixture(params=[1, 5], ids=["1thread", "5threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run the test on this many threads (five split contexts that one does not)."""
    before = cpu.num_threads()
    cpu.set_num_threads(request.param)
    yield request.param
    cpu.set_num_threads(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# --- element-wise ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 31, 64, 100, 896, 1029])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(size: int, with_residual: bool) -> None:
    fused = randn(5, 3 * size + 2) * 3
    x, weight = fused[:, 1 : 1 + size], randn(size)
    residual = randn(5, size, seed=1) if with_residual else None
    before, total = x.clone(), x if residual is None else x + residual
    normed, summed = torch.empty(5, size), torch.empty(5, size) if with_residual else None
    cpu.rms_norm(x, weight, 1e-6, normed, residual, summed)
    assert summed is None or torch.equal(summed, total)
    summed64 = total.double()
    want = summed64 * torch.rsqrt(summed64.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    assert ((normed - want).abs() <= (size / 32 + 8) * EPS * want.abs()).all()
    assert torch.equal(x, before)


def test_rms_norm_heads_in_place() -> None:
    qkv = randn(6, 3, 4, 40)
    q, untouched = qkv[:, 1], qkv.clone()
    weight, want = randn(40), qkv[:, 1].double()
    want = want * torch.rsqrt(want.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    cpu.rms_norm(q, weight, 1e-5, q)
    assert torch.allclose(q.double(), want, rtol=10 * EPS, atol=0)
    untouched[:, 1] = q
    assert torch.equal(qkv, untouched)


@pytest.mark.parametrize(("size", "r"), [(64, 32), (128, 64), (10, 5), (40, 12), (6, 1), (98, 49)])
def test_rope(size: int, r: int) -> None:
    qkv, angle = randn(9, 8, size), randn(9, r, seed=3) * 100
    q, k, cos, sin = qkv[:, :5], qkv[:, 5:7], angle.cos(), angle.sin()
    before = qkv.double()
    c, s = cos.double()[:, None], sin.double()[:, None]
    a, b = before[..., :r], before[..., r : 2 * r]
    want = torch.cat((a * c - b * s, b * c + a * s, before[..., 2 * r :]), -1)
    want[:, 7] = before[:, 7]
    cpu.rope(q, k, cos, sin)
    bound = torch.zeros_like(want)
    bound[..., :r] = bound[..., r : 2 * r] = 2 * EPS * (a.abs() + b.abs())
    assert ((qkv - want).abs() <= bound).all()


@pytest.mark.parametrize("size", [1, 9, 64, 4864, 20001])
def test_silu_mul(size: int) -> None:
    gate_up = randn(3, 2 * size) * torch.tensor([1.0, 30.0, 60.0])[:, None]
    gate, up = gate_up.double().chunk(2, -1)
    out = torch.empty(3, size)
    cpu.silu_mul(gate_up, out)
    want = gate / (1 + torch.exp(-gate)) * up
    assert ((out - want).abs() <= 5 * 2 * EPS * want.abs() + 1e-34 * up.abs()).all()


def test_silu_mul_extremes() -> None:
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 500.0, -500.0, 3e38, -3e38, math.nan, -87.0, 87.0])
    out = torch.empty(1, len(gate))
    cpu.silu_mul(torch.cat((gate, torch.ones_like(gate)))[None], out)
    want = torch.nn.functional.silu(gate.double()).float()
    assert torch.allclose(out[0], want, rtol=5e-7, atol=1e-34, equal_nan=True)


# --- memory ------------------------------------------------------------------------------------------------------


def test_memory_of_large_results_serves_again_once_no_view_is_left() -> None:
    def result(count: int) -> torch.Tensor:
        return torch.frombuffer(native.Buffer(4 * count), dtype=torch.float32)

    first = result(1 << 20).fill_(1)
    view, at = first.view(1024, 1024)[3:], first.data_ptr()
    del first
    second = result(1 << 20).fill_(2)
    assert second.data_ptr() != at and (view == 1).all()
    del view
    third = result((1 << 20) - 5)
    assert third.data_ptr() == at and third.numel() == (1 << 20) - 5
    assert result(1 << 23).data_ptr() not in (at, second.data_ptr())  # too small for it
    with pytest.raises((MemoryError, TypeError)):
        cpu.Buffer(1 << 60)


# --- cache -------------------------------------------------------------------------------------------------------


class Cache:
    """Pages with rubbish in every unused place, and the step's arguments for sequences in scattered blocks."""

    def __init__(
        self, dtype: str, heads: int, size: int, block: int, kv_lens: list[int], q_lens: list[int], seed: int = 0
    ):
        rng = random.Random(seed)
        need = [-(-n // block) for n in kv_lens]
        ids = rng.sample(range(sum(need) + 3), sum(need))
        self.dtype, self.block, self.kv_lens, self.q_lens = dtype, block, kv_lens, q_lens
        self.tables = [[ids.pop() for _ in range(n)] for n in need]
        shape = (sum(need) + 3, heads, block, size)
        rubbish = 255 if dtype == "int8" else math.nan
        self.pages = [torch.full(shape, rubbish, dtype=KV_DTYPES[dtype]) for _ in "kv"]
        self.affine = [torch.full(shape[:3], math.nan) for _ in range(4 if dtype == "int8" else 0)]
        self.layer = cpu.KvLayer(*self.pages, *self.affine)

    def slots(self, b: int, start: int, stop: int) -> list[int]:
        return [self.tables[b][p // self.block] * self.block + p % self.block for p in range(start, stop)]

    def step(self) -> Any:
        pairs = enumerate(zip(self.q_lens, self.kv_lens, strict=True))
        slots = [s for b, (q, n) in pairs for s in self.slots(b, n - q, n)]
        return cpu.Step(self.q_lens, self.kv_lens, self.tables, slots, self.block)

    def fill(self, k: list[Tensor], v: list[Tensor]) -> None:
        """Store all keys of all sequences, as one prefill."""
        slots = [s for b, n in enumerate(self.kv_lens) for s in self.slots(b, 0, n)]
        cpu.store_kv(
            self.layer, torch.cat(k), torch.cat(v), cpu.Step(self.kv_lens, self.kv_lens, self.tables, slots, self.block)
        )

    def read(self, which: int, b: int) -> Tensor:
        """What sequence b's keys (0) or values (1) read as: float64 [n, Hkv, D]."""
        blocks = torch.tensor(self.tables[b])
        x = self.pages[which][blocks].double()
        if self.affine:
            scale, low = (t[blocks].double()[..., None] for t in self.affine[2 * which : 2 * which + 2])
            x = x * scale + low
        return x.transpose(1, 2).flatten(0, 1)[: self.kv_lens[b]]

    def step_of(self, which: int, b: int) -> float:
        """The largest step of sequence b's codes."""
        scale = self.affine[2 * which][torch.tensor(self.tables[b])]
        return float(scale.transpose(1, 2).flatten(0, 1)[: self.kv_lens[b]].amax())


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("size", [64, 20, 5, 33])
def test_store_kv(dtype: str, size: int) -> None:
    n = 21
    cache = Cache(dtype, 3, size, 4, [n], [n])
    qkv = randn(n, 7, size) * torch.logspace(-6, 4, n)[:, None, None]
    qkv[3, :] = 2.5  # constant vectors: scale 0
    k, v = qkv[:, 1:4], qkv[:, 4:7]
    cpu.store_kv(cache.layer, k, v, cache.step())
    for which, x in enumerate((k, v)):
        got = cache.read(which, 0)
        if dtype != "int8":
            assert torch.equal(got, x.to(KV_DTYPES[dtype]).double())
            continue
        scale, low = (t[torch.tensor(cache.tables[0])] for t in cache.affine[2 * which : 2 * which + 2])
        assert torch.equal(low.transpose(1, 2).flatten(0, 1)[:n], x.amin(-1))
        step = (x.amax(-1) - x.amin(-1)) / 255
        assert torch.equal(scale.transpose(1, 2).flatten(0, 1)[:n], step)
        assert ((got - x).abs() <= 0.5001 * step[..., None] + 4 * EPS * x.abs().amax(-1, keepdim=True)).all()
        assert torch.equal(got[3], x[3].double())
    used = torch.zeros(cache.pages[0].shape[0] * cache.block, dtype=torch.bool)
    used[cache.slots(0, 0, n)] = True
    for page in cache.pages:
        rest = page.transpose(1, 2).flatten(0, 1)[~used]
        assert (rest == 255 if dtype == "int8" else rest.isnan()).all()


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 11, 18])
def test_store_kv_keeps_what_is_not_finite_visible(dtype: str, bad: float, where: int) -> None:
    cache = Cache(dtype, 1, 19, 4, [1], [1])
    x = randn(1, 1, 19)
    x[0, 0, where] = bad
    cpu.store_kv(cache.layer, x, x, cache.step())
    got = cache.read(1, 0)[0, 0]
    assert not math.isfinite(got[where])
    assert got.isfinite().sum() == (0 if dtype == "int8" else 18)


# --- attention ---------------------------------------------------------------------------------------------------


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_len: int,
    scale: float,
    window: int,
    steps: list[float] | None = None,
    words: bool = False,
) -> tuple[Tensor, Tensor]:
    """float64 (out, bound on the error) of one sequence: q [n, Hq, D], k, v [kv_len, Hkv, D]."""
    n, heads, size = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    s = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    pos, key = torch.arange(kv_len - n, kv_len)[:, None], torch.arange(kv_len)
    hidden = (key > pos) | ((key <= pos - window) if window else False)
    out = torch.einsum("hqk,khd->qhd", s.masked_fill(hidden, -torch.inf).softmax(-1), v)
    # attention.h; |q| . |k| takes the place of max |s| because products may cancel.
    size_s = (torch.einsum("qhd,khd->hqk", q.abs().double(), k.abs()) * scale).masked_fill(hidden, 0).amax(-1).T
    largest = v.abs().amax()
    bound = (2 * (size + 2) * size_s + kv_len / 8 + 32) * EPS * largest
    if steps:  # of the keys and of the values, where bytes are multiplied
        score_error = scale * q.abs().amax(-1) / 65024 * 128 * size * steps[0]
        bound = bound + torch.expm1(2 * score_error) * largest + steps[1] / 16
    if words:
        one = q.abs().sum(-1, keepdim=True) * (k.abs().amax(-1) / 16382).T.unsqueeze(0)  # [n, Hq, keys]
        other = q.abs().amax(-1, keepdim=True) * (size / 262144) * k.abs().sum(-1).T.unsqueeze(0)
        score_error = 1.01 * scale * (one + other).amax(-1)
        bound = bound + (torch.expm1(2 * score_error) + 1 / 2046 + 64 / 65534) * largest
    return out, bound[..., None]


CASES = {
    # name: heads, kv heads, size, block, q_lens, kv_lens, window
    "decode": (14, 2, 64, 16, [1, 1, 1], [1, 64, 777], 0),
    "decode_mha": (3, 3, 128, 16, [1, 1], [65, 1000], 0),
    "decode_pairs": (8, 4, 80, 16, [1], [300], 0),
    "decode_odd_size": (5, 1, 36, 8, [1, 1], [130, 3], 0),
    "decode_wide_group": (16, 1, 128, 32, [1, 2], [300, 129], 0),
    "decode_window": (6, 2, 64, 16, [1, 1], [900, 20], 37),
    "several_rows": (14, 2, 64, 16, [3, 2, 1], [400, 66, 1], 0),
    "several_rows_window": (8, 4, 96, 16, [9, 5], [300, 5], 33),
    "prefill": (14, 2, 64, 16, [150], [150], 0),
    "prefill_mha": (2, 2, 48, 16, [130], [130], 0),
    "prefill_many_heads": (34, 1, 16, 16, [70], [70], 0),
    "prefill_tiny_size": (3, 1, 7, 5, [67], [67], 0),
    "prefill_window": (4, 2, 64, 16, [200], [200], 50),
    "chunk_and_decode": (7, 7, 64, 16, [1, 40, 3, 1, 9], [600, 641, 3, 5, 700], 0),
    "chunk_window": (12, 4, 32, 3, [33, 1, 2], [400, 401, 402], 70),
    "narrow_window": (6, 3, 24, 16, [90, 1], [190, 66], 1),
}


def check_attention(
    dtype: str, heads: int, kv_heads: int, size: int, block: int, q_lens: list[int], kv_lens: list[int], window: int
) -> None:
    """Random values of such a shape, against float64 within attention.h's bound; nothing else is written."""
    cache = Cache(dtype, kv_heads, size, block, kv_lens, q_lens)
    cache.fill(*([randn(n, kv_heads, size, seed=which + n) * 2 for n in kv_lens] for which in (0, 50)))
    rows = sum(q_lens)
    fused = randn(rows, heads + 2, size) * 2
    q, scale = fused[:, 1 : 1 + heads], size**-0.5
    wide = torch.full((rows, heads, size + 3), math.nan)
    out = wide[..., :size]
    cpu.attention(q, cache.layer, cache.step(), scale, window, out)
    start = 0
    for b, (n, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        part = slice(start, start + n)
        bytes_meet = dtype == "int8" and cpu.active_isa() == "avx512" and size % 64 == 0
        steps = [cache.step_of(which, b) for which in (0, 1)] if bytes_meet else None
        words_meet = dtype in ("float16", "bfloat16") and cpu.active_isa() in ("avx2", "avx512") and size % 32 == 0
        words = words_meet and cpu.activation_bits() == 8 and n * heads // kv_heads > 12
        want, bound = exact_attention(q[part], cache.read(0, b), cache.read(1, b), kv_len, scale, window, steps, words)
        error = (out[part] - want).abs()
        assert (error <= bound).all(), f"sequence {b}: {(error / bound).max():.3g} of the bound"
        start += n
    assert wide[..., size:].isnan().all()


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_attention(case: str, dtype: str, threads: int) -> None:
    check_attention(dtype, *CASES[case])


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_attention_of_random_shapes(dtype: str, threads: int) -> None:
    """Any group of heads, head sizes no vector divides, pages of any length, windows, steps of any mix."""
    rng = random.Random(f"{dtype} {threads}")
    for _ in range(6):
        kv_heads, block = rng.randint(1, 3), rng.randint(1, 40)
        size = rng.choice((64, 128, 32 * rng.randint(1, 8), rng.randint(1, 160)))
        q_lens = [rng.choice((1, 2, rng.randint(1, 40))) for _ in range(rng.randint(1, 3))]
        kv_lens = [n + rng.choice((0, rng.randint(0, 70), rng.randint(0, 600))) for n in q_lens]
        window = rng.choice((0, 0, rng.randint(1, 90)))
        check_attention(dtype, kv_heads * rng.randint(1, 17), kv_heads, size, block, q_lens, kv_lens, window)


def test_attention_with_huge_scores() -> None:
    """The maximum is subtracted before any exponential: scores of thousands neither overflow nor vanish."""
    cache = Cache("float32", 1, 16, 16, [100], [100])
    k, v = randn(100, 1, 16) * 300, randn(100, 1, 16, seed=9)
    cache.fill([k], [v])
    q = randn(100, 2, 16, seed=5) * 30
    out = torch.empty_like(q)
    cpu.attention(q, cache.layer, cache.step(), 1.0, 0, out)
    want, _ = exact_attention(q, k.double(), v.double(), 100, 1.0, 0)
    decided = (out - want).abs().amax(-1) < 0.02  # float32 scores of 1e4 are 1e-3 apart: only their shape is checked
    assert decided.all()


def test_rows_of_a_batch_equal_rows_alone() -> None:
    kv_lens, q_lens = [300, 40, 77], [7, 40, 1]
    cache = Cache("float16", 2, 64, 16, kv_lens, q_lens)
    cache.fill(*([randn(n, 2, 64, seed=which) for n in kv_lens] for which in (0, 50)))
    q = randn(sum(q_lens), 6, 64)
    together = torch.empty_like(q)
    cpu.attention(q, cache.layer, cache.step(), 0.125, 0, together)
    start = 0
    for b, (n, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        step = cpu.Step([n], [kv_len], [cache.tables[b]], cache.slots(b, kv_len - n, kv_len), 16)
        alone = torch.empty(n, 6, 64)
        cpu.attention(q[start : start + n], cache.layer, step, 0.125, 0, alone)
        assert torch.allclose(together[start : start + n], alone, rtol=1e-5, atol=1e-6)
        start += n


# --- sampling ----------------------------------------------------------------------------------------------------


def random_row(rng: random.Random, vocab: int) -> SampleRow:
    """A SampleRow with a random choice of everything it has."""

    def some(p: float, value: Any, other: Any) -> Any:
        return value if rng.random() < p else other

    def ids(n: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(n)]

    return SampleRow(
        temperature=some(0.85, rng.choice([0.05, 0.3, 0.8, 1.0, 1.7, 20.0]), 0.0),
        top_k=some(0.5, rng.choice([1, 2, 5, 40, vocab - 1, 2 * vocab]), 0),
        top_p=some(0.5, rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999]), 1.0),
        min_p=some(0.3, rng.choice([1e-6, 0.01, 0.3, 1.0]), 0.0),
        repetition_penalty=some(0.3, rng.choice([0.7, 1.1, 2.0]), 1.0),
        presence_penalty=some(0.3, rng.choice([-0.5, 0.5, 1.5]), 0.0),
        frequency_penalty=some(0.3, rng.choice([-0.25, 0.25]), 0.0),
        logit_bias={i: rng.choice([-100.0, -1.5, 2.25]) for i in ids(some(0.3, 3, 0))},
        banned=frozenset(ids(some(0.3, 3, 0))),
        uniform=rng.choice([rng.random(), rng.random(), 0.0, 1 - 2.0**-30]),
        prompt_ids=ids(rng.randrange(6)),
        output_ids=ids(rng.randrange(6)) * 2,
    )


@pytest.mark.parametrize("vocab", [6, 63, 1000, 20011])
def test_sample_agrees_with_its_definition(vocab: int) -> None:
    rng = random.Random(vocab)
    for trial in range(120 if vocab < 10000 else 25):
        logits = randn(3, vocab, seed=trial) * rng.choice([0.1, 1.0, 4.0])
        if trial % 4 == 0:
            logits = logits.round()  # many ties
        if trial % 5 == 0:
            logits[:, : vocab // 2] = -math.inf
        rows = [random_row(rng, vocab) for _ in range(3)]
        want: list[int | None] = []
        for x, row in zip(logits.double(), rows, strict=True):
            try:
                want.append(sample_row(x, row))
            except BackendError:  # everything left was banned
                want.append(None)
        if None in want:
            continue
        assert cpu.sample(logits.clone(), rows) == want, rows


def test_the_last_uniform_chooses_a_possible_token() -> None:
    logits = randn(20, 500) * 100
    logits[:, 250:] = -math.inf
    rows = [SampleRow(temperature=0.5, uniform=1 - 2.0**-53, top_p=p) for p in (1.0, 0.99) for _ in range(10)]
    chosen = cpu.sample(logits.clone(), rows)
    likely = (logits.double() / 0.5).softmax(-1)[torch.arange(20), chosen]
    assert (likely > 0).all()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_sample_frequencies(top_p: float) -> None:
    """The inverse of the distribution at evenly spread points gives each token its probability."""
    p = torch.tensor([0.1, 0.05, 0.4, 0.25, 0.2], dtype=torch.float64)
    n = 1000
    rows = [SampleRow(temperature=1.0, top_p=top_p, uniform=(i + 0.5) / n) for i in range(n)]
    got = torch.tensor(cpu.sample(p.log().float().repeat(n, 1), rows)).bincount(minlength=5) / n
    want = p if top_p == 1.0 else torch.tensor([0, 0, 0.4, 0.25, 0.2], dtype=torch.float64) / 0.85
    assert ((got - want).abs() <= 1.5 / n).all()


def test_argmax_takes_the_lowest_of_ties_and_honours_bans() -> None:
    logits = torch.zeros(4, 200)
    logits[:, [77, 150, 199]] = 5.0
    rows = [
        SampleRow(),
        SampleRow(banned=frozenset([77])),
        SampleRow(logit_bias={199: 1.0}),
        SampleRow(repetition_penalty=2.0, prompt_ids=[77, 77], output_ids=[150]),
    ]
    assert cpu.sample(logits, rows) == [77, 150, 199, 199]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 64, 129])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_an_error(bad: float, where: int, temperature: float) -> None:
    for row in (SampleRow(temperature), SampleRow(temperature, logit_bias={where: 1.0})):
        logits = randn(2, 130)
        logits[1, where] = bad
        with pytest.raises(BackendError, match="NaN or infinity"):
            cpu.sample(logits, [row, row])


def test_all_banned_is_an_error() -> None:
    with pytest.raises(BackendError, match="banned"):
        cpu.sample(torch.zeros(1, 3), [SampleRow(banned=frozenset([0, 1, 2]))])


# --- arguments ---------------------------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    cache = Cache("float32", 2, 8, 4, [6], [2])
    step, q, out = cache.step(), torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)
    small = cpu.KvLayer(*(torch.zeros(1, 2, 4, 8) for _ in "kv"))
    bad_calls = [
        lambda: cpu.attention(q[:1], cache.layer, step, 1.0, 0, out),
        lambda: cpu.attention(q[:, :3], cache.layer, step, 1.0, 0, out[:, :3]),
        lambda: cpu.attention(q.double(), cache.layer, step, 1.0, 0, out),
        lambda: cpu.attention(q, cache.layer, step, 1.0, -1, out),
        lambda: cpu.attention(q, small, cpu.Step([2], [6], [[0, 1]], [4, 5], 4), 1.0, 0, out),
        lambda: cpu.store_kv(cache.layer, q, q, step),
        lambda: cpu.Step([2], [6], [[0]], [4, 5], 4),
        lambda: cpu.Step([2], [6], [[0, -1]], [4, 5], 4),
        lambda: cpu.Step([2], [6], [[0, 1]], [0, 1], 4),
        lambda: cpu.Step([2], [6], [[0, 1]], [4], 4),
        lambda: cpu.Step([3], [2], [[0]], [0, 1, 2], 4),
        lambda: cpu.KvLayer(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 9)),
        lambda: cpu.KvLayer(*(torch.zeros(3, 4, 2, 8).transpose(1, 2) for _ in "kv")),
        lambda: cpu.KvLayer(*(torch.zeros(1, 2, 4, 8).expand(3, 2, 4, 8) for _ in "kv")),
        lambda: cpu.KvLayer(torch.zeros(3, 2, 4, 8), torch.zeros(3, 2, 2, 4, 8)[:, 1]),
        lambda: cpu.KvLayer(torch.zeros(1, 2, 4, 8, dtype=torch.uint8), torch.zeros(1, 2, 4, 8, dtype=torch.uint8)),
        lambda: cpu.rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-6, torch.zeros(2, 8)),
        lambda: cpu.rms_norm(torch.zeros(2, 8), torch.zeros(8), 1e-6, torch.zeros(2, 8), torch.zeros(2, 8)),
        lambda: cpu.rope(q, q, torch.zeros(2, 5), torch.zeros(2, 5)),
        lambda: cpu.silu_mul(torch.zeros(2, 7), torch.zeros(2, 3)),
        lambda: cpu.silu_mul(torch.zeros(8, 2).T, torch.zeros(2, 4)),
        lambda: cpu.silu_mul(torch.zeros(2, 6), torch.zeros(2, 3).half()),
        lambda: native.silu_mul([[0.0, 0.0]], np.zeros((1, 1), np.float32)),
        lambda: native.silu_mul(torch.zeros(1, 2), np.zeros((1, 1), np.float32)),
        lambda: native.silu_mul(np.zeros((1, 2), ">f4"), np.zeros((1, 1), np.float32)),
        lambda: native.silu_mul(np.zeros(9, np.uint8)[1:].view(np.float32)[None], np.zeros((1, 1), np.float32)),
        lambda: native.silu_mul(np.zeros(9, np.uint8)[:8].view("V4,V4")["f0"][None], np.zeros((1, 1), np.float32)),
        lambda: cpu.sample(torch.zeros(2, 7), [SampleRow()]),
        lambda: cpu.sample(torch.zeros(1, 7), [SampleRow(min_p=1.5, temperature=1.0)]),
        lambda: cpu.sample(torch.zeros(1, 7), [SampleRow(uniform=1.0)]),
        lambda: cpu.sample(torch.zeros(1, 7), [SampleRow(temperature=math.nan)]),
        lambda: cpu.sample(torch.zeros(1, 7), [SampleRow(logit_bias={7: 1.0})]),
        lambda: cpu.sample(torch.zeros(1, 7), [SampleRow(repetition_penalty=1.1, prompt_ids=[-1])]),
    ]
    for i, call in enumerate(bad_calls):
        with pytest.raises(ValueError):
            pytest.fail(f"call {i} was accepted: {call()}")
