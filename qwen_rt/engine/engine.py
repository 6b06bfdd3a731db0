"""Engine: requests in, tokens and text out, step by step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as SequenceOf
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from qwen_rt.backends.base import KV
from qwen_rt.engine.runner import Runner
from qwen_rt.engine.scheduler import Chunk, Scheduler
from qwen_rt.engine.sequence import Output, Request, Sequence, StreamDecoder
from qwen_rt.errors import RequestError
from qwen_rt.kv import BlockManager
from qwen_rt.model import QwenModel, ntk_alpha


class Engine:
    """Continuous batching over one model and one cache. Not thread-safe: callers hold a lock around each call."""

    def __init__(
        self,
        model: QwenModel,
        kv: KV,
        *,
        max_model_len: int,
        max_batch: int = 8,
        prefill_tokens: int = 512,
        banned_ids: Collection[int] = (),
        decoder: Callable[[bool], StreamDecoder] | None = None,
    ) -> None:
        """`decoder(skip_special_tokens)` makes a stream decoder; `banned_ids` have no token (padded vocabulary)."""
        if max_batch < 1 or prefill_tokens < 1:
            raise RequestError(f"max_batch and prefill_tokens must be at least 1, got {max_batch} and {prefill_tokens}")
        room = kv.num_blocks * kv.spec.block_size
        if not 1 < max_model_len <= room:
            raise RequestError(f"max_model_len is {max_model_len}; the cache of {room} tokens serves 2 to {room}")
        self.model = model
        self.max_model_len = max_model_len
        self.blocks = BlockManager(kv.num_blocks, kv.spec.block_size)
        self.scheduler = Scheduler(self.blocks, max_batch, prefill_tokens)
        self.runner = Runner(model, kv)
        self._banned = frozenset(banned_ids)
        self._decoder = decoder
        self._sequences: dict[int, list[Sequence]] = {}

    @property
    def has_unfinished(self) -> bool:
        """Whether step() has anything to do."""
        return bool(self._sequences)

    def is_unfinished(self, request_id: int) -> bool:
        """Whether a request still has answers to come."""
        return request_id in self._sequences

    def add(self, request: Request) -> int:
        """Queue a request and return its id. RequestError when it cannot be served; nothing is queued then."""
        self.check(request)
        room = self.max_model_len - len(request.prompt_ids)
        sequences = [
            Sequence(
                request,
                index,
                alpha=ntk_alpha(self.model.config, len(request.prompt_ids)),
                max_tokens=min(request.params.max_new_tokens or room, room),
                banned=self._banned,
                decoder=self._decoder(request.params.skip_special_tokens) if self._decoder else None,
            )
            for index in range(request.params.n)
        ]
        leader, leader.siblings = sequences[0], sequences[1:]
        self._sequences[request.id] = sequences
        self.scheduler.add(leader)
        return request.id

    def check(self, request: Request) -> None:
        """RequestError when a request cannot be served, saying why."""
        self.check_ids(request.prompt_ids)
        size, vocab = len(request.prompt_ids), self.model.config.vocab_size
        if size >= self.max_model_len:
            raise RequestError(
                f"the prompt has {size} tokens; the context of {self.max_model_len} must also hold an answer: "
                f"shorten the prompt to {self.max_model_len - 1} tokens or load with a larger max_model_len"
            )
        params = request.params
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if bad := [i for i in ids if i >= vocab]:
                raise RequestError(f"{name} names token {bad[0]}; the vocabulary has {vocab} ids")
        if self._decoder is None and params.stop:
            raise RequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids")

    def check_ids(self, ids: SequenceOf[int]) -> None:
        """RequestError unless `ids` is a prompt: not empty, every id within the vocabulary."""
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        vocab = self.model.config.vocab_size
        if min(ids) < 0 or max(ids) >= vocab:
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise RequestError(f"the prompt holds token id {bad}; the vocabulary has ids 0 to {vocab - 1}")

    def step(self) -> list[Output]:
        """Run one step and return what it gave. An error aborts its sequences; after an interrupt they wait again."""
        step = self.scheduler.schedule()
        if not step:
            return []
        now = perf_counter()
        for chunk in step:
            chunk.seq.prefill_at = chunk.seq.prefill_at or now
        try:
            chosen = self.runner.run(step)
        except Exception:
            for chunk in step:
                self.abort(chunk.seq.request.id)
            raise
        except BaseException:
            for chunk in reversed(step):
                self.scheduler.preempt(chunk.seq)
            raise
        self.scheduler.computed(step)
        outputs = []
        for seq, token, logprob in chosen:
            if seq.siblings:
                self.scheduler.waiting.extendleft(reversed(seq.siblings))
                seq.siblings = []
            outputs.append(seq.accept(token, logprob))
            if seq.finish_reason:
                self.scheduler.finish(seq)
                self._forget(seq.request.id)
        return outputs

    def abort(self, request_id: int) -> bool:
        """Stop a request and free its blocks; False when it is not known (any more)."""
        sequences = self._sequences.pop(request_id, [])
        for seq in sequences:
            if seq.finish_reason is None:
                seq.finish_reason = "abort"
                self.scheduler.finish(seq)
        return bool(sequences)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """Teacher-forced logits of one sequence, float32 [n, vocab]; one NTK alpha, that of n tokens."""
        self.check_ids(ids)
        if len(ids) > self.max_model_len:
            raise RequestError(f"{len(ids)} tokens exceed the context of {self.max_model_len}")
        self.scheduler.make_room(len(ids))
        request = Request(list(ids))
        alpha = ntk_alpha(self.model.config, len(ids))
        seq = Sequence(request, 0, alpha=alpha, max_tokens=1, banned=frozenset(), decoder=None)
        out = np.empty((len(ids), self.model.config.vocab_size), np.float32)
        table = self.blocks.allocate(ids, reuse=False)
        try:
            for start in range(0, len(ids), self.scheduler.prefill_tokens):
                slots = self.blocks.append(table, ids[start : start + self.scheduler.prefill_tokens])
                chunk = Chunk(seq, start, slots, table)
                with self.model.backend.computing():
                    logits = self.model.logits(self.runner.hidden([chunk]))
                    out[start : chunk.stop] = self.model.backend.array(logits)
        finally:
            self.blocks.free(table)
        return out

    def _forget(self, request_id: int) -> None:
        if all(seq.finish_reason for seq in self._sequences.get(request_id, ())):
            self._sequences.pop(request_id, None)
