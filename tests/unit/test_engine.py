"""The engine: scheduling on the null backend, and answers that do not depend on how they were scheduled."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_config import TINY

from qwen_rt.backends.base import KVSpec
from qwen_rt.backends.null import NullBackend
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.engine import Engine, Request, SamplingParams
from qwen_rt.engine.completion import Completion
from qwen_rt.engine.loop import Loop
from qwen_rt.errors import BackendError, RequestError
from qwen_rt.model import build, ntk_alpha

TINY_QWEN1 = replace(TINY, arch="qwen", num_kv_heads=4, train_length=16, dynamic_ntk=True, logn=True, max_position=512)
PROMPTS = [[5, 9, 2, 44, 71], list(range(1, 41)), [3], list(range(90, 30, -1)), [8, 8, 8, 8]]


class Letters:
    """A decoder that spells id i as one letter; a control-free stand-in for the tokenizer's."""

    def __init__(self, skip_special_tokens: bool = True) -> None:
        del skip_special_tokens

    def push(self, token: int) -> str:
        return chr(ord("A") + token % 26)

    def flush(self) -> str:
        return ""


@pytest.fixture(scope="module")
def model():
    return build(RandomCheckpoint(TINY), ReferenceBackend())


@pytest.fixture(scope="module")
def qwen1():
    return build(RandomCheckpoint(TINY_QWEN1), ReferenceBackend())


def make_engine(model, blocks=64, max_model_len=256, **options) -> Engine:
    config, caps = model.config, model.backend.caps
    spec = KVSpec(config.num_layers, config.num_kv_heads, config.head_size, caps.kv_block, "float32")
    options.setdefault("decoder", Letters)
    return Engine(model, model.backend.alloc_kv(spec, blocks), max_model_len=max_model_len, **options)


def run(engine: Engine, requests: list[Request]) -> list[list[Completion]]:
    """All answers of the requests, in order; every block must be free afterwards."""
    for request in requests:
        engine.add(request)
    answers = {r.id: [Completion() for _ in range(r.params.n)] for r in requests}
    while engine.has_unfinished:
        for out in engine.step():
            answers[out.request_id][out.index].add(out)
    assert engine.blocks.num_used == 0
    return [answers[r.id] for r in requests]


def ids_of(engine: Engine, prompts: list[list[int]], **params) -> list[list[int]]:
    return [a[0].ids for a in run(engine, [Request(p, SamplingParams(**params)) for p in prompts])]


# -- the same answers, however they are scheduled ------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 7}], ids=["greedy", "sampled"])
def test_batched_equals_single(model, params):
    single = [ids_of(make_engine(model), [p], max_new_tokens=20, **params)[0] for p in PROMPTS]
    assert ids_of(make_engine(model), PROMPTS, max_new_tokens=20, **params) == single
    assert len({tuple(ids) for ids in single}) == len(PROMPTS)  # the model does answer its prompt


def test_greedy_follows_teacher_forced_logits(model):
    engine = make_engine(model)
    for prompt, answer in zip(PROMPTS, ids_of(engine, PROMPTS, max_new_tokens=12), strict=True):
        logits = engine.logits(prompt + answer)
        assert logits.shape == (len(prompt) + 12, TINY.vocab_size) and logits.dtype == np.float32
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


@pytest.mark.parametrize("chunk", [1, 3, 16, 17])
def test_chunked_prefill_equals_whole(model, chunk):
    whole = ids_of(make_engine(model), PROMPTS, max_new_tokens=8)
    assert ids_of(make_engine(model, prefill_tokens=chunk), PROMPTS, max_new_tokens=8) == whole


@pytest.mark.parametrize("params", [{}, {"temperature": 1.5, "seed": 3, "repetition_penalty": 1.2}])
def test_preemption_gives_the_same_text(model, params):
    roomy = ids_of(make_engine(model), PROMPTS, max_new_tokens=60, **params)
    tight = make_engine(model, blocks=9, max_model_len=140)
    assert ids_of(tight, PROMPTS, max_new_tokens=60, **params) == roomy
    assert tight.scheduler.num_preemptions > 0


