"""Reading config.json dicts of every generation: values, defaults and each refusal."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_rt.config import ModelConfig, QuantConfig
from qwen_rt.errors import ConfigError

QWEN1 = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "kv_channels": 128,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 32768,
    "no_bias": True,
    "num_attention_heads": 32,
    "num_hidden_layers": 4,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": 8192,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "vocab_size": 151936,
    "some_field_of_tomorrow": {"x": 1},
}
FIRST = {
    "model_type": "qwen",
    "n_embd": 4096,
    "n_head": 32,
    "n_layer": 4,
    "n_positions": 6144,
    "ffn_hidden_size": 22016,
    "padded_vocab_size": 151936,
    "vocab_size": 151851,
    "seq_length": 2048,
}
QWEN2 = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "sliding_window": 32768,
    "vocab_size": 151936,
    "eos_token_id": [151645, 151643],
    "bos_token_id": 151643,
}
QWEN3 = {
    **QWEN2,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "attention_bias": False,
}


def read(base: dict[str, Any], **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({k: v for k, v in {**base, **changes}.items() if v is not ...})


def test_qwen1_values() -> None:
    c = read(QWEN1)
    assert (c.arch, c.ffn_size, c.head_size, c.num_kv_heads) == ("qwen", 11008, 128, 32)
    assert (c.train_length, c.max_position, c.dynamic_ntk, c.logn) == (8192, 32768, True, True)
    assert (c.qkv_bias, c.qk_norm, c.tied_head, c.windows, c.eos_ids) == (True, False, False, (), (151643,))
    assert (c.rope_theta, c.rotary_size, c.norm_eps, c.dtype) == (10000.0, 128, 1e-6, "bfloat16")


def test_first_release_names_and_defaults() -> None:
    c = read(FIRST)
    assert (c.hidden_size, c.num_layers, c.num_heads, c.vocab_size, c.ffn_size) == (4096, 4, 32, 151936, 11008)
    assert (c.dynamic_ntk, c.logn, c.max_position, c.train_length) == (False, False, 6144, 2048)
    assert c.head_size == 128 and c.norm_eps == 1e-5


def test_later_qwen1_has_ntk_and_logn_by_default() -> None:
    c = read(QWEN1, use_dynamic_ntk=..., use_logn_attn=...)
    assert c.dynamic_ntk and c.logn


def test_qwen1_without_ntk_and_logn_is_as_long_as_declared() -> None:
    off = {"use_dynamic_ntk": False, "use_logn_attn": False}
    assert read(QWEN1, **off, max_position_embeddings=...).max_position == 8192
    assert read(QWEN1, **off, max_position_embeddings=16384).max_position == 16384
    assert read(QWEN1, seq_length=65536).max_position == 65536


@pytest.mark.parametrize(("flag", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_qwen1_dtype_flags_win_over_torch_dtype(flag: str, dtype: str) -> None:
    assert read(QWEN1, **{flag: True}, torch_dtype="float16" if dtype != "float16" else "float32").dtype == dtype
    assert read(QWEN1, torch_dtype="float16").dtype == "float16"


def test_qwen1_partial_rotary() -> None:
    assert read(QWEN1, rotary_pct=0.5).rotary_size == 64


@pytest.mark.parametrize(
    ("value", "windows"),
    [(None, ()), (0, ()), (-1, ()), (512, (512,) * 4), ([512, 0, None, -1], (512, None, None, None)), ([0] * 4, ())],
)
def test_qwen1_windows(value: Any, windows: tuple[int | None, ...]) -> None:
    c = read(QWEN1, window_size=value)
    assert c.windows == windows
    assert [c.window(i) for i in range(4)] == list(windows or (None,) * 4)


def test_qwen2_values() -> None:
    c = read(QWEN2)
    assert (c.arch, c.head_size, c.num_kv_heads, c.ffn_size) == ("qwen2", 64, 2, 4864)
    assert (c.qkv_bias, c.qk_norm, c.tied_head, c.yarn, c.windows) == (True, False, True, None, ())
    assert (c.eos_ids, c.bos_id, c.rope_theta, c.max_position) == ((151645, 151643), 151643, 1e6, 32768)
    assert c.train_length == c.max_position and not c.dynamic_ntk and not c.logn


def test_qwen3_values() -> None:
    c = read(QWEN3)
    assert (c.arch, c.head_size, c.qkv_bias, c.qk_norm, c.rotary_size) == ("qwen3", 128, False, True, 128)
    assert read(QWEN3, head_dim=...).head_size == 128, "transformers' default"
    assert read(QWEN3, attention_bias=True).qkv_bias


def test_dtype_under_its_new_name() -> None:
    assert read(QWEN2, torch_dtype=..., dtype="float16").dtype == "float16"
    assert read(QWEN2, torch_dtype=...).dtype == "bfloat16"


def test_windows_as_transformers_builds_them() -> None:
    transformers = pytest.importorskip("transformers")
    cases: list[dict[str, Any]] = [
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ]
    for base, cls in ((QWEN2, transformers.Qwen2Config), (QWEN3, transformers.Qwen3Config)):
        for case in cases:
            theirs = cls(**{k: v for k, v in {**base, **case}.items() if k != "model_type"})
            want = tuple(theirs.sliding_window if t == "sliding_attention" else None for t in theirs.layer_types)
            ours = read(base, **case)
            assert (ours.windows or (None,) * 4) == want, case
            saved = ModelConfig.from_hf(theirs.to_dict())  # what transformers 5 writes back
            assert saved == ours, case


def test_yarn_in_both_spellings() -> None:
    old = read(QWEN2, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768})
    new = read(
        QWEN2,
        rope_theta=...,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
    )
    assert old == new
    assert old.yarn is not None and (old.yarn.factor, old.yarn.original_max_position) == (4.0, 32768)
    assert old.max_position == 131072


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25, "beta_fast": 16, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.3},
    ],
)
def test_yarn_numbers_as_transformers_computes_them(rope: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base = {k: v for k, v in QWEN2.items() if k != "model_type"}
    theirs = transformers.Qwen2Config(**base, rope_scaling=dict(rope))
    _, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    yarn = read(QWEN2, rope_scaling=rope).yarn
    assert yarn is not None
    ours = yarn.attention_factor or 0.1 * math.log(yarn.factor) + 1
    assert ours == pytest.approx(scale, rel=1e-12)
    assert yarn.original_max_position == theirs.rope_parameters["original_max_position_embeddings"]
    assert (yarn.beta_fast, yarn.beta_slow) == (rope.get("beta_fast", 32), rope.get("beta_slow", 1))


def test_gptq_and_awq() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    assert read(QWEN1, quantization_config=gptq).quant == QuantConfig("gptq", 4, 128, True, False, 1)
    v2 = {**gptq, "bits": 8, "group_size": -1, "sym": False, "desc_act": True, "checkpoint_format": "gptq_v2"}
    assert QuantConfig.from_hf(v2) == QuantConfig("gptq", 8, -1, False, True, 0)
    no_method = {k: v for k, v in gptq.items() if k != "quant_method"}  # AutoGPTQ's quantize_config.json
    assert QuantConfig.from_hf(no_method).method == "gptq"
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    own = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}  # AutoAWQ's quant_config.json
    assert QuantConfig.from_hf(awq) == QuantConfig.from_hf(own) == QuantConfig("awq", 4, 128, False, False, 0)


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        (QWEN2, {"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' is not supported; supported:"),
        (QWEN2, {"model_type": "qwen3_moe"}, "qwen3_moe"),
        (QWEN2, {"model_type": "qwen2_5_vl"}, "qwen2_5_vl"),
        (QWEN2, {"model_type": ...}, "model_type is missing"),
        (QWEN2, {"model_type": 3}, "model_type is '3', but must be a string"),
        (QWEN1, {"visual": {"layers": 48}}, "multimodal"),
        (QWEN2, {"architectures": ["Qwen2ForSequenceClassification"]}, "no language-model head"),
        (QWEN2, {"architectures": "Qwen2ForCausalLM"}, "list of strings"),
        (QWEN1, {"no_bias": False}, "bias in c_attn only"),
        (QWEN1, {"intermediate_size": 22015}, "twice the FFN width"),
        (QWEN1, {"kv_channels": 64}, "do not make hidden size"),
        (QWEN1, {"window_size": [1, 2]}, "a list of 4, one a layer"),
        (QWEN1, {"window_size": [1, 2, "3", 4]}, "number of keys a layer"),
        (QWEN1, {"window_size": [True, 1, 1, 1]}, "number of keys a layer"),
        (QWEN1, {"window_size": -2}, "number of keys a layer"),
        (QWEN1, {"rotary_pct": 1.5}, "rotary_pct"),
        (QWEN1, {"rotary_pct": 0.01}, "rotated dims"),
        (QWEN1, {"use_dynamic_ntk": "yes"}, "use_dynamic_ntk is 'yes', but must be true or false"),
        (QWEN1, {"hidden_size": ...}, "hidden_size or n_embd is missing"),
        (QWEN2, {"hidden_size": None}, "hidden_size is missing"),
        (QWEN2, {"hidden_size": 0}, "hidden_size is '0', but must be an integer from 1"),
        (QWEN2, {"hidden_size": -896}, "hidden_size"),
        (QWEN2, {"hidden_size": 10**9}, "hidden_size"),
        (QWEN2, {"hidden_size": 896.0}, "hidden_size"),
        (QWEN2, {"hidden_size": True}, "hidden_size"),
        (QWEN2, {"hidden_size": 897}, "the head size must be an even number"),
        (QWEN2, {"num_hidden_layers": 10**6}, "num_hidden_layers"),
        (QWEN2, {"num_key_value_heads": 3}, "cannot share"),
        (QWEN2, {"num_key_value_heads": 28}, "cannot share"),
        (QWEN3, {"head_dim": 127}, "even number"),
        (QWEN2, {"vocab_size": 1 << 30}, "vocab_size"),
        (QWEN2, {"rms_norm_eps": 0}, "rms_norm_eps"),
        (QWEN2, {"rms_norm_eps": math.nan}, "rms_norm_eps"),
        (QWEN2, {"rope_theta": math.inf}, "rope_theta"),
        (QWEN2, {"rope_theta": 1}, "must be above 1"),
        (QWEN2, {"hidden_act": "gelu"}, "hidden_act"),
        (QWEN2, {"torch_dtype": "int8"}, "torch_dtype"),
        (QWEN2, {"eos_token_id": [151643, -1]}, "eos_token_id"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types"),
        (QWEN2, {"layer_types": ["linear_attention"] * 4}, "layer_types"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 4}, "not set or not switched on"),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        (QWEN2, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        (QWEN2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 0.5}}, "at least 1"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": "4"}}, "factor"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}}, "truncate"),
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2}}, "beta_fast"),
        (QWEN2, {"rope_scaling": "yarn"}, "must be an object"),
        (QWEN2, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "per layer type"),
        (QWEN2, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (QWEN2, {"quantization_config": {"quant_method": "gptq"}}, "bits or w_bit is missing"),
        (QWEN2, {"quantization_config": {"quant_method": "fp8"}}, "'fp8' is not supported; supported: gptq"),
        (QWEN2, {"quantization_config": {"quant_method": "gptq", "bits": 3}}, "3 bits is not supported"),
        (QWEN2, {"quantization_config": {"quant_method": "awq", "bits": 8}}, "8 bits is not supported"),
        (QWEN2, {"quantization_config": {"bits": 4, "group_size": 100}}, "multiple of 16"),
        (QWEN2, {"quantization_config": {"bits": 4, "group_size": 0}}, "multiple of 16"),
        (QWEN2, {"quantization_config": {"bits": 4, "checkpoint_format": "marlin"}}, "gptq_v2"),
        (QWEN2, {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, "gemm"),
        (QWEN2, {"quantization_config": [4]}, "must be an object"),
    ],
)
def test_refused(base: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as e:
        read(base, **changes)
    assert words in str(e.value)


def test_not_an_object() -> None:
    with pytest.raises(ConfigError, match="JSON object, not list"):
        ModelConfig.from_hf([])  # type: ignore[arg-type]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.lists(st.integers(-3, 9), max_size=5),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "bits", "x"]), st.integers(-3, 9), max_size=3),
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([QWEN1, FIRST, QWEN2, QWEN3]),
    st.dictionaries(
        st.sampled_from(
            sorted({*QWEN1, *FIRST, *QWEN2, "rope_scaling", "quantization_config", "window_size", "layer_types"})
        ),
        JUNK,
        max_size=4,
    ),
)
def test_junk_is_refused_or_read_never_a_crash(base: dict[str, Any], junk: dict[str, Any]) -> None:
    try:
        c = read(base, **junk)
    except ConfigError:
        return
    assert c.num_heads % c.num_kv_heads == 0 and c.head_size % 2 == 0 and 0 < c.rotary_size <= c.head_size
