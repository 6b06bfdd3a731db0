"""The graph of every Qwen generation, written against the waist."""

from __future__ import annotations

from typing import Literal

from qwen_rt.backends.base import Backend
from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.dtypes import DType
from qwen_rt.model.decoder import QwenModel
from qwen_rt.model.layers import Last
from qwen_rt.model.loader import Loader, Progress
from qwen_rt.model.qwen import Qwen1Model
from qwen_rt.model.qwen2 import Qwen2Model
from qwen_rt.model.qwen3 import Qwen3Model
from qwen_rt.model.rope import Rope, ntk_alpha

__all__ = ["Last", "QwenModel", "Rope", "build", "ntk_alpha"]

MODELS: dict[str, type[QwenModel]] = {"qwen": Qwen1Model, "qwen2": Qwen2Model, "qwen3": Qwen3Model}


def build(
    checkpoint: Checkpoint,
    backend: Backend,
    *,
    quantize: Literal["int8", "int4"] | None = None,
    dtype: DType | None = None,
    progress: Progress | None = None,
    level_keys: bool = False,
) -> QwenModel:
    """The model of a checkpoint, its weights packed for `backend`, read one matrix at a time.

    quantize: layer linears wider than that are rounded to it, the head by quant.rtn.recipe (a tied table is a head; an
    untied one stays). dtype: dense weights that are not quantised are kept in it, else as stored. progress(name, bytes)
    after each weight. level_keys: for an 8-bit cache, see level.py. Raises CheckpointError, BackendError (a format the
    backend does not take), OutOfMemory.
    """
    with backend.packing():
        return MODELS[checkpoint.config.arch](Loader(checkpoint, backend, quantize, dtype, progress, level_keys))
