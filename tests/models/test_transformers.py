"""Qwen2 and Qwen3 against transformers: same tiny random checkpoint, same tokens, float32 logits."""

from __future__ import annotations

import random

import pytest
import torch
from harness import Driver, assert_close, run_logits, save_hf
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen_rt.checkpoint import open_checkpoint
from qwen_rt.model import build

SMALL = {"vocab_size": 199, "num_hidden_layers": 3, "intermediate_size": 80, "max_position_embeddings": 512}
QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
QWEN3 = (Qwen3Config, Qwen3ForCausalLM)


def heads(query: int, key: int, size: int) -> dict:
    return {"hidden_size": query * size, "num_attention_heads": query, "num_key_value_heads": key}


def yarn(**more) -> dict:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64, **more}
    return {"rope_parameters": rope}


CASES = {
    "gqa": (QWEN2, heads(6, 2, 16)),
    "one-key-head": (QWEN2, heads(5, 1, 16) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "odd-heads": (QWEN2, heads(7, 7, 16)),
    "tied": (QWEN2, heads(4, 2, 16) | {"tie_word_embeddings": True}),
    "yarn": (QWEN2, heads(4, 2, 32) | yarn()),
    "yarn-options": (QWEN2, heads(4, 4, 32) | yarn(attention_factor=1.3, beta_fast=16.0, beta_slow=2.0)),
    "window": (QWEN2, heads(4, 2, 16) | {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": (QWEN3, heads(6, 3, 16) | {"head_dim": 24}),
    "qwen3-tied": (QWEN3, heads(4, 1, 16) | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-yarn-window": (
        QWEN3,
        heads(3, 1, 16)
        | {"head_dim": 32, "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
        | yarn(),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory, backend):
    """(ours, transformers') of one checkpoint."""
    (config_cls, model_cls), options = CASES[request.param]
    torch.manual_seed(0)
    theirs = model_cls(config_cls(**SMALL | options, attn_implementation="eager")).eval()
    checkpoint = open_checkpoint(save_hf(theirs, tmp_path_factory.mktemp(request.param)))
    return build(checkpoint, backend), theirs


def tokens(n: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(SMALL["vocab_size"]), k=n)


@torch.no_grad()
def expected(theirs, ids):
    return theirs(torch.tensor([ids])).logits[0]


def test_lengths(pair):
    """Teacher-forced logits, one prefill, from 1 to 300 tokens."""
    ours, theirs = pair
    for n in (1, 2, 3, 15, 16, 17, 32, 33, 65, 129, 300):
        ids = tokens(n, seed=n)
        assert_close(run_logits(ours, ids), expected(theirs, ids))


def test_chunked_prefill_then_decode(pair):
    """Prefill in uneven chunks, then one token at a time through the paged cache."""
    ours, theirs = pair
    ids = tokens(120)
    assert_close(run_logits(ours, ids, [1, 7, 16, 40, 3, 33, *[1] * 20]), expected(theirs, ids))


def test_batch_of_mixed_steps(pair):
    """Sequences of different lengths in one step: prefill chunks beside decode rows, in changing order."""
    ours, theirs = pair
    texts = [tokens(n, seed=n) for n in (5, 41, 96, 1)]
    driver = Driver(ours)
    runs = [driver.begin(ids) for ids in texts]
    got: list[list[torch.Tensor]] = [[] for _ in texts]
    rng = random.Random(0)
    while any(run.table.num_tokens < len(ids) for run, ids in zip(runs, texts, strict=True)):
        open_ = [i for i, ids in enumerate(texts) if runs[i].table.num_tokens < len(ids)]
        chosen = rng.sample(open_, rng.randint(1, len(open_)))
        work = [(runs[i], texts[i][(at := runs[i].table.num_tokens) : at + rng.choice((1, 1, 5, 20))]) for i in chosen]
        for i, logits in zip(chosen, driver.step(work), strict=True):
            got[i].append(logits)
    for ids, parts in zip(texts, got, strict=True):
        assert_close(torch.cat(parts), expected(theirs, ids))


def test_only_the_last_rows_wanted(pair):
    """The last layer may leave out rows whose logits nobody wants: none, some or all sequences; the cache is whole."""
    ours, theirs = pair
    texts = [tokens(n, seed=n) for n in (40, 17, 90)]
    driver = Driver(ours)
    runs = [driver.begin(ids) for ids in texts]
    assert driver.step([(run, ids[:8]) for run, ids in zip(runs, texts, strict=True)], last=[]) == []
    got = driver.step([(runs[0], texts[0][8:]), (runs[1], texts[1][8:9]), (runs[2], texts[2][8:60])], last=[0, 1])
    assert_close(got[0], expected(theirs, texts[0])[-1:])
    assert_close(got[1], expected(theirs, texts[1])[8:9])
    got = driver.step([(runs[1], texts[1][9:]), (runs[2], texts[2][60:])], last=[1])
    assert_close(got[0], expected(theirs, texts[2])[-1:])


def test_reused_prefix(pair):
    """A second sequence that shares cached blocks continues exactly where they end."""
    ours, theirs = pair
    first, driver = tokens(70), Driver(ours)
    driver.step([(driver.begin(first), first)])
    ids = [*first[:50], *tokens(20, seed=2)]
    run = driver.begin(ids)
    cached = run.table.num_cached
    assert cached == 50 // driver.blocks.block_size * driver.blocks.block_size > 0
    assert_close(driver.step([(run, ids[cached:])])[0], expected(theirs, ids)[cached:])
