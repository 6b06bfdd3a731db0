"""One Jinja template in a sandbox like the one HF renders chat templates in, with limits on time and size."""

from __future__ import annotations

import json
import re
import threading
import time
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARS = 1 << 26
MAX_REPEATED = 1 << 18  # length of what `*` makes
MAX_SECONDS = 10.0  # for one rendering; a real one takes milliseconds


class _Generation(Extension):
    """`{% generation %}` marks the assistant's part for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """A template and its environment."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self, source: str) -> None:
        """Compiles `source`."""
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self._running = threading.local()
        self.globals.pop("lipsum")
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.filters["tojson"] = self._to_json
        self._template = self._compiled(source)

    def _compiled(self, source: str) -> Template:
        """`source` as a template that looks at the clock in every loop turn and macro call."""
        tree = self.parse(source)
        loops: list[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
        for node in loops:
            tick = nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None))
            node.body.insert(0, tick.set_lineno(node.lineno).set_environment(self))
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render(self, context: dict[str, Any], marker: str) -> str:
        """The rendered text. Raises SecurityError when it takes too long or grows too large."""
        self._running.deadline = time.monotonic() + MAX_SECONDS
        self._running.marker = marker
        size, parts = 0, []
        for part in self._template.generate(context):
            size += len(part)
            if size > MAX_OUTPUT_CHARS:
                raise SecurityError(f"the result has more than {MAX_OUTPUT_CHARS} characters")
            self.tick()
            parts.append(part)
        return "".join(parts)

    def tick(self) -> str:
        """Stop a rendering that has used up its time."""
        if time.monotonic() > self._running.deadline:
            raise SecurityError(f"it ran for more than {MAX_SECONDS:g} seconds")
        return ""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`*` and `**`, refused where the result would be huge."""
        for a, b in ((left, right), (right, left)):
            if operator == "*" and isinstance(b, int) and hasattr(a, "__len__") and len(a) * b > MAX_REPEATED:
                raise SecurityError("a repeated sequence is too long")
        if operator == "**" and (abs(left) > 1 << 16 or abs(right) > 16):
            raise SecurityError("a power is too large")
        return super().call_binop(context, operator, left, right)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """HF's `tojson`: no HTML escapes, non-ASCII as it is; the marker survives ensure_ascii."""
        text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
        if not ensure_ascii:
            return text
        marker = self._running.marker
        return re.sub(r"[^\x00-\x7f]", lambda m: m[0] if m[0] == marker else json.dumps(m[0])[1:-1], text)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
