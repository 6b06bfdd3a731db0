"""ModelConfig: what a model *is*, read from a HF config.json or GGUF metadata; and Settings, the environment.

This is the only module that reads os.environ.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from qwen_rt.errors import ConfigError

Arch = Literal["qwen", "qwen2", "qwen3"]
Hub = Literal["auto", "huggingface", "modelscope", "offline"]

SUPPORTED = "supported: dense Qwen text models, model_type qwen (Qwen-1), qwen2 (Qwen1.5, 2, 2.5) and qwen3"
QWEN1_MAX_POSITION = 32768  # the original's logn table ends at position 32767


@dataclass(frozen=True)
class Yarn:
    """YaRN rope scaling (Peng et al. 2023, arXiv:2309.00071), as in HF `rope_scaling`."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # None: 0.1 * ln(factor) + 1


@dataclass(frozen=True)
class QuantConfig:
    """How a checkpoint's linears are stored (GPTQ: AutoGPTQ v1/v2; AWQ: the GEMM layout)."""

    method: Literal["gptq", "awq"]
    bits: Literal[4, 8]
    group_size: int  # -1: one group per column
    symmetric: bool
    act_order: bool  # "desc_act"; g_idx decides, this is only what the config says
    zero_offset: int = 1  # stored zero point is (zero - zero_offset): 1 for AutoGPTQ v1, 0 for v2 and AWQ

    @classmethod
    def from_hf(cls, config: Any) -> QuantConfig:
        """Read `quantization_config`, AutoGPTQ's quantize_config.json or AutoAWQ's quant_config.json. ConfigError."""
        if not isinstance(config, dict):
            raise ConfigError(f"quantization_config must be an object, not {type(config).__name__}")
        f = _Fields(config, "quantization_config")
        method = f.text("quant_method", default="awq" if "w_bit" in config else "gptq").lower()
        allowed = {"gptq": (4, 8), "awq": (4,)}.get(method, ())
        bits = f.integer("bits", "w_bit") if allowed else 0
        if bits not in allowed:
            raise ConfigError(
                f"quantization_config: {method!r}{f' with {bits} bits' if bits else ''} is not supported; "
                "supported: gptq with 4 or 8 bits, awq with 4 bits"
            )
        group_size = f.integer("group_size", "q_group_size", default=128, low=-1, high=1 << 16)
        if group_size != -1 and (group_size < 16 or group_size % 16):
            raise f.wrong("group_size", group_size, "-1 or a multiple of 16")
        if method == "awq":
            if (version := f.text("version", default="gemm").lower()) != "gemm":
                raise f.wrong("version", version, "'gemm', the only AWQ layout supported")
            zero_point = f.flag("zero_point", default=True)
            return cls("awq", 4, group_size, symmetric=not zero_point, act_order=False, zero_offset=0)
        layout = f.text("checkpoint_format", "format", default="gptq").lower()
        if layout not in ("gptq", "gptq_v2"):
            raise f.wrong("checkpoint_format", layout, "'gptq' or 'gptq_v2'")
        return cls(
            "gptq",
            cast(Literal[4, 8], bits),
            group_size,
            symmetric=f.flag("sym", default=True),
            act_order=f.flag("desc_act", default=False),
            zero_offset=0 if layout == "gptq_v2" else 1,
        )


