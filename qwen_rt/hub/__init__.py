"""Names to files: local paths, the caches of the hub libraries, the catalogue, then a download."""

from __future__ import annotations

import sys
from pathlib import Path

from qwen_rt.config import Settings, check_hub
from qwen_rt.errors import HubError
from qwen_rt.hub.local import ModelFiles, check_dir, check_gguf, find_gguf
from qwen_rt.hub.names import known_config

__all__ = ["ModelFiles", "catalog_file", "known_config", "resolve"]


def resolve(name: str, *, hub: str | None = None, weights: bool = True, progress: bool | None = None) -> ModelFiles:
    """Find or download a model: a directory, a .gguf file, or a name such as `Qwen-7B-Chat-Int4`.

    hub: "auto", "huggingface", "modelscope" or "offline"; None asks QWEN_RT_HUB. weights=False asks for configuration
    and tokenizer only. progress: None shows it on a terminal. HubError lists every place looked in and what to do.
    """
    settings = Settings.from_env()
    mode = settings.hub if hub is None else check_hub(hub, "hub")
    show = sys.stderr.isatty() if progress is None else progress
    tried: list[str] = []

    if found := _local(name, weights, tried):
        return found
    from qwen_rt.hub.search import search  # what a local path does without takes a tenth of a second to import

    return search(name, settings, mode, weights=weights, show=show, tried=tried)


def catalog_file(name: str, *, hub: str | None = None, progress: bool | None = None) -> Path:
    """A catalogue file by name ("demo", "qwen1-vocab"): verified, and downloaded when absent; options as resolve()."""
    from qwen_rt.hub.search import catalogue_file

    settings = Settings.from_env()
    mode = settings.hub if hub is None else check_hub(hub, "hub")
    return catalogue_file(name, settings, mode, sys.stderr.isatty() if progress is None else progress)


def _local(name: str, weights: bool, tried: list[str]) -> ModelFiles | None:
    path = Path(name).expanduser()
    meant = name.endswith(".gguf") or name.startswith((".", "/", "~")) or path.is_absolute() or len(path.parts) > 2
    if path.is_file():
        if path.suffix == ".gguf":
            check_gguf(path)
            return ModelFiles(name, path, "gguf", "local")
        raise HubError(f"{path}: not a .gguf file; give a .gguf file or the directory that holds config.json")
    if path.is_dir():
        try:
            if not (path / "config.json").is_file() and any(path.glob("*.gguf")):
                return ModelFiles(name, find_gguf(path, None), "gguf", "local")
            check_dir(path, weights=weights)
            return ModelFiles(name, path, "dir", "local")
        except HubError as e:
            if meant:
                raise
            tried.append(f"local directory {path.absolute()}: {e}")
            return None
    if meant:
        raise HubError(f"{path.absolute()}: no such file or directory")
    tried.append(f"local path {path.absolute()}: does not exist")
    return None
