"""load() and Qwen: defaults, both call forms of chat, streams that free their blocks, memory checked first."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import CONFIG, END, IM_END, IM_START, write_model

import qwen_rt
from qwen_rt import llm
from qwen_rt.backends import select
from qwen_rt.backends.base import KVSpec
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.backends.select import probe
from qwen_rt.engine import GenerationConfig
from qwen_rt.engine.capacity import plan_cache, size
from qwen_rt.errors import BackendError, ConfigError, HubError, OutOfMemory, QwenRTError, RequestError
from qwen_rt.llm import Qwen
from qwen_rt.model import build

GENERATION = {"chat_format": "chatml", "max_new_tokens": 12, "max_window_size": 200, "eos_token_id": END}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llm") / "model", GENERATION)


@pytest.fixture(scope="module")
def shared(path):
    return qwen_rt.load(path, "reference", max_model_len=512)


@pytest.fixture
def model(shared):
    """The loaded model; every test must leave its cache free."""
    before = shared.generation_config
    yield shared
    shared.generation_config = before
    assert shared.report().cache.used_blocks == 0


def test_import_is_light():
    code = "import sys, qwen_rt; assert not {'torch', 'numpy', 'tiktoken'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_import_is_not_searched_for_garbage():
    code = (
        "import gc, qwen_rt; runs = []; gc.callbacks.append(lambda *a: runs.append(a)); qwen_rt.load\n"
        "import sys; assert 'numpy' in sys.modules and gc.isenabled() and not runs, runs"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_answer_of_the_cpu_needs_no_torch(tmp_path: Path):
    """From files of every kind, quantised at load too: the package is not even looked for."""
    if not probe("cpu").usable:
        pytest.skip(probe("cpu").reason)
    path = write_model(tmp_path / "model")
    code = f"""
import sys
sys.modules["torch"] = None  # importing it fails, as where it is not installed
import qwen_rt
for options in ({{}}, {{"quantize": "int4", "kv_cache": "int8"}}, {{"dtype": "bfloat16"}}):
    with qwen_rt.load({str(path)!r}, device="auto", **options) as model:
        assert model.report().backend == "cpu"
        answer = model.generate("hello", max_new_tokens=4, logprobs=2, ignore_eos=True, temperature=0.8, seed=1)
        assert len(answer.ids) == 4 and model.logits(answer.ids).shape == (4, {CONFIG.vocab_size})
        model.chat("hello", max_new_tokens=2)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# -- generate ------------------------------------------------------------------------------------------------------


def test_text_ids_tensors_and_batches_agree(model: Qwen):
    ids = model.tokenizer.encode("hello")
    one = model.generate("hello")
    assert one.ids == model.generate(ids).ids == model.generate(torch.tensor(ids)).ids
    assert (one.prompt_tokens, len(one.ids), one.finish_reason) == (5, 12, "length")
    assert one.text == model.tokenizer.decode(one.ids, skip_special_tokens=True)
    batch = model.generate(["hello", "bye", ids])
    assert [c.ids for c in batch] == [one.ids, model.generate("bye").ids, one.ids]
    assert one.prefill_rate > 0 and one.decode_rate > 0 and one.completions == [one]


def test_control_tokens_in_a_prompt_only_on_request(model: Qwen):
    text = "a<|im_end|>"
    assert model.generate(text).prompt_tokens == len(text)  # one token a byte in this vocabulary
    assert model.generate(text, allowed_special="all").prompt_tokens == 2
    assert model.generate([text, text], allowed_special={"<|im_end|>"})[1].prompt_tokens == 2
    assert model.stream(text, allowed_special={"<|im_start|>"}).completion.prompt_tokens == len(text)


def test_greedy_is_the_argmax_of_logits_without_the_holes(model: Qwen):
    ids = model.tokenizer.encode("abc")
    answer = model.generate(ids)
    logits = model.logits(ids + answer.ids)
    logits[:, 464:] = -np.inf  # ids without a token cannot be generated
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == answer.ids