@dataclass(frozen=True)
class ModelConfig:
    """Everything the graph needs to know about a model; no device, no dtype of computation."""

    arch: Arch
    vocab_size: int  # rows of the embedding (padded), e.g. 151936
    hidden_size: int
    ffn_size: int  # true FFN width; for Qwen-1 half of its `intermediate_size`
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_eps: float
    rope_theta: float
    rotary_size: int  # rotated dims of the head, = head_size unless rotary_pct < 1
    max_position: int  # longest sequence the model is declared for
    train_length: int  # Qwen-1 `seq_length`: where dynamic NTK and logn begin; = max_position elsewhere
    dynamic_ntk: bool = False
    logn: bool = False
    yarn: Yarn | None = None
    windows: tuple[int | None, ...] = ()  # per layer: number of keys visible, own included; None = all; () = all None
    qkv_bias: bool = True
    qk_norm: bool = False  # Qwen3
    tied_head: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"  # the checkpoint's own float dtype
    quant: QuantConfig | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def window(self, layer: int) -> int | None:
        """Number of keys layer `layer` may see (its own position included), or None for all."""
        return self.windows[layer] if self.windows else None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read a HF `config.json` dict (model_type qwen, qwen2, qwen3). Raises ConfigError."""
        if not isinstance(config, dict):
            raise ConfigError(f"config.json must hold a JSON object, not {type(config).__name__}")
        f = _Fields(config, "config.json")
        model_type = f.text("model_type")
        if model_type not in ("qwen", "qwen2", "qwen3"):
            raise ConfigError(f"config.json: model_type {model_type!r} is not supported; {SUPPORTED}")
        modal = next((k for k in ("visual", "audio", "vision_config", "audio_config") if config.get(k)), None)
        if modal:
            raise ConfigError(f"config.json: {modal!r} marks a multimodal model; {SUPPORTED}")
        heads = f.names("architectures")
        if heads and not any(h.endswith(("ForCausalLM", "LMHeadModel")) for h in heads):
            raise ConfigError(f"config.json: architectures {heads} has no language-model head; {SUPPORTED}")
        made = _qwen1_from_hf(f) if model_type == "qwen" else _qwen2_from_hf(f, cast(Arch, model_type))
        quant = config.get("quantization_config")
        return _checked(replace(made, quant=None if quant is None else QuantConfig.from_hf(quant)), f.where)

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> ModelConfig:
        """Read GGUF metadata (general.architecture qwen, qwen2, qwen3). Raises ConfigError.

        Two keys are not in the file but added by its reader: qwen_rt.vocab_size (rows of token_embd) and
        qwen_rt.has_output (an own output matrix exists).
        """
        f = _Fields(metadata, "GGUF metadata")
        arch = f.text("general.architecture")
        if arch not in ("qwen", "qwen2", "qwen3"):
            raise ConfigError(f"GGUF metadata: general.architecture {arch!r} is not supported; {SUPPORTED}")
        hidden = f.integer(f"{arch}.embedding_length", high=_MAX_WIDTH)
        heads = f.integer(f"{arch}.attention.head_count", high=_MAX_HEADS)
        head_size = f.integer(f"{arch}.attention.key_length", default=_head_size(hidden, heads, f.where))
        if f.integer(f"{arch}.attention.value_length", default=head_size) != head_size:
            raise ConfigError("GGUF metadata: attention.value_length differs from key_length; no Qwen does that")
        ffn = f.integer(f"{arch}.feed_forward_length", high=_MAX_WIDTH * 8)
        if arch == "qwen":  # converters copy Qwen-1's intermediate_size, twice the FFN width
            ffn = _halved(ffn, f"{f.where}: qwen.feed_forward_length")
        context = f.integer(f"{arch}.context_length", high=_MAX_POSITION)
        yarn = _yarn_from_gguf(f, f"{arch}.rope.scaling", context)
        max_position = context if yarn is None else max(context, int(yarn.factor * yarn.original_max_position))
        eos = [f.ids(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
        dtypes: dict[int, Literal["float32", "float16"]] = {0: "float32", 1: "float16"}
        made = cls(
            arch=cast(Arch, arch),
            vocab_size=f.integer("qwen_rt.vocab_size", high=_MAX_VOCAB),
            hidden_size=hidden,
            ffn_size=ffn,
            num_layers=f.integer(f"{arch}.block_count", high=_MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=f.integer(f"{arch}.attention.head_count_kv", default=heads),
            head_size=head_size,
            norm_eps=f.number(
                f"{arch}.attention.layer_norm_rms_epsilon", f"{arch}.attention.layer_norm_epsilon", default=1e-6
            ),
            rope_theta=f.number(f"{arch}.rope.freq_base", default=10000.0, high=_MAX_THETA),
            rotary_size=f.integer(f"{arch}.rope.dimension_count", default=head_size),
            max_position=max_position,
            train_length=max_position,
            yarn=yarn,
            qkv_bias=arch != "qwen3",
            qk_norm=arch == "qwen3",
            tied_head=not f.flag("qwen_rt.has_output"),
            dtype=dtypes.get(f.integer("general.file_type", default=-1, low=-1), "bfloat16"),
            bos_id=next(iter(f.ids("tokenizer.ggml.bos_token_id")), None),
            eos_ids=tuple(dict.fromkeys(i for ids in eos for i in ids)),
        )
        return _checked(made, f.where)


# -- limits: far above every published model, low enough that a broken file cannot ask for terabytes ---------------
_MAX_VOCAB, _MAX_WIDTH, _MAX_LAYERS, _MAX_HEADS = 1 << 21, 1 << 17, 1024, 1024
_MAX_HEAD_SIZE, _MAX_POSITION, _MAX_THETA = 1024, 1 << 24, 1e12


class _Fields:
    """Typed reading of an untrusted mapping; every failure is a ConfigError that names the field.

    Several names are alternatives, the first one present wins; null counts as absent.
    """

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def find(self, names: Iterable[str]) -> tuple[str, Any]:
        return next(((n, self.data[n]) for n in names if self.data.get(n) is not None), ("", None))

    def wrong(self, name: str, value: Any, want: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name} is {str(value)[:80]!r}, but must be {want}")

    def missing(self, names: Iterable[str]) -> ConfigError:
        return ConfigError(f"{self.where}: {' or '.join(names)} is missing")

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int = 1 << 31) -> int:
        name, value = self.find(names)
        if not name:
            if default is None:
                raise self.missing(names)
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, *names: str, default: float | None = None, high: float = 1e9) -> float:
        """A finite number > 0 and <= high."""
        name, value = self.find(names)
        if not name:
            if default is None:
                raise self.missing(names)
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
            raise self.wrong(name, value, f"a number above 0 and up to {high:g}")
        return float(value)

    def flag(self, *names: str, default: bool | None = None) -> bool:
        name, value = self.find(names)
        if not name:
            if default is None:
                raise self.missing(names)
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        name, value = self.find(names)
        if not name:
            if default is None:
                raise self.missing(names)
            return default
        if not isinstance(value, str):
            raise self.wrong(name, value, "a string")
        return value

    def names(self, name: str) -> list[str]:
        value = self.find([name])[1] or []
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise self.wrong(name, value, "a list of strings")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them -> tuple, () when absent."""
        value = self.find([name])[1]
        found = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < _MAX_VOCAB for x in found):
            raise self.wrong(name, value, "a token id or a list of them")
        return tuple(found)

    def group(self, name: str) -> _Fields:
        value = self.find([name])[1]
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return _Fields(value or {}, f"{self.where}: {name}")


