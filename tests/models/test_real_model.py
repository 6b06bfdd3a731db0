"""The demo model against transformers: the same dequantised weights, float32 logits of a chat prompt."""

from __future__ import annotations

import torch
from assets import demo_gguf
from harness import Driver, assert_close
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.backends.torch_backend import from_host
from qwen_rt.checkpoint import open_checkpoint
from qwen_rt.model import build
from qwen_rt.tokenizer import load_tokenizer


def test_logits_and_greedy_text():
    """A prefill in two chunks and two decode steps agree with one teacher-forced forward of transformers."""
    torch.set_num_threads(2)
    path = demo_gguf()
    checkpoint = open_checkpoint(path)
    model, tokenizer = build(checkpoint, ReferenceBackend()), load_tokenizer(path)
    ids = tokenizer.encode("def add(a, b):\n    return a")
    driver = Driver(model)
    run = driver.begin(ids)
    got = [driver.step([(run, ids[:4])])[0], driver.step([(run, ids[4:])])[0]]
    for _ in range(2):
        ids.append(int(got[-1][-1].argmax()))
        got.append(driver.step([(run, ids[-1:])])[0])
    assert_close(torch.cat(got), transformers_logits(checkpoint, ids))
    assert tokenizer.decode(ids[-2:]) == " + b"


@torch.no_grad()
def transformers_logits(checkpoint, ids: list[int]) -> torch.Tensor:
    c = checkpoint.config
    config = Qwen2Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.ffn_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=c.tied_head,
        attn_implementation="eager",
    )
    state = {name: from_host(checkpoint.tensor(name)) for name in checkpoint.tensors()}
    for name in checkpoint.linears():
        raw = checkpoint.linear(name)
        state[f"{name}.weight"] = from_host(raw.dequantize())
        if raw.bias is not None:
            state[f"{name}.bias"] = from_host(raw.bias)
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(config)
    theirs.load_state_dict(state, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    assert not any(p.is_meta for p in theirs.parameters())
    return theirs.eval()(torch.tensor([ids])).logits[0]
