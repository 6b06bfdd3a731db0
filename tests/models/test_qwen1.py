"""Qwen-1 against the independent float64 oracle: NTK, logn and windows around and beyond the training length."""

from __future__ import annotations

import json
import random

import pytest
import torch
from harness import Driver, assert_close, randomize, run_logits
from qwen1_oracle import Qwen1Oracle
from safetensors.torch import save_file

from qwen_rt.checkpoint import open_checkpoint
from qwen_rt.model import build
from qwen_rt.model.logn import logn_scale

VOCAB, HIDDEN, FFN, LAYERS, HEADS, TRAINED = 131, 64, 96, 3, 4, 32
CONFIG = {
    "model_type": "qwen",
    "architectures": ["QWenLMHeadModel"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "kv_channels": HIDDEN // HEADS,
    "intermediate_size": 2 * FFN,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "seq_length": TRAINED,
    "max_position_embeddings": 999,  # as the original, ignored while use_dynamic_ntk or use_logn_attn is on
    "rope_theta": 77.0,  # ignored
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
    "bf16": False,
    "fp16": False,
    "fp32": False,
    "some_unknown_field": [1],
}
CASES = {
    "plain": {"use_dynamic_ntk": False, "use_logn_attn": False},
    "ntk": {"use_logn_attn": False},
    "logn": {"use_dynamic_ntk": False},
    "both": {},
    "partial-rotary": {"rotary_pct": 0.5},
    "windows": {"window_size": [12, 40, None]},
}
FIRST_RELEASE_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "vocab_size": "padded_vocab_size",
    "intermediate_size": "ffn_hidden_size",
}


def weights() -> dict[str, torch.Tensor]:
    shapes = {
        "transformer.wte.weight": (VOCAB, HIDDEN),
        "transformer.ln_f.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    layer = {
        "ln_1.weight": (HIDDEN,),
        "attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
        "attn.c_attn.bias": (3 * HIDDEN,),
        "attn.c_proj.weight": (HIDDEN, HIDDEN),
        "ln_2.weight": (HIDDEN,),
        "mlp.w1.weight": (FFN, HIDDEN),
        "mlp.w2.weight": (FFN, HIDDEN),
        "mlp.c_proj.weight": (HIDDEN, FFN),
    }
    for i in range(LAYERS):
        shapes |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    return randomize({name: torch.empty(shape) for name, shape in shapes.items()})


def save(path, config):
    (path / "config.json").write_text(json.dumps(config))
    stray = {
        "transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(8),
        "transformer.h.0.attn.masked_bias": torch.ones(1),
    }
    save_file(weights() | stray, path / "model.safetensors")
    return open_checkpoint(path)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory, backend):
    """(ours, oracle) of one checkpoint."""
    config = CONFIG | CASES[request.param]
    ours = build(save(tmp_path_factory.mktemp(request.param), config), backend)
    return ours, Qwen1Oracle(config, {n: t.numpy() for n, t in weights().items()})


def tokens(n: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=n)


def expected(oracle, prompt, decoded=()) -> torch.Tensor:
    return torch.from_numpy(oracle.run(list(prompt), list(decoded)))


def test_prefill_lengths(pair):
    """Every alpha from 1 to 15, both sides of each border."""
    ours, oracle = pair
    for n in (1, 2, 31, 32, 33, 64, 65, 100, 129):
        ids = tokens(n, seed=n)
        assert_close(run_logits(ours, ids), expected(oracle, ids))


def test_prefill_in_chunks_equals_prefill(pair):
    """The prompt's length decides alpha, not the chunk's."""
    ours, oracle = pair
    ids = tokens(90)
    assert_close(run_logits(ours, ids, [5, 16, 30, 1, 38]), expected(oracle, ids))


@pytest.mark.parametrize("prompt_len", [28, 40])
def test_decode_keeps_the_alpha_of_its_prefill(pair, prompt_len):
    """Decoding crosses seq_length (and 2 * seq_length) without a change of alpha."""
    ours, oracle = pair
    ids = tokens(70)
    driver = Driver(ours)
    run = driver.begin(ids[:prompt_len])
    parts = [driver.step([(run, ids[:prompt_len])])[0], *(driver.step([(run, [t])])[0] for t in ids[prompt_len:])]
    assert_close(torch.cat(parts), expected(oracle, ids[:prompt_len], ids[prompt_len:]))


