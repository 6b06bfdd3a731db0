"""QwenModel: the skeleton all generations share; a subclass names its weights and makes its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from qwen_rt.backends.base import KV, Plan, Tensor
from qwen_rt.dtypes import wider
from qwen_rt.model.layers import DecoderLayer, Last
from qwen_rt.model.loader import Loader
from qwen_rt.model.rope import Rope, RotaryTables


class QwenModel(ABC):
    """A decoder over the waist: forward() for a step's rows, logits() for those whose next token is wanted."""

    table_name: ClassVar[str]
    norm_name: ClassVar[str]

    def __init__(self, load: Loader) -> None:
        """Packs every weight. Raises CheckpointError, BackendError (a format the backend cannot take), OutOfMemory."""
        self.config = load.config
        self.backend = load.backend
        # Float32 at least, so that sums over the layers of a 16-bit compute type neither overflow nor lose addends.
        self.residual_dtype = wider(self.backend.compute_dtype)
        self.table = load.table(self.table_name, is_head=self.config.tied_head)
        self.layers = [self.layer(load, i) for i in range(self.config.num_layers)]
        self.norm = load.norm(self.norm_name)
        self.head = self.table if self.config.tied_head else load.table("lm_head", is_head=True)
        self.packed_bytes = load.packed_bytes
        self.rotary = RotaryTables(self.config, self.backend)

    @abstractmethod
    def layer(self, load: Loader, i: int) -> DecoderLayer:
        """Make layer `i`."""

    def rope_rows(self, positions: Sequence[int], alphas: Sequence[float]) -> Rope:
        """Rotation (and logn) of each row of a step, from its absolute position and its sequence's NTK alpha."""
        return self.rotary.rows(positions, alphas)

    def forward(self, ids: Tensor, plan: Plan, rope: Rope, kv: KV, last: Last | None = None) -> Tensor:
        """int64 [T] (a host array will do) of a planned step -> final hidden states [T, H], normalised.

        Its keys are in `kv` afterwards. With `last`, [R, H] of those rows: what follows the cache write of the last
        layer is computed for no others.
        """
        x, residual = self.backend.cast(self.backend.embedding(ids, self.table), self.residual_dtype), None
        for layer in self.layers[:-1]:
            x, residual = layer(x, residual, plan, rope, kv)
        x, residual = self.layers[-1](x, residual, plan, rope, kv, last)
        return self.norm(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] rows of forward()'s result -> float32 [R, V]."""
        return self.backend.cast(self.backend.linear(hidden, self.head), "float32")
