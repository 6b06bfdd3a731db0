"""Writing a Hugging Face directory tensor by tensor, so that a converted model never stands in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_rt.checkpoint.safetensors import DTYPES
from qwen_rt.dtypes import host_dtype
from qwen_rt.errors import ConfigError
from qwen_rt.quant.formats import Array

CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Item:
    """Tensors that are made together: their (name, dtype, shape), and their values in that order, in any chunks."""

    specs: tuple[tuple[str, str, tuple[int, ...]], ...]  # dtypes as dtypes.host_dtype calls them
    chunks: Callable[[], Iterator[Array]]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(_nbytes(dtype, shape) for _, dtype, shape in self.specs)


def new_directory(path: Path) -> Path:
    """`path`, made where it is missing. Raises ConfigError when something is in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} exists and is not an empty directory; choose another place for the result")
    path.mkdir(parents=True, exist_ok=True)
    return path


def save_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_weights(path: Path, items: list[Item], shard_bytes: int = 4 << 30) -> None:
    """Write model.safetensors, or shards of about `shard_bytes` with their index, into the directory `path`."""
    shards: list[list[Item]] = [[]]
    for item in items:
        if shards[-1] and sum(i.nbytes for i in shards[-1]) + item.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(item)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    total = sum(item.nbytes for item in items)
    with tqdm(total=total, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:  # None: only on a terminal
        for name, shard in zip(names, shards, strict=True):
            _save_shard(path / name, shard, bar)
    if len(shards) > 1:
        places = {spec[0]: name for name, shard in zip(names, shards, strict=True) for i in shard for spec in i.specs}
        save_json(path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _save_shard(path: Path, items: list[Item], bar: Any) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in (spec for item in items for spec in item.specs):
        start, end = end, end + _nbytes(dtype, shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for item in items:
            done = 0
            for chunk in item.chunks():
                octets = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
                done += file.write(octets.data)
                bar.update(octets.size)
            if done != item.nbytes:
                raise ValueError(f"{item.specs[0][0]}: {done} bytes were made, {item.nbytes} announced")


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * host_dtype(dtype).itemsize
