"""ChatML as Qwen-1 writes it: role, newline and content encoded apart, so that no text becomes a control token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from qwen_rt.errors import TokenizerError

if TYPE_CHECKING:
    from qwen_rt.tokenizer.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
ChatFormat = Literal["chatml", "raw"]


def _block(tokenizer: Tokenizer, role: str, content: str) -> tuple[str, list[int]]:
    """One `<|im_start|>role\\ncontent<|im_end|>`, as text and as ids."""
    start, end = tokenizer.im_start_id, tokenizer.im_end_id
    if start is None or end is None:
        raise TokenizerError("this vocabulary has no <|im_start|> and <|im_end|>: it cannot write ChatML")
    if not isinstance(role, str) or not isinstance(content, str):
        raise TokenizerError(f"role and content of a message must be text, not {role!r:.60} and {content!r:.60}")
    newline = tokenizer.encode("\n")
    role_ids, content_ids = (tokenizer.encode(text, allowed_special=()) for text in (role, content))
    return f"<|im_start|>{role}\n{content}<|im_end|>", [start, *role_ids, *newline, *content_ids, end]


def _assistant_start(tokenizer: Tokenizer) -> tuple[str, list[int]]:
    text, ids = _block(tokenizer, "assistant", "")
    return "\n" + text.removesuffix("<|im_end|>"), tokenizer.encode("\n") + ids[:-1]


def chatml(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], add_generation_prompt: bool
) -> tuple[str, list[int]]:
    """(text, ids) of messages in ChatML; without a system message the default one is put first."""
    if not isinstance(messages, list | tuple) or not messages:
        raise TokenizerError("messages must be a non-empty list of {'role': ..., 'content': ...}")
    for m in messages:
        if not isinstance(m, dict) or not {"role", "content"} <= m.keys():
            raise TokenizerError(f"a message needs 'role' and 'content': {m!r:.100}")
    turns = [(m["role"], m["content"]) for m in messages]
    if turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT_SYSTEM))
    newline = tokenizer.encode("\n")
    text, ids = "", list[int]()
    for number, turn in enumerate(turns):
        block_text, block_ids = _block(tokenizer, *turn)
        text += ("\n" if number else "") + block_text
        ids += (newline if number else []) + block_ids
    if add_generation_prompt:
        start_text, start_ids = _assistant_start(tokenizer)
        text, ids = text + start_text, ids + start_ids
    return text, ids


def make_context(
    tokenizer: Tokenizer,
    query: str,
    history: Iterable[tuple[str, str]] | None = None,
    system: str = "",
    max_window_size: int = 6144,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """(text, ids) of a Qwen-1 prompt. "chatml" keeps the newest turns of `history` while the system block and they
    stay strictly below `max_window_size` tokens; the query does not count and is always kept. "raw" is the bare query.
    """
    if chat_format == "raw":
        return query, tokenizer.encode(query, allowed_special=())
    if chat_format != "chatml":
        raise TokenizerError(f"chat_format is {chat_format!r}; it must be 'chatml' or 'raw'")
    newline = tokenizer.encode("\n")
    text, ids = _block(tokenizer, "system", system)
    past_text, past_ids = "", list[int]()
    for question, answer in reversed(list(history or ())):
        q_text, q_ids = _block(tokenizer, "user", question)
        a_text, a_ids = _block(tokenizer, "assistant", answer)
        turn_ids = newline + q_ids + newline + a_ids
        if len(ids) + len(turn_ids) + len(past_ids) >= max_window_size:
            break
        past_text, past_ids = f"\n{q_text}\n{a_text}{past_text}", turn_ids + past_ids
    query_text, query_ids = _block(tokenizer, "user", query)
    start_text, start_ids = _assistant_start(tokenizer)
    return f"{text}{past_text}\n{query_text}{start_text}", ids + past_ids + newline + query_ids + start_ids


def get_stop_words_ids(chat_format: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Token sequences that end an answer in `chat_format`, as the original lists them ("raw": "Human:" too)."""
    if chat_format == "raw":
        words: list[list[int | None]] = [[*tokenizer.encode("Human:")], [tokenizer.eod_id]]
    elif chat_format == "chatml":
        words = [[tokenizer.im_end_id], [tokenizer.im_start_id]]
    else:
        raise TokenizerError(f"chat_format is {chat_format!r}; it must be 'chatml' or 'raw'")
    return [ids for word in words if (ids := [i for i in word if i is not None])]