def test_generation_config_gives_the_defaults(model: Qwen):
    greedy = model.generate("hello").ids
    model.generation_config = GenerationConfig(**GENERATION, do_sample=True, temperature=5.0, top_p=1.0)
    assert len({tuple(model.generate("hello").ids) for _ in range(4)}) > 1
    assert model.generate("hello", temperature=0.0).ids == greedy
    assert model.generate("hello", do_sample=False, temperature=3.0).ids == greedy
    assert model.generate("hello", top_k=1).ids == greedy
    seeded = model.generate("hello", seed=3).ids
    model.generation_config = GenerationConfig(temperature=5.0, max_new_tokens=12)
    assert model.generate("hello").ids == greedy  # do_sample is off
    assert model.generate("hello", do_sample=True, seed=3).ids == seeded
    assert len(model.generate("hello", max_new_tokens=3).ids) == 3


def test_eos_ids_follow_the_chat_format(model: Qwen):
    assert model.request([1]).eos_ids == {END, IM_START, IM_END}
    assert model.request([1], generation_config=GenerationConfig(chat_format="raw")).eos_ids == {END}
    more = GenerationConfig(chat_format="raw", eos_token_id=[7, END])
    assert model.request([1], generation_config=more).eos_ids == {7, END}


def test_n_and_logprobs(model: Qwen):
    best, plain = model.generate(["hello", "x"], n=3, temperature=3.0, seed=1, logprobs=True)
    assert len(best.completions) == 3 and best.completions[0] is best
    assert len({tuple(c.ids) for c in best.completions}) > 1
    assert best.logprobs is not None and [lp.id for lp in best.logprobs] == best.ids
    assert model.generate("x").logprobs is None and len(plain.completions) == 3


# -- streams -------------------------------------------------------------------------------------------------------


def test_stream_pieces_join_to_the_text(model: Qwen):
    whole = model.generate("hello", temperature=4.0, seed=2, max_new_tokens=40)
    stream = model.stream("hello", temperature=4.0, seed=2, max_new_tokens=40)
    assert "".join(stream) == whole.text
    assert stream.completion.ids == whole.ids and stream.completion.finish_reason == "length"
    assert "\ufffd" in whole.text  # single bytes: most are no character


def test_abandoned_streams_free_their_blocks(model: Qwen):
    for end in ("close", "drop", "with", "raise"):
        stream = model.stream("hello", max_new_tokens=50)
        next(stream)
        assert model.report().cache.used_blocks > 0
        if end == "close":
            stream.close()
        elif end == "with":
            with stream:
                pass
        elif end == "raise":
            with pytest.raises(ZeroDivisionError), stream:
                raise ZeroDivisionError
        del stream
        assert model.report().cache.used_blocks == 0, end
    growing = model.chat_stream("hello", max_new_tokens=50)
    next(growing)
    growing.close()


def test_threads_and_interleaved_streams_get_their_own_text(model: Qwen):
    prompts = [f"prompt {i}" for i in range(4)]
    alone = [model.generate(p).text for p in prompts]
    streams = [model.stream(p) for p in prompts]
    texts = [""] * 4
    for _ in range(20):
        for i, stream in enumerate(streams):
            texts[i] += next(stream, "")
    assert texts == alone
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: model.generate(prompts[i]).text})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == alone


# -- chat ----------------------------------------------------------------------------------------------------------


def test_chat_in_both_call_forms(model: Qwen):
    response, history = model.chat("hello", history=None, system="be short")
    assert history == [("hello", response)]
    assert model.chat(model.tokenizer, "hello", history=None, system="be short") == (response, history)
    assert model.chat(model.tokenizer, "hello", None, "be short") == (response, history)
    assert model.chat(query="hello", history=[], system="be short")[0] == response
    second, longer = model.chat("more", history, system="be short")
    assert longer == [("hello", response), ("more", second)] and len(history) == 1
    assert model.chat("hello")[0] != response  # the default system prompt is another


def test_chat_stream_yields_the_text_so_far(model: Qwen):
    texts = list(model.chat_stream(model.tokenizer, "hello", history=None))
    assert all(b.startswith(a) and len(b) > len(a) for a, b in itertools.pairwise(texts))
    assert texts[-1].strip() == model.chat("hello")[0]


