"""Model names: what a user may type -> a repository, and the shapes of the published models."""

from __future__ import annotations

import difflib
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qwen_rt.config import ModelConfig
from qwen_rt.errors import HubError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GGUF_TYPES = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K".split()
SHAPE = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size".split()


@dataclass(frozen=True)
class Reference:
    """A repository, and which GGUF file of it when it holds several."""

    repo: str  # "Qwen/Qwen-7B-Chat"
    gguf_type: str | None = None  # "Q4_K_M"

    def __str__(self) -> str:
        return self.repo + (f":{self.gguf_type}" if self.gguf_type else "")


@cache
def catalog() -> dict[str, Any]:
    """catalog.toml."""
    return tomllib.loads(Path(__file__).with_name("catalog.toml").read_text())


@cache
def published() -> dict[str, dict[str, Any]]:
    """Name without owner -> a HF config of its true shape, for every published dense text model."""
    found: dict[str, dict[str, Any]] = {}
    families = catalog()["family"]
    for family in families:
        like: dict[str, Any] = next((f for f in families if f["name"] == family.get("same_as")), {})
        data = {**like, **family}
        for size, shape in data["sizes"].items():
            if size in family.get("without", ()):
                continue
            base = {"model_type": data["model_type"], **data["common"], **dict(zip(SHAPE, shape, strict=True))}
            base |= {"torch_dtype": "bfloat16"} | data.get("only", {}).get(size, {})
            for variant in data["variants"]:
                quant = _quant(variant)
                extra = data.get("quantised", {}).get(size, {}) | {"quantization_config": quant} if quant else {}
                found[f"{data['name']}-{size}{variant}"] = base | extra
    return found


def _quant(variant: str) -> dict[str, Any] | None:
    if variant.endswith("-AWQ"):
        return {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
    if match := re.search(r"-Int([48])$", variant):
        return {"quant_method": "gptq", "bits": int(match[1]), "group_size": 128, "sym": True, "desc_act": False}
    return None


def bare(name: str) -> str:
    """A name as the tables have it: no owner, no GGUF type, published spelling of the case."""
    short = name.strip().removesuffix("/").split("/")[-1].split(":")[0]
    return next((p for p in published() if p.lower() == short.lower()), short)


def known_config(name: str) -> ModelConfig | None:
    """The shape of a published model (`name` as a user types it, no file needed), or None when it is not known."""
    from qwen_rt.hub.catalog import find_entry

    entry = find_entry(name)
    short = bare(entry.names[-1] if entry else name)
    config = published().get(short) or published().get(short.removesuffix("-GGUF"))
    return None if config is None else ModelConfig.from_hf(config)


def suggestion(name: str) -> str:
    """' Did you mean ...?' for a name close to a published one, else ''."""
    short = name.split("/")[-1].split(":")[0].lower()
    lower = {p.lower(): p for p in [*published(), "demo"]}
    close = difflib.get_close_matches(short, lower, n=3, cutoff=0.75) if short not in lower else []
    return f" Did you mean {' or '.join(lower[c] for c in close)}?" if close else ""


def parse(name: str) -> Reference:
    """`Qwen-7B-Chat-Int4`, `qwen/Qwen-7B-Chat`, `owner/repo`, each with `:Q4_K_M` for GGUF -> Reference.

    HubError when it is none of these, with a suggestion for a near miss.
    """
    path, _, gguf_type = name.strip().partition(":")
    gguf_type = gguf_type.upper()
    if gguf_type and gguf_type not in GGUF_TYPES:
        raise HubError(f"{name!r}: {gguf_type!r} is not a supported GGUF type; use one of {', '.join(GGUF_TYPES)}")
    owner, _, repo = path.rpartition("/")
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", path):
        raise HubError(f"{name!r} is neither an existing path nor a model name (owner/name or a published Qwen name)")
    short = bare(path)
    if not owner and short not in published():
        raise HubError(
            f"{name!r} is not a published dense Qwen text model that qwen_rt knows.{suggestion(path)} "
            "Use owner/name for any other repository, or the path of a local directory or .gguf file"
        )
    if owner.lower() in ("", "qwen"):
        owner, repo = "Qwen", short
    if gguf_type and owner == "Qwen" and not repo.endswith("-GGUF"):
        repo += "-GGUF"
    return Reference(f"{owner}/{repo}", gguf_type or None)
