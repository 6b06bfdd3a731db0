"""qwen_rt: one runtime for the Qwen family on whatever accelerator you have.

Importing this module imports nothing heavy; what it exports is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwen_rt.collector import held_off
from qwen_rt.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    HubError,
    OutOfMemory,
    QwenRTError,
    RequestError,
    TokenizerError,
)

if TYPE_CHECKING:
    from qwen_rt.compat import AutoModelForCausalLM, AutoTokenizer
    from qwen_rt.engine.completion import Completion
    from qwen_rt.engine.generation_config import GenerationConfig
    from qwen_rt.llm import Qwen, TextStream, load

_LAZY = {
    "AutoModelForCausalLM": "qwen_rt.compat",
    "AutoTokenizer": "qwen_rt.compat",
    "Completion": "qwen_rt.engine.completion",
    "GenerationConfig": "qwen_rt.engine.generation_config",
    "Qwen": "qwen_rt.llm",
    "TextStream": "qwen_rt.llm",
    "load": "qwen_rt.llm",
}

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BackendError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "GenerationConfig",
    "HubError",
    "OutOfMemory",
    "Qwen",
    "QwenRTError",
    "RequestError",
    "TextStream",
    "TokenizerError",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'qwen_rt' has no attribute {name!r}")
    with held_off():  # searching torch's objects would cost a sixth of its import
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value
