"""A Hugging Face directory: config.json beside safetensors or .bin files, single or sharded, dense, GPTQ or AWQ."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen_rt.checkpoint import awq, gptq, safetensors, torch_bin
from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.checkpoint.grouped import PackedParts
from qwen_rt.checkpoint.layout import check_shapes
from qwen_rt.checkpoint.store import StoredTensor, TensorStore
from qwen_rt.config import ModelConfig
from qwen_rt.dtypes import FLOATS
from qwen_rt.errors import CheckpointError
from qwen_rt.quant.formats import LinearRows, Place, RawLinear, dense_format

MAX_JSON = 64 << 20  # bytes
STRAY = re.compile(r"(^|\.)(inv_freq|masked_bias|logn_tensor|attn\.bias)$")
"""Buffers that some exports keep; nothing reads them."""
QUANTISED = ("qweight", "qzeros", "scales", "g_idx", "bias")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_JSON + 1)
        if len(raw) > MAX_JSON:
            raise CheckpointError(f"{path}: larger than {MAX_JSON} bytes; this is no model's JSON file")
        value = json.loads(raw.decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not JSON ({type(error).__name__}: {error}); fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, this is a {type(value).__name__}")
    return value


def read_config(path: Path) -> ModelConfig:
    """ModelConfig of a directory: config.json, with quantize_config.json where config.json does not say it.

    Raises CheckpointError for unreadable files, ConfigError for their content.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: config.json is missing; a Hugging Face model directory has one")
    config = read_json(path / "config.json")
    beside = path / "quantize_config.json"
    if config.get("quantization_config") is None and beside.is_file():
        config["quantization_config"] = {"quant_method": "gptq", **read_json(beside)}
    return ModelConfig.from_hf(config)


