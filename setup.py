"""Builds the native CPU extension `qwen_rt._cpu` (pybind11, no torch linkage). All else is in pyproject.toml.

The extension is optional: without a C++17 compiler the package installs and the slow reference backend serves,
which it says loudly. `make` checks that it was built.
"""

import platform
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ROOT = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")
# Instruction sets are chosen at run time: only the files named for one are compiled for it.
ISA_FLAGS = {"_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"]}


class BuildExt(build_ext):
    """build_ext that adds a file's own instruction-set flags."""

    def build_extensions(self) -> None:
        """Wrap the compiler's per-file step."""
        inner = self.compiler._compile

        def compile_one(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            flags = next((f for suffix, f in ISA_FLAGS.items() if src.endswith(suffix)), []) if X86 else []
            return inner(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_one
        super().build_extensions()


ParallelCompile(default=0).install()
setup(
    ext_modules=[
        Pybind11Extension(
            "qwen_rt._cpu",
            sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp")),
            depends=sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.h")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
