"""qwen-rt: dispatch and errors, devices, doctor, and the chat's session over a scripted model."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen_rt.backends import select
from qwen_rt.backends.reference import ReferenceBackend
from qwen_rt.cli import bench, chat, main
from qwen_rt.engine import SamplingParams
from qwen_rt.engine.completion import Completion
from qwen_rt.errors import BackendError, RequestError

ROOT = Path(__file__).parents[2]


class Doubler(ReferenceBackend):
    """Right but for silu_mul."""

    name = "doubler"

    def silu_mul(self, gate_up: Any) -> Any:
        return super().silu_mul(gate_up) * 2


# -- dispatch ------------------------------------------------------------------------------------------------------
def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys\nfrom qwen_rt.cli import main\n"
        "try: main.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip().endswith("False"), done.stderr
    for name in main.COMMANDS:
        assert f"    {name} " in done.stdout
    assert "serve" not in done.stdout and "eval" not in done.stdout


def test_commands_do_not_import_torch() -> None:
    """But for doctor, whose oracle it is."""
    code = (
        "import importlib, sys\nimport qwen_rt.convert, qwen_rt.llm, qwen_rt.plan\nfrom qwen_rt.cli import main\n"
        "for name, (module, _) in main.COMMANDS.items():\n    if name != 'doctor': importlib.import_module(module)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main.main([name, "--help"])
    assert left.value.code == 0 and f"qwen-rt {name}" in capsys.readouterr().out


def test_error_is_one_line_and_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["doctor", "nosuch"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("qwen-rt: unknown device 'nosuch'") and captured.err.count("\n") == 1
    with pytest.raises(BackendError):
        main.main(["doctor", "nosuch", "--debug"])


def test_a_broken_module_does_not_break_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(main.COMMANDS, "plan", ("no_such_module", "broken"))
    assert main.main(["doctor", "reference", "--op", "rope"]) == 0


# -- devices and doctor --------------------------------------------------------------------------------------------
def test_devices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_BACKEND", "reference")
    assert main.main(["devices"]) == 0
    told = capsys.readouterr().out
    for name in select.names():
        assert f"\n{name}" in "\n" + told
    assert "auto         -> reference:0; device reference (named by QWEN_BACKEND=reference)" in told
    assert "evidence: run on the real device" in told and "kernels: " in told
    assert main.main(["devices", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["auto"] == "reference:0" and told["devices"]["reference"]["usable"]
    assert all(d["usable"] or d["reason"] for d in told["devices"].values())


def test_devices_when_auto_cannot_be_had(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_BACKEND", "nosuch")
    assert main.main(["devices"]) == 1
    assert "auto         no   unknown device 'nosuch' (named by QWEN_BACKEND=nosuch)" in capsys.readouterr().out


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main.main(["doctor", "reference", "--op", "rms_norm", "--op", "silu_mul"]) == 0
    told = capsys.readouterr().out
    assert "rms_norm" in told and "silu_mul" in told and "all right" in told and "attention" not in told
    plugin = EntryPoint("doubler", f"{__name__}:Doubler", select.ENTRY_POINT_GROUP)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [plugin])
    assert main.main(["doctor", "doubler", "--op", "rms_norm", "--op", "silu_mul"]) == 1
    told = capsys.readouterr().out
    assert "WRONG" in told and "1 operations are not right" in told and "T=7 F=37" in told


# -- chat ----------------------------------------------------------------------------------------------------------
class Stream:
    def __init__(self, pieces: list[str]) -> None:
        self.completion = Completion(prompt_tokens=30, prefill_seconds=0.25)
        self.pieces, self.closed = pieces, False

    def __iter__(self) -> Iterator[str]:
        for i, piece in enumerate(self.pieces):
            self.completion.ids.append(i)
            yield piece
        self.completion.decode_seconds, self.completion.finish_reason = 0.5, "stop"

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.closed = True


class Model:
    """Answers from a script and remembers what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked, self.streams = list(answers), [], []
        self.generation_config = SimpleNamespace(to_dict=lambda: {"top_p": 0.8})

    def chat_ids(self, query: str, history: list[tuple[str, str]], system: str | None) -> list[int]:
        if query == "too long":
            raise RequestError("the prompt is too long")
        self.asked.append((query, list(history), system))
        return [1]

    def stream(self, ids: list[int], **options: Any) -> Stream:
        self.options = options
        self.streams.append(Stream(self.answers.pop(0)))
        return self.streams[-1]

    def request(self, ids: list[int], **options: Any) -> None:
        SamplingParams(**options)

    def report(self) -> str:
        return "the report"


