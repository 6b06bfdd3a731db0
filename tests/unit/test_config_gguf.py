"""GGUF metadata -> ModelConfig."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qwen_rt.config import ModelConfig
from qwen_rt.errors import ConfigError


def metadata(arch: str = "qwen2", **changes: Any) -> dict[str, Any]:
    """Metadata as converters write them; keys of `changes` are given without the architecture, '_' for '.' inside."""
    own = {
        "block_count": 4,
        "context_length": 32768,
        "embedding_length": 896,
        "feed_forward_length": 4864,
        "attention.head_count": 14,
        "attention.head_count_kv": 2,
        "rope.freq_base": 1000000.0,
        "attention.layer_norm_rms_epsilon": 9.999999974752427e-07,
    }
    data: dict[str, Any] = {f"{arch}.{k}": v for k, v in own.items()}
    data |= {"general.architecture": arch, "general.file_type": 15}
    data |= {"tokenizer.ggml.eos_token_id": 151645, "tokenizer.ggml.bos_token_id": 151643}
    data |= {"qwen_rt.vocab_size": 151936, "qwen_rt.has_output": False}
    data |= {k if "." in k and k.split(".")[0] in ("general", "qwen_rt", "tokenizer") else f"{arch}.{k}": v
             for k, v in changes.items()}  # fmt: skip
    return {k: v for k, v in data.items() if v is not None}


def test_qwen2() -> None:
    c = ModelConfig.from_gguf(metadata())
    assert (c.arch, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_size) == ("qwen2", 896, 14, 2, 64)
    assert (c.ffn_size, c.vocab_size, c.tied_head, c.qkv_bias, c.qk_norm) == (4864, 151936, True, True, False)
    assert (c.eos_ids, c.bos_id, c.max_position, c.rope_theta, c.yarn) == ((151645,), 151643, 32768, 1e6, None)
    assert c.dtype == "bfloat16"
    assert not ModelConfig.from_gguf(metadata(**{"qwen_rt.has_output": True})).tied_head
    assert ModelConfig.from_gguf(metadata(**{"general.file_type": 0})).dtype == "float32"
    eot = {"tokenizer.ggml.eos_token_id": 151643, "tokenizer.ggml.eot_token_id": 151645}
    assert ModelConfig.from_gguf(metadata(**eot)).eos_ids == (151643, 151645)


def test_qwen3_head_size_is_its_own() -> None:
    c = ModelConfig.from_gguf(
        metadata("qwen3", **{"attention.key_length": 128, "attention.value_length": 128, "embedding_length": 1024})
    )
    assert (c.head_size, c.qk_norm, c.qkv_bias, c.rotary_size) == (128, True, False, 128)


def test_qwen1_feed_forward_is_twice_the_width() -> None:
    changes = {"attention.head_count_kv": None, "feed_forward_length": 11008, "embedding_length": 2048}
    c = ModelConfig.from_gguf(metadata("qwen", **changes, **{"attention.head_count": 16, "rope.freq_base": None}))
    assert (c.arch, c.ffn_size, c.num_kv_heads, c.head_size, c.rope_theta) == ("qwen", 5504, 16, 128, 10000.0)
    assert c.qkv_bias and not c.dynamic_ntk


def test_yarn() -> None:
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8192}
    yarn = ModelConfig.from_gguf(metadata(**keys)).yarn
    assert yarn is not None and (yarn.factor, yarn.original_max_position, yarn.attention_factor) == (4.0, 8192, None)
    yarn = ModelConfig.from_gguf(metadata(**keys, **{"rope.scaling.attn_factor": 1.5})).yarn
    assert yarn is not None and yarn.attention_factor == pytest.approx(1.5 * (0.1 * math.log(4) + 1))
    assert ModelConfig.from_gguf(metadata(**{"rope.scaling.type": "none"})).yarn is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "llama"}, "'llama' is not supported; supported:"),
        ({"general.architecture": "qwen2moe"}, "qwen2moe"),
        ({"general.architecture": None}, "general.architecture is missing"),
        ({"block_count": None}, "qwen2.block_count is missing"),
        ({"block_count": 1 << 40}, "qwen2.block_count"),
        ({"embedding_length": "896"}, "qwen2.embedding_length"),
        ({"attention.head_count": 0}, "head_count"),
        ({"attention.head_count": 13}, "head size"),
        ({"attention.head_count_kv": 4}, "cannot share"),
        ({"attention.key_length": 64, "attention.value_length": 32}, "differs from key_length"),
        ({"rope.dimension_count": 128}, "rotated dims"),
        ({"rope.freq_base": math.nan}, "freq_base"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "'linear' is not supported"),
        ({"qwen_rt.vocab_size": 0}, "vocab_size"),
        ({"tokenizer.ggml.eos_token_id": -5}, "eos_token_id"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        ModelConfig.from_gguf(metadata(**changes))
    assert words in str(e.value)
