"""The Qwen project's README examples, only the import line changed, on real weights.

The demo model is rewritten as a Qwen-1 checkpoint, dense and as AutoGPTQ Int4, and put where the names of the examples
resolve to. Code is quoted from the README (print goes to a list); comments there that show answers are left out.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from assets import demo_gguf

import qwen_rt
from qwen_rt.checkpoint import open_checkpoint
from qwen_rt.convert import to_gptq, to_qwen1

THREE_TURN_CHAT = """
from qwen_rt import AutoModelForCausalLM, AutoTokenizer
from qwen_rt import GenerationConfig

tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-7B-Chat", device_map="auto", trust_remote_code=True).eval()
model.generation_config = GenerationConfig.from_pretrained("Qwen/Qwen-7B-Chat", trust_remote_code=True)

response, history = model.chat(tokenizer, "你好", history=None)
print(response)
response, history = model.chat(tokenizer, "给我讲一个年轻人奋斗创业最终取得成功的故事。", history=history)
print(response)
response, history = model.chat(tokenizer, "给这个故事起一个标题", history=history)
print(response)
"""

BASE_COMPLETION = """
from qwen_rt import AutoModelForCausalLM, AutoTokenizer
from qwen_rt import GenerationConfig

tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen-7B", device_map="auto", trust_remote_code=True).eval()
model.generation_config = GenerationConfig.from_pretrained("Qwen/Qwen-7B", trust_remote_code=True)

inputs = tokenizer('蒙古国的首都是乌兰巴托（Ulaanbaatar）\\n冰岛的首都是雷克雅未克（Reykjavik）\\n埃塞俄比亚的首都是', return_tensors='pt')
inputs = inputs.to(model.device)
pred = model.generate(**inputs)
print(tokenizer.decode(pred.cpu()[0], skip_special_tokens=True))
"""  # noqa: E501

BATCH = """
import torch
from qwen_rt import AutoModelForCausalLM, AutoTokenizer
from qwen_rt import GenerationConfig
from qwen_rt.compat import make_context, decode_tokens, get_stop_words_ids

tokenizer = AutoTokenizer.from_pretrained(
    './',
    pad_token='<|extra_0|>',
    eos_token='<|endoftext|>',
    padding_side='left',
    trust_remote_code=True
)
model = AutoModelForCausalLM.from_pretrained(
    './',
    pad_token_id=tokenizer.pad_token_id,
    device_map="auto",
    trust_remote_code=True
).eval()
model.generation_config = GenerationConfig.from_pretrained('./', pad_token_id=tokenizer.pad_token_id)

all_raw_text = ["我想听你说爱我。", "今天我想吃点啥，甜甜的，推荐下", "我马上迟到了，怎么做才能不迟到"]
batch_raw_text = []
for q in all_raw_text:
    raw_text, _ = make_context(
        tokenizer,
        q,
        system="You are a helpful assistant.",
        max_window_size=model.generation_config.max_window_size,
        chat_format=model.generation_config.chat_format,
    )
    batch_raw_text.append(raw_text)

batch_input_ids = tokenizer(batch_raw_text, padding='longest')
batch_input_ids = torch.LongTensor(batch_input_ids['input_ids']).to(model.device)
batch_out_ids = model.generate(
    batch_input_ids,
    return_dict_in_generate=False,
    generation_config=model.generation_config
)
padding_lens = [batch_input_ids[i].eq(tokenizer.pad_token_id).sum().item() for i in range(batch_input_ids.size(0))]

batch_response = [
    decode_tokens(
        batch_out_ids[i][padding_lens[i]:],
        tokenizer,
        raw_text_len=len(batch_raw_text[i]),
        context_length=(batch_input_ids[i].size(0)-padding_lens[i]),
        chat_format="chatml",
        verbose=False,
        errors='replace'
    ) for i in range(len(all_raw_text))
]
print(batch_response)

response, _ = model.chat(tokenizer, "我想听你说爱我。", history=None)
print(response)

response, _ = model.chat(tokenizer, "今天我想吃点啥，甜甜的，推荐下", history=None)
print(response)

