"""Hugging Face directories: what is read, and a clear error for each way a file can lie."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import HF_CONFIGS, random_state, safetensors_bytes, same, write_config, write_model
from safetensors.torch import save_file

from qwen_rt.checkpoint import model_names, open_checkpoint, verify_names
from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.checkpoint.safetensors import read_header
from qwen_rt.checkpoint.torch_bin import read_index
from qwen_rt.errors import CheckpointError, ConfigError

QWEN2 = HF_CONFIGS["qwen2"]


def assert_holds(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> None:
    """Every tensor of `state` comes out of `checkpoint`, whole and by rows."""
    verify_names(checkpoint, *model_names(checkpoint.config))
    found = set()
    for name, shape in checkpoint.linears().items():
        raw, want = checkpoint.linear(name), state[f"{name}.weight"]
        assert raw.shape == shape == tuple(want.shape)
        assert f"torch.{raw.format.dtype}" == str(want.dtype)
        assert same(raw.rows(0, shape[0]).values, want)
        assert same(raw.rows(3, 11).values, want[3:11])
        found.add(f"{name}.weight")
        if raw.bias is not None:
            assert raw.bias.dtype == np.float32 and same(raw.bias, state[f"{name}.bias"].float())
            found.add(f"{name}.bias")
    for name in checkpoint.tensors():
        assert same(checkpoint.tensor(name), state[name].float())
        found.add(name)
    assert found == set(state)
    assert checkpoint.nbytes() == sum(t.nbytes for t in state.values())


# -- what is read ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", ["qwen", "qwen2", "qwen3"])
def test_safetensors(tmp_path: Path, arch: str, dtype: torch.dtype) -> None:
    state = random_state(HF_CONFIGS[arch], dtype)
    assert_holds(open_checkpoint(write_model(tmp_path / "m", HF_CONFIGS[arch], state)), state)


@pytest.mark.parametrize("index", [True, False])
def test_sharded_safetensors(tmp_path: Path, index: bool) -> None:
    state = random_state(QWEN2)
    path = write_model(tmp_path / "m", QWEN2, state, shards=3)
    if not index:
        (path / "model.safetensors.index.json").unlink()
    assert_holds(open_checkpoint(str(path)), state)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_bin(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    state = OrderedDict(random_state(QWEN2, dtype))
    path = write_config(tmp_path / "m", QWEN2)
    state._metadata = OrderedDict(version=1)  # type: ignore[attr-defined]  # as state_dict() leaves it
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin")
    else:
        files = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
        places = {name: files[i % 2] for i, name in enumerate(state)}
        for file in files:
            torch.save({n: torch.nn.Parameter(t) for n, t in state.items() if places[n] == file}, path / file)
        (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_holds(open_checkpoint(path), state)


def test_torch_bin_shared_and_sliced_storage(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    torch.save({"a": base[8:20].view(3, 4), "b": base.view(4, 6), "c": base[:0]}, tmp_path / "x.bin")
    entries = read_index(tmp_path / "x.bin")
    assert entries["a"].offset - entries["b"].offset == 8 * 4
    assert entries["a"].shape == (3, 4) and entries["c"].shape == (0,)


def test_strays_are_ignored_and_a_tied_head_may_be_stored(tmp_path: Path) -> None:
    state = random_state(QWEN2)
    strays = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.attn.masked_bias": torch.tensor(-1e4),
        "model.layers.1.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "logn_tensor": torch.ones(4),
    }
    head = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    checkpoint = open_checkpoint(write_model(tmp_path / "m", QWEN2, state | strays | head))
    assert_holds(checkpoint, state | head)


def test_safetensors_win_over_bin_and_index_over_single(tmp_path: Path) -> None:
    state = random_state(QWEN2)
    path = write_model(tmp_path / "m", QWEN2, state, shards=2)
    (path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_holds(open_checkpoint(path), state)


def test_a_given_config_replaces_the_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", QWEN2, random_state(QWEN2))
    config = open_checkpoint(path).config
    (path / "config.json").unlink()
    assert open_checkpoint(path, config).config is config


def test_reading_after_close_opens_again(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m", QWEN2, random_state(QWEN2)))
    before = checkpoint.tensor("model.norm.weight")
    checkpoint.close()
    assert same(checkpoint.tensor("model.norm.weight"), before)


# -- values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    state = random_state(QWEN2, dtype)
    state["model.layers.0.mlp.up_proj.weight"][7, 5] = value
    state["model.norm.weight"][1] = value
    state["model.layers.1.self_attn.q_proj.bias"][1] = value
    checkpoint = open_checkpoint(write_model(tmp_path / "m", QWEN2, state))
    raw = checkpoint.linear("model.layers.0.mlp.up_proj")
    raw.rows(0, 7)
    raw.rows(8, 96)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has 1 NaN or infinite"):
        raw.rows(6, 9)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        checkpoint.tensor("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        checkpoint.linear("model.layers.1.self_attn.q_proj")


def test_large_finite_weights_are_fine(tmp_path: Path) -> None:
    state = random_state(QWEN2)
    state["model.embed_tokens.weight"][:] = torch.finfo(torch.float32).max  # their sum is infinite
    checkpoint = open_checkpoint(write_model(tmp_path / "m", QWEN2, state))
    assert same(checkpoint.linear("model.embed_tokens").dequantize(), state["model.embed_tokens.weight"])


def test_unknown_names(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m", QWEN2, random_state(QWEN2)))
    with pytest.raises(CheckpointError, match="no linear named model"):
        checkpoint.linear("model.nope")
    with pytest.raises(CheckpointError, match="no tensor named model"):
        checkpoint.tensor("model.nope")


def test_file_cut_short_while_open(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", QWEN2, random_state(QWEN2))
    checkpoint = open_checkpoint(path)
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        checkpoint.linear("model.layers.1.mlp.up_proj").dequantize()


# -- names -----------------------------------------------------------------------------------------------------------
def test_missing_extra_and_misshapen_are_listed_together(tmp_path: Path) -> None:
    state = random_state(QWEN2)
    del state["model.layers.0.self_attn.k_proj.bias"], state["model.layers.1.mlp.down_proj.weight"]
    state["model.layers.2.mlp.up_proj.weight"] = torch.ones(2, 2)
    state["model.norm.weight"] = torch.ones(65)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(write_model(tmp_path / "m", QWEN2, state))
    for part in ("k_proj.bias", "1.mlp.down_proj", "layers.2.mlp.up_proj", "model.norm.weight is [65], expected [64]"):
        assert part in str(error.value)


def test_verify_names_lists_everything(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_model(tmp_path / "m", QWEN2, random_state(QWEN2)))
    linears, tensors = model_names(checkpoint.config)
    verify_names(checkpoint, {**linears, "lm_head": (96, 64)}, tensors)  # tied: the head may be absent
    linears.pop("model.layers.0.mlp.up_proj")
    linears["model.layers.9.mlp.up_proj"] = (1, 2)
    tensors["model.norm.weight"] = (63,)
    with pytest.raises(CheckpointError) as error:
        verify_names(checkpoint, linears, tensors)
    for part in (
        "1 missing: model.layers.9.mlp.up_proj",
        "1 extra: model.layers.0.mlp.up_proj",
        "1 of a wrong shape: model.norm.weight is [64] instead of [63]",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_weights_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    state = random_state(QWEN2)
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"up_proj\.weight is {name} \[96, 64\]; weights are float32"):
        open_checkpoint(write_model(tmp_path / "m", QWEN2, state))


# -- directories -----------------------------------------------------------------------------------------------------
def edit_index(path: Path, **changes: Any) -> None:
    """Change names' files in the index of `path` (None removes the name)."""
    index = path / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"] | changes
    index.write_text(json.dumps({"weight_map": {k: v for k, v in weights.items() if v is not None}}))


