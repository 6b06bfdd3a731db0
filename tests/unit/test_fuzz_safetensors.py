"""Fuzzing the safetensors reader and a directory's JSON files: a clear error or a readable model, nothing else."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import HF_CONFIGS, random_state, safetensors_bytes, write_model

from qwen_rt.checkpoint import open_checkpoint
from qwen_rt.checkpoint.safetensors import read_header
from qwen_rt.checkpoint.store import TensorStore
from qwen_rt.errors import CheckpointError, ConfigError

WEIRD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 1e300, 0.5,
    float("nan"), float("inf"), "", "F32", "BF16", "I8", "../x", "\0", "\ud800", [], {}, [[]], [0], [1 << 62, 4], [-1],
    ["a"], {"a": 1}, [0, 0], [8, 4], "x" * 300,
]  # fmt: skip


def mutate_bytes(content: bytes, draw: random.Random, end: int) -> bytes:
    """A few flips, cuts, insertions, repeats or overwritten numbers within the first `end` bytes."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(end, len(data)) or 1)
        match draw.randrange(7):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ 1 << draw.randrange(8)])
            case 2:
                del data[at : at + draw.randint(1, 40)]
            case 3:
                data[at:at] = draw.randbytes(draw.randint(1, 20))
            case 4:
                data[at:at] = data[at : at + draw.randint(1, 60)]
            case 5:
                width = draw.choice([1, 2, 4, 8])
                data[at : at + width] = draw.choice([0, 1, 127, 128, 255, 1 << 31, (1 << 64) - 1]).to_bytes(
                    9, "little"
                )[:width]
            case 6:
                data = data[: draw.randrange(len(data) + 1)]
    return bytes(data)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """`value` with one to three members replaced, removed, swapped, nudged or added."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        node = value
        while True:
            if not isinstance(node, dict | list) or not node:
                break
            key = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
            if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.75:
                node = node[key]
                continue
            match draw.randrange(5):
                case 0:
                    node[key] = copy.deepcopy(draw.choice(WEIRD))
                case 1:
                    del node[key]
                case 2 if isinstance(node[key], int):
                    node[key] += draw.choice([-64, -8, -4, -1, 1, 4, 8, 64])
                case 3 if isinstance(node, dict):
                    node[draw.choice(["", "a", "lm_head.weight", "model.norm.weight", str(key) + "x"])] = node[key]
                case _:
                    other = draw.choice(list(node)) if isinstance(node, dict) else draw.randrange(len(node))
                    node[key], node[other] = node[other], node[key]
            break
    return value


def read_all(path: Path) -> None:
    """Read every tensor of every entry, as a loader would."""
    entries = read_header(path)
    store = TensorStore(entries)
    for name, entry in entries.items():
        if entry.shape:
            assert store.read(name).nbytes == entry.nbytes
    store.close()


@pytest.mark.parametrize("part", range(4))
def test_mutated_files(tmp_path: Path, part: int) -> None:
    draw = random.Random(part)
    source = write_model(tmp_path / "m", HF_CONFIGS["qwen2"], random_state(HF_CONFIGS["qwen2"]))
    content = (source / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:end]), content[end:]
    path = tmp_path / "model.safetensors"
    seen: Counter[str] = Counter()
    for _ in range(750):
        if draw.random() < 0.5:
            path.write_bytes(mutate_bytes(content, draw, draw.choice([8, end, end, len(content)])))
        else:
            path.write_bytes(safetensors_bytes(mutate_json(header, draw), data))
        try:
            read_all(path)
            seen["read"] += 1
        except CheckpointError as error:
            assert str(path) in str(error)
            seen["refused"] += 1
    assert seen["refused"] > 450 and seen["read"] > 5  # the mutations reach both sides of the checks


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_mutated_json(tmp_path: Path, file: str) -> None:
    draw = random.Random(file)
    config = HF_CONFIGS["qwen2"] | {
        "rope_scaling": {"type": "yarn", "factor": 4.0},
        "layer_types": ["full_attention"] * 2,
    }
    path = write_model(tmp_path / "m", config, random_state(config), shards=2)
    content = (path / file).read_bytes()
    seen: Counter[str] = Counter()
    for _ in range(300):
        new = mutate_bytes(content, draw, len(content))
        if draw.random() < 0.7:
            new = json.dumps(mutate_json(json.loads(content), draw)).encode()
        (path / file).write_bytes(new)
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.linear("model.layers.0.mlp.up_proj").rows(0, 4)
            checkpoint.close()
            seen["read"] += 1
        except (CheckpointError, ConfigError):
            seen["refused"] += 1
    assert seen["refused"] > 100 and seen["read"] > 5


def test_mutated_quantised_models(tmp_path: Path) -> None:
    """Random headers over packed words: shapes, dtypes and quantisation settings that disagree."""
    from test_checkpoint_gptq import packed_state, quantised

    draw = random.Random(7)
    config = quantised(HF_CONFIGS["qwen2"] | {"num_hidden_layers": 1})
    state = packed_state(config, "gptq", 4, 32, symmetric=False, offset=1, g_idx="shuffled")
    path = write_model(tmp_path / "m", config, state)
    file = path / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:end]), content[end:]
    seen: Counter[str] = Counter()
    for _ in range(300):
        new, words = header, bytearray(data)
        if draw.random() < 0.4:
            names = draw.sample(sorted(n for n in header if n != "__metadata__"), 2)
            new = copy.deepcopy(header)
            field = draw.choice(["shape", "dtype"])
            new[names[0]][field], new[names[1]][field] = new[names[1]][field], new[names[0]][field]
        else:
            at = draw.randrange(len(words) - 16)
            words[at : at + 16] = draw.randbytes(16)
        file.write_bytes(safetensors_bytes(new, bytes(words)))
        changed = quantised(config, **draw.choice([{}, {}, {"bits": 8}, {"group_size": 64}, {"quant_method": "awq"}]))
        (path / "config.json").write_text(json.dumps(changed))
        try:
            checkpoint = open_checkpoint(path)
            for name in checkpoint.linears():
                assert np.isfinite(checkpoint.linear(name).dequantize()).all()
            for name in checkpoint.tensors():
                assert checkpoint.tensor(name).dtype == np.float32
            checkpoint.close()
            seen["read"] += 1
        except (CheckpointError, ConfigError):
            seen["refused"] += 1
    assert seen["refused"] > 50 and seen["read"] > 20
