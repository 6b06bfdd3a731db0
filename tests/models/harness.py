"""Drives a model step by step as an engine does, with a BlockManager; and makes tiny checkpoints to drive."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen_rt.backends.base import Backend, BatchMeta, KVSpec
from qwen_rt.backends.select import BUILTIN
from qwen_rt.backends.torch_backend import from_host
from qwen_rt.kv import BlockManager, BlockTable
from qwen_rt.model import Last, QwenModel, ntk_alpha

BACKENDS = ("reference", "cpu")
TOLERANCE = 1e-4  # largest error allowed, in standard deviations of the logits


def open_tested(name: str) -> Backend:
    """The backend `name` in float32, or skip with its probe's reason."""
    module, _, cls = BUILTIN[name].partition(":")
    try:
        backend = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{name}: {error}")
    probe = backend.probe()
    if not probe.usable:
        pytest.skip(f"{name}: {probe.reason}")
    return backend(0, compute_dtype="float32")


@dataclass
class Run:
    """One sequence of a Driver."""

    table: BlockTable
    alpha: float


class Driver:
    """A cache, its block manager, and step(): rows of any sequences, logits for every row."""

    def __init__(self, model: QwenModel, num_blocks: int = 64, kv_dtype: str = "float32") -> None:
        c = model.config
        self.model = model
        block = model.backend.caps.kv_block
        self.blocks = BlockManager(num_blocks, block)
        spec = KVSpec(c.num_layers, c.num_kv_heads, c.head_size, block, kv_dtype)
        self.kv = model.backend.alloc_kv(spec, num_blocks)

    def begin(self, prompt: Sequence[int]) -> Run:
        """A sequence about to prefill `prompt`, its cached prefix taken; the NTK alpha is that of the whole prompt."""
        alpha = ntk_alpha(self.model.config, len(prompt))
        return Run(self.blocks.allocate(prompt, salt=alpha), alpha)

    def step(self, work: Sequence[tuple[Run, Sequence[int]]], last: Sequence[int] | None = None) -> list[Tensor]:
        """Run each sequence's next tokens in one batch; float32 logits [q_len, V] of each.

        With `last`, [1, V] for the last row of each of these sequences.
        """
        slots = [slot for run, ids in work for slot in self.blocks.append(run.table, ids)]
        q_lens = [len(ids) for _, ids in work]
        meta = BatchMeta(
            q_lens, [run.table.num_tokens for run, _ in work], [run.table.blocks for run, _ in work], slots
        )
        alphas = [run.alpha for run, ids in work for _ in ids]
        ids = np.array([t for _, ids in work for t in ids], np.int64)
        plan = self.model.backend.plan(meta)
        rows = None if last is None else Last.of(last, meta, self.model.backend)
        hidden = self.model.forward(ids, plan, self.model.rope_rows(meta.positions(), alphas), self.kv, rows)
        for run, _ in work:
            self.blocks.commit(run.table)
        logits = from_host(self.model.backend.array(self.model.logits(hidden)))
        return list(logits.split(q_lens if last is None else [1] * len(last)))


def run_logits(model: QwenModel, ids: Sequence[int], chunks: Sequence[int] | None = None) -> Tensor:
    """[n, V] logits of one prompt of n tokens, run in steps of `chunks` tokens (default: all at once)."""
    driver = Driver(model, num_blocks=len(ids) // model.backend.caps.kv_block + 1)
    run = driver.begin(ids)
    chunks = [len(ids)] if chunks is None else chunks
    assert sum(chunks) == len(ids)
    ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    return torch.cat([driver.step([(run, ids[end - n : end])])[0] for n, end in zip(chunks, ends, strict=True)])


def assert_close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Largest error at most `tolerance` standard deviations of the expected logits."""
    assert got.shape == expected.shape and got.dtype == torch.float32
    error = float((got.double() - expected.double()).abs().max() / expected.double().std())
    assert error <= tolerance, f"largest error {error:.2e} of the logits' standard deviation"


def randomize(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Weights of a scale at which attention is neither flat nor saturated, biases and norms not trivial."""
    g = torch.Generator().manual_seed(seed)

    def draw(name: str, t: Tensor) -> Tensor:
        x = torch.randn(t.shape, generator=g)
        if t.ndim == 2:
            return x * (1.5 / t.shape[1] ** 0.5)
        return 0.3 * x if name.endswith("bias") else 1 + 0.2 * x

    return {name: draw(name, t) for name, t in state.items()}


def save_hf(model: torch.nn.Module, path: Path) -> Path:
    """Randomise a transformers model in place and save it."""
    tied = model.config.tie_word_embeddings
    drawn = randomize({n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")})
    model.load_state_dict(drawn, strict=not tied)
    model.save_pretrained(path)
    return path
