"""The facade: the original's tokenizer call, padded batches, generation configs, device_map and its other keywords."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import END, IM_END, IM_START, PAD, write_model

from qwen_rt import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from qwen_rt.backends.select import probe
from qwen_rt.compat import decode_tokens, get_stop_words_ids, make_context
from qwen_rt.errors import ConfigError, RequestError, TokenizerError

GENERATION = {
    "chat_format": "chatml",
    "eos_token_id": END,
    "pad_token_id": END,
    "max_window_size": 300,
    "max_new_tokens": 10,
    "do_sample": False,
    "transformers_version": "4.31.0",
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("compat") / "model", GENERATION))


@pytest.fixture(scope="module")
def loaded(path):
    return AutoModelForCausalLM.from_pretrained(
        path, device_map="reference", trust_remote_code=True, use_flash_attn=False, max_model_len=512
    ).eval()


@pytest.fixture
def model(loaded, path):
    loaded.generation_config = GenerationConfig.from_pretrained(path, trust_remote_code=True)
    return loaded


@pytest.fixture(scope="module")
def tokenizer(path):
    return AutoTokenizer.from_pretrained(
        path, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left", trust_remote_code=True
    )


# -- tokenizer -----------------------------------------------------------------------------------------------------


def test_tokenizer_attributes(tokenizer, path):
    assert (tokenizer.pad_token_id, tokenizer.pad_token) == (PAD, "<|extra_0|>")
    assert (tokenizer.eos_token_id, tokenizer.eos_token, tokenizer.eod_id) == (END, "<|endoftext|>", END)
    assert (tokenizer.im_start_id, tokenizer.im_end_id, len(tokenizer)) == (IM_START, IM_END, 464)
    assert (
        tokenizer.encode("ab") == [97, 98]
        and tokenizer.decode(torch.tensor([97, END]), skip_special_tokens=True) == "a"
    )
    other = AutoTokenizer.from_pretrained(path)
    other.pad_token = "<|extra_1|>"
    assert other.pad_token_id == PAD + 1 and other.padding_side == "right"
    with pytest.raises(TokenizerError, match="not a token"):
        other.pad_token = "<|nothing|>"
    with pytest.raises(AttributeError):
        _ = tokenizer.nonsense


def test_tokenizer_call(tokenizer):
    one = tokenizer("abc")
    assert one == {"input_ids": [97, 98, 99], "attention_mask": [1, 1, 1]} and one.input_ids == [97, 98, 99]
    batch = tokenizer(["abc", "d"], padding="longest")
    assert batch["input_ids"] == [[97, 98, 99], [PAD, PAD, 100]] and batch.attention_mask == [[1, 1, 1], [0, 0, 1]]
    tensors = tokenizer("abc", return_tensors="pt").to("cpu")
    assert tensors.input_ids.tolist() == [[97, 98, 99]] and tensors.input_ids.dtype == torch.int64
    assert tokenizer(["abcd"], padding="max_length", max_length=6)["input_ids"] == [[PAD, PAD, 97, 98, 99, 100]]
    assert tokenizer("abcd", truncation=True, max_length=2)["input_ids"] == [97, 98]
    assert tokenizer("<|im_end|>")["input_ids"] == [IM_END]
    assert len(tokenizer("<|im_end|>", allowed_special=set())["input_ids"]) == 10
    assert tokenizer.batch_decode([[97], [98, 99]]) == ["a", "bc"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True)
    assert prompt == make_context(tokenizer, "x", system="You are a helpful assistant.")[1]
    for arguments, message in (
        ({"padding": "short"}, "padding"),
        ({"return_tensors": "np"}, "only 'pt'"),
        ({"return_tensors": "pt"}, "different lengths"),
    ):
        with pytest.raises(TokenizerError, match=message):
            tokenizer(["abc", "d"], **arguments)


def test_a_chat_needs_no_torch(path):
    """Where it is not installed, what wants a tensor says so."""
    if not probe("cpu").usable:
        pytest.skip(probe("cpu").reason)
    code = f"""
