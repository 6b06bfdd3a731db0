"""`qwen-rt chat MODEL`: a chat in the terminal, over a pipe, or one turn with --prompt."""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qwen_rt.cli.loading import add_load_options, load_model
from qwen_rt.errors import QwenRTError, RequestError

if TYPE_CHECKING:
    from qwen_rt.engine.completion import Completion
    from qwen_rt.llm import Qwen

HELP = """\
/help          this text
/reset         forget the conversation
/system TEXT   set the system prompt (without TEXT: show it; `/system default`: the model's own)
/params        show the sampling parameters; `/params NAME VALUE` sets one, `/params NAME default` takes it back
/report        what serves the model: backend, kernels, formats, bytes
/quit          leave (Ctrl-D too)
Enter sends; Alt-Enter, or a \\ at the end of a line, goes on with the next; \"\"\" begins and ends a longer text.
Ctrl-C stops the answer. A message that begins with / is written with //."""

PARAMS: dict[str, type] = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "seed": int,
}
"""What /params and the command line can set, and its type."""

_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), 127, *range(128, 160)])  # an answer must not steer the terminal


def add_parser(subparsers: Any) -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser("chat", help="chat with a model in the terminal")
    add_load_options(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and leave, with speeds and report")
    parser.add_argument("--system", metavar="TEXT", help="system prompt (default: the model's own)")
    parser.add_argument("--quiet", action="store_true", help="answers only: no speeds, no report")
    for name, kind in PARAMS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar=kind.__name__.upper())
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Chat until the end of the input; status 1 when --prompt cannot be answered."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer in Chinese on an ASCII terminal
    params = {name: value for name in PARAMS if (value := getattr(args, name)) is not None}
    with load_model(args, max_batch=1) as model:
        session = Session(model, args.system, params)
        if args.prompt is not None:
            session.say(args.prompt)
            if not args.quiet:
                print(f"\n{session.speeds}\n\n{model.report()}")
            return 0
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        if terminal and not args.quiet:
            report = model.report()
            print(f"{report.model} on {report.backend}; /help for help, /quit to leave")
            for note in report.notes:
                print(f"note: {note}")
        session.loop(_terminal_reader() if terminal else _pipe_reader, terminal, args.quiet)
    return 0


class Session:
    """A conversation: what was said, under which system prompt and parameters."""

    def __init__(self, model: Qwen, system: str | None = None, params: dict[str, Any] | None = None) -> None:
        self.model = model
        self.system = system
        self.params = dict(params or {})
        self.history: list[tuple[str, str]] = []
        self.speeds = ""  # of the last answer

    def say(self, query: str) -> str:
        """Stream the answer to stdout and remember the turn; Ctrl-C ends the answer, which is remembered as it is."""
        ids = self.model.chat_ids(query, self.history, self.system)
        text = ""
        with self.model.stream(ids, **self.params) as stream, _interruptible() as interrupted:
            for piece in stream:
                text += piece
                print((piece if text.strip() else "").translate(_CONTROLS), end="", flush=True)
                if interrupted():
                    break
        stopped = interrupted()
        print(" [stopped]" if stopped else "", flush=True)
        self.speeds = speeds(stream.completion, stopped)
        self.history.append((query, text.strip()))
        return text

    def command(self, line: str) -> bool:
        """Carry out a /command; False when it was /quit."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("quit", "exit", "q"):
            return False
        if name == "reset":
            self.history.clear()
            print("the conversation is forgotten")
        elif name == "system":
            if rest:
                self.system = None if rest == "default" else rest
            print(f"system: {'(the default of the model)' if self.system is None else self.system}")
        elif name == "params":
            self._set_param(*rest.split())
        elif name == "report":
            print(self.model.report())
        else:
            print(HELP if name == "help" else f"unknown command /{name}; /help lists them (// begins a message with /)")
        return True

    def _set_param(self, name: str = "", value: str = "", *more: str) -> None:
        if name and (name not in PARAMS or not value or more):
            print(f"/params NAME VALUE, where NAME is one of {', '.join(PARAMS)}")
            return
        before = dict(self.params)
        if value == "default":
            self.params.pop(name, None)
        elif name:
            try:
                self.params[name] = PARAMS[name](value)
                self.model.request([0], **self.params)  # its checks are the truth about values
            except (ValueError, RequestError) as e:
                self.params = before
                print(f"{name} stays as it was: {e}")
                return
        defaults = self.model.generation_config.to_dict()
        for known in PARAMS:
            if known in self.params or defaults.get(known) is not None:
                print(f"{known:<20} {self.params.get(known, defaults.get(known))}")
        if not self.params and not any(defaults.get(known) is not None for known in PARAMS):
            print("all parameters are at their defaults (greedy)")

    def loop(self, read: Callable[[str], str], terminal: bool, quiet: bool = False) -> None:
        """Read messages and commands until /quit or the end of the input. An error is told, and the chat goes on."""
        while True:
            try:
                message = read_message(read)
            except EOFError:
                return
            except KeyboardInterrupt:
                print("(/quit or Ctrl-D leaves)")
                continue
            if not message.strip():
                continue
            if message.startswith("/") and not message.startswith("//"):
                if not self.command(message):
                    return
                continue
            try:
                self.say(message.removeprefix("/") if message.startswith("//") else message)
            except QwenRTError as e:
                print(f"error: {e}", file=sys.stderr)
                continue
            if not quiet:
                print(f"\x1b[2m{self.speeds}\x1b[0m\n" if terminal else self.speeds, flush=True)


def speeds(done: Completion, stopped: bool = False) -> str:
    """ "prefill 35 tokens, 123.4 tok/s; decode 87 tokens, 45.6 tok/s"."""
    cached = f" ({done.cached_tokens} cached)" if done.cached_tokens else ""
    prefill = f", {done.prefill_rate:.1f} tok/s" if done.prefill_rate else ""
    decode = f", {done.decode_rate:.1f} tok/s" if done.decode_rate else ""
    end = ", stopped" if stopped else " (cut: max_new_tokens or the context)" if done.finish_reason == "length" else ""
    return f"prefill {done.prompt_tokens} tokens{cached}{prefill}; decode {len(done.ids)} tokens{decode}{end}"


def read_message(read: Callable[[str], str]) -> str:
    r'''One message: lines joined by a trailing \, or everything between two """. EOFError at the end of the input.'''
    line = read("> ")
    if line.lstrip().startswith('"""'):
        text = line.lstrip()[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + read("… ")
        return text.rstrip()[:-3].strip("\n")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read("… ")
    return line


def _pipe_reader(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _terminal_reader() -> Callable[[str], str]:
    """A line editor with history kept between chats; Enter sends and Alt-Enter begins a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from qwen_rt.config import Settings

    cache = Settings.from_env().cache
    history: History
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "chat_history").touch(mode=0o600)
        history = FileHistory(str(cache / "chat_history"))
    except OSError:
        history = InMemoryHistory()
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _newline(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(history=history, key_bindings=keys, multiline=True)
    return lambda prompt: session.prompt(prompt, prompt_continuation="… ")


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C only sets a flag, so that no step is torn apart; a second one interrupts."""
    hit = False

    def note(signum: int, frame: Any) -> None:
        nonlocal hit
        if hit:
            raise KeyboardInterrupt
        hit = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: hit
    finally:
        signal.signal(signal.SIGINT, before)
