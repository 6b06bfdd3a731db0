"""build(): what is checked, converted, quantised, fused, declined and reported."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from harness import Driver, assert_close, randomize, run_logits
from tiny_config import TINY

from qwen_rt.backends.base import Caps
from qwen_rt.backends.null import NullBackend
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.checkpoint import Checkpoint
from qwen_rt.checkpoint.layout import expected_shapes
from qwen_rt.config import ModelConfig
from qwen_rt.errors import BackendError, CheckpointError, ConfigError
from qwen_rt.model import build
from qwen_rt.model.loader import cast_dense
from qwen_rt.quant.formats import LinearRows, RawLinear, dense_format
from qwen_rt.quant.rtn import quantize_rtn, recipe

CONFIG = dataclasses.replace(
    TINY,
    vocab_size=96,
    hidden_size=64,
    ffn_size=112,
    head_size=16,
    rotary_size=16,
    max_position=128,
    train_length=128,
)
QKV = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkv"]
IDS = list(range(7, 47))


class MemoryCheckpoint(Checkpoint):
    """Random float32 weights in memory; `formats` maps a linear's suffix to how it is stored."""

    source = "memory"

    def __init__(self, config: ModelConfig = CONFIG, formats=None) -> None:
        self.config = config
        drawn = randomize({name: torch.empty(shape) for name, shape in expected_shapes(config).items()})
        self.weights = {name: t.numpy() for name, t in drawn.items()}
        self.formats = formats or {}

    def linears(self):
        return {n.removesuffix(".weight"): tuple(t.shape) for n, t in self.weights.items() if t.ndim == 2}

    def tensors(self):
        return {n: tuple(t.shape) for n, t in self.weights.items() if t.ndim == 1 and not n.endswith(".bias")}

    def linear(self, name):
        w, dense = self.weights[f"{name}.weight"], dense_format("float32")
        raw = RawLinear(
            name, tuple(w.shape), dense, lambda a, b: LinearRows(values=w[a:b]), self.weights.get(f"{name}.bias")
        )
        stored_as = next((f for suffix, f in self.formats.items() if name.endswith(suffix)), None)
        if stored_as is None:
            return raw
        return (
            cast_dense(raw, stored_as)
            if isinstance(stored_as, str)
            else quantize_rtn(raw, *(stored_as if isinstance(stored_as, tuple) else (stored_as,)))
        )

    def tensor(self, name):
        return self.weights[name]

    def nbytes(self):
        return sum(t.nbytes for t in self.weights.values())


class Recording(NullBackend):
    """Keeps the formats of what it packs, by name."""

    def __init__(self, **caps) -> None:
        super().__init__()
        self.caps = dataclasses.replace(self.caps, **caps)
        self.formats: dict[str, str] = {}

    def pack_linear(self, raw):
        self.formats[raw.name] = str(raw.format)
        return super().pack_linear(raw)


def packed_formats(checkpoint, **options) -> dict[str, str]:
    backend = Recording()
    build(checkpoint, backend, **options)
    return backend.formats


def dequantized(formats) -> MemoryCheckpoint:
    """The same checkpoint with every matrix dense, at the values its formats hold."""
    stored, plain = MemoryCheckpoint(formats=formats), MemoryCheckpoint()
    plain.weights |= {f"{n}.weight": stored.linear(n).dequantize() for n in stored.linears()}
    return plain


@pytest.mark.parametrize(
    ("formats", "products"),
    [
        ({}, 4),  # qkv, o, gate+up, down
        ({"v_proj": 8, "q_proj": 4, "k_proj": 4}, 5),  # q+k and v
        ({"k_proj": "float16"}, 6),  # neither neighbour fuses
        ({"up_proj": 4, "gate_proj": 8}, 5),
    ],
)
def test_fused_and_unfused_linears_compute_the_same(formats, products):
    backend = Recording()
    model = build(MemoryCheckpoint(formats=formats), backend)
    layer = model.layers[0]
    linears = (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down)
    assert sum(len(linear.parts) for linear in linears) == products
    mixed = build(MemoryCheckpoint(formats=formats), ReferenceBackend())
    plain = build(dequantized(formats), ReferenceBackend())
    assert_close(run_logits(mixed, IDS), run_logits(plain, IDS), 1e-5)