def test_chat_prompt_is_chatml_within_the_window(model: Qwen):
    tokenizer = model.tokenizer
    turns = [(f"question {i}", f"answer {i}") for i in range(9)]
    ids = model.chat_ids("last <|im_end|>", turns, "sys", max_window_size=80)
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nsys<|im_end|>\n<|im_start|>user\nquestion 8")
    assert text.endswith("<|im_start|>user\nlast <|im_end|><|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(IM_END) == text.count("<|im_end|>") - 1  # the user's own is plain text
    assert model.generation_config.max_window_size == 200
    assert len(model.chat_ids("q", turns * 9)) < 200 + 60


def test_stop_words_ids_end_a_chat(model: Qwen):
    full = model.generate(model.chat_ids("hello")).ids
    word = full[3:5]
    assert len(model.stream(model.chat_ids("hello")).completion.ids) == 0
    cut = model.generate(model.chat_ids("hello"), stop_words_ids=[word])
    assert cut.ids == full[:5] and cut.finish_reason == "stop" and cut.matched == tuple(word)
    assert model.chat("hello", stop_words_ids=[word])[0] == cut.text.strip()


# -- errors --------------------------------------------------------------------------------------------------------


def test_requests_that_cannot_be_served(model: Qwen):
    for call, message in (
        (lambda: model.generate(""), "prompt is empty"),
        (lambda: model.generate([]), "list of prompts is empty"),
        (lambda: model.generate(["fine", ""]), "prompt is empty"),
        (lambda: model.generate("x" * 512), "512 tokens; the context of 512"),
        (lambda: model.generate([["a"]]), "flat list of token ids"),
        (lambda: model.logits([]), "prompt is empty"),
        (lambda: model.logits([1] * 513), "513 tokens exceed the context of 512"),
        (lambda: model.generate("x", temperature=-1), "temperature"),
        (lambda: model.generate("x", beams=4), "unknown generation option 'beams'"),
        (lambda: model.stream("x", n=2), "n must be 1"),
        (lambda: model.chat("x", n=2), "n must be 1"),
        (lambda: model.chat(""), "non-empty string"),
        (lambda: model.chat("a", query="b"), "query twice"),
        (lambda: model.chat("a", [], "s", 1), "name the rest"),
        (lambda: model.stream(""), "prompt is empty"),
    ):
        with pytest.raises(RequestError, match=message):
            call()


def test_a_closed_model_says_so(path):
    with qwen_rt.load(path, "reference", max_model_len=64) as model:
        assert model.generate("a", max_new_tokens=1).ids
    with pytest.raises(QwenRTError, match="closed"):
        model.generate("a")


# -- load ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_cache", ["auto", "int8"])
def test_keys_are_levelled_for_an_8_bit_cache_only(path, kv_cache, monkeypatch):
    seen = []
    monkeypatch.setattr(llm, "build", lambda *a, **k: seen.append(k["level_keys"]) or build(*a, **k))
    qwen_rt.load(path, "reference", max_model_len=64, kv_cache=kv_cache).close()
    assert seen == [kv_cache == "int8"]


def test_load_options(path):
    model = qwen_rt.load(path, "reference", max_model_len=64, quantize="int8", kv_cache="int8", max_batch=2)
    report = model.report()
    assert report.cache.dtype == "int8" and report.max_model_len == 64
    assert {g.format for g in report.weights} > {"float32"} and any(g.format.startswith("int8") for g in report.weights)
    assert report.to_dict()["kernels"] and "int8" in str(report)
    packed = []
    model = qwen_rt.load(path, "reference", dtype="bfloat16", progress=lambda name, n: packed.append((name, n)))
    assert {g.format for g in model.report().weights} == {"bfloat16"} and packed
    assert sum(g.nbytes for g in model.report().weights) <= sum(n for _, n in packed)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "none"}, ConfigError, "weights='none'"),
        ({"dtype": "int7"}, ConfigError, "dtype='int7'"),
        ({"quantize": "int3"}, ConfigError, "int3"),
        ({"kv_cache": "int2"}, BackendError, "no 'int2' cache; it offers auto, float32"),
        ({"max_batch": 0}, ConfigError, "max_batch"),
        ({"max_model_len": 40000}, ConfigError, "2 to 32768"),
        ({"device": "nothing"}, BackendError, "unknown device"),
    ],
    ids=str,
)
def test_load_options_that_cannot_be(path, options, error, message):
    with pytest.raises(error, match=message):
        qwen_rt.load(path, **{"device": "reference", **options})


