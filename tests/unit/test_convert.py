"""Converting checkpoints: configs, dense, Qwen-1, AutoGPTQ, tokenizer files, and the commands."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assets import demo_gguf, qwen1_vocab
from checkpoint_files import HF_CONFIGS, random_state, write_config, write_model
from models.harness import assert_close, run_logits
from safetensors import safe_open
from safetensors.torch import load_file
from test_checkpoint_gptq import gptq_oracle, parts_of

from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.backends.torch_backend import to_host
from qwen_rt.calibrate import quantize_model, windows
from qwen_rt.checkpoint import model_names, open_checkpoint, verify_names
from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.checkpoint.save import Item, save_weights
from qwen_rt.cli.main import main
from qwen_rt.config import ModelConfig, QuantConfig, Yarn
from qwen_rt.convert import hf_config, qwen1_ranks, to_gptq, to_hf, to_qwen1, write_tokenizer
from qwen_rt.errors import CheckpointError, ConfigError
from qwen_rt.model import build
from qwen_rt.tokenizer import load_tokenizer

QWEN2 = HF_CONFIGS["qwen2"]
BASE = {arch: ModelConfig.from_hf(config) for arch, config in HF_CONFIGS.items()}


@pytest.mark.parametrize(
    "config",
    [
        *BASE.values(),
        replace(BASE["qwen"], dynamic_ntk=False, logn=False, dtype="float16", windows=(8, None), train_length=64,
                max_position=64, eos_ids=(7,), bos_id=3, rotary_size=8),
        replace(BASE["qwen2"], yarn=Yarn(4.0, 8192), max_position=32768, train_length=32768, eos_ids=(5, 6)),
        replace(BASE["qwen2"], yarn=Yarn(2.0, 8192, 30.0, 2.0, 1.5), tied_head=False, dtype="float32"),
        replace(BASE["qwen2"], windows=(None, 16), quant=QuantConfig("gptq", 8, 64, False, True, 0)),
        replace(BASE["qwen3"], qkv_bias=True, quant=QuantConfig("gptq", 4, -1, True, False)),
    ],
)  # fmt: skip
def test_config_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(json.loads(json.dumps(hf_config(config)))) == config


# -- dense -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", None])
@pytest.mark.parametrize("arch", ["qwen", "qwen2", "qwen3"])
def test_to_hf(tmp_path: Path, arch: str, dtype: Any) -> None:
    state = random_state(HF_CONFIGS[arch], torch.float16)
    source = open_checkpoint(write_model(tmp_path / "m", HF_CONFIGS[arch], state))
    out = to_hf(source, tmp_path / "out", dtype)
    got = load_file(out / "model.safetensors")
    assert got.keys() == state.keys()
    kind = getattr(torch, dtype or source.config.dtype)
    assert all(t.dtype == kind and torch.equal(t, state[n].to(kind)) for n, t in got.items())
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert open_checkpoint(out).config == replace(source.config, dtype=dtype or source.config.dtype)


def test_to_hf_dequantises(tmp_path: Path) -> None:
    quant = QuantConfig("gptq", 4, 32, symmetric=False, act_order=True)
    source = RandomCheckpoint(BASE["qwen2"], quant)
    again = open_checkpoint(to_hf(source, tmp_path / "out", "float32"))
    assert again.config.quant is None
    for name in source.linears():
        raw, want = again.linear(name), source.linear(name)
        assert np.array_equal(raw.dequantize(), want.dequantize())
        assert (raw.bias is None) == (want.bias is None)


def test_values_that_overflow_are_refused(tmp_path: Path) -> None:
    state = random_state(QWEN2)
    state["model.layers.0.mlp.up_proj.weight"][3, 3] = 1e6
    source = open_checkpoint(write_model(tmp_path / "m", QWEN2, state))
    with pytest.raises(CheckpointError, match=r"as float16: model\.layers\.0\.mlp\.up_proj has 1 NaN or infinite"):
        to_hf(source, tmp_path / "out", "float16")


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    for place in (tmp_path / "out", tmp_path / "out" / "x"):
        with pytest.raises(ConfigError, match="is not an empty directory"):
            to_hf(RandomCheckpoint(BASE["qwen2"]), place)
        assert (tmp_path / "out" / "x").read_bytes() == b""


def test_shards(tmp_path: Path) -> None:
    state = random_state(QWEN2)
    arrays = {n: to_host(t) for n, t in state.items()}
    parts = {n: np.split(a, range(7, len(a), 7)) for n, a in arrays.items()}
    items = [Item(((n, a.dtype.name, a.shape),), lambda n=n: iter(parts[n])) for n, a in arrays.items()]  # type: ignore[misc]
    path = write_config(tmp_path, QWEN2)
    save_weights(path, items, shard_bytes=40_000)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(f.stat().st_size < 41_000 for f in files)
    checkpoint = open_checkpoint(path)
    assert np.array_equal(checkpoint.linear("model.embed_tokens").dequantize(), arrays["model.embed_tokens.weight"])
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == checkpoint.nbytes() and index["weight_map"].keys() == state.keys()


def test_too_few_values_are_noticed(tmp_path: Path) -> None:
    item = Item((("a", "float32", (4,)),), lambda: iter([np.ones(3, np.float32)]))
    with pytest.raises(ValueError, match="12 bytes were made, 16 announced"):
        save_weights(tmp_path, [item])


# -- Qwen-1 ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_to_qwen1_computes_the_same(tmp_path: Path, tied: bool) -> None:
    source = RandomCheckpoint(replace(BASE["qwen2"], tied_head=tied), seed=3)
    out = open_checkpoint(to_qwen1(source, tmp_path / "q1", "float32", seq_length=64))
    config = out.config
    verify_names(out, *model_names(config))
    assert (config.arch, config.num_kv_heads, config.ffn_size, config.train_length) == ("qwen", 4, 96, 64)
    assert config.dynamic_ntk and config.logn and not config.tied_head and config.rope_theta == 10000.0
    written = json.loads((tmp_path / "q1" / "config.json").read_text())
    assert written["intermediate_size"] == 192 and written["kv_channels"] == 16 and written["rotary_emb_base"] == 1e4

    kv = source.linear("model.layers.1.self_attn.v_proj").dequantize().reshape(2, 16, 64)
    v = out.linear("transformer.h.1.attn.c_attn").dequantize(128, 192).reshape(4, 16, 64)
    assert all(np.array_equal(v[h], kv[h // 2]) for h in range(4))
    ids = [int(x) for x in torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1))]
    expected = run_logits(build(source, ReferenceBackend()), ids)
    assert_close(run_logits(build(out, ReferenceBackend()), ids), expected)


def test_to_qwen1_flags(tmp_path: Path) -> None:
    out = to_qwen1(RandomCheckpoint(BASE["qwen2"]), tmp_path / "q1", "float16", 100, dynamic_ntk=False, logn=False)
    config = open_checkpoint(out).config
    assert (config.dynamic_ntk, config.logn, config.train_length, config.dtype) == (False, False, 100, "float16")


@pytest.mark.parametrize(
    "config",
    [
        BASE["qwen"], BASE["qwen3"], replace(BASE["qwen2"], yarn=Yarn(4.0, 8192)),
        replace(BASE["qwen2"], head_size=32, rotary_size=32),
    ],
)  # fmt: skip
def test_what_qwen1_cannot_express(tmp_path: Path, config: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="can be written as Qwen-1"):
        to_qwen1(RandomCheckpoint(config), tmp_path / "q1")
    assert not (tmp_path / "q1").exists()


# -- AutoGPTQ --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, -1])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("arch", ["qwen", "qwen2"])
def test_to_gptq(
    tmp_path: Path, arch: str, bits: Any, group_size: int, symmetric: bool, act_order: bool, version: Any
) -> None:
    source = RandomCheckpoint(replace(BASE[arch], num_layers=1))
    out = to_gptq(source, tmp_path / "out", bits, group_size, symmetric, act_order, version)
    state, got = load_file(out / "model.safetensors"), open_checkpoint(out)
    assert got.config == replace(
        source.config, quant=QuantConfig("gptq", bits, group_size, symmetric, act_order, 2 - version)
    )
    verify_names(got, *model_names(got.config))
    packed = [n for n in got.linears() if f"{n}.qweight" in state]
    assert len(packed) == (5 if arch == "qwen" else 7)
    for name in got.linears():
        raw, want = got.linear(name), source.linear(name)
        assert (raw.bias is None) == (want.bias is None)
        if want.bias is not None:
            assert raw.bias is not None and np.array_equal(raw.bias, want.bias.astype(np.float16))
        if name not in packed:
            assert np.array_equal(raw.dequantize(), want.dequantize())
            continue
        parts = parts_of(state, name)
        assert np.array_equal(raw.dequantize(), gptq_oracle(parts, bits, group_size, 2 - version))
        error = np.linalg.norm(raw.dequantize() - want.dequantize()) / np.linalg.norm(want.dequantize())
        assert error < (0.14 if bits == 4 else 0.009)
        assert (raw.perm is not None) == (act_order and group_size != -1)
        assert raw.format.has_zeros != symmetric and raw.format.bits == bits
    if arch == "qwen2" and raw.perm is not None:
        q, k = (got.linear(f"model.layers.0.self_attn.{x}_proj").perm for x in "qk")
        assert q is not None and k is not None and np.array_equal(q, k)  # so that they can be fused


def test_quantize_config_alone_is_enough(tmp_path: Path) -> None:
    out = to_gptq(RandomCheckpoint(BASE["qwen"]), tmp_path / "out", group_size=32)
    config = json.loads((out / "config.json").read_text())
    before = open_checkpoint(out).config
    assert config.pop("quantization_config") == json.loads((out / "quantize_config.json").read_text())
    (out / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(out).config == before


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"group_size": 24}, {"group_size": 128}, {"group_size": 0}, {"version": 3}]
)
def test_gptq_options_that_do_not_fit(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        to_gptq(RandomCheckpoint(BASE["qwen2"]), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_gptq_of_gptq_is_refused(tmp_path: Path) -> None:
    quant = QuantConfig("gptq", 4, 32, symmetric=True, act_order=False)
    with pytest.raises(ConfigError, match="is gptq already"):
        to_gptq(RandomCheckpoint(BASE["qwen2"], quant), tmp_path / "out")


# -- tokenizer files and commands ------------------------------------------------------------------------------------
def test_tokenizer_files_are_copied_and_code_is_not(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", QWEN2, random_state(QWEN2))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json", "modeling_x.py"):
        (path / name).write_text(name)
    out = to_hf(open_checkpoint(path), tmp_path / "out")
    copied = {"vocab.json", "merges.txt", "tokenizer_config.json", "generation_config.json"}
    assert {f.name for f in out.iterdir()} == copied | {"config.json", "model.safetensors"}
    assert (out / "vocab.json").read_text() == "vocab.json"


def test_a_vocabulary_that_is_not_qwens(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no vocab\.json or tokenizer\.json"):
        qwen1_ranks(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(CheckpointError, match="its vocabulary is not Qwen's"):
        qwen1_ranks(tmp_path)


def test_tokenizer_of_the_demo_model(tmp_path: Path) -> None:
    """GGUF metadata -> vocab.json and merges.txt -> qwen.tiktoken, which is the genuine file."""
    gguf = demo_gguf()
    write_tokenizer(gguf, tmp_path, BASE["qwen2"])
    ours, theirs = load_tokenizer(tmp_path), load_tokenizer(gguf)
    text = "def f(x):\n\treturn x**2  # 平方 🙂 <|im_start|> <tool_call> 2024"
    assert ours.encode(text) == theirs.encode(text)
    messages = [{"role": "user", "content": text}]
    assert ours.chat_prompt(messages) == theirs.chat_prompt(messages)
    assert ours.special_tokens == theirs.special_tokens and ours.stop_ids == theirs.stop_ids
    ranks = qwen1_ranks(tmp_path)
    assert ranks == qwen1_ranks(gguf)
    assert hashlib.sha256(ranks).hexdigest() == "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
    vocab = qwen1_vocab()
    assert ranks == (vocab / "qwen.tiktoken" if vocab.is_dir() else vocab).read_bytes()


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "m", QWEN2, random_state(QWEN2))
    assert main(["convert", str(path), str(tmp_path / "hf"), "--dtype", "float16"]) == 0
    assert f"wrote {tmp_path / 'hf'}" in capsys.readouterr().out
    options = ["--bits", "8", "--group-size", "16", "--asymmetric", "--act-order", "--gptq-version", "2"]
    assert main(["quantize", str(path), str(tmp_path / "int8"), *options]) == 0
    assert open_checkpoint(tmp_path / "hf").config.dtype == "float16"
    assert open_checkpoint(tmp_path / "int8").config.quant == QuantConfig("gptq", 8, 16, False, True, 0)
    assert main(["quantize", str(tmp_path / "int8"), str(tmp_path / "again")]) == 1
    assert "is gptq already" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "q1"), "--to", "qwen1"]) == 1
    assert "vocab.json" in capsys.readouterr().err


def test_commands_without_torch(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", QWEN2, random_state(QWEN2))

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        code = (
            "import sys\nsys.modules['torch'] = None\nfrom qwen_rt.cli.main import main\nsys.exit(main(sys.argv[1:]))"
        )
        return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)

    assert run("convert", str(path), str(tmp_path / "hf"), "--dtype", "bfloat16").returncode == 0
    assert open_checkpoint(tmp_path / "hf").config.dtype == "bfloat16"
    quantize = ["quantize", str(path), str(tmp_path / "int4"), "--group-size", "16"]
    (tmp_path / "m" / "text").write_text("a text")
    done = run(*quantize, "--calibrate", str(tmp_path / "m" / "text"))
    assert done.returncode == 1 and done.stderr.startswith("qwen-rt: calibration needs PyTorch"), done.stderr
    assert not (tmp_path / "int4").exists()
    assert run(*quantize, "--act-order").returncode == 0
    assert open_checkpoint(tmp_path / "int4").config.quant == QuantConfig("gptq", 4, 16, True, True, 1)


# -- calibrated ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", ["qwen", "qwen2"])
def test_to_gptq_calibrated(tmp_path: Path, arch: str, tied: bool) -> None:
    """On text like the calibration's, logits come nearer to the model's than with rounding to nearest."""
    # Of 16 draws of such small models 0.87 times the error in the mean, 1.15 at worst.
    source = RandomCheckpoint(replace(BASE[arch], tied_head=tied), seed=4)
    g = torch.Generator().manual_seed(0)
    sequences = torch.randint(0, source.config.vocab_size, (6, 100), generator=g).tolist()
    seen: list[str] = []
    done = to_gptq(
        source, tmp_path / "gptq", 4, 16, calibration=sequences[:-1], head=True, progress=lambda n: seen.append(n)
    )
    plain = to_gptq(source, tmp_path / "rtn", 4, 16, head=True)
    assert [n.split("+")[0].rsplit(".", 1)[-1] for n in seen][-1] in ("lm_head", "embed_tokens", "wte")
    want = run_logits(build(source, ReferenceBackend()), sequences[-1])
    errors = []
    for out in (done, plain):
        got = open_checkpoint(out)
        verify_names(got, *model_names(got.config))
        assert not got.config.tied_head
        assert json.loads((out / "config.json").read_text())["quantization_config"]["lm_head"] is True
        assert got.linear("lm_head").format.bits == 4
        assert all(got.linear(n).format.bits == 4 for n in got.linears() if "layers" in n or ".h." in n)
        logits = run_logits(build(got, ReferenceBackend()), sequences[-1])
        errors.append(float(np.linalg.norm(logits - want) / np.linalg.norm(want)))
    assert errors[0] < 0.9 * errors[1]


def test_calibration_that_cannot_be_used(tmp_path: Path) -> None:
    source = RandomCheckpoint(BASE["qwen2"])
    for options in ({"act_order": True}, {"symmetric": False}):
        with pytest.raises(ConfigError, match="symmetric and without act-order"):
            to_gptq(source, tmp_path / "out", group_size=16, calibration=[[1, 2, 3]], **options)
    for sequences in ([], [[]], [[1, source.config.vocab_size]]):
        with pytest.raises(ConfigError, match="calibration needs"):
            quantize_model(source, sequences, 4, 16)


def test_windows_of_a_text() -> None:
    cut = windows([list(range(1030)), list(range(20)), [1, 2]])
    assert [len(w) for w in cut] == [512, 512, 20] and cut[1][0] == 512  # rests of a few tokens are left out


def test_calibrating_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the built-in text, with a file, and with one that is not text."""

    class Bytes:
        def encode(self, text: str) -> list[int]:
            return [b % 96 for b in text.encode()[:300]]

    monkeypatch.setattr("qwen_rt.tokenizer.load_tokenizer", lambda source: Bytes())
    path = write_model(tmp_path / "m", QWEN2, random_state(QWEN2))
    (tmp_path / "own.txt").write_text("a calibration text of our own " * 20, encoding="utf-8")
    for i, extra in enumerate((["--calibrate"], ["--calibrate", str(tmp_path / "own.txt")], [])):
        options = ["--group-size", "16", "--head", *extra]
        assert main(["quantize", str(path), str(tmp_path / f"out{i}"), *options]) == 0
    state = [load_file(tmp_path / f"out{i}" / "model.safetensors") for i in range(3)]
    name = "model.layers.1.mlp.down_proj.qweight"
    assert not torch.equal(state[0][name], state[1][name]) and not torch.equal(state[0][name], state[2][name])
    assert "lm_head.qweight" in state[2]
    (tmp_path / "own.txt").write_bytes(b"\xff\xfe\x00")
    capsys.readouterr()
    assert main(["quantize", str(path), str(tmp_path / "no"), "--calibrate", str(tmp_path / "own.txt")]) == 1
    assert "as UTF-8 text" in capsys.readouterr().err