def test_qkv_are_views_of_one_product():
    """The waist gets strided views; nothing is copied between the projection and RoPE."""
    seen = []

    class Watching(ReferenceBackend):
        def rope(self, q, k, cos, sin):
            seen.append((q, k))
            return super().rope(q, k, cos, sin)

    run_logits(build(MemoryCheckpoint(), Watching()), IDS)
    q, k = seen[0]
    assert q.shape == (40, 4, 16) and k.shape == (40, 2, 16)
    assert q.stride() == k.stride() == (8 * 16, 16, 1) and q._base is k._base is not None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("quantize", "layers"), [("int8", "int8"), ("int4", "int4")])
def test_quantize(quantize, layers, tied):
    """Layers to the asked width, the head to int8, or to int5 beside int4; an untied table as it is."""
    config = dataclasses.replace(CONFIG, tied_head=tied)
    got = packed_formats(MemoryCheckpoint(config), quantize=quantize)
    table = got.pop("model.embed_tokens")
    head = "int8-g64" if quantize == "int8" else "int5-g32"
    assert table == (head if tied else "float32")
    assert tied or got.pop("lm_head") == head
    assert got and all(fmt.startswith(layers) for fmt in got.values())


def test_quantize_takes_the_next_width_a_device_has():
    narrow = Recording(weight_bits=(4, 8))
    build(MemoryCheckpoint(), narrow, quantize="int4")
    assert narrow.formats["lm_head"] == "int8-g64"
    wide = Recording(weight_bits=(8,))
    build(MemoryCheckpoint(), wide, quantize="int4")
    assert all(fmt.startswith("int8") for name, fmt in wide.formats.items() if "layers" in name)


def test_quantize_leaves_what_is_narrow_enough():
    got = packed_formats(MemoryCheckpoint(formats={"down_proj": 4, "o_proj": 8}), quantize="int8")
    assert got["model.layers.0.mlp.down_proj"].startswith("int4")
    assert got["model.layers.0.self_attn.o_proj"].startswith("int8")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_logits_are_those_of_the_rounded_weights(quantize):
    ours = build(MemoryCheckpoint(), ReferenceBackend(), quantize=quantize)
    rounded = build(
        dequantized({"_proj": recipe(quantize, False), "lm_head": recipe(quantize, True)}), ReferenceBackend()
    )
    assert_close(run_logits(ours, IDS), run_logits(rounded, IDS), 1e-5)
    assert ours.packed_bytes < rounded.packed_bytes


@pytest.mark.parametrize(
    ("offered", "held"),
    [
        ((4, 5, 6, 8), {4: 4, 5: 5, 6: 6, 8: 8}),
        ((4, 8), {4: 4, 5: 8, 6: 8, 8: 8}),
        ((6, 8), {4: 6, 5: 6, 6: 6, 8: 8}),
        ((8,), {4: 8, 5: 8, 6: 8, 8: 8}),
    ],
)
def test_a_width_the_backend_lacks_comes_wider_and_computes_the_same(offered, held):
    stored = {"o_proj": 4, "q_proj": 5, "k_proj": 6, "v_proj": 8, "gate_proj": 5, "up_proj": 5, "down_proj": 6}
    backend = Recording(weight_bits=offered)
    build(MemoryCheckpoint(formats=stored), backend)
    widths = {suffix: held[bits] for suffix, bits in stored.items()}
    for name, fmt in backend.formats.items():
        if "layers" in name:
            assert fmt == f"int{widths[name.rsplit('.', 1)[1]]}-g{112 if 'down' in name else 64}", name
    # Neighbours that are held alike are one product, although the file stores them unlike.
    attention = [name for name in backend.formats if "layers.0.self_attn.q_proj" in name]
    assert ("+" in attention[0]) == (widths["q_proj"] == widths["k_proj"])

    class Narrow(ReferenceBackend):
        caps = dataclasses.replace(ReferenceBackend.caps, weight_bits=offered)

    got = run_logits(build(MemoryCheckpoint(formats=stored), Narrow()), IDS)
    assert_close(got, run_logits(build(MemoryCheckpoint(formats=stored), ReferenceBackend()), IDS), 1e-5)


def test_dtype_converts_dense_weights_only():
    got = packed_formats(MemoryCheckpoint(formats={"down_proj": 4}), dtype="bfloat16")
    assert got.pop("model.layers.1.mlp.down_proj").startswith("int4")
    assert got.pop("model.layers.0.mlp.down_proj").startswith("int4")
    assert set(got.values()) == {"bfloat16"}


def test_overflow_of_a_conversion_is_an_error():
    checkpoint = MemoryCheckpoint()
    checkpoint.weights["lm_head.weight"][3, 3] = 1e6
    with pytest.raises(CheckpointError, match="lm_head: values"):
        build(checkpoint, ReferenceBackend(), dtype="float16")


