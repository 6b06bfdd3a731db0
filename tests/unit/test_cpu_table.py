"""A table left in its file: what is looked up, what is refused, and that nothing of it is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import HF_CONFIGS, random_state, write_model
from gguf_files import gguf_bytes, tiny_model
from tiny_models import write_model as write_qwen1

import qwen_rt
from qwen_rt.backends import cpu
from qwen_rt.backends.base import BatchMeta
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.checkpoint import open_checkpoint
from qwen_rt.errors import CheckpointError
from qwen_rt.model import build
from qwen_rt.native import extension
from qwen_rt.plan import plan_memory

pytestmark = pytest.mark.skipif(extension() is None, reason="the native extension was not built")

TABLE = "model.embed_tokens"


def untied(path: Path, dtype: torch.dtype = torch.float16, **changes: Any) -> Path:
    """A model whose head is not its table."""
    config = HF_CONFIGS["qwen2"] | {"tie_word_embeddings": False}
    state = random_state(config, dtype)
    for name, change in changes.items():
        change(state[f"{name.replace('__', '.')}.weight"])
    return write_model(path, config, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_a_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = open_checkpoint(untied(tmp_path / "m", dtype)).linear(TABLE)
    backend = cpu.CpuBackend()
    table = backend.pack_table(raw)
    assert table.nbytes == 0 and table.shape == raw.shape and table.format == raw.format
    ids = np.random.default_rng(0).integers(0, raw.shape[0], 50)
    assert np.array_equal(backend.embedding(ids, table), raw.dequantize()[ids])
    assert backend.embedding(ids[:0], table).shape == (0, raw.shape[1])
    for bad in (-1, raw.shape[0]):
        with pytest.raises(ValueError, match="id out of range"):
            backend.embedding(np.array([0, bad]), table)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
def test_rows_of_a_gguf_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(*tiny_model(kinds=(kind,), vocab=20)))
    checkpoint = open_checkpoint(path)
    raw = checkpoint.linear(TABLE)
    backend = cpu.CpuBackend()
    table = backend.pack_table(raw)
    checkpoint.close()  # the table has a file of its own
    packed = backend.pack_linear(open_checkpoint(path).linear(TABLE))
    ids = np.arange(raw.shape[0])
    assert table.nbytes == 0
    assert np.array_equal(backend.embedding(ids, table), backend.embedding(ids, packed))


def test_a_model_answers_the_same_and_holds_less(tmp_path: Path) -> None:
    path = write_qwen1(tmp_path / "m")
    ids = [5, 1, 9, 2, 6]
    exact = {"kv_cache": "float32"}
    with (
        qwen_rt.load(str(path), device="cpu", **exact) as model,
        qwen_rt.load(str(path), device="reference", **exact) as oracle,
    ):
        got, want = model.logits(ids), oracle.logits(ids)
        assert np.allclose(got, want, atol=1e-4)
        assert model.generate(ids, max_new_tokens=8, ignore_eos=True).ids == (
            oracle.generate(ids, max_new_tokens=8, ignore_eos=True).ids
        )
        assert "1 float32 (left in its file)" in str(model.report())
        in_file = [group for group in model.report().weights if not group.nbytes]
        assert [(group.format, group.count) for group in in_file] == [("float32", 1)]


def test_the_plan_knows(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(untied(tmp_path / "m"))
    backend = cpu.CpuBackend()

    def planned(**options: Any) -> dict[str, int]:
        return {p.name: p.nbytes for p in plan_memory(checkpoint.config, max_model_len=32, **options).parts}

    held = planned(checkpoint=checkpoint)
    left = planned(checkpoint=checkpoint, tables_in_files=True)
    assert held["embedding"] > 0 == left["embedding"] and held["layers"] == left["layers"]
    assert planned(checkpoint=checkpoint, tables_in_files=True, dtype="float32")["embedding"] > 0  # a cast is held
    assert planned(tables_in_files=True)["embedding"] > 0  # nobody knows a file
    assert build(checkpoint, backend).packed_bytes < build(checkpoint, ReferenceBackend()).packed_bytes
    assert build(checkpoint, backend, dtype="float32").table.nbytes > 0


def test_a_tied_table_is_packed(tmp_path: Path) -> None:
    config = HF_CONFIGS["qwen2"] | {"tie_word_embeddings": True}
    state = random_state(config, torch.float16)
    state.pop("lm_head.weight", None)
    model = build(open_checkpoint(write_model(tmp_path / "m", config, state)), cpu.CpuBackend())
    assert model.table is model.head and model.table.nbytes > 0


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_table_that_is_not_finite(tmp_path: Path, value: float) -> None:
    def damage(weight: torch.Tensor) -> None:
        weight[-1, -1] = value

    path = untied(tmp_path / "m", model__embed_tokens=damage)
    with pytest.raises(CheckpointError, match=rf"{TABLE}\.weight has 1 NaN or infinite"):
        qwen_rt.load(str(path), device="cpu")


def test_a_file_cut_short_while_the_model_is_in_use(tmp_path: Path) -> None:
    path = untied(tmp_path / "m")
    raw = open_checkpoint(path).linear(TABLE)
    backend = cpu.CpuBackend()
    table = backend.pack_table(raw)
    replay = backend.capture(lambda inputs, plan: backend.embedding(inputs[0], table), [np.array([0])], None, 4)
    assert replay is not None
    assert np.array_equal(replay([np.array([1])], BatchMeta([1], [1], [[0]], [0])), raw.dequantize()[1:2])
    place = raw.place
    assert place is not None
    with open(place.path, "r+b") as file:
        file.truncate(place.offset + 10)
    for look_up in (
        lambda: backend.embedding(np.array([1]), table),
        lambda: replay([np.array([1])], BatchMeta([1], [1], [[0]], [0])),
    ):
        with pytest.raises(RuntimeError, match="file changed while the model is in use: load the model again"):
            look_up()
    with pytest.raises(CheckpointError, match="file changed"):
        backend.pack_table(raw)
    place.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be opened"):
        backend.pack_table(raw)


def test_native_tables_check_their_arguments(tmp_path: Path) -> None:
    native = extension()
    assert native is not None
    path = tmp_path / "table"
    path.write_bytes(np.zeros(64, np.float16).tobytes())
    table = native.Table(str(path), 0, 4, 16, "float16")
    for args in ((0, 4, 16, "float8"), (0, 0, 16, "float16"), (0, 4, 0, "float16"), (-1, 4, 16, "float16"),
                 (0, 4, 16, "Q4_0")):  # fmt: skip
        with pytest.raises(ValueError, match="no such kind or shape"):
            native.Table(str(path), *args)
    for y in (np.zeros((1, 15), np.float32), np.zeros((2, 16), np.float32), np.zeros((1, 16), np.float16)):
        with pytest.raises(ValueError):
            native.embedding(np.array([0]), table, y)
    with pytest.raises(RuntimeError, match="cannot be opened"):
        native.Table(str(path) + "x", 0, 4, 16, "float16")
