"""The compile gate: every kernel by every compiler that is here, its resources, and the toolchain around them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import images
import pytest
from fill_cache import HIPRTC_ARCH, HIPRTC_MODULES, NVCC_ARCH
from needs import need_compiler

from qwen_rt.backends.gpu import compilers, toolchain
from qwen_rt.backends.gpu.compilers import CUDA_ARCHS, HIP_ARCHS, CompileFailed, Compiler
from qwen_rt.config import Settings
from qwen_rt.errors import BackendError

ROOT = toolchain.source_root()
MODULES = toolchain.modules()
LDS = 64 << 10  # bytes of a compute unit's local memory on gfx9
SHARED = 48 << 10  # bytes of static shared memory a CUDA block may have
FRAME = 32  # bytes of local memory: what ptxas may keep around calls of its own slow paths (division, square root)
NO_BF16 = ("sm_75", "gfx906")  # no such arithmetic: float16 is computed in, and matrix kernels may lack a bf16 variant


def compile_all(compiler: Compiler, arch: str, names: Sequence[str] = MODULES) -> dict[str, bytes]:
    """Module -> image through the disk cache, two at a time; every failure is reported, not the first alone."""
    failures = []

    def one(module: str) -> bytes:
        try:
            return toolchain.compiled(compiler, module, arch).data
        except CompileFailed as e:
            failures.append(f"{module}: {e}")
            return b""

    with ThreadPoolExecutor(2) as pool:
        made = dict(zip(names, pool.map(one, names), strict=True))
    assert not failures, "\n".join(failures)
    return made


@pytest.fixture(scope="session")
def registered() -> dict[str, set[str]]:
    """Module -> the kernels that its QRT_REGISTER lines name, after g++'s preprocessor."""
    gxx = compilers.find_gxx()
    need_compiler("g++", gxx, "no C++ compiler on PATH")
    assert gxx is not None
    return {module: images.registered(gxx.path, ROOT, module) for module in MODULES}


def complete(image: bytes, arch: str, names: set[str]) -> set[str]:
    """The kernels of an image: some variant of every registered operation and type, and nothing else.

    Variants are for matrix units or without (_simt), by rows (_r8), and for weights with minimums (_min).
    """

    def variants(kernels: set[str]) -> set[str]:
        return {re.sub(r"_simt|_min|_r\d+", "", k) for k in kernels if arch not in NO_BF16 or "bf16" not in k}

    assert names, "a module that registers no kernel"
    found = images.kernel_names(image)
    assert found <= names, f"kernels without QRT_REGISTER: {found - names}"
    assert variants(found) == variants(names)
    return found


# -- NVIDIA --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def nvrtc(compiled_ahead: None) -> compilers.Nvrtc:
    """The newest NVRTC of this machine."""
    found = compilers.find_nvrtc()
    need_compiler("nvrtc", found, "libnvrtc.so not found; pip install nvidia-cuda-nvrtc")
    return found[0]


@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_nvrtc_compiles_every_kernel(arch: str, nvrtc: compilers.Nvrtc, registered: dict[str, set[str]]) -> None:
    if compilers.arch_number(arch) not in nvrtc.architectures():
        pytest.skip(f"{nvrtc.name} does not know {arch}")
    for module, image in compile_all(nvrtc, arch).items():
        fits_cuda(image, complete(image, arch, registered[module]))


@pytest.mark.usefixtures("compiled_ahead")
def test_nvcc_compiles_every_kernel(registered: dict[str, set[str]]) -> None:
    nvcc = compilers.find_nvcc()
    need_compiler("nvcc", nvcc, "not on PATH")
    assert nvcc is not None
    for module, image in compile_all(nvcc, NVCC_ARCH).items():
        fits_cuda(image, complete(image, NVCC_ARCH, registered[module]))


def fits_cuda(image: bytes, kernels: set[str]) -> None:
    """Every kernel keeps its values in registers and fits the static shared memory of a block."""
    found = images.cubin_resources(image)
    assert found.keys() == kernels
    assert not {k: r for k, r in found.items() if r.stack > FRAME}, (
        "values in local memory: spilled registers or arrays"
    )
    assert not {k: r for k, r in found.items() if r.shared > SHARED}