def _head_size(hidden: int, heads: int, where: str) -> int:
    """hidden // heads; 0 when not divisible, which _checked reports unless the file names a head size itself."""
    return hidden // heads if hidden % heads == 0 else 0


def _halved(width: int, what: str) -> int:
    if width % 2:
        raise ConfigError(f"{what} is {width}, but Qwen-1 stores twice the FFN width, an even number")
    return width // 2


def _checked(c: ModelConfig, where: str) -> ModelConfig:
    """The config itself once its numbers fit together; ConfigError otherwise."""
    if not 2 <= c.head_size <= _MAX_HEAD_SIZE or c.head_size % 2:
        raise ConfigError(
            f"{where}: hidden size {c.hidden_size} over {c.num_heads} heads (head size {c.head_size or 'not whole'}); "
            f"the head size must be an even number from 2 to {_MAX_HEAD_SIZE}"
        )
    if c.num_heads % c.num_kv_heads:
        raise ConfigError(f"{where}: {c.num_heads} query heads cannot share {c.num_kv_heads} key heads evenly")
    if not 2 <= c.rotary_size <= c.head_size or c.rotary_size % 2:
        raise ConfigError(f"{where}: {c.rotary_size} rotated dims do not fit a head of {c.head_size} (must be even)")
    if c.rope_theta <= 1:
        raise ConfigError(f"{where}: rope base {c.rope_theta:g} must be above 1")
    return c


