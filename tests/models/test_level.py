"""Levelled keys: the same model, whose keys an 8-bit cache holds well."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from harness import Driver, assert_close, run_logits
from test_build import CONFIG, IDS, MemoryCheckpoint

from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.model import build
from qwen_rt.model.level import exponents

QWEN1 = dataclasses.replace(CONFIG, arch="qwen", num_kv_heads=CONFIG.num_heads)
CONFIGS = {
    "qwen1": QWEN1,
    "qwen1-part-rotated": dataclasses.replace(QWEN1, rotary_size=8),
    "qwen2": CONFIG,
    "qwen3": dataclasses.replace(CONFIG, arch="qwen3", qk_norm=True),
}


def with_outliers(config, formats=None):
    """A checkpoint with a pair of key channels, the slowest to turn, far above the rest."""
    checkpoint = MemoryCheckpoint(config, formats)
    rows, slow = config.num_heads * config.head_size, config.rotary_size // 2 - 1
    for name, t in checkpoint.weights.items():
        if name.endswith("c_attn.bias"):
            t[rows + slow] = 300.0
        if name.endswith("k_proj.bias"):
            t[slow] = 300.0
        if name.endswith("k_norm.weight"):
            t[slow], t[2 * slow + 1] = 200.0, 300.0
        if name.endswith("q_norm.weight"):
            t[slow] = t[2 * slow + 1] = 1 / 300
    return checkpoint


@pytest.mark.parametrize(
    "formats",
    [{}, {"_proj": 8, "c_attn": 8}, {"q_proj": 4, "k_proj": "float16", "c_attn": 4}],
    ids=["dense", "int8", "mixed"],
)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_model_is_the_same(config, formats):
    checkpoint = with_outliers(CONFIGS[config], formats)
    plain, level = (build(checkpoint, ReferenceBackend(), level_keys=on) for on in (False, True))
    qkv = (m.layers[0].attention.qkv.parts[0] for m in (plain, level))
    if config != "qwen3":
        assert not torch.equal(*(p.bias for p in qkv))
    assert_close(run_logits(level, IDS), run_logits(plain, IDS), 1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_int8_cache_holds_outliers(config):
    checkpoint = with_outliers(CONFIGS[config])
    exact = run_logits(build(checkpoint, ReferenceBackend()), IDS)
    errors = []
    for on in (False, True):
        driver = Driver(build(checkpoint, ReferenceBackend(), level_keys=on), kv_dtype="int8")
        errors.append(float((driver.step([(driver.begin(IDS), IDS)])[0] - exact).std() / exact.std()))
    assert errors[1] < errors[0] / 2


def test_exponents_keep_pairs_together_and_within_bounds():
    size = np.array([[1.0, 64.0, 1.0, 2.0, 1e-30, 5.0], [0.0] * 6], np.float32)
    e = exponents(size, 2)
    assert np.array_equal(e[:, :2], e[:, 2:4])
    assert np.abs(e).max() <= 4 and e[0, 1] < e[0, 0] and np.array_equal(e, np.rint(e))
    assert not e[1].any()