WIDE = """
extern "C" __global__ void __launch_bounds__(1024) wide(float* p, int n) {
  float a[100];
#pragma unroll
  for (int i = 0; i < 100; ++i) a[i] = p[i * 37 + threadIdx.x];
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int i = 0; i < 100; ++i) a[i] = a[i] * a[(i + 1) % 100] + p[j];
  }
#pragma unroll
  for (int i = 0; i < 100; ++i) p[i * 41 + threadIdx.x] = a[i];
}
"""


def test_the_gate_sees_a_kernel_that_spills(nvrtc: compilers.Nvrtc, tmp_path: Path) -> None:
    (tmp_path / "wide.cu").write_text(WIDE)  # 100 values a thread, 64 registers
    image, log = nvrtc.compile(tmp_path, "wide", "sm_80", {})
    assert images.ptxas_spills(log)["wide"] > 0
    with pytest.raises(AssertionError, match="values in local memory"):
        fits_cuda(image, {"wide"})


def test_nvrtc_makes_ptx_for_a_card_newer_than_it_knows(nvrtc: compilers.Nvrtc) -> None:
    newest = max(nvrtc.architectures())
    data, _ = nvrtc.compile(ROOT, "norm", f"sm_{newest + 10}", {})
    assert f".target sm_{newest}".encode() in data and data.endswith(b"\0")
    with pytest.raises(CompileFailed, match=r"does not know sm_30: it compiles for"):
        nvrtc.compile(ROOT, "norm", "sm_30", {})


# -- AMD, Hygon ----------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("compiled_ahead")
@pytest.mark.parametrize("arch", HIP_ARCHS)
def test_hipcc_compiles_every_kernel(arch: str, registered: dict[str, set[str]], tmp_path: Path) -> None:
    hipcc, tool = compilers.find_hipcc(), images.readelf()
    need_compiler("hipcc", hipcc and tool, "hipcc or llvm-readelf not found; apt install hipcc")
    assert hipcc is not None and tool is not None
    for module, image in compile_all(hipcc, arch).items():
        kernels = complete(image, arch, registered[module])
        found = images.amd_resources(image, tool, tmp_path)
        assert found.keys() == kernels
        for kernel, r in found.items():
            assert r.warp == 64, f"{kernel}: wave{r.warp}"
            assert r.max_block <= 1024 and r.max_block % 64 == 0, f"{kernel}: {r}"
            assert r.shared <= LDS, f"{kernel}: {r.shared} bytes of LDS"
            assert r.spills == 0 and r.stack <= FRAME, f"{kernel} keeps values in memory: {r}"


@pytest.mark.usefixtures("compiled_ahead")
def test_hiprtc_compiles_the_same_sources(registered: dict[str, set[str]]) -> None:
    hiprtc = compilers.find_hiprtc()
    need_compiler("hiprtc", hiprtc, "no libhiprtc.so and no HIP runtime with one; apt install hipcc")
    assert hiprtc is not None
    for module, image in compile_all(hiprtc, HIPRTC_ARCH, HIPRTC_MODULES).items():
        complete(image, HIPRTC_ARCH, registered[module])


def test_an_architecture_only_dtk_knows_is_a_reason_and_not_a_crash(settings: Settings) -> None:
    if not toolchain.available("gfx928", settings)[0]:
        pytest.skip("no HIP compiler here")
    with pytest.raises(BackendError, match=r"no image of 'norm' for gfx928:\n  prebuilt: .*\n") as e:
        toolchain.image("norm", "gfx928", settings=settings)
    assert "hiprtc" in str(e.value) and "hipcc" in str(e.value)


