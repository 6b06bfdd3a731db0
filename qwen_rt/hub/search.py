"""Where a model that is no local path is looked for: the caches of the hub libraries, the catalogue, the hubs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qwen_rt.config import Settings
from qwen_rt.errors import HubError
from qwen_rt.hub import catalog, remote
from qwen_rt.hub.local import ModelFiles, check_dir, find_gguf, hf_cache_dirs, modelscope_cache_dirs
from qwen_rt.hub.names import Reference, bare, parse, published, suggestion


def search(name: str, settings: Settings, mode: str, *, weights: bool, show: bool, tried: list[str]) -> ModelFiles:
    """As resolve(), of what is no local path; `tried` lists where else it was looked for."""
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


def catalogue_file(name: str, settings: Settings, mode: str, show: bool) -> Path:
    """As catalog_file()."""
    entry, tried = catalog.find_entry(name), list[str]()
    if entry is None:
        raise HubError(f"{name!r} is not in the catalogue; it has {', '.join(e.id for e in catalog.entries())}")
    got = _catalogued(entry, settings, mode, show, tried)
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
