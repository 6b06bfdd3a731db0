"""What an Ascend 910 can do at most, on paper: bytes and operations of a step against published rates. Nothing runs.

    python bench/ascend_paper.py [--context 2048] [--prompt 2048] [--models Qwen-7B-Chat Qwen-14B-Chat Qwen-72B-Chat]

A step takes at least max(bytes / HBM bandwidth, operations / cube rate). Bytes: every weight once (embedding rows are
few), the keys and values of every sequence, the new ones written. Operations: 2 per weight and row, 4 per query head,
head size, row and visible key. Activations, launches, the vector units' work (dequantisation among it) and what cards
say to one another are not counted: figures are bounds, not predictions. A model is cut over 1, 2, 4 or 8 cards, as few
as hold its weights and cache in 90 % of their memory; a card then holds an equal share.

Weights as qwen_rt/backends/ascend holds them: Int4 and Int8 with a 16-bit scale a group of 128 (no offset: published
Qwen checkpoints are symmetric); the first 910 has no quantised product and holds them dense in float16.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from qwen_rt.checkpoint.layout import expected_shapes
from qwen_rt.config import ModelConfig
from qwen_rt.hub.names import published

GIB, GROUP, USABLE = 1 << 30, 128, 0.9
MAC = 16 * 16 * 16  # multiply-adds of a cube core per cycle in 16-bit (cube_m_size * cube_k_size * cube_n_size)


@dataclass(frozen=True)
class Chip:
    """Cores and MHz: CANN 8.1.RC1 platform_config/<name>.ini (cube_core_cnt or ai_core_cnt, cube_freq)."""

    name: str
    cores: int
    mhz: int
    memory: int  # GiB; memory_size there
    bandwidth: float  # TB/s
    known: str  # where the bandwidth comes from
    quantised: bool = True

    @property
    def rate(self) -> float:
        """16-bit operations a second."""
        return 2.0 * MAC * self.cores * self.mhz * 1e6


A2 = "CANN ops-nn, docs/zh/develop/cross_platform_migration_guide.md: Atlas A2, 64 GB"
CHIPS = (
    Chip("Ascend910B1", 24, 1850, 64, 1.6, A2),
    Chip("Ascend910B2", 24, 1800, 64, 1.6, A2),
    Chip("Ascend910B3", 20, 1800, 64, 1.6, A2),
    Chip("Ascend910B4", 20, 1500, 32, 0.8, "assumed: half the memory of the others, half of their bandwidth"),
    Chip(
        "Ascend910A", 32, 1000, 32, 1.2, "assumed: four HBM2 stacks (Linley Group, 2019) of 307 GB/s (JESD235B)", False
    ),
)
KINDS = {"bf16": 16, "Int8": 8, "Int4": 4}


@dataclass(frozen=True)
class Work:
    """Bytes and operations of one step, and bytes that must be resident."""

    nbytes: float
    operations: float
    resident: float


def weight_bytes(config: ModelConfig, bits: int) -> tuple[float, float, int, int]:
    """(bytes of layers, bytes of the head, weights of layers, weights of the head)."""
    sizes = {name: shape for name, shape in expected_shapes(config).items() if len(shape) == 2}
    head = config.vocab_size * config.hidden_size
    layers = sum(n * k for name, (n, k) in sizes.items() if not any(x in name for x in ("wte", "embed", "lm_head")))
    each = 2.0 if bits == 16 else bits / 8 + 2 / GROUP
    return layers * each, head * 2.0, layers, head


def step(config: ModelConfig, bits: int, rows: int, batch: int, context: int) -> Work:
    """A step of `rows` new tokens for each of `batch` sequences that end with `context` tokens."""
    layer_bytes, head_bytes, layers, head = weight_bytes(config, bits)
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_size * 2  # bytes a token
    seen = rows * context - rows * (rows - 1) // 2  # causal: pairs of a query and a key
    attention = 4 * config.num_layers * config.num_heads * config.head_size * seen * batch
    return Work(
        layer_bytes + head_bytes + kv * batch * (context + rows),
        2.0 * (layers * rows + head) * batch + attention,
        layer_bytes + head_bytes * (1 if config.tied_head else 2) + kv * batch * context,
    )


def cards(work: Work, chip: Chip) -> int | None:
    """As few cards as hold it, or None."""
    return next((n for n in (1, 2, 4, 8) if work.resident <= n * chip.memory * GIB * USABLE), None)


def seconds(work: Work, chip: Chip, n: int) -> tuple[float, bool]:
    """(the least time on n cards, whether memory sets it)."""
    memory, cube = work.nbytes / n / (chip.bandwidth * 1e12), work.operations / n / chip.rate
    return max(memory, cube), memory >= cube


def cell(work: Work, chip: Chip, tokens: int) -> str:
    """Tokens a second, the cards it takes when more than one, and c where the cube sets the bound."""
    n = cards(work, chip)
    if n is None:
        return "—"
    time, memory = seconds(work, chip, n)
    return f"{tokens / time:,.0f}" + ("" if memory else " c") + (f" ×{n}" if n > 1 else "")


def main() -> None:
    """Print Markdown tables."""
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--context", type=int, default=2048, help="tokens a decoding sequence has")
    args.add_argument("--prompt", type=int, default=2048, help="tokens of a prompt")
    args.add_argument("--per-layer", type=int, default=16, help="launches a layer: bench/ascend_launches.py")
    args.add_argument("--beside", type=int, default=25, help="launches a step beside its layers: the same")
    args.add_argument("--models", nargs="+", default=["Qwen-7B-Chat", "Qwen-14B-Chat", "Qwen-72B-Chat"])
    opt = args.parse_args()
    print(
        "| chip | cube cores × MHz | 16-bit TFLOPS | HBM GiB | HBM TB/s | bandwidth from |\n|---|---|---|---|---|---|"
    )
    for c in CHIPS:
        print(f"| {c.name} | {c.cores} × {c.mhz} | {c.rate / 1e12:.1f} | {c.memory} | {c.bandwidth} | {c.known} |")
    known = published()
    cases = {
        f"decode, batch 1, {opt.context} tokens": (1, 1, opt.context),
        f"decode, batch 64, {opt.context} tokens each": (1, 64, opt.context),
        f"prefill of one prompt of {opt.prompt}": (opt.prompt, 1, opt.prompt),
    }
    for title, (rows, batch, context) in cases.items():
        print(
            f"\n**{title}**\n\n| model | weights | GB a step | Tflop a step | "
            + " | ".join(c.name for c in CHIPS)
            + " |"
        )
        print("|---" * (4 + len(CHIPS)) + "|")
        for name in opt.models:
            config = ModelConfig.from_hf(known[name])
            for kind, bits in KINDS.items():
                work = step(config, bits, rows, batch, context)
                dense = step(config, 16, rows, batch, context)
                row = [cell(work if c.quantised else dense, c, rows * batch) for c in CHIPS]
                print(
                    f"| {name} | {kind} | {work.nbytes / 1e9:.1f} | {work.operations / 1e12:.2f} | {' | '.join(row)} |"
                )
    print("\n**microseconds a launch may take before it sets the pace: decode, batch 1, one card's share**\n")
    print("| model | weights | launches a step | " + " | ".join(c.name for c in CHIPS) + " |")
    print("|---" * (3 + len(CHIPS)) + "|")
    for name in opt.models:
        config = ModelConfig.from_hf(known[name])
        count = opt.per_layer * config.num_layers + opt.beside
        for kind, bits in KINDS.items():
            row = []
            for c in CHIPS:
                work = step(config, bits if c.quantised else 16, 1, 1, opt.context)
                n = cards(work, c)
                row.append("—" if n is None or not c.quantised else f"{seconds(work, c, n)[0] / count * 1e6:.1f}")
            print(f"| {name} | {kind} | {count} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
