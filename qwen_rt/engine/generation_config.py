"""GenerationConfig: a model's generation_config.json, with attribute access and unknown fields kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_rt.errors import ConfigError

_DEFAULTS: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "max_new_tokens": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "chat_format": "chatml",
    "max_window_size": 6144,
    "stop_words_ids": None,
}


class GenerationConfig:
    """Generation defaults. Known fields always exist; a field nobody knows is kept as it was read."""

    do_sample: bool
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    chat_format: str
    max_window_size: int
    stop_words_ids: list[list[int]] | None

    def __init__(self, **fields: Any) -> None:
        """Fields as in generation_config.json; absent or null ones take the defaults."""
        self.__dict__.update(_DEFAULTS)
        self.__dict__.update({k: v for k, v in fields.items() if v is not None or k not in _DEFAULTS})

    def __getattr__(self, name: str) -> Any:
        # Only reached for a name that was never set; declared so that type checkers allow the kept fields.
        raise AttributeError(f"generation_config has no field {name!r}; it has {', '.join(sorted(self.__dict__))}")

    @classmethod
    def from_file(cls, path: Path, **overrides: Any) -> GenerationConfig:
        """Read generation_config.json (absent: all defaults). ConfigError when it is not a JSON object."""
        fields: Any = {}
        if path.is_file():
            try:
                fields = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path} cannot be read: {error}; fix or remove it") from error
            if not isinstance(fields, dict):
                raise ConfigError(f"{path} must hold a JSON object, found {type(fields).__name__}")
        return cls(**{**fields, **overrides})

    @classmethod
    def from_pretrained(cls, name: str, **overrides: Any) -> GenerationConfig:
        """The generation config of a model name or directory. Loading options of the hub libraries are ignored."""
        from qwen_rt.hub import resolve

        for option in ("trust_remote_code", "revision", "cache_dir", "resume_download", "local_files_only"):
            overrides.pop(option, None)
        files = resolve(str(name), weights=False)
        return cls.from_file((files.path if files.kind == "dir" else files.path.parent) / _NAME, **overrides)

    def eos_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple; it is an integer, a list or null in the file."""
        eos = self.eos_token_id
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def to_dict(self) -> dict[str, Any]:
        """Every field, known or kept."""
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"GenerationConfig({json.dumps(self.to_dict(), ensure_ascii=False, default=str)})"


_NAME = "generation_config.json"
