"""ModelConfig: what a model *is*, read from a HF config.json or GGUF metadata; and Settings, the environment.

This is the only module that reads os.environ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Arch = Literal["qwen", "qwen2", "qwen3"]


@dataclass(frozen=True)
class Yarn:
    """YaRN rope scaling (Peng et al. 2023, arXiv:2309.00071), as in HF `rope_scaling`."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 * ln(factor) + 1


@dataclass(frozen=True)
class QuantConfig:
    """How a checkpoint's linears are stored (GPTQ: AutoGPTQ v1/v2; AWQ: the GEMM layout)."""

    method: Literal["gptq", "awq"]
    bits: Literal[4, 8]
    group_size: int  # -1: one group per column
    symmetric: bool
    act_order: bool  # "desc_act"; g_idx decides, this is only what the config says
    zero_offset: int = 1  # stored zero point is (zero - zero_offset): 1 for AutoGPTQ v1, 0 for v2 and AWQ


@dataclass(frozen=True)
class ModelConfig:
    """Everything the graph needs to know about a model; no device, no dtype of computation."""

    arch: Arch
    vocab_size: int  # rows of the embedding (padded), e.g. 151936
    hidden_size: int
    ffn_size: int  # true FFN width; for Qwen-1 half of its `intermediate_size`
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float
    rope_theta: float
    rotary_size: int  # rotated dims of the head, = head_size unless rotary_pct < 1
    max_position: int  # longest sequence the model is declared for
    train_length: int  # Qwen-1 `seq_length`: where dynamic NTK and logn begin; = max_position elsewhere
    dynamic_ntk: bool = False
    logn: bool = False
    yarn: Yarn | None = None
    windows: tuple[int | None, ...] = ()  # per layer: number of keys visible, own included; None = all; () = all None
    qkv_bias: bool = True
    qk_norm: bool = False  # Qwen3
    tied_head: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"  # the checkpoint's own float dtype
    quant: QuantConfig | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """Number of keys layer `layer` may see (its own position included), or None for all."""
        return self.windows[layer] if self.windows else None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read a HF `config.json` dict (model_type qwen, qwen2, qwen3). Raises ConfigError."""
        raise NotImplementedError

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> ModelConfig:
        """Read GGUF metadata (general.architecture qwen, qwen2, qwen3). Raises ConfigError."""
        raise NotImplementedError
