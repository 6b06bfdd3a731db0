"""What it means for a backend to be right: every operation of the waist against the float64 reference.

`run(backend)` yields one Result a case; `qwen-rt doctor` prints them and tests/contract asserts on them. Cases are
small, seeded and drawn on the host; inputs are rounded to the backend's types first, so that only its own arithmetic
is measured. The oracle and the bounds are torch's; the backend gets host arrays as tensors of its own and answers in
these, whatever they are. An error is compared with a bound of its own element, derived from number formats alone:

    u    unit roundoff of the compute dtype: 2^-24 float32, 2^-11 float16, 2^-8 bfloat16; u32 = 2^-24
    sum  n products added in float32 in any order: gamma(n) * sum |a_k b_k|, gamma(n) = n u32 / (1 - n u32)
         (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1)
    out  rounding a result to the compute dtype: u |y|; below the smallest normal number an absolute term instead

A kernel may therefore sum in any order, but has to keep sums in float32 (or better) whatever the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwen_rt.backends.base import Backend, BatchMeta, KVDtype, KVSpec, SampleRow
from qwen_rt.backends.base import Tensor as OwnTensor  # the backend's, where Tensor is torch's
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.backends.torch_backend import from_host, to_host
from qwen_rt.dtypes import DType, host_dtype, wider
from qwen_rt.errors import CheckpointError, Declined, QwenRTError
from qwen_rt.quant.formats import WEIGHT_BITS, LinearFormat, LinearRows, RawLinear, dense_format

U32 = 2.0**-24
UNIT_ROUNDOFF: dict[DType, float] = {"float64": 2.0**-53, "float32": U32, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Result:
    """One case: the worst element's error and its bound (counts of wrong answers for exact operations)."""

    op: str
    case: str
    error: float
    bound: float
    declined: str = ""  # the kernel's reason when it declined before running

    @property
    def ok(self) -> bool:
        """Within bound (NaN is not), or declined."""
        return bool(self.declined) or self.error <= self.bound


Case = tuple[str, Callable[[], tuple[float, float]]]  # its name, and what computes (error, bound)


def run(backend: Backend, ops: Sequence[str] | None = None) -> Iterator[Result]:
    """Every case of `ops` (default: all of OPS) on an open backend."""
    for op in ops or OPS:
        with torch.inference_mode(), backend.computing():
            for name, check in OPS[op](Subject(backend)):
                try:
                    yield Result(op, name, *check())
                except Declined as e:
                    yield Result(op, name, 0.0, 0.0, str(e) or "no reason given")
                except Exception as e:  # one crash must not hide the other results
                    yield Result(op, f"{name}: {type(e).__name__}: {e}", math.inf, 0.0)


class Subject:
    """The backend under test beside its float64 oracle, and how tensors go from one to the other."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.oracle = ReferenceBackend(compute_dtype="float64")
        self.dtype = backend.compute_dtype
        self.unit = UNIT_ROUNDOFF[self.dtype]
        finfo = torch.finfo(getattr(torch, self.dtype))
        self.tiny, self.max = finfo.tiny, finfo.max  # results below tiny may lose all relative accuracy

    def given(self, x: Tensor, dtype: DType | None = None) -> tuple[OwnTensor, Tensor]:
        """x rounded to the compute dtype: (as the backend gets it, as the oracle gets it: the same in float64)."""
        rounded = x.to(getattr(torch, dtype or self.dtype))
        return self.tensor(rounded), rounded.double()

    def tensor(self, x: Tensor) -> OwnTensor:
        """A tensor on the host as the backend gets it."""
        return self.backend.tensor(to_host(x))

    def differing(self, *pairs: tuple[OwnTensor, OwnTensor]) -> tuple[float, float]:
        """(how many elements of the backend's tensors differ, pair by pair, 0: none may)."""
        array = self.backend.array
        return float(sum(int((array(a) != array(b)).sum()) for a, b in pairs)), 0.0

    def held(self, raw: RawLinear) -> RawLinear:
        """`raw` as the loader hands it to the backend."""
        return raw.held(self.backend.caps.weight_bits)

    def worst(self, got: OwnTensor, want: Tensor, bound: Tensor, dtype: DType | None = None) -> tuple[float, float]:
        """(error, bound) of the element nearest to, or furthest beyond, its bound; got is of the compute dtype."""
        host = self.backend.array(got)
        if host.shape != tuple(want.shape) or host.dtype.name != (dtype or self.dtype):
            raise AssertionError(f"{host.dtype.name} {host.shape}, expected {dtype or self.dtype} {tuple(want.shape)}")
        error = (from_host(host).double() - want).abs()
        error = torch.where(error.isnan(), torch.inf, error).flatten()
        limit = bound.expand(want.shape).flatten().double()
        at = int((error / limit.clamp_min(1e-300)).argmax())
        return float(error[at]), float(limit[at])

    def rounded(self, want: Tensor) -> Tensor:
        """The `out` term: rounding `want` to the compute dtype."""
        return self.unit * want.abs() + self.tiny


def _worse(*results: tuple[float, float]) -> tuple[float, float]:
    """The (error, bound) nearest to, or furthest beyond, its bound."""
    return max(results, key=lambda p: p[0] / max(p[1], 1e-300))


def gamma(n: int) -> float:
    """Relative error of n rounded additions of float32 products, worst case."""
    return n * U32 / (1 - n * U32)


def _rng(*key: object) -> torch.Generator:
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(repr(key)[:40])) % 2**31)


