"""Qwen-1 (1.8B, 7B, 14B, 72B): fused c_attn, dynamic NTK (see rope.py), logn attention, windows."""

from __future__ import annotations

from torch import Tensor

from qwen_rt.model.decoder import QwenModel
from qwen_rt.model.layers import MLP, Attention, DecoderLayer
from qwen_rt.model.loader import Loader
from qwen_rt.model.rope import Rope


class LognAttention(Attention):
    """Rotated queries are scaled by their logn factor once positions pass the training length."""

    def place(self, q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotate, then scale the queries."""
        q, k = super().place(q, k, rope)
        return q if rope.q_scale is None else q * rope.q_scale, k


class Qwen1Model(QwenModel):
    """HF model type `qwen` (QWenLMHeadModel)."""

    table_name = "transformer.wte"
    norm_name = "transformer.ln_f.weight"

    def layer(self, load: Loader, i: int) -> DecoderLayer:
        """Make layer `i`. The rows of c_attn are q, k, v already; w2 is the gate and w1 is up."""
        at = f"transformer.h.{i}"
        qkv, out = load.linear(f"{at}.attn.c_attn"), load.linear(f"{at}.attn.c_proj")
        return DecoderLayer(
            load.norm(f"{at}.ln_1.weight"),
            LognAttention(self.config, i, qkv, out),
            load.norm(f"{at}.ln_2.weight"),
            MLP(load.linear(f"{at}.mlp.w2", f"{at}.mlp.w1"), load.linear(f"{at}.mlp.c_proj")),
        )