def test_prefix_reuse_gives_the_same_text(model):
    long = list(range(2, 82))
    fresh = [ids_of(make_engine(model), [long + tail], max_new_tokens=10)[0] for tail in ([1], [7, 7], [90] * 20)]
    engine = make_engine(model)
    answers = [
        run(engine, [Request(long + t, SamplingParams(max_new_tokens=10))])[0][0] for t in ([1], [7, 7], [90] * 20)
    ]
    assert [a.ids for a in answers] == fresh
    assert [a.cached_tokens for a in answers] == [0, 80, 80]


def test_second_turn_reuses_the_answer(model):
    engine = make_engine(model)
    first = run(engine, [Request(PROMPTS[1], SamplingParams(max_new_tokens=40))])[0][0]
    prompt = PROMPTS[1] + first.ids + [4, 5]
    second = run(engine, [Request(prompt, SamplingParams(max_new_tokens=5))])[0][0]
    assert second.cached_tokens == (len(PROMPTS[1]) + 39) // 16 * 16
    assert second.ids == ids_of(make_engine(model), [prompt], max_new_tokens=5)[0]


# -- Qwen-1: the NTK alpha belongs to the sequence -----------------------------------------------------------------


def qwen1_prompts() -> list[list[int]]:
    prompts = [[1 + i * 3 % 90 for i in range(n)] for n in (10, 20, 40, 70)]
    assert len({ntk_alpha(TINY_QWEN1, len(p)) for p in prompts}) == 4
    return prompts


def test_interleaved_conversations_keep_their_own_alpha(qwen1):
    alone = [ids_of(make_engine(qwen1), [p], max_new_tokens=30)[0] for p in qwen1_prompts()]
    assert ids_of(make_engine(qwen1), qwen1_prompts(), max_new_tokens=30) == alone


def test_alpha_survives_preemption(qwen1):
    # Decoding crosses train_length, so a recomputation that chose alpha anew would write different keys.
    alone = [ids_of(make_engine(qwen1), [p], max_new_tokens=40)[0] for p in qwen1_prompts()]
    tight = make_engine(qwen1, blocks=8, max_model_len=128)
    assert ids_of(tight, qwen1_prompts(), max_new_tokens=40) == alone
    assert tight.scheduler.num_preemptions > 0


def test_cached_prefix_is_not_reused_under_another_alpha(qwen1):
    base = [1 + i * 7 % 90 for i in range(64)]
    engine = make_engine(qwen1)
    for size, cached in ((20, 0), (30, 16), (40, 0), (64, 32), (33, 32)):
        answer = run(engine, [Request(base[:size], SamplingParams(max_new_tokens=6))])[0][0]
        assert answer.cached_tokens == cached
        assert answer.ids == ids_of(make_engine(qwen1), [base[:size]], max_new_tokens=6)[0]


def test_logits_take_the_alpha_of_their_length(qwen1):
    engine = make_engine(qwen1, prefill_tokens=16)
    ids = qwen1_prompts()[3]
    short, long = engine.logits(ids[:16]), engine.logits(ids)
    assert np.array_equal(long, make_engine(qwen1, prefill_tokens=16).logits(ids))
    assert np.abs(short - long[:16]).max() > 1e-3  # alpha 1 against alpha 15


# -- sampling ------------------------------------------------------------------------------------------------------


def test_seeds(model):
    def sample(**params):
        return ids_of(make_engine(model), [PROMPTS[0]], max_new_tokens=16, temperature=2.0, **params)[0]

    assert sample(seed=1) == sample(seed=1)
    assert len({tuple(sample(seed=s)) for s in range(6)}) > 1
    assert len({tuple(sample()) for _ in range(6)}) > 1


