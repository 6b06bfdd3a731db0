"""Small models, engines over them, and the reference's answers, for the tests in this folder."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from qwen_rt.backends import select
from qwen_rt.backends.base import Backend, KVSpec
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.config import ModelConfig, QuantConfig
from qwen_rt.dtypes import DType
from qwen_rt.engine import Engine, Request, SamplingParams
from qwen_rt.model import QwenModel, build

QWEN2 = ModelConfig(
    arch="qwen2",
    vocab_size=768,
    hidden_size=256,
    ffn_size=512,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_size=64,
    norm_eps=1e-6,
    rope_theta=1e6,
    rotary_size=64,
    max_position=1024,
    train_length=1024,
    qkv_bias=True,
    tied_head=True,
    dtype="float32",
)
QWEN1 = replace(
    QWEN2, arch="qwen", num_kv_heads=8, train_length=16, dynamic_ntk=True, logn=True, tied_head=False, rope_theta=1e4
)
QWEN3 = replace(QWEN2, arch="qwen3", qk_norm=True, qkv_bias=False)
WINDOWED = replace(QWEN2, windows=(24, None))

INT4 = QuantConfig("gptq", 4, 128, symmetric=False, act_order=False)
INT4_ACT_ORDER = QuantConfig("gptq", 4, 32, symmetric=True, act_order=True)
INT8 = QuantConfig("gptq", 8, 64, symmetric=True, act_order=False)


def ramp(first: int, step: int) -> list[int]:
    """150 tokens: more than a page."""
    return [(first + step * i) % 768 for i in range(150)]


# Prompts whose answers stay clear of ties in every format and cache tried: the reference's two best logits lie at least
# 0.05 standard deviations apart, float16 arithmetic moves them by some 0.003 and an int8 cache by some 0.02.
PROMPTS = {
    QWEN2: [[14, 94, 0, 462, 594, 559, 85, 624, 203], [253, 123, 635], ramp(344, 470), [694]],
    QWEN1: [[20, 132, 661, 542, 223, 529, 141, 164, 677], [190, 399, 279], ramp(191, 353), [178]],
    QWEN3: [[38, 128, 535, 362, 611, 663, 671, 309, 29], [386, 245, 431], ramp(555, 30), [554]],
    WINDOWED: [[700, 568, 406, 261, 151, 233, 23, 16, 283], [554, 490, 427], ramp(270, 323), [141]],
}
TOKENS = [8, 4, 4, 3]


def opened(dtype: DType, rows: int | None = None) -> Backend:
    """The NPU; `rows` is QWEN_RT_GRAPH_ROWS, 0 for eager steps only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN_RT_GRAPH_ROWS", "" if rows is None else str(rows))
        return select.open_backend("ascend", dtype=dtype)[0]


def decode(
    model: QwenModel,
    kv_cache: str,
    tokens: list[int],
    prompts: list[list[int]] | None = None,
    blocks: int = 0,
) -> tuple[list[list[int]], Engine]:
    """Greedy answers to `prompts` in one continuous batch, of so many tokens each; blocks 0: enough."""
    config, caps = model.config, model.backend.caps
    prompts = PROMPTS[replace(config, quant=None)] if prompts is None else prompts
    blocks = blocks or 1024 // caps.kv_block
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
def reference_model(config: ModelConfig, quant: QuantConfig | None) -> QwenModel:
    return build(RandomCheckpoint(config, quant), ReferenceBackend())


@cache
def reference_text(config: ModelConfig, quant: QuantConfig | None, kv_cache: str) -> list[list[int]]:
    return decode(reference_model(config, quant), kv_cache, TOKENS)[0]
