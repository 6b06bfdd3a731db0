"""The call forms of the original project, so that its examples run with only the import line changed.

    from qwen_rt import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from qwen_rt.compat import make_context, decode_tokens, get_stop_words_ids

A thin layer over qwen_rt.load: what it does not support is an error or a warning, never silence.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard

from qwen_rt.backends.select import torch_missing
from qwen_rt.config import ModelConfig
from qwen_rt.engine.generation_config import GenerationConfig
from qwen_rt.engine.report import Report
from qwen_rt.errors import BackendError, ConfigError, RequestError, TokenizerError
from qwen_rt.hub import resolve
from qwen_rt.llm import Qwen, load
from qwen_rt.tokenizer import Tokenizer, chat, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "GenerationConfig",
    "decode_tokens",
    "get_stop_words_ids",
    "make_context",
]

# Options of the original that change nothing here: no code of a repository is run, kernels are chosen by probing.
_MEANINGLESS = frozenset(
    "trust_remote_code revision code_revision cache_dir resume_download force_download local_files_only token "
    "use_auth_token low_cpu_mem_usage use_safetensors use_flash_attn use_cache_kernel attn_implementation use_fast "
    "model_max_length".split()
)
_LOAD_OPTIONS = frozenset(
    "dtype quantize kv_cache max_model_len weights max_batch kv_memory progress".split()
)  # passed to qwen_rt.load


def _torch() -> ModuleType:
    """torch, imported where somebody wants tensors: a chat does not."""
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as e:
        raise BackendError(torch_missing("a tensor")) from e


def _is_tensor(x: Any) -> TypeGuard[Tensor]:
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    return torch is not None and isinstance(x, torch.Tensor)


class BatchEncoding(dict[str, Any]):
    """What calling a tokenizer gives: `input_ids` and `attention_mask`, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> BatchEncoding:
        """The same with its tensors on `device`."""
        return BatchEncoding({k: v.to(device) if _is_tensor(v) else v for k, v in self.items()})