def test_n_samples_share_the_prompt_and_differ(model):
    params = SamplingParams(n=4, temperature=2.0, seed=5, max_new_tokens=12)
    answers = run(make_engine(model), [Request(PROMPTS[1], params)])[0]
    assert len({tuple(a.ids) for a in answers}) > 1
    assert [a.cached_tokens for a in answers] == [0, 32, 32, 32]
    again = run(make_engine(model, blocks=9, max_model_len=100), [Request(PROMPTS[1], params), Request(PROMPTS[3])])
    assert [a.ids for a in again[0]] == [a.ids for a in answers]


def test_logprobs_are_those_of_the_raw_logits(model):
    engine = make_engine(model)
    params = SamplingParams(max_new_tokens=10, logprobs=3, temperature=1.3, seed=2, repetition_penalty=1.5)
    answer = run(engine, [Request(PROMPTS[1], params), Request(PROMPTS[0], SamplingParams(max_new_tokens=10))])[0][0]
    scores = torch.from_numpy(engine.logits(PROMPTS[1] + answer.ids)).double().log_softmax(-1)[len(PROMPTS[1]) - 1 : -1]
    expected = scores.gather(1, torch.tensor(answer.ids)[:, None]).sum()
    assert answer.logprobs is not None and len(answer.logprobs) == 10
    assert math.isclose(sum(lp.logprob for lp in answer.logprobs), float(expected), abs_tol=1e-4)
    for lp, row in zip(answer.logprobs, scores, strict=True):
        assert [i for i, _ in lp.top] == row.topk(3).indices.tolist()
        assert [v for _, v in lp.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)


def test_banned_ids_are_never_chosen(model):
    allowed = {3, 4, 50}
    engine = make_engine(model, banned_ids=set(range(TINY.vocab_size)) - allowed)
    assert set(ids_of(engine, PROMPTS, max_new_tokens=20, temperature=5.0, seed=1)[0]) <= allowed


# -- ends ----------------------------------------------------------------------------------------------------------


def scripted(tokens, blocks=64, max_model_len=256, **options) -> Engine:
    """An engine whose model says `tokens`, over and over."""
    return make_engine(build(RandomCheckpoint(TINY), NullBackend(tokens=tokens)), blocks, max_model_len, **options)


def answer_of(tokens, eos=(), **params) -> Completion:
    params.setdefault("max_new_tokens", 30)
    return run(scripted(tokens), [Request([1, 2], SamplingParams(**params), frozenset(eos))])[0][0]


def test_stop_ids_eos_and_length():
    a = answer_of([0, 1, 2, 3, 4], eos=[3])
    assert (a.text, a.ids, a.finish_reason, a.matched) == ("ABC", [0, 1, 2, 3], "stop", 3)
    a = answer_of([0, 1, 2, 3, 4], stop_token_ids=[2], eos=[3])
    assert (a.text, a.ids, a.matched) == ("AB", [0, 1, 2], 2)
    a = answer_of([0, 1, 2, 3, 4], eos=[3], max_new_tokens=2)
    assert (a.text, a.finish_reason, a.matched) == ("AB", "length", None)
    a = answer_of([0, 1, 2, 3, 4], eos=[3], ignore_eos=True, max_new_tokens=7)
    assert (a.text, a.finish_reason) == ("ABCDEAB", "length")


def test_ignored_eos_is_never_chosen(model):
    eos = frozenset(ids_of(make_engine(model), [PROMPTS[0]], max_new_tokens=8)[0])
    request = Request(PROMPTS[0], SamplingParams(max_new_tokens=8, ignore_eos=True), eos)
    answer = run(make_engine(model), [request])[0][0]
    assert len(answer.ids) == 8 and not eos & set(answer.ids)


def test_context_limit_ends_an_answer():
    engine = scripted([0], blocks=2, max_model_len=32)
    answer = run(engine, [Request([1] * 20)])[0][0]
    assert len(answer.ids) == 12 and answer.finish_reason == "length"


