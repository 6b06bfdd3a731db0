"""The configuration that tiny models of tests are made of, by dataclasses.replace."""

from __future__ import annotations

from qwen_rt.config import ModelConfig

TINY = ModelConfig(
    arch="qwen2",
    vocab_size=97,
    hidden_size=32,
    ffn_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    norm_eps=1e-6,
    rope_theta=10000.0,
    rotary_size=8,
    max_position=512,
    train_length=512,
    tied_head=False,
    dtype="float32",
)