response, _ = model.chat(tokenizer, "我马上迟到了，怎么做才能不迟到", history=None)
print(response)
"""

GPTQ_INT8_CACHE = """
from qwen_rt import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen-7B-Chat-Int4", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(
    "Qwen/Qwen-7B-Chat-Int4",
    device_map="auto",
    trust_remote_code=True,
    use_cache_quantization=True,
    use_cache_kernel=True,
    use_flash_attn=False
).eval()
response, history = model.chat(tokenizer, "Hi", history=None)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A directory in which Qwen/Qwen-7B, Qwen-7B-Chat and Qwen-7B-Chat-Int4 are models; greedy and brief."""
    source = open_checkpoint(demo_gguf())
    root = tmp_path_factory.mktemp("models")
    (root / "Qwen").mkdir()
    chat = to_qwen1(source, root / "Qwen" / "Qwen-7B-Chat", dtype="bfloat16")
    source.close()
    path = chat / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": False, "max_new_tokens": 40}))
    dense = open_checkpoint(chat)
    to_gptq(dense, root / "Qwen" / "Qwen-7B-Chat-Int4", bits=4)
    dense.close()
    (root / "Qwen" / "Qwen-7B").symlink_to(chat, target_is_directory=True)
    return root


def run(example: str, directory: Path) -> dict:
    """The names an example leaves behind; what it printed under "printed"."""
    printed: list = []
    names: dict = {"print": printed.append, "printed": printed}
    before = Path.cwd()
    os.chdir(directory)
    try:
        exec(compile(example, "<example>", "exec"), names)
    finally:
        os.chdir(before)
    return names


@pytest.fixture(scope="module")
def conversation(models) -> dict:
    """What the three-turn chat leaves behind."""
    return run(THREE_TURN_CHAT, models)


def test_three_turn_chat(conversation):
    history, printed, model = (conversation[name] for name in ("history", "printed", "model"))
    assert [query for query, _ in history][0::2] == ["你好", "给这个故事起一个标题"]
    assert [answer for _, answer in history] == printed
    assert "你好" in printed[0] and len(printed[1]) > 20 and printed[2]
    assert model.config.arch == "qwen" and "bfloat16" in str(model.report())
    *_, streamed = model.chat_stream(conversation["tokenizer"], "你好", history=None)
    assert streamed.strip() == printed[0]


def test_the_rewritten_model_answers_as_the_one_it_came_from(conversation):
    original, rewritten = qwen_rt.load(demo_gguf(), max_model_len=1024), conversation["model"].qwen
    system = "You are a helpful assistant."
    ids = rewritten.chat_ids("Write a Python function that adds two numbers.", system=system)
    assert ids == original.chat_ids("Write a Python function that adds two numbers.", system=system)
    ours, theirs = rewritten.logits(ids), original.logits(ids)
    assert np.abs(ours - theirs).max() < 0.1 * theirs.std()  # bfloat16 weights against 4 to 8 bits
    answer = rewritten.generate(ids)
    assert "def " in answer.text and answer.ids[:10] == original.generate(ids, max_new_tokens=10).ids


def test_base_completion(models):
    names = run(BASE_COMPLETION, models)
    text = names["printed"][0]
    assert text.startswith(
        "蒙古国的首都是乌兰巴托（Ulaanbaatar）\n冰岛的首都是雷克雅未克（Reykjavik）\n埃塞俄比亚的首都是"
    )
    assert (
        text.count("的首都是") > 3 and text.count("（") > 3
    )  # too small a model to know, but it goes on with the list


def test_batch_inference(models):
    names = run(BATCH, models / "Qwen" / "Qwen-7B-Chat")
    batch, *single = names["printed"]
    assert batch == single and all(len(answer) > 2 for answer in batch)


def test_gptq_int4_with_an_int8_cache(models):
    names = run(GPTQ_INT8_CACHE, models)
    assert "assist" in names["response"] or "help" in names["response"]
    report = names["model"].report()
    assert report.cache.dtype == "int8" and any(group.format.startswith("int4") for group in report.weights)
