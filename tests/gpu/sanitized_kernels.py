"""Every kernel under AddressSanitizer and UBSan, at small shapes with odd tails, checked as the other tests check it.

    LD_PRELOAD=libasan.so python sanitized_kernels.py           prints, as JSON, which kernels there are and which ran
    LD_PRELOAD=libasan.so python sanitized_kernels.py planted   a kernel reads beyond a tensor: the process has to die

Run by test_gpu_sanitized.py. Tensors come from malloc, so AddressSanitizer knows where each ends.
"""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

from qwen_rt.backends.gpu import elementwise, kernels, linear, toolchain  # noqa: E402
from qwen_rt.backends.gpu.driver import Driver  # noqa: E402

WARP = 32
LIBRARY = toolchain.emu_library(WARP, sanitize=True)
toolchain.emu_library = lambda *_, **__: LIBRARY  # type: ignore[assignment]  # whatever a test asks for

import emulated_kernels  # noqa: E402
import test_gpu_attention as attention_tests  # noqa: E402
import test_gpu_elementwise as elementwise_tests  # noqa: E402
import test_gpu_linear as linear_tests  # noqa: E402
import test_gpu_sample as sample_tests  # noqa: E402
from test_gpu_attention import INT8, Scene  # noqa: E402

launched: set[str] = set()


def note_launches() -> None:
    """Add the name of every kernel that runs to `launched`."""
    launch = kernels.Kernel.__call__

    @functools.wraps(launch)
    def noted(self: kernels.Kernel, *args: Any, **options: Any) -> None:
        launched.add(self._launch.name)
        launch(self, *args, **options)

    kernels.Kernel.__call__ = noted  # type: ignore[method-assign]


def linears(dtype: torch.dtype) -> None:
    """Few rows and many, groups across tiles, with zeros, minimums and act-order; K split; the hand-over's parts."""
    for bits in (4, 8):
        for i, fmt in enumerate(linear_tests.formats(bits, (48, 128))):
            n, k = (37, 16, 1)[i % 3], 3 * fmt.group_size
            layer = linear_tests.make_layer(fmt, n, k, dtype, bias=i % 2 == 0, perm=i % 3 == 1)
            for traits in (linear_tests.MMA, linear_tests.SIMT):
                for rows in (1, 2, 3, 7, 9, 17, 33, 65):
                    if traits.mma or fmt.has_zeros:
                        linear_tests.check(WARP, layer, rows, traits, orders=False)
            linear_tests.check(WARP, layer, 3, linear_tests.HAND_OVER, orders=False)
            ids = torch.tensor([0, n - 1, -1, n, 1 << 40])
            rows_of = linear.embedding(linear_tests.open_kernels(WARP, "random"), ids, layer.packed, dtype)
            exact, terms = layer.weight[ids[:2]], layer.terms[ids[:2]]
            bound = 2 * linear_tests.UNIT[dtype] * exact.abs() + 2 * linear_tests.U32 * terms + linear_tests.TINY[dtype]
            assert bool(((rows_of[:2].double() - exact).abs() <= bound).all())
            assert bool(rows_of[2:].isnan().all())
    long = linear_tests.make_layer(linear_tests.LinearFormat(4, 128), 20, 128 * 16, dtype)
    linear_tests.check(WARP, long, 34, linear_tests.SPLIT, orders=False)


def attentions(dtype: torch.dtype, cache: torch.dtype) -> None:
    """Decode split over the context and merged, chunks of a prompt, windows; each class of head size."""
    for size, heads in ((64, (6, 2)), (80, (2, 1)), (33, (2, 2))):
        for seqs, window in ((((1, 150), (3, 20)), None), (((20, 45), (1, 17)), 9)):
            scene = Scene(seqs, heads, size, dtype, cache, window)
            attention_tests.check(scene, attention_tests.play(scene, LIBRARY, "random"), matrix=size != 33)


def elements(dtype: torch.dtype) -> None:
    """Norms, RoPE and the cache write, SwiGLU, rows of a table."""
    t = elementwise_tests
    for rows, size, x_is_float, with_residual in ((3, 63, False, True), (2, 2051, True, True), (1, 8200, True, False)):
        t.test_rms_norm(WARP, dtype, rows, size, x_is_float, with_residual)
    t.test_rms_norm_heads(WARP, dtype, 2, 5, 37)
    for shape in (t.ROPE_SHAPES[3], t.ROPE_SHAPES[5]):
        t.test_rope(WARP, dtype, shape)
        for kind in (torch.float16, torch.bfloat16, torch.uint8):
            t.test_store(WARP, dtype, shape, kind)
            t.test_rope_and_store_in_one(WARP, dtype, shape, kind, True)
    t.test_silu_mul(WARP, dtype, 3, 37, 1.0)
    t.test_silu_mul(WARP, dtype, 2, 2059, 30.0)
    for table in (torch.float16, torch.bfloat16, torch.float32):
        t.test_embedding(WARP, dtype, table, 100)
    t.test_embedding_counts_bad_ids(WARP, dtype)


def samples() -> None:
    """Adjusted, greedy and drawn, over one chunk and several."""
    for vocab, count in ((63, 8), (5003, 4)):
        g = random.Random(vocab)
        rows = [sample_tests.random_row(g, vocab) for _ in range(count)]
        logits = sample_tests.normal(count, vocab) * 3
        assert sample_tests.chosen(WARP, logits, rows) == sample_tests.wanted(logits, rows)
    sample_tests.test_strided_rows(WARP)
    sample_tests.test_unusable_logits(WARP, torch.nan, 5000)


def fragments(driver: Driver) -> None:
    """The self-test of the matrix fragments."""
    for dtype, name in ((torch.float16, "mma_check_f16"), (torch.bfloat16, "mma_check_bf16")):
        a, b = (emulated_kernels.randn(rows, 48).to(dtype) for rows in (16, 32))
        c = torch.full((16, 32), torch.nan)
        table = kernels.Kernels(lambda module: kernels.Loaded(driver.load(), "emulated"), lambda: 0, WARP)
        table("mma_check", name, "PPPiii")((2, 1, 1), WARP, c, a, b, 32, 48, 0)
        assert bool(((c.double() - a.double() @ b.double().T).abs() <= 1e-3).all())


def planted() -> None:
    """silu_mul told of rows one longer than they are."""
    table = emulated_kernels.open_kernels(WARP, "forward")
    gate_up, out = torch.ones(1, 74, dtype=torch.float16), torch.empty(1, 64, dtype=torch.float16)
    name = f"silu_mul_{elementwise.NAMES[out.dtype]}"
    for size in (37, 38):
        table("elementwise", name, "PPlli")((1, 1, 1), 256, out, gate_up, 64, 74, size)
        print(f"rows of {size}", flush=True)


def main(what: str) -> None:
    """Everything, or the planted mistake."""
    if what == "planted":
        planted()
        return
    note_launches()
    driver = Driver.open_emu(LIBRARY)
    work: list[Callable[[], None]] = [samples, lambda: fragments(driver)]
    for dtype in (torch.float16, torch.bfloat16):
        work += [functools.partial(part, dtype) for part in (linears, elements)]
        work += [functools.partial(attentions, dtype, cache) for cache in (dtype, INT8)]
    for do in work:
        do()
    print(json.dumps({"there": sorted(driver.load().names()), "launched": sorted(launched)}))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
