"""AutoGPTQ and AWQ linears against an unpacking written value by value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import HF_CONFIGS, random_state, same, write_model
from torch import Tensor

from qwen_rt.backends import cpu
from qwen_rt.checkpoint import model_names, open_checkpoint, verify_names
from qwen_rt.checkpoint.hf_dir import HFCheckpoint
from qwen_rt.errors import CheckpointError
from qwen_rt.native import extension
from qwen_rt.quant.formats import Array, LinearFormat, LinearRows, RawLinear, concat_rows

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def gptq_oracle(parts: dict[str, Tensor], bits: int, group_size: int, offset: int) -> Array:
    """float32 [N, K] by the definition: w[n, k] = scale * (code - (stored zero + offset)), group g_idx[k]."""
    qweight, qzeros = (parts[p].numpy().view(np.uint32) for p in ("qweight", "qzeros"))
    per, mask = 32 // bits, (1 << bits) - 1
    k, n = np.arange(qweight.shape[0] * per)[None, :], np.arange(qweight.shape[1])[:, None]
    group = k // (k.size if group_size == -1 else group_size)
    if "g_idx" in parts:
        group = parts["g_idx"].numpy()[None, :]
    code = (qweight[k // per, n] >> bits * (k % per)) & mask
    zero = ((qzeros[group, n // per] >> bits * (n % per)) & mask).astype(np.int64) + offset
    scale = parts["scales"].float().numpy()[group, n]
    return scale * (code.astype(np.int64) - zero).astype(np.float32)


def awq_oracle(parts: dict[str, Tensor], group_size: int) -> Array:
    """float32 [N, K]: nibble i of word j is column 8 j + AWQ_ORDER[i]."""
    qweight, qzeros = (parts[p].numpy().view(np.uint32) for p in ("qweight", "qzeros"))
    k_size, width = qweight.shape
    out = np.empty((width * 8, k_size), np.float32)
    group = np.arange(k_size) // (k_size if group_size == -1 else group_size)
    for j in range(width):
        for i, column in enumerate(AWQ_ORDER):
            code, zero = ((w.astype(np.int64) >> 4 * i) & 15 for w in (qweight[:, j], qzeros[group, j]))
            out[8 * j + column] = parts["scales"][group, 8 * j + column].float().numpy() * (code - zero)
    return out


def words(draw: torch.Generator, *shape: int) -> Tensor:
    """Random int32 of all bit patterns."""
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64, generator=draw).int()


def sym_word(bits: int, offset: int) -> int:
    """A word of zero points that all mean 2^(bits-1)."""
    value = sum((1 << bits - 1) - offset << bits * i for i in range(32 // bits))
    return value - (1 << 32) if value >> 31 else value


def packed_state(
    config: dict[str, Any], method: str, bits: int, group_size: int, *, symmetric: bool, offset: int, g_idx: str
) -> dict[str, Tensor]:
    """A state dict whose layer linears hold random packed words. g_idx: "none", "plain", "shuffled", "short"."""
    draw = torch.Generator().manual_seed(bits * 1000 + group_size)
    state = random_state(config, torch.float16)
    for full in [n for n in state if state[n].dim() == 2 and (".h." in n or ".layers." in n)]:
        (n, k), name = state.pop(full).shape, full.removesuffix(".weight")
        groups = 1 if group_size == -1 else -(-k // group_size)
        shape = (k * bits // 32, n) if method == "gptq" else (k, n // 8)
        zeros = words(draw, groups, n * bits // 32)
        if symmetric:
            zeros[:] = sym_word(bits, offset)
        elif bits == 8 and offset:
            zeros &= 0x7F7F7F7F  # 255 would mean 256
        state[f"{name}.qweight"] = words(draw, *shape)
        state[f"{name}.qzeros"] = zeros
        state[f"{name}.scales"] = (torch.rand(groups, n, generator=draw) * 0.02).half()
        state.setdefault(f"{name}.bias", torch.zeros(n, dtype=torch.float16))
        plain = torch.arange(k, dtype=torch.int32) // (k if group_size == -1 else group_size)
        if g_idx != "none":
            state[f"{name}.g_idx"] = plain if g_idx == "plain" else plain[torch.randperm(k, generator=draw)]
    return state


def quantised(config: dict[str, Any], **quantization: Any) -> dict[str, Any]:
    return config | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32} | quantization}


def parts_of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{name}."): t for n, t in state.items() if n.startswith(f"{name}.")}


def check_linears(path: Path, state: dict[str, Tensor], oracle: Any, expected: LinearFormat | None = None) -> None:
    checkpoint = open_checkpoint(path)
    verify_names(checkpoint, *model_names(checkpoint.config))
    names = [n for n in checkpoint.linears() if f"{n}.qweight" in state]
    assert len(names) >= 7
    for name in names:
        raw, parts = checkpoint.linear(name), parts_of(state, name)
        want = oracle(parts)
        assert same(raw.dequantize(), want), name
        n = raw.shape[0]
        pieces = [raw.dequantize(a, min(a + 13, n)) for a in range(0, n, 13)]  # spans that cut words
        assert same(np.concatenate(pieces), want), name
        if expected is not None:
            assert raw.format == expected
        if parts["bias"].any():
            assert same(raw.bias, parts["bias"].float())
        else:
            assert raw.bias is None
        part = raw.rows(1, 3)
        assert part.codes is not None and part.codes.dtype == np.uint8 and part.codes.shape == (2, raw.shape[1])
        assert part.scales is not None and part.scales.dtype == np.float16
        assert (part.zeros is not None) == raw.format.has_zeros


class WordsOnly:
    """A linear's words, and no way to have its codes."""

    def __init__(self, raw: RawLinear, elements: int = 1 << 20) -> None:
        self.raw, self.elements = raw, elements

    def stored(self, start: int, stop: int) -> list[Any] | None:
        """Cut into parts of about so many elements."""
        parts = replace(self.raw, shape=(stop, self.raw.shape[1])).spans(self.elements, 16)
        return [part for a, b in parts for part in self.raw.stored(a, b) or ()]

    def __call__(self, start: int, stop: int) -> LinearRows:
        raise AssertionError("read as codes")


