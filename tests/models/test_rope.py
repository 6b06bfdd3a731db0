"""Frequencies and tables of positions against transformers, and the NTK alpha."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

from qwen_rt.backends.null import NullBackend
from qwen_rt.config import ModelConfig
from qwen_rt.model import ntk_alpha
from qwen_rt.model.rope import RotaryTables, inverse_frequencies

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize(
    "scaling", [{"rope_type": "default"}, YARN, YARN | {"attention_factor": 1.5, "beta_fast": 8.0}]
)
@pytest.mark.parametrize("head", [64, 128])
def test_tables_equal_transformers_up_to_32k(theta, scaling, head):
    """Both work in float32: the same angles, so cos and sin agree to rounding even far out."""
    hf = Qwen2Config(
        hidden_size=head * 2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    config = ModelConfig.from_hf(hf.to_dict())
    positions = [0, 1, 2, 299, 2047, 2048, 8191, 20000, 32767]
    got = RotaryTables(config, NullBackend()).rows(positions, [1.0] * len(positions))
    cos, sin = Qwen2RotaryEmbedding(hf)(torch.zeros(1), torch.tensor([positions]))
    r = head // 2
    torch.testing.assert_close(torch.from_numpy(got.cos), cos[0, :, :r], rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.from_numpy(got.sin), sin[0, :, :r], rtol=0, atol=2e-6)
    assert got.q_scale is None


def qwen1(**more) -> ModelConfig:
    shape = {"vocab_size": 8, "hidden_size": 64, "ffn_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1}
    rope = {"head_size": 64, "rotary_size": 64, "rope_theta": 10000.0, "max_position": 32768, "train_length": 2048}
    return ModelConfig(arch="qwen", norm_eps=1e-6, **shape | rope | {"dynamic_ntk": True, "logn": True} | more)


@pytest.mark.parametrize(
    ("length", "alpha"),
    [(1, 1), (2048, 1), (2049, 3), (4096, 3), (4097, 7), (8192, 7), (8193, 15), (16384, 15), (16385, 31)],
)
def test_ntk_alpha(length, alpha):
    """2^ceil(log2(n / seq_length) + 1) - 1, at least 1; 1 when the model has no dynamic NTK."""
    assert ntk_alpha(qwen1(), length) == alpha
    assert ntk_alpha(qwen1(dynamic_ntk=False), length) == 1.0


def test_alpha_stretches_the_slow_frequencies():
    """The fastest frequency stays 1; the slowest falls by alpha (base' = base * alpha^(d/(d-2)))."""
    plain, stretched = inverse_frequencies(qwen1()), inverse_frequencies(qwen1(), 3.0)
    assert plain[0] == stretched[0] == 1.0
    assert float(plain[-1] / stretched[-1]) == pytest.approx(3.0, rel=1e-5)


def test_rows_of_mixed_alphas_are_those_of_each_alone():
    """One step, several alphas and positions beyond the first table."""
    tables = RotaryTables(qwen1(), NullBackend())
    positions, alphas = [5, 3000, 5, 9000, 0], [1.0, 3.0, 3.0, 7.0, 1.0]
    mixed = tables.rows(positions, alphas)
    for i, (pos, alpha) in enumerate(zip(positions, alphas, strict=True)):
        alone = tables.rows([pos], [alpha])
        assert np.array_equal(mixed.cos[i], alone.cos[0]) and np.array_equal(mixed.sin[i], alone.sin[0])
        scale = 1.0 if alone.q_scale is None else alone.q_scale.item()
        assert mixed.q_scale[i].item() == scale and (scale > 1) == (pos >= 2048)
    assert not np.array_equal(mixed.cos[0], mixed.cos[2])
