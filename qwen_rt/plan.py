"""Memory of a model before anything is loaded: weights by part, KV cache, scratch, and the cards they fit on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from qwen_rt.backends.base import KVDtype, KVSpec
from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.checkpoint.layout import expected_shapes
from qwen_rt.config import ModelConfig
from qwen_rt.engine.capacity import PREFILL_TOKENS, linear_bytes, scratch_bytes
from qwen_rt.errors import ConfigError
from qwen_rt.quant.formats import WEIGHT_BITS, LinearFormat, WeightBits, dense_format
from qwen_rt.quant.packing import MAX_GROUP, fit_group
from qwen_rt.quant.rtn import recipe

USABLE = 0.9  # share of a device's memory counted on; the rest is the driver's, the framework's and fragmentation's
GIB = 1 << 30

CARDS: dict[str, int] = {
    "NVIDIA T4": 16 * GIB,
    "NVIDIA RTX 4090": 24 * GIB,
    "NVIDIA V100": 32 * GIB,
    "NVIDIA A100 / H100": 80 * GIB,
    "NVIDIA H200": 141 * 10**9,
    "Ascend 910A": 32 * GIB,
    "Ascend 910B": 64 * GIB,
    "Hygon DCU Z100L": 32 * GIB,
    "Hygon DCU K100-AI": 64 * GIB,
}
"""Memory of well-known cards, bytes (the largest common version of each)."""


@dataclass(frozen=True)
class Part:
    """One part of the weights."""

    name: Literal["embedding", "layers", "head"]
    nbytes: int
    formats: tuple[str, ...]  # of its matrices, the one with most bytes first


@dataclass(frozen=True)
class Plan:
    """Bytes a model needs. Counts are exact for the packed weights of a checkpoint up to a backend's padding."""

    parts: tuple[Part, ...]
    kv_dtype: KVDtype
    kv_token_bytes: int  # one token of one sequence, all layers
    scratch: int
    max_model_len: int
    batch: int

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(p.nbytes for p in self.parts)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the cache when each sequence of the batch is `tokens` long."""
        return self.kv_token_bytes * tokens * self.batch

    @property
    def total(self) -> int:
        """Bytes with the cache full: every sequence max_model_len long."""
        return self.weights + self.scratch + self.kv_bytes(self.max_model_len)

    def longest(self, memory: int) -> int:
        """Tokens each sequence may have on a device of `memory` bytes (at most max_model_len); 0: it does not fit."""
        room = int(memory * USABLE) - self.weights - self.scratch
        return max(0, min(self.max_model_len, room // (self.kv_token_bytes * self.batch)))


def plan_memory(
    config: ModelConfig,
    *,
    quantize: Literal["int8", "int4"] | None = None,
    dtype: str | None = None,
    kv_dtype: KVDtype = "float16",
    max_model_len: int | None = None,
    batch: int = 1,
    checkpoint: Checkpoint | None = None,
    weight_bits: Sequence[int] = WEIGHT_BITS,
    tables_in_files: bool = False,
) -> Plan:
    """What a model of this configuration needs; formats come from `checkpoint` when given (headers only are read).

    quantize and dtype as in load(): they change what is stored wider. weight_bits and tables_in_files: the device's
    Caps; all widths, and everything held, when no device is meant. ConfigError on a value out of range.
    """
    if quantize not in (None, "int8", "int4") or dtype not in (None, "float32", "float16", "bfloat16"):
        raise ConfigError(f"quantize={quantize!r}, dtype={dtype!r}: use int8 or int4; float32, float16 or bfloat16")
    longest = config.max_position if max_model_len is None else max_model_len
    if batch < 1 or not 1 <= longest <= config.max_position:
        raise ConfigError(
            f"batch {batch}, max_model_len {longest}: use at least 1, and up to {config.max_position} tokens"
        )
    sizes: dict[str, dict[str, int]] = {"embedding": {}, "layers": {}, "head": {}}
    for name, shape in expected_shapes(config).items():
        module, kind = name.rsplit(".", 1)
        part = _part(module)
        if len(shape) == 2 and kind == "weight":
            n, k = shape
            raw = checkpoint.linear(module) if checkpoint else None
            stored = raw.format if raw else _stored(config, part, k)
            head = part == "head" or (part == "embedding" and config.tied_head)
            wanted = recipe(quantize, head, weight_bits) if head or part == "layers" else None
            fmt = _packed(stored.held(weight_bits), k, wanted, dtype)
            in_file = tables_in_files and part == "embedding" and not head and fmt == stored and raw and raw.place
            label, nbytes = str(fmt), 0 if in_file else linear_bytes((n, k), fmt)
        else:
            label, nbytes = "float32", 4 * shape[0]  # norms and biases
        sizes[part][label] = sizes[part].get(label, 0) + nbytes
    return Plan(
        parts=tuple(
            Part(
                cast(Literal["embedding", "layers", "head"], p),
                sum(f.values()),
                tuple(sorted(f, key=f.__getitem__)[::-1]),
            )
            for p, f in sizes.items()
            if f
        ),
        kv_dtype=kv_dtype,
        kv_token_bytes=KVSpec(config.num_layers, config.num_kv_heads, config.head_size, 1, kv_dtype).block_bytes(),
        scratch=scratch_bytes(config, min(PREFILL_TOKENS, longest), batch),
        max_model_len=longest,
        batch=batch,
    )


def _part(module: str) -> str:
    if module == "lm_head":
        return "head"
    return "embedding" if module in ("transformer.wte", "model.embed_tokens") else "layers"


def _stored(config: ModelConfig, part: str, k: int) -> LinearFormat:
    """What a published checkpoint of this configuration stores: embedding and head are never quantised there."""
    if config.quant is None or part != "layers":
        return dense_format(config.dtype)
    wanted = config.quant.group_size if config.quant.group_size > 0 else MAX_GROUP
    group = fit_group(k, min(wanted, MAX_GROUP)) or wanted
    return LinearFormat(config.quant.bits, group, has_zeros=not config.quant.symmetric)


def _packed(stored: LinearFormat, k: int, wanted: tuple[WeightBits, int] | None, dtype: str | None) -> LinearFormat:
    """The format a backend holds: as stored, or narrowed by quantize=, or cast by dtype=."""
    if wanted is not None and stored.bits > wanted[0] and (group := fit_group(k, wanted[1])):
        return LinearFormat(wanted[0], group)
    if dtype is not None and not stored.grouped:
        return dense_format(dtype)
    return stored