def test_interleaved_sequences_keep_their_own_alpha(pair):
    """Four sequences with alpha 1, 1, 3 and 7: prefilled in turn, then decoded in one batch."""
    ours, oracle = pair
    driver = Driver(ours)
    texts = [(tokens(n, seed=n), tokens(12, seed=100 + n)) for n in (3, 27, 50, 80)]
    runs, got = [], []
    for prompt, _ in texts:
        runs.append(driver.begin(prompt))
        got.append([driver.step([(runs[-1], prompt)])[0]])
    for i in range(12):
        work = [(run, [decoded[i]]) for run, (_, decoded) in zip(runs, texts, strict=True)]
        for parts, logits in zip(got, driver.step(work), strict=True):
            parts.append(logits)
    for (prompt, decoded), parts in zip(texts, got, strict=True):
        assert_close(torch.cat(parts), expected(oracle, prompt, decoded))


def test_prefill_beside_decode_of_another_alpha(pair):
    """One step holds a prefill chunk at alpha 7 and a decode row at alpha 1."""
    ours, oracle = pair
    driver = Driver(ours)
    long, short = tokens(70, seed=5), tokens(40, seed=6)
    a, b = driver.begin(long), driver.begin(short[:20])
    got_b = [driver.step([(b, short[:20])])[0]]
    got_a = []
    for i in range(20):
        chunk = long[i * 4 : i * 4 + 4]
        work = [(b, [short[20 + i]])] + ([(a, chunk)] if chunk else [])
        logits = driver.step(work)
        got_b.append(logits[0])
        got_a += logits[1:]
    assert_close(torch.cat(got_a), expected(oracle, long))
    assert_close(torch.cat(got_b), expected(oracle, short[:20], short[20:]))


def test_prefix_is_reused_only_under_the_same_alpha(pair):
    """A second turn equals a prefill of its whole prompt, whatever was cached."""
    ours, oracle = pair
    driver = Driver(ours)
    first = tokens(50)  # alpha 3
    driver.step([(driver.begin(first), first)])
    for n in (60, 70, 80):  # alpha 3, 7, 7
        ids = [*first, *tokens(n - 50, seed=9)]
        run = driver.begin(ids)
        cached = run.table.num_cached
        same_alpha = n != 70 or not ours.config.dynamic_ntk
        assert (cached > 0) == same_alpha, "a prefix must not be shared across different alphas"
        assert_close(driver.step([(run, ids[cached:])])[0], expected(oracle, ids)[cached:])


def test_first_releases_field_names(tmp_path, backend):
    """n_embd and the like, with seq_length and the rest as later."""
    config = {FIRST_RELEASE_NAMES.get(name, name): value for name, value in CONFIG.items()}
    ours = build(save(tmp_path, config), backend)
    oracle = Qwen1Oracle(CONFIG, {n: t.numpy() for n, t in weights().items()})
    ids = tokens(50)
    assert_close(run_logits(ours, ids), expected(oracle, ids))


def test_switches_matter():
    """Past seq_length each of NTK, logn and windows changes the oracle's logits; the tests above can fail."""
    arrays = {n: t.numpy() for n, t in weights().items()}
    ids = tokens(50)
    seen = {name: Qwen1Oracle(CONFIG | case, arrays).run(ids, [])[-1] for name, case in CASES.items()}
    names = list(seen)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert abs(seen[a] - seen[b]).max() > 0.01 * seen[a].std(), (a, b)


def test_logn_table():
    """1 up to the training length, log base it of p + 1 beyond, its last entry kept after 32767 keys."""
    got = logn_scale([0, 2047, 2048, 4095, 32766, 40000], 2048).tolist()
    assert got[:2] == [1.0, 1.0] and got[2] > 1.0
    assert got[3] == pytest.approx(12 / 11, abs=1e-6)
    assert got[4] == got[5] == pytest.approx(1.363634, abs=1e-5)
