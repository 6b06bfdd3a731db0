"""Rotary positions: plain, dynamic NTK (Qwen-1) and YaRN (arXiv:2309.00071); cos and sin of a step's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen_rt.backends.base import Backend, Tensor
from qwen_rt.config import ModelConfig, Yarn
from qwen_rt.model.logn import logn_scale

FIRST_TABLE = 2048  # positions of a new table; it doubles when a step goes beyond


@dataclass(frozen=True)
class Rope:
    """What a step's rows need to know of their positions; on the backend's device."""

    cos: Tensor  # float32 [T, r], 2r = rotary_size
    sin: Tensor
    q_scale: Tensor | None = None  # compute dtype [T, 1, 1]: logn factors; None when all are 1


def ntk_alpha(config: ModelConfig, prompt_len: int) -> float:
    """Dynamic NTK of Qwen-1: the alpha a sequence gets at its prefill of prompt_len tokens, and keeps; 1 elsewhere."""
    if not config.dynamic_ntk or prompt_len <= config.train_length:
        return 1.0
    return max(2.0 ** math.ceil(math.log2(prompt_len / config.train_length) + 1) - 1, 1.0)


def inverse_frequencies(config: ModelConfig, alpha: float = 1.0) -> NDArray[np.float32]:
    """float32 [rotary_size / 2]. Rounded to float32 at every step, as the models were trained with."""
    dim, base = config.rotary_size, config.rope_theta
    if alpha != 1.0 and dim > 2:
        base *= alpha ** (dim / (dim - 2))
    one = np.float32(1.0)
    powers = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    periods = np.power(base, powers, dtype=np.float64).astype(np.float32)
    if config.yarn is None:
        return one / periods
    kept = _yarn_kept(config.yarn, dim, base)
    return (one / (np.float32(config.yarn.factor) * periods)) * (one - kept) + (one / periods) * kept


def _yarn_kept(yarn: Yarn, dim: int, base: float) -> NDArray[np.float32]:
    """How much of each frequency stays as trained, 1 (fast ones) falling to 0 (slow ones, interpolated by factor)."""

    def dim_of(rotations: float) -> float:
        """The dimension that turns this many times over the original length."""
        return dim * math.log(yarn.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low or 0.001)
    return np.float32(1.0) - ramp.clip(np.float32(0.0), np.float32(1.0))


def attention_factor(yarn: Yarn | None) -> float:
    """What YaRN multiplies cos and sin by, so that scores keep their spread."""
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


class RotaryTables:
    """cos and sin by position, one table per alpha, grown as positions come; made on the host."""

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self.config = config
        self.backend = backend
        self._tables: dict[float, NDArray[np.float32]] = {}

    def rows(self, positions: Sequence[int], alphas: Sequence[float]) -> Rope:
        """One row per row of the step: its absolute position, and the alpha of its sequence."""
        turns = self.backend.tensor(self.turns(positions, alphas))
        if not self.config.logn or max(positions) < self.config.train_length:
            return self.rope(turns)
        return self.rope(turns, self.backend.tensor(self.factors(positions)))

    def rope(self, turns: Tensor, factors: Tensor | None = None) -> Rope:
        """Rope of turns() and factors(), on the device."""
        scale = None if factors is None else self.backend.cast(factors, self.backend.compute_dtype)
        return Rope(turns[:, 0], turns[:, 1], scale)

    def factors(self, positions: Sequence[int]) -> NDArray[np.float32]:
        """logn factors of rows(), still on the host: [T, 1, 1], 1 up to train_length."""
        return logn_scale(positions, self.config.train_length).reshape(-1, 1, 1)

    def turns(self, positions: Sequence[int], alphas: Sequence[float]) -> NDArray[np.float32]:
        """cos and sin of rows(), still on the host: [T, 2, r]."""
        if len(positions) != len(alphas):
            raise ValueError(f"{len(positions)} positions with {len(alphas)} alphas")
        last, distinct = max(positions), set(alphas)
        if len(distinct) == 1:
            return self._table(alphas[0], last).take(positions, axis=0)
        out = np.empty((len(positions), 2, self.config.rotary_size // 2), dtype=np.float32)
        for alpha in distinct:
            rows = [i for i, a in enumerate(alphas) if a == alpha]
            out[rows] = self._table(alpha, last)[[positions[i] for i in rows]]
        return out

    def _table(self, alpha: float, last: int) -> NDArray[np.float32]:
        """cos, sin [positions, 2, r] that reach position `last`."""
        table = self._tables.get(alpha)
        if table is None or len(table) <= last:
            size = FIRST_TABLE
            while size <= last:
                size *= 2
            angles = np.outer(np.arange(size, dtype=np.float32), inverse_frequencies(self.config, alpha))
            turns = np.stack((np.cos(angles, dtype=np.float64), np.sin(angles, dtype=np.float64)), 1)
            factor = np.float32(attention_factor(self.config.yarn))
            table = self._tables[alpha] = turns.astype(np.float32) * factor
        return table