# -- the cache, with a compiler whose output is known ----------------------------------------------------------------
class Recorder:
    """A compiler that counts: its image is its arguments and the count."""

    name = "nvrtc 0.0"
    identity = "a recorder"

    def __init__(self, fails: str = "") -> None:
        self.runs = 0
        self.fails = fails

    def options(self, arch: str, defines: Mapping[str, object]) -> list[str]:
        return [arch, *compilers.defines_options(defines)]

    def compile(self, root: Path, module: str, arch: str, defines: Mapping[str, object]) -> tuple[bytes, str]:
        if self.fails:
            raise CompileFailed(self.fails)
        self.runs += 1
        return f"{module} {arch} {dict(defines)} run {self.runs}".encode(), "messages"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A cache of the test's own."""
    return Settings.from_env({**os.environ, "QWEN_RT_CACHE": str(tmp_path / "cache")})


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """The only compiler of the machine, as far as the toolchain can see."""
    one = Recorder()
    monkeypatch.setattr(toolchain, "available", lambda arch, settings: ([one], ["nvcc: absent"]))
    return one


def entry(settings: Settings) -> Path:
    """The one entry of the cache."""
    (found,) = (settings.cache / "kernels").glob("*.bin")
    return found


def test_the_second_time_is_from_the_cache(settings: Settings, recorder: Recorder) -> None:
    first = toolchain.image("norm", "sm_80", settings=settings)
    again = toolchain.image("norm", "sm_80", settings=settings)
    assert (first.route, again.route) == ("nvrtc 0.0", "nvrtc 0.0, cached")
    assert again.data == first.data == b"norm sm_80 {} run 1"
    assert (first.log, again.log) == ("messages", "")


@pytest.mark.parametrize("change", ["arch", "defines", "compiler", "module"])
def test_every_part_of_the_key_counts(change: str, settings: Settings, recorder: Recorder) -> None:
    toolchain.image("norm", "sm_80", settings=settings)
    if change == "compiler":
        recorder.identity = "another build of it"
    toolchain.image(
        "norm" if change != "module" else next(m for m in MODULES if m != "norm"),
        "sm_80" if change != "arch" else "sm_86",
        {"A": 1} if change == "defines" else None,
        settings=settings,
    )
    assert recorder.runs == 2


def test_a_changed_source_or_header_is_compiled_again(
    settings: Settings, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "src"
    root.mkdir()
    (root / "compat.h").write_text("")
    (root / "inner.cuh").write_text('# include "compat.h"\n')
    (root / "a.cu").write_text('#if 0\n#include "inner.cuh"\n#endif\n#include <missing.h>\n')
    (root / "b.cu").write_text("")
    monkeypatch.setattr(toolchain, "source_root", lambda: root)

    def runs(module: str) -> int:
        toolchain.image(module, "sm_80", settings=settings)
        return recorder.runs

    assert (runs("a"), runs("b"), runs("a")) == (1, 2, 2)
    (root / "inner.cuh").write_text('#include "compat.h"  // changed\n')
    assert (runs("b"), runs("a")) == (2, 3)
    (root / "compat.h").write_text("// changed\n")
    assert (runs("b"), runs("a"), runs("a")) == (3, 4, 4)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:10],
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: flip(raw, len(raw) - 1),
        lambda raw: flip(raw, 0),
        lambda raw: raw[raw.index(b"{") :],
        lambda raw: raw.replace(b'"size"', b'"sise"'),
        lambda raw: raw.split(b"\n")[0] + b"\n[]\n",
        lambda raw: raw.replace(b"kernel 1", b"kernel 0"),
        lambda raw: os.urandom(len(raw)),
        lambda raw: b"\x7fELF" + raw,
    ],
)
def test_a_damaged_entry_is_built_again_never_loaded(
    damage: Callable[[bytes], bytes], settings: Settings, recorder: Recorder
) -> None:
    toolchain.image("norm", "sm_80", settings=settings)
    path = entry(settings)
    path.write_bytes(damage(path.read_bytes()))
    assert toolchain.image("norm", "sm_80", settings=settings).data.endswith(b"run 2")
    assert toolchain.image("norm", "sm_80", settings=settings).route.endswith("cached")
    assert recorder.runs == 2