_DTYPES: dict[str, Literal["float32", "float16", "bfloat16"]] = {
    "float32": "float32",
    "float16": "float16",
    "bfloat16": "bfloat16",
}


def _dtype(f: _Fields) -> Literal["float32", "float16", "bfloat16"]:
    name = f.text("torch_dtype", "dtype", default="bfloat16").removeprefix("torch.")
    if name not in _DTYPES:
        raise f.wrong("torch_dtype", name, "float32, float16 or bfloat16")
    return _DTYPES[name]


def _qwen1_from_hf(f: _Fields) -> ModelConfig:
    """Qwen-1, its first releases included (n_embd, n_layer, n_head, padded_vocab_size, ffn_hidden_size)."""
    if not f.flag("no_bias", default=True):
        raise ConfigError(f"{f.where}: no_bias is false, but Qwen-1 has a bias in c_attn only")
    first_release = "n_embd" in f.data or "padded_vocab_size" in f.data
    hidden = f.integer("hidden_size", "n_embd", high=_MAX_WIDTH)
    heads = f.integer("num_attention_heads", "n_head", high=_MAX_HEADS)
    layers = f.integer("num_hidden_layers", "n_layer", high=_MAX_LAYERS)
    head_size = f.integer("kv_channels", default=_head_size(hidden, heads, f.where), high=_MAX_HEAD_SIZE)
    if head_size * heads != hidden:
        raise ConfigError(f"{f.where}: {heads} heads of kv_channels {head_size} do not make hidden size {hidden}")
    doubled = f.integer("intermediate_size", "ffn_hidden_size", high=_MAX_WIDTH * 8)
    declared = f.integer("max_position_embeddings", "n_positions", default=0, low=0, high=_MAX_POSITION)
    train_length = f.integer("seq_length", default=declared or 2048, low=2, high=_MAX_POSITION)
    # The later configuration class has both switches on by default, the first release's had them off.
    ntk = f.flag("use_dynamic_ntk", default=not first_release)
    logn = f.flag("use_logn_attn", default=not first_release)
    longest = max(train_length, QWEN1_MAX_POSITION if ntk or logn else declared)
    flags = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    forced = next((_DTYPES[d] for k, d in flags.items() if f.flag(k, default=False)), None)
    return ModelConfig(
        arch="qwen",
        vocab_size=f.integer("padded_vocab_size", "vocab_size", high=_MAX_VOCAB),
        hidden_size=hidden,
        ffn_size=_halved(doubled, f"{f.where}: intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=head_size,
        norm_eps=f.number("layer_norm_epsilon", default=1e-5 if first_release else 1e-6, high=0.1),
        rope_theta=f.number("rotary_emb_base", default=10000.0, high=_MAX_THETA),
        rotary_size=int(head_size * f.number("rotary_pct", default=1.0, high=1.0)),
        max_position=longest,
        train_length=train_length,
        dynamic_ntk=ntk,
        logn=logn,
        windows=_qwen1_windows(f, layers),
        tied_head=f.flag("tie_word_embeddings", default=False),
        dtype=forced or _dtype(f),
        bos_id=next(iter(f.ids("bos_token_id")), None),
        eos_ids=f.ids("eos_token_id") or (151643,),
    )


def _qwen1_windows(f: _Fields, layers: int) -> tuple[int | None, ...]:
    """`window_size`: one number for every layer or a list of one a layer; null, 0 and -1 mean no window."""
    value = f.find(["window_size"])[1]
    sizes = value if isinstance(value, list) else [value] * layers
    if len(sizes) != layers:
        raise f.wrong("window_size", value, f"one number, or a list of {layers}, one a layer")
    if any(s is not None and (isinstance(s, bool) or not isinstance(s, int) or s < -1) for s in sizes):
        raise f.wrong("window_size", value, "a number of keys a layer (null, 0 or -1: all)")
    return tuple(s if s and s > 0 else None for s in sizes) if any(s and s > 0 for s in sizes) else ()


def _qwen2_from_hf(f: _Fields, arch: Arch) -> ModelConfig:
    """Qwen1.5, Qwen2, Qwen2.5 and dense Qwen3, with transformers' defaults for what is absent."""
    if (act := f.text("hidden_act", default="silu")) != "silu":
        raise f.wrong("hidden_act", act, "'silu'")
    hidden = f.integer("hidden_size", high=_MAX_WIDTH)
    heads = f.integer("num_attention_heads", high=_MAX_HEADS)
    layers = f.integer("num_hidden_layers", high=_MAX_LAYERS)
    head_size = 128 if arch == "qwen3" and "head_dim" not in f.data else _head_size(hidden, heads, f.where)
    head_size = f.integer("head_dim", default=head_size, high=_MAX_HEAD_SIZE)
    max_position = f.integer("max_position_embeddings", default=32768, high=_MAX_POSITION)
    theta, yarn = _rope_from_hf(f, max_position)
    if yarn:
        max_position = max(max_position, int(yarn.factor * yarn.original_max_position))
    return ModelConfig(
        arch=arch,
        vocab_size=f.integer("vocab_size", high=_MAX_VOCAB),
        hidden_size=hidden,
        ffn_size=f.integer("intermediate_size", high=_MAX_WIDTH * 8),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=f.integer("num_key_value_heads", default=heads, high=_MAX_HEADS),
        head_size=head_size,
        norm_eps=f.number("rms_norm_eps", default=1e-6, high=0.1),
        rope_theta=theta,
        rotary_size=head_size,
        max_position=max_position,
        train_length=max_position,
        yarn=yarn,
        windows=_qwen2_windows(f, layers),
        qkv_bias=arch == "qwen2" or f.flag("attention_bias", default=False),
        qk_norm=arch == "qwen3",
        tied_head=f.flag("tie_word_embeddings", default=False),
        dtype=_dtype(f),
        bos_id=next(iter(f.ids("bos_token_id")), None),
        eos_ids=f.ids("eos_token_id"),
    )


def _qwen2_windows(f: _Fields, layers: int) -> tuple[int | None, ...]:
    """As transformers: `layer_types` when given, else layers from max_window_layers on, and only if switched on."""
    window = None
    if f.flag("use_sliding_window", default=False) and not (
        "sliding_window" in f.data and f.data["sliding_window"] is None
    ):
        window = f.integer("sliding_window", default=4096, high=_MAX_POSITION)
    first = f.integer("max_window_layers", default=28, low=0)
    sliding = "sliding_attention"
    types = f.names("layer_types") or [
        sliding if window is not None and i >= first else "full_attention" for i in range(layers)
    ]
    if len(types) != layers or not set(types) <= {sliding, "full_attention"}:
        raise f.wrong("layer_types", types, f"a list of {layers} entries, full_attention or {sliding}")
    if window is None and sliding in types:
        raise ConfigError(f"{f.where}: layer_types has {sliding}, but sliding_window is not set or not switched on")
    return tuple(window if t == sliding else None for t in types) if sliding in types else ()


def _rope_from_hf(f: _Fields, max_position: int) -> tuple[float, Yarn | None]:
    """(rope_theta, YaRN or None) from rope_scaling (transformers 4) or rope_parameters (transformers 5)."""
    scaling = f.group("rope_scaling")
    r = scaling if scaling.data else f.group("rope_parameters")
    theta = r.number("rope_theta", default=f.number("rope_theta", default=10000.0, high=_MAX_THETA), high=_MAX_THETA)
    kind = r.text("rope_type", "type", default="default")
    if any(isinstance(v, dict) for v in r.data.values()):
        raise ConfigError(f"{r.where}: separate parameters per layer type are not supported; give one flat object")
    if f.number("partial_rotary_factor", default=1.0) != 1 or r.number("partial_rotary_factor", default=1.0) != 1:
        raise ConfigError(f"{r.where}: partial_rotary_factor other than 1 is not supported for qwen2 and qwen3")
    if kind in ("default", "none"):
        return theta, None
    if kind != "yarn":
        raise ConfigError(f"{r.where}: rope type {kind!r} is not supported; use 'yarn', or remove the scaling")
    if not r.flag("truncate", default=True):
        raise ConfigError(f"{r.where}: truncate false is not supported; remove it to use YaRN as published")
    original = f.integer(
        "original_max_position_embeddings",
        default=r.integer("original_max_position_embeddings", default=max_position, high=_MAX_POSITION),
        high=_MAX_POSITION,
    )
    factor = r.number("factor", default=max_position / original, high=4096)
    scale = r.number("attention_factor", default=0.0, high=1e3) or None
    m, m_all = r.number("mscale", default=0.0), r.number("mscale_all_dim", default=0.0)
    if scale is None and m and m_all:
        grow = 0.1 * math.log(max(factor, 1.0))
        scale = (grow * m + 1) / (grow * m_all + 1)
    return theta, _yarn(r, factor, original, scale, "beta_fast", "beta_slow")


def _yarn(f: _Fields, factor: float, original: int, scale: float | None, fast: str, slow: str) -> Yarn:
    if factor < 1:
        raise f.wrong("factor", factor, "at least 1")
    yarn = Yarn(factor, original, f.number(fast, default=32.0), f.number(slow, default=1.0), scale)
    if yarn.beta_fast < yarn.beta_slow:
        raise f.wrong("beta_fast", yarn.beta_fast, f"at least beta_slow ({yarn.beta_slow:g})")
    return yarn


def _yarn_from_gguf(f: _Fields, prefix: str, context: int) -> Yarn | None:
    kind = f.text(f"{prefix}.type", default="none")
    factor = f.number(f"{prefix}.factor", default=1.0, high=4096)
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind != "yarn":
        raise ConfigError(f"{f.where}: {prefix}.type {kind!r} is not supported; use a file with 'yarn' or no scaling")
    original = f.integer(f"{prefix}.original_context_length", default=context, high=_MAX_POSITION)
    extra = f.number(f"{prefix}.attn_factor", default=1.0)  # on top of the paper's own factor, unlike HF's
    scale = None if extra == 1 else extra * (0.1 * math.log(factor) + 1)
    return _yarn(f, factor, original, scale, f"{prefix}.yarn_beta_fast", f"{prefix}.yarn_beta_slow")


# -- the environment -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What the environment asks for, read when from_env() is called, never at import."""

    backend: str | None  # QWEN_BACKEND: what device "auto" means
    threads: int  # QWEN_RT_THREADS; default: the physical cores this process may use
    hub: Hub  # QWEN_RT_HUB; HF_HUB_OFFLINE=1 makes it "offline" unless QWEN_RT_HUB is set
    cache: Path  # QWEN_RT_CACHE
    hf_cache: Path  # HF_HUB_CACHE, or HF_HOME/hub
    modelscope_cache: Path  # MODELSCOPE_CACHE
    log: str  # QWEN_RT_LOG: debug, info, warning or error
    cpu_isa: str = ""  # QWEN_RT_CPU_ISA: scalar, avx2, avx512 or neon; default: the best this processor has, of those
    # that ran on a real one (not neon)
    cpu_activation_bits: int = 8  # QWEN_RT_CPU_ACTIVATION_BITS: 8 or 16, for integer weights and many rows
    rocm_path: str = ""  # ROCM_PATH, set by DTK's env.sh
    cuda_home: str = ""  # CUDA_HOME, else CUDA_PATH: a CUDA toolkit
    graph_rows: int | None = None  # QWEN_RT_GRAPH_ROWS: largest batch whose decode step is recorded; 0: none
    ascend_home: str = ""  # ASCEND_HOME_PATH, set by CANN's set_env.sh

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read `env` (default: os.environ). An empty value counts as unset. Raises ConfigError on a bad one."""
        env = os.environ if env is None else env

        def path(name: str, default: str | Path) -> Path:
            return Path(env.get(name) or default).expanduser()

        caches = path("XDG_CACHE_HOME", "~/.cache")
        offline = env.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        hub = (env.get("QWEN_RT_HUB") or ("offline" if offline else "auto")).lower()
        log = (env.get("QWEN_RT_LOG") or "warning").lower()
        threads = env.get("QWEN_RT_THREADS") or str(physical_cores())
        if not threads.isdecimal() or not 1 <= int(threads) <= 4096:
            raise ConfigError(f"QWEN_RT_THREADS is {threads!r}, but must be a number of threads from 1 to 4096")
        graph_rows = env.get("QWEN_RT_GRAPH_ROWS") or None
        if graph_rows is not None and not (graph_rows.isdecimal() and int(graph_rows) <= 4096):
            raise ConfigError(f"QWEN_RT_GRAPH_ROWS is {graph_rows!r}, but must be a number of rows from 0 to 4096")
        activation_bits = env.get("QWEN_RT_CPU_ACTIVATION_BITS") or "8"
        if activation_bits not in ("8", "16"):
            raise ConfigError(f"QWEN_RT_CPU_ACTIVATION_BITS is {activation_bits!r}, but must be 8 or 16")
        if log not in ("debug", "info", "warning", "error"):
            raise ConfigError(f"QWEN_RT_LOG is {log!r}, but must be debug, info, warning or error")
        return cls(
            backend=env.get("QWEN_BACKEND") or None,
            threads=int(threads),
            hub=check_hub(hub, "QWEN_RT_HUB"),
            cache=path("QWEN_RT_CACHE", "~/.cache/qwen_rt"),
            hf_cache=path("HF_HUB_CACHE", path("HF_HOME", caches / "huggingface") / "hub"),
            modelscope_cache=path("MODELSCOPE_CACHE", "~/.cache/modelscope"),
            log=log,
            cpu_isa=env.get("QWEN_RT_CPU_ISA", "").lower(),
            cpu_activation_bits=int(activation_bits),
            rocm_path=env.get("ROCM_PATH", ""),
            cuda_home=env.get("CUDA_HOME") or env.get("CUDA_PATH", ""),
            graph_rows=None if graph_rows is None else int(graph_rows),
            ascend_home=env.get("ASCEND_HOME_PATH", ""),
        )


def check_hub(name: str, where: str) -> Hub:
    """`name` when it is one of the hubs; ConfigError naming `where` it was given otherwise."""
    if name not in ("auto", "huggingface", "modelscope", "offline"):
        raise ConfigError(f"{where} is {name!r}, but must be auto, huggingface, modelscope or offline")
    return cast(Hub, name)


def physical_cores(root: Path = Path("/")) -> int:
    """Physical cores this process may use: CPU affinity, hyper-thread siblings and the cgroup CPU quota count."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not on macOS or Windows
        cpus = set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in cpus:
        siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings or str(cpu))
    quota = _cgroup_cpus(root)
    return max(1, min(len(cores), math.ceil(quota) if quota else len(cores)))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cgroup_cpus(root: Path) -> float | None:
    """CPUs the tightest cgroup (v2 cpu.max, v1 cfs quota) on the way to the root grants; None = no limit."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        for level in [mount / group.lstrip("/"), *(mount / group.lstrip("/")).parents]:
            if controllers:
                words = [_read(level / "cpu.cfs_quota_us"), _read(level / "cpu.cfs_period_us")]
            else:
                words = _read(level / "cpu.max").split()
            if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
                limits.append(int(words[0]) / int(words[1]))
            if level == mount:
                break
    return min(limits, default=None)
