"""Small models decode with the reference's greedy text: weight formats, caches, generations, windows, recorded and
eager; and stop doing so when one thing in the backend is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from decoding import (
    INT4,
    INT4_ACT_ORDER,
    INT8,
    PROMPTS,
    QWEN1,
    QWEN2,
    QWEN3,
    TOKENS,
    WINDOWED,
    decode,
    opened,
    reference_model,
    reference_text,
)  # fmt: skip

from qwen_rt.backends.ascend import attention, cache, elementwise
from qwen_rt.backends.base import Backend
from qwen_rt.backends.contract import UNIT_ROUNDOFF
from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.config import ModelConfig, QuantConfig
from qwen_rt.dtypes import DType
from qwen_rt.model import build


@pytest.fixture(scope="module")
def backend() -> Backend:
    return opened("float16")


@pytest.fixture(scope="module")
def eager() -> Backend:
    return opened("float16", rows=0)


@pytest.mark.parametrize("kv_cache", ["float16", "int8"])
@pytest.mark.parametrize("quant", [None, INT4, INT4_ACT_ORDER, INT8], ids=["dense", "int4", "act-order", "int8"])
def test_recorded_and_eager_text(backend: Backend, eager: Backend, quant: QuantConfig | None, kv_cache: str) -> None:
    want = reference_text(QWEN2, quant, kv_cache)
    got, engine = decode(build(RandomCheckpoint(QWEN2, quant), backend), kv_cache, TOKENS)
    assert got == want
    # Four rows, then three in the recording of four, then one: padding was there, and nothing ran eagerly.
    assert {rows for rows, _ in engine.runner.replays} == {4, 1} and all(engine.runner.replays.values())
    assert "recorded (rows x blocks) 4x64" in backend.kernels()["capture"]
    got, engine = decode(build(RandomCheckpoint(QWEN2, quant), eager), kv_cache, TOKENS)
    assert got == want
    assert not any(engine.runner.replays.values()) and "off" in eager.kernels()["capture"]


@pytest.mark.parametrize(
    ("config", "quant", "kv_cache"),
    [
        (QWEN1, INT4, "float16"), (QWEN1, None, "int8"), (QWEN3, None, "float16"), (QWEN3, INT8, "int8"),
        (WINDOWED, None, "float16"), (WINDOWED, None, "int8"),
    ],
    ids=["qwen1-ntk-logn-int4", "qwen1-int8-cache", "qwen3", "qwen3-int8", "windows", "windows-int8-cache"],
)  # fmt: skip
def test_other_graphs(backend: Backend, config: ModelConfig, quant: QuantConfig | None, kv_cache: str) -> None:
    got, engine = decode(build(RandomCheckpoint(config, quant), backend), kv_cache, TOKENS)
    assert got == reference_text(config, quant, kv_cache)
    recorded = list(engine.runner.replays.values())
    if config is WINDOWED and kv_cache == "int8":
        assert not any(recorded) and "attention gathers its keys" in backend.kernels()["capture"]
    else:
        assert recorded and all(recorded)


def test_preemption_and_shared_pages(backend: Backend) -> None:
    """A cache too small for all at once: sequences give pages back and are computed again, to the same text."""
    prompts = [PROMPTS[QWEN2][2], PROMPTS[QWEN2][2][:140], PROMPTS[QWEN2][0]]
    want = decode(reference_model(QWEN2, None), "float16", [8, 8, 8], prompts)[0]
    got, engine = decode(build(RandomCheckpoint(QWEN2), backend), "float16", [8, 8, 8], prompts, blocks=4)
    assert got == want and engine.runner.replays


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_have_the_precision_of_the_type(dtype: DType) -> None:
    """Some sixty roundings to u lie on the way, at random: their root mean square stays within sqrt(60) u."""
    model = build(RandomCheckpoint(QWEN2), opened(dtype))
    got = decode(model, dtype, [1], [[1]])[1].logits(PROMPTS[QWEN2][2])
    want = decode(reference_model(QWEN2, None), "float32", [1], [[1]])[1].logits(PROMPTS[QWEN2][2])
    error = np.sqrt(np.square(got - want).mean()) / want.std(ddof=1)
    assert got.dtype == np.float32 and 0 < error < 60**0.5 * UNIT_ROUNDOFF[dtype]


def test_residual_stream_is_float32(eager: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addends that fit float16 and whose sum does not: the text stays the reference's."""

    class Loud(RandomCheckpoint):
        def linear(self, name: str) -> Any:
            raw = super().linear(name)
            if not name.endswith("down_proj"):
                return raw

            def rows(start: int, stop: int) -> Any:
                part = raw.rows(start, stop)
                return replace(part, values=part.values * 2e4)

            return replace(raw, rows=rows)

    seen: list[float] = []
    inner = elementwise.rms_norm

    def watch(*args: Any) -> Any:
        out = inner(*args)
        seen.append(float(out[1].float().abs().max()))
        return out

    monkeypatch.setattr(elementwise, "rms_norm", watch)
    config, prompts = replace(QWEN2, num_layers=8), PROMPTS[QWEN2][:1]
    got = decode(build(Loud(config), eager), "float16", [4], prompts)[0]
    assert max(seen) > torch.finfo(torch.float16).max
    assert got == decode(build(Loud(config), reference_model(QWEN2, None).backend), "float32", [4], prompts)[0]


# -- mistakes must show --------------------------------------------------------------------------------------------
def _wrong_slot(args: tuple[Any, ...]) -> tuple[Any, ...]:
    npu, kv, layer, k, v, plan = args
    return npu, kv, layer, k, v, replace(plan, slots=(plan.slots.cpu() ^ 1).to(k.device))


def _values_as_keys(args: tuple[Any, ...]) -> tuple[Any, ...]:
    npu, kv, layer, k, v, plan = args
    return npu, kv, layer, v, k, plan


def _no_rotation(args: tuple[Any, ...]) -> tuple[Any, ...]:
    npu, q, k, cos, sin = args
    return npu, q, k, torch.ones_like(cos), torch.zeros_like(sin)


def _cos_for_sin(args: tuple[Any, ...]) -> tuple[Any, ...]:
    npu, q, k, cos, sin = args
    return npu, q, k, sin, cos


def _up_for_gate(args: tuple[Any, ...]) -> tuple[Any, ...]:
    npu, gate_up = args
    return npu, torch.cat(gate_up.chunk(2, -1)[::-1], -1)


def _lengths_one_short(args: tuple[Any, ...]) -> tuple[Any, ...]:
    npu, q, kv, layer, kv_lens, table, scale = args
    return npu, q, kv, layer, [max(1, n - 1) for n in kv_lens], table, scale


MISTAKES: dict[str, tuple[Any, str, Callable[[tuple[Any, ...]], tuple[Any, ...]]]] = {
    "slots wrong in pairs": (cache, "store", _wrong_slot),
    "keys and values exchanged": (cache, "store", _values_as_keys),
    "no rotation": (elementwise, "rope", _no_rotation),
    "cos and sin exchanged": (elementwise, "rope", _cos_for_sin),
    "gate and up exchanged": (elementwise, "silu_mul", _up_for_gate),
    "lengths of keys one short in decode": (attention, "decode", _lengths_one_short),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_changes_the_text(eager: Backend, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module, function, change = MISTAKES[name]
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: right(*change(args)))
    got = decode(build(RandomCheckpoint(QWEN2), eager), "float16", TOKENS)[0]
    assert got != reference_text(QWEN2, None, "float16")
