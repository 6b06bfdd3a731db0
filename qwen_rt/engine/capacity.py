"""Capacity: bytes a model, its scratch and its cache need, and what cache fits. Integers only, before any is spent."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_rt.backends.base import KVSpec
from qwen_rt.config import ModelConfig
from qwen_rt.errors import ConfigError, OutOfMemory
from qwen_rt.quant.formats import LinearFormat

PREFILL_TOKENS = 512  # of prompts, in one step
DEFAULT_SEQUENCE = 2048  # tokens the default cache grants each sequence of a batch beyond the first
FREE_SHARE = 0.85  # of what is free after the weights and scratch, at most this share becomes cache


def linear_bytes(shape: tuple[int, int], fmt: LinearFormat) -> int:
    """Bytes of an [N, K] weight in a format: codes, and float16 scale, zero or minimum per group."""
    n, k = shape
    if not fmt.grouped:
        return n * k * fmt.bits // 8
    per_group = 2 + (1 if fmt.has_zeros else 0) + (2 if fmt.has_mins else 0)
    return n * k * fmt.bits // 8 + n * (k // fmt.group_size) * per_group


def scratch_bytes(config: ModelConfig, prefill_tokens: int, max_batch: int) -> int:
    """Activations of the widest step and two copies of its logits, float32."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_size
    row = 4 * (6 * config.hidden_size + 2 * heads + 3 * config.ffn_size)
    return (prefill_tokens + max_batch) * row + 8 * max_batch * config.vocab_size


@dataclass(frozen=True)
class CachePlan:
    """How large a cache to make and the longest sequence it serves."""

    num_blocks: int
    max_model_len: int
    note: str = ""  # said in the report when the context had to shrink


def plan_cache(
    config: ModelConfig,
    spec: KVSpec,
    *,
    free: int,
    reserved: int,
    max_model_len: int | None,
    max_batch: int,
    kv_memory: int | None,
) -> CachePlan:
    """Size the cache: `free` bytes of the device, of which `reserved` (weights still to come, scratch) are spoken for.

    One sequence of the full context, and DEFAULT_SEQUENCE tokens for each other of the batch, or `kv_memory` bytes.
    A context that was not asked for shrinks to what fits; one that was asked for and does not fit is OutOfMemory.
    """
    if max_model_len is not None and not 2 <= max_model_len <= config.max_position:
        raise ConfigError(f"max_model_len is {max_model_len}; this model serves 2 to {config.max_position} tokens")
    block = spec.block_bytes()
    longest = max_model_len or config.max_position
    budget = int(max(free - reserved, 0) * FREE_SHARE)
    if kv_memory is not None:
        if kv_memory > max(free - reserved, 0):
            raise OutOfMemory(
                f"kv_memory asks for {size(kv_memory)}, but beside weights and scratch ({size(reserved)}) only "
                f"{size(max(free - reserved, 0))} of {size(free)} are free; ask for less"
            )
        budget = kv_memory
    fit = budget // block
    need = _blocks(longest, spec)
    extra = (max_batch - 1) * _blocks(min(DEFAULT_SEQUENCE, longest), spec)
    if fit >= need:
        return CachePlan(fit if kv_memory is not None else min(fit, need + extra), longest)
    # Only a context nobody asked for may shrink, and not to less than is of use.
    least = need if max_model_len else _blocks(2 if kv_memory is not None else min(DEFAULT_SEQUENCE, longest), spec)
    if fit < least:
        raise OutOfMemory(
            f"the model does not fit: weights and scratch need {size(reserved)} and a {spec.dtype} cache for "
            f"{least * spec.block_size} tokens {size(least * block)}, but {size(free)} are free. "
            "Free memory, lower max_model_len, or use quantize='int4', kv_cache='int8' or a smaller model"
        )
    tokens = fit * spec.block_size
    note = f"context shortened from {longest} to {tokens} tokens: that is what fits in {size(fit * block)}"
    return CachePlan(fit, tokens, note)


def _blocks(tokens: int, spec: KVSpec) -> int:
    return -(-tokens // spec.block_size)


def size(nbytes: int) -> str:
    """Bytes for people: 512 B, 1.5 MB, 3.20 GB (decimal units)."""
    if nbytes < 1e6:
        return f"{nbytes} B" if nbytes < 1e3 else f"{nbytes / 1e3:.1f} kB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:.2f} GB"
