"""Errors a caller can act on: each message says what was wrong and what to do about it."""

from __future__ import annotations


class QwenRTError(Exception):
    """Base of every error raised on purpose by qwen_rt."""


class ConfigError(QwenRTError, ValueError):
    """A model configuration or a load option that cannot be used."""


class CheckpointError(QwenRTError, ValueError):
    """A weight file that is malformed, incomplete, or not what its header claims."""


class HubError(QwenRTError, FileNotFoundError):
    """A model name that could not be turned into verified local files; lists every place looked in."""


class TokenizerError(QwenRTError, ValueError):
    """Text or token ids the tokenizer cannot serve (disallowed control token, unknown id, bad vocabulary)."""


class RequestError(QwenRTError, ValueError):
    """A generation request that cannot be served: empty or too long a prompt, a bad sampling value."""


class BackendError(QwenRTError, RuntimeError):
    """A device that was asked for and cannot serve; says why and what to install."""


class Declined(BackendError):
    """A kernel that cannot serve this case and says so before running; the reason is kept in report()."""


class OutOfMemory(BackendError):
    """The model, or the cache it needs, does not fit; gives bytes needed and bytes free."""
