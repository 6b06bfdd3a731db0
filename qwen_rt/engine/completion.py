"""Completion: a finished answer, put together from the outputs of its steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_rt.engine.sequence import FinishReason, Output, TokenLogprob


@dataclass
class Completion:
    """An answer. `ids` hold every generated token, the one that ended it included; `text` ends before a stop."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None  # one per id, when asked for
    finish_reason: FinishReason | None = None  # None while it is being generated
    matched: str | int | tuple[int, ...] | None = None  # the stop string, id or id sequence that ended it
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache, not computed again
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0  # from its first step to its first token
    decode_seconds: float = 0.0  # from its first token to its last
    completions: list[Completion] = field(default_factory=list, repr=False)  # all n answers, this one first

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens computed per second; 0 when unknown."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first one; 0 when there was only one."""
        return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds and len(self.ids) > 1 else 0.0

    def add(self, out: Output) -> None:
        """Take in what one step gave."""
        self.text += out.text
        self.cached_tokens = out.cached_tokens
        if out.token is not None:
            self.ids.append(out.token)
        if out.logprob is not None:
            self.logprobs = self.logprobs or []
            self.logprobs.append(out.logprob)
        if out.finish_reason is not None:
            self.finish_reason, self.matched = out.finish_reason, out.matched
        if out.timing is not None:
            self.queue_seconds, self.prefill_seconds = out.timing.queued, out.timing.prefill
            self.decode_seconds = out.timing.decode

    def __str__(self) -> str:
        return self.text
