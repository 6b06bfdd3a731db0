"""load() and the Qwen object: text in, text out, over whatever backend was chosen."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, overload

import numpy as np
from numpy.typing import NDArray

from qwen_rt.backends.base import KV, Backend, KVDtype, KVSpec
from qwen_rt.backends.select import open_backend
from qwen_rt.checkpoint import Checkpoint, open_checkpoint
from qwen_rt.collector import held_off
from qwen_rt.config import ModelConfig
from qwen_rt.dtypes import FLOATS, DType
from qwen_rt.engine import Engine, GenerationConfig, Request, SamplingParams
from qwen_rt.engine.capacity import PREFILL_TOKENS, CachePlan, plan_cache, scratch_bytes
from qwen_rt.engine.completion import Completion
from qwen_rt.engine.loop import Job, Loop
from qwen_rt.engine.report import CacheReport, Report, weight_groups
from qwen_rt.errors import BackendError, ConfigError, HubError, QwenRTError, RequestError
from qwen_rt.hub import ModelFiles, known_config, resolve
from qwen_rt.model import QwenModel, build
from qwen_rt.plan import plan_memory
from qwen_rt.tokenizer import Tokenizer, load_tokenizer, make_context
from qwen_rt.tokenizer.chat import DEFAULT_SYSTEM

if TYPE_CHECKING:
    from typing_extensions import Unpack

Ids = Any  # a sequence of ints, or a one-dimensional array or tensor of them
Prompt = str | Ids
History = Sequence[Sequence[str]]
Special = Literal["all"] | Collection[str]

DEFAULT_MAX_NEW_TOKENS = 2048  # where neither the caller nor generation_config.json says


class Options(TypedDict, total=False):
    """Keywords of generate, stream and chat; see SamplingParams. What is not given comes from `generation_config`."""

    max_new_tokens: int | None
    min_tokens: int | None
    do_sample: bool | None  # False: greedy whatever the temperature; True: at the configured temperature
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    stop_words_ids: Sequence[Sequence[int]] | None
    seed: int | None
    ignore_eos: bool | None
    logprobs: int | None
    n: int | None
    skip_special_tokens: bool | None
    generation_config: GenerationConfig | None


class _Reading(threading.Thread):
    """Reads the tokenizer of a model's files, if it has any, while its block runs; a mistake in them is raised by
    tokenizer(). (An executor would do, but its import takes longer than reading a small vocabulary.)"""

    def __init__(self, files: ModelFiles | None, checkpoint: Checkpoint) -> None:
        super().__init__(name="qwen_rt tokenizer")
        self._files, self._checkpoint = files, checkpoint
        self._found: Tokenizer | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        if self._files is None:
            return
        try:
            self._found = load_tokenizer(self._files.path, metadata=self._checkpoint.metadata)
        except BaseException as e:
            self._error = e

    def __enter__(self) -> _Reading:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join()

    def tokenizer(self) -> Tokenizer | None:
        if self._error is not None:
            raise self._error
        return self._found


@held_off()  # searching a vocabulary's worth of objects would cost a third
def load(
    name: str | Path,
    device: str = "auto",
    *,
    dtype: Any = None,
    quantize: Literal["int8", "int4"] | None = None,
    kv_cache: KVDtype | Literal["auto"] = "auto",
    max_model_len: int | None = None,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    max_batch: int = 8,
    kv_memory: int | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Qwen:
    """Load a model by hub name, local directory or .gguf file, and say in report() what serves it.

    device: "auto", a backend's name, or name:index. dtype: of dense weights, and of computation where the device offers
    it ("bfloat16", or torch's own). quantize: round dense weights at load. kv_cache: the cache's number format.
    max_model_len: longest prompt plus answer; by default what the model declares, or what fits. weights "random" needs
    no weight files. max_batch: sequences run at once. kv_memory: bytes of cache. progress(name, bytes) is called after
    each packed weight.

    Raises HubError, CheckpointError, ConfigError, BackendError, or OutOfMemory before memory is spent.
    """
    if weights not in ("checkpoint", "random"):
        raise ConfigError(f"weights={weights!r} is not known; use 'checkpoint' or 'random'")
    if max_batch < 1:
        raise ConfigError(f"max_batch must be at least 1, got {max_batch}")
    wanted = _dtype(dtype)
    backend, notes = _open(device, wanted)
    files, checkpoint = _checkpoint(str(name), weights)
    try:
        config = checkpoint.config
        spec = _kv_spec(backend, config, kv_cache)
        need = plan_memory(
            config,
            quantize=quantize,
            dtype=wanted,
            checkpoint=checkpoint,
            weight_bits=backend.caps.weight_bits,
            tables_in_files=backend.caps.tables_in_files,
        ).weights
        scratch = scratch_bytes(config, PREFILL_TOKENS, max_batch)

        def cache_plan(reserved: int) -> CachePlan:
            return plan_cache(
                config,
                spec,
                free=backend.memory()[0],
                reserved=reserved,
                max_model_len=max_model_len,
                max_batch=max_batch,
                kv_memory=kv_memory,
            )

        cache_plan(need + scratch)  # raises before anything is packed
        level = spec.dtype == "int8"
        with _Reading(files, checkpoint) as reading:  # the vocabulary, while native code packs
            model = build(checkpoint, backend, quantize=quantize, dtype=wanted, progress=progress, level_keys=level)
        tokenizer = reading.tokenizer()
        # A second look: the packed layout may differ from the stored one.
        plan = cache_plan(scratch)
    finally:
        checkpoint.close()
    if files is None:
        notes.append(f"no files of {name} were found: random weights, published shapes, no tokenizer (token ids only)")
    elif weights == "random":
        notes.append("the weights are random: the output means nothing")
    if plan.note:
        notes.append(plan.note)
        if kv_memory is None:
            warnings.warn(plan.note, RuntimeWarning, stacklevel=2)
    if backend.name == "reference" and not device.startswith("reference"):
        notes.append("SLOW: the reference backend serves, because no faster one is usable (see `qwen-rt devices`)")
        warnings.warn(notes[-1], RuntimeWarning, stacklevel=2)
    directory = None if files is None else files.path if files.kind == "dir" else files.path.parent
    return Qwen(
        name=str(name),
        source=checkpoint.source if files is None else f"{checkpoint.source} ({files.source})",
        model=model,
        kv=backend.alloc_kv(spec, plan.num_blocks),
        tokenizer=tokenizer,
        generation_config=GenerationConfig.from_file(directory / "generation_config.json")
        if directory
        else GenerationConfig(),
        max_model_len=plan.max_model_len,
        max_batch=max_batch,
        notes=notes,
    )


class TextStream(Iterator[str]):
    """Pieces of one answer as they are made, never half a character. Closing or dropping it stops the answer."""

    def __init__(self, job: Job, prompt_tokens: int) -> None:
        """Made by Qwen.stream."""
        self.completion = Completion(prompt_tokens=prompt_tokens)  # what has come so far, with times once finished
        self._job = job

    def __next__(self) -> str:
        for out in self._job:
            self.completion.add(out)
            if out.text:
                return out.text
        raise StopIteration

    def close(self) -> None:
        """Stop the answer and free its part of the cache."""
        self._job.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Qwen:
    """A loaded model. Safe to use from several threads; their requests run in the same steps."""

    def __init__(
        self,
        *,
        name: str,
        source: str,
        model: QwenModel,
        kv: KV,
        tokenizer: Tokenizer | None,
        generation_config: GenerationConfig,
        max_model_len: int,
        max_batch: int = 8,
        notes: Sequence[str] = (),
    ) -> None:
        """Made by load()."""
        self.name = name
        self.config = model.config
        self.generation_config = generation_config
        self.max_model_len = max_model_len
        self.device = f"{model.backend.name}:{model.backend.index}"
        self._tokenizer = tokenizer
        self._source = source
        self._notes = tuple(notes)
        self._model: QwenModel | None = model
        engine = Engine(
            model,
            kv,
            max_model_len=max_model_len,
            max_batch=max_batch,
            prefill_tokens=PREFILL_TOKENS,
            banned_ids=tokenizer.unused_ids(model.config.vocab_size) if tokenizer else (),
            decoder=tokenizer.stream_decoder if tokenizer else None,
        )
        self._loop: Loop | None = Loop(engine)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; RequestError when it was loaded without one."""
        if self._tokenizer is None:
            raise RequestError(f"{self.name} was loaded without a tokenizer; give token ids instead of text")
        return self._tokenizer

    @property
    def loop(self) -> Loop:
        """What runs the requests; for servers that make their own."""
        if self._loop is None:
            raise QwenRTError(f"{self.name} is closed; load it again")
        return self._loop

    def logits(self, ids: Ids) -> NDArray[np.float32]:
        """Teacher-forced logits of one sequence: a numpy array [n, vocab]."""
        return self.loop.logits(_as_ids(ids))

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str, *, allowed_special: Special = ..., **options: Unpack[Options]
    ) -> Completion: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Unpack[Options]) -> Completion: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], *, allowed_special: Special = ..., **options: Unpack[Options]
    ) -> list[Completion]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], *, allowed_special: Special = frozenset(), **options: Unpack[Options]
    ) -> Completion | list[Completion]:
        """Continue one prompt, text or token ids (-> Completion), or a list of them in one batch (-> list).

        Text becomes control tokens only where `allowed_special` ("all", or a set of their spellings) says so. Without
        options it does what generation_config.json says, greedily where that says nothing. Raises RequestError for an
        empty or too long a prompt and for bad values.
        """
        single = isinstance(prompt, str) or getattr(prompt, "ndim", 0) == 1 or _is_ids(prompt)
        prompts = [cast(Prompt, prompt)] if single else list(cast("Sequence[Prompt]", prompt))
        if not prompts:
            raise RequestError("the list of prompts is empty; give at least one")
        done = self._complete([self.request(self._ids(p, allowed_special), **options) for p in prompts])
        return done[0] if single else done

    def stream(
        self, prompt: Prompt, *, allowed_special: Special = frozenset(), **options: Unpack[Options]
    ) -> TextStream:
        """As generate(), piece by piece; `.completion` of the stream holds ids, log-probabilities and times."""
        return self._stream(self.request(self._ids(prompt, allowed_special), **options))

    def chat(self, *args: Any, **keywords: Any) -> tuple[str, list[tuple[str, str]]]:
        """One turn: chat(query, history=None, system=None, **options) -> (response, history with this turn).

        The original's form chat(tokenizer, query, history=...) works too; the model's own tokenizer is used. `history`
        is a list of (query, response) pairs and is not changed. Further keywords: Options, `max_window_size`.
        `stop_words_ids` end the answer and, as in the original, stay in it.
        """
        query, history, request = self._chat_request(args, keywords)
        response = self._complete([request])[0].text.strip()
        return response, [*history, (query, response)]

    def chat_stream(self, *args: Any, **keywords: Any) -> Iterator[str]:
        """As chat(), but yields the whole text so far each time it grows, as the original does."""
        return _growing(self._stream(self._chat_request(args, keywords)[2]))

    def request(self, ids: Sequence[int], **options: Unpack[Options]) -> Request:
        """A validated request for the engine, options completed from the generation config."""
        config = options.get("generation_config") or self.generation_config
        return Request(list(ids), _sampling_params(config, options), self._eos_ids(config))

    def chat_ids(
        self,
        query: str,
        history: History = (),
        system: str | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        max_window_size: int | None = None,
    ) -> list[int]:
        """The token ids of a chat prompt: ChatML with the original's truncation for Qwen-1, else the chat template.

        system None is the model's default. Qwen-1 drops the oldest turns past `max_window_size` tokens.
        """
        if not isinstance(query, str) or not query:
            raise RequestError(f"the query must be a non-empty string, got {query!r}")
        tokenizer = self.tokenizer
        if tokenizer.generation == "qwen":
            config = generation_config or self.generation_config
            window = max_window_size or config.max_window_size
            if window >= self.max_model_len:  # a shorter context than the model's own still needs room for an answer
                window = self.max_model_len * 3 // 4
            return make_context(
                tokenizer,
                query,
                history=[(q, a) for q, a in history],
                system=DEFAULT_SYSTEM if system is None else system,
                max_window_size=window,
                chat_format=config.chat_format,
            )[1]
        messages = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in history:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return tokenizer.chat_prompt([*messages, {"role": "user", "content": query}])

    def report(self) -> Report:
        """What serves this model: backend, kernels, formats, bytes, and what was passed over and why."""
        engine, model = self.loop.engine, cast(QwenModel, self._model)
        backend, kv = model.backend, engine.runner.kv
        free, total = backend.memory()
        return Report(
            model=self.name,
            arch=self.config.arch,
            source=self._source,
            backend=backend.name,
            compute_dtype=backend.compute_dtype,
            kernels=backend.kernels(),
            weights=weight_groups(model),
            cache=CacheReport(
                dtype=kv.spec.dtype,
                block_size=kv.spec.block_size,
                num_blocks=kv.num_blocks,
                used_blocks=engine.blocks.num_used,
                nbytes=kv.num_blocks * kv.spec.block_bytes(),
            ),
            max_model_len=self.max_model_len,
            memory_free=free,
            memory_total=total,
            notes=self._notes,
        )

    def close(self) -> None:
        """Release weights and cache; every later call is an error."""
        self._loop = self._model = None

    def __enter__(self) -> Qwen:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _chat_request(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[str, list[Any], Request]:
        call = _chat_call(args, keywords)
        query, history = call.pop("query"), list(call.pop("history") or ())
        config = call.get("generation_config") or self.generation_config
        ids = self.chat_ids(
            query,
            history,
            call.pop("system"),
            generation_config=config,
            max_window_size=call.pop("max_window_size", None),
        )
        if self.tokenizer.generation == "qwen" and config.chat_format == "raw":
            human = tuple(self.tokenizer.encode("Human:", allowed_special=set()))
            call["stop_words_ids"] = [*(call.get("stop_words_ids") or ()), human]
        request = self.request(ids, **call)
        if request.params.n != 1:
            raise RequestError("chat gives one answer; n must be 1")
        return query, history, request

    def _stream(self, request: Request) -> TextStream:
        if request.params.n != 1:
            raise RequestError("a stream gives one answer; n must be 1")
        return TextStream(self.loop.submit([request]), len(request.prompt_ids))

    def _complete(self, requests: list[Request]) -> list[Completion]:
        answers = {
            request.id: [Completion(prompt_tokens=len(request.prompt_ids)) for _ in range(request.params.n)]
            for request in requests
        }
        job = self.loop.submit(requests)
        try:
            for out in job:
                answers[out.request_id][out.index].add(out)
        finally:
            job.close()
        for group in answers.values():
            group[0].completions = group
        return [answers[request.id][0] for request in requests]

    def _ids(self, prompt: Prompt, allowed_special: Special) -> list[int]:
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty; give some text or token ids")
            return self.tokenizer.encode(prompt, allowed_special)
        return _as_ids(prompt)

    def _eos_ids(self, config: GenerationConfig) -> frozenset[int]:
        """What ends an answer: the configured ids, and the chat's own unless the format is raw text."""
        ids = {*config.eos_ids(), *self.config.eos_ids}
        if self._tokenizer is not None:
            ids |= {self._tokenizer.eos_id} if config.chat_format == "raw" else set(self._tokenizer.stop_ids)
        return frozenset(i for i in ids if i < self.config.vocab_size)


def _growing(stream: TextStream) -> Iterator[str]:
    with stream:
        text = ""
        for piece in stream:
            text += piece
            yield text


def _chat_call(args: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of a chat call in either form: (query, ...) or the original's (tokenizer, query, ...)."""
    call = {"query": None, "history": None, "system": None, **keywords}
    call.pop("tokenizer", None)
    rest = args[1:] if args and not isinstance(args[0], str) else args
    names = ("query", "history", "system")
    if len(rest) > len(names):
        raise RequestError("chat takes (query, history, system) or (tokenizer, query, history, system); name the rest")
    for name, value in zip(names, rest, strict=False):
        if name in keywords:
            raise RequestError(f"chat got {name} twice")
        call[name] = value
    return call


def _sampling_params(config: GenerationConfig, options: Mapping[str, Any]) -> SamplingParams:
    names = {field.name for field in fields(SamplingParams)}
    if unknown := options.keys() - names - {"do_sample", "generation_config"}:
        raise RequestError(f"unknown generation option {sorted(unknown)[0]!r}; known: {', '.join(sorted(names))}")
    given = {name: value for name, value in options.items() if value is not None}
    values = {name: value for name, value in config.to_dict().items() if name in names and value is not None}
    values.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    if not given.get("do_sample", config.do_sample):
        values["temperature"] = 0.0
    values |= {name: value for name, value in given.items() if name in names}
    if given.get("do_sample") is False:
        values["temperature"] = 0.0
    return SamplingParams(**values)


def _open(device: str, dtype: DType | None) -> tuple[Backend, list[str]]:
    """The backend, computing in `dtype` where it offers that."""
    backend, notes = open_backend(device)
    if dtype is not None and dtype != backend.compute_dtype and dtype in backend.caps.compute_dtypes:
        backend = type(backend)(backend.index, dtype)
    return backend, notes


def _checkpoint(name: str, weights: str) -> tuple[ModelFiles | None, Checkpoint]:
    """The files of a model (None: no files, published shapes only) and its opened checkpoint."""
    if weights == "checkpoint":
        files = resolve(name)
        return files, open_checkpoint(files.path)
    from qwen_rt.checkpoint.random import RandomCheckpoint

    try:
        files = resolve(name, hub="offline", weights=False)
    except HubError:
        config = known_config(name)
        if config is None:
            raise
        return None, RandomCheckpoint(config)
    return files, RandomCheckpoint(_read_config(files))


def _read_config(files: ModelFiles) -> ModelConfig:
    if files.kind == "dir":
        from qwen_rt.checkpoint.hf_dir import read_config

        return read_config(files.path)
    checkpoint = open_checkpoint(files.path)
    checkpoint.close()
    return checkpoint.config


def _kv_spec(backend: Backend, config: ModelConfig, kv_cache: str) -> KVSpec:
    offered = backend.caps.kv_dtypes
    dtype = offered[0] if kv_cache == "auto" else kv_cache
    if dtype not in offered:
        raise BackendError(f"{backend.name} has no {kv_cache!r} cache; it offers auto, {', '.join(offered)}")
    return KVSpec(config.num_layers, config.num_kv_heads, config.head_size, backend.caps.kv_block, cast(KVDtype, dtype))


def _dtype(dtype: Any) -> DType | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in FLOATS:
        raise ConfigError(f"dtype={dtype!r} is not known; use 'float32', 'float16' or 'bfloat16'")
    return cast(DType, name)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], int)


def _as_ids(ids: Ids) -> list[int]:
    """A list of ints from a sequence or a 1-D tensor; RequestError for anything else."""
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in values):
        raise RequestError("a prompt must be text or a flat list of token ids")
    return values
