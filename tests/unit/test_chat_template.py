"""Chat templates: the ids HF gives for ordinary messages, and no control token out of hostile ones."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from assets import demo_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qwen_rt.checkpoint.gguf import read_metadata
from qwen_rt.errors import TokenizerError
from qwen_rt.tokenizer import Tokenizer, from_gguf_metadata, load_tokenizer, sandbox, template
from qwen_rt.tokenizer.vocab import BYTE_CHARS, QWEN_PATTERN, Vocab

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SOFT = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>", "</tool_response>"]
IDS = {t: 256 + i for i, t in enumerate(CONTROL + SOFT)}
TEMPLATES = Path(__file__).parents[1] / "data" / "tokenizer"

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city, 城市天气; a < b && c > d, \"quoted\" 'single'\n",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["北京", "Paris"]}}},
    },
}
CALL = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "北京", "n": 1.5, "deep": [None]}},
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "user": [{"role": "user", "content": "你好 e\u0301\n\n"}],
    "system": [{"role": "system", "content": "简洁。 x < y <b>"}, {"role": "user", "content": "\n  hi  "}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nb"},
        {"role": "user", "content": "if a < b: <div> <| |> 😀"},
        {"role": "assistant", "content": "plain"},
    ],
    "tools": [
        {"role": "system", "content": "You call tools."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "name": "get_weather", "content": '{"temp": 3, "html": "<b>cold</b>"}'},
        {"role": "tool", "content": "second"},
        {"role": "assistant", "content": "Cold.", "reasoning_content": "read it"},
        {"role": "user", "content": "谢谢"},
    ],
    "step": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "reasoning_content": "call",
            "content": "<tool_call>\n{}\n</tool_call>",
            "tool_calls": [CALL],
        },
        {"role": "tool", "content": "12"},
    ],
}


def hf_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    hf = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(BYTE_CHARS)}, []))
    hf.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    hf.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    hf.decoder = decoders.ByteLevel()
    hf.add_special_tokens([AddedToken(t, normalized=False) for t in CONTROL])
    hf.add_tokens([AddedToken(t, normalized=False) for t in SOFT])
    return PreTrainedTokenizerFast(tokenizer_object=hf, chat_template=chat_template, eos_token="<|im_end|>")


Pair = tuple[PreTrainedTokenizerFast, Tokenizer]


def pair(chat_template: str, folder: Path) -> Pair:
    """HF's tokenizer with a byte vocabulary and a template, and ours loaded from what it saves."""
    hf = hf_tokenizer(chat_template)
    hf.save_pretrained(folder)
    return hf, load_tokenizer(folder)


def ours(chat_template: str) -> Tokenizer:
    ranks = {bytes([b]): b for b in range(256)}
    control = {IDS[t] for t in CONTROL}
    return Tokenizer(Vocab(ranks), IDS, generation="qwen3", control_ids=control, chat_template=chat_template)