def find_weights(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory, strays left out: by index.json where there is one, else from all files of the
    first kind found (safetensors, .bin). Raises CheckpointError."""
    for pattern, stem, reader in (
        ("*.safetensors", "model.safetensors", safetensors.read_header),
        ("pytorch_model*.bin", "pytorch_model.bin", torch_bin.read_index),
    ):
        index = path / f"{stem}.index.json"
        files = sorted(f for f in path.glob(pattern) if f.is_file())
        wanted = _read_index(index) if index.is_file() else None
        if wanted is not None:
            files = [path / f for f in sorted(set(wanted.values()))]
        elif (path / stem).is_file():
            files = [path / stem]
        if not files:
            continue
        _check_complete(path, files)
        entries: dict[str, StoredTensor] = {}
        for file in files:
            for name, entry in reader(file).items():
                if name in entries:
                    raise CheckpointError(f"{name} is both in {entries[name].path} and in {file}; remove one of them")
                if wanted is not None and wanted.get(name, file.name if STRAY.search(name) else None) != file.name:
                    raise CheckpointError(f"{index}: does not say that {name} is in {file.name}; fetch both again")
                entries[name] = entry
        lost = sorted(wanted.keys() - entries.keys()) if wanted else []
        if lost:
            raise CheckpointError(f"{index}: names tensors that are in no file: {_some(lost)}; fetch the shards again")
        return {name: entry for name, entry in entries.items() if not STRAY.search(name)}
    raise CheckpointError(f"{path}: no weights: expected *.safetensors or pytorch_model*.bin beside config.json")


@dataclass(frozen=True)
class _DenseRows:
    """Rows of a stored matrix."""

    store: TensorStore
    name: str

    def __call__(self, start: int, stop: int) -> LinearRows:
        """Read. CheckpointError if not finite."""
        return LinearRows(self.store.floats(self.name, start, stop))

    @property
    def place(self) -> Place:
        """As RawLinear.place."""
        entry = self.store[self.name]
        return Place(entry.path, entry.offset, entry.dtype)


class HFCheckpoint(Checkpoint):
    """Checkpoint over a Hugging Face directory; headers and names are checked when it is opened."""

    def __init__(self, path: Path, config: ModelConfig | None = None) -> None:
        """Open `path`; `config` replaces config.json. Raises CheckpointError or ConfigError."""
        self.config = config or read_config(path)
        self.source = str(path)
        self._store = TensorStore(find_weights(path))
        self._parts = PackedParts(self._store)
        self._linears: dict[str, tuple[int, int]] = {}
        self._packed: set[str] = set()
        self._tensors: dict[str, tuple[int, ...]] = {}
        self._made: dict[str, RawLinear] = {}
        self._classify()

    def linears(self) -> dict[str, tuple[int, int]]:
        return dict(self._linears)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return dict(self._tensors)

    def linear(self, name: str) -> RawLinear:
        if name not in self._linears:
            raise CheckpointError(f"{self.source}: there is no linear named {name}")
        if name not in self._made:
            self._made[name] = self._linear(name)
        return self._made[name]

    def _linear(self, name: str) -> RawLinear:
        """What is read of it here: its bias, and the zero points and order of a quantised one."""
        shape, store = self._linears[name], self._store
        bias = self._float32(f"{name}.bias") if f"{name}.bias" in store else None
        if name in self._packed:
            if bias is not None and not bias.any() and not self._has_bias(name):
                bias = None  # AutoGPTQ writes one for every linear
            assert self.config.quant is not None
            reader = awq if self.config.quant.method == "awq" else gptq
            return reader.linear(store, self._parts, name, shape, self.config.quant, bias)
        full = f"{name}.weight"
        return RawLinear(name, shape, dense_format(store[full].dtype), _DenseRows(store, full), bias)

    def tensor(self, name: str) -> NDArray[np.float32]:
        if name not in self._tensors:
            raise CheckpointError(f"{self.source}: there is no tensor named {name}")
        return self._float32(name)

    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._store.entries.values())

    def close(self) -> None:
        self._store.close()

    def _float32(self, name: str) -> NDArray[np.float32]:
        return self._store.floats(name).astype(np.float32, copy=False)

    def _has_bias(self, name: str) -> bool:
        """True when the model itself has a bias at the linear `name`."""
        return self.config.qkv_bias and name.endswith((".c_attn", ".q_proj", ".k_proj", ".v_proj"))

    def _classify(self) -> None:
        """Sort the stored names into linears, their parts, and tensors; check dtypes, shapes and completeness."""
        store, quant = self._store, self.config.quant
        for name in (n.removesuffix(".qweight") for n in store if n.endswith(".qweight")):
            if quant is None:
                raise CheckpointError(
                    f"{self.source}: {name} is quantised, but neither config.json nor quantize_config.json says how"
                )
            if f"{name}.weight" in store:
                raise CheckpointError(f"{self.source}: {name} has both a weight and a qweight; one of them is wrong")
            self._packed.add(name)
            self._linears[name] = (awq if quant.method == "awq" else gptq).check(store, name, quant)
        found: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in self._linears.items()}
        for full, entry in store.entries.items():
            name, _, part = full.rpartition(".")
            if name in self._packed and part in QUANTISED:
                if part == "bias" and self._has_bias(name):  # elsewhere GPTQ's bias of zeros is normal
                    found[full] = entry.shape
                continue
            if entry.dtype not in FLOATS or 0 in entry.shape:
                raise CheckpointError(
                    f"{entry.path}: {full} is {entry.dtype} {list(entry.shape)}; "
                    "weights are float32, float16 or bfloat16 and not empty"
                )
            found[full] = entry.shape
            if part == "weight" and len(entry.shape) == 2:
                self._linears[name] = (entry.shape[0], entry.shape[1])
            elif part != "bias":
                self._tensors[full] = entry.shape
        check_shapes(self.config, found, self.source)


def _read_index(path: Path) -> dict[str, str]:
    """The weight map of an index.json: tensor name -> name of a file beside it."""
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise CheckpointError(f"{path}: has no weight_map of names to files; fetch it again")
    present = {file.name for file in path.parent.iterdir() if file.is_file()}
    for file in sorted(set(weights.values())):
        if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
            raise CheckpointError(f"{path}: {file!r} is not the name of a file beside it")
        if file not in present:
            raise CheckpointError(f"{path}: the shard {file!r} is missing; the download is incomplete, start it again")
    return weights


def _check_complete(path: Path, files: list[Path]) -> None:
    """Without an index, `x-00001-of-00003` asks for all three."""
    for file in files:
        found = re.fullmatch(r"(.*)-(\d{1,5})-of-(\d{1,5})(\.\w+)", file.name)
        if found:
            stem, _, count, end = found.groups()
            names = (f"{stem}-{i:0{len(count)}d}-of-{count}{end}" for i in range(1, int(count) + 1))
            lost = [name for name in names if not (path / name).is_file()]
            if lost:
                raise CheckpointError(f"{path}: shards are missing: {_some(lost)}; start the download again")


def _some(names: list[str]) -> str:
    """At most eight of them, for a message."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
