"""An independent Qwen-1 in float64 numpy: one sequence, a call per step, a growing cache; nothing of qwen_rt in it.

It reads the raw config.json fields and the checkpoint's own tensor names, and computes in the plainest way.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray


class Qwen1Oracle:
    """Weights by name, and the config fields of a Qwen-1 checkpoint (later field names)."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Array]) -> None:
        self.w = {name: np.asarray(x, dtype=np.float64) for name, x in weights.items()}
        self.config = config
        self.num_layers = config["num_hidden_layers"]
        self.num_heads = config["num_attention_heads"]
        self.head = config["kv_channels"]
        self.rotated = int(self.head * config.get("rotary_pct", 1.0))
        self.seq_length = config["seq_length"]
        windows = config.get("window_size")
        self.windows = windows if isinstance(windows, list) else [windows] * self.num_layers

    def start(self, prompt_len: int) -> None:
        """Forget the cache; fix the sequence's alpha from the length of its prefill."""
        self.cache: list[tuple[Array, Array]] = [
            (np.zeros((0, self.num_heads, self.head)), np.zeros((0, self.num_heads, self.head)))
            for _ in range(self.num_layers)
        ]
        self.alpha = 1.0
        if self.config["use_dynamic_ntk"]:
            self.alpha = float(max(2 ** math.ceil(math.log(prompt_len / self.seq_length, 2) + 1) - 1, 1))

    def run(self, prompt: list[int], decoded: list[int]) -> Array:
        """Prefill `prompt`, then feed `decoded` one at a time: logits [len(prompt) + len(decoded), V]."""
        self.start(len(prompt))
        return np.concatenate([self.step(prompt), *(self.step([t]) for t in decoded)])

    def step(self, ids: list[int]) -> Array:
        """Logits [len(ids), V] of the sequence's next tokens."""
        x = self.w["transformer.wte.weight"][ids]
        for i in range(self.num_layers):
            at = f"transformer.h.{i}"
            x = x + self.attention(i, self.norm(x, f"{at}.ln_1.weight"))
            y = self.norm(x, f"{at}.ln_2.weight")
            gate = self.times(y, f"{at}.mlp.w2")
            x = x + self.times(self.times(y, f"{at}.mlp.w1") * gate / (1 + np.exp(-gate)), f"{at}.mlp.c_proj")
        return self.norm(x, "transformer.ln_f.weight") @ self.w["lm_head.weight"].T

    def attention(self, layer: int, x: Array) -> Array:
        at, n = f"transformer.h.{layer}.attn", len(x)
        qkv = self.times(x, f"{at}.c_attn") + self.w[f"{at}.c_attn.bias"]
        q, k, v = (part.reshape(n, self.num_heads, self.head) for part in np.split(qkv, 3, axis=1))
        past = len(self.cache[layer][0])
        q, k = (np.stack([self.rotate(row, past + i) for i, row in enumerate(part)]) for part in (q, k))
        k, v = (np.concatenate([old, new]) for old, new in zip(self.cache[layer], (k, v), strict=True))
        self.cache[layer] = (k, v)
        if self.config["use_logn_attn"] and len(k) > self.seq_length:
            table = [math.log(i, self.seq_length) if i > self.seq_length else 1.0 for i in range(1, 32768)]
            q = q * np.array(table[past : past + n])[:, None, None]
        out = np.zeros_like(q)
        for i in range(n):
            first = max(0, past + i + 1 - self.windows[layer]) if self.windows[layer] else 0
            keys, values = k[first : past + i + 1], v[first : past + i + 1]
            scores = np.einsum("hd,khd->hk", q[i], keys) / math.sqrt(self.head)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[i] = np.einsum("hk,khd->hd", p / p.sum(-1, keepdims=True), values)
        return self.times(out.reshape(n, -1), f"{at}.c_proj")

    def rotate(self, heads: Array, pos: int) -> Array:
        """[heads, D] at `pos`: each pair (i, i + half) turned as a complex number."""
        d = self.rotated
        base = self.config["rotary_emb_base"] * self.alpha ** (d / (d - 2))
        turn = np.exp(1j * pos * base ** (-np.arange(0, d, 2) / d))
        z = (heads[:, : d // 2] + 1j * heads[:, d // 2 : d]) * turn
        return np.concatenate([z.real, z.imag, heads[:, d:]], axis=1)

    def norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["layer_norm_epsilon"]) * self.w[name]

    def times(self, x: Array, name: str) -> Array:
        return x @ self.w[f"{name}.weight"].T