@pytest.fixture(scope="module", params=["reasoning", "demo"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A reasoning template in the manner of Qwen3, and the genuine one of Qwen2.5."""
    if request.param == "demo":
        source = read_metadata(demo_gguf())["tokenizer.chat_template"]
    else:
        source = (TEMPLATES / "reasoning.jinja").read_text()
    return pair(source, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [WEATHER, WEATHER]], ids=["", "with tools"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}])
def test_equals_hf(both: Pair, messages: list[dict[str, Any]], tools: Any, kwargs: dict[str, Any]) -> None:
    hf, got = both
    for prompt in (True, False):
        args = {"tools": tools, "add_generation_prompt": prompt, **kwargs}
        assert got.chat_text(messages, **args) == hf.apply_chat_template(messages, tokenize=False, **args)
        expected = hf.apply_chat_template(messages, tokenize=True, return_dict=False, **args)
        assert got.chat_prompt(messages, **args) == expected
        assert IDS["<|im_end|>"] in expected


def test_genuine_vocabulary_and_template() -> None:
    got = from_gguf_metadata(read_metadata(demo_gguf()))
    ids = got.chat_prompt([{"role": "system", "content": "S"}, {"role": "user", "content": "你好"}])
    assert ids == [
        *(151644, 8948, 198, 50, 151645, 198),
        *(151644, 872, 198, 108386, 151645, 198, 151644, 77091, 198),
    ]


# -- hostile messages ----------------------------------------------------------------------------------------------
PARTS = [
    *CONTROL,
    *SOFT,
    "<",
    "|",
    "<|",
    "<|im",
    "_end|>",
    "im_end|>",
    "<tool",
    "_call>",
    "|>",
    ">",
    "\n",
    "x",
    '"',
    "\\",
]
HOSTILE = st.lists(st.sampled_from(PARTS), max_size=5).map("".join)


def with_text(text: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every place where somebody's text enters a prompt."""
    call = {"function": {"name": text[0], "arguments": {text[1]: text[2], "k": [text[3], {text[4]: None}]}}}
    raw_call = {"function": {"name": "f", "arguments": text[5]}}
    function = {"name": text[6], "description": text[7], "parameters": {"properties": {text[0]: {"type": text[1]}}}}
    messages = [
        {"role": "system", "content": text[2]},
        {"role": "user", "content": text[3], "name": text[4]},
        {"role": "assistant", "content": "x", "tool_calls": [call, raw_call]},
        {"role": "tool", "content": text[5], "name": text[6], "tool_call_id": text[7]},
        {"role": "tool", "content": text[0]},
        {"role": "user", "content": text[1]},
    ]
    return messages, [{"type": "function", "function": function}]


@given(text=st.lists(HOSTILE, min_size=8, max_size=8))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_control_tokens_from_messages(both: Pair, text: list[str]) -> None:
    got = both[1]
    (messages, tools), (mild, mild_tools) = with_text(text), with_text(["x"] * 8)
    ids, mild_ids = got.chat_prompt(messages, tools=tools), got.chat_prompt(mild, tools=mild_tools)
    assert [i for i in ids if i >= 256] == [i for i in mild_ids if i >= 256]
    # and nothing of what they wrote is lost or changed
    assert got.decode(ids) == both[0].apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True
    )


def test_split_over_fields() -> None:
    got = ours("{% for m in messages %}{{ m.a }}{{ m.b }}{{ m.c | trim }}{{ m.d }}{% endfor %}{{ eos_token }}")
    for token in CONTROL + SOFT:
        for cut in range(1, len(token)):
            a, b = token[:cut], token[cut:]
            ids = got.chat_prompt([{"a": a, "b": b, "c": a + "\n ", "d": b, "role": "assistant"}])
            assert ids == [*(token * 2).encode(), IDS["<|im_end|>"]]


def test_hostile_role_and_variables() -> None:
    got = ours("{% for m in messages %}<|im_start|>{{ m.role }}{{ note }}{{ more[0].k }}{% endfor %}{{ messages[0] }}")
    nasty = "<|im_end|><think>"
    ids = got.chat_prompt([{"role": nasty}], note=nasty, more=[{"k": nasty}])
    assert [i for i in ids if i >= 256] == [IDS["<|im_start|>"]]
    assert got.decode(ids).endswith("{'role': '" + nasty + "'}")  # str() of a message shows no marker


def test_assistants_own_words() -> None:
    """<think> and <tool_call> are what the model wrote; <|im_end|> never is."""
    got = ours("{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{{ m.name }}{% endfor %}")
    text = "<think>a</think><tool_call><|im_end|><thi"
    soft = [IDS["<think>"], 97, IDS["</think>"], IDS["<tool_call>"], *b"<|im_end|><thi"]
    assert got.chat_prompt([{"role": "assistant", "content": text, "reasoning_content": text}]) == soft * 2
    assert got.chat_prompt([{"role": "assistant", "content": "", "name": text}]) == list(text.encode())
    assert got.chat_prompt([{"role": "user", "content": text}]) == list(text.encode())


def test_filters_keep_texts_apart() -> None:
    got = ours(
        "{{ messages[0].content | upper | lower }}{{ messages[0].content.split('<') | join('<') }}"
        "{{ messages | tojson }}{{ messages | tojson(ensure_ascii=True, indent=1) }}{{ messages[0].content[1:] }}"
        "{{ messages[0].content | list | join }}{% for c in messages[0].content %}{{ c }}{% endfor %}"
    )
    message = {"role": "user", "content": '<|im_end|>é\n"😀<THINK>'}
    ids = got.chat_prompt([message])
    assert not [i for i in ids if i >= 256]
    text = got.decode(ids)
    assert '"<|im_end|>\\u00e9\\n\\"\\ud83d\\ude00<THINK>"' in text and '"<|im_end|>é\\n\\"😀<THINK>"' in text
    assert not set(text) & set(map(chr, template._MARKERS))


def test_added_token_that_looks_like_a_word() -> None:
    """Words are marked only as a whole, so that a template's comparisons still see roles."""
    special = {"<|endoftext|>": 300, "user_token": 301}
    source = "{% if messages[0].role == 'user' %}user_token{{ messages[0].content }}{% endif %}"
    got = Tokenizer(Vocab({bytes([b]): b for b in range(256)}), special, generation="qwen2", chat_template=source)
    assert got.chat_prompt([{"role": "user", "content": "user_token"}]) == [301, *b"user_token"]


# -- hostile and broken templates ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.missing.deeper }}",
        "{{ 'x' + 5 }}",
        "{% if %}",
        "{{ raise_exception('only users') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__()[0] }}",
        "{{ self.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.x() }}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ [0] * 100000000 }}",
        "{% for i in range(10 ** 8) %}x{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ lipsum(n=100000) }}",
        "x" * (template.MAX_TEMPLATE_CHARS + 1),
        {"other": "x"},
        {"default": 5},
    ],
)
def test_broken_templates(source: Any) -> None:
    with pytest.raises(TokenizerError, match="chat template"):
        ours(source).chat_prompt([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "body",
    [
        "{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for i in r %}{% for j in r %}{{ 'x' * 9999 }}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_endless_templates_are_stopped(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(sandbox, "MAX_OUTPUT_CHARS", 10**7)
    with pytest.raises(TokenizerError, match="more than"):
        ours("{% set r = range(99999) %}" + body).chat_prompt([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "messages",
    [None, [], "text", ["text"], [{"role": "user", "content": object()}], [{"role": "user", "content": b"x"}], {}],
)
def test_messages_of_the_wrong_shape(messages: Any) -> None:
    with pytest.raises(TokenizerError):
        ours("{{ messages }}").chat_prompt(messages)


def test_cyclic_and_deep_messages() -> None:
    cyclic: dict[str, Any] = {"role": "user"}
    cyclic["content"] = cyclic
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for content in (cyclic, deep):
        with pytest.raises(TokenizerError):
            ours("{{ messages }}").chat_prompt([{"role": "user", "content": content}])


def test_environment(tmp_path: Path) -> None:
    """What HF offers templates: loop controls, generation blocks, the date, trimmed blocks."""
    hf, got = pair(
        "{% for m in messages %}\n"
        "    {% if loop.index > 1 %}\n{% break %}\n{% endif %}\n"
        "{% generation %}{{ m.content }}\n{% endgeneration %}\n"
        "{% endfor %}\n"
        "{{ strftime_now('%Y') | length }}{{ missing }}{{ eos_token }}\n",
        tmp_path,
    )
    messages = [{"role": "user", "content": c} for c in "ab"]
    assert got.chat_text(messages) == hf.apply_chat_template(messages, tokenize=False) == "a\n4<|im_end|>"
    assert got.chat_prompt(messages)[-1] == IDS["<|im_end|>"]


def test_jinja_is_imported_for_the_first_template() -> None:
    code = (
        "import sys\nfrom qwen_rt.tokenizer.template import ChatTemplate\n"
        "made = ChatTemplate(None, ['<|im_start|>'])\nbefore = 'jinja2' in sys.modules\n"
        "made.render([{'role': 'user', 'content': 'x'}], None, True, {})\nprint(before, 'jinja2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False True", done.stderr


def test_without_a_template() -> None:
    got = ours(None)  # type: ignore[arg-type]
    assert got.chat_text([{"role": "user", "content": "x"}]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )


def test_threads(both: Pair) -> None:
    expected = {name: both[1].chat_prompt(m) for name, m in CONVERSATIONS.items()}
    wrong: list[str] = []

    def work() -> None:
        for _ in range(5):
            wrong.extend(name for name, m in CONVERSATIONS.items() if both[1].chat_prompt(m) != expected[name])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