def _randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


# -- linear and embedding ----------------------------------------------------------------------------------------
def make_linear(fmt: LinearFormat, n: int, k: int, g: torch.Generator, *, bias: bool, perm: bool) -> RawLinear:
    """A random RawLinear that uses the whole range of its codes, zeros and mins."""
    part = LinearRows()
    if fmt.grouped:
        top, groups = 2**fmt.bits, k // fmt.group_size
        part.codes = to_host(torch.randint(0, top, (n, k), generator=g, dtype=torch.uint8))
        part.scales = to_host((torch.rand(n, groups, generator=g) * 0.02 + 1e-3).half())
        if fmt.has_zeros:
            zeros = torch.randint(0, min(top + 1, 256), (n, groups), generator=g)
            part.zeros = to_host(zeros.to(torch.uint8))  # 4 bits: 0..16, since v1 files add one to a stored 15
        if fmt.has_mins:
            part.mins = to_host((torch.randn(n, groups, generator=g) * 0.1).half())
    else:
        part.values = to_host(torch.randn(n, k, generator=g).to(getattr(torch, str(fmt.dtype))))

    def rows(start: int, stop: int) -> LinearRows:
        return LinearRows(**{key: None if t is None else t[start:stop] for key, t in vars(part).items()})

    order = to_host(torch.randperm(k, generator=g).int()) if perm else None
    added = to_host(torch.randn(n, generator=g)) if bias else None
    return RawLinear(f"random {fmt}", (n, k), fmt, rows, added, order)


def _terms(raw: RawLinear) -> Tensor:
    """Per weight, in original column order: the magnitudes a kernel may add up to make it, float64 [N, K]."""
    part, fmt = raw.rows(0, raw.shape[0]), raw.format
    if not fmt.grouped:
        assert part.values is not None
        return from_host(part.values).double().abs()
    assert part.codes is not None and part.scales is not None
    codes = from_host(part.codes).double().view(raw.shape[0], -1, fmt.group_size)
    offset = torch.full((1, 1, 1), 0.0 if fmt.has_mins else 2.0 ** (fmt.bits - 1), dtype=torch.float64)
    offset = offset if part.zeros is None else from_host(part.zeros).double().unsqueeze(-1)
    terms = from_host(part.scales).double().unsqueeze(-1) * (codes + offset)
    terms = terms if part.mins is None else terms + from_host(part.mins).double().abs().unsqueeze(-1)
    out = torch.empty(raw.shape, dtype=torch.float64)
    out[:, _order(raw)] = terms.flatten(1)
    return out


def _order(raw: RawLinear) -> slice | Tensor:
    """An index of columns: where each stored one belongs."""
    return slice(None) if raw.perm is None else from_host(raw.perm).long()