def test_min_tokens_hold_off_every_stop_rule(model):
    params = SamplingParams(min_tokens=6, max_new_tokens=9, stop_token_ids=range(96), temperature=50.0, seed=1)
    answer = run(make_engine(model), [Request(PROMPTS[0], params)])[0][0]
    assert set(answer.ids[:6]) == {96} and answer.finish_reason == "stop" and len(answer.ids) == 7
    assert answer_of([0, 1, 2], stop=["BC"], min_tokens=4).text == "ABCA"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["CDE"], "AB"),  # over three tokens
        (["CDF", "DE"], "ABC"),  # the held-back beginning of one stop string is text after all
        (["ABCDEA"], ""),
        (["ABX", "EAX"], "ABCDEAB"),  # beginnings that come to nothing
        (["B", "AB"], ""),  # one ends where the other does: the longer
        ("D", "ABC"),
    ],
)
def test_stop_strings_across_token_borders(stop, text):
    answer = answer_of([0, 1, 2, 3, 4], stop=stop, max_new_tokens=7)
    assert answer.text == text
    assert (answer.finish_reason == "stop") == (text != "ABCDEAB")


def test_text_that_may_become_a_stop_string_is_held_back():
    engine = scripted([0, 1, 2, 3, 4])
    engine.add(Request([1], SamplingParams(stop=["BCDX"], max_new_tokens=6)))
    assert [out.text for _ in range(6) for out in engine.step()] == ["A", "", "", "", "BCDE", "A"]


def test_stop_words_ids_end_the_answer_and_stay_in_it():
    a = answer_of([0, 1, 2, 3], stop_words_ids=[[3, 1], [1, 2]])
    assert (a.text, a.ids, a.finish_reason, a.matched) == ("ABC", [0, 1, 2], "stop", (1, 2))


# -- scheduling ----------------------------------------------------------------------------------------------------


def steps_of(engine: Engine) -> list[list[tuple[int, int]]]:
    """(request, rows) of each step until all is done."""
    seen = []
    original = engine.runner.run

    def spy(step):
        seen.append([(c.seq.request.id, len(c.slots)) for c in step])
        return original(step)

    engine.runner.run = spy
    while engine.has_unfinished:
        engine.step()
    return seen


def test_decode_rows_run_beside_prefill_chunks_within_the_budget():
    engine = scripted([0], prefill_tokens=8)
    first = engine.add(Request([1, 2], SamplingParams(max_new_tokens=6)))
    second = engine.add(Request([5] * 20, SamplingParams(max_new_tokens=2)))
    assert steps_of(engine) == [
        [(first, 2), (second, 6)],
        [(first, 1), (second, 8)],
        [(first, 1), (second, 6)],
        [(first, 1), (second, 1)],
        [(first, 1)],
        [(first, 1)],
    ]


def test_first_come_first_served():
    engine = scripted([0], max_batch=2, prefill_tokens=64)
    ids = [engine.add(Request([1] * n, SamplingParams(max_new_tokens=3))) for n in (30, 3, 3, 30)]
    order = list(dict.fromkeys(i for step in steps_of(engine) for i, _ in step))
    assert order == ids


def test_a_large_request_is_not_starved_by_small_ones():
    engine = scripted([0], blocks=8, max_model_len=120)
    small = [engine.add(Request([i] * 16, SamplingParams(max_new_tokens=16))) for i in range(1, 4)]
    large = engine.add(Request([9] * 100, SamplingParams(max_new_tokens=4)))
    late = [engine.add(Request([i] * 16, SamplingParams(max_new_tokens=16))) for i in range(20, 30)]
    order = list(dict.fromkeys(i for step in steps_of(engine) for i, _ in step))
    assert order == [*small, large, *late]


def test_a_preempted_request_comes_back_before_later_ones():
    engine = scripted([0], blocks=4, max_model_len=64, max_batch=2)
    _, second, third = (engine.add(Request([i] * 15, SamplingParams(max_new_tokens=30))) for i in (1, 2, 3))
    steps = steps_of(engine)
    assert engine.scheduler.num_preemptions > 0
    again = next(i for i, step in enumerate(steps) if (second, 1) not in step and second in dict(step) and i)
    assert again < next(i for i, step in enumerate(steps) if third in dict(step))


