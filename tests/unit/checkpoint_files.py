"""Tiny models as files, for the tests of the checkpoint readers and converters."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_rt.backends.torch_backend import to_host
from qwen_rt.checkpoint.layout import expected_shapes
from qwen_rt.config import ModelConfig
from qwen_rt.quant.formats import Array

HF_CONFIGS: dict[str, dict[str, Any]] = {
    "qwen": {
        "model_type": "qwen",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "kv_channels": 16,
        "intermediate_size": 192,
        "seq_length": 32,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        "model_type": "qwen2",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
    },
}


def random_state(config: dict[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with every tensor that `config` asks for."""
    draw = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(ModelConfig.from_hf(config))
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """`path`, made, with this config.json."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_model(path: Path, config: dict[str, Any], state: dict[str, Tensor], shards: int = 1) -> Path:
    """A model directory of safetensors files, with an index when there are several."""
    write_config(path, config)
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return path
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    places = {name: files[i % shards] for i, name in enumerate(state)}
    for file in files:
        save_file({n: t for n, t in state.items() if places[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header (JSON value, or raw bytes)."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def same(got: Array | None, want: Array | Tensor) -> bool:
    """True when `got` has the dtype, the shape and the values of `want`."""
    if isinstance(want, Tensor):
        want = to_host(want)
    return got is not None and got.dtype == want.dtype and np.array_equal(got, want)
