"""Model files already on this machine: directories, .gguf files, and the caches of the hub libraries."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qwen_rt.errors import HubError
from qwen_rt.hub.names import Reference

TOKENIZERS = (("tokenizer.json",), ("qwen.tiktoken",), ("vocab.json", "merges.txt"))
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


@dataclass(frozen=True)
class ModelFiles:
    """Verified files of one model on this machine."""

    name: str  # as the user typed it
    path: Path  # directory, or the .gguf file
    kind: Literal["dir", "gguf"]
    source: str  # "local", "hf-cache", "modelscope-cache", "huggingface", "modelscope", "catalog:<id>"


def check_gguf(path: Path) -> None:
    """HubError unless `path` is a readable file that begins like a GGUF."""
    try:
        with path.open("rb") as f:
            magic = f.read(4)
    except OSError as e:
        raise HubError(f"{path}: cannot be read ({e.strerror})") from e
    if magic != b"GGUF":
        raise HubError(f"{path}: not a GGUF file (it begins with {magic!r}); download it again")


def check_dir(path: Path, *, weights: bool = True, tokenizer: bool = False) -> None:
    """HubError saying what a model directory lacks: config.json, every weight file of its index, a tokenizer."""
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise HubError(f"{path / 'config.json'} must hold a JSON object")
    if tokenizer and not any(all((path / f).is_file() for f in files) for files in TOKENIZERS):
        raise HubError(f"{path}: no tokenizer (qwen.tiktoken, tokenizer.json, or vocab.json with merges.txt)")
    if weights:
        files = weight_files(path)
        if not files:
            raise HubError(f"{path}: no weights (*.safetensors or pytorch_model*.bin); copy them there")
        for file in files:
            if not file.is_file():
                raise HubError(f"{path}: {file.name} is missing, but the index names it; the copy is incomplete")
            if file.suffix == ".safetensors":
                check_safetensors_size(file)


def weight_files(path: Path) -> list[Path]:
    """The weight files of a directory, safetensors before .bin, those an index names before those found."""
    for index, pattern in zip(INDEXES, ("*.safetensors", "*.bin"), strict=True):
        if (path / index).is_file():
            names = _field(read_json(path / index), "weight_map")
            if not isinstance(names, dict) or not all(isinstance(n, str) and "/" not in n for n in names.values()):
                raise HubError(f"{path / index}: no weight_map of file names; download it again")
            return [path / n for n in sorted(set(names.values()))]
        if found := sorted(f for f in path.glob(pattern) if f.name not in NOT_WEIGHTS):
            return found
    return []


def check_safetensors_size(path: Path) -> None:
    """HubError when the file is not as long as its own header says (an interrupted copy)."""
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(size - 8, 1 << 28):
            raise HubError(f"{path}: not a whole safetensors file; download it again")
        try:
            entries = json.loads(f.read(length))
            end = max((e["data_offsets"][1] for n, e in entries.items() if n != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as e:
            raise HubError(f"{path}: its safetensors header cannot be read; download it again") from e
    if size != 8 + length + end:
        raise HubError(f"{path}: {size} bytes, but its header describes {8 + length + end}; download it again")


def read_json(path: Path) -> Any:
    """A JSON file's value; HubError when it is missing or malformed."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise HubError(f"{path.parent}: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as e:
        raise HubError(f"{path}: cannot be read as JSON ({e}); download it again") from e


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def find_gguf(path: Path, gguf_type: str | None) -> Path:
    """The one .gguf of a directory (of that type); HubError when there is none, several, or a split one."""
    found = sorted(path.glob("*.gguf"))
    if gguf_type:
        found = [f for f in found if is_gguf_type(f.name, gguf_type)]
    if len(found) == 1:
        check_gguf(found[0])
        return found[0]
    what = f"{gguf_type} .gguf file" if gguf_type else ".gguf file"
    if not found:
        raise HubError(f"{path}: no {what}")
    raise HubError(f"{path}: {len(found)} {what}s ({', '.join(f.name for f in found[:8])}); give the path of one file")


def is_gguf_type(filename: str, gguf_type: str) -> bool:
    """True for `x-q4_k_m.gguf`, `X.Q4_K_M.gguf` and split files of that type."""
    stem = filename.lower().removesuffix(".gguf").split("-00001-of-")[0]
    return filename.lower().endswith(".gguf") and stem.endswith((f"-{gguf_type.lower()}", f".{gguf_type.lower()}"))


def hf_cache_dirs(cache: Path, ref: Reference) -> Iterator[Path]:
    """Snapshots of a repository in the Hugging Face cache: the main branch's first, then the newest."""
    repo = cache / ("models--" + ref.repo.replace("/", "--"))
    main = repo / "refs" / "main"
    head = main.read_text().strip() if main.is_file() else ""
    yield from sorted(_dirs(repo / "snapshots"), key=lambda p: (p.name == head, p.stat().st_mtime), reverse=True)


def modelscope_cache_dirs(cache: Path, ref: Reference) -> Iterator[Path]:
    """Places where versions of the modelscope package keep a repository ('.' in names may be '___')."""
    owner, name = ref.repo.split("/")
    for base in (cache, cache / "hub"):
        yield from sorted(_dirs(base / "models" / f"{owner}--{name}" / "snapshots"), reverse=True)
        for parent in (base / "models", base):
            for o in dict.fromkeys((owner, owner.lower())):
                for n in dict.fromkeys((name.replace(".", "___"), name)):
                    if (parent / o / n).is_dir():
                        yield parent / o / n


def _dirs(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []
