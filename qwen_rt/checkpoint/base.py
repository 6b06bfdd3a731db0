"""Checkpoint: named weights on disk (or drawn at random), read lazily, whatever the file format.

Names are those of the architecture's Hugging Face checkpoint, without the `.weight` of a linear:
`model.layers.0.self_attn.q_proj` (Qwen2/3) or `transformer.h.0.attn.c_attn` (Qwen-1) are linears, and so are the
embedding (`model.embed_tokens`, `transformer.wte`) and `lm_head`. Norm weights keep their full name
(`model.norm.weight`). Readers of other formats (GGUF) translate to these names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.config import ModelConfig
from qwen_rt.quant.formats import RawLinear


class Checkpoint(ABC):
    """Lazy access to a model's weights; opening one reads headers only and checks all of them."""

    config: ModelConfig
    source: str  # for report(): the directory or file
    metadata: dict[str, Any] | None = None  # of a GGUF file, the vocabulary included, until it is closed

    @abstractmethod
    def linears(self) -> dict[str, tuple[int, int]]:
        """Every linear's name and shape [N, K]."""

    @abstractmethod
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every other tensor's name and shape (norm weights)."""

    @abstractmethod
    def linear(self, name: str) -> RawLinear:
        """The linear `name`, its bias attached. Raises CheckpointError when absent or malformed."""

    @abstractmethod
    def tensor(self, name: str) -> NDArray[np.float32]:
        """The tensor `name` as float32. Raises CheckpointError when absent or not finite."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of weights on disk, for progress and plans."""

    def close(self) -> None:  # noqa: B027
        """Release files and maps; RawLinears handed out must not be read afterwards."""
