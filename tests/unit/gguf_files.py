"""Tiny GGUF files for tests: a writer made of pieces, so that a test can also put the wrong pieces together."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np

from qwen_rt.checkpoint.gguf_dequant import TENSOR_TYPES

Tensors = dict[str, tuple[tuple[int, ...], str, bytes]]
"""GGUF name -> (shape, outermost first; type name; data)."""

TYPE_IDS = {t.name: i for i, t in TENSOR_TYPES.items()}
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def kind_of(value: Any) -> int:
    """The value type a writer would choose."""
    if isinstance(value, bool):
        return 7
    if isinstance(value, int):
        return 4 if 0 <= value < 1 << 32 else 11 if value < 0 else 10
    return 12 if isinstance(value, float) else 9 if isinstance(value, list) else 8


def pair(key: str | bytes, value: Any, kind: int | None = None, item_kind: int | None = None) -> bytes:
    """A metadata pair; `kind` and `item_kind` (of a list) default to what fits the value."""
    kind = kind_of(value) if kind is None else kind
    head = string(key) + struct.pack("<I", kind)
    if kind != 9:
        return head + _payload(value, kind)
    item_kind = kind_of(value[0] if value else 0) if item_kind is None else item_kind
    return head + struct.pack("<IQ", item_kind, len(value)) + b"".join(_payload(v, item_kind) for v in value)


def _payload(value: Any, kind: int) -> bytes:
    return string(value) if kind == 8 else struct.pack("<" + _FORMATS[kind], value)


def entry(name: str | bytes, shape: tuple[int, ...], type_id: int, offset: int, ndim: int | None = None) -> bytes:
    """A line of the tensor table."""
    dims = struct.pack(f"<{len(shape)}Q", *shape[::-1])
    return (
        string(name)
        + struct.pack("<I", len(shape) if ndim is None else ndim)
        + dims
        + struct.pack("<IQ", type_id, offset)
    )


def assemble(
    pairs: list[bytes],
    entries: list[bytes],
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_pairs: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these pieces; the counts default to the truth."""
    tensors = len(entries) if num_tensors is None else num_tensors
    counts = struct.pack("<IQQ", version, tensors, len(pairs) if num_pairs is None else num_pairs)
    header = magic + counts + b"".join(pairs) + b"".join(entries)
    return header + bytes(-len(header) % alignment) + data


def gguf_bytes(metadata: dict[str, Any], tensors: Tensors, version: int = 3) -> bytes:
    """A well-formed file."""
    alignment = metadata.get("general.alignment", 32)
    entries, data = [], b""
    for name, (shape, kind, raw) in tensors.items():
        entries.append(entry(name, shape, TYPE_IDS[kind], len(data)))
        data += raw + bytes(-len(raw) % alignment)
    pairs = [pair(key, value) for key, value in metadata.items()]
    return assemble(pairs, entries, data, version=version, alignment=alignment)


def random_tensor(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> bytes:
    """Random data of a type: any codes; float16 scales from subnormal to 8, of both signs, some zero."""
    t = TENSOR_TYPES[TYPE_IDS[kind]]
    count = math.prod(shape)
    if t.codec is None:
        values = rng.normal(size=count).astype(np.float32)
        if kind == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return values.astype(np.float16 if kind == "F16" else np.float32).tobytes()
    layout = t.codec[0]
    blocks = rng.integers(0, 256, (count // t.block, t.nbytes), dtype=np.uint8).view(layout).reshape(-1)
    for field in {"d", "m", "dmin"} & set(layout.names or ()):
        scale = rng.normal(size=len(blocks)) * 2.0 ** rng.integers(-24, 2, len(blocks))
        blocks[field] = np.where(rng.random(len(blocks)) < 0.05, 0, scale).astype(np.float16)
    return blocks.tobytes()


def tiny_model(
    arch: str = "qwen2",
    kinds: tuple[str, ...] = ("F32",),
    *,
    hidden: int = 32,
    ffn: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 12,
    seed: int = 0,
) -> tuple[dict[str, Any], Tensors]:
    """Metadata and tensors of a random model; linears take the types of `kinds` in turn (F16 where no block fits)."""
    rng = np.random.default_rng(seed)
    head = hidden // heads
    kv = kv_heads * head
    metadata = {
        "general.architecture": arch,
        "general.file_type": 0,
        f"{arch}.block_count": layers,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": hidden,
        f"{arch}.feed_forward_length": ffn * (2 if arch == "qwen" else 1),
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": heads if arch == "qwen" else kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(vocab)],
    }
    tensors: Tensors = {}

    def linear(name: str, n: int, k: int, bias: bool = False) -> None:
        kind = kinds[len(tensors) % len(kinds)]
        if k % TENSOR_TYPES[TYPE_IDS[kind]].block:
            kind = "F16"
        tensors[name + ".weight"] = (n, k), kind, random_tensor(rng, kind, (n, k))
        if bias:
            tensors[name + ".bias"] = (n,), "F32", random_tensor(rng, "F32", (n,))

    def norm(name: str, n: int) -> None:
        tensors[name + ".weight"] = (n,), "F32", random_tensor(rng, "F32", (n,))

    linear("token_embd", vocab, hidden)
    for i in range(layers):
        blk = f"blk.{i}."
        norm(blk + "attn_norm", hidden)
        if arch == "qwen":
            linear(blk + "attn_qkv", 3 * hidden, hidden, bias=True)
        else:
            for x, n in (("q", hidden), ("k", kv), ("v", kv)):
                linear(f"{blk}attn_{x}", n, hidden, bias=arch == "qwen2")
        if arch == "qwen3":
            norm(blk + "attn_q_norm", head)
            norm(blk + "attn_k_norm", head)
        linear(blk + "attn_output", hidden, hidden)
        norm(blk + "ffn_norm", hidden)
        linear(blk + "ffn_gate", ffn, hidden)
        linear(blk + "ffn_up", ffn, hidden)
        linear(blk + "ffn_down", hidden, ffn)
    norm("output_norm", hidden)
    linear("output", vocab, hidden)
    return metadata, tensors
