"""Sampling on the emulator: the reference's ids, and the sums they are found by against float64."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from emulated_kernels import WARPS, bits, in_every_order, open_kernels
from torch import Tensor

from qwen_rt.backends.adjust import changes
from qwen_rt.backends.base import SampleRow
from qwen_rt.backends.gpu import sampling
from qwen_rt.backends.gpu.kernels import Kernels
from qwen_rt.backends.reference import penalize, sample_row
from qwen_rt.errors import BackendError

pytest.importorskip("qwen_rt._gpu", reason="the GPU launcher is not built (make build)")

pytestmark = pytest.mark.parametrize("warp", WARPS)


def normal(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed + vocab))


def chosen(warp: int, logits: Tensor, rows: list[SampleRow]) -> list[int]:
    """The ids, the same in every thread order."""
    return in_every_order(warp, lambda k: sampling.launch(k, logits.clone(), rows))[0].tolist()


def wanted(logits: Tensor, rows: list[SampleRow]) -> list[int]:
    return [sample_row(x, row) for x, row in zip(logits.double(), rows, strict=True)]


def random_row(g: random.Random, vocab: int) -> SampleRow:
    """Any mixture of settings."""
    ids = [g.randrange(vocab) for _ in range(30)]
    return SampleRow(
        temperature=g.choice((0.0, 0.1, 0.7, 1.0, 3.0)),
        top_k=g.choice((0, 0, 1, 5, 50, vocab, vocab + 7)),
        top_p=g.choice((1.0, 1.0, 0.8, 0.3, 0.01, 0.999, 0.0)),
        min_p=g.choice((0.0, 0.0, 0.05, 0.5, 1.0)),
        repetition_penalty=g.choice((1.0, 1.0, 1.1, 0.8)),
        presence_penalty=g.choice((0.0, 0.0, 0.5, -0.7)),
        frequency_penalty=g.choice((0.0, 0.0, 0.3, -0.2)),
        logit_bias={i: g.uniform(-8, 8) for i in ids[:3]} if g.random() < 0.3 else {},
        banned=frozenset(ids[3:6]) if vocab > 8 and g.random() < 0.3 else frozenset(),
        uniform=g.random(),
        prompt_ids=ids[6:18],
        output_ids=ids[18:],
    )


@pytest.mark.parametrize(("vocab", "count"), [(1, 8), (2, 16), (63, 24), (1000, 32), (5003, 16), (32003, 6)])
@pytest.mark.parametrize("kind", ["normal", "ties", "extreme", "bfloat16"])
def test_like_the_reference(warp: int, vocab: int, count: int, kind: str) -> None:
    g = random.Random(f"{vocab} {kind}")
    rows = [random_row(g, vocab) for _ in range(count)]
    logits = normal(count, vocab) * 3
    if kind == "ties":
        logits = logits.round()
    elif kind == "extreme":
        logits *= 1e4
        logits[:, 1::3] = -torch.inf
    elif kind == "bfloat16":
        logits = (logits * 4).bfloat16().float()
    assert chosen(warp, logits, rows) == wanted(logits, rows)


def test_a_whole_vocabulary(warp: int) -> None:
    """The size of Qwen's: many chunks, and buckets of more tokens than are ordered at once."""
    vocab = 151936
    logits = torch.stack(
        (normal(1, vocab)[0] * 3, normal(1, vocab, 1)[0].bfloat16().float(), torch.full((vocab,), 0.5))
    )
    rows = [
        SampleRow(1.0, top_p=0.8, uniform=0.61),
        SampleRow(30.0, top_k=100000, min_p=0.9, uniform=0.37),
        SampleRow(1.0, uniform=0.123456789),
    ]
    ids = sampling.run(open_kernels(warp, "forward"), logits.clone(), rows)
    assert ids == wanted(logits, rows)
    assert ids[2] == int(0.123456789 * vocab)


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.4999999, 0.5, 0.75, 1 - 2**-53])
def test_borders_of_equal_tokens(warp: int, uniform: float) -> None:
    """Exact quarters: a `uniform` on a border belongs to the next token, as in the reference."""
    logits = torch.full((1, 70), -torch.inf)
    logits[0, [5, 9, 40, 69]] = 2.0
    rows = [SampleRow(1.0, uniform=uniform)]
    assert chosen(warp, logits, rows) == wanted(logits, rows) == [[5, 9, 40, 69][int(4 * uniform)]]


