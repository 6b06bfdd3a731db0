"""The host emulator reports each planted mistake; compat.h's arithmetic is right; the launcher passes what it is given.

Kernels are in gpu_emulator.cu. The launcher is also run against stand-ins for the vendors' libraries
(gpu_fake_driver.cpp): that tests argument passing and error messages, not a GPU.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_rt.backends.gpu.driver import Driver, Kernel, Order, cuda_devices, hip_devices
from qwen_rt.errors import BackendError

HERE = Path(__file__).parent
GPU = HERE.parents[1] / "csrc/gpu"
ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")
WARPS = (32, 64)
CXX = shutil.which("g++") or shutil.which("clang++")
SIGNATURES = {
    "good_reverse": "PP", "good_sum": "PPi", "good_parameters": "PilfP", "good_warp": "P", "good_convert": "PPPPPi",
    "good_packed": "PPPPi", "good_exp": "PPi", "good_copy": "PPi", "bad_missing_barrier": "PP",
    "bad_missing_second_barrier": "PP", "bad_warp32": "PP", "bad_copy_not_waited": "PP", "bad_alignment": "PP",
    "bad_address": "Pl", "bad_division": "Pi", "bad_copy_left": "PP", "bad_stack": "Pi", "bad_static_index": "Pi",
}  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g"]

pytestmark = pytest.mark.skipif(CXX is None, reason="no g++ or clang++: the emulator was not built")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Two cores are shared with the compilers."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """gpu_emulator.cu and mma_check.cu at both warp sizes, with the portable switch, and sanitized; built at once."""
    folder = tmp_path_factory.mktemp("emulator")
    variants = {
        "32": ["-O2", "-DQRT_WARP=32"],
        "64": ["-O2", "-DQRT_WARP=64"],
        "ucontext": ["-O2", "-DQRT_WARP=64", "-DQRT_EMU_UCONTEXT"],
        "sanitized": [*SANITIZE, "-DQRT_WARP=32"],
    }
    assert CXX
    common = [CXX, "-std=c++17", "-fPIC", "-shared", "-DQRT_EMU", f"-I{GPU}", "-Wno-attributes", "-x", "c++"]
    if "clang" not in Path(CXX).name:
        common.insert(1, "-fno-gnu-unique")
    sources = [str(HERE / "gpu_emulator.cu"), str(GPU / "mma_check.cu"), str(GPU / "emu/emu.cpp")]
    running = {
        name: subprocess.Popen(
            [*common, *flags, *sources, "-o", str(folder / f"{name}.so")], stderr=subprocess.PIPE, text=True
        )
        for name, flags in variants.items()
    }
    for name, process in running.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, f"{name}: {errors}"
    return {name: folder / f"{name}.so" for name in variants}


@pytest.fixture(params=["32", "64", "ucontext"])
def library(request: pytest.FixtureRequest, libraries: dict[str, Path]) -> Path:
    """Each build in turn."""
    return libraries[request.param]


def kernel(path: Path, name: str, order: Order = "forward", seed: int = 1, max_dynamic_shared: int = 0) -> Kernel:
    """A kernel of gpu_emulator.cu."""
    driver = Driver.open_emu(path, order, seed, max_dynamic_shared)
    return driver.load().kernel(name, SIGNATURES.get(name, "P"))


def in_orders(path: Path, name: str, run: Callable[[Kernel], torch.Tensor]) -> list[torch.Tensor]:
    """What `run` returns in forward, reverse and two random orders."""
    orders: list[tuple[Order, int]] = [("forward", 1), ("reverse", 1), ("random", 1), ("random", 2)]
    return [run(kernel(path, name, order, seed)) for order, seed in orders]


def agree(results: list[torch.Tensor]) -> bool:
    """No NaN, and all orders bitwise the same: what a kernel's own tests ask."""
    return not any(r.isnan().any() for r in results) and all(torch.equal(r, results[0]) for r in results)


# ------------------------------------------------------------------------------------------------ right kernels