class CompatTokenizer:
    """A Tokenizer that can be called and that pads; everything else is the Tokenizer's own."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        pad_token: str | None = None,
        eos_token: str | None = None,
        padding_side: str = "right",
    ) -> None:
        """Made by AutoTokenizer.from_pretrained. TokenizerError when pad_token or eos_token is not a token."""
        if padding_side not in ("left", "right"):
            raise TokenizerError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
        self.tokenizer = tokenizer
        self.padding_side = padding_side
        self.pad_token_id = tokenizer.pad_id if pad_token is None else self._id(pad_token)
        self.eos_token_id = tokenizer.eos_id if eos_token is None else self._id(eos_token)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    @property
    def pad_token(self) -> str:
        """The padding token; assigning one sets `pad_token_id` too."""
        return self.tokenizer.decode([self.pad_token_id])

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        self.pad_token_id = self._id(token)

    @property
    def eos_token(self) -> str:
        """The end-of-sequence token."""
        return self.tokenizer.decode([self.eos_token_id])

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """Ids and attention mask of one text, or of several; padding "longest" (True) or "max_length".

        `options`: those of Tokenizer.encode. return_tensors "pt" gives int64 tensors [B, L].
        """
        if padding not in (False, True, "longest", "max_length", "do_not_pad"):
            raise TokenizerError(f"padding is {padding!r}; it must be True, False, 'longest' or 'max_length'")
        if return_tensors not in (None, "pt"):
            raise TokenizerError(f"return_tensors is {return_tensors!r}; only 'pt' is offered")
        options.pop("add_special_tokens", None)  # no Qwen adds any
        single = isinstance(text, str)
        rows = [self.tokenizer.encode(t, **options) for t in ([text] if isinstance(text, str) else text)]
        if truncation and max_length is not None:
            rows = [row[:max_length] for row in rows]
        width = max(map(len, rows), default=0)
        if padding == "max_length":
            width = max(width, max_length or 0)
        pads = [0 if padding in (False, "do_not_pad") else width - len(row) for row in rows]
        mask = [self._pad([1] * len(row), 0, pad) for row, pad in zip(rows, pads, strict=True)]
        rows = [self._pad(row, self.pad_token_id, pad) for row, pad in zip(rows, pads, strict=True)]
        if return_tensors == "pt":
            if len({len(row) for row in rows}) > 1:
                raise TokenizerError("texts of different lengths need padding='longest' to become one tensor")
            return BatchEncoding(input_ids=_torch().tensor(rows), attention_mask=_torch().tensor(mask))
        return BatchEncoding(input_ids=rows[0] if single else rows, attention_mask=mask[0] if single else mask)

    def batch_decode(self, rows: Any, **options: Any) -> list[str]:
        """Tokenizer.decode of each row."""
        return [self.tokenizer.decode(row, **options) for row in rows]

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_tensors: str | None = None,
        tools: list[dict[str, Any]] | None = None,
        **template_options: Any,
    ) -> str | list[int] | Tensor:
        """The prompt of a conversation: ids (a tensor [1, L] with return_tensors="pt"), or text."""
        write = self.tokenizer.chat_prompt if tokenize else self.tokenizer.chat_text
        prompt = write(conversation, add_generation_prompt=add_generation_prompt, tools=tools, **template_options)
        return _torch().tensor([prompt]) if tokenize and return_tensors == "pt" else prompt

    def _id(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(found, int):
            raise TokenizerError(f"{token!r} is not a token of this vocabulary")
        return found

    def _pad(self, row: list[int], fill: int, count: int) -> list[int]:
        return [fill] * count + row if self.padding_side == "left" else row + [fill] * count


class CausalLM:
    """A loaded model with the original's methods; `.qwen` is the qwen_rt.Qwen behind it."""

    def __init__(self, qwen: Qwen) -> None:
        """Made by AutoModelForCausalLM.from_pretrained."""
        self.qwen = qwen

    @property
    def device(self) -> torch.device:
        """Where its tensors go and come from: the device of a backend that torch runs, else the host."""
        return getattr(self.qwen.loop.engine.model.backend, "device", None) or _torch().device("cpu")

    @property
    def config(self) -> ModelConfig:
        """What the model is."""
        return self.qwen.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The defaults of generate and chat; assignable."""
        return self.qwen.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.qwen.generation_config = config

    def eval(self) -> CausalLM:
        """The model itself; it never trains."""
        return self

    def report(self) -> Report:
        """What serves this model; see Qwen.report."""
        return self.qwen.report()

    def chat(self, *args: Any, **options: Any) -> tuple[str, list[tuple[str, str]]]:
        """chat(tokenizer, query, history, system=..., ...) -> (response, history); see Qwen.chat."""
        return self.qwen.chat(*args, **options)

    def chat_stream(self, *args: Any, **options: Any) -> Iterator[str]:
        """As chat, yielding the text so far; see Qwen.chat_stream."""
        return self.qwen.chat_stream(*args, **options)

    def generate(
        self,
        inputs: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Any = None,
        generation_config: GenerationConfig | None = None,
        return_dict_in_generate: bool = False,
        max_length: int | None = None,
        num_return_sequences: int | None = None,
        num_beams: int = 1,
        pad_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **options: Any,
    ) -> Any:
        """Continue a batch: int64 [B, L] -> [B * num_return_sequences, L + longest answer], padded at the right.

        Padding of the input is left out by `attention_mask`, or else wherever `pad_token_id` stands; each row is
        answered as if alone. Answers keep the token that ended them. Other keywords: qwen_rt.llm.Options.
        """
        del token_type_ids  # the original's tokenizer makes them and nothing uses them
        if num_beams != 1:
            raise RequestError("beam search is not offered; use num_beams=1")
        batch = inputs if inputs is not None else input_ids
        if not _is_tensor(batch) or batch.ndim != 2:
            raise RequestError("generate takes input_ids as a tensor [batch, length]")
        overrides = {"pad_token_id": pad_token_id, "eos_token_id": eos_token_id}
        defaults = (generation_config or self.generation_config).to_dict()
        config = GenerationConfig(**{**defaults, **{k: v for k, v in overrides.items() if v is not None}})
        if max_length is not None and options.get("max_new_tokens") is None:
            if max_length <= batch.shape[1]:
                raise RequestError(f"max_length is {max_length}, but the input has {batch.shape[1]} tokens already")
            options["max_new_tokens"] = max_length - batch.shape[1]
        eos = config.eos_ids()
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(eos), self.qwen.tokenizer.pad_id)
        if attention_mask is None:
            # A pad that also ends sequences may be meant; only a mask can tell it from padding.
            attention_mask = _torch().ones_like(batch) if pad in eos else batch != pad
        prompts = [row[mask.bool()].tolist() for row, mask in zip(batch, attention_mask, strict=True)]
        answers = self.qwen.generate(prompts, generation_config=config, n=num_return_sequences, **options)
        rows = [
            row + answer.ids for row, first in zip(batch.tolist(), answers, strict=True) for answer in first.completions
        ]
        width = max(map(len, rows))
        out = _torch().tensor([row + [pad] * (width - len(row)) for row in rows], device=batch.device)
        return SimpleNamespace(sequences=out) if return_dict_in_generate else out


class AutoTokenizer:
    """Entry point of the original examples."""

    @staticmethod
    def from_pretrained(
        name: str,
        *,
        pad_token: str | None = None,
        eos_token: str | None = None,
        padding_side: str = "right",
        extra_vocab_file: str | None = None,
        **options: Any,
    ) -> CompatTokenizer:
        """The tokenizer of a model name, directory or .gguf file."""
        _warn_unknown(options.keys() - _MEANINGLESS)
        tokenizer = load_tokenizer(resolve(str(name), weights=False).path, extra_vocab_file)
        return CompatTokenizer(tokenizer, pad_token, eos_token, padding_side)


class AutoModelForCausalLM:
    """Entry point of the original examples."""

    @staticmethod
    def from_pretrained(
        name: str,
        *,
        device_map: str | int | Mapping[str, Any] | None = "auto",
        bf16: bool = False,
        fp16: bool = False,
        fp32: bool = False,
        torch_dtype: str | torch.dtype | None = None,
        use_cache_quantization: bool = False,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> CausalLM:
        """Load a model. bf16/fp16/fp32 choose `dtype`, use_cache_quantization the int8 cache; load's keywords work."""
        if bf16 + fp16 + fp32 > 1:
            raise ConfigError("choose one of bf16, fp16 and fp32")
        chosen = {k: v for k, v in options.items() if k in _LOAD_OPTIONS}
        _warn_unknown(options.keys() - _MEANINGLESS - _LOAD_OPTIONS)
        named = "bfloat16" if bf16 else "float16" if fp16 else "float32" if fp32 else torch_dtype
        if named is not None and named != "auto":
            chosen.setdefault("dtype", named)
        if chosen.get("dtype") == "auto":
            del chosen["dtype"]
        if use_cache_quantization:
            chosen.setdefault("kv_cache", "int8")
        qwen = load(str(name), _device(device_map), **chosen)
        if pad_token_id is not None:
            qwen.generation_config.pad_token_id = pad_token_id
        return CausalLM(qwen)