def check_words(path: Path, state: dict[str, Tensor], oracle: Any, act_order: bool) -> None:
    """What is packed from words, or with act-order from codes."""
    checkpoint, backend = open_checkpoint(path), cpu.CpuBackend()
    for name in (n for n in checkpoint.linears() if f"{n}.qweight" in state):
        raw = checkpoint.linear(name)
        if raw.perm is None:
            raw = replace(raw, rows=WordsOnly(raw))
        else:
            assert act_order and raw.stored(0, 16) is None
        got = backend.embedding(np.arange(raw.shape[0]), backend.pack_linear(raw))
        assert same(got, oracle(parts_of(state, name))), name


# Input sizes of the models are 64 and 96: a group of 64 is short at the end of 96, one of 128 is longer than both.
@pytest.mark.parametrize("g_idx", ["none", "plain", "shuffled"])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq(tmp_path: Path, bits: int, group_size: int, symmetric: bool, layout: str, g_idx: str) -> None:
    offset = 1 if layout == "gptq" else 0
    one_layer = HF_CONFIGS["qwen2"] | {"num_hidden_layers": 1}
    config = quantised(one_layer, bits=bits, group_size=group_size, sym=symmetric, checkpoint_format=layout)
    state = packed_state(config, "gptq", bits, group_size, symmetric=symmetric, offset=offset, g_idx=g_idx)
    path = write_model(tmp_path / "m", config, state)
    check_linears(path, state, lambda parts: gptq_oracle(parts, bits, group_size, offset))
    if extension():
        check_words(path, state, lambda parts: gptq_oracle(parts, bits, group_size, offset), g_idx == "shuffled")


@pytest.mark.parametrize("arch", ["qwen", "qwen3"])
def test_gptq_of_other_architectures(tmp_path: Path, arch: str) -> None:
    config = quantised(HF_CONFIGS[arch])
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="plain")
    path = write_model(tmp_path / "m", config, state, shards=2)
    check_linears(path, state, lambda parts: gptq_oracle(parts, 4, 32, 1), LinearFormat(4, 32))


def test_gptq_in_bin_files_with_quantize_config_beside(tmp_path: Path) -> None:
    config = quantised(HF_CONFIGS["qwen"])
    state = packed_state(config, "gptq", 4, 32, symmetric=False, offset=1, g_idx="shuffled")
    path = write_model(tmp_path / "m", HF_CONFIGS["qwen"], state)
    (path / "model.safetensors").unlink()
    torch.save(state, path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"is quantised, but neither config\.json nor quantize_config\.json says how"
    ):
        open_checkpoint(path)
    (path / "quantize_config.json").write_text(
        json.dumps({"bits": 4, "group_size": 32, "sym": False, "desc_act": True})
    )
    check_linears(path, state, lambda parts: gptq_oracle(parts, 4, 32, 1), LinearFormat(4, 32, has_zeros=True))


