"""The contract itself: plausible mistakes, each made in one operation of an otherwise right backend, are found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen_rt.backends import contract
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.errors import Declined
from qwen_rt.quant import formats

R = ReferenceBackend


def _linear_drops_perm(self: R, x: Any, w: Any) -> Any:
    return R.linear(self, x, replace(w, perm=None))


def _linear_half_sums(self: R, x: Any, w: Any) -> Any:
    return (
        (x.half() @ w.rows(slice(None)).half().T).float() if w.perm is None and w.bias is None else R.linear(self, x, w)
    )


def _linear_zero_point_of_signed(self: R, x: Any, w: Any) -> Any:
    stored = w.stored
    if stored.zeros is not None:
        stored = replace(stored, zeros=stored.zeros.clip(max=2**w.format.bits - 1))
    return R.linear(self, x, replace(w, stored=stored))


def _linear_last_column(self: R, x: Any, w: Any) -> Any:
    out = R.linear(self, x, w)
    return torch.cat((out[:, :-1], out[:, :1]), 1) if out.shape[1] == 37 else out


def _norm_weight_plus_one(self: R, x: Any, w: Any, eps: float, residual: Any = None) -> Any:
    return R.rms_norm(self, x, w + 1e-5, eps, residual)


def _norm_forgets_sum(self: R, x: Any, w: Any, eps: float, residual: Any = None) -> Any:
    return R.rms_norm(self, x, w, eps, residual)[0], x


def _norm_eps(self: R, x: Any, w: Any, eps: float, residual: Any = None) -> Any:
    return R.rms_norm(self, x, w, 1e-5, residual)


def _rope_interleaved(self: R, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    def turn(x: Any) -> Any:
        x = x.clone()
        r = 2 * cos.shape[1]
        a, b = x[..., 0:r:2].clone(), x[..., 1:r:2].clone()
        x[..., 0:r:2], x[..., 1:r:2] = a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]
        return x

    return turn(q), turn(k)


def _rope_one_row(self: R, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return R.rope(self, q, k, cos[:1].expand_as(cos), sin[:1].expand_as(sin))


def _silu_swapped(self: R, x: Any) -> Any:
    return R.silu_mul(self, x.roll(x.shape[1] // 2, 1))


def _window_off_by_one(self: R, q: Any, kv: Any, layer: int, plan: Any, scale: float, window: Any = None) -> Any:
    return R.attention(self, q, kv, layer, plan, scale, window and window + 1)


def _first_layer_only(self: R, q: Any, kv: Any, layer: int, plan: Any, scale: float, window: Any = None) -> Any:
    return R.attention(self, q, kv, 0, plan, scale, window)


def _heads_modulo(self: R, q: Any, kv: Any, layer: int, plan: Any, scale: float, window: Any = None) -> Any:
    hkv = kv.spec.num_kv_heads
    order = torch.arange(q.shape[1]).view(-1, hkv).T.flatten()
    out = torch.empty_like(q)
    out[:, order] = R.attention(self, q[:, order], kv, layer, plan, scale, window)
    return out


def _int8_truncates(self: R, kv: Any, layer: int, k: Any, v: Any, plan: Any) -> None:
    def shift(x: Any) -> Any:  # rounding down = rounding to nearest half a step lower
        return x - (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 510 * (x > x.amin(-1, keepdim=True))

    R.store_kv(self, kv, layer, *((shift(k), shift(v)) if kv.spec.dtype == "int8" else (k, v)), plan)


def _store_shifts_blocks(self: R, kv: Any, layer: int, k: Any, v: Any, plan: Any) -> None:
    R.store_kv(self, kv, layer, k, v, replace(plan, slots=plan.slots ^ 1))


def _sample_ties_high(self: R, logits: Any, rows: Any) -> Any:
    plain = [r for r in rows if r.temperature == 0 and not r.logit_bias]
    high = logits.shape[1] - 1 - logits.flip(1).argmax(1)
    return high.tolist() if len(plain) == len(rows) else R.sample(self, logits, rows)


def _sample(**changes: Any) -> Callable[..., Any]:
    def sample(self: R, logits: Any, rows: Any) -> Any:
        return R.sample(self, logits, [replace(r, **{k: f(getattr(r, k)) for k, f in changes.items()}) for r in rows])

    return sample


MUTANTS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "act-order ignored": ("linear", "linear", _linear_drops_perm),
    "sums in float16": ("linear", "linear", _linear_half_sums),
    "zero point 16 clipped to 15": ("linear", "linear", _linear_zero_point_of_signed),
    "odd N: last column wrong": ("linear", "linear", _linear_last_column),
    "norm weight off by 1e-5": ("rms_norm", "rms_norm", _norm_weight_plus_one),
    "norm forgets the residual sum": ("rms_norm", "rms_norm", _norm_forgets_sum),
    "norm uses its own eps": ("rms_norm", "rms_norm", _norm_eps),
    "rope interleaved": ("rope", "rope", _rope_interleaved),
    "rope of the first row for all": ("rope", "rope", _rope_one_row),
    "gate and up swapped": ("silu_mul", "silu_mul", _silu_swapped),
    "window one too wide": ("attention", "attention", _window_off_by_one),
    "layer ignored": ("attention", "attention", _first_layer_only),
    "key head h % Hkv": ("attention", "attention", _heads_modulo),
    "int8 cache truncates": ("attention", "store_kv", _int8_truncates),
    "slots wrong in pairs": ("attention", "store_kv", _store_shifts_blocks),
    "ties go to the highest id": ("sample", "sample", _sample_ties_high),
    "top-k one too many": ("sample", "sample", _sample(top_k=lambda k: k and k + 1)),
    "min-p ignored": ("sample", "sample", _sample(min_p=lambda p: 0.0)),
    "penalty over the output only": ("sample", "sample", _sample(prompt_ids=lambda ids: ())),
    "ban ignored": ("sample", "sample", _sample(banned=lambda ids: frozenset())),
    "metadata unchecked": ("refusals", "plan", lambda self, meta: None),
    "an operation crashes": ("silu_mul", "silu_mul", lambda self, x: 1 / 0),
    "output in float64": ("linear", "linear", lambda self, x, w: R.linear(self, x, w).double()),
    "output is NaN": ("silu_mul", "silu_mul", lambda self, x: x.chunk(2, 1)[0] * torch.nan),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistake_is_found(name: str) -> None:
    op, method, wrong = MUTANTS[name]
    mutant = type("Mutant", (ReferenceBackend,), {method: wrong})()
    assert any(not r.ok for r in contract.run(mutant, [op])), f"the contract does not notice: {name}"


def test_nan_weights_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "all_finite", lambda a: True)
    failed = [r.case for r in contract.run(ReferenceBackend(), ["refusals"]) if not r.ok]
    assert any("nan in scales" in case for case in failed) and any("inf in values" in case for case in failed)


def test_declining_is_not_failing_but_is_kept() -> None:
    def decline(self: R, x: Any) -> Any:
        raise Declined("rows must be a multiple of 8")

    mutant = type("Mutant", (ReferenceBackend,), {"silu_mul": decline})()
    results = list(contract.run(mutant, ["silu_mul"]))
    assert all(r.ok and r.declined == "rows must be a multiple of 8" for r in results)
