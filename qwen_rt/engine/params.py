"""SamplingParams: what a request asks of the sampler and of the stop rules, validated once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_rt.errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Every bad value is a RequestError that names it.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and the neutral penalties (1, 0, 0) switch a rule off.
    """

    max_new_tokens: int | None = None  # None: whatever the context leaves
    min_tokens: int = 0  # no end of sequence, stop id or stop string before so many tokens
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()  # text ends before the first of these; a single string is accepted
    stop_token_ids: Sequence[int] = ()  # end the answer; not part of its text
    stop_words_ids: Sequence[Sequence[int]] = ()  # as in the original: sequences that end the answer, kept in its text
    seed: int | None = None  # None: a fresh one
    ignore_eos: bool = False  # end-of-sequence tokens cannot be chosen
    logprobs: int | None = None  # None: off; k: the chosen token's and the k best (True: 0)
    n: int = 1
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _integer("max_new_tokens", self.max_new_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_new_tokens is not None and self.min_tokens > self.max_new_tokens:
            raise RequestError(f"min_tokens ({self.min_tokens}) exceeds max_new_tokens ({self.max_new_tokens})")
        _number("temperature", self.temperature, 0.0, math.inf, "0 (greedy) or more")
        _integer("top_k", self.top_k, 0)
        _number("top_p", self.top_p, 0.0, 1.0, "above 0 and at most 1", open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0, "between 0 and 1")
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "above 0 (1 = off)", open_low=True)
        _number("presence_penalty", self.presence_penalty, -math.inf, math.inf, "finite")
        _number("frequency_penalty", self.frequency_penalty, -math.inf, math.inf, "finite")
        if self.seed is not None:
            _integer("seed", self.seed, None)
        _integer("n", self.n, 1)
        set_ = object.__setattr__
        if self.logprobs is not None:
            set_(self, "logprobs", None if self.logprobs is False else 0 if self.logprobs is True else self.logprobs)
            if self.logprobs is not None:
                _integer("logprobs", self.logprobs, 0)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias must map token ids to numbers, got {type(self.logit_bias).__name__}")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias key", token, 0)
            _number(f"logit_bias[{token}]", bias, -math.inf, math.inf, "finite")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(s, str) and s for s in stop):
            raise RequestError(f"stop must be non-empty strings, got {self.stop!r}")
        set_(self, "stop", stop)
        set_(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids or ()))
        words = tuple(_ids("stop_words_ids", word) for word in self.stop_words_ids or ())
        if not all(words):
            raise RequestError("stop_words_ids holds an empty sequence; give one list of token ids for each stop word")
        set_(self, "stop_words_ids", words)


def _integer(name: str, value: Any, low: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}")
    if low is not None and value < low:
        raise RequestError(f"{name} must be at least {low}, got {value}")


def _number(name: str, value: Any, low: float, high: float, want: str, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
        raise RequestError(f"{name} must be {want}, got {value}")


def _ids(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise RequestError(f"{name} must be lists of token ids, got {values!r}")
    for value in values:
        _integer(name, value, 0)
    return tuple(values)