@pytest.mark.parametrize("file", ["../m.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "x\\y", "x\0y"])
def test_index_that_leaves_the_directory(tmp_path: Path, file: str) -> None:
    path = write_model(tmp_path / "m", QWEN2, random_state(QWEN2), shards=2)
    shutil.copy(path / "model-00001-of-00002.safetensors", tmp_path / "m.safetensors")
    edit_index(path, **{"model.norm.weight": file})
    with pytest.raises(CheckpointError, match="is not the name of a file beside it"):
        open_checkpoint(path)


def test_broken_indexes(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", QWEN2, random_state(QWEN2), shards=2)
    index = path / "model.safetensors.index.json"
    good = index.read_text()
    places = json.loads(good)["weight_map"]
    other = {*places.values()} - {places["model.norm.weight"]}
    for changes, message in (
        ({"model.norm.weight": "model-9.safetensors"}, "the shard 'model-9.safetensors' is missing"),
        ({"model.norm.weight": other.pop()}, "does not say that model.norm.weight is in"),
        ({"model.norm.weight": None}, "does not say that model.norm.weight is in"),
        ({"model.extra.weight": places["model.norm.weight"]}, "names tensors that are in no file: model.extra.weight"),
    ):
        edit_index(path, **changes)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
        index.write_text(good)
    for content in (b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"\xff", b"[" * 100000):
        index.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            open_checkpoint(path)


def test_shards_without_index(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", QWEN2, random_state(QWEN2), shards=3)
    (path / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.ones(64)}, path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is both in"):
        open_checkpoint(path)
    (path / "other.safetensors").unlink()
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing: model-00002-of-00003\.safetensors"):
        open_checkpoint(path)


def test_directories_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path)
    write_config(tmp_path, QWEN2)
    with pytest.raises(CheckpointError, match="no weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"give a \.gguf file, or the directory"):
        open_checkpoint(tmp_path / "config.json")
    for content in (b"{", b"[1]", b"\xff\xfe", b"[" * 100000, b'{"a": ' + b"1" * 5000 + b"}"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="llama"):
        open_checkpoint(tmp_path)


# -- safetensors files -----------------------------------------------------------------------------------------------
def f32(shape: list[int], start: int, stop: int, **more: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop], **more}


D = bytes(64)
BAD_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "half a length": (b"\1\2\3", "truncated"),
    "header beyond the file": (safetensors_bytes({"a": f32([4], 0, 16)}, D[:16])[:40], "truncated"),
    "length lies, small": (b"\5" + bytes(7) + b'{"a":{}}', "not JSON"),
    "length 2^63": (b"\0" * 7 + b"\x80" + D, "truncated"),
    "length above the cap": ((17 << 20).to_bytes(8, "little") + b" " * (17 << 20), "absurd header length"),
    "not utf-8": (safetensors_bytes(b'{"\xff": 1}'), "not JSON"),
    "not an object": (safetensors_bytes([1]), "not an object"),
    "deep": (safetensors_bytes(b"[" * 200000), "not JSON"),
    "huge integer": (safetensors_bytes(b'{"a": ' + b"9" * 10000 + b"}"), "not JSON"),
    "duplicate names": (
        safetensors_bytes(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', D[:4]),
        "duplicate keys",
    ),
    "duplicate fields": (
        safetensors_bytes(b'{"a":{"dtype":"F32","dtype":"I8","shape":[1],"data_offsets":[0,4]}}', D[:4]),
        "duplicate keys",
    ),
    "metadata not strings": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry not an object": (safetensors_bytes({"a": 3}), "is not described by"),
    "missing field": (safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}), "is not described by"),
    "unknown field": (safetensors_bytes({"a": f32([4], 0, 16, more=1)}, D[:16]), "is not described by"),
    "unknown dtype": (safetensors_bytes({"a": f32([4], 0, 16) | {"dtype": "F31"}}, D[:16]), "has dtype 'F31'"),
    "dtype no string": (safetensors_bytes({"a": f32([4], 0, 16) | {"dtype": ["F32"]}}, D[:16]), "has dtype"),
    "negative dim": (safetensors_bytes({"a": f32([-4], 0, 16)}, D[:16]), "absurd shape"),
    "boolean dim": (safetensors_bytes({"a": f32([True], 0, 4)}, D[:4]), "absurd shape"),
    "float dim": (safetensors_bytes({"a": f32([4.0], 0, 16)}, D[:16]), "absurd shape"),  # type: ignore[list-item]
    "dim of 2^63": (safetensors_bytes({"a": f32([1 << 63], 0, 16)}, D[:16]), "absurd shape"),
    "product wraps to 16 bytes": (safetensors_bytes({"a": f32([1 << 62, 16, 4], 0, 16)}, D[:16]), "but 16 bytes"),
    "nine dims": (safetensors_bytes({"a": f32([1] * 9, 0, 4)}, D[:4]), "absurd shape"),
    "shape no list": (safetensors_bytes({"a": f32({"0": 4}, 0, 16)}, D[:16]), "absurd shape"),  # type: ignore[arg-type]
    "one offset": (safetensors_bytes({"a": {**f32([4], 0, 16), "data_offsets": [0]}}, D[:16]), "lies outside"),
    "offsets reversed": (safetensors_bytes({"a": f32([4], 16, 0)}, D[:16]), "lies outside"),
    "data cut": (safetensors_bytes({"a": f32([4], 0, 16)}, D[:15]), "lies outside"),
    "size does not fit shape": (safetensors_bytes({"a": f32([4], 0, 12)}, D[:12]), "but 12 bytes"),
    "overlap": (safetensors_bytes({"a": f32([4], 0, 16), "b": f32([4], 8, 24)}, D[:24]), "overlaps"),
    "hole": (safetensors_bytes({"a": f32([4], 0, 16), "b": f32([4], 20, 36)}, D[:36]), "follows a hole"),
    "hole at the start": (safetensors_bytes({"a": f32([4], 4, 20)}, D[:20]), "follows a hole"),
    "bytes at the end": (safetensors_bytes({"a": f32([4], 0, 16)}, D[:20]), "4 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_malformed_safetensors(tmp_path: Path, case: str) -> None:
    content, message = BAD_SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_header(path)
    assert str(path) in str(error.value)


def test_absurd_sizes_cost_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tracemalloc.start()
    for shape in ([1 << 40], [1 << 31, 1 << 31], [1 << 20] * 8):
        path.write_bytes(safetensors_bytes({"a": f32(shape, 0, 16)}, D[:16]))
        with pytest.raises(CheckpointError):
            read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# -- .bin files ------------------------------------------------------------------------------------------------------
ran: list[str] = []


class Evil:
    """A pickle that calls something when it is loaded."""

    def __reduce__(self) -> Any:
        return (ran.append, ("it ran",))


class EvilSystem:
    def __reduce__(self) -> Any:
        import os

        return (os.system, ("true",))


class EvilBuiltin:
    def __reduce__(self) -> Any:
        return (eval, ("__import__('os').getcwd()",))


@pytest.mark.parametrize("evil", [Evil(), EvilSystem(), EvilBuiltin(), {"a": Evil()}, Path("x"), torch.float32])
@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_that_name_something_else(tmp_path: Path, evil: Any, protocol: int) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(2), "x": evil}, path, pickle_protocol=protocol)
    with pytest.raises(
        CheckpointError, match=r"its pickle names '[\w.]+', which is not plain weights; nothing was run"
    ):
        read_index(path)
    assert not ran


def rewrite(path: Path, change: Any) -> None:
    """Rewrite a .bin record by record: change(name, content) -> content, or None to drop it."""
    with zipfile.ZipFile(path) as archive:
        records = [(i.filename, archive.read(i)) for i in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in records:
            new = change(name, content)
            if new is not None:
                archive.writestr(name, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, c: None if n.endswith("data/0") else c, "the data of 'w' is missing"),
        (lambda n, c: c[:-1] if n.endswith("data/0") else c, "'w' reaches beyond its storage"),
        (lambda n, c: None if n.endswith("data.pkl") else c, "has no data.pkl"),
        (lambda n, c: c[:-9] if n.endswith("data.pkl") else c, "its pickle is damaged"),
        (lambda n, c: b"" if n.endswith("data.pkl") else c, "its pickle is damaged"),
        (lambda n, c: b"big" if n.endswith("byteorder") else c, "big-endian"),
        (lambda n, c: pickle.dumps([1]) if n.endswith("data.pkl") else c, "does not hold a state dict"),
        (lambda n, c: pickle.dumps({"w": 1}) if n.endswith("data.pkl") else c, "'w' is not a tensor"),
        (lambda n, c: pickle.dumps({"w": bytes(3)}) if n.endswith("data.pkl") else c, "its pickle uses SHORT_BINBYTES"),
    ],
)
def test_malformed_bin(tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(3, 4)}, path)
    rewrite(path, lambda n, c: c)
    assert read_index(path)["w"].shape == (3, 4)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        read_index(path)


def test_bin_formats_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="load and save it again"):
        read_index(path)
    torch.save({"w": torch.ones(3, 4).t()}, path)
    with pytest.raises(CheckpointError, match="not contiguous"):
        read_index(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}))
    with pytest.raises(CheckpointError, match="compressed"):
        read_index(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="damaged zip"):
        read_index(path)