import sys
sys.modules["torch"] = None  # importing it fails
from qwen_rt import AutoModelForCausalLM, AutoTokenizer
from qwen_rt.compat import decode_tokens, make_context
from qwen_rt.errors import BackendError
tokenizer = AutoTokenizer.from_pretrained({path!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({path!r}, device_map="auto", trust_remote_code=True).eval()
response, history = model.chat(tokenizer, "hello", history=None)
assert history == [("hello", response)]
text, ids = make_context(tokenizer, "hello", system="s")
decode_tokens(ids, tokenizer, len(text), len(ids), "chatml")
assert tokenizer("hello").input_ids == tokenizer.encode("hello")
try:
    tokenizer("hello", return_tensors="pt")
except BackendError as e:
    assert "a tensor needs PyTorch, which is not installed" in str(e), e
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- generate ------------------------------------------------------------------------------------------------------


def test_completion_as_in_the_readme(model, tokenizer):
    inputs = tokenizer("hello", return_tensors="pt")
    assert model.device == torch.device("cpu")
    inputs = inputs.to(model.device)
    pred = model.generate(**inputs)
    assert pred.shape == (1, 15) and pred[0, :5].tolist() == tokenizer.encode("hello")
    assert pred[0, 5:].tolist() == model.qwen.generate("hello").ids
    assert tokenizer.decode(pred.cpu()[0], skip_special_tokens=True).startswith("hello")


def test_left_padded_batch_answers_as_if_alone(model, tokenizer):
    texts = ["hi", "a much longer prompt", "medium one"]
    batch = tokenizer(texts, padding="longest")
    ids, mask = torch.LongTensor(batch["input_ids"]), torch.LongTensor(batch["attention_mask"])
    alone = [model.qwen.generate(text).ids for text in texts]
    for arguments in ({"attention_mask": mask}, {"pad_token_id": PAD}):
        out = model.generate(ids, return_dict_in_generate=False, generation_config=model.generation_config, **arguments)
        assert out.dtype == torch.int64 and torch.equal(out[:, : ids.shape[1]], ids)
        assert out[:, ids.shape[1] :].tolist() == alone
    # The configured pad ends sequences: without a mask the padding may be meant, and is read.
    assert model.generate(ids)[0, ids.shape[1] :].tolist() != alone[0]


def test_shorter_answers_are_padded_at_the_right(model, tokenizer):
    texts = ["hi", "hello you"]
    free = [model.qwen.generate(t).ids for t in texts]
    end = next(i for i in free[0][1:] if i not in free[1])
    length = free[0].index(end) + 1
    batch = tokenizer(texts, padding="longest", return_tensors="pt")
    out = model.generate(**batch, eos_token_id=end, pad_token_id=PAD)[:, batch.input_ids.shape[1] :].tolist()
    assert out == [free[0][:length] + [PAD] * (10 - length), free[1]]


def test_generate_keywords(model, tokenizer):
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape == (1, 8)
    assert model.generate(input_ids=ids, max_length=9).shape == (1, 9)
    assert model.generate(ids, return_dict_in_generate=True).sequences.shape == (1, 15)
    many = model.generate(ids, num_return_sequences=3, do_sample=True, temperature=5.0, seed=1)
    assert many.shape == (3, 15) and len({tuple(row) for row in many.tolist()}) == 3
    word = model.generate(ids)[0, 7:9].tolist()
    assert model.generate(ids, stop_words_ids=[word]).shape == (1, 9)
    model.generation_config = GenerationConfig(**{**GENERATION, "stop_words_ids": [word]})
    assert model.generate(ids).shape == (1, 9)
    for arguments, message in (
        ({"num_beams": 2}, "beam"),
        ({"max_length": 5}, "has 5 tokens already"),
        ({"inputs": [1, 2]}, r"tensor \[batch, length\]"),
        ({"logits_processor": object()}, "unknown generation option"),
        ({"attention_mask": torch.zeros_like(ids)}, "empty"),
    ):
        with pytest.raises(RequestError, match=message):
            model.generate(**{"inputs": ids, **arguments})


# -- chat and its helpers ------------------------------------------------------------------------------------------


def test_chat_forms(model, tokenizer):
    response, history = model.chat(tokenizer, "hello", history=None)
    assert history == [("hello", response)] and model.qwen.chat("hello")[0] == response
    assert list(model.chat_stream(tokenizer, "hello", history=None))[-1].strip() == response
    longer = GenerationConfig(**{**GENERATION, "max_new_tokens": 2})
    assert len(model.chat(tokenizer, "hello", history=None, generation_config=longer)[0]) <= len(response)


def test_context_and_stop_words(tokenizer):
    text, ids = make_context(tokenizer, "hi", system="s", max_window_size=100, chat_format="chatml")
    assert text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == text and ids.count(IM_START) == 3
    assert get_stop_words_ids("chatml", tokenizer) == [[IM_END], [IM_START]]
    assert get_stop_words_ids("raw", tokenizer) == [tokenizer.encode("Human:"), [END]]


def test_decode_tokens(tokenizer):
    prompt, ids = make_context(tokenizer, "hi")
    row = torch.tensor([*ids, *tokenizer.encode(" yes \n"), IM_END, END, PAD])

    def decode(row, **options):
        return decode_tokens(row, tokenizer, len(prompt), len(ids), "chatml", **options)

    assert decode(row) == "yes"
    assert decode(row, return_end_reason=True) == ("yes", "Gen '<|im_end|>'")
    assert decode(row[: len(ids) + 4], return_end_reason=True) == ("yes", "Gen length 4")  # no token is lost
    assert decode_tokens([97, 98, END, 99], tokenizer, 1, 1, "raw") == "b"


def test_generation_config(path, tmp_path):
    config = GenerationConfig.from_pretrained(path, pad_token_id=PAD, trust_remote_code=True)
    assert (config.pad_token_id, config.max_window_size, config.transformers_version) == (PAD, 300, "4.31.0")
    assert (config.top_k, config.top_p, config.eos_ids()) == (0, 1.0, (END,))
    assert config.to_dict()["chat_format"] == "chatml" and "4.31.0" in repr(config)
    with pytest.raises(AttributeError, match="no field 'nonsense'"):
        _ = config.nonsense
    assert GenerationConfig.from_file(tmp_path / "absent.json").max_new_tokens is None
    for content in ("[1]", "{"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match=r"bad\.json"):
            GenerationConfig.from_file(tmp_path / "bad.json")
    assert json.dumps(config.to_dict())


# -- from_pretrained -----------------------------------------------------------------------------------------------


def test_keywords_choose_formats(path):
    model = AutoModelForCausalLM.from_pretrained(
        path,
        device_map={"": "reference"},
        bf16=True,
        use_cache_quantization=True,
        use_cache_kernel=True,
        pad_token_id=PAD,
        max_model_len=64,
    )
    report = model.report()
    assert report.cache.dtype == "int8" and {g.format for g in report.weights} == {"bfloat16"}
    assert model.generation_config.pad_token_id == PAD and model.config.arch == "qwen"
    auto = AutoModelForCausalLM.from_pretrained(path, device_map="reference", torch_dtype="auto", max_model_len=64)
    assert {g.format for g in auto.report().weights} == {"float32"}


def test_keywords_that_mean_nothing_here_are_said(path):
    with pytest.warns(UserWarning, match="no effect here: rope_scaling"):
        AutoModelForCausalLM.from_pretrained(path, device_map="reference", rope_scaling={}, max_model_len=64)
    for arguments in ({"bf16": True, "fp16": True}, {"device_map": 3}, {"device_map": {"a": 0, "b": 1}}):
        with pytest.raises(ConfigError):
            AutoModelForCausalLM.from_pretrained(path, **arguments)
