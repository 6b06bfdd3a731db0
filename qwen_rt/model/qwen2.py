"""Qwen1.5, Qwen2 and Qwen2.5: separate q, k, v with biases, grouped-query attention, YaRN, sliding windows."""

from __future__ import annotations

from qwen_rt.model.decoder import QwenModel
from qwen_rt.model.layers import MLP, Attention, DecoderLayer
from qwen_rt.model.loader import Loader


class Qwen2Model(QwenModel):
    """HF model type `qwen2`."""

    table_name = "model.embed_tokens"
    norm_name = "model.norm.weight"

    def layer(self, load: Loader, i: int) -> DecoderLayer:
        """Make layer `i`."""
        at = f"model.layers.{i}"
        return DecoderLayer(
            load.norm(f"{at}.input_layernorm.weight"),
            self.attention(load, i, f"{at}.self_attn"),
            load.norm(f"{at}.post_attention_layernorm.weight"),
            MLP(load.linear(f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"), load.linear(f"{at}.mlp.down_proj")),
        )

    def attention(self, load: Loader, i: int, at: str) -> Attention:
        """The attention of layer `i`, whose weights are under `at`."""
        qkv = load.qkv(*(f"{at}.{x}_proj" for x in "qkv"), norm=f"model.layers.{i}.input_layernorm.weight")
        return Attention(self.config, i, qkv, load.linear(f"{at}.o_proj"))
