"""The full steps of published models on meta tensors, through the schemas and shape functions of the wheel: prefill and
decode, bfloat16 and Int4, whole and as tensor-parallel shards. In seconds, and without a byte of weights."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_rt.backends.ascend import linear
from qwen_rt.backends.ascend.backend import AscendBackend
from qwen_rt.backends.ascend.cache import BLOCK
from qwen_rt.backends.ascend.soc import soc_of
from qwen_rt.backends.base import BatchMeta, KVSpec
from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.config import ModelConfig, QuantConfig
from qwen_rt.model import build
from qwen_rt.quant.formats import RawLinear


class MetaBackend(AscendBackend):
    """The backend with every tensor on torch's meta device."""

    def _open(self, index: int) -> None:
        self.npu = importlib.import_module("torch_npu")
        self.runtime = self.npu.npu
        self.device = torch.device("meta")
        self.soc = soc_of("Ascend910B3")

    def memory(self) -> tuple[int, int]:
        return 1 << 60, 1 << 60

    def pack_linear(self, raw: RawLinear) -> Any:
        return linear.empty(raw, self.device, self.compute_dtype, True)


class Calls(TorchDispatchMode):
    """Names of npu operators, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


def published(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, **more: Any) -> ModelConfig:
    return ModelConfig(
        arch="qwen2", vocab_size=vocab, hidden_size=hidden, ffn_size=ffn, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads, head_size=128, norm_eps=1e-6, rope_theta=1e6, rotary_size=128, max_position=32768,
        train_length=32768, qkv_bias=True, dtype="bfloat16", **more,
    )  # fmt: skip


MODELS = {
    "Qwen2.5-7B": published(3584, 28, 28, 4, 18944, 152064),
    "Qwen2.5-14B": published(5120, 48, 40, 8, 13824, 152064),
    "Qwen2.5-72B": published(8192, 80, 64, 8, 29568, 152064),
    "Qwen-7B": replace(published(4096, 32, 32, 32, 11008, 151936), arch="qwen", logn=True, train_length=8192),
    "Qwen-14B": replace(published(5120, 40, 40, 40, 13696, 152064), arch="qwen", logn=True, train_length=2048),
    "Qwen-72B": replace(published(8192, 80, 64, 64, 24576, 152064), arch="qwen"),
}
INT4 = QuantConfig("gptq", 4, 128, symmetric=True, act_order=False)


def shard(config: ModelConfig, ways: int) -> ModelConfig:
    """What one of `ways` devices computes: its heads and its part of the MLP, over the whole hidden size."""
    return replace(
        config,
        num_heads=config.num_heads // ways,
        num_kv_heads=max(1, config.num_kv_heads // ways),
        ffn_size=config.ffn_size // ways,
    )


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ways", [1, 4])
@pytest.mark.parametrize("quant", [None, INT4], ids=["bfloat16", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_step(name: str, quant: QuantConfig | None, ways: int) -> None:
    config = shard(MODELS[name], ways)
    group = 128
    if quant is not None and (config.ffn_size % group or config.num_heads * 128 % group):
        group = 32  # a shard's inputs must be whole groups
        quant = replace(quant, group_size=group)
    backend = MetaBackend(0, "bfloat16")
    checkpoint = RandomCheckpoint(config, quant)
    model = build(checkpoint, backend)
    for kv_dtype in ("bfloat16", "int8"):
        kv = backend.alloc_kv(KVSpec(config.num_layers, config.num_kv_heads, 128, BLOCK, kv_dtype), 64)  # type: ignore[arg-type]
        for q_lens, kv_lens in (([300, 5], [300, 5]), ([1, 1, 1], [4000, 129, 7]), ([1, 200], [1000, 700])):
            tables = [list(range(10 * b, 10 * b + -(-n // BLOCK))) if n < 1200 else list(range(32, 64))
                      for b, n in enumerate(kv_lens)]  # fmt: skip
            slots = [t[p // BLOCK] * BLOCK + p % BLOCK
                     for t, q, n in zip(tables, q_lens, kv_lens, strict=True) for p in range(n - q, n)]  # fmt: skip
            meta = BatchMeta(q_lens, kv_lens, tables, slots)
            with Calls() as calls:
                rope = model.rope_rows(meta.positions(), [1.0] * len(slots))
                ids = torch.empty(len(slots), dtype=torch.int64, device="meta")
                hidden = model.forward(ids, backend.plan(meta), rope, kv)
                logits = model.logits(hidden[-len(q_lens) :])
            assert logits.shape == (len(q_lens), config.vocab_size) and logits.dtype == torch.float32
            assert hidden.shape == (len(slots), config.hidden_size) and hidden.dtype == torch.bfloat16
            mixed = kv_dtype == "int8" and {1} < {min(q, 2) for q in q_lens}
            want = {
                "npu_fused_infer_attention_score": config.num_layers * (2 if mixed else 1),
                "npu_scatter_pa_kv_cache": config.num_layers,
                "npu_swiglu": config.num_layers,
                "npu_rotary_mul": config.num_layers,
                "npu_add_rms_norm": 2 * config.num_layers,
                "npu_weight_quant_batchmatmul": 0 if quant is None else 4 * config.num_layers,
            }
            assert {key: calls.names.count(key) for key in want} == want


def test_a_wrong_call_is_refused() -> None:
    """The schemas are the wheel's, and do refuse: names and types."""
    npu = importlib.import_module("torch_npu")
    x = torch.empty(2, 256, dtype=torch.float16, device="meta")
    w = torch.empty(64, 256 // 8, dtype=torch.int32, device="meta").t()
    scale = torch.empty(2, 64, dtype=torch.float16, device="meta")
    assert npu.npu_weight_quant_batchmatmul(x, w, scale, antiquant_group_size=128).shape == (2, 64)
    with pytest.raises(Exception, match="group_size"):
        npu.npu_weight_quant_batchmatmul(x, w, scale, group_size=128)
    with pytest.raises(Exception, match="antiquant_group_size"):
        npu.npu_weight_quant_batchmatmul(x, w, scale, antiquant_group_size="128")
    with pytest.raises(Exception, match="dims"):
        npu.npu_swiglu(x, dims=-1)