def talk(session: chat.Session, text: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    session.loop(chat._pipe_reader, False, **options)


def test_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(["\n He", "llo", "! \n"], ["fine\x1b[2J"], ["bye"])
    session = chat.Session(model)  # type: ignore[arg-type]
    talk(session, "hi\nhow are\\\nyou?\n/reset\n/system Be short.\n//slash\n/quit\nnever\n", monkeypatch)
    assert model.asked == [
        ("hi", [], None),
        ("how are\nyou?", [("hi", "Hello!")], None),
        ("/slash", [], "Be short."),
    ]
    told = capsys.readouterr().out
    assert "Hello!" in told and "\x1b" not in told and all(s.closed for s in model.streams)
    assert "prefill 30 tokens, 120.0 tok/s; decode 3 tokens, 4.0 tok/s" in told


def test_multi_line_with_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(["a"], ["b"])
    talk(chat.Session(model), '"""\nfirst\n\nlast\n"""\n"""one line"""\n', monkeypatch)  # type: ignore[arg-type]
    assert [q for q, *_ in model.asked] == ["first\n\nlast", "one line"]


def test_an_error_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(["ok"])
    session = chat.Session(model)  # type: ignore[arg-type]
    talk(session, "too long\n\nhi\n", monkeypatch, quiet=True)
    captured = capsys.readouterr()
    assert captured.err == "error: the prompt is too long\n" and captured.out == "ok\n"
    assert session.history == [("hi", "ok")]


def test_params(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model(["x"])
    session = chat.Session(model, params={"seed": 3})  # type: ignore[arg-type]
    lines = [
        "/params temperature 0.5",
        "/params temperature -1",
        "/params top_k x",
        "/params nope 1",
        "/params seed default",
    ]
    talk(session, "\n".join([*lines, "hi"]), monkeypatch)
    assert model.options == {"temperature": 0.5}
    told = capsys.readouterr().out
    assert "temperature stays as it was: temperature must be" in told and "top_k stays as it was" in told
    assert "one of max_new_tokens" in told and "top_p                0.8" in told


def test_ctrl_c_stops_the_answer_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def endless() -> Iterator[str]:
        yield "one "
        os.kill(os.getpid(), signal.SIGINT)
        yield "two "
        yield "never"

    before = signal.getsignal(signal.SIGINT)
    model = Model(endless(), ["second"])
    session = chat.Session(model)  # type: ignore[arg-type]
    model_stream: Callable[..., Any] = model.stream
    monkeypatch.setattr(model, "stream", lambda ids, **options: model_stream(ids, **options))
    talk(session, "hi\nagain\n", monkeypatch)
    told = capsys.readouterr().out
    assert "[stopped]" in told and "never" not in told and "second" in told
    assert session.history == [("hi", "one two"), ("again", "second")]
    assert model.streams[0].closed and signal.getsignal(signal.SIGINT) is before


def test_one_shot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Loaded(Model):
        def __enter__(self) -> Loaded:
            return self

        def __exit__(self, *exc: object) -> None: ...

    model = Loaded(["def f(): ..."])
    monkeypatch.setattr(chat, "load_model", lambda args, **options: model)
    assert main.main(["chat", "m", "--prompt", "code", "--temperature", "0", "--system", "s"]) == 0
    assert model.asked == [("code", [], "s")] and model.options == {"temperature": 0.0}
    answer, speeds, report = capsys.readouterr().out.strip().split("\n\n")
    assert answer == "def f(): ..." and speeds.startswith("prefill 30 tokens") and report == "the report"


# -- bench ---------------------------------------------------------------------------------------------------------
def test_bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = []

    class Loaded:
        config = SimpleNamespace(vocab_size=1000)

        def __enter__(self) -> Loaded:
            return self

        def __exit__(self, *exc: object) -> None: ...

        def generate(self, ids: list[int], **options: Any) -> Completion:
            prompts.append(ids)
            assert options == {"max_new_tokens": 5, "temperature": 0.0, "ignore_eos": True}
            warm = len(prompts) == 1
            return Completion(ids=[0] * 5, prompt_tokens=40, prefill_seconds=9.0 if warm else 0.5, decode_seconds=0.1)

        def report(self) -> Any:
            return SimpleNamespace(to_dict=lambda: {"model": "m"})

    monkeypatch.setattr(bench, "load_model", lambda args, **options: Loaded())
    assert main.main(["bench", "m", "--prompt-tokens", "40", "--new-tokens", "5", "--repeat", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens_per_second"] == {"prefill": [80.0, 80.0], "decode": [40.0, 40.0]}
    assert len({tuple(p) for p in prompts}) == 3 and all(len(p) == 40 for p in prompts)
    assert main.main(["bench", "m", "--new-tokens", "1"]) == 1