def test_a_whole_entry_of_another_key_is_not_loaded(settings: Settings, recorder: Recorder) -> None:
    toolchain.image("norm", "sm_80", settings=settings)
    path = entry(settings)
    foreign = path.read_bytes()
    path.unlink()
    toolchain.image("norm", "sm_86", settings=settings)
    entry(settings).write_bytes(foreign)
    assert toolchain.image("norm", "sm_86", settings=settings).data.startswith(b"norm sm_86")
    assert recorder.runs == 3


def test_a_cache_that_cannot_be_written_is_said_and_not_fatal(settings: Settings, recorder: Recorder) -> None:
    settings.cache.write_text("a file where the folder should be")
    made = toolchain.image("norm", "sm_80", settings=settings)
    assert made.route.startswith("nvrtc 0.0 (not cached: ") and made.data


SLOW_COMPILER = """
import os, sys, time
from pathlib import Path
from qwen_rt.backends.gpu import toolchain
from qwen_rt.config import Settings

class Slow:
    name = identity = "nvrtc 0.0"
    def options(self, arch, defines):
        return []
    def compile(self, *args):
        (Path(sys.argv[1]) / f"ran-{os.getpid()}").touch()
        time.sleep(1)
        return b"image", ""

toolchain.available = lambda arch, settings: ([Slow()], [])
made = toolchain.image("norm", "sm_80", settings=Settings.from_env({"QWEN_RT_CACHE": sys.argv[1]}))
print(made.data.decode(), "|", made.route)
"""


def test_two_processes_compile_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW_COMPILER, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(p.communicate(timeout=120)[0].strip() for p in both)
    assert said == ["image | nvrtc 0.0", "image | nvrtc 0.0, cached"]
    assert len(list(tmp_path.glob("ran-*"))) == 1


def test_every_route_names_its_reason(settings: Settings, recorder: Recorder) -> None:
    recorder.fails = "norm.cu(3): error: no"
    with pytest.raises(BackendError) as e:
        toolchain.image("norm", "sm_80", settings=settings)
    assert str(e.value).splitlines() == [
        "no image of 'norm' for sm_80:",
        "  prebuilt: this installation holds no prebuilt kernels",
        "  nvcc: absent",
        "  nvrtc 0.0: norm.cu(3): error: no",
    ]
    assert not list((settings.cache / "kernels").glob("*.bin"))
    with pytest.raises(BackendError, match=r"there is no device module 'nrom'; there are: .*norm"):
        toolchain.image("nrom", "sm_80", settings=settings)


def test_a_driver_too_old_is_named(settings: Settings, nvrtc: compilers.Nvrtc) -> None:
    with pytest.raises(BackendError, match=r"the driver serves CUDA 10\.2, too old for images of CUDA 1\d; update the"):
        toolchain.image("norm", "sm_80", driver_cuda=(10, 2), settings=settings, routes=("nvrtc",))


