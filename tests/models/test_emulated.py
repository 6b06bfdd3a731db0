"""A model of the 0.5B's shape (fewer layers, a small vocabulary) decodes through the emulated GPUs with the text of the
reference backend: every weight format and cache, eagerly and from recordings, batched, preempted, Qwen-1 and Qwen3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from tiny_config import TINY

from qwen_rt.backends import select
from qwen_rt.backends.base import Backend, KVSpec
from qwen_rt.backends.contract import UNIT_ROUNDOFF
from qwen_rt.backends.gpu.backend import GpuBackend
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.config import ModelConfig, QuantConfig
from qwen_rt.dtypes import DType
from qwen_rt.engine import Engine, Request, SamplingParams
from qwen_rt.model import QwenModel, build

EMULATED = ("cuda-emulated", "dcu-emulated")

SHAPE = replace(  # Qwen2.5-0.5B but for layers and vocabulary
    TINY,
    vocab_size=768,
    hidden_size=896,
    ffn_size=4864,
    num_heads=14,
    head_size=64,
    rope_theta=1e6,
    rotary_size=64,
    qkv_bias=True,
    tied_head=True,
)
SMALL = replace(SHAPE, hidden_size=128, ffn_size=192, num_heads=4, head_size=32, rotary_size=32)
QWEN1 = replace(SMALL, arch="qwen", num_kv_heads=4, train_length=16, dynamic_ntk=True, logn=True, tied_head=False)
QWEN3 = replace(SMALL, arch="qwen3", qk_norm=True, qkv_bias=False, head_size=64, rotary_size=64)
INT4 = QuantConfig("gptq", 4, 128, symmetric=False, act_order=False)
INT4_ACT_ORDER = QuantConfig("gptq", 4, 32, symmetric=True, act_order=True)
INT8_SMALL = QuantConfig("gptq", 8, 32, symmetric=False, act_order=False)
INT8 = QuantConfig("gptq", 8, 128, symmetric=True, act_order=False)
# Prompts whose answers stay clear of ties: the reference's two best logits lie at least 0.014 standard deviations
# apart, float16 arithmetic moves them by some 0.003.
PROMPTS = [
    [712, 456, 272, 738, 234, 605, 104, 325, 31],
    [132, 531, 574],
    [614, 28, 235, 650, 181, 563, 598, 185, 93, 564, 261, 33],
    [137],
]
LONG = [163, 261, 540, 172, 672, 279, 663, 728, 301, 465, 719, 329, 508, 485, 116, 24, 319, 395, 351, 431]
SMALL_PROMPTS = [
    [460, 483, 667, 388, 214],
    [210, 436, 57, 492, 373],
    LONG,
]
TOKENS = [6, 4, 4, 3]


@cache
def model_on(name: str, config: ModelConfig, quant: QuantConfig | None, rows: int | None = None) -> QwenModel:
    """Built once; `rows` is QWEN_RT_GRAPH_ROWS, 0 for eager steps only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_RT_GRAPH_ROWS", "" if rows is None else str(rows))
        backend = ReferenceBackend() if name == "reference" else opened(name, "float16")
    return build(RandomCheckpoint(config, quant), backend)


def opened(name: str, dtype: DType) -> Backend:
    found = select.probe(name)
    if not found.usable:
        pytest.skip(f"{name}: {found.reason}")
    return select.backend_class(name)(0, dtype)


def decode(
    model: QwenModel, kv_cache: str, tokens: list[int], blocks: int = 40, prompts: list[list[int]] = PROMPTS
) -> tuple[list[list[int]], Engine]:
    """Greedy answers to `prompts` in one batch, of so many tokens each."""
    config, caps = model.config, model.backend.caps
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_size, caps.kv_block, kv_cache)  # type: ignore[arg-type]
    engine = Engine(model, model.backend.alloc_kv(spec, blocks), max_model_len=min(blocks * caps.kv_block, 512))
    requests = [Request(list(p), SamplingParams(max_new_tokens=n)) for p, n in zip(prompts, tokens, strict=True)]
    answers: dict[int, list[int]] = {engine.add(r): [] for r in requests}
    while engine.has_unfinished:
        for out in engine.step():
            assert out.token is not None
            answers[out.request_id].append(out.token)
    return list(answers.values()), engine