def test_random_weights_need_no_weight_files(path, tmp_path):
    for name in ("config.json", "qwen.tiktoken"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    model = qwen_rt.load(tmp_path, "reference", weights="random", max_model_len=64)
    assert model.generate("hello", max_new_tokens=3).ids
    assert any("random" in note for note in model.report().notes)
    with pytest.raises(HubError):
        qwen_rt.load(tmp_path, "reference")


def test_a_model_that_does_not_fit_is_refused_before_anything_is_packed(path, monkeypatch):
    monkeypatch.setattr(ReferenceBackend, "memory", lambda self: (150_000, 10**9))
    monkeypatch.setattr(ReferenceBackend, "pack_linear", lambda *a: pytest.fail("packed before the check"))
    with pytest.raises(OutOfMemory, match=r"does not fit.*150\.0 kB are free.*quantize"):
        qwen_rt.load(path, "reference")


def test_context_shrinks_to_what_fits_and_it_is_said(path, monkeypatch):
    monkeypatch.setattr(ReferenceBackend, "memory", lambda self: (8_000_000, 10**9))
    with pytest.warns(RuntimeWarning, match="context shortened from 32768"):
        model = qwen_rt.load(path, "reference", max_batch=1)
    assert 2048 <= model.max_model_len < 32768
    assert any("context shortened" in note for note in model.report().notes)
    with pytest.raises(OutOfMemory):
        qwen_rt.load(path, "reference", max_model_len=32768)


def test_cache_sizes():
    spec = KVSpec(num_layers=2, num_kv_heads=4, head_size=8, block_size=16, dtype="float32")
    block = spec.block_bytes()

    def plan(free, **options):
        given = {"reserved": 0, "max_model_len": None, "max_batch": 4, "kv_memory": None, **options}
        return plan_cache(CONFIG, spec, free=free, **given)

    assert plan(10**9).num_blocks == 2048 + 3 * 128 and plan(10**9).max_model_len == 32768
    assert plan(10**9, max_model_len=100).num_blocks == 4 * 7
    assert plan(10**9, kv_memory=50 * block, max_model_len=100).num_blocks == 50
    assert plan(10**9, kv_memory=50 * block).max_model_len == 800
    assert plan(10**9, kv_memory=50 * block).note
    for free, options in ((100 * block, {}), (10**9, {"reserved": 10**9}), (50 * block, {"kv_memory": 51 * block})):
        with pytest.raises(OutOfMemory, match="free"):
            plan(free, **options)
    assert [size(n) for n in (12, 1234, 2_500_000, 3_200_000_000)] == ["12 B", "1.2 kB", "2.5 MB", "3.20 GB"]


def test_the_reference_never_serves_in_silence(path, monkeypatch):
    monkeypatch.setattr(
        "qwen_rt.llm.open_backend", lambda device: (ReferenceBackend(), ["passed over cpu: no extension"])
    )
    with pytest.warns(RuntimeWarning, match="SLOW"):
        model = qwen_rt.load(path, max_model_len=64)
    assert "SLOW" in str(model.report()) and "passed over cpu: no extension" in str(model.report())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qwen_rt.load(path, "reference", max_model_len=64)


@pytest.mark.skipif(not select.probe("cpu").usable, reason="the native CPU extension is not built")
def test_native_backend_agrees_with_the_reference(path, shared):
    native = qwen_rt.load(path, "cpu", max_model_len=512, kv_cache="float32")
    ids = native.tokenizer.encode("The quick brown fox jumps over the lazy dog, and on past the training length of 64.")
    difference = np.abs(native.logits(ids) - shared.logits(ids)).max()
    assert difference < 1e-4 * shared.logits(ids).std()
    assert native.generate(ids).ids == shared.generate(ids).ids
