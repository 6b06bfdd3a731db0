"""RandomCheckpoint: complete, deterministic however rows are cut, and of sane scale."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from checkpoint_files import HF_CONFIGS, same

from qwen_rt.checkpoint import model_names, verify_names
from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.config import ModelConfig, QuantConfig
from qwen_rt.errors import CheckpointError
from qwen_rt.quant.formats import LinearFormat

QUANTS = [
    None,
    QuantConfig("gptq", 4, 32, symmetric=True, act_order=False),
    QuantConfig("gptq", 8, -1, symmetric=False, act_order=True),
    QuantConfig("awq", 4, 128, symmetric=False, act_order=False, zero_offset=0),
]


def config(arch: str, **changes: object) -> ModelConfig:
    return replace(ModelConfig.from_hf(HF_CONFIGS[arch]), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("arch", ["qwen", "qwen2", "qwen3"])
def test_complete_and_deterministic(arch: str, quant: QuantConfig | None) -> None:
    checkpoint, again, other = (RandomCheckpoint(config(arch), quant, seed=s) for s in (1, 1, 2))
    verify_names(checkpoint, *model_names(checkpoint.config))
    assert checkpoint.config.quant == quant
    seen = []
    for name, (n, k) in checkpoint.linears().items():
        raw = checkpoint.linear(name)
        whole = raw.dequantize()
        assert whole.shape == (n, k)
        pieces = np.concatenate([raw.dequantize(a, min(a + 7, n)) for a in range(0, n, 7)])
        assert same(whole, pieces)
        assert same(whole, again.linear(name).dequantize())
        assert not same(whole, other.linear(name).dequantize())
        assert 0.8 < whole.std() * k**0.5 < 1.25
        assert not any(same(whole, w) for w in seen)
        seen.append(whole)
        grouped = quant is not None and (".h." in name or ".layers." in name)
        assert raw.format.grouped == grouped
        wants_bias = arch != "qwen3" and name.endswith((".c_attn", "q_proj", "k_proj", "v_proj"))
        assert (raw.bias is not None) == wants_bias
        if grouped and quant is not None and quant.act_order:
            assert raw.perm is not None and same(np.sort(raw.perm), np.arange(k, dtype=np.int32))
    for name, shape in checkpoint.tensors().items():
        tensor = checkpoint.tensor(name)
        assert tensor.shape == shape and tensor.dtype == np.float32 and 0.5 < tensor.mean() < 1.5


def test_formats() -> None:
    def formats(quant: QuantConfig, width: int = 96) -> LinearFormat:
        return RandomCheckpoint(config("qwen2", ffn_size=width), quant).linear("model.layers.0.mlp.down_proj").format

    assert formats(QUANTS[1]) == LinearFormat(4, 32)  # type: ignore[arg-type]
    assert formats(QUANTS[2]) == LinearFormat(8, 96, has_zeros=True)  # type: ignore[arg-type]
    assert formats(QUANTS[2], 1024) == LinearFormat(8, 128, has_zeros=True)  # type: ignore[arg-type]
    assert formats(QUANTS[3], 160) == LinearFormat(4, 32, has_zeros=True)  # type: ignore[arg-type]


def test_sizes_and_speed_of_a_large_model() -> None:
    quant = QuantConfig("gptq", 4, 128, symmetric=True, act_order=False)
    big = config(
        "qwen", vocab_size=152064, hidden_size=8192, ffn_size=24576, num_layers=80, num_heads=64, num_kv_heads=64,
        head_size=128, rotary_size=128,
    )  # fmt: skip
    start = time.perf_counter()
    checkpoint = RandomCheckpoint(big, quant)
    assert 40e9 < checkpoint.nbytes() < 43e9  # Qwen-72B-Chat-Int4 is published as 41 GB
    raw = checkpoint.linear("transformer.h.79.mlp.w1")
    assert raw.rows(24000, 24512).codes.shape == (512, 8192)  # type: ignore[union-attr]
    assert checkpoint.linear("lm_head").rows(152000, 152064).values.dtype.name == "bfloat16"  # type: ignore[union-attr]
    assert time.perf_counter() - start < 10


def test_unknown_names() -> None:
    checkpoint = RandomCheckpoint(config("qwen2"))
    with pytest.raises(CheckpointError, match="no linear named nope"):
        checkpoint.linear("nope")
    with pytest.raises(CheckpointError, match="no tensor named nope"):
        checkpoint.tensor("nope")