@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_awq(tmp_path: Path, group_size: int) -> None:
    config = quantised(HF_CONFIGS["qwen2"], quant_method="awq", group_size=group_size, version="gemm", zero_point=True)
    state = packed_state(config, "awq", 4, group_size, symmetric=False, offset=0, g_idx="none")
    path = write_model(tmp_path / "m", config, state)
    check_linears(path, state, lambda parts: awq_oracle(parts, group_size))


@pytest.mark.parametrize("says", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_are_what_the_data_say(tmp_path: Path, symmetric: bool, says: bool) -> None:
    config = quantised(HF_CONFIGS["qwen2"], sym=says)
    state = packed_state(config, "gptq", 4, 32, symmetric=symmetric, offset=1, g_idx="plain")
    path = write_model(tmp_path / "m", config, state)
    check_linears(path, state, lambda parts: gptq_oracle(parts, 4, 32, 1), LinearFormat(4, 32, has_zeros=not symmetric))


def test_zero_point_of_16_and_of_256(tmp_path: Path) -> None:
    for bits, top in ((4, 16), (8, 256)):
        config = quantised(HF_CONFIGS["qwen2"], bits=bits)
        state = packed_state(config, "gptq", bits, 32, symmetric=True, offset=1, g_idx="none")
        state["model.layers.0.mlp.up_proj.qzeros"][:] = -1
        path = write_model(tmp_path / str(bits), config, state)
        if bits == 4:
            zeros = open_checkpoint(path).linear("model.layers.0.mlp.up_proj").rows(0, 9).zeros
            assert zeros is not None and (zeros == top).all()
            check_linears(path, state, lambda parts: gptq_oracle(parts, 4, 32, 1))
        else:
            with pytest.raises(CheckpointError, match=r"up_proj has a zero point of 256"):
                open_checkpoint(path).linear("model.layers.0.mlp.up_proj")


def test_act_order_sorts_stably(tmp_path: Path) -> None:
    config = quantised(HF_CONFIGS["qwen2"], desc_act=True)
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="plain")
    state["model.layers.0.mlp.up_proj.g_idx"] = torch.arange(64, dtype=torch.int32) % 2
    checkpoint = open_checkpoint(write_model(tmp_path / "m", config, state))
    raw = checkpoint.linear("model.layers.0.mlp.up_proj")
    assert raw.perm is not None and raw.perm.dtype == np.int32
    assert raw.perm.tolist() == [*range(0, 64, 2), *range(1, 64, 2)]
    assert checkpoint.linear("model.layers.0.mlp.gate_proj").perm is None


def test_zero_bias_is_dropped_only_where_the_model_has_none(tmp_path: Path) -> None:
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="none")
    state["model.layers.0.self_attn.q_proj.bias"].zero_()
    state["model.layers.0.self_attn.o_proj.bias"][3] = 2.0
    checkpoint = open_checkpoint(write_model(tmp_path / "m", config, state))
    biases = {
        n: checkpoint.linear(f"model.layers.0.{n}").bias
        for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    }
    assert biases["self_attn.q_proj"] is not None and not biases["self_attn.q_proj"].any()
    assert biases["self_attn.o_proj"] is not None and biases["self_attn.o_proj"][3] == 2
    assert biases["mlp.up_proj"] is None


def test_packed_tensors_are_let_go(tmp_path: Path) -> None:
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="none")
    checkpoint = open_checkpoint(write_model(tmp_path / "m", config, state))
    assert isinstance(checkpoint, HFCheckpoint)
    raw = checkpoint.linear("model.layers.0.mlp.up_proj")
    raw.rows(0, 9)
    assert checkpoint._parts._slot[0] == raw.name
    raw.rows(9, 96)
    assert checkpoint._parts._slot == ("", {})


UP = "model.layers.0.mlp.up_proj"


def set_(part: str, change: Any) -> Any:
    """A change of one tensor of up_proj; None removes it."""

    def apply(state: dict[str, Tensor]) -> None:
        new = change(state.pop(f"{UP}.{part}"))
        if new is not None:
            state[f"{UP}.{part}"] = new.contiguous()

    return apply


