"""Jinja chat templates, run in a sandbox, with what users wrote kept apart from what the template wrote.

Before rendering, every character of a user's string that could begin a control token gets a marker behind it: a rare
ideograph that occurs nowhere else, drawn anew for each call. Only unmarked literals in the result are control tokens,
and they can come from nothing but the template. The marker is taken out of the remaining text before it is encoded.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from qwen_rt.errors import TokenizerError

if TYPE_CHECKING:
    from qwen_rt.tokenizer.sandbox import Sandbox

MAX_TEMPLATE_CHARS = 1 << 18
_MARKERS = range(0x20000, 0x2A6D7)  # CJK Extension B: printable, caseless, never changed by normalisation

CHATML_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """A model's chat template. `names` are the template's own variables (eos_token ...); `soft` tokens are no control
    tokens and stand for themselves in the content of assistant messages."""

    def __init__(
        self,
        source: str | Mapping[str, str] | None,
        tokens: Collection[str],
        soft: Collection[str] = (),
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._sources = {"default": source or CHATML_TEMPLATE} if not isinstance(source, Mapping) else dict(source)
        self._names = dict(names or {})
        self._compiled: dict[str, Sandbox] = {}
        # A control token may be cut in two by the fields of a message, so its first character alone is marked, unless
        # that is a letter or digit (added tokens that look like words).
        starts = {re.escape(t if t[0].isalnum() else t[0]) for t in tokens}
        start = "|".join(sorted(starts, key=len, reverse=True)) or "(?!)"
        whole = "|".join(map(re.escape, sorted(soft, key=len, reverse=True)))
        self._start = re.compile(start)
        self._start_unless_soft = re.compile(f"(?!{whole})(?:{start})") if whole else self._start

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> tuple[str, str]:
        """(text, marker): the conversation, its user strings marked. TokenizerError when rendering fails."""
        if not isinstance(messages, list | tuple) or not all(isinstance(m, dict) for m in messages) or not messages:
            raise TokenizerError("messages must be a non-empty list of {'role': ..., 'content': ...}")
        name = "tool_use" if tools and "tool_use" in self._sources else "default"
        try:
            given = json.dumps([messages, tools, dict(variables)], ensure_ascii=False) + self._source(name)
            marker = next(m for m in iter(lambda: chr(secrets.choice(_MARKERS)), "") if m not in given)
            context = {
                **self._names,
                **{k: self._mark(v, marker) for k, v in variables.items()},
                "messages": [self._mark_message(m, marker) for m in messages],
                "tools": self._mark(tools, marker),
                "add_generation_prompt": add_generation_prompt,
            }
            template = self._compiled.get(name)
            if template is None:
                from qwen_rt.tokenizer.sandbox import Sandbox  # Jinja, which many a process never needs

                template = self._compiled[name] = Sandbox(self._source(name))
            return template.render(context, marker), marker
        except TokenizerError:
            raise
        except Exception as e:  # whatever a template or a message shape provokes
            raise TokenizerError(f"the chat template failed: {type(e).__name__}: {str(e)[:300]}") from e

    def _source(self, name: str) -> str:
        source = self._sources.get(name)
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE_CHARS:
            raise TokenizerError(
                f"chat template {name!r} is absent, no string, or over {MAX_TEMPLATE_CHARS} characters"
            )
        return source

    def _mark_message(self, message: dict[str, Any], marker: str) -> dict[str, Any]:
        marked = self._mark(message, marker)
        if message.get("role") == "assistant":
            for key in ("content", "reasoning_content"):
                if isinstance(text := message.get(key), str):
                    marked[key] = self._start_unless_soft.sub(lambda m: _insert(m, marker), text)
        return marked

    def _mark(self, value: Any, marker: str) -> Any:
        if isinstance(value, str):
            return self._start.sub(lambda m: _insert(m, marker), value)
        if isinstance(value, dict):
            return {self._mark(k, marker): self._mark(v, marker) for k, v in value.items()}
        return [self._mark(v, marker) for v in value] if isinstance(value, list | tuple) else value


def _insert(found: re.Match[str], marker: str) -> str:
    return found.group()[0] + marker + found.group()[1:]
