"""The real 0.5B model answers on the NPU with the CPU's greedy text: 4-bit as published, and dense in bfloat16;
recorded and eager, alone and in a batch of mixed lengths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from assets import demo_gguf
from decoding import decode, opened

import qwen_rt
from qwen_rt.backends import select
from qwen_rt.checkpoint import Checkpoint, open_checkpoint
from qwen_rt.dtypes import host_dtype
from qwen_rt.model import build
from qwen_rt.quant.formats import Array, LinearRows, RawLinear, dense_format

TEXTS = [
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5, 6, 7,",
    "import numpy as np\nimport torch\n\nclass Attention(torch.nn.Module",
]
TOKENS = [8, 5, 3]


class Dense(Checkpoint):
    """Another checkpoint's weights, dense in bfloat16."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner, self.config, self.source = inner, inner.config, inner.source

    def linears(self) -> dict[str, tuple[int, int]]:
        return self.inner.linears()

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return self.inner.tensors()

    def tensor(self, name: str) -> Array:
        return self.inner.tensor(name)

    def nbytes(self) -> int:
        return self.inner.nbytes()

    def linear(self, name: str) -> RawLinear:
        raw = self.inner.linear(name)

        def rows(start: int, stop: int) -> LinearRows:
            return LinearRows(values=raw.dequantize(start, stop).astype(host_dtype("bfloat16")))

        return RawLinear(name, raw.shape, dense_format("bfloat16"), rows, raw.bias)


@cache
def prompts() -> list[list[int]]:
    tokenizer = qwen_rt.load(str(demo_gguf()), device="cpu").tokenizer
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(autouse=True, scope="module")
def forget() -> Iterator[None]:
    yield
    prompts.cache_clear()


def test_int4_through_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user has it: QWEN_BACKEND=ascend, one prompt and several."""
    path, limits = str(demo_gguf()), {"max_new_tokens": 6, "temperature": 0}
    cpu = qwen_rt.load(path, device="cpu", max_model_len=512)
    want = [answer.ids for answer in cpu.generate(TEXTS, **limits)]
    del cpu
    monkeypatch.setenv("QWEN_BACKEND", "ascend")
    model = qwen_rt.load(path, max_model_len=512)
    assert [answer.ids for answer in model.generate(TEXTS, **limits)] == want
    assert model.generate(TEXTS[0], **limits).ids == want[0]
    told = str(model.report())
    assert "npu_weight_quant_batchmatmul" in told and "recorded (rows x blocks)" in told


def test_bfloat16_recorded_and_eager() -> None:
    checkpoint = Dense(open_checkpoint(demo_gguf()))
    cpu = build(checkpoint, select.open_backend("cpu")[0])
    want = decode(cpu, "float32", TOKENS, prompts(), blocks=64)[0]
    del cpu
    backend = opened("bfloat16")
    model = build(checkpoint, backend)
    got, engine = decode(model, "bfloat16", TOKENS, prompts())
    assert got == want and all(engine.runner.replays.values())
    backend._capture_rows = 0  # type: ignore[attr-defined]
    got, engine = decode(model, "bfloat16", TOKENS[:1], prompts()[:1])
    assert got == want[:1] and not any(engine.runner.replays.values())
