"""A tiny Qwen-1 model on disk: random weights, a vocabulary of single bytes, the original's control tokens."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_config import TINY

from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.convert import to_hf

CONFIG = replace(
    TINY,
    arch="qwen",
    vocab_size=480,  # 464 tokens: 256 bytes and 208 control tokens; the rest is padding
    num_kv_heads=4,
    max_position=32768,
    train_length=64,
    dynamic_ntk=True,
    logn=True,
)
END, IM_START, IM_END, PAD = 256, 257, 258, 259  # <|endoftext|>, <|im_start|>, <|im_end|>, <|extra_0|>


def write_model(path: Path, generation: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write the model to `path` (which must not exist), with `changes` of its configuration."""
    to_hf(RandomCheckpoint(replace(CONFIG, **changes)), path)
    lines = (base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (path / "qwen.tiktoken").write_bytes(b"".join(lines))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path
