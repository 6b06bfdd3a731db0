"""Memory plans: arithmetic against hand-made counts, the formats of a checkpoint, and `qwen-rt plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from qwen_rt.backends.base import DeviceInfo, Probe
from qwen_rt.cli import plan as cli
from qwen_rt.config import ModelConfig
from qwen_rt.engine.capacity import scratch_bytes
from qwen_rt.errors import ConfigError, HubError
from qwen_rt.hub import known_config
from qwen_rt.plan import GIB, USABLE, plan_memory


def config(name: str) -> ModelConfig:
    found = known_config(name)
    assert found is not None
    return found


def parts(name: str, **options: Any) -> dict[str, int]:
    return {p.name: p.nbytes for p in plan_memory(config(name), **options).parts}


def test_bytes_by_hand_qwen2() -> None:
    h, f, layers, vocab = 3584, 18944, 28, 152064
    linears = h * h * 2 + 2 * 512 * h + 3 * h * f
    small = 4 * (h + 512 + 512 + 2 * h)  # biases and norms, float32
    assert parts("Qwen2.5-7B") == {
        "embedding": 2 * vocab * h,
        "layers": layers * (2 * linears + small) + 4 * h,
        "head": 2 * vocab * h,
    }
    int4 = linears // 2 + linears // 64 * 2
    assert parts("Qwen2.5-7B", quantize="int4") == {
        "embedding": 2 * vocab * h,
        "layers": layers * (int4 + small) + 4 * h,
        "head": vocab * h * 5 // 8 + vocab * h // 32 * 2,
    }
    without = parts("Qwen2.5-7B", quantize="int4", weight_bits=(4, 8))
    assert without["head"] == vocab * h + vocab * h // 128 * 2 and without["layers"] == layers * (int4 + small) + 4 * h
    assert parts("Qwen2.5-7B", dtype="float32")["embedding"] == 4 * vocab * h


def test_bytes_by_hand_qwen1_gptq() -> None:
    h, f = 8192, 24576
    linears = 4 * h * h + 3 * h * f
    want = 80 * (linears // 2 + linears // 128 * 2 + 4 * (3 * h + 2 * h)) + 4 * h
    got = parts("Qwen-72B-Chat-Int4")
    assert got == {"embedding": 2 * 152064 * h, "layers": want, "head": 2 * 152064 * h}
    assert parts("Qwen-72B-Chat-Int8", quantize="int4")["layers"] == want + 80 * (linears // 128 * 2)  # groups of 64
    assert parts("Qwen-72B-Chat-Int4", quantize="int8")["layers"] == want, "what is narrower already stays"


def test_tied_head_and_zero_points() -> None:
    tied = plan_memory(config("Qwen2.5-0.5B"))
    assert [p.name for p in tied.parts] == ["embedding", "layers"]
    assert plan_memory(config("Qwen2.5-0.5B"), quantize="int4").parts[0].formats == ("int5-g32",)
    assert plan_memory(config("Qwen2.5-7B-Instruct-AWQ")).parts[1].formats[0] == "int4-g128+zero"


def test_five_and_six_bits_count_as_the_device_holds_them(tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    from gguf_files import gguf_bytes, tiny_model

    from qwen_rt.checkpoint.gguf import GGUFCheckpoint

    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(*tiny_model(kinds=("Q5_0",), hidden=32, ffn=64, vocab=64)))
    opened = GGUFCheckpoint(path)
    layers = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    vectors = 4 * (2 * (2 * 32 + 32 + 16 + 16) + 32)
    for offered, bits in (((4, 5, 6, 8), 5), ((4, 6, 8), 6), ((4, 8), 8)):
        plan = plan_memory(opened.config, checkpoint=opened, max_model_len=64, weight_bits=offered)
        got = {p.name: (p.nbytes, p.formats[0]) for p in plan.parts}
        assert got["layers"] == (layers * bits // 8 + layers // 32 * 2 + vectors, f"int{bits}-g32")
        assert got["head"] == (64 * 32 * bits // 8 + 64 * 2, f"int{bits}-g32")


def test_cache_scratch_and_total() -> None:
    c = config("Qwen2.5-7B")
    p = plan_memory(c, kv_dtype="float16", max_model_len=4096, batch=3)
    assert p.kv_token_bytes == 2 * 28 * 4 * 128 * 2
    assert p.kv_bytes(1000) == 3 * 1000 * p.kv_token_bytes
    assert p.scratch == scratch_bytes(c, 512, 3)
    assert p.total == p.weights + p.scratch + p.kv_bytes(4096)
    assert plan_memory(c, kv_dtype="int8").kv_token_bytes == 2 * 28 * 4 * (128 + 8)
    assert plan_memory(c).max_model_len == 32768


def test_longest() -> None:
    p = plan_memory(config("Qwen2.5-7B"), batch=2)
    assert p.longest(80 * GIB) == 32768
    assert p.longest(int((p.weights + p.scratch) / USABLE)) == 0
    tokens = p.longest(18 * GIB)
    assert 0 < tokens < 32768
    assert p.weights + p.scratch + p.kv_bytes(tokens) <= 18 * GIB * USABLE
    assert p.weights + p.scratch + p.kv_bytes(tokens + 1) > 18 * GIB * USABLE


@pytest.mark.parametrize(
    "options",
    [{"quantize": "int3"}, {"dtype": "int8"}, {"batch": 0}, {"max_model_len": 0}, {"max_model_len": 32769}],
)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan_memory(config("Qwen2.5-7B"), **options)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, downloads forbidden, and one known device."""
    for name in ("QWEN_RT_CACHE", "HF_HUB_CACHE", "MODELSCOPE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("QWEN_RT_HUB", "offline")
    monkeypatch.chdir(tmp_path)
    probes = {
        "cuda": Probe(reason="no CUDA driver: libcuda.so.1 not found"),
        "cpu": Probe((DeviceInfo(0, "Testing CPU", 24 * GIB),)),
        "reference": Probe((DeviceInfo(0, "host", 24 * GIB),)),
    }
    monkeypatch.setattr("qwen_rt.backends.select.probe_all", lambda: probes)


def run(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["plan", *argv])
    return args.func(args)


def test_prints_a_plan_without_any_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("Qwen-72B-Chat-Int4") == 0
    out = capsys.readouterr().out
    for words in (
        "Qwen-72B-Chat-Int4 (published shape; no files here)",
        "80 layers, hidden size 8192, 64 heads of 128, vocabulary 152064, up to 32768 tokens",
        "40.98 GB",
        "int4-g128",
        "[this machine]",
        "no CUDA driver: libcuda.so.1 not found",
    ):
        assert words in out
    rows = {line.split("  ")[1].strip(): line for line in out.splitlines() if line.startswith("  ")}
    assert "does not fit (short of" in rows["cpu"] and "fits, up to" in rows["NVIDIA A100 / H100"]
    assert "reference" not in out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    run("Qwen2.5-7B-Instruct", "--json", "--quantize", "int4", "--kv-cache", "int8", "--batch", "2")
    got = json.loads(capsys.readouterr().out)
    want = plan_memory(config("Qwen2.5-7B-Instruct"), quantize="int4", kv_dtype="int8", batch=2)
    assert (got["weights"], got["total"], got["kv"]["2048"]) == (want.weights, want.total, want.kv_bytes(2048))
    here = [f for f in got["fits"] if f["here"]]
    assert here == [{"device": "cpu", "memory": 24 * GIB, "here": True, "tokens": want.longest(24 * GIB)}]
    assert set(got["unusable"]) == {"cuda"}


def test_local_files_are_read_rather_than_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory with a published name and another shape: its own headers count, also its config alone."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    from qwen_rt.checkpoint.layout import expected_shapes

    own = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    own |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 128}
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(own))
    run("./Qwen2.5-7B")
    alone = capsys.readouterr().out
    assert "2 layers, hidden size 64" in alone and "bfloat16" in alone
    shapes = expected_shapes(ModelConfig.from_hf(own))
    save_file({n: torch.zeros(s, dtype=torch.float16) for n, s in shapes.items()}, folder / "model.safetensors")
    run("./Qwen2.5-7B", "--json")
    got = json.loads(capsys.readouterr().out)
    matrices = sum(2 * s[0] * s[1] for s in shapes.values() if len(s) == 2)
    vectors = sum(4 * s[0] for s in shapes.values() if len(s) == 1)
    assert got["weights"] == matrices + vectors and "from the headers" in got["source"]
    assert got["parts"][0]["formats"] == ["float16"]


def test_unknown_name() -> None:
    with pytest.raises(HubError, match="Did you mean Qwen-7B-Chat"):
        run("Qwen-7B-Caht")
    with pytest.raises(HubError, match="was not found"):
        run("somebody/else")