def test_abort_frees_blocks_wherever_the_request_is():
    engine = scripted([0], max_batch=2, prefill_tokens=8)
    running, reading, waiting, several = (
        engine.add(Request([i] * n, SamplingParams(n=k)))
        for i, (n, k) in enumerate([(4, 1), (60, 1), (4, 1), (4, 3)], start=1)
    )
    engine.step()
    engine.step()
    assert engine.blocks.num_used > 0
    for request in (reading, waiting, running, several):
        assert engine.abort(request)
        assert not engine.abort(request)
    assert engine.blocks.num_used == 0 and not engine.has_unfinished and engine.step() == []


def test_a_failed_step_aborts_its_requests_and_frees_their_blocks(monkeypatch):
    engine = scripted([0])
    loop = Loop(engine)
    job = loop.submit([Request([1, 2, 3])])
    next(job)
    monkeypatch.setattr(engine.model, "forward", lambda *a: (_ for _ in ()).throw(BackendError("device lost")))
    with pytest.raises(BackendError, match="device lost"):
        next(job)
    assert engine.blocks.num_used == 0 and not engine.has_unfinished
    monkeypatch.undo()
    assert len(list(loop.submit([Request([1], SamplingParams(max_new_tokens=3))]))) == 3


def test_an_interrupted_step_is_done_again(monkeypatch, model):
    whole = ids_of(make_engine(model), [PROMPTS[1]], max_new_tokens=9)[0]
    engine = make_engine(model)
    engine.add(Request(PROMPTS[1], SamplingParams(max_new_tokens=9)))
    forward, calls, ids = engine.model.forward, itertools.count(), []

    def interrupted(*args):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(engine.model, "forward", interrupted)
    while engine.has_unfinished:
        try:
            ids += [out.token for out in engine.step()]
        except KeyboardInterrupt:
            assert engine.blocks.num_used == 0
    assert ids == whole


def test_loop_serves_several_callers_in_the_same_steps():
    engine = scripted([0])
    loop = Loop(engine)
    jobs = [loop.submit([Request([i, i], SamplingParams(max_new_tokens=5))]) for i in (1, 2)]
    steps = itertools.count()
    step = engine.step
    engine.step = lambda: (next(steps), step())[1]
    assert [sum(1 for _ in job) for job in jobs] == [5, 5]
    assert next(steps) == 5
    dropped = loop.submit([Request([3], SamplingParams(max_new_tokens=5))])
    next(dropped)
    del dropped
    assert engine.blocks.num_used == 0 and not engine.has_unfinished


def test_requests_that_cannot_be_served():
    engine = scripted([0], blocks=4, max_model_len=64, decoder=None)
    for ids, params, message in (
        ([], {}, "empty"),
        ([1] * 64, {}, "64 tokens; the context of 64"),
        ([1, 97], {}, "token id 97; the vocabulary has ids 0 to 96"),
        ([-1], {}, "token id -1"),
        ([1], {"stop_token_ids": [97]}, "names token 97"),
        ([1], {"logit_bias": {1000: 1.0}}, "names token 1000"),
        ([1], {"stop": "x"}, "need a tokenizer"),
    ):
        with pytest.raises(RequestError, match=message):
            engine.add(Request(ids, SamplingParams(**params)))
    assert not engine.has_unfinished
    with pytest.raises(RequestError, match="max_model_len is 65"):
        scripted([0], blocks=4, max_model_len=65)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": math.inf},
        {"max_new_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 5, "max_new_tokens": 4},
        {"n": 0},
        {"seed": 1.5},
        {"logprobs": -1},
        {"stop": [""]},
        {"stop": [3]},
        {"stop_token_ids": ["a"]},
        {"stop_words_ids": [[]]},
        {"stop_words_ids": [3]},
        {"logit_bias": {1: "x"}},
        {"logit_bias": [1]},
    ],
    ids=str,
)
def test_bad_sampling_values(bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingParams(**bad)
