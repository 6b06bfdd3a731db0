"""Qwen-1 (1.8B, 7B, 14B, 72B): fused c_attn, dynamic NTK and logn factors (see rope.py), windows."""

from __future__ import annotations

from qwen_rt.model.decoder import QwenModel
from qwen_rt.model.layers import MLP, Attention, DecoderLayer
from qwen_rt.model.loader import Loader


class Qwen1Model(QwenModel):
    """HF model type `qwen` (QWenLMHeadModel)."""

    table_name = "transformer.wte"
    norm_name = "transformer.ln_f.weight"

    def layer(self, load: Loader, i: int) -> DecoderLayer:
        """Make layer `i`. The rows of c_attn are q, k, v already; w2 is the gate and w1 is up."""
        at = f"transformer.h.{i}"
        qkv = load.qkv(f"{at}.attn.c_attn", norm=f"{at}.ln_1.weight")
        out = load.linear(f"{at}.attn.c_proj")
        return DecoderLayer(
            load.norm(f"{at}.ln_1.weight"),
            Attention(self.config, i, qkv, out),
            load.norm(f"{at}.ln_2.weight"),
            MLP(load.linear(f"{at}.mlp.w2", f"{at}.mlp.w1"), load.linear(f"{at}.mlp.c_proj")),
        )
