"""Report: what serves a model, in which formats, with how many bytes. Nothing silent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qwen_rt.backends.base import Packed
from qwen_rt.engine.capacity import size
from qwen_rt.model import QwenModel


@dataclass(frozen=True)
class WeightGroup:
    """All packed weights of one format; those that were left in their files, of which nothing is held, apart."""

    format: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class CacheReport:
    """The paged cache."""

    dtype: str
    block_size: int
    num_blocks: int
    used_blocks: int
    nbytes: int


@dataclass(frozen=True)
class Report:
    """A loaded model, as str() for people and to_dict() for programs."""

    model: str
    arch: str
    source: str  # where the files came from
    backend: str
    compute_dtype: str
    kernels: dict[str, str]  # operation -> kernel, its threads included where it has any
    weights: tuple[WeightGroup, ...]
    cache: CacheReport
    max_model_len: int
    memory_free: int
    memory_total: int
    notes: tuple[str, ...]  # what was passed over, shortened or replaced, and why

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, tuples, strings and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        total = sum(group.nbytes for group in self.weights)
        formats = ", ".join(
            f"{g.count} {g.format} ({size(g.nbytes) if g.nbytes else 'left in its file'})" for g in self.weights
        )
        cache = self.cache
        serves: dict[str, list[str]] = {}
        for op, kernel in self.kernels.items():
            serves.setdefault(kernel, []).append(op)
        lines = {
            "model": f"{self.model} ({self.arch}) from {self.source}",
            "backend": f"{self.backend}, computing in {self.compute_dtype}",
            "kernels": "; ".join(f"{kernel}: {', '.join(ops)}" for kernel, ops in serves.items()) or "not named",
            "weights": f"{size(total)}: {formats}",
            "cache": f"{cache.dtype}, {cache.num_blocks} blocks of {cache.block_size} tokens "
            f"({cache.used_blocks} in use), {size(cache.nbytes)}",
            "context": f"{self.max_model_len} tokens",
            "memory": f"{size(self.memory_free)} free of {size(self.memory_total)}",
        }
        return "\n".join([f"{name:<8} {text}" for name, text in lines.items()] + [f"note     {n}" for n in self.notes])


def weight_groups(model: QwenModel) -> tuple[WeightGroup, ...]:
    """Count and bytes of a model's packed weights by format, largest first."""
    found: dict[tuple[str, bool], list[int]] = {}
    for packed in _packed(model):
        found.setdefault((str(packed.format), packed.nbytes > 0), []).append(packed.nbytes)
    groups = (WeightGroup(fmt, len(sizes), sum(sizes)) for (fmt, _), sizes in found.items())
    return tuple(sorted(groups, key=lambda group: (-group.nbytes, group.format)))


def _packed(model: QwenModel) -> Iterator[Packed]:
    yield model.table
    if model.head is not model.table:
        yield model.head
    for layer in model.layers:
        for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
            yield from linear.parts
