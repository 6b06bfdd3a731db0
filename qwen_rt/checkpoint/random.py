"""RandomCheckpoint: the weights of a model that has no files, for `weights="random"`, benchmarks and tests.

Values come from one seeded block of draws, read cyclically from a place that the name decides: the same values however
the rows are cut, at the speed of a copy, so that a 72B-Int4 loads without a file.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.checkpoint.grouped import regroup
from qwen_rt.checkpoint.layout import expected_shapes
from qwen_rt.checkpoint.names import in_layer, model_names
from qwen_rt.config import ModelConfig, QuantConfig
from qwen_rt.dtypes import host_dtype
from qwen_rt.errors import CheckpointError
from qwen_rt.quant.formats import Array, LinearFormat, LinearRows, RawLinear, dense_format

PERIOD = (1 << 20) + 7
"""Length of the block: a prime, so that rows of any width start at ever new places."""


class RandomCheckpoint(Checkpoint):
    """A model of `config` with random weights; linears of the layers grouped-integer when `quant` is given.

    Weights are normal with variance 1/K, so that every linear keeps the scale of its normalised input; norm weights
    lie around 1. Equal (config, quant, seed) give equal weights.
    """

    def __init__(self, config: ModelConfig, quant: QuantConfig | None = None, seed: int = 0) -> None:
        quant = quant or config.quant
        self.config = replace(config, quant=quant)
        self.source = f"random weights, seed {seed}"
        self._seed = seed
        self._linears, self._tensors = model_names(config)
        self._shapes = expected_shapes(config)
        draw = np.random.default_rng(seed)
        self._normal = draw.standard_normal(PERIOD, np.float32)
        self._octets = draw.integers(0, 256, PERIOD, np.uint8)
        self._dtype = host_dtype(config.dtype)
        self._blocks: dict[int, Array] = {}

    def linears(self) -> dict[str, tuple[int, int]]:
        return dict(self._linears)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return dict(self._tensors)

    def linear(self, name: str) -> RawLinear:
        if name not in self._linears:
            raise CheckpointError(f"{self.source}: this model has no linear named {name}")
        n, k = self._linears[name]
        bias = None
        if f"{name}.bias" in self._shapes:
            bias = np.float32(0.1) * self._span(self._normal, f"{name}.bias", 0, n)
        if self.config.quant is not None and in_layer(name):
            return self._grouped(name, (n, k), self.config.quant, bias)
        block = self._blocks.get(k)
        if block is None:
            block = self._blocks[k] = (self._normal / math.sqrt(k)).astype(self._dtype)

        def rows(start: int, stop: int) -> LinearRows:
            return LinearRows(self._span(block, name, start * k, (stop - start) * k).reshape(-1, k))

        return RawLinear(name, (n, k), dense_format(self.config.dtype), rows, bias)

    def tensor(self, name: str) -> NDArray[np.float32]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.source}: this model has no tensor named {name}")
        return np.float32(1) + np.float32(0.1) * self._span(self._normal, name, 0, math.prod(self._tensors[name]))

    def nbytes(self) -> int:
        """Bytes that the same model would take on disk."""
        quant, width = self.config.quant, self._dtype.itemsize
        total = 0
        for name, shape in self._shapes.items():
            if len(shape) == 2 and quant is not None and in_layer(name):
                n, k = shape
                groups = 1 if quant.group_size == -1 else -(-k // quant.group_size)
                total += n * k * quant.bits // 8 + n * groups * (16 + quant.bits) // 8
            else:
                total += math.prod(shape) * width
        return total

    def _grouped(self, name: str, shape: tuple[int, int], quant: QuantConfig, bias: Array | None) -> RawLinear:
        k = shape[1]
        group, source, _ = regroup(name, None, shape, quant)
        groups = len(source)
        middle, top = 1 << (quant.bits - 1), (1 << quant.bits) - 1
        # Uniform codes have variance (top + 1)^2 / 12; the scales spread a quarter around what makes it 1/K.
        unit = math.sqrt(12 / k) / (top + 1)
        perm = None
        if quant.act_order:
            perm = np.random.default_rng(self._place(f"{name}.g_idx")).permutation(k).astype(np.int32)

        def rows(start: int, stop: int) -> LinearRows:
            def grid(part: str, width: int) -> Array:
                octets = self._span(self._octets, f"{name}.{part}", start * width, (stop - start) * width)
                return octets.reshape(-1, width)

            zeros = None if quant.symmetric else middle - 2 + (grid("qzeros", groups) >> 3) % 5
            scales = ((0.75 + grid("scales", groups).astype(np.float32) / 510) * unit).astype(np.float16)
            return LinearRows(codes=grid("qweight", k) & top, scales=scales, zeros=zeros)

        return RawLinear(name, shape, LinearFormat(quant.bits, group, not quant.symmetric), rows, bias, perm)

    def _place(self, name: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=6).digest(), "little")

    def _span(self, block: Array, name: str, start: int, count: int) -> Array:
        """`count` values of the endless repetition of `block`, from `start` past the place of `name`."""
        out = np.empty(count, block.dtype)
        at = (self._place(name) + start) % PERIOD
        done = 0
        while done < count:
            n = min(PERIOD - at, count - done)
            out[done : done + n] = block[at : at + n]
            done, at = done + n, 0
        return out