@cache
def reference_text(quant: QuantConfig | None, kv_cache: str) -> list[list[int]]:
    return decode(model_on("reference", SHAPE, quant), kv_cache, TOKENS)[0]


@pytest.fixture(autouse=True, scope="module")
def forget_models() -> Iterator[None]:
    yield
    model_on.cache_clear()


@pytest.mark.parametrize("kv_cache", ["float16", "int8"])
@pytest.mark.parametrize("quant", [None, INT4, INT8], ids=["dense", "int4", "int8"])
@pytest.mark.parametrize("name", EMULATED)
def test_captured_text_is_the_references(name: str, quant: QuantConfig | None, kv_cache: str) -> None:
    model = model_on(name, SHAPE, quant)
    got, engine = decode(model, kv_cache, TOKENS)
    assert got == reference_text(quant, kv_cache)
    # Four rows, then three in the recording of four, then one: padding was there, and nothing ran eagerly.
    assert {rows for rows, _ in engine.runner.replays} == {4, 1} and all(engine.runner.replays.values())
    assert "recorded (rows x blocks) 4x64, 1x64" in model.backend.kernels()["capture"]


@pytest.mark.parametrize(("quant", "kv_cache"), [(INT4, "float16"), (INT8, "int8")], ids=["int4", "int8"])
def test_text_without_matrix_units_is_the_references(quant: QuantConfig, kv_cache: str) -> None:
    """As a Z100 (gfx906) computes; no kernel of the matrix units is asked for."""
    model = model_on("dcu-simt-emulated", SHAPE, quant)
    got, engine = decode(model, kv_cache, TOKENS)
    assert got == reference_text(quant, kv_cache)
    assert all(engine.runner.replays.values()) and engine.runner.replays
    assert isinstance(model.backend, GpuBackend)
    linears = {k for k in model.backend.device_kernels.names() if k.startswith(("linear_rows", "linear_tile"))}
    assert linears and all("_simt_" in k for k in linears)


@pytest.mark.parametrize("name", EMULATED)
def test_eager_text_is_the_references(name: str) -> None:
    model = model_on(name, SHAPE, INT4, 0)
    got, engine = decode(model, "float16", TOKENS)
    assert got == reference_text(INT4, "float16")
    assert not any(engine.runner.replays.values()) and "off" in model.backend.kernels()["capture"]


@pytest.mark.parametrize("config", [QWEN1, QWEN3, SMALL], ids=["qwen1-act-order", "qwen3", "qwen2-int8"])
@pytest.mark.parametrize("name", EMULATED)
def test_other_graphs_and_preemption(name: str, config: ModelConfig) -> None:
    """NTK and logn (positions pass the training length), q/k norms, act-order; a cache too small for all at once."""
    quant = {"qwen": INT4_ACT_ORDER, "qwen3": None, "qwen2": INT8_SMALL}[config.arch]
    want = decode(model_on("reference", config, quant), "float16", [24] * 3, prompts=SMALL_PROMPTS)[0]
    got, engine = decode(model_on(name, config, quant), "float16", [24] * 3, blocks=6, prompts=SMALL_PROMPTS)
    assert got == want and engine.scheduler.num_preemptions > 0
    assert all(engine.runner.replays.values()) and engine.runner.replays


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", EMULATED)
def test_logits_have_the_precision_of_the_type(name: str, dtype: DType) -> None:
    """Some sixty roundings to u lie on the way, at random: their root mean square stays within sqrt(60) u."""
    model = build(RandomCheckpoint(SMALL), opened(name, dtype))
    got = decode(model, dtype, [1], prompts=[[1]])[1].logits(LONG)
    want = decode(model_on("reference", SMALL, None), "float32", [1], prompts=[[1]])[1].logits(LONG)
    error = float(np.sqrt(np.square(got - want).mean()) / want.std())
    assert got.dtype == np.float32 and 0 < error < 60**0.5 * UNIT_ROUNDOFF[dtype]
