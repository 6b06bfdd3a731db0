"""Builds the native extensions (pybind11, no torch linkage) and the GPU kernels. All else is in pyproject.toml.

The extensions are optional: without a C++17 compiler the package installs and the slow reference backend serves,
which it says loudly. `make` checks that they were built.

The GPU sources go into the package as qwen_rt/_gpu_src: a machine with a card compiles them at first use. Where nvcc or
hipcc is there, they are also compiled now, into qwen_rt/_prebuilt:

    QWEN_RT_PREBUILD      1 or 0; by default on for wheels (`pip install .`), off for editable installs
    QWEN_RT_CUDA_ARCHS    "75;80;86;89;90a;100;120" (those nvcc does not know are left out)
    QWEN_RT_HIP_ARCHS     "gfx906;gfx908;gfx90a", and with a DTK compiler "gfx926;gfx928;gfx936" as well
"""

import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
# Instruction sets are chosen at run time: only the files named for one are compiled for it.
ISA_FILE = ROOT / "csrc/cpu/isa_flags.txt"
ISA_FLAGS = {end: flags for arch, end, *flags in map(str.split, ISA_FILE.read_text().splitlines()) if arch == MACHINE}


class BuildExt(build_ext):
    """build_ext that adds a file's own instruction-set flags."""

    def build_extensions(self) -> None:
        """Wrap the compiler's per-file step."""
        inner = self.compiler._compile

        def compile_one(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            flags = next((f for suffix, f in ISA_FLAGS.items() if src.endswith(suffix)), [])
            return inner(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_one
        super().build_extensions()


class BuildPy(build_py):
    """build_py that adds the GPU sources, and their images where a compiler is there."""

    def run(self) -> None:
        """Copy and compile after the Python files; an editable install finds the sources beside the package."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "qwen_rt/_gpu_src"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(ROOT / "csrc/gpu", target, ignore=shutil.ignore_patterns("launcher"))
        if os.environ.get("QWEN_RT_PREBUILD", "0" if self.editable_mode else "1") != "0":
            prebuild((ROOT if self.editable_mode else Path(self.build_lib)) / "qwen_rt/_prebuilt")


def prebuild(out: Path) -> None:
    """Compile the GPU sources into `out` for every architecture asked for and known, on all cores."""
    file = ROOT / "qwen_rt/backends/gpu/compilers.py"
    spec = importlib.util.spec_from_file_location("qwen_rt_gpu_compilers", file)
    compilers = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = compilers
    spec.loader.exec_module(compilers)

    def wanted(variable: str, default: tuple[str, ...]) -> list[str]:
        return [x.strip() for x in (os.environ.get(variable) or ";".join(default)).split(";") if x.strip()]

    jobs = []
    if nvcc := compilers.find_nvcc([Path(os.environ[v]) for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]):
        known = nvcc.architectures()
        archs = [f"sm_{a.removeprefix('sm_')}" for a in wanted("QWEN_RT_CUDA_ARCHS", compilers.CUDA_ARCHS)]
        jobs += [(nvcc, a) for a in archs if compilers.arch_number(a) in known]
    if hipcc := compilers.find_hipcc([Path(os.environ["ROCM_PATH"])] if os.environ.get("ROCM_PATH") else []):
        jobs += [(hipcc, a) for a in wanted("QWEN_RT_HIP_ARCHS", compilers.hip_archs(hipcc))]
    shutil.rmtree(out, ignore_errors=True)
    if not jobs:
        return
    start = time.perf_counter()
    manifest = compilers.prebuild(ROOT / "csrc/gpu", out, jobs, os.cpu_count() or 1)
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))
    archs = ", ".join(sorted({name.split("/")[0] for name in manifest["images"]}))
    print(f"qwen-rt: {len(manifest['images'])} GPU images for {archs} in {time.perf_counter() - start:.0f} s")


ParallelCompile(default=0).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "qwen_rt._cpu",
            sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp")),
            depends=sorted(str(p.relative_to(ROOT)) for p in [*(ROOT / "csrc/cpu").glob("*.h"), ISA_FILE]),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
            optional=True,
        ),
        Pybind11Extension(
            "qwen_rt._gpu",
            sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/gpu/launcher").glob("*.cpp")),
            depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/gpu/launcher").glob("*.h")),
            cxx_std=17,
            extra_compile_args=["-O2", "-Wall", "-Wextra"],
            extra_link_args=["-pthread", "-ldl"],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
