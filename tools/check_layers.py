"""Layer check, part of `make lint`: device words, environment reads and imports that the architecture forbids.

    python tools/check_layers.py [package root]      (default: the qwen_rt beside this folder)

model/, engine/ and kv/ know no device by name; config.py alone reads the environment; packages import only downwards,
by the table below (docs/architecture.md draws it); and torch is imported only with a module that cannot do without,
since it costs a start on the CPU more than all the rest.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

DEVICE_WORDS = frozenset(
    "acl ascend cann cpu cuda cudnn dcu dtk gpu hip hpu hygon mps npu nvidia nvrtc rocm tpu xpu".split()
)
DEVICE_FREE = ("model", "engine", "kv")
ENVIRONMENT = frozenset(("environ", "environb", "getenv", "getenvb"))

FORBIDDEN: dict[str, tuple[str, ...]] = {
    "quant": ("backends", "model", "engine", "kv", "hub", "cli", "llm", "torch"),
    "checkpoint": ("backends", "model", "engine", "kv", "cli", "llm", "torch"),
    "tokenizer": ("backends", "model", "engine", "kv", "cli", "llm", "quant"),
    "kv": ("backends", "model", "engine", "hub", "cli", "llm", "quant", "checkpoint", "tokenizer", "torch"),
    "model": ("backends", "engine", "kv", "hub", "cli", "llm", "tokenizer", "torch"),
    "engine": ("backends", "cli", "llm", "torch"),
    "backends": ("model", "engine", "kv", "hub", "cli", "llm", "tokenizer"),
}
"""Package -> what it must not import, wherever: siblings in qwen_rt, or torch."""

ALLOWED = frozenset((("model", "backends.base"), ("engine", "backends.base")))
"""Exceptions to FORBIDDEN: the waist."""

TORCH = (
    "backends/torch_backend.py",
    "backends/reference.py",
    "backends/contract.py",
    "backends/accelerator.py",
    "backends/gpu/",
    "backends/cuda/backend.py",
    "backends/dcu/backend.py",
    "backends/ascend/",
    "calibrate.py",
    "cli/doctor.py",
)
"""Modules and packages that may import torch when they are imported; the others only in a function or for types."""

TORCH_FREE = ("backends/ascend/probe.py",)
"""Exceptions to TORCH: what is asked where there may be no device."""


def check(root: Path) -> list[str]:
    """Violations in the package at `root`, as "path:line: what and why"."""
    found = []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        for line, what in sorted(set(_violations(tree, inside))):
            found.append(f"{path}:{line}: {what}")
    return found


def _violations(tree: ast.AST, inside: Path) -> Iterator[tuple[int, str]]:
    package = inside.parts[0] if len(inside.parts) > 1 else ""
    at_import = {id(node) for node in _at_import(tree)}
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if package in DEVICE_FREE:
            for text in _texts(node):
                for word in sorted(_words(text) & DEVICE_WORDS):
                    yield line, f"device word {word!r} in {package}/: ask the backend for a capability instead"
        if inside != Path("config.py") and ENVIRONMENT & set(_names(node)):
            yield line, "reads the environment: add a field to config.Settings instead"
        for target in _imports(node, inside):
            if id(node) in at_import and target.split(".")[0] == "torch" and not _has_torch(inside):
                yield line, f"imports {target} with the module: do it in the function that needs it, or for types only"
            for banned in FORBIDDEN.get(package, ()):
                if (target == banned or target.startswith(banned + ".")) and not any(
                    target == allowed or target.startswith(allowed + ".") for p, allowed in ALLOWED if p == package
                ):
                    yield line, f"{package}/ must not import {target}"


def _has_torch(inside: Path) -> bool:
    path = inside.as_posix()
    return path.startswith(TORCH) and path not in TORCH_FREE


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: all but the bodies of functions and of `if TYPE_CHECKING`."""
    yield node
    if isinstance(node, ast.If) and "TYPE_CHECKING" in _names(node.test):
        inner: list[ast.AST] = [*node.orelse]
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        inner = []
    else:
        inner = [*ast.iter_child_nodes(node)]
    for child in inner:
        yield from _at_import(child)


def _texts(node: ast.AST) -> Iterator[str]:
    """Identifiers and strings a node holds itself."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    yield from _names(node)


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.arg | ast.keyword):
        yield node.arg or ""
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.alias):
        yield from (node.name, node.asname or "")
    elif isinstance(node, ast.ImportFrom):
        yield node.module or ""


def _words(text: str) -> set[str]:
    """Words of an identifier or string: "torch_npu.CudaGraph" -> torch, npu, cuda, graph."""
    return {w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)}


def _imports(node: ast.AST, inside: Path) -> Iterator[str]:
    """What a node imports: "backends.base" for something of qwen_rt, else the absolute name."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [a.name for a in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = ["qwen_rt", *inside.parent.parts[: len(inside.parent.parts) + 1 - node.level]] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        names = [f"{module}.{a.name}" for a in node.names]
    yield from (n.removeprefix("qwen_rt.") for n in names)


def main() -> int:
    """Print the violations; status 1 when there are any."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "qwen_rt"
    found = check(root)
    print("\n".join(found) or f"layers of {root.name}: all right")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