# -- prebuilt --------------------------------------------------------------------------------------------------------
@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with images prebuilt for sm_80 by setup.py's own function."""
    monkeypatch.setattr(toolchain, "PACKAGE", tmp_path / "qwen_rt")
    monkeypatch.setattr(toolchain, "source_root", lambda: ROOT)
    maker = Recorder()
    maker.name = "nvcc 12.8"
    out = tmp_path / "qwen_rt/_prebuilt"
    manifest = compilers.prebuild(ROOT, out, [(maker, "sm_80")], 2)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def prebuilt(arch: str, settings: Settings, **options: object) -> toolchain.Image:
    return toolchain.image("norm", arch, settings=settings, routes=("prebuilt",), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89"])
def test_prebuilt_serves_its_generation(arch: str, package: Path, settings: Settings) -> None:
    made = prebuilt(arch, settings)
    assert made.route == "prebuilt sm_80 (nvcc 12.8)" and made.data.startswith(b"norm sm_80")


@pytest.mark.parametrize("arch", ["sm_75", "sm_90a", "gfx906"])
def test_prebuilt_serves_no_other(arch: str, package: Path, settings: Settings) -> None:
    with pytest.raises(BackendError, match=f"prebuilt: not built for {arch}"):
        prebuilt(arch, settings)


def test_prebuilt_of_other_sources_is_ignored(package: Path, settings: Settings) -> None:
    manifest = json.loads((package / "manifest.json").read_text())
    manifest["images"]["sm_80/norm.cubin"]["source"] = "0" * 64
    (package / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BackendError, match="was built from other sources"):
        prebuilt("sm_80", settings)


def test_prebuilt_damaged_or_for_another_driver_is_ignored(package: Path, settings: Settings) -> None:
    with pytest.raises(BackendError, match=r"the driver serves CUDA 11\.4, too old"):
        prebuilt("sm_80", settings, driver_cuda=(11, 4))
    assert prebuilt("sm_80", settings, driver_cuda=(12, 0))
    with pytest.raises(BackendError, match="built without -DA=1"):
        prebuilt("sm_80", settings, defines={"A": 1})
    (package / "sm_80/norm.cubin").write_bytes(b"something else")
    with pytest.raises(BackendError, match=r"damaged \(wrong hash\)"):
        prebuilt("sm_80", settings)
    (package / "manifest.json").write_text("{")
    with pytest.raises(BackendError, match="its manifest does not read"):
        prebuilt("sm_80", settings)


# -- pruning ---------------------------------------------------------------------------------------------------------
def days_ago(path: Path, days: float, size: int = 1) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - days * 86400,) * 2)
    return path


def test_what_nobody_used_for_long_is_deleted(tmp_path: Path) -> None:
    """Reading an entry is a use of it; what is not the cache's own stays."""
    store = toolchain.Cache(tmp_path / "kernels")
    store.prune()  # of no folder at all
    store.write("norm", "0123", b"image")
    days_ago(other := store.folder / "notes.txt", 1000)
    gone = [
        days_ago(store.folder / name, 91) for name in ("a.bin", "a.bin.lock", "libemu.so", "libemu.json", ".a.part")
    ]
    kept = [days_ago(store.folder / "b.bin", 89), other, store.path("norm", "0123")]
    os.utime(store.path("norm", "0123"), (0, 0))
    assert store.read("norm", "0123") == b"image"
    store.prune()
    assert not any(p.exists() for p in gone) and all(p.exists() for p in kept)


def test_beyond_its_size_the_cache_loses_what_was_used_longest_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "MAX_CACHE_BYTES", 250)
    store = toolchain.Cache(tmp_path / "kernels")
    files = {days: days_ago(store.folder / f"{days}.bin", days, 100) for days in (0.1, 0.5, 2, 3, 4)}
    store.prune()
    assert [days for days, path in files.items() if path.exists()] == [0.1, 0.5]
    days_ago(store.folder / "0.2.bin", 0.2, 1000)
    store.prune()
    assert len(list(store.folder.iterdir())) == 3, "what was used today may be about to be opened"


def test_compiling_prunes(settings: Settings, recorder: Recorder) -> None:
    toolchain.image("norm", "sm_80", settings=settings)
    days_ago(entry(settings), 100)
    toolchain.image("norm", "sm_86", settings=settings)
    assert "sm_86" in entry(settings).name


# -- the emulator's library ------------------------------------------------------------------------------------------
def test_emulator_library_is_checked_before_it_is_used(settings: Settings) -> None:
    need_compiler("g++", compilers.find_gxx(), "no C++ compiler on PATH")
    path = toolchain.emu_library(32, only=["norm"], settings=settings)
    intact = path.read_bytes()
    path.write_bytes(flip(intact, len(intact) // 2))
    assert toolchain.emu_library(32, only=["norm"], settings=settings) == path
    assert path.read_bytes() == intact
    with pytest.raises(BackendError, match="warp sizes 32 and 64, not 16"):
        toolchain.emu_library(16)


def test_importing_the_toolchain_compiles_nothing_and_loads_no_library() -> None:
    code = (
        "import sys, qwen_rt.backends.gpu.toolchain as t\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'nvrtc' not in maps and 'amdhip' not in maps and not t._nvcc.cache_info().currsize"
    )
    compilers.run([sys.executable, "-c", code])