def test_right_kernels_agree_in_all_orders(library: Path) -> None:
    """Barriers, template shared memory, reductions."""
    x = torch.randn(300)
    for threads in (64, 128, 256):

        def reverse(k: Kernel, n: int = threads) -> torch.Tensor:
            out = torch.full((n,), math.nan)
            k(1, n, out, x[:n].contiguous())
            return out

        def reduce(k: Kernel, n: int = threads) -> torch.Tensor:
            out = torch.full((n, 2), math.nan)
            k(1, n, out, x, 300)
            return out

        got = in_orders(library, "good_reverse", reverse)
        assert agree(got) and torch.equal(got[0], x[:threads].flip(0))
        sums = in_orders(library, "good_sum", reduce)
        assert agree(sums)
        bound = 300 * 2.0**-23 * x.abs().sum().item()
        assert (sums[0][:, 0].double() - x.double().sum()).abs().max() <= bound
        assert (sums[0][:, 1] == x.max()).all()


def test_parameters_and_geometry(library: Path) -> None:
    """Every parameter type at its extremes; block and grid indices."""
    k = kernel(library, "good_parameters")
    out = torch.zeros(6, dtype=torch.int64)
    k((3, 2, 4), 64, out, -(2**31), -(2**63), -0.1, None)
    bits = int(np.float32(-0.1).view(np.uint32))
    assert out.tolist() == [-(2**31), -(2**63), bits, 1, 2 + 100 + 30000, 3 + 200 + 40000]
    k((1,), (64,), out.data_ptr(), 2**31 - 1, 2**63 - 1, 3, out)
    assert out.tolist()[:4] == [2**31 - 1, 2**63 - 1, 0x40400000, 0]


def test_warp_operations(library: Path) -> None:
    """Shuffles and ballot against their definitions, in a block of two warps where the warp is 32."""
    warp = Driver.open_emu(library).facts.warp
    out = torch.zeros(64, 5, dtype=torch.int32)
    kernel(library, "good_warp", "random")(1, 64, out)
    for t, row in enumerate(out.tolist()):
        base, lane = t // warp * warp, t % warp
        down = t + 7 if lane + 7 < warp else t
        up = t - 7 if lane >= 7 else t
        assert row == [t ^ 5, base + 3, down, up, len(range(0, warp, 3))]