def test_unsupported_formats_are_declined():
    narrow = Recording(dense_dtypes=("float16",), weight_bits=(8,))
    with pytest.raises(BackendError, match=r"model.embed_tokens as stored \(float32\); it takes float16 and int8"):
        build(MemoryCheckpoint(), narrow)
    floats = Recording(weight_bits=())
    with pytest.raises(BackendError, match=r"q_proj.* as stored \(int4-g64\); it takes .* and no integers"):
        build(MemoryCheckpoint(formats={x: 4 for x in ("q_proj", "k_proj", "v_proj")}), floats)
    build(MemoryCheckpoint(), narrow, dtype="float16")
    with pytest.raises(ConfigError, match="quantize='int3'"):
        build(MemoryCheckpoint(), narrow, quantize="int3")


def test_checkpoint_must_be_its_configs():
    """Missing, extra and misshapen weights, all in one error, before anything is packed."""
    checkpoint = MemoryCheckpoint()
    del checkpoint.weights["model.layers.1.mlp.up_proj.weight"]
    checkpoint.weights["model.layers.2.mlp.up_proj.weight"] = np.zeros((112, 64), np.float32)
    checkpoint.weights["model.norm.weight"] = np.ones(65, np.float32)
    backend = Recording()
    with pytest.raises(CheckpointError) as error:
        build(checkpoint, backend)
    for part in (
        "1 missing: model.layers.1.mlp.up_proj",
        "1 extra: model.layers.2.mlp.up_proj",
        "model.norm.weight is [65]",
    ):
        assert part in str(error.value)
    assert not backend.formats


def test_missing_bias():
    checkpoint = MemoryCheckpoint()
    del checkpoint.weights["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj has no bias"):
        build(checkpoint, Recording())


def test_tied_table_is_packed_once_and_progress_adds_up():
    config = dataclasses.replace(CONFIG, tied_head=True)
    seen: list[tuple[str, int]] = []
    model = build(MemoryCheckpoint(config), ReferenceBackend(), progress=lambda *args: seen.append(args))
    names = [name for name, _ in seen]
    assert names.count("model.embed_tokens") == 1 and "lm_head" not in names and len(names) == len(set(names))
    assert model.head is model.table
    assert model.packed_bytes == sum(n for _, n in seen) == MemoryCheckpoint(config).nbytes()


@pytest.mark.parametrize("arch", ["qwen", "qwen2", "qwen3"])
def test_float64_graph_agrees_with_float32(arch):
    """The residual stream follows the compute type up, and nothing in the graph narrows it."""
    kv_heads = 4 if arch == "qwen" else 2
    config = dataclasses.replace(CONFIG, arch=arch, num_kv_heads=kv_heads, qk_norm=arch == "qwen3")
    narrow, wide = (build(MemoryCheckpoint(config), ReferenceBackend(0, d)) for d in ("float32", "float64"))
    assert_close(run_logits(narrow, IDS), run_logits(wide, IDS), 1e-4)
    assert wide.residual_dtype == "float64" and narrow.residual_dtype == "float32"


class Half(ReferenceBackend):
    """float16 activations over the reference's arithmetic; remembers the largest residual."""

    caps = Caps(("float16",), ("float32",), (4, 8), ("float32", "int8"), 16)
    largest = 0.0

    def rms_norm(self, x, weight, eps, residual=None):
        normed, summed = super().rms_norm(x, weight, eps, residual)
        self.largest = max(self.largest, float(summed.abs().max()))
        return normed, summed


def test_float16_compute_keeps_a_float32_residual():
    """Each addend fits float16, their sum does not; the final norm brings it back."""
    checkpoint = MemoryCheckpoint()
    for i in range(2):
        checkpoint.weights[f"model.layers.{i}.mlp.down_proj.weight"] *= 5e3
    half, full = (build(checkpoint, backend()) for backend in (Half, ReferenceBackend))
    assert_close(run_logits(half, IDS), run_logits(full, IDS), 0.05)
    assert half.backend.largest > torch.finfo(torch.float16).max


def test_int8_cache_stays_near():
    model = build(MemoryCheckpoint(), ReferenceBackend())
    driver = Driver(model, kv_dtype="int8")
    got = driver.step([(driver.begin(IDS), IDS)])[0]
    expected = run_logits(model, IDS)
    error = float((got - expected).abs().max() / expected.std())
    assert 1e-4 < error < 0.1
