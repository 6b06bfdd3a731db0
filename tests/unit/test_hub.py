"""Names to files: parsing, local paths, cache layouts, downloads at the hub libraries' boundary, error messages."""

from __future__ import annotations

import json
import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.errors import ConfigError, HubError
from qwen_rt.hub import ModelFiles, known_config, remote, resolve
from qwen_rt.hub.names import parse, published
from qwen_rt.hub.remote import RemoteFile

REAL_LIST_MODELSCOPE = remote.list_modelscope
TOKENIZER = {"qwen.tiktoken": b"IQ== 0\n"}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every cache inside tmp_path, working directory empty, and no hub reachable."""
    monkeypatch.setenv("QWEN_RT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    for name in ("QWEN_RT_HUB", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")

    def unreachable(repo: str) -> Any:
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(remote, "list_huggingface", unreachable)
    monkeypatch.setattr(remote, "list_modelscope", unreachable)
    return tmp_path


def safetensors(nbytes: int = 8) -> bytes:
    header = json.dumps({"x": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(nbytes)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def index(*files: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": f for i, f in enumerate(files)}}).encode()


def whole() -> dict[str, bytes]:
    return {"config.json": b"{}", "model.safetensors": safetensors(), **TOKENIZER}


def refused(name: str, **options: Any) -> str:
    with pytest.raises(HubError) as e:
        resolve(name, **options)
    return str(e.value)


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("Qwen-7B-Chat-Int4", "Qwen/Qwen-7B-Chat-Int4"),
        ("Qwen/Qwen-7B-Chat-Int4", "Qwen/Qwen-7B-Chat-Int4"),
        ("qwen/Qwen-7B-Chat-Int4", "Qwen/Qwen-7B-Chat-Int4"),
        ("qwen-7b-chat-int4", "Qwen/Qwen-7B-Chat-Int4"),
        ("Qwen-1_8B", "Qwen/Qwen-1_8B"),
        ("Qwen1.5-0.5B-Chat", "Qwen/Qwen1.5-0.5B-Chat"),
        ("Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"),
        ("Qwen2.5-Coder-0.5B-Instruct", "Qwen/Qwen2.5-Coder-0.5B-Instruct"),
        ("Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B-Instruct-2507"),
        ("somebody/my-Qwen", "somebody/my-Qwen"),
        ("Qwen/Qwen9-1B", "Qwen/Qwen9-1B"),
        ("Qwen2.5-7B-Instruct:q5_k_m", "Qwen/Qwen2.5-7B-Instruct-GGUF:Q5_K_M"),
        ("Qwen/Qwen2.5-7B-Instruct-GGUF:Q5_K_M", "Qwen/Qwen2.5-7B-Instruct-GGUF:Q5_K_M"),
        ("somebody/x-GGUF:Q8_0", "somebody/x-GGUF:Q8_0"),
    ],
)
def test_parse(name: str, repo: str) -> None:
    assert str(parse(name)) == repo


def test_every_qwen1_is_known() -> None:
    for size in ("1_8B", "7B", "14B", "72B"):
        for kind in ("", "-Chat", "-Chat-Int4", "-Chat-Int8"):
            config = known_config(f"qwen/Qwen-{size}{kind}")
            assert config is not None and config.arch == "qwen"
            assert (config.quant.bits if config.quant else None) == {"4": 4, "8": 8}.get(kind[-1:])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Qwen-7B-Caht", "Did you mean Qwen-7B-Chat or "),
        ("Qwen-1.8B-Chat", "Did you mean Qwen-1_8B-Chat or "),
        ("Qwen3-30B-A3B", "not a published dense Qwen text model"),
        ("llama", "not a published dense Qwen text model"),
        ("a/b/c", "neither an existing path nor a model name"),
        ("what is this?", "neither an existing path nor a model name"),
        ("Qwen3-8B:IQ2_XS", "'IQ2_XS' is not a supported GGUF type; use one of F32"),
    ],
)
def test_parse_refuses(name: str, words: str) -> None:
    with pytest.raises(HubError) as e:
        parse(name)
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # parameter counts as the model cards give them
        ("Qwen-7B", 7.72),
        ("Qwen-14B", 14.2),
        ("Qwen-72B", 72.3),
        ("Qwen-1_8B", 1.84),
        ("Qwen1.5-0.5B", 0.46),
        ("Qwen1.5-4B", 3.95),
        ("Qwen1.5-32B", 32.5),
        ("Qwen1.5-110B", 111.2),
        ("Qwen2-0.5B", 0.49),
        ("Qwen2-1.5B", 1.54),
        ("Qwen2.5-3B", 3.09),
        ("Qwen2.5-7B", 7.61),
        ("Qwen2.5-14B", 14.7),
        ("Qwen2.5-32B", 32.5),
        ("Qwen2.5-72B", 72.7),
        ("Qwen3-0.6B", 0.6),
        ("Qwen3-1.7B", 1.72),
        ("Qwen3-4B", 4.0),
        ("Qwen3-8B", 8.2),
        ("Qwen3-14B", 14.8),
        ("Qwen3-32B", 32.8),
    ],
)
def test_published_shapes_add_up_to_the_published_parameter_counts(name: str, billions: float) -> None:
    from math import prod

    from qwen_rt.checkpoint.layout import expected_shapes

    config = known_config(name)
    assert config is not None
    count = sum(prod(shape) for shape in expected_shapes(config).values())
    assert count / 1e9 == pytest.approx(billions, rel=0.012)


def test_every_published_shape_can_be_read() -> None:
    assert len(published()) > 150
    for name in published():
        assert known_config(name) is not None, name
    assert known_config("demo") == known_config("Qwen2.5-Coder-0.5B-Instruct") == known_config("Qwen2.5-0.5B-Instruct")
    padded = known_config("Qwen2.5-72B-Instruct-AWQ")
    assert padded is not None and padded.ffn_size == 29696, "29568 is not a multiple of 128 x 8"
    assert known_config("somebody/else") is None


# -- local paths -----------------------------------------------------------------------------------------------------


def test_local_directory_and_file(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", whole())
    assert resolve(str(folder)) == ModelFiles(str(folder), folder, "dir", "local")
    gguf = write(tmp_path / "g", {"a.gguf": b"GGUF...."}) / "a.gguf"
    assert resolve(str(gguf)) == ModelFiles(str(gguf), gguf, "gguf", "local")
    assert resolve(str(gguf.parent)).path == gguf, "a directory that holds one .gguf file only"


def test_a_directory_in_the_working_directory_wins_over_the_hub(tmp_path: Path) -> None:
    write(tmp_path / "cwd" / "Qwen-7B", whole())
    assert resolve("Qwen-7B").source == "local"


def test_config_alone_serves_random_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"config.json": b"{}"})
    assert resolve(str(folder), weights=False).path == folder


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "config.json is missing"),
        ({"config.json": b"{"}, "cannot be read as JSON"),
        ({"config.json": b"[]"}, "must hold a JSON object"),
        ({"config.json": b"{}"}, "no weights (*.safetensors or pytorch_model*.bin)"),
        ({"config.json": b"{}", "training_args.bin": b"x"}, "no weights"),
        ({"config.json": b"{}", "model.safetensors": safetensors()[:-1]}, "its header describes"),
        ({"config.json": b"{}", "model.safetensors": b"short"}, "not a whole safetensors file"),
        ({"config.json": b"{}", "model.safetensors": struct.pack("<Q", 4) + b"[[1]"}, "header cannot be read"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"{}"}, "no weight_map"),
        ({"config.json": b"{}", "model.safetensors.index.json": index("../x")}, "no weight_map of file names"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": index("a.safetensors", "b.safetensors")}
            | {"a.safetensors": safetensors()},
            "b.safetensors is missing, but the index names it",
        ),
        ({"config.json": b"{}", "pytorch_model.bin.index.json": index("p1.bin")}, "p1.bin is missing"),
        ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, "2 .gguf files (a.gguf, b.gguf); give the path of one file"),
    ],
)
def test_incomplete_directories(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    assert words in refused(str(write(tmp_path / "m", files)))


def test_wrong_paths(tmp_path: Path) -> None:
    assert "no such file or directory" in refused("./nowhere")
    assert "no such file or directory" in refused("model.gguf")
    assert "not a .gguf file; give" in refused(str(write(tmp_path / "m", whole()) / "config.json"))
    assert "not a GGUF file (it begins with b'oops')" in refused(str(write(tmp_path, {"x.gguf": b"oops"}) / "x.gguf"))


# -- caches ----------------------------------------------------------------------------------------------------------


def hf_snapshot(caches: Path, repo: str, files: dict[str, bytes], commit: str = "c0ffee", main: bool = True) -> Path:
    """A snapshot as huggingface_hub lays it out: blobs, links to them, refs."""
    base = caches / "hf" / ("models--" + repo.replace("/", "--"))
    folder = base / "snapshots" / commit
    folder.mkdir(parents=True)
    (base / "blobs").mkdir(exist_ok=True)
    for i, (name, data) in enumerate(files.items()):
        blob = base / "blobs" / f"{commit}{i}"
        blob.write_bytes(data)
        (folder / name).symlink_to(blob)
    if main:
        write(base / "refs", {"main": commit.encode()})
    return folder


def test_hugging_face_cache(caches: Path) -> None:
    hf_snapshot(caches, "Qwen/Qwen-7B", whole(), "old", main=False)
    folder = hf_snapshot(caches, "Qwen/Qwen-7B", whole(), "new")
    assert resolve("qwen/qwen-7b") == ModelFiles("qwen/qwen-7b", folder, "dir", "hf-cache")


def test_an_incomplete_snapshot_is_passed_over(caches: Path) -> None:
    files = {**whole(), "model.safetensors.index.json": index("model.safetensors", "missing.safetensors")}
    hf_snapshot(caches, "Qwen/Qwen-7B", files, "new")
    older = hf_snapshot(caches, "Qwen/Qwen-7B", whole(), "old", main=False)
    assert resolve("Qwen-7B").path == older
    hf_snapshot(caches, "Qwen/Qwen-14B", {k: v for k, v in whole().items() if k not in TOKENIZER})
    text = refused("Qwen-14B")
    assert "incomplete copy" in text and "no tokenizer" in text


@pytest.mark.parametrize(
    "place",
    [
        "ms/models/Qwen--Qwen2.5-7B/snapshots/master",
        "ms/models/Qwen/Qwen2___5-7B",
        "ms/hub/models/Qwen/Qwen2___5-7B",
        "ms/hub/qwen/Qwen2___5-7B",
        "ms/qwen/Qwen2.5-7B",
    ],
)
def test_modelscope_cache_layouts(caches: Path, place: str) -> None:
    folder = write(caches / place, whole())
    assert resolve("Qwen2.5-7B") == ModelFiles("Qwen2.5-7B", folder, "dir", "modelscope-cache")


def test_gguf_of_a_type_in_the_cache(caches: Path) -> None:
    files = {"qwen2.5-7b-instruct-q4_k_m.gguf": b"GGUF1", "qwen2.5-7b-instruct-q8_0.gguf": b"GGUF2"}
    folder = hf_snapshot(caches, "Qwen/Qwen2.5-7B-Instruct-GGUF", files)
    found = resolve("Qwen2.5-7B-Instruct:Q8_0")
    assert found.path == folder / "qwen2.5-7b-instruct-q8_0.gguf" and found.kind == "gguf"
    assert "no Q6_K .gguf file" in refused("Qwen2.5-7B-Instruct:Q6_K")


# -- download --------------------------------------------------------------------------------------------------------


def hub_with(monkeypatch: pytest.MonkeyPatch, hub: str, files: dict[str, bytes], caches: Path) -> list[list[str]]:
    """A hub that serves `files`; returns the list of what each download asked for."""
    from hashlib import sha256

    asked: list[list[str]] = []
    listed = [
        RemoteFile(n, len(d), sha256(d).hexdigest() if n.endswith((".safetensors", ".gguf", ".bin")) else None)
        for n, d in files.items()
    ]

    def get(repo: str, names: list[str], cache: Path, progress: bool) -> Path:
        asked.append(names)
        return write(cache / "got", {n: files[n] for n in names})

    monkeypatch.setattr(remote, f"list_{hub}", lambda repo: listed)
    monkeypatch.setattr(remote, f"get_{hub}", get)
    return asked


REPO = {
    **whole(),
    "modeling_qwen.py": b"import os",
    "README.md": b"#",
    "pytorch_model.bin": b"old",
    "onnx/model.onnx": b"x",
    "generation_config.json": b"{}",
}


def test_downloads_only_what_is_needed(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub_with(monkeypatch, "huggingface", REPO, caches)
    found = resolve("Qwen-7B")
    assert (found.kind, found.source) == ("dir", "huggingface")
    assert sorted(asked[0]) == ["config.json", "generation_config.json", "model.safetensors", "qwen.tiktoken"]
    resolve("Qwen-7B", weights=False)
    assert sorted(asked[1]) == ["config.json", "generation_config.json", "qwen.tiktoken"]


def test_bin_files_when_there_are_no_safetensors(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {k: v for k, v in REPO.items() if k != "model.safetensors"}
    files |= {"pytorch_model.bin.index.json": index("pytorch_model.bin"), "training_args.bin": b"no"}
    asked = hub_with(monkeypatch, "huggingface", files, caches)
    resolve("Qwen-7B")
    assert {"pytorch_model.bin", "pytorch_model.bin.index.json"} <= set(asked[0])
    assert "training_args.bin" not in asked[0]


def test_modelscope_follows_hugging_face_and_can_be_chosen(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_with(monkeypatch, "modelscope", REPO, caches)
    assert resolve("Qwen-7B").source == "modelscope"
    hub_with(monkeypatch, "huggingface", REPO, caches)
    assert resolve("Qwen-7B").source == "huggingface"
    assert resolve("Qwen-7B", hub="modelscope").source == "modelscope"
    monkeypatch.setenv("QWEN_RT_HUB", "modelscope")
    assert resolve("Qwen-7B").source == "modelscope"


def test_a_file_that_is_not_what_was_published_is_removed(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_with(monkeypatch, "huggingface", whole(), caches)
    good = remote.get_huggingface

    def corrupt(repo: str, names: list[str], cache: Path, progress: bool) -> Path:
        folder = good(repo, names, cache, progress)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return folder

    monkeypatch.setattr(remote, "get_huggingface", corrupt)
    text = refused("Qwen-7B", hub="huggingface")
    assert "model.safetensors is not what was published (sha256" in text and "it was removed" in text
    assert not (caches / "hf" / "got" / "model.safetensors").exists()


def test_interrupted_download(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_with(monkeypatch, "huggingface", whole(), caches)

    def drop(*_: Any) -> Path:
        raise TimeoutError("read timed out")

    monkeypatch.setattr(remote, "get_huggingface", drop)
    assert "download stopped (TimeoutError: read timed out); what has arrived is kept, run again" in refused("Qwen-7B")


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("Qwen3-8B-GGUF", ["x-Q4_K_M.gguf"], "it holds GGUF files, so name one: Qwen/Qwen3-8B-GGUF:Q4_K_M"),
        ("Qwen3-8B:Q8_0", ["x-Q4_K_M.gguf", "x.Q5_0.gguf"], "has no Q8_0 file; it has Q5_0, Q4_K_M"),
        ("Qwen3-8B:Q8_0", ["x-q8_0-00001-of-00002.gguf", "x-q8_0-00002-of-00002.gguf"], "is split into parts"),
        ("Qwen3-8B", ["README.md"], "the repository has no config.json"),
        ("Qwen3-8B", ["config.json"], "the repository has no weights"),
    ],
)
def test_repositories_that_do_not_serve(
    caches: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: list[str], words: str
) -> None:
    hub_with(monkeypatch, "huggingface", dict.fromkeys(files, b"x"), caches)
    assert words in refused(name)


def test_no_space(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_with(monkeypatch, "huggingface", whole(), caches)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda p: types.SimpleNamespace(free=3))
    text = refused("Qwen-7B")
    assert "its disk has 0.00 GB free; free some space" in text


def test_a_hub_that_hangs_is_given_up(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    stop = threading.Event()
    monkeypatch.setattr(remote, "LIST_SECONDS", 0.05)
    monkeypatch.setattr(remote, "list_huggingface", lambda repo: stop.wait(30))
    text = refused("Qwen-7B", hub="huggingface")
    stop.set()
    assert "TimeoutError: no answer within 0.05 s" in text


# -- errors ----------------------------------------------------------------------------------------------------------


def test_the_error_lists_every_place_and_what_to_do(caches: Path) -> None:
    text = refused("Qwen-7B-Chat")
    for words in (
        "'Qwen-7B-Chat' was not found. Looked in:",
        f"local path {caches / 'cwd' / 'Qwen-7B-Chat'}: does not exist",
        f"Hugging Face cache {caches / 'hf'}: no copy",
        f"ModelScope cache {caches / 'ms'}: no copy",
        "download from Hugging Face (Qwen/Qwen-7B-Chat): not reachable or no such repository "
        "(ConnectionError: no route to host)",
        "download from ModelScope (Qwen/Qwen-7B-Chat): not reachable",
        "What to do:",
        "HF_ENDPOINT",
    ):
        assert words in text
    assert "second line" not in text


def test_offline_asks_no_hub(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(repo: str) -> Any:
        raise AssertionError("asked although offline")

    monkeypatch.setattr(remote, "list_huggingface", never)
    monkeypatch.setattr(remote, "list_modelscope", never)
    monkeypatch.setenv("QWEN_RT_HUB", "offline")
    text = refused("Qwen-7B")
    assert "downloads are switched off (offline): unset QWEN_RT_HUB" in text and "download from" not in text


def test_a_near_miss_with_owner_is_tried_and_the_error_suggests(caches: Path) -> None:
    text = refused("Qwen/Qwen-7B-Caht")
    assert "Did you mean Qwen-7B-Chat" in text and "download from Hugging Face (Qwen/Qwen-7B-Caht)" in text


def test_the_plain_name_of_the_demo_never_becomes_other_weights(caches: Path) -> None:
    text = refused("Qwen2.5-Coder-0.5B-Instruct")
    assert "can be had as 'Qwen2.5-Coder-0.5B-Instruct:Q4_K_M'" in text


def test_unknown_hub() -> None:
    with pytest.raises(ConfigError, match="hub is 'ftp', but must be auto"):
        resolve("Qwen-7B", hub="ftp")


def test_missing_library(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "list_modelscope", REAL_LIST_MODELSCOPE)
    monkeypatch.setitem(sys.modules, "modelscope", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub", None)
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    assert "modelscope package is not installed" in refused("Qwen-7B", hub="modelscope")


# -- the hub libraries as they are called ----------------------------------------------------------------------------


def fake_modelscope(monkeypatch: pytest.MonkeyPatch, listed: list[dict[str, Any]], got: Callable[..., str]) -> None:
    for name in ("modelscope", "modelscope.hub", "modelscope.hub.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    api = types.ModuleType("modelscope.hub.api")
    api.HubApi = lambda: types.SimpleNamespace(get_model_files=lambda repo, recursive: listed)  # type: ignore[attr-defined]
    utils = types.ModuleType("modelscope.hub.utils.utils")
    utils.get_endpoint = lambda: "http://localhost:9"  # type: ignore[attr-defined]
    snapshot = types.ModuleType("modelscope.hub.snapshot_download")
    snapshot.snapshot_download = got  # type: ignore[attr-defined]
    for module in (api, utils, snapshot):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_modelscope_calls(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "list_modelscope", REAL_LIST_MODELSCOPE)
    monkeypatch.setattr(remote, "knock", lambda url: None)
    files = whole()
    listed: list[dict[str, Any]] = [{"Path": n, "Size": len(d), "Type": "blob"} for n, d in files.items()]
    seen: dict[str, Any] = {}

    def snapshot(repo: str, **options: Any) -> str:
        seen.update(options, repo=repo)
        return str(write(caches / "ms" / "models" / "Qwen" / "Qwen-7B", files))

    fake_modelscope(monkeypatch, [*listed, {"Path": "examples", "Size": 0, "Type": "tree"}], snapshot)
    found = resolve("Qwen-7B", hub="modelscope")
    assert found.source == "modelscope" and found.path == caches / "ms" / "models" / "Qwen" / "Qwen-7B"
    assert (seen["repo"], seen["cache_dir"]) == ("Qwen/Qwen-7B", str(caches / "ms"))
    assert sorted(seen["allow_patterns"]) == sorted(files)
    assert resolve("Qwen-7B", hub="offline").source == "modelscope-cache"


def test_knock_tells_an_answer_from_silence() -> None:
    import http.server
    import threading

    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501 to all
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    remote.knock(address)
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError):
        remote.knock(address)
