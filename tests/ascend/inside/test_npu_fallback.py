"""No operator of a step runs on the CPU behind our back, and nothing but the ids comes to the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import INT4, INT8, QWEN1, QWEN2, QWEN3, TOKENS, WINDOWED, decode, opened
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_rt.backends import contract
from qwen_rt.checkpoint.random import RandomCheckpoint
from qwen_rt.model import build

FALLS_BACK = "fall back to run on the CPU"  # what torch_npu says the first time an operator does
TO_HOST = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero")


class Watch(TorchDispatchMode):
    """Operators that touch the NPU: those without a kernel of its own, and those that bring something to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.fallbacks: set[str] = set()
        self.to_host: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before, after = _npu((args, kwargs)), _npu(out)
        if before or after:
            name = func.name()
            self.seen.add(name)
            if not _served(name):
                self.fallbacks.add(name)
            if name.split(".")[0] in TO_HOST or (before and _host(out)):
                self.to_host.append(name)
            if name.startswith("aten::copy_") and _host(args[0]):
                self.to_host.append(name)
        return out


def _served(name: str) -> bool:
    """Whether an operator has an NPU kernel, or is made of others that are dispatched again."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if any(has(name, k) for k in ("PrivateUse1", "CompositeImplicitAutograd", "CompositeExplicitAutograd")):
        return True
    # A structured operator: its functional form is composite, and calls the out form, which needs the kernel.
    base, _, overload = name.partition(".")
    outs = [f"{base}.{overload}_out" if overload else f"{base}.out", f"{base}.out"]
    return any(o in _NAMES and has(o, "PrivateUse1") for o in outs)


_NAMES = set(torch._C._dispatch_get_all_op_names())


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for x in tree for t in _tensors(x)] if isinstance(tree, list | tuple) else []


def _npu(tree: Any) -> bool:
    return any(t.device.type == "npu" for t in _tensors(tree))


def _host(tree: Any) -> bool:
    return any(t.device.type == "cpu" for t in _tensors(tree))


@pytest.mark.parametrize(
    ("config", "quant", "kv_cache"),
    [(QWEN2, INT4, "float16"), (QWEN2, INT8, "int8"), (QWEN1, None, "float16"), (QWEN3, None, "int8"),
     (WINDOWED, INT4, "float16")],
)  # fmt: skip
def test_steps_stay_on_the_npu(capfd: pytest.CaptureFixture[str], config: Any, quant: Any, kv_cache: str) -> None:
    backend = opened("float16", rows=0)
    model = build(RandomCheckpoint(config, quant), backend)
    with Watch() as watch:
        decode(model, kv_cache, TOKENS)
    assert any(name.startswith("npu::npu_fused_infer_attention_score") for name in watch.seen)
    assert not watch.fallbacks and FALLS_BACK not in capfd.readouterr().err
    steps = max(TOKENS)
    assert len(watch.to_host) <= steps + 1, watch.to_host  # sampled ids: one copy a step


def test_every_operation_stays_on_the_npu(capfd: pytest.CaptureFixture[str]) -> None:
    """The whole contract but sampling's largest vocabularies, plain attention and odd formats included."""
    backend = opened("float16")
    with Watch() as watch:
        for op in ("embedding", "rms_norm", "rope", "silu_mul", "attention"):
            assert all(r.ok for r in contract.run(backend, [op]))
        logits = torch.randn(3, 1000)
        g = torch.Generator().manual_seed(0)
        for make in contract._SAMPLE_ROWS.values():
            backend.sample(logits.to(backend.device), [make(1000, g) for _ in range(3)])
    assert not watch.fallbacks and FALLS_BACK not in capfd.readouterr().err


def test_the_watch_sees_a_fallback_and_a_copy(capfd: pytest.CaptureFixture[str]) -> None:
    """It would notice: an operator without an NPU kernel, and a value read on the host."""
    backend = opened("float16")
    x = torch.ones(3, device=backend.device)
    with Watch() as watch:
        x.sum().item()
    assert watch.to_host
    assert not watch.fallbacks
    with Watch() as watch:
        torch.digamma(x)
    assert watch.fallbacks == {"aten::digamma"} and FALLS_BACK in capfd.readouterr().err
