"""Request, Sequence and Output: one answer in the making, from prompt to finish reason."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from qwen_rt.backends.base import SampleRow
from qwen_rt.engine.params import SamplingParams
from qwen_rt.engine.stop import StopStrings
from qwen_rt.kv import BlockTable

FinishReason = Literal["stop", "length", "abort"]

_request_ids = itertools.count(1)


class StreamDecoder(Protocol):
    """Ids to text as they come, never half a character (tokenizer.StreamDecoder)."""

    def push(self, token: int) -> str: ...
    def flush(self) -> str: ...


@dataclass
class Request:
    """A prompt and what is asked of it; `params.n` answers will come."""

    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    eos_ids: frozenset[int] = frozenset()  # end an answer, unless the request ignores them
    id: int = field(default_factory=lambda: next(_request_ids))


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log of a token's probability, from the raw logits; `top` holds the best (id, logprob), best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds of one sequence: `queued` before its first step, `prefill` to its first token, `decode` after it."""

    queued: float
    prefill: float
    decode: float


@dataclass
class Output:
    """What one step gave one sequence. `text` may be empty (half a character, or maybe a stop string, is held back)."""

    request_id: int
    index: int  # which of the n answers
    token: int | None  # None when the request was aborted
    text: str
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    matched: str | int | tuple[int, ...] | None = None  # the stop string, id or id sequence that ended it
    timing: Timing | None = None  # once finished
    cached_tokens: int = 0  # prompt tokens that were found in the prefix cache


class Sequence:
    """One answer: its tokens, how far its cache reaches, and the state of its sampler and of its text."""

    __slots__ = (
        "_banned",
        "_banned_early",
        "_rng",
        "alpha",
        "cached",
        "computed",
        "decoder",
        "finish_reason",
        "first_token_at",
        "ids",
        "index",
        "max_tokens",
        "output",
        "params",
        "prefill_at",
        "prompt_len",
        "queued_at",
        "request",
        "row",
        "siblings",
        "stop_ids",
        "stop_strings",
        "table",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        alpha: float,
        max_tokens: int,
        banned: frozenset[int],
        decoder: StreamDecoder | None,
    ) -> None:
        """`alpha` is the NTK factor of the prompt, kept to the end; `banned` ids have no token."""
        params = request.params
        self.request = request
        self.params = params
        self.index = index
        self.alpha = alpha
        self.max_tokens = max_tokens
        self.ids = list(request.prompt_ids)
        self.output: list[int] = []
        self.prompt_len = len(self.ids)
        self.computed = 0  # leading ids whose keys are in the cache
        self.cached = 0
        self.table: BlockTable | None = None  # its hold on the cache while it runs
        self.siblings: list[Sequence] = []  # wait for this one's prompt, to share it
        self.finish_reason: FinishReason | None = None
        self.decoder = decoder
        self.stop_strings = StopStrings(params.stop)
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else request.eos_ids)
        self._banned = banned | (request.eos_ids - self.stop_ids)  # the difference is empty unless eos is ignored
        self._banned_early = self._banned | self.stop_ids
        self._rng = random.Random(None if params.seed is None else f"{params.seed}:{index}")
        self.row = SampleRow(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=dict(params.logit_bias),
            prompt_ids=request.prompt_ids,
            output_ids=self.output,
        )
        self.queued_at = time.perf_counter()
        self.prefill_at = self.first_token_at = 0.0

    @property
    def pending(self) -> int:
        """Ids whose keys are not in the cache yet; 1 while decoding."""
        return len(self.ids) - self.computed

    def sample_row(self) -> SampleRow:
        """The sampler's row for the next token; draws from the sequence's own generator."""
        self.row.banned = self._banned_early if len(self.output) < self.params.min_tokens else self._banned
        if self.row.temperature > 0:
            self.row.uniform = self._rng.random()
        return self.row

    def accept(self, token: int, logprob: TokenLogprob | None) -> Output:
        """Append a chosen token and apply the stop rules, in the order: stop id, stop sequence, stop string, length."""
        now = time.perf_counter()
        if not self.output:
            self.first_token_at = now
        self.ids.append(token)
        self.output.append(token)
        out = Output(self.request.id, self.index, token, "", logprob, cached_tokens=self.cached)
        count = len(self.output)
        early = count <= self.params.min_tokens
        if token in self.stop_ids and not early:
            out.finish_reason, out.matched = "stop", token
        else:
            piece = self.decoder.push(token) if self.decoder else ""
            if early:
                out.text = piece
            else:
                out.text, out.matched = self.stop_strings.push(piece)
                out.matched = out.matched or self._stop_sequence()
            if out.matched is not None:
                out.finish_reason = "stop"
            elif count >= self.max_tokens:
                out.finish_reason = "length"
        if out.finish_reason:
            self._finish(out, now)
        return out

    def _stop_sequence(self) -> tuple[int, ...] | None:
        for word in self.params.stop_words_ids:
            if len(self.output) >= len(word) and self.output[-len(word) :] == list(word):
                return tuple(word)
        return None

    def _finish(self, out: Output, now: float) -> None:
        """Release the text held back, unless a stop string ended the text."""
        if not isinstance(out.matched, str):
            text, stop = self.stop_strings.push(self.decoder.flush() if self.decoder else "")
            out.text += text
            if stop is None:
                out.text += self.stop_strings.flush()
            else:
                out.finish_reason, out.matched = "stop", stop
        self.finish_reason = out.finish_reason
        out.timing = Timing(
            self.prefill_at - self.queued_at, self.first_token_at - self.prefill_at, now - self.first_token_at
        )
