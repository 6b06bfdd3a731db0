"""Names to files: local paths, the caches of the hub libraries, the catalogue, then a download."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen_rt.config import Settings, check_hub
from qwen_rt.errors import HubError
from qwen_rt.hub import catalog, remote
from qwen_rt.hub.local import check_dir, check_gguf, find_gguf, hf_cache_dirs, modelscope_cache_dirs
from qwen_rt.hub.names import Reference, bare, known_config, parse, published, suggestion

__all__ = ["ModelFiles", "catalog_file", "known_config", "resolve"]


@dataclass(frozen=True)
class ModelFiles:
    """Verified files of one model on this machine."""

    name: str  # as the user typed it
    path: Path  # directory, or the .gguf file
    kind: Literal["dir", "gguf"]
    source: str  # "local", "hf-cache", "modelscope-cache", "huggingface", "modelscope", "catalog:<id>"


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
    if (entry := catalog.find_entry(name)) and entry.file.endswith(".gguf"):
        if got := _catalogued(entry, settings, mode, show, tried):
            return ModelFiles(name, got[0], "gguf", got[1])
        raise _not_found(name, tried, mode)

    ref = parse(name)
    if found := _cached(name, ref, weights, settings, tried):
        return found
    for kind in ("huggingface", "modelscope"):
        if mode in ("auto", kind):
            try:
                path = remote.download(kind, ref, settings, weights=weights, progress=show)
                return ModelFiles(name, path, "gguf" if ref.gguf_type else "dir", kind)
            except HubError as e:
                tried.append(f"download from {catalog.HUB_LABELS[kind]} ({ref.repo}): {e}")
    if not weights and (found := _published_qwen1(name, settings, mode, show, tried)):
        return found
    raise _not_found(name, tried, mode)


def catalog_file(name: str, *, hub: str | None = None, progress: bool | None = None) -> Path:
    """A catalogue file by name ("demo", "qwen1-vocab"): verified, and downloaded when absent; options as resolve()."""
    settings = Settings.from_env()
    mode = settings.hub if hub is None else check_hub(hub, "hub")
    entry, tried = catalog.find_entry(name), list[str]()
    if entry is None:
        raise HubError(f"{name!r} is not in the catalogue; it has {', '.join(e.id for e in catalog.entries())}")
    got = _catalogued(entry, settings, mode, sys.stderr.isatty() if progress is None else progress, tried)
    if not got:
        raise _not_found(name, tried, mode)
    return got[0]


def _catalogued(
    entry: catalog.Entry, settings: Settings, mode: str, show: bool, tried: list[str]
) -> tuple[Path, str] | None:
    """(file, source) of a catalogue file, from a cache or else a download."""
    if got := catalog.cached(entry, settings, show, tried):
        return got
    tried.append(f"caches ({settings.cache}, {settings.hf_cache}, {settings.modelscope_cache}): no copy")
    return catalog.fetch(entry, settings, mode, show, tried) if mode != "offline" else None


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


def _cached(name: str, ref: Reference, weights: bool, settings: Settings, tried: list[str]) -> ModelFiles | None:
    """A complete copy in a hub library's cache; incomplete ones are noted and left to the download to complete."""
    places: list[tuple[str, str, Path, Iterator[Path]]] = [
        ("Hugging Face", "hf-cache", settings.hf_cache, hf_cache_dirs(settings.hf_cache, ref)),
        (
            "ModelScope",
            "modelscope-cache",
            settings.modelscope_cache,
            modelscope_cache_dirs(settings.modelscope_cache, ref),
        ),
    ]
    for label, source, cache, folders in places:
        reason = "no copy"
        for folder in folders:
            try:
                if ref.gguf_type:
                    return ModelFiles(name, find_gguf(folder, ref.gguf_type), "gguf", source)
                check_dir(folder, weights=weights, tokenizer=True)
                return ModelFiles(name, folder, "dir", source)
            except HubError as e:
                reason = f"incomplete copy ({e})"
        tried.append(f"{label} cache {cache}: {reason}")
    return None


def _published_qwen1(name: str, settings: Settings, mode: str, show: bool, tried: list[str]) -> ModelFiles | None:
    """Configuration and vocabulary of a published Qwen-1 from the catalogue, when no hub gives them."""
    config = published().get(bare(name))
    entry = catalog.find_entry("qwen1-vocab")
    if not config or config["model_type"] != "qwen" or not entry:
        return None
    got = _catalogued(entry, settings, mode, show, tried)
    if not got:
        return None
    path = catalog.write_published(bare(name), config, got[0], settings)
    return ModelFiles(name, path, "dir", f"catalog:{entry.id}")


def _not_found(name: str, tried: list[str], mode: str) -> HubError:
    todo = ["give the path of a local directory or .gguf file that holds the model"]
    if mode == "offline":
        todo.insert(0, "downloads are switched off (offline): unset QWEN_RT_HUB and HF_HUB_OFFLINE to allow them")
    else:
        todo.append("check the network; HF_ENDPOINT names a mirror, QWEN_RT_HUB=modelscope uses ModelScope instead")
    entry = catalog.find_entry(name + ":Q4_K_M")
    if entry and ":" not in name:
        todo.append(f"the same model, quantised to 4 bits, can be had as {entry.names[-1]!r} from other sources too")
    lines = [f"{name!r} was not found.{suggestion(name) if bare(name) not in published() else ''} Looked in:"]
    return HubError("\n  - ".join([*lines, *tried]) + "\nWhat to do:\n  - " + "\n  - ".join(todo))
