"""Checkpoints: `open_checkpoint` turns files into one lazy Checkpoint, whatever their format."""

from __future__ import annotations

from pathlib import Path

from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.checkpoint.names import model_names, verify_names
from qwen_rt.config import ModelConfig
from qwen_rt.errors import CheckpointError

__all__ = ["Checkpoint", "model_names", "open_checkpoint", "verify_names"]


def open_checkpoint(path: str | Path, config: ModelConfig | None = None) -> Checkpoint:
    """Open a Hugging Face directory or a .gguf file; `config` replaces the one found there.

    Reads headers only, and checks them all. Raises CheckpointError, or ConfigError for a config that cannot be used.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        from qwen_rt.checkpoint.hf_dir import HFCheckpoint

        return HFCheckpoint(path, config)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.suffix.lower() == ".gguf":
        from qwen_rt.checkpoint.gguf import GGUFCheckpoint

        return GGUFCheckpoint(path, config)
    raise CheckpointError(f"{path}: give a .gguf file, or the directory that holds config.json and the weights")
