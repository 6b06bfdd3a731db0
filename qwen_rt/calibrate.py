"""GPTQ of a whole model: one forward pass over a calibration text, in which each linear is rounded when it is reached.

The pass is the model's own graph on a backend that keeps weights where the checkpoint has them. When the graph asks for
a product, the matrix is read, rounded against the inputs that are there (quant/gptq.py), and the product goes on with
the rounded weights: later layers make up for what earlier ones lost. One matrix stands in memory at a time, beside the
finished ones, packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qwen_rt.backends.base import BatchMeta, KVSpec, Packed
from qwen_rt.backends.select import torch_missing
from qwen_rt.errors import BackendError, CheckpointError, ConfigError

try:
    import torch
    from torch import Tensor
except ModuleNotFoundError as e:
    raise BackendError(torch_missing("calibration")) from e

from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.backends.torch_backend import from_host, to_host
from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.model import build
from qwen_rt.quant.formats import LinearFormat, LinearRows, RawLinear, dequantize_rows
from qwen_rt.quant.gptq import quantize_gptq
from qwen_rt.quant.packing import pack_words, unpack_words

WINDOW = 512
"""Tokens of a calibration sequence."""
CHUNK = 1 << 22  # weights read at a time


def windows(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Token ids of texts -> sequences of at most WINDOW tokens; rests of a few tokens are left out."""
    cut = (list(ids[i : i + WINDOW]) for ids in texts for i in range(0, len(ids), WINDOW))
    return [ids for ids in cut if len(ids) >= 16]


def quantize_model(
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    bits: Literal[4, 8],
    group_size: int,
    *,
    head: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, RawLinear]:
    """Every linear of the layers, by name, as symmetric grouped integers; with `head`, also "lm_head" (tied or not).

    sequences: token ids, all taken in one step. progress(name) after each product. ConfigError when there is nothing to
    calibrate on or group_size does not divide an input size.
    """
    config = checkpoint.config
    if not sequences or min(map(len, sequences)) < 1 or max(map(max, sequences)) >= config.vocab_size:
        raise ConfigError(
            f"calibration needs sequences of token ids below {config.vocab_size}; there are none, or others"
        )
    backend = _Rounding(bits, group_size, progress)
    with backend.computing():
        model = build(checkpoint, backend)
        block = backend.caps.kv_block
        lens = [len(ids) for ids in sequences]
        pages = [-(-n // block) for n in lens]
        firsts = [sum(pages[:i]) for i in range(len(pages))]
        meta = BatchMeta(
            lens,
            lens,
            [list(range(a, a + n)) for a, n in zip(firsts, pages, strict=True)],
            [a * block + i for a, n in zip(firsts, lens, strict=True) for i in range(n)],
        )
        kv = backend.alloc_kv(
            KVSpec(config.num_layers, config.num_kv_heads, config.head_size, block, "float32"), sum(pages)
        )
        rope = model.rope_rows(meta.positions(), [1.0] * sum(lens))
        tokens = np.array([i for ids in sequences for i in ids], np.int64)
        hidden = model.forward(tokens, backend.plan(meta), rope, kv)
        if head:
            backend.round(hidden, model.head, product=False)
    shapes = checkpoint.linears()
    parts = {n: raw for fused in backend.done for n, raw in _split(fused, shapes)}
    if head:
        parts["lm_head"] = parts.pop(model.head.raw.name)
    return parts


@dataclass
class _Unread:
    """A weight that stays in the checkpoint."""

    raw: RawLinear
    nbytes: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.raw.shape

    @property
    def format(self) -> LinearFormat:
        return self.raw.format


class _Rounding(ReferenceBackend):
    """Plain torch in float32, whose first product with a weight rounds it."""

    name = "calibration"

    def __init__(self, bits: Literal[4, 8], group_size: int, progress: Callable[[str], None] | None) -> None:
        super().__init__()
        self.bits, self.group_size, self.progress = bits, group_size, progress
        self.done: list[RawLinear] = []

    def pack_linear(self, raw: RawLinear) -> Packed:
        """Nothing is read yet."""
        return _Unread(raw)

    def embedding(self, ids: Tensor | NDArray[np.int64], w: Packed) -> Tensor:
        """Rows as the checkpoint has them: a table is not rounded here."""
        distinct, where = np.unique(ids, return_inverse=True)
        return from_host(np.concatenate([w.raw.dequantize(i, i + 1) for i in distinct.tolist()])[where])

    def linear(self, x: Tensor, w: Packed) -> Tensor:
        """The product with the rounded weight."""
        return self.round(x, w)

    def round(self, x: Tensor, w: Packed, product: bool = True) -> Tensor:
        """Round `w` against x [T, K]; then the product, or an empty tensor when none is wanted."""
        raw = w.raw
        n, k = raw.shape
        group = k if self.group_size == -1 else self.group_size
        if k % group:
            raise ConfigError(f"{raw.name}: group size {group} does not divide its {k} inputs; choose a smaller one")
        dense = np.empty((n, k), np.float32)
        for start, stop, part in raw.chunks(CHUNK):
            dense[start:stop] = dequantize_rows(part, raw.format)
        if raw.perm is not None:
            x = x[:, from_host(raw.perm).long()]
        codes, scales = quantize_gptq(dense, to_host(x), self.bits, group)
        del dense
        if not np.isfinite(scales).all():
            raise CheckpointError(f"{raw.name}: weights too large for float16 scales")
        fmt, words = LinearFormat(self.bits, group), pack_words(codes, self.bits)

        def rows(start: int, stop: int) -> LinearRows:
            return LinearRows(codes=unpack_words(words[start:stop], fmt.bits), scales=scales[start:stop])

        rounded = replace(raw, format=fmt, rows=rows)
        self.done.append(rounded)
        if self.progress is not None:
            self.progress(raw.name)
        if not product:
            return x.new_empty(0)
        out = torch.empty(len(x), n)
        for start, stop, part in rounded.chunks(CHUNK):
            out[:, start:stop] = x @ from_host(dequantize_rows(part, fmt)).T
        return out if raw.bias is None else out.add_(from_host(raw.bias))


def _split(fused: RawLinear, shapes: dict[str, tuple[int, int]]) -> Iterator[tuple[str, RawLinear]]:
    """The linears of which the graph made one product: rows of it."""
    first = 0
    for name in fused.name.split("+"):
        n, k = shapes[name]

        def rows(start: int, stop: int, first: int = first) -> LinearRows:
            return fused.rows(first + start, first + stop)

        bias = None if fused.bias is None else fused.bias[first : first + n]
        yield name, RawLinear(name, (n, k), fused.format, rows, bias, fused.perm)
        first += n