BROKEN: dict[str, tuple[Any, str]] = {
    "no scales": (set_("scales", lambda t: None), r"up_proj\.scales is missing"),
    "no qzeros": (set_("qzeros", lambda t: None), r"up_proj\.qzeros is missing"),
    "qweight int64": (set_("qweight", lambda t: t.long()), r"qweight is int64"),
    "qweight 1-D": (set_("qweight", lambda t: t.flatten()), r"qweight has shape \[768\]"),
    "qweight 3-D": (set_("qweight", lambda t: t[None]), r"qweight has shape \[1, 8, 96\]"),
    "qweight empty": (set_("qweight", lambda t: t[:0]), r"qweight has shape \[0, 96\]"),
    "qweight short": (set_("qweight", lambda t: t[:7]), r"up_proj"),
    "qzeros narrow": (set_("qzeros", lambda t: t[:, :-1]), r"qzeros is int32 \[2, 11\]; .* \[2, 12\]"),
    "scales int": (set_("scales", lambda t: t.to(torch.int16)), r"scales is int16"),
    "one group less": (set_("scales", lambda t: t[:1]), r"scales is float16 \[1, 96\]"),
    "g_idx short": (set_("g_idx", lambda t: t[:-1]), r"g_idx is int32 \[63\]"),
    "bias wide": (set_("bias", lambda t: torch.cat([t, t])), r"bias is float16 \[192\]"),
    "weight too": (lambda s: s.update({f"{UP}.weight": torch.ones(96, 64)}), "both a weight and a qweight"),
    "stray part": (lambda s: s.update({f"{UP}.qscales": torch.ones(2)}), r"qscales"),
    "transposed": (set_("qweight", lambda t: t.t()), r"up_proj"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inconsistent_tensors_are_found_at_opening(tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="plain")
    change(state)
    path = write_model(tmp_path / "m", config, state)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize("lie", [{"bits": 8}, {"group_size": 64}, {"group_size": -1}, {"quant_method": "awq"}])
def test_a_config_that_lies(tmp_path: Path, lie: dict[str, Any]) -> None:
    state = packed_state(quantised(HF_CONFIGS["qwen2"]), "gptq", 4, 32, symmetric=True, offset=1, g_idx="none")
    path = write_model(tmp_path / "m", quantised(HF_CONFIGS["qwen2"], **lie), state)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


@pytest.mark.parametrize("value", [-1, 2, 1 << 30])
def test_g_idx_out_of_range(tmp_path: Path, value: int) -> None:
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="plain")
    state[f"{UP}.g_idx"][5] = value
    checkpoint = open_checkpoint(write_model(tmp_path / "m", config, state))
    with pytest.raises(CheckpointError, match=r"up_proj\.g_idx names groups outside of 0\.\.1"):
        checkpoint.linear(UP)


def test_groups_that_cannot_be_cut(tmp_path: Path) -> None:
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="plain")
    state[f"{UP}.g_idx"][5] = 1  # groups of 31 and 33
    checkpoint = open_checkpoint(write_model(tmp_path / "m", config, state))
    with pytest.raises(CheckpointError, match="cannot be cut into equal ones of a multiple of 16"):
        checkpoint.linear(UP)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="none")
    state[f"{UP}.scales"] = state[f"{UP}.scales"].to(dtype)
    state[f"{UP}.scales"][1, 40] = value
    raw = open_checkpoint(write_model(tmp_path / "m", config, state)).linear(UP)
    raw.rows(0, 40)
    with pytest.raises(CheckpointError, match=r"up_proj\.scales has 1 NaN or infinite"):
        raw.rows(40, 41)


def test_scales_beyond_float16(tmp_path: Path) -> None:
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="none")
    state[f"{UP}.scales"] = state[f"{UP}.scales"].bfloat16()
    state[f"{UP}.scales"][0, 0] = 1e6
    raw = open_checkpoint(write_model(tmp_path / "m", config, state)).linear(UP)
    with pytest.raises(CheckpointError, match=r"up_proj\.scales"):
        raw.rows(0, 4)


needs_extension = pytest.mark.skipif(extension() is None, reason="the native extension was not built")


@needs_extension
@pytest.mark.parametrize("elements", [1, 48 * 64, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packing_words_of_joined_linears(tmp_path: Path, dtype: torch.dtype, elements: int) -> None:
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=False, offset=1, g_idx="none")
    for name in [n for n in state if n.endswith(".scales")]:
        state[name] = state[name].to(dtype)
    checkpoint = open_checkpoint(write_model(tmp_path / "m", config, state))
    parts = [checkpoint.linear(name) for name in (UP, UP.replace("up_", "gate_"))]
    joined = concat_rows(parts, "both")
    assert joined is not None
    backend = cpu.CpuBackend()
    packed = backend.pack_linear(replace(joined, rows=WordsOnly(joined, elements)))
    got = backend.embedding(np.arange(joined.shape[0]), packed)
    assert same(got, np.concatenate([part.dequantize() for part in parts]))


@needs_extension
def test_packing_words_refuses_what_reading_codes_refuses(tmp_path: Path) -> None:
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=True, offset=1, g_idx="none")
    state[f"{UP}.scales"][1, 40] = float("inf")
    raw = open_checkpoint(write_model(tmp_path / "m", config, state)).linear(UP)
    with pytest.raises(CheckpointError, match=r"up_proj\.scales has 1 NaN or infinite"):
        cpu.CpuBackend().pack_linear(raw)