def test_signed_zeros_are_ties(warp: int) -> None:
    logits = torch.tensor([[-1.0, 0.0, -0.0, 0.0, -0.0, -2.0], [-1.0, -0.0, 0.0, -1.0, 0.0, -1.0]])
    for top_k in (1, 2, 3):
        for uniform in (0.0, 0.4, 0.9):
            rows = 2 * [SampleRow(0.01, top_k=top_k, uniform=uniform)]
            assert chosen(warp, logits, rows) == wanted(logits, rows)
    assert chosen(warp, logits, 2 * [SampleRow()]) == [1, 1]


def test_top_k_of_ties_keeps_the_lowest_ids(warp: int) -> None:
    """3000 equal tokens do not fit the list: their ids divide the bucket."""
    logits = torch.zeros(1, 9000)
    logits[0, 1000:4000] = 1.0
    for k, uniform in ((1, 0.99), (2, 0.99), (2500, 0.9), (2999, 1 - 2**-53), (3001, 1 - 2**-53)):
        rows = [SampleRow(0.5, top_k=k, uniform=uniform)]
        assert chosen(warp, logits, rows) == wanted(logits, rows)


def test_adjusted_logits_are_rounded_once(warp: int) -> None:
    """sample_adjust leaves float32(what the reference computes in float64), and every other logit alone."""
    g = random.Random(3)
    vocab, rows = 300, [random_row(random.Random(i), 300) for i in range(12)]
    rows = [replace(r, repetition_penalty=1 + 0.3 * g.random(), presence_penalty=g.random()) for r in rows]
    rows[5] = SampleRow(0.7)
    rows[6] = SampleRow(0.7, output_ids=(1, 1, 2), frequency_penalty=0.3)
    rows[7] = SampleRow(0.7, repetition_penalty=1.2, prompt_ids=(4, 4), output_ids=())
    logits = normal(12, vocab) * 5

    def compute(kernels: Kernels) -> Tensor:
        mine = logits.clone()
        sampling.launch(kernels, mine, rows)
        return mine

    (got,) = in_every_order(warp, compute)
    want = torch.stack([penalize(x, row) for x, row in zip(logits.double(), rows, strict=True)]).float()
    assert torch.equal(bits(got), bits(want))
    assert not torch.equal(got, logits)


@pytest.mark.parametrize("vocab", [37, 5000, 32003])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 5.0])
def test_histogram_sums(warp: int, vocab: int, temperature: float) -> None:
    """Sums of integer weights a bucket: each weight within 2^-F / 2 + 2^-46 of exact, beside the heaviest's 1.

    Buckets are cut by a float32 exponent, so sums are compared from the first up to each border, with the tokens within
    float32 rounding of that border taken as doubt.
    """
    logits = normal(3, vocab) * torch.tensor([[1.0], [4.0], [20.0]])
    rows = 3 * [SampleRow(temperature, uniform=0.5)]

    def compute(kernels: Kernels) -> list[Tensor]:
        chunks = -(-vocab // 1000)
        tops = torch.empty(3, chunks, dtype=torch.int64)
        masses, counts = torch.full((3, 2048), -1), torch.full((3, 2048), -1, dtype=torch.int32)
        settings = torch.from_numpy(sampling.settings_of(rows))
        kernels("sample", "sample_top", "PPPPlii")((chunks, 3, 1), 64, logits, tops, masses, counts, vocab, vocab, 1000)
        kernels("sample", "sample_histogram", "PPPPPlii")(
            (chunks, 3, 1), 128, logits, tops, masses, counts, settings, vocab, vocab, 1000
        )
        return [masses, counts]

    masses, counts = in_every_order(warp, compute)
    fraction = min(48, 63 - (vocab - 1).bit_length())
    for x, mass, count in zip(logits.double(), masses, counts, strict=True):
        y = (x.max() - x) * (math.log2(math.e) / temperature)
        exact = torch.exp2(-y)
        assert int(count.sum()) == int((y < 64).sum())
        sums = mass.cumsum(0).double() / 2.0**fraction
        for border in (1, 10, 100, 1000, 2048):
            near = (y - border / 32).abs() <= y * 2.0**-22
            lower, upper = float(exact[(y < border / 32) & ~near].sum()), float(exact[(y < border / 32) | near].sum())
            slack = vocab * (2.0**-fraction / 2 + 2.0**-46) + 1e-15 * vocab
            assert lower - slack <= float(sums[border - 1]) <= upper + slack


def test_strided_rows(warp: int) -> None:
    wide = normal(4, 700) * 3
    logits = wide[:, 100:600]
    rows = [SampleRow(0.9, top_k=20, uniform=u, banned=frozenset((3, 4))) for u in (0.1, 0.3, 0.6, 0.9)]
    want, before = wanted(logits, rows), wide.clone()
    assert sampling.run(open_kernels(warp, "random"), logits, rows) == want
    logits[:, 3:5] = before[:, 103:105]
    assert torch.equal(wide, before)  # only the bans were written


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 4095, 4096, 5000])
def test_unusable_logits(warp: int, bad: float, at: int) -> None:
    logits = normal(3, 5001)
    logits[1, at] = bad
    for temperature in (0.0, 1.0):
        rows = [SampleRow(temperature, uniform=0.4) for _ in range(3)]
        ids = chosen(warp, logits, rows)
        assert ids[1] == -1
        assert ids[::2] == wanted(logits[::2], rows[::2])
        with pytest.raises(BackendError, match="NaN or infinity"):
            sampling.run(open_kernels(warp, "forward"), logits.clone(), rows)


