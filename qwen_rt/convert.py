"""Rewriting checkpoints: any into a Hugging Face directory, Qwen2 as Qwen-1, dense as AutoGPTQ.

Everything streams, row chunk by row chunk (AutoGPTQ: linear by linear). Errors are ConfigError for what cannot be
converted and CheckpointError for weights that cannot be read.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_rt.checkpoint.base import Checkpoint
from qwen_rt.checkpoint.gguf import read_metadata
from qwen_rt.checkpoint.hf_dir import read_json
from qwen_rt.checkpoint.layout import expected_shapes
from qwen_rt.checkpoint.names import in_layer, model_names
from qwen_rt.checkpoint.save import Item, new_directory, save_json, save_weights
from qwen_rt.checkpoint.store import check_finite
from qwen_rt.config import ModelConfig, QuantConfig
from qwen_rt.dtypes import host_dtype
from qwen_rt.errors import CheckpointError, ConfigError
from qwen_rt.quant.formats import Array, LinearRows, RawLinear, dense_format, dequantize_rows
from qwen_rt.quant.packing import pack_words
from qwen_rt.quant.rtn import quantize_rtn
from qwen_rt.texts import Texts
from qwen_rt.tokenizer.vocab import check_ranks, token_bytes

Dtype = Literal["float32", "float16", "bfloat16"]
CHUNK = 8 << 20  # weights handled at a time
QWEN1_REGULAR = 151643  # tokens of qwen.tiktoken; the ids above are control tokens
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "qwen.tiktoken",
)


def to_hf(checkpoint: Checkpoint, out_dir: str | Path, dtype: Dtype | None = None) -> Path:
    """Write `checkpoint` (GGUF, GPTQ ... dequantised) as a dense Hugging Face directory; dtype None keeps its own."""
    config = replace(checkpoint.config, quant=None, dtype=dtype or checkpoint.config.dtype)
    out = new_directory(Path(out_dir))
    save_json(out / "config.json", hf_config(config))
    write_tokenizer(Path(checkpoint.source), out, config)
    linears, tensors = model_names(config)
    shapes, kind = expected_shapes(config), config.dtype
    items = [item for n in linears for item in _dense(checkpoint.linear(n), n, kind, f"{n}.bias" in shapes)]
    save_weights(out, items + [_vector(checkpoint, name, name, kind) for name in tensors])
    return out


def to_qwen1(
    checkpoint: Checkpoint,
    out_dir: str | Path,
    dtype: Dtype | None = None,
    seq_length: int = 8192,
    dynamic_ntk: bool = True,
    logn: bool = True,
) -> Path:
    """Write a Qwen2 checkpoint as the Qwen-1 model that computes the same up to `seq_length` tokens.

    K and V heads are repeated to the number of query heads, a tied head becomes a matrix of its own, and
    qwen.tiktoken is made from the vocabulary. ConfigError for what Qwen-1 cannot express.
    """
    c = checkpoint.config
    if c.arch != "qwen2" or c.yarn or not c.qkv_bias or c.num_heads * c.head_size != c.hidden_size:
        raise ConfigError(
            f"{checkpoint.source}: only a qwen2 model with attention biases, heads that fill the hidden size and no "
            "YaRN can be written as Qwen-1"
        )
    config = replace(
        c,
        arch="qwen",
        num_kv_heads=c.num_heads,
        train_length=seq_length,
        dynamic_ntk=dynamic_ntk,
        logn=logn,
        tied_head=False,
        dtype=dtype or c.dtype,
        quant=None,
        bos_id=None,
        eos_ids=(QWEN1_REGULAR,),
    )
    out = new_directory(Path(out_dir))
    save_json(out / "config.json", hf_config(config))
    _write_qwen1_tokenizer(Path(checkpoint.source), out, seq_length)

    kind = config.dtype
    get = checkpoint.linear
    items = _dense(get("model.embed_tokens"), "transformer.wte", kind)
    renamed = {"self_attn.o_proj": "attn.c_proj", "mlp.up_proj": "mlp.w1", "mlp.gate_proj": "mlp.w2"}
    renamed["mlp.down_proj"] = "mlp.c_proj"
    for i in range(c.num_layers):
        old, new = f"model.layers.{i}.", f"transformer.h.{i}."
        items += _c_attn([get(f"{old}self_attn.{x}_proj") for x in "qkv"], f"{new}attn.c_attn", config, kind)
        items += [item for a, b in renamed.items() for item in _dense(get(old + a), new + b, kind)]
        items.append(_vector(checkpoint, f"{old}input_layernorm.weight", f"{new}ln_1.weight", kind))
        items.append(_vector(checkpoint, f"{old}post_attention_layernorm.weight", f"{new}ln_2.weight", kind))
    items.append(_vector(checkpoint, "model.norm.weight", "transformer.ln_f.weight", kind))
    items += _dense(get("model.embed_tokens" if c.tied_head else "lm_head"), "lm_head", kind)
    save_weights(out, items)
    return out


def to_gptq(
    checkpoint: Checkpoint,
    out_dir: str | Path,
    bits: Literal[4, 8] = 4,
    group_size: int = 128,
    symmetric: bool = True,
    act_order: bool = False,
    version: Literal[1, 2] = 1,
    seed: int = 0,
    *,
    calibration: Sequence[Sequence[int]] | None = None,
    head: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the linears of the layers in AutoGPTQ's layout, the rest in the checkpoint's own dtype.

    calibration: token ids of texts to round against, by GPTQ (calibrate.py); symmetric and without act-order only.
    None: round to nearest. `act_order` then has no activations to order by, and groups the inputs by a permutation
    drawn from `seed` (one for each input width, as linears that share an input share their order). group_size -1 is one
    group per output. head: the head is quantised too ("lm_head" in the configuration); a tied one becomes its own.
    progress(name) after each linear that was calibrated.
    """
    c = checkpoint.config
    if c.quant is not None:
        raise ConfigError(f"{checkpoint.source}: is {c.quant.method} already; quantise the original weights instead")
    if bits not in (4, 8) or version not in (1, 2) or (group_size != -1 and (group_size < 16 or group_size % 16)):
        raise ConfigError("GPTQ needs 4 or 8 bits, version 1 or 2, and a group size of -1 or a multiple of 16")
    linears, tensors = model_names(c)
    odd = sorted(
        {k for name, (_, k) in linears.items() if in_layer(name) and k % (16 if group_size == -1 else group_size)}
    )
    if odd:
        raise ConfigError(f"group size {group_size} does not divide the input sizes {odd}; choose a smaller one")
    if calibration is not None:
        if act_order or not symmetric:
            raise ConfigError("calibrated rounding is symmetric and without act-order; leave those options out")
        from qwen_rt.calibrate import quantize_model  # computes with torch
    quant = QuantConfig("gptq", bits, group_size, symmetric, act_order, zero_offset=2 - version)
    out = new_directory(Path(out_dir))
    how = _quantization(quant) | ({"lm_head": True} if head else {})
    tied = c.tied_head and not head
    save_json(out / "config.json", hf_config(replace(c, quant=None, tied_head=tied)) | {"quantization_config": how})
    save_json(out / "quantize_config.json", how)
    write_tokenizer(Path(checkpoint.source), out, c)
    rounded: dict[str, RawLinear] = {}
    if calibration is not None:
        rounded = quantize_model(checkpoint, calibration, bits, group_size, head=head, progress=progress)
    items: list[Item] = []
    if head and c.tied_head:
        table = next(name for name in linears if not in_layer(name))
        items.append(_gptq(checkpoint.linear(table), "lm_head", quant, seed, rounded))
    for name in linears:
        raw = checkpoint.linear(name)
        packed = in_layer(name) or (head and name == "lm_head")
        items += [_gptq(raw, name, quant, seed, rounded)] if packed else _dense(raw, name, c.dtype)
    save_weights(out, items + [_vector(checkpoint, name, name, c.dtype) for name in tensors])
    return out


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json that ModelConfig.from_hf reads back as `config`."""
    c = config
    out: dict[str, Any] = {
        "architectures": [
            {"qwen": "QWenLMHeadModel", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[c.arch]
        ],
        "model_type": c.arch,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "tie_word_embeddings": c.tied_head,
        "torch_dtype": c.dtype,
        "bos_token_id": c.bos_id,
        "eos_token_id": c.eos_ids[0] if len(c.eos_ids) == 1 else list(c.eos_ids) or None,
    }
    if c.arch == "qwen":
        out |= {
            "kv_channels": c.head_size,
            "intermediate_size": 2 * c.ffn_size,
            "layer_norm_epsilon": c.norm_eps,
            "rotary_emb_base": c.rope_theta,
            "rotary_pct": c.rotary_size / c.head_size,
            "seq_length": c.train_length,
            "max_position_embeddings": c.max_position,
            "use_dynamic_ntk": c.dynamic_ntk,
            "use_logn_attn": c.logn,
            "no_bias": True,
            "bf16": c.dtype == "bfloat16",
            "fp16": c.dtype == "float16",
            "fp32": c.dtype == "float32",
        }
        if c.windows:
            out["window_size"] = list(c.windows)
    else:
        out |= {
            "head_dim": c.head_size,
            "intermediate_size": c.ffn_size,
            "num_key_value_heads": c.num_kv_heads,
            "rms_norm_eps": c.norm_eps,
            "rope_theta": c.rope_theta,
            "max_position_embeddings": c.max_position,
            "hidden_act": "silu",
            "use_sliding_window": bool(c.windows),
        }
        if c.arch == "qwen3":
            out["attention_bias"] = c.qkv_bias
        if c.windows:
            out["sliding_window"] = next(w for w in c.windows if w)
            out["layer_types"] = ["sliding_attention" if w else "full_attention" for w in c.windows]
        if c.yarn:
            out["rope_scaling"] = {
                "rope_type": "yarn",
                "factor": c.yarn.factor,
                "original_max_position_embeddings": c.yarn.original_max_position,
                "beta_fast": c.yarn.beta_fast,
                "beta_slow": c.yarn.beta_slow,
                "attention_factor": c.yarn.attention_factor,
            }
    if c.quant:
        out["quantization_config"] = _quantization(c.quant)
    return {key: value for key, value in out.items() if value is not None}


def write_tokenizer(source: Path, out: Path, config: ModelConfig) -> None:
    """Copy the tokenizer's files of a directory, or write them from a GGUF file's metadata; nothing for random ones."""
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, out / name)
    elif source.is_file():
        meta = read_metadata(source)
        tokens, merges = _strings(meta, "tokens", source), _strings(meta, "merges", source)
        types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        special = {i: t for i, (t, kind) in enumerate(zip(tokens, types, strict=False)) if kind in (3, 4)}
        vocab = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=False)) if kind in (1, 6)}
        (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        (out / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        about: dict[str, Any] = {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": t, "special": types[i] == 3, "normalized": False, "lstrip": False, "rstrip": False}
                for i, t in special.items()
            },
            "model_max_length": config.max_position,
        }
        for role in ("eos", "padding"):
            token = special.get(meta.get(f"tokenizer.ggml.{role}_token_id", -1))
            if token is not None:
                about["pad_token" if role == "padding" else f"{role}_token"] = token
        if isinstance(meta.get("tokenizer.chat_template"), str):
            about["chat_template"] = meta["tokenizer.chat_template"]
        save_json(out / "tokenizer_config.json", about)
        if config.eos_ids:
            save_json(out / "generation_config.json", {"eos_token_id": list(config.eos_ids)})


def qwen1_ranks(source: Path) -> bytes:
    """The content of qwen.tiktoken, from the Qwen2 vocabulary of a directory or GGUF file. Raises CheckpointError."""
    if source.is_file():
        tokens = dict(enumerate(_strings(read_metadata(source), "tokens", source)))
    else:
        path = next((source / n for n in ("vocab.json", "tokenizer.json") if (source / n).is_file()), None)
        if path is None:
            raise CheckpointError(f"{source}: no vocab.json or tokenizer.json to make qwen.tiktoken from")
        vocab = read_json(path)
        if path.name == "tokenizer.json":
            vocab = vocab.get("model", {}).get("vocab", {})
        tokens = {i: token for token, i in vocab.items()}
    if not all(isinstance(tokens.get(i), str) for i in range(QWEN1_REGULAR)):
        raise CheckpointError(f"{source}: its vocabulary is not Qwen's: ids 0 to {QWEN1_REGULAR - 1} are not all taken")
    ranks = {token_bytes(tokens[i]): i for i in range(QWEN1_REGULAR)}
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in check_ranks(ranks, str(source)).items())
    return b"".join(lines)


def _write_qwen1_tokenizer(source: Path, out: Path, seq_length: int) -> None:
    if not source.exists():  # random weights have no vocabulary
        return
    (out / "qwen.tiktoken").write_bytes(qwen1_ranks(source))
    save_json(out / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer", "model_max_length": seq_length})
    save_json(
        out / "generation_config.json",
        {
            "chat_format": "chatml",
            "eos_token_id": QWEN1_REGULAR,
            "pad_token_id": QWEN1_REGULAR,
            "max_window_size": max(seq_length * 3 // 4, 1),
            "max_new_tokens": 512,
            "do_sample": True,
            "top_k": 0,
            "top_p": 0.8,
        },
    )


def _strings(meta: dict[str, Any], key: str, source: Path) -> list[str]:
    """A list of strings from GGUF tokenizer metadata."""
    value = meta.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, Texts):
        raise CheckpointError(f"{source}: has no tokenizer.ggml.{key}; it carries no byte-level BPE vocabulary")
    return list(value)


def _quantization(quant: QuantConfig) -> dict[str, Any]:
    """quantize_config.json, and quantization_config of config.json."""
    return {
        "quant_method": quant.method,
        "bits": quant.bits,
        "group_size": quant.group_size,
        "sym": quant.symmetric,
        "desc_act": quant.act_order,
        "true_sequential": True,
        "checkpoint_format": "gptq" if quant.zero_offset else "gptq_v2",
    }


def _cast(values: Array, name: str, dtype: Dtype) -> Array:
    """`values` in `dtype`; CheckpointError where that overflows."""
    with np.errstate(over="ignore"):
        out = values.astype(host_dtype(dtype), copy=False)
    check_finite(out, name, f"as {dtype}")
    return out


def _spans(n: int, k: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // k)
    return ((i, min(i + step, n)) for i in range(0, n, step))


def _dense(raw: RawLinear, name: str, dtype: Dtype, biased: bool = False) -> list[Item]:
    """The weight of a linear, and its bias where the model has one (zeros when the source dropped them)."""

    def chunks() -> Iterator[Array]:
        return (_cast(raw.dequantize(a, b), name, dtype) for a, b in _spans(*raw.shape))

    def bias() -> Iterator[Array]:
        yield _cast(_bias(raw), name, dtype)

    if raw.bias is not None and not biased:
        raise ConfigError(f"{name} has a bias, which the dense model has no place for")
    items = [Item(((f"{name}.weight", dtype, raw.shape),), chunks)]
    return [*items, Item(((f"{name}.bias", dtype, (raw.shape[0],)),), bias)] if biased else items


def _bias(raw: RawLinear) -> Array:
    return np.zeros(raw.shape[0], np.float32) if raw.bias is None else raw.bias


def _vector(checkpoint: Checkpoint, name: str, new: str, dtype: Dtype) -> Item:
    spec = (new, dtype, checkpoint.tensors()[name])
    return Item((spec,), lambda: iter([_cast(checkpoint.tensor(name), name, dtype)]))


def _c_attn(qkv: list[RawLinear], name: str, config: ModelConfig, dtype: Dtype) -> list[Item]:
    """Qwen-1's fused projection: all Q, all K, all V, each of `num_heads` heads."""
    hidden, d = config.hidden_size, config.head_size

    def heads(part: Callable[[RawLinear, int, int], Array]) -> Iterator[Array]:
        for raw in qkv:
            for start in range(0, raw.shape[0], d):
                rows = _cast(part(raw, start, start + d), name, dtype)
                yield from (rows for _ in range(hidden // raw.shape[0]))

    return [
        Item(((f"{name}.weight", dtype, (3 * hidden, hidden)),), lambda: heads(RawLinear.dequantize)),
        Item(((f"{name}.bias", dtype, (3 * hidden,)),), lambda: heads(lambda raw, a, b: _bias(raw)[a:b])),
    ]


def _gptq(raw: RawLinear, name: str, quant: QuantConfig, seed: int, rounded: dict[str, RawLinear]) -> Item:
    """qweight, qzeros, scales, g_idx and bias of one linear: as it is in `rounded`, else rounded to nearest."""
    n, k = raw.shape
    size = k if quant.group_size == -1 else quant.group_size
    groups = k // size
    order = np.random.default_rng(seed + k).permutation(k) if quant.act_order else np.arange(k)

    def ordered(start: int, stop: int) -> LinearRows:
        return LinearRows(np.take(dequantize_rows(raw.rows(start, stop), raw.format), order, 1))

    def chunks() -> Iterator[Array]:
        dense = RawLinear(name, raw.shape, dense_format("float32"), ordered)
        coded = rounded.get(name) or quantize_rtn(dense, quant.bits, size, quant.symmetric)
        qweight = np.empty((n, k * quant.bits // 32), np.int32)
        scales = np.empty((n, groups), np.float16)
        zeros = np.full((n, groups), 1 << (quant.bits - 1), np.uint8)
        for a, b in _spans(n, k):
            rows = coded.rows(a, b)
            assert rows.codes is not None and rows.scales is not None
            codes = np.empty_like(rows.codes)
            codes[:, order] = rows.codes
            qweight[a:b], scales[a:b] = pack_words(codes, quant.bits), rows.scales
            if rows.zeros is not None:
                zeros[a:b] = rows.zeros
        g_idx = np.empty(k, np.int32)
        g_idx[order] = np.arange(k, dtype=np.int32) // size
        yield qweight.T
        yield pack_words(zeros.T - np.uint8(quant.zero_offset), quant.bits)
        yield scales.T
        yield g_idx
        yield _cast(_bias(raw), name, "float16")  # AutoGPTQ has one everywhere

    specs = (
        (f"{name}.qweight", "int32", (k * quant.bits // 32, n)),
        (f"{name}.qzeros", "int32", (groups, n * quant.bits // 32)),
        (f"{name}.scales", "float16", (groups, n)),
        (f"{name}.g_idx", "int32", (k,)),
        (f"{name}.bias", "float16", (n,)),
    )
    return Item(specs, chunks)