@needs_extension
def test_words_that_wait_for_others_are_packed_alike(tmp_path: Path) -> None:
    config = quantised(HF_CONFIGS["qwen2"])
    state = packed_state(config, "gptq", 4, 32, symmetric=False, offset=1, g_idx="none")
    checkpoint, backend = open_checkpoint(write_model(tmp_path / "m", config, state)), cpu.CpuBackend()
    raws = [checkpoint.linear(name) for name in checkpoint.linears()]  # words and floats
    with backend.packing():
        packed = [backend.pack_linear(raw) for raw in raws]
    for raw, w in zip(raws, packed, strict=True):
        assert same(backend.embedding(np.arange(raw.shape[0]), w), raw.dequantize())
    state[f"{UP}.scales"][1, 40] = float("nan")
    raw = open_checkpoint(write_model(tmp_path / "n", config, state)).linear(UP)
    with pytest.raises(CheckpointError, match=r"up_proj\.scales has 1 NaN or infinite"), backend.packing():
        backend.pack_linear(raw)


@needs_extension
def test_native_packing_of_words_checks_its_arguments(tmp_path: Path) -> None:
    native = extension()
    assert native is not None
    w, dense = native.PackedLinear("int4", "none", 40, 64, 32), native.PackedLinear("float16", "none", 40, 64, 0)
    with_zeros = native.PackedLinear("int4", "zeros", 40, 64, 32)
    scales, source, zeros = np.zeros((2, 40), np.float16), np.array([0, 1]), np.zeros((2, 40), np.uint8)
    (tmp_path / "words").write_bytes(bytes(8 * 40 * 4))
    with open(tmp_path / "words", "rb") as opened:
        file = opened.fileno()
        good = [(w, 0, file, 0, 40, scales, None, source), (w, 16, file, 12, 40, scales[:, 3:19], None, source),
                (with_zeros, 0, file, 0, 40, scales, zeros, source)]  # fmt: skip
        assert native.pack_words(good) == 3 and native.pack_words([]) == 0
        for start, n in ((8, 32), (0, 8), (16, 17)):  # no whole panels
            assert native.pack_words([good[0], (w, start, file, 0, 40, scales[:, :n], None, source), *good]) == 1
        assert native.pack_words([*good, (w, 0, file, 4, 40, scales, None, source), *good]) == 3  # the file ends before
        assert native.pack_words([*good, (w, 0, 1 << 20, 0, 40, scales, None, source)]) == 3  # no such file
        for what, args in (
            ("not made of such words", (w, 0, file, 0, 40, scales, zeros, source)),
            ("not made of such words", (dense, 0, file, 0, 40, scales, None, source)),
            ("not made of such words", (native.PackedLinear("int6", "none", 40, 64, 32), *good[0][1:])),
            ("must have all outputs", (w, 0, file, 0, 39, scales, None, source)),
            ("must have all outputs", (w, 0, file, 0, 1 << 40, scales, None, source)),
            ("offset out of range", (w, 0, file, -4, 40, scales, None, source)),
            ("offset out of range", (w, 0, file, 1 << 62, 40, scales, None, source)),
            ("scales", (w, 0, file, 0, 40, scales.astype(np.float32), None, source)),
            ("scales", (w, 0, file, 0, 40, np.asfortranarray(scales), None, source)),
            ("source must name", (w, 0, file, 0, 40, scales, None, source[:1])),
            ("not there", (w, 0, file, 0, 40, scales, None, np.array([0, 2]))),
            ("not there", (w, 0, file, 0, 40, scales, None, np.array([-1, 0]))),
            ("zeros must have", (with_zeros, 0, file, 0, 40, scales, zeros[:, 1:].copy(), source)),
            ("out of range", (w, -16, file, 0, 40, scales, None, source)),
            ("out of range", (w, 16, file, 0, 40, scales, None, source)),
            ("out of range", (w, 1 << 62, file, 0, 40, scales, None, source)),
        ):
            with pytest.raises(ValueError, match=what):
                native.pack_words([args])