def test_nothing_left(warp: int) -> None:
    logits = normal(1, 5)
    assert chosen(warp, logits, [SampleRow(banned=frozenset(range(5)))]) == [-1]
    assert chosen(warp, logits, [SampleRow(1.0, banned=frozenset((0, 1, 2, 4)), uniform=0.99)]) == [3]


def test_hot_and_cold(warp: int) -> None:
    """Temperatures at which every weight is 1, and all but one is 0."""
    logits = normal(2, 3000)
    for temperature in (1e-45, 1e-20, 1e-3, 1e6, 1e30):
        for uniform in (0.0, 0.4999, 1 - 2**-53):
            rows = 2 * [SampleRow(temperature, uniform=uniform)]
            assert chosen(warp, logits, rows) == wanted(logits, rows)


def test_refusals(warp: int) -> None:
    kernels = open_kernels(warp, "forward")
    with pytest.raises(ValueError, match="0\\.\\.4"):
        sampling.run(kernels, normal(1, 5), [SampleRow(banned=frozenset((5,)))])
    with pytest.raises(ValueError, match="0\\.\\.4"):
        sampling.run(kernels, normal(1, 5), [SampleRow(repetition_penalty=1.1, prompt_ids=(-1,))])
    with pytest.raises(ValueError):
        sampling.run(kernels, normal(2, 5), [SampleRow()])
    with pytest.raises(ValueError):
        sampling.run(kernels, normal(1, 5).double(), [SampleRow()])
    assert sampling.run(kernels, normal(0, 5), []) == []


def test_changes_are_listed_once(warp: int) -> None:
    row = SampleRow(
        0.5, repetition_penalty=1.1, frequency_penalty=0.5, logit_bias={7: -1.5, 2: 3.0}, banned=frozenset((9, 7)),
        prompt_ids=(1, 2, 2), output_ids=(2, 5, 5, 5),
    )  # fmt: skip
    pairs = changes([SampleRow(0.5, prompt_ids=(1, 2), output_ids=(3,)), row], 10)
    assert pairs.rows.tolist() == 5 * [1]
    assert pairs.ids.tolist() == [1, 2, 5, 7, 9]
    seen, banned, count = pairs.flags & 1, pairs.flags >> 1 & 1, pairs.flags >> 2
    assert seen.tolist() == [1, 1, 1, 0, 0]
    assert banned.tolist() == [0, 0, 0, 1, 1]
    assert count.tolist() == [0, 1, 3, 0, 0]
    assert pairs.bias.tolist() == [0.0, 3.0, 0.0, -1.5, 0.0]
    assert pairs.ids.dtype == np.int32