def linear_bound(s: Subject, x: Tensor, raw: RawLinear, want: Tensor) -> Tensor:
    """Bound of x W^T + b, elementwise [T, N].

    `sum` over K products, the terms of a weight (scale, zero, minimum: 4 roundings) and the bias; half compute dtypes
    may round a weight as well (2u). Grouped formats may hold x as integers of L steps per row and group of columns: an
    error of max |x_g| / 2L for each element of the group, L = 32512, or 127 where Caps.activation_bits says so, over
    2^(1/4): steps may be rounded up to powers of that. Caps.integer_scales: two groups of at most 32 columns may share
    a step, and scales be multiples of a step that the largest of their row has 32767 / parts of, a part being 64, 32 or
    16 columns of 4, 5 or 6 bits: half a step off, times codes less 2^(bits - 1).
    """
    terms = _terms(raw)
    total = x.abs() @ terms.T + (0.0 if raw.bias is None else from_host(raw.bias).double().abs())
    bound = (gamma(raw.shape[1] + 5) + (2 * s.unit if s.unit > U32 else 0.0)) * total + s.rounded(want)
    if raw.format.grouped:
        caps = s.backend.caps
        steps = (127 if caps.activation_bits == 8 and x.shape[0] > caps.exact_rows else 32512) / 2**0.25
        order = _order(raw)
        span, bits = raw.format.group_size, raw.format.bits
        if steps < 127 and caps.integer_scales and bits <= 6:
            span *= 2 if span <= 32 and raw.shape[1] % (2 * span) == 0 else 1
            parts = -(-span // (1024 >> bits))
            scales = raw.rows(0, raw.shape[0]).scales
            assert scales is not None
            step = from_host(scales).double().abs().amax(1) * parts / 32767
            bound = bound + x.abs().sum(1, keepdim=True) * (step * 2 ** (bits - 2)) * (1 + 2**-6)
        peaks = x[:, order].unflatten(1, (-1, span)).abs().amax(-1) / (2 * steps)
        bound = bound + peaks @ terms[:, order].unflatten(1, (-1, span)).sum(-1).T * (1 + 2**-10)
    return bound + raw.shape[1] * torch.finfo(torch.float32).tiny


def _formats(s: Subject) -> Iterator[LinearFormat]:
    for dtype in s.backend.caps.dense_dtypes:
        yield dense_format(dtype)
    offered = s.backend.caps.weight_bits
    for bits in WEIGHT_BITS:
        # Of a width that the backend leaves to the loader, enough cases to see that it may: wider codes, same weights.
        groups = (16, 32, 64, 128) if bits in offered else (32,) if any(b > bits for b in offered) else ()
        for group in groups:
            for zeros, mins in ((False, False), (True, False), (False, True)):
                yield LinearFormat(bits, group, zeros, mins)


def _linear_cases(s: Subject) -> Iterator[Case]:
    for i, fmt in enumerate(_formats(s)):
        unit = fmt.group_size or 1
        shapes: list[tuple[int, int]] = [
            (1, unit),
            (37, 5 * unit if fmt.grouped else 515),
            (130, 2 * unit if fmt.grouped else 63),
            (67, 896),
        ]
        for j, (n, k) in enumerate(shapes):
            bias, perm = (i + j) % 2 == 0, fmt.grouped and (i + j) % 3 == 0
            g = _rng("linear", str(fmt), n, k)
            raw = make_linear(fmt, n, k, g, bias=bias, perm=perm)
            pack = cache(partial(_pack_both, s, raw))
            label = f"{fmt} N={n} K={k}{' bias' if bias else ''}{' act-order' if perm else ''}"
            for rows in (1, 2, 3, 7, 8, 33, 130):
                yield f"{label} T={rows}", _linear_case(s, pack, raw, _randn(g, rows, k))
            if n == 130:
                for size in ("huge", "small"):
                    yield f"{label} {size} values", _linear_case(s, pack, raw, _randn(g, 5, k), size)


def _pack_both(s: Subject, raw: RawLinear) -> tuple[Any, Any]:
    return s.backend.pack_linear(s.held(raw)), s.oracle.pack_linear(raw)


def _linear_case(
    s: Subject, pack: Callable[[], tuple[Any, Any]], raw: RawLinear, x: Tensor, size: str = ""
) -> Callable[[], tuple[float, float]]:
    def check() -> tuple[float, float]:
        values = x
        if size:  # so that outputs come near the top, or the bottom, of what the compute dtype holds
            wide = s.max > 1e30
            target = (1e30 if wide else 1e4) if size == "huge" else (1e-25 if wide else 1e-2)
            values = x * (target / float((x.abs() @ _terms(raw).T).max()))
        mine, theirs = pack()
        got, exact = s.given(values)
        want = s.oracle.linear(exact, theirs)
        return s.worst(s.backend.linear(got, mine), want, linear_bound(s, exact, s.held(raw), want))

    return check


def _embedding_cases(s: Subject) -> Iterator[Case]:
    for i, fmt in enumerate(_formats(s)):
        k = 3 * fmt.group_size if fmt.grouped else 100

        def check(fmt: LinearFormat = fmt, k: int = k, perm: bool = fmt.grouped and i % 4 == 0) -> tuple[float, float]:
            g = _rng("embedding", str(fmt))
            raw = make_linear(fmt, 93, k, g, bias=False, perm=perm)
            ids = np.array([0, 92, 5, 5, 17], np.int64)
            mine, theirs = _pack_both(s, raw)
            want = s.oracle.embedding(ids, theirs)
            bound = 3 * U32 * _terms(s.held(raw))[ids] + s.rounded(want)  # scale, zero or minimum, product
            both = (ids, s.backend.tensor(ids))  # on the host, and on the device
            return _worse(*(s.worst(s.backend.embedding(x, mine), want, bound) for x in both))

        yield f"{fmt} K={k}", check


# -- elementwise ---------------------------------------------------------------------------------------------------
def _rms_norm_cases(s: Subject) -> Iterator[Case]:
    """Bound: the sum of D squares (its root halves the relative error), root, two products, two roundings to u."""

    def check(shape: tuple[int, ...], residual: bool, strided: bool, size: float) -> tuple[float, float]:
        g = _rng("rms_norm", shape, residual)
        values, weight = _randn(g, *shape) * size, 1 + 0.3 * _randn(g, shape[-1])
        x, x64 = s.given(values)
        w, w64 = s.given(weight)
        r, r64 = s.given(_randn(g, *shape) * size, wider(s.dtype)) if residual else 2 * (None,)
        if strided:  # heads as they lie in a fused QKV row
            fused = torch.zeros(shape[0], shape[1] + 3, shape[2], dtype=values.dtype)
            fused[:, 1:-2] = values
            x = s.given(fused)[0][:, 1:-2]
        normed, summed = s.backend.rms_norm(x, w, 1e-6, r)
        want, want_sum = s.oracle.rms_norm(x64, w64, 1e-6, r64)
        relative = gamma(shape[-1]) / 2 + 8 * U32 + 2 * s.unit
        tiny = 4 * s.tiny * (1 + w64.abs())
        first = s.worst(normed, want, relative * want.abs() + tiny)
        wide = wider(s.dtype) if residual else s.dtype
        limit = 2 * U32 * want_sum.abs() + s.tiny if residual else torch.zeros(())
        second = s.worst(summed, want_sum, limit, wide)
        return _worse(first, second)

    sizes = (1.0, 1e-3, 1e3) if s.dtype == "float16" else (1.0, 1e-6, 1e12)
    for shape in ((1, 8), (3, 63), (7, 896), (130, 64), (2, 5120)):
        for residual in (False, True):
            for size in sizes:
                name = f"{list(shape)}{' residual' if residual else ''} values of {size:g}"
                yield name, partial(check, shape, residual, False, size)
    for heads in ((1, 14, 64), (5, 3, 40), (33, 2, 128)):
        yield f"{list(heads)} strided heads", partial(check, heads, False, True, 1.0)
    yield "[4, 64] zeros", partial(check, (4, 64), False, False, 0.0)


def _rope_cases(s: Subject) -> Iterator[Case]:
    """Bound: two products and their sum, 3 u32 (|a cos| + |b sin|), and rounding to u; the rest passes unchanged."""

    def check(rows: int, heads: tuple[int, int], d: int, r: int) -> tuple[float, float]:
        g = _rng("rope", rows, heads, d, r)
        angle = torch.rand(rows, r, generator=g, dtype=torch.float64) * 100  # per row: sequences differ in position
        cos, sin = angle.cos().float(), angle.sin().float()
        fused, fused64 = s.given(_randn(g, rows, (sum(heads) + heads[1]) * d))
        q, k = _heads(fused, heads, d)[:2]
        q64, k64 = _heads(fused64, heads, d)[:2]
        want = s.oracle.rope(q64.clone(), k64.clone(), cos, sin)
        got = s.backend.rope(q, k, s.tensor(cos), s.tensor(sin))
        results = []
        for x, y, exact in zip(got, want, (q64, k64), strict=True):
            a, b, c, t = exact[..., :r].abs(), exact[..., r : 2 * r].abs(), cos.abs()[:, None], sin.abs()[:, None]
            turned = torch.cat((a * c + b * t, a * t + b * c), -1).double()
            bound = torch.cat(
                (3 * U32 * turned + s.rounded(y[..., : 2 * r]), torch.zeros_like(exact[..., 2 * r :])), -1
            )
            results.append(s.worst(x, y, bound))
        return _worse(*results)

    for rows, heads, d, r in (
        (1, (14, 2), 64, 32), (7, (5, 5), 128, 64), (33, (7, 1), 80, 40), (130, (4, 2), 64, 32),
        (3, (3, 1), 40, 20), (5, (2, 2), 128, 16), (2, (6, 2), 96, 24), (1, (1, 1), 8, 4),
    ):  # fmt: skip
        yield f"T={rows} heads {heads[0]}/{heads[1]} D={d} rotated {2 * r}", partial(check, rows, heads, d, r)
    for dtype in s.backend.caps.kv_dtypes:
        for heads, d, r, factor in (((14, 2), 64, 32, False), ((3, 3), 40, 20, True), ((6, 2), 128, 16, True)):
            name = f"and cache write, {dtype}, heads {heads[0]}/{heads[1]} D={d}{' scaled' if factor else ''}"
            yield name, partial(_with_cache_write, s, heads, d, r, dtype, factor)


def _with_cache_write(
    s: Subject, heads: tuple[int, int], d: int, r: int, dtype: KVDtype, factor: bool
) -> tuple[float, float]:
    """rope_store_kv beside rope, scaling and store_kv of the same backend: how many values differ (none may)."""
    scene = Scene("rope_store_kv", (((0, 21), (1, 3)), ((1, 1), (0, 2))), heads, d)
    caches = [_Cache(s.backend, scene, dtype, _rng("rope_store_kv")) for _ in range(2)]
    g, wrong = _rng("rope_store_kv", heads, d, dtype), 0.0
    for step in scene.steps:
        rows = sum(n for _, n in step)
        angle = torch.rand(rows, r, generator=g) * 100
        cos, sin = s.tensor(angle.cos()), s.tensor(angle.sin())
        scale = s.given(1 + _randn(g, rows, 1, 1).abs())[0] if factor else None
        fused = _randn(g, rows, (heads[0] + 2 * heads[1]) * d)
        (q, k, v), (q2, k2, v2) = (_heads(s.given(fused.clone())[0], heads, d) for _ in range(2))
        plan, plan2 = (s.backend.plan(c.step(step)) for c in caches)
        q, k = s.backend.rope(q, k, cos, sin)
        q = q if scale is None else q * scale
        s.backend.store_kv(caches[0].kv, 0, k, v, plan)
        q2 = s.backend.rope_store_kv(q2, k2, v2, cos, sin, scale, caches[1].kv, 0, plan2)
        seen, seen2 = (s.backend.attention(q, c.kv, 0, p, d**-0.5) for c, p in zip(caches, (plan, plan2), strict=True))
        wrong += s.differing((q2, q), (seen2, seen))[0]
    return wrong, 0.0


def _heads(fused: OwnTensor, heads: tuple[int, int], d: int) -> tuple[OwnTensor, OwnTensor, OwnTensor]:
    """q, k, v as views [T, H, D] of fused rows, as a graph makes them."""
    hq, hkv = heads
    all_heads = fused.reshape(fused.shape[0], hq + 2 * hkv, d)
    return all_heads[:, :hq], all_heads[:, hq : hq + hkv], all_heads[:, hq + hkv :]


def _silu_mul_cases(s: Subject) -> Iterator[Case]:
    """Bound: exp of -g is good to (16 + |g|) u32 (argument reduction), four more roundings, and u; results below
    |up| 1e-35 may vanish (exp leaves the range of float32 near 88)."""

    def check(rows: int, f: int, size: float) -> tuple[float, float]:
        x, x64 = s.given(_randn(_rng("silu", rows, f), rows, 2 * f) * size)
        want = s.oracle.silu_mul(x64)
        gate, up = x64.chunk(2, 1)
        bound = (20 + gate.abs()) * U32 * want.abs() + s.rounded(want) + up.abs() * 1e-35
        return s.worst(s.backend.silu_mul(x), want, bound)

    for rows, f in ((1, 1), (1, 4864), (7, 37), (33, 64), (130, 515)):
        for size in (1.0, 1e-4, 60.0):
            yield f"T={rows} F={f} values of {size:g}", partial(check, rows, f, size)
    if type(s.backend).swiglu is Backend.swiglu:
        return  # the two operations, one after the other
    for i, fmt in enumerate(_formats(s)):
        for rows, f in ((1, 48), (14, 40), (9 + 4 * i, 16 * (i % 5 + 1)), (530, 80)):
            yield f"of a linear, {fmt} T={rows} F={f}", partial(_swiglu, s, fmt, rows, f, bias=i % 2 == 0)


def _swiglu(s: Subject, fmt: LinearFormat, rows: int, f: int, bias: bool) -> tuple[float, float]:
    """swiglu beside linear and silu_mul of the same backend: how many values differ (none may)."""
    g = _rng("swiglu", str(fmt), rows, f)
    k = 3 * fmt.group_size if fmt.grouped else 100
    raw = make_linear(fmt, 2 * f, k, g, bias=bias, perm=fmt.grouped and not bias)
    weight = s.backend.pack_linear(s.held(raw))
    x = s.given(_randn(g, rows, k))[0]
    return s.differing((s.backend.swiglu(x, weight), s.backend.silu_mul(s.backend.linear(x, weight))))


# -- the cache -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scene:
    """Steps of an engine over one cache: each step lists (sequence, new tokens)."""

    name: str
    steps: tuple[tuple[tuple[int, int], ...], ...]
    heads: tuple[int, int] = (14, 2)
    head_size: int = 64
    window: int | None = None
    layers: int = 1
    size: float = 1.0  # of q and k: larger is a sharper softmax


def _scenes(block: int) -> list[Scene]:
    mixed = (((0, 7), (1, 20)), ((1, 13), (0, 1), (2, block)), ((2, 1), (0, 3), (1, 1)), ((0, 1), (1, 1), (2, 1)))
    edges = tuple(((0, n),) for n in (block - 1, 1, 1, block - 1, 1, 2 * block, 1))
    return [
        Scene("prefill chunks beside decode rows", mixed),
        Scene("block boundaries", edges, heads=(4, 4)),
        Scene("one token, then decode", (((0, 1),), ((0, 1),), ((0, 1),)), heads=(1, 1), head_size=128),
        Scene("windows", (*mixed, ((0, 40),), ((0, 1), (1, 5)), ((0, 1),)), window=9),
        Scene("window of one", mixed, window=1),
        Scene("heads 5/5 of 80", mixed, heads=(5, 5), head_size=80),
        Scene("heads 7/1 of 96, two layers", mixed, heads=(7, 1), head_size=96, layers=2),
        Scene("heads 6/2 of 128", mixed, heads=(6, 2), head_size=128),
        Scene("heads 3/1 of 40", mixed, heads=(3, 1), head_size=40),
        Scene("sharp softmax", mixed, size=6.0),
        Scene("long contexts", (((0, 1100), (1, 30)), ((0, 1), (1, 1)), ((0, 33), (1, 1)), ((0, 1),)), heads=(4, 2)),
        Scene("long window", (((0, 1100),), ((0, 1),)), heads=(7, 1), window=500),
    ]


class _Cache:
    """One side's pages, scattered at random, and the BatchMeta of each step on them."""

    def __init__(self, backend: Backend, scene: Scene, dtype: KVDtype, g: torch.Generator) -> None:
        self.backend, self.block = backend, backend.caps.kv_block
        lens = {b: sum(n for step in scene.steps for c, n in step if c == b) for step in scene.steps for b, _ in step}
        need = {b: -(-n // self.block) for b, n in lens.items()}
        self.num_blocks = sum(need.values()) + 3
        ids = torch.randperm(self.num_blocks, generator=g).tolist()
        self.tables = {b: [ids.pop() for _ in range(n)] for b, n in need.items()}
        spec = KVSpec(scene.layers, scene.heads[1], scene.head_size, self.block, dtype)
        self.kv = backend.alloc_kv(spec, self.num_blocks)
        self.lens = dict.fromkeys(lens, 0)

    def step(self, step: Sequence[tuple[int, int]]) -> BatchMeta:
        """Metadata of the next step; advances the sequences."""
        slots: list[int] = []
        for b, n in step:
            positions = range(self.lens[b], self.lens[b] + n)
            slots += [self.tables[b][p // self.block] * self.block + p % self.block for p in positions]
            self.lens[b] += n
        return BatchMeta(
            [n for _, n in step], [self.lens[b] for b, _ in step], [self.tables[b] for b, _ in step], slots
        )


def _grid_vectors(s: Subject, g: torch.Generator, *shape: int) -> Tensor:
    """Vectors whose int8 codes leave no doubt: near a grid of 256 levels (half compute dtypes: exactly on it)."""
    codes = torch.randint(0, 256, shape, generator=g).double()
    codes[..., 0], codes[..., 1] = 0.0, 255.0
    if s.unit > U32:
        return (codes - 128) / 64
    codes[..., 2:] += (torch.rand(*shape[:-1], shape[-1] - 2, generator=g, dtype=torch.float64) - 0.5) * 0.6
    level, low = torch.rand(2, *shape[:-1], 1, generator=g, dtype=torch.float64)
    return codes.clamp(0, 255) * (0.008 + 0.008 * level) - 4 * low


def _attention_cases(s: Subject) -> Iterator[Case]:
    """Scenes over every cache dtype: against a cache of the same dtype, and an int8 one against float32 as well."""
    for dtype in s.backend.caps.kv_dtypes:
        for scene in _scenes(s.backend.caps.kv_block):
            if scene.name.startswith("long") and dtype not in (s.backend.caps.kv_dtypes[0], "int8"):
                continue  # the oracle is slow, and one float cache shows it
            yield f"{scene.name}, {dtype} cache", partial(_play, s, scene, dtype, dtype)
        if dtype == "int8":
            for scene in _scenes(s.backend.caps.kv_block)[:5]:
                yield f"{scene.name}, int8 cache against float32", partial(_play, s, scene, "int8", "float32")
            yield "constant vectors come back exact from int8", partial(_constant, s)


def _play(s: Subject, scene: Scene, dtype: KVDtype, oracle_dtype: KVDtype) -> tuple[float, float]:
    """Run a scene on both sides, store and attend step by step; the worst (error, bound) of all rows."""
    g = _rng(scene.name, dtype)
    mine, theirs = (_Cache(b, scene, t, g) for b, t in ((s.backend, dtype), (s.oracle, oracle_dtype)))
    (hq, hkv), d, scale = scene.heads, scene.head_size, scene.head_size**-0.5
    history: dict[tuple[int, int], list[Tensor]] = {}  # (layer, sequence) -> k and v as given, float64 [n, 2 Hkv, D]
    results = []
    for step in scene.steps:
        plan, plan64 = s.backend.plan(mine.step(step)), s.oracle.plan(theirs.step(step))
        rows = sum(n for _, n in step)
        for layer in range(scene.layers):
            kv = _grid_vectors(s, g, rows, 2 * hkv, d) if oracle_dtype == "int8" else _randn(g, rows, 2 * hkv, d)
            kv[:, :hkv] *= scene.size
            fused, fused64 = s.given(torch.cat((_randn(g, rows, hq * d) * scene.size, kv.flatten(1)), 1))
            q, k, v = _heads(fused, scene.heads, d)
            q64, k64, v64 = _heads(fused64, scene.heads, d)
            s.backend.store_kv(mine.kv, layer, k, v, plan)
            s.oracle.store_kv(theirs.kv, layer, k64, v64, plan64)
            got = s.backend.attention(q, mine.kv, layer, plan, scale, scene.window)
            want = s.oracle.attention(q64, theirs.kv, layer, plan64, scale, scene.window)
            bounds, row = [], 0
            for b, n in step:
                part = history.setdefault((layer, b), [])
                part.append(torch.cat((k64, v64), 1)[row : row + n])
                bounds.append(
                    attention_bound(s, q64[row : row + n], torch.cat(part), scale, scene.window, dtype, oracle_dtype)
                )
                row += n
            results.append(s.worst(got, want, torch.cat(bounds) + s.rounded(want)))
    return _worse(*results)


def attention_bound(
    s: Subject, q: Tensor, kv: Tensor, scale: float, window: int | None, dtype: KVDtype, oracle_dtype: KVDtype
) -> Tensor:
    """Bound of softmax(q k^T scale) v for the last rows of a sequence, [n, Hq, 1].

    A score is a `sum` over D; an int8 key adds |q|_1 times its error. Scores wrong by at most e change each probability
    by a factor within exp(+-2e), so outputs move by (exp(2e) - 1) sum p |v|, plus the `sum` over the keys, plus the
    error of the values. exp itself: 16 u32 and its argument's rounding. Half compute dtypes may round p as well (2u).
    An int8 code is at most half a step (range / 255 / 2) from its value. Where Caps.integer_attention names it, a query
    is within max |q| / 65024 of itself and meets keys around their middle, and the probabilities times their value's
    step are rounded to 1 / 65280 of the largest of 64 keys: an error of at most a 16th of the largest step. More than
    12 queries to a key head may meet 16-bit caches as integers too: keys within max |k| / 16382, queries within
    max |q| D / 262144, values within max |v| / 2046, probabilities within 1 / 65534 of the largest of 64 keys.
    """
    n, hq, d = q.shape
    keys, values = kv.chunk(2, 1)
    group = hq // keys.shape[1]

    def spread(x: Tensor) -> Tensor:  # float32 rounding of code * scale + minimum, or the lost half step beside it
        same = 4 * U32 * (x.amax(-1) - x.amin(-1) + x.abs().amax(-1))
        return same if dtype == oracle_dtype else same + (x.amax(-1) - x.amin(-1)) / 510

    if dtype == "int8":
        k_error, v_error = (spread(x).repeat_interleave(group, 1).T.unsqueeze(1) for x in (keys, values))
    else:
        k_error = v_error = torch.zeros(1, 1, 1, dtype=torch.float64)
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values))  # [Hq, keys, D]
    x = q.transpose(0, 1)
    total = k.shape[1]
    pos = torch.arange(total - n, total).unsqueeze(1)
    at = torch.arange(total)
    seen = (at <= pos) & (at > pos - (window or total))
    size = (x.abs() @ k.abs().transpose(1, 2) * scale).masked_fill(~seen, 0)  # [Hq, n, keys]
    p = (x @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    e = (gamma(d + 3) + 2 * U32) * size + x.abs().sum(-1, keepdim=True) * k_error * scale
    rounded = torch.zeros((), dtype=torch.float64)
    caps = s.backend.caps
    if dtype == "int8" and dtype in caps.integer_attention:
        steps = [(t.amax(-1) - t.amin(-1)) / 255 for t in (keys, values)]  # [keys, Hkv]
        middle = 128 * d * steps[0].repeat_interleave(group, 1).T.unsqueeze(1)
        e = e + x.abs().amax(-1, keepdim=True) / 65024 * middle * scale
        rounded = steps[1].amax() / 16
    if dtype != "int8" and dtype in caps.integer_attention and n * group > 12 and d % 32 == 0:
        one = x.abs().sum(-1, keepdim=True) * (k.abs().amax(-1) / 16382).unsqueeze(1)
        other = x.abs().amax(-1, keepdim=True) * (d / 262144) * k.abs().sum(-1).unsqueeze(1)
        e = e + 1.01 * scale * (one + other)
        rounded = v.abs().amax() * (1 / 2046 + 64 / 65534)
    e = e.masked_fill(~seen, 0).amax(-1, keepdim=True) + 16 * U32
    moved = torch.expm1(2 * e) + 2 * gamma(2 * min(total, window or total) + 8) + (2 * s.unit if s.unit > U32 else 0)
    largest = (v.abs() + v_error.transpose(1, 2) if dtype == "int8" else v.abs()).amax(-1)  # [Hq, keys]
    wide = (p * largest.unsqueeze(1)).sum(-1, keepdim=True) * moved + (p * v_error).sum(-1, keepdim=True) + rounded
    return wide.transpose(0, 1)


def _constant(s: Subject) -> tuple[float, float]:
    """A cache of one constant key and value: attention returns the value whatever the softmax."""
    scene = Scene("constant", (((0, 5),),), heads=(2, 1), head_size=64)
    cache = _Cache(s.backend, scene, "int8", _rng("constant"))
    fused, exact = s.given(torch.full((5, 4 * 64), -3.75, dtype=torch.float64))
    q, k, v = _heads(fused, scene.heads, 64)
    plan = s.backend.plan(cache.step(scene.steps[0]))
    s.backend.store_kv(cache.kv, 0, k, v, plan)
    want = _heads(exact, scene.heads, 64)[0]
    return s.worst(s.backend.attention(q, cache.kv, 0, plan, 0.125), want, gamma(16) * want.abs() + s.rounded(want))


# -- sampling ------------------------------------------------------------------------------------------------------
def _sample_cases(s: Subject) -> Iterator[Case]:
    """Exact: the number of rows whose token differs from the reference's."""

    def check(logits: Tensor, rows: list[SampleRow]) -> tuple[float, float]:
        want = s.oracle.sample(logits.clone(), rows)
        got = s.backend.sample(s.tensor(logits), rows)
        return float(len(rows) if len(got) != len(rows) else sum(a != b for a, b in zip(got, want, strict=True))), 0.0

    for vocab in (1, 17, 1000, 32003):
        g = _rng("sample", vocab)
        batch = 64 if vocab <= 1000 else 16
        for name, make in _SAMPLE_ROWS.items():
            rows = [make(vocab, g) for _ in range(batch)]
            for kind in ("normal", "ties", "extreme"):
                logits = torch.randn(batch, vocab, generator=g) * 3
                if kind == "ties":
                    logits = logits.round()
                elif kind == "extreme":
                    logits = logits * 1e4
                    logits[:, ::3] = -torch.inf if vocab > 1 else 0.0
                yield f"{name}, {kind} logits, V={vocab}", partial(check, logits, rows)


def _uniform(g: torch.Generator) -> float:
    return float(torch.rand((), generator=g, dtype=torch.float64))


def _ids(vocab: int, g: torch.Generator, n: int) -> list[int]:
    return torch.randint(0, vocab, (n,), generator=g).tolist()


def _penalised(vocab: int, g: torch.Generator) -> SampleRow:
    return SampleRow(
        temperature=_uniform(g) if _uniform(g) < 0.7 else 0.0,
        repetition_penalty=0.7 + _uniform(g),
        presence_penalty=2 * _uniform(g) - 1,
        frequency_penalty=2 * _uniform(g) - 1,
        logit_bias={i: 20 * _uniform(g) - 10 for i in _ids(vocab, g, 3)},
        banned=frozenset(_ids(vocab, g, 4)) if vocab > 8 else frozenset(),
        uniform=_uniform(g),
        prompt_ids=_ids(vocab, g, 12),
        output_ids=_ids(vocab, g, 20),
    )


_SAMPLE_ROWS: dict[str, Callable[[int, torch.Generator], SampleRow]] = {
    "greedy": lambda v, g: SampleRow(),
    "temperature": lambda v, g: SampleRow(0.05 + 2 * _uniform(g), uniform=_uniform(g)),
    "top-k": lambda v, g: SampleRow(1.0, top_k=1 + _ids(v + 5, g, 1)[0], uniform=_uniform(g)),
    "top-p": lambda v, g: SampleRow(0.8, top_p=0.02 + 0.98 * _uniform(g), uniform=_uniform(g)),
    "min-p": lambda v, g: SampleRow(1.1, min_p=_uniform(g), uniform=_uniform(g)),
    "all three": lambda v, g: SampleRow(
        0.7, 1 + _ids(50, g, 1)[0], 0.3 + 0.7 * _uniform(g), 0.2 * _uniform(g), uniform=_uniform(g)
    ),
    "penalties, bias and bans": _penalised,
    "ends of the interval": lambda v, g: SampleRow(1.0, uniform=0.0 if _uniform(g) < 0.5 else 1 - 2**-53),
}


# -- what must be refused ------------------------------------------------------------------------------------------
def _refusal_cases(s: Subject) -> Iterator[Case]:
    """A malformed call is an error, not a wrong answer: error 1 when nothing, or the wrong thing, was raised."""
    b, block = s.backend, s.backend.caps.kv_block
    good = BatchMeta([2, 1], [2, block + 1], [[3], [0, 1]], [3 * block, 3 * block + 1, block])
    metas = {
        "fewer kv_lens than q_lens": replace(good, kv_lens=[2]),
        "fewer block table rows": replace(good, block_table=[[3]]),
        "no sequence": BatchMeta([], [], [], []),
        "fewer slots than rows": replace(good, slots=good.slots[:2]),
        "a slot twice": replace(good, slots=[3 * block, 3 * block, block]),
        "a slot outside its sequence's blocks": replace(good, slots=[3 * block, 3 * block + 1, 2 * block]),
        "a negative slot": replace(good, slots=[3 * block, 3 * block + 1, -1]),
        "q_len 0": BatchMeta([0, 1], [2, 1], [[3], [0]], [0]),
        "q_len beyond kv_len": BatchMeta([2], [1], [[0]], [0, 1]),
        "a block table too short": replace(good, block_table=[[3], [0]]),
        "a negative block": replace(good, block_table=[[3], [-2, 1]]),
    }
    for name, meta in metas.items():
        yield f"plan: {name}", partial(_refused, partial(b.plan, meta), ValueError)

    def x(*shape: int) -> OwnTensor:
        return b.tensor(np.ones(shape, host_dtype(s.dtype)))

    def logits(*shape: int, value: float = 0.0) -> OwnTensor:
        return b.tensor(np.full(shape, value, np.float32))

    raw = make_linear(dense_format(b.caps.dense_dtypes[0]), 5, 8, _rng("refuse"), bias=True, perm=False)
    spec = KVSpec(1, 2, 16, block, b.caps.kv_dtypes[0])

    def cache_step(hq: int, d: int, num_blocks: int = 4) -> None:
        kv, plan = b.alloc_kv(spec, num_blocks), b.plan(good)
        b.store_kv(kv, 0, x(3, 2, d), x(3, 2, d), plan)
        b.attention(x(3, hq, d), kv, 0, plan, 1.0)

    def with_bad(raw: RawLinear, key: str, value: float) -> RawLinear:
        def rows(start: int, stop: int) -> LinearRows:
            part = raw.rows(start, stop)
            bad = getattr(part, key).copy()
            bad[-1, -1] = value
            return replace(part, **{key: bad})

        return replace(raw, rows=rows)

    calls: dict[str, tuple[Callable[[], Any], tuple[type[Exception], ...]]] = {
        "linear: x of the wrong width": (lambda: b.linear(x(2, 9), b.pack_linear(raw)), _MALFORMED),
        "embedding: float ids": (lambda: b.embedding(x(3), b.pack_linear(raw)), _MALFORMED),
        "embedding: an id beyond the table": (
            lambda: b.embedding(np.array([5], np.int64), b.pack_linear(raw)), _MALFORMED),
        "embedding: a negative id": (
            lambda: b.embedding(np.array([-1], np.int64), b.pack_linear(raw)), _MALFORMED),
        "attention: query heads that key heads do not divide": (lambda: cache_step(3, 16), _MALFORMED),
        "store_kv: a head size other than the cache's": (lambda: cache_step(4, 8), _MALFORMED),
        "store_kv: a block beyond the cache": (lambda: cache_step(4, 16, 2), _MALFORMED),
        "alloc_kv: more than the memory": (lambda: b.alloc_kv(spec, 1 << 45), (QwenRTError,)),
        "sample: fewer rows than logits": (
            lambda: b.sample(logits(2, 4), [SampleRow()]), _MALFORMED),
        "sample: NaN logits": (
            lambda: b.sample(logits(1, 4, value=math.nan), [SampleRow()]), _MALFORMED),
        "sample: everything banned": (
            lambda: b.sample(logits(1, 2), [SampleRow(banned=frozenset((0, 1)))]), _MALFORMED),
        "pack_linear: NaN bias": (
            lambda: b.pack_linear(replace(raw, bias=np.full(5, math.nan, np.float32))), (CheckpointError,)),
    }  # fmt: skip
    for fmt in _formats(s):
        if not fmt.grouped or fmt.group_size == 32:
            made = s.held(make_linear(fmt, 19, 64, _rng("bad"), bias=False, perm=False))
            keys = ["scales", *(["mins"] if fmt.has_mins else [])] if fmt.grouped else ["values"]
            for key in keys:
                for value in (math.nan, math.inf):
                    bad = with_bad(made, key, value)
                    calls[f"pack_linear: {value} in {key} of {fmt}"] = partial(b.pack_linear, bad), (CheckpointError,)
    for name, (call, errors) in calls.items():
        yield name, partial(_refused, call, *errors)


_MALFORMED = (ValueError, TypeError, IndexError, RuntimeError, QwenRTError)


def _refused(call: Callable[[], Any], *errors: type[Exception]) -> tuple[float, float]:
    try:
        call()
    except errors:
        return 0.0, 0.0
    return 1.0, 0.0


OPS: dict[str, Callable[[Subject], Iterator[Case]]] = {
    "linear": _linear_cases,
    "embedding": _embedding_cases,
    "rms_norm": _rms_norm_cases,
    "rope": _rope_cases,
    "silu_mul": _silu_mul_cases,
    "attention": _attention_cases,
    "sample": _sample_cases,
    "refusals": _refusal_cases,
}
"""Operation -> its cases (store_kv is seen through attention)."""
