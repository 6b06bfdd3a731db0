"""Qwen3, dense: Qwen2 with each query and key head normalised before it is rotated."""

from __future__ import annotations

from qwen_rt.backends.base import Tensor
from qwen_rt.config import ModelConfig
from qwen_rt.model.layers import Attention, Linear, RMSNorm
from qwen_rt.model.loader import Loader
from qwen_rt.model.qwen2 import Qwen2Model


class NormedAttention(Attention):
    """RMSNorm over D of every head of q and k, then RoPE."""

    def __init__(
        self, config: ModelConfig, layer: int, qkv: Linear, out: Linear, q_norm: RMSNorm, k_norm: RMSNorm
    ) -> None:
        super().__init__(config, layer, qkv, out)
        self.q_norm = q_norm
        self.k_norm = k_norm

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise."""
        return self.q_norm(q)[0], self.k_norm(k)[0]


class Qwen3Model(Qwen2Model):
    """HF model type `qwen3`."""

    def attention(self, load: Loader, i: int, at: str) -> Attention:
        """The attention of layer `i`, whose weights are under `at`."""
        qkv = load.linear(*(f"{at}.{x}_proj" for x in "qkv"))
        norms = load.qk_norms(f"{at}.q_norm.weight", f"{at}.k_norm.weight")
        return NormedAttention(self.config, i, qkv, load.linear(f"{at}.o_proj"), *norms)