def make_context(
    tokenizer: CompatTokenizer | Tokenizer,
    query: str,
    history: list[tuple[str, str]] | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """(text, ids) of a prompt in the original's format."""
    return chat.make_context(_plain(tokenizer), query, history, system, max_window_size, chat_format)


def get_stop_words_ids(chat_format: str, tokenizer: CompatTokenizer | Tokenizer) -> list[list[int]]:
    """Token sequences that end an answer."""
    return chat.get_stop_words_ids(chat_format, _plain(tokenizer))


def decode_tokens(
    tokens: Tensor | list[int],
    tokenizer: CompatTokenizer | Tokenizer,
    raw_text_len: int,
    context_length: int,
    chat_format: str,
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> Any:
    """The answer in a generated row: its text from `context_length` to the token that ended it, stripped.

    `raw_text_len` is not needed: the original cut the decoded prompt off by it, and lost text when normalisation had
    changed its length. With return_end_reason: (text, reason).
    """
    plain = _plain(tokenizer)
    ids = (tokens.tolist() if _is_tensor(tokens) else list(tokens))[context_length:]
    ends = {word[0] for word in chat.get_stop_words_ids(chat_format, plain) if len(word) == 1} | {plain.eod_id}
    length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    text = plain.decode(ids[:length], errors=errors).strip()
    reason = f"Gen {plain.decode([ids[length]])!r}" if length < len(ids) else f"Gen length {len(ids)}"
    if verbose:
        print(f"answer: {text}\nend: {reason}")
    return (text, reason) if return_end_reason else text


def _plain(tokenizer: CompatTokenizer | Tokenizer) -> Tokenizer:
    return tokenizer.tokenizer if isinstance(tokenizer, CompatTokenizer) else tokenizer


def _warn_unknown(names: set[str]) -> None:
    if names:
        warnings.warn(f"these options have no effect here: {', '.join(sorted(names))}", stacklevel=3)


def _device(device_map: str | int | Mapping[str, Any] | None) -> str:
    """A device for load() from the original's device_map; one device serves a model."""
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise ConfigError(f"device_map spreads the model over {sorted(map(str, places))}; name one device")
        device_map = places.pop()
    if device_map in (None, 0, "auto", "balanced", "sequential"):
        return "auto"
    if isinstance(device_map, int):
        raise ConfigError(f"device_map={device_map} does not say which kind of device; write e.g. 'cuda:{device_map}'")
    return str(device_map)
