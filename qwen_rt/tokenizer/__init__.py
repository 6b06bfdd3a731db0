"""Tokenizers of every Qwen generation: byte-level BPE on tiktoken, ChatML, sandboxed chat templates."""

from qwen_rt.tokenizer.chat import get_stop_words_ids, make_context
from qwen_rt.tokenizer.load import from_gguf_metadata, load_tokenizer
from qwen_rt.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "StreamDecoder",
    "Tokenizer",
    "from_gguf_metadata",
    "get_stop_words_ids",
    "load_tokenizer",
    "make_context",
]
