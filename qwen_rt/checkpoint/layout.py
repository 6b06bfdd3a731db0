"""Which tensors a model of a given configuration has, by Hugging Face names, and the check that a file has them."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_rt.config import ModelConfig
from qwen_rt.errors import CheckpointError

Shape = tuple[int, ...]


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name (with .weight or .bias) -> shape of every tensor the graph reads; linears are [N outputs, K inputs]."""
    c = config
    h, f, q, kv = c.hidden_size, c.ffn_size, c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    if c.arch == "qwen":
        prefix, table, final = "transformer.h", "transformer.wte", "transformer.ln_f"
        linears = {"attn.c_attn": (3 * q, h), "attn.c_proj": (h, q), "mlp.w1": (f, h), "mlp.w2": (f, h)}
        linears["mlp.c_proj"] = (h, f)
        biases, norms = ["attn.c_attn"], {"ln_1": h, "ln_2": h}
    else:
        prefix, table, final = "model.layers", "model.embed_tokens", "model.norm"
        linears = {f"self_attn.{x}_proj": (n, h) for x, n in (("q", q), ("k", kv), ("v", kv))}
        biases, norms = list(linears), {"input_layernorm": h, "post_attention_layernorm": h}
        linears["self_attn.o_proj"] = (h, q)
        linears |= {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
        if c.qk_norm:
            norms |= {"self_attn.q_norm": c.head_size, "self_attn.k_norm": c.head_size}
    block: dict[str, Shape] = {f"{name}.weight": shape for name, shape in linears.items()}
    block |= {f"{name}.weight": (n,) for name, n in norms.items()}
    if c.qkv_bias:
        block |= {f"{name}.bias": linears[name][:1] for name in biases}
    out: dict[str, Shape] = {f"{table}.weight": (c.vocab_size, h), f"{final}.weight": (h,)}
    if not c.tied_head:
        out["lm_head.weight"] = (c.vocab_size, h)
    return out | {f"{prefix}.{i}.{name}": shape for i in range(c.num_layers) for name, shape in block.items()}


def check_shapes(config: ModelConfig, found: Mapping[str, Shape], source: str) -> None:
    """CheckpointError, naming the tensors, unless `found` is what the configuration asks for.

    A tied model may store its head a second time: `lm_head.weight` is then allowed.
    """
    expected = expected_shapes(config)
    if config.tied_head and "lm_head.weight" in found:
        expected["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("not part of the model", extra), ("of the wrong shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: the tensors are not those of a {config.arch} model with {config.num_layers} layers: "
            f"{'; '.join(problems)}. The weights and their configuration do not belong together, or a part is missing: "
            "download the model again"
        )