def test_16_bit_conversions_are_exact(library: Path) -> None:
    """All halves to float; floats around every rounding boundary to half and bfloat16, as torch rounds them."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    wide = halves.view(torch.float16).float()
    neighbours = (wide[1:] + wide[:-1]) / 2
    x = torch.cat([wide, neighbours.nextafter(torch.tensor(9e9)), neighbours, torch.randn(40000) * 2.0**-15])
    x = torch.cat([x, torch.tensor([65519.996, 65520.0, 1e38, 3.4e38, math.inf, -math.inf, math.nan, 1e-45, -0.0])])
    n = x.numel()
    halves = halves.repeat(-(-n // 65536))[:n].contiguous()
    out = torch.empty(n), torch.empty(n, dtype=torch.uint16), torch.empty(n, dtype=torch.uint16)
    kernel(library, "good_convert")(-(-n // 64), 64, *out, x, halves, n)
    torch.testing.assert_close(out[0], halves.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    for got, dtype in ((out[1], torch.float16), (out[2], torch.bfloat16)):
        torch.testing.assert_close(got.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_packed_half_arithmetic_rounds_once(library: Path) -> None:
    """fma2, add2, sub2, mul2 against exact rational arithmetic rounded once to half."""
    rng = np.random.default_rng(3)
    n = 400
    words = rng.integers(0, 2**32, (3, n), dtype=np.uint32)
    words &= np.uint32(0xBFFFBFFF)  # below 2: no infinities or NaN
    words[:, : n // 4] |= np.uint32(0x38003800)  # and many of one magnitude, where sums cancel
    out = np.zeros((n, 4), dtype=np.uint32)
    a, b, c = (torch.from_numpy(w.copy().view(np.int32)) for w in words)
    result = torch.from_numpy(out.view(np.int32))
    kernel(library, "good_packed")(-(-n // 64), 64, result, a, b, c, n)
    v = [w.view(np.float16).reshape(n, 2) for w in words]
    got = result.numpy().view(np.float16).reshape(n, 4, 2)

    def once(exact: Fraction) -> np.float16:
        near = np.float16(float(exact))
        around = [near, np.nextafter(near, np.float16("inf")), np.nextafter(near, np.float16("-inf"))]
        even = [int(h.view(np.uint16)) & 1 for h in around]
        best = min(range(3), key=lambda i: (abs(Fraction(float(around[i])) - exact), even[i]))
        return around[best]

    for i in range(n):
        for h in range(2):
            x, y, z = (Fraction(float(w[i, h])) for w in v)
            assert [float(g) for g in got[i, :, h]] == [float(once(e)) for e in (x * y + z, x + y, x - y, x * y)]


def test_fast_exp_keeps_its_bound(library: Path) -> None:
    """The relative error stated in compat.h, over the range a softmax uses."""
    x = torch.cat([torch.linspace(-87, 88, 4001), torch.randn(1000)])
    out = torch.empty_like(x)
    kernel(library, "good_exp")(-(-x.numel() // 64), 64, out, x, x.numel())
    exact = x.double().exp()
    assert ((out.double() - exact).abs() <= exact * (x.double().abs() + 4) * 2.0**-23).all()


def test_asynchronous_copies(library: Path) -> None:
    """A double-buffered loop, and its copies land late, early or at random."""
    x = torch.randn(5, 4 * 64)
    for got in in_orders(library, "good_copy", lambda k: run_copy(k, x)):
        assert torch.equal(got, x.flip(1))


def run_copy(k: Kernel, x: torch.Tensor) -> torch.Tensor:
    """good_copy of the rows of x."""
    out = torch.full_like(x, math.nan)
    k(1, 64, out, x, x.shape[0], shared=2 * 4 * 4 * 64)
    return out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1])
def test_matrix_fragments(library: Path, dtype: torch.dtype, rows: int) -> None:
    """mma_check.cu, the card's self-test, against float64 in all orders."""
    m, n, k = 32, 48, 80
    gen = torch.Generator().manual_seed(1)
    a, b = torch.randn(m, k, generator=gen).to(dtype), torch.randn(n, k, generator=gen).to(dtype)
    bound = k * 2.0**-22 * (a.double().abs() @ b.double().abs().T)
    for order in ORDERS:
        driver = Driver.open_emu(library, order)
        name = "mma_check_f16" if dtype == torch.float16 else "mma_check_bf16"
        c = torch.full((m, n), math.nan)
        driver.load().kernel(name, "PPPiii")((n // 16, m // 16), driver.facts.warp, c, a, b, n, k, rows)
        assert ((c.double() - a.double() @ b.double().T).abs() <= bound).all()


@pytest.mark.parametrize(
    ("compiler", "arguments"),
    [
        ("nvcc", "-cubin -arch=sm_80"),
        ("hipcc", "--genco --offload-arch=gfx906 -x hip"),
        ("hipcc", "--genco --offload-arch=gfx90a -x hip"),
    ],
)
def test_device_compilers_take_every_word_of_compat(compiler: str, arguments: str, tmp_path: Path) -> None:
    """The kernels of this test, which use all of compat.h, compile for devices (the file is one language)."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    command = [compiler, *arguments.split(), "-std=c++17", f"-I{GPU}", str(HERE / "gpu_emulator.cu")]
    environment = os.environ | {"HIP_PLATFORM": "amd"}
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "image")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------ planted mistakes


def test_a_missing_barrier_shows(library: Path) -> None:
    """Either NaN or a disagreement between the orders."""

    def run(k: Kernel) -> torch.Tensor:
        out = torch.full((2, 64), math.nan)
        k(1, 64, out, torch.arange(128.0))
        return out[:1] if "second" not in k.name else out

    for name in ("bad_missing_barrier", "bad_missing_second_barrier", "bad_no_warp_sync"):
        if name == "bad_no_warp_sync":
            results = in_orders(library, name, lambda k: run_out(k, 64))
        else:
            results = in_orders(library, name, run)
        assert not agree(results), name


def run_out(k: Kernel, n: int, grid: int = 1, shared: int = 0) -> torch.Tensor:
    """A kernel that only writes n floats a block of 64 threads."""
    out = torch.full((n,), -1.0)
    k(grid, 64, out, shared=shared)
    return out


def test_uninitialised_shared_memory_is_nan(library: Path) -> None:
    """Never written, or left by another block."""
    for order in ORDERS:
        out = run_out(kernel(library, "bad_uninitialised", order), 64)
        assert out.isnan().nonzero().tolist() == [[5]]
        out = run_out(kernel(library, "bad_stale", order), 5 * 64, grid=5)
        assert out[64:].isnan().all() and (out[:64] == 1).all()


def test_a_warp_taken_for_32_lanes(libraries: dict[str, Path]) -> None:
    """Right at 32, wrong at 64: why every kernel is tested at both."""
    x = torch.arange(64.0)
    expected = torch.cat([x[:32].sum().expand(32), x[32:].sum().expand(32) + 1])
    for name, right in (("32", True), ("64", False)):
        out = torch.empty(64)
        kernel(libraries[name], "bad_warp32")(1, 64, out, x)
        assert torch.equal(out, expected) == right


def test_a_copy_not_waited_for(library: Path) -> None:
    """Poison in forward order, where copies land at the wait."""
    x, out = torch.randn(256), torch.empty(64)
    kernel(library, "bad_copy_not_waited", "forward")(1, 64, out, x, shared=1024)
    assert out.isnan().all()


REPORTED = {
    "bad_divergent_barrier": r"divergent __syncthreads: gpu_emulator.cu:\d+ and gpu_emulator.cu:\d+",
    "bad_early_exit": r"left the kernel",
    "bad_barrier_and_shuffle": r"deadlock: \d+ threads wait at the __syncthreads of gpu_emulator.cu:\d+ and \d+ at "
    r"the warp operation of gpu_emulator.cu:\d+",
    "bad_different_shuffles": r"lanes of one warp meet at different operations: gpu_emulator.cu:\d+ and",
    "bad_shuffle_after_exit": r"left the kernel",
    "bad_lane_out_of_range": r"shuffle from lane (32|64) of a warp of (32|64)",
    "bad_before_dynamic": r"wrote \d bytes before its dynamic shared memory",
}


@pytest.mark.parametrize("name", REPORTED)
def test_mistakes_are_reported_in_every_order(library: Path, name: str) -> None:
    """As BackendError with the kernel's name; the next launch is right again."""
    for order in ORDERS:
        with pytest.raises(BackendError, match=f"^{name}: .*{REPORTED[name]}"):
            run_out(kernel(library, name, order), 64, shared=256)
        out = torch.empty(64)
        kernel(library, "good_reverse", order)(1, 64, out, torch.arange(64.0))
        assert torch.equal(out, torch.arange(64.0).flip(0))


def test_more_mistakes_are_reported(library: Path) -> None:
    """Those that take arguments; each error names block and thread."""
    place = r".* \(block \d+,\d+,\d+, thread \d+ of 64, warp size (32|64)\)"
    out, ints, x = torch.empty(64), torch.empty(64, dtype=torch.int32), torch.randn(260)
    wild = (2**40 - out.data_ptr()) // 4  # an address a pointer can have, wherever `out` lies
    for order in ORDERS:

        def bad(name: str, why: str, *args: object, shared: int = 0, order: Order = order) -> None:
            with pytest.raises(BackendError, match=why):
                kernel(library, name, order)(1, 64, *args, shared=shared)

        bad("bad_past_dynamic", "access past the end of its 240 bytes of dynamic" + place, out, shared=240)
        bad("bad_past_dynamic", "wrote past the end of its 255 bytes of dynamic", out, shared=255)
        bad("bad_alignment", "not aligned to the 16 bytes" + place, out, x)
        bad("bad_address", "access to the wild address" + place, out, wild)
        bad("bad_address", "null pointer" + place, None, 0)
        bad("bad_division", "division by zero" + place, ints, 0)
        bad("bad_stack", "overflow the emulator's stack" + place, out, 100000)
        bad("bad_copy_left", "left the kernel with 1 asynchronous copies not waited for" + place, out, x, shared=1024)
    kernel(library, "bad_past_dynamic")(1, 64, out, shared=256)
    assert (out == 1).all()


def test_partial_warps(library: Path) -> None:
    """A block that is no multiple of the warp has absent lanes."""
    out = torch.empty(64)
    with pytest.raises(BackendError, match=r"shuffle from lane \d+ of a warp of 8"):
        kernel(library, "bad_absent_lane")(1, 40 if Driver.open_emu(library).facts.warp == 32 else 8, out)


def test_limits(library: Path) -> None:
    """Launch bound, dynamic shared memory, grid, and a bound that is no literal."""
    out, x = torch.empty(512), torch.randn(512)
    with pytest.raises(ValueError, match="512 threads exceeds the kernel's launch bound of 256"):
        kernel(library, "good_reverse")(1, 512, out, x)
    with pytest.raises(BackendError, match="65552 bytes of dynamic shared memory exceed the limit of 65536"):
        kernel(library, "good_reverse")(1, 64, out, x, shared=65552)
    kernel(library, "good_reverse", max_dynamic_shared=227 * 1024)(1, 64, out, x, shared=227 * 1024)
    with pytest.raises(ValueError, match="at most 65535"):
        kernel(library, "good_reverse")((1, 65536), 64, out, x)
    with pytest.raises(ValueError, match="launch bound of 0"):
        kernel(library, "bad_bound")(1, 64, out)


def test_sanitizers_find_what_the_emulator_cannot(libraries: dict[str, Path]) -> None:
    """Under ASan and UBSan: a right kernel and reported mistakes run; an index past a static array is found."""
    assert CXX
    runtime = subprocess.run([CXX, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip(f"{CXX} has no libasan.so")
    script = """
import ctypes, sys
L = ctypes.CDLL(sys.argv[1])
L.qrt_emu_error.restype = ctypes.c_char_p
def launch(name, *args, shared=0):
    pointers = (ctypes.c_void_p * len(args))(*[ctypes.addressof(a) for a in args])
    return L.qrt_emu_launch(L.qrt_emu_find(name), 2, 1, 1, 64, ctypes.c_size_t(shared), pointers)
buffer = (ctypes.c_float * 512)()
p, zero, index = ctypes.c_void_p(ctypes.addressof(buffer)), ctypes.c_int(512), ctypes.c_int(int(sys.argv[2]))
for order in range(3):
    L.qrt_emu_configure(order, ctypes.c_uint64(1), ctypes.c_size_t(0))
    assert launch(b"good_sum", p, p, zero) == 0, L.qrt_emu_error()
    assert launch(b"good_copy", p, p, ctypes.c_int(1), shared=2048) == 0, L.qrt_emu_error()
    assert launch(b"bad_early_exit", p) == 1
    assert launch(b"bad_divergent_barrier", p) == 1
    assert launch(b"bad_static_index", p, index) == 0
print("clean")
"""
    environment = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}

    def run(index: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(libraries["sanitized"]), str(index)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    right = run(0)
    assert right.returncode == 0 and right.stdout == "clean\n" and not right.stderr, right.stderr
    wrong = run(1)
    assert wrong.returncode != 0 and "index 64 out of bounds" in wrong.stderr, wrong.stderr


# ------------------------------------------------------------------------------------------------ the launcher


def test_argument_errors_name_the_kernel_and_the_argument(libraries: dict[str, Path]) -> None:
    """Nothing is launched with a wrong argument."""
    k = kernel(libraries["32"], "good_parameters")
    out = torch.full((6,), 9, dtype=torch.int64)
    right: list[object] = [1, 64, out, 1, 2, 0.5, None]

    def fails(error: type[Exception], why: str, position: int, value: object) -> None:
        args = list(right)
        args[position] = value
        with pytest.raises(error, match=f"^good_parameters.*{why}"):
            k(*args)  # type: ignore[arg-type]

    fails(TypeError, "argument 0 must be a tensor, an address or None, got list", 2, [])
    fails(ValueError, "argument 0 must be a tensor on the kernel's device", 2, out.to("meta"))
    fails(TypeError, "argument 1 must be an int, got float", 3, 1.0)
    fails(OverflowError, "argument 1 does not fit 32 bits", 3, 2**31)
    fails(OverflowError, "argument 2 does not fit 64 bits", 4, -(2**63) - 1)
    fails(TypeError, "argument 3 must be a float, got str", 5, "x")
    fails(ValueError, "grid 0", 0, 0)
    fails(ValueError, "grid .*-1", 0, (1, -1))
    fails(TypeError, "grid must be an int or a tuple", 0, [1, 1, 1])
    fails(ValueError, "one-dimensional", 1, (32, 2))
    with pytest.raises(TypeError, match="takes 5 arguments, got 4"):
        k(1, 64, out, 1, 2, 0.5)
    with pytest.raises(TypeError, match="unexpected keyword 'threads'"):
        k(1, 64, out, 1, 2, 0.5, None, threads=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="shared must be an int"):
        k(1, 64, out, 1, 2, 0.5, None, shared=-1)
    assert (out == 9).all()


def test_kernels_are_found_by_name_and_signature(libraries: dict[str, Path], tmp_path: Path) -> None:
    """The emulator knows every parameter's type."""
    module = Driver.open_emu(libraries["64"]).load()
    assert set(SIGNATURES) <= set(module.names())
    with pytest.raises(BackendError, match='good_sum takes "PPi", not "PPl"'):
        module.kernel("good_sum", "PPl")
    with pytest.raises(BackendError, match="nothing: not in"):
        module.kernel("nothing", "P")
    with pytest.raises(ValueError, match="letters P i l f"):
        module.kernel("good_sum", "PPd")
    with pytest.raises(ValueError, match="forward, reverse or random"):
        Driver.open_emu(libraries["64"], "sideways")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="cannot open shared object file"):
        Driver.open_emu(tmp_path / "none.so")
    assert Driver.open_emu(libraries["64"]).facts.warp == 64
    assert Driver.open_emu(libraries["32"]).current_stream() == 0


@pytest.mark.parametrize(
    ("names", "probe"),
    [
        (("libcuda.so.1", "libcuda.so"), cuda_devices),
        (
            ("libgalaxyhip.so.5", "libgalaxyhip.so", *(f"libamdhip64.so{v}" for v in (".7", ".6", ".5", ""))),
            hip_devices,
        ),
    ],
)
def test_a_missing_driver_is_the_loader_s_own_reason(names: tuple[str, ...], probe: Callable[[], object]) -> None:
    """Where none of the libraries is installed; else the next test's stand-ins say how failures are reported."""
    reasons = []
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError as e:
            reasons.append(str(e))
    if len(reasons) < len(names):
        pytest.skip("this machine has the vendor's library")
    with pytest.raises(BackendError) as caught:
        probe()
    assert str(caught.value).startswith("; ".join(reasons))


FAKE_SCRIPT = """
import ctypes, sys
from qwen_rt.backends.gpu.driver import Driver, cuda_devices, hip_devices
from qwen_rt.errors import BackendError
cuda = sys.argv[1] == "cuda"
def message(f):
    try:
        f()
    except BackendError as e:
        return str(e)
    raise AssertionError("no error")
if sys.argv[2] == "none":
    print(message(cuda_devices if cuda else hip_devices))
    print(message(lambda: Driver.open_cuda(0) if cuda else Driver.open_hip(0)))
    sys.exit()
class Tensor:
    is_cuda, is_cpu = True, False
    def data_ptr(self):
        return 0xabc000
facts = cuda_devices() if cuda else hip_devices()
print([(f.index, f.name, f.total_memory >> 30, f.compute_capability, f.warp, f.max_dynamic_shared) for f in facts])
open_device = Driver.open_cuda if cuda else Driver.open_hip
print(message(lambda: open_device(2)))
driver = open_device(1)
if cuda:
    print(message(lambda: driver.load(b"bad")))
module = driver.load(b"image")
print(message(lambda: module.kernel("absent", "P")))
if cuda:
    print(message(lambda: module.kernel("there", "PPlf")))
    print(message(lambda: module.kernel("there", "Pil")))
kernel = module.kernel("there", "Pilf")
print(kernel, kernel.max_threads, kernel.static_shared, kernel.registers, kernel.local_bytes)
kernel((1, 2, 3), 256, Tensor(), -5, 1 << 40, 0.25, shared=128, stream=0x77)
if cuda:
    kernel(4, 64, 0x10, 1, 2, 3, shared=100000)
    kernel(4, 64, 0x10, 1, 2, 3, shared=100000)
print(message(lambda: kernel(4, 64, 0x10, 1, 2, 3, shared=300000)))
class Host(Tensor):
    is_cuda = False
try:
    kernel(4, 64, Host(), 1, 2, 3)
except ValueError as e:
    print(e)
del kernel, module
name = "libcuda.so.1" if cuda else "libgalaxyhip.so.5"
library = ctypes.CDLL(name)
library.fake_log.restype = ctypes.c_char_p
print(library.fake_log().decode())
"""

CUDA_SAYS = """[(0, 'Fake 0', 80, (9, 0), 32, 232448), (1, 'Fake 1', 80, (9, 0), 32, 232448)]
there is no CUDA device 2: the driver shows 2
cuModuleLoadDataEx failed: CUDA_ERROR_NO_BINARY_FOR_GPU: no kernel image is available: ptxas says why
absent: cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND: named symbol not found
there: parameter 1 takes 4 bytes, which the signature "PPlf" does not say
there: parameter 3 takes 4 bytes, which the signature "Pil" does not say
<kernel there(Pilf)> 256 1024 64 8
there: 300000 bytes of dynamic and 1024 of static shared memory exceed this card's 232448
there: argument 0 must be a tensor on the kernel's device, got Host
"""
CUDA_LAUNCHES = """push 0x1001
launch 1,2,3 256,1,1 128 0x77: abc000 -5 1099511627776 0.25
pop
push 0x1001
set 8=100000
launch 4,1,1 64,1,1 100000 (nil): 10 1 2 3
pop
push 0x1001
launch 4,1,1 64,1,1 100000 (nil): 10 1 2 3
pop
push 0x1001
pop
push 0x1001
unload
pop
"""
HIP_SAYS = """[(0, 'Fake DCU 0', 64, (0, 0), 64, 65536), (1, 'Fake DCU 1', 64, (0, 0), 64, 65536)]
there is no HIP device 2: the runtime shows 2
absent: hipModuleGetFunction failed: hipErrorNotFound: named symbol not found (libgalaxyhip.so.5)
<kernel there(Pilf)> 256 1024 0 0
there: 300000 bytes of dynamic and 1024 of static shared memory exceed the 65536 of a block
there: argument 0 must be a tensor on the kernel's device, got Host
"""
HIP_LAUNCHES = """device 1
launch 1,2,3 256,1,1 128 0x77: abc000 -5 1099511627776 0.25
device 0
device 1
unload
device 0
"""


@pytest.mark.parametrize("kind", ["cuda", "hip"])
def test_what_a_driver_is_asked(kind: str, tmp_path: Path) -> None:
    """Arguments, geometry, context, shared memory and error texts, seen from a stand-in for the vendor's library."""
    assert CXX
    name = "libcuda.so.1" if kind == "cuda" else "libgalaxyhip.so.5"
    define = ["-DFAKE_CUDA"] if kind == "cuda" else []
    source = str(HERE / "gpu_fake_driver.cpp")
    subprocess.run([CXX, "-shared", "-fPIC", *define, source, "-o", str(tmp_path / name)], check=True)

    def run(case: str, **extra: str) -> str:
        environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)} | extra
        command = [sys.executable, "-c", FAKE_SCRIPT, kind, case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run("two")
    says, launches = (CUDA_SAYS, CUDA_LAUNCHES) if kind == "cuda" else (HIP_SAYS, HIP_LAUNCHES)
    assert printed.startswith(says), printed
    assert launches in printed, printed
    failure = {
        "cuda": "cuInit failed: CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected\n",
        "hip": "hipInit failed: hipErrorNoDevice: no ROCm-capable device is detected (libgalaxyhip.so.5)\n",
    }[kind]
    assert run("none", FAKE_NO_DEVICE="1") == 2 * failure
